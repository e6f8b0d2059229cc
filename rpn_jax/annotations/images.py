"""The images that annotations belong to."""

import dataclasses
import os
import pathlib
import shutil

import numpy as np
from PIL import Image, UnidentifiedImageError

from rpn_jax.base import buckets
from rpn_jax.base.paths import expand, replacing
from rpn_jax.drawing.images import save_png

# Files that every reader of annotations opens, and in the same way.
PLAIN_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
_EXIF_ORIENTATION, _UPRIGHT = 0x0112, 1
_TURNED = (5, 6, 7, 8)  # orientations in which width and height are exchanged


@dataclasses.dataclass(frozen=True)
class Labeled:
  """An image and its label map.

  Attributes:
    image: (H, W, 3) uint8.
    labels: class ids (H, W); -1 is no class.
    file: path of the image, or "".
  """

  image: np.ndarray
  labels: np.ndarray
  file: str | os.PathLike = ""

  @property
  def size(self) -> tuple[int, int]:
    """(H, W), pixels."""
    height, width = self.labels.shape
    return height, width

  def plain_file(self, *, upright: bool = False) -> pathlib.Path | None:
    """The image's file, if it is local and other programs see in it what was segmented.

    Args:
      upright: not one that is turned by EXIF, which some programs do not read.
    """
    if not str(self.file) or buckets.is_bucket(self.file):
      return None
    path = expand(self.file)
    if path.suffix.lower() not in PLAIN_SUFFIXES or not path.is_file():
      return None
    try:
      with Image.open(path) as file:
        orientation = file.getexif().get(_EXIF_ORIENTATION, _UPRIGHT)
        size = file.size if orientation in _TURNED else file.size[::-1]
    except (OSError, UnidentifiedImageError):  # changed since
      return None
    return path if size == self.size and (orientation == _UPRIGHT or not upright) else None

  def copy_to(self, folder: pathlib.Path, stem: str) -> pathlib.Path:
    """Copies the image's file, or writes a PNG of what was segmented; returns the path."""
    source = self.plain_file(upright=True)
    if source is None:
      return save_png(folder / f"{stem}.png", Image.fromarray(self.image))
    path = folder / f"{stem}{source.suffix.lower()}"
    if path.exists() and os.path.samefile(path, source):
      return path
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
      shutil.copyfile(source, temporary)
    return path
