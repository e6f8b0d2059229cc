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
# EXIF orientations in which width and height are exchanged.
_EXIF_ORIENTATION, _TURNED = 0x0112, (5, 6, 7, 8)


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

  def plain_file(self) -> pathlib.Path | None:
    """The image's file, if it is local and other programs see in it what was segmented."""
    if not str(self.file) or buckets.is_bucket(self.file):
      return None
    path = expand(self.file)
    if path.suffix.lower() not in PLAIN_SUFFIXES or not path.is_file():
      return None
    try:
      with Image.open(path) as file:
        turned = file.getexif().get(_EXIF_ORIENTATION) in _TURNED
        size = file.size if turned else file.size[::-1]
    except (OSError, UnidentifiedImageError):  # changed since
      return None
    return path if size == self.size else None

  def copy_to(self, folder: pathlib.Path, stem: str) -> pathlib.Path:
    """Copies the image's file, or writes a PNG of what was segmented; returns the path."""
    source = self.plain_file()
    if source is None:
      return save_png(folder / f"{stem}.png", Image.fromarray(self.image))
    path = folder / f"{stem}{source.suffix.lower()}"
    if path.exists() and os.path.samefile(path, source):
      return path
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
      shutil.copyfile(source, temporary)
    return path
