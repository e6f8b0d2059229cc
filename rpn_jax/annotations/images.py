"""The images that annotations belong to."""

import dataclasses
import functools
import os
import pathlib

import numpy as np
from PIL import Image, UnidentifiedImageError

from rpn_jax.base import buckets, deep_images, exif
from rpn_jax.base.origins import Origin, origin_of
from rpn_jax.base.paths import expand

# Files that every reader of annotations opens, and in the same way: of these formats and modes.
PLAIN_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
_PLAIN_MODES = ("1", "L", "P", "RGB")


@dataclasses.dataclass(frozen=True)
class Labeled:
  """An image and its label map.

  Attributes:
    image: (H, W, 3) uint8.
    labels: class ids (H, W); -1 is no class.
    file: path of the image, or "".
    page: see `Origin`.
  """

  image: np.ndarray
  labels: np.ndarray
  file: str | os.PathLike = ""
  page: int = 0

  @functools.cached_property
  def origin(self) -> Origin:
    """Which image it is of."""
    return origin_of(self.image, self.file, self.page)

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
        orientation = exif.orientation(file)
        size = file.size if orientation in exif.ON_ITS_SIDE else file.size[::-1]
        plain = _is_plain(file)
      with path.open("rb") as stream:
        plain = plain and not deep_images.is_deep_png(stream.read(32))
    except (OSError, UnidentifiedImageError):  # changed since
      return None
    if not plain:
      return None
    return path if size == self.size and (orientation == 1 or not upright) else None


def _is_plain(file: Image.Image) -> bool:
  """Whether a file has one opaque image, of 8 bits and of colors that all readers take alike.

  They drop transparency where it was laid on a matte, take the first page, and clip 16 bits.
  """
  if getattr(file, "n_frames", 1) > 1:
    return False
  if file.has_transparency_data:
    return file.convert("RGBA").getchannel("A").getextrema() == (255, 255)
  return file.mode in _PLAIN_MODES
