"""Sizes beyond which a file is refused before it is decoded: decoded it would fill memory."""

from PIL import Image

from data_pipelines.errors import DataError

# Of a picture or a mask: 20,000 x 10,000. Three bytes each are 600 MB.
MAX_PIXELS = 200_000_000
# Of a long side to a short one; pictures are enlarged until the short side fits a window.
MAX_ASPECT = 100
# Of a list of names, and of what a MATLAB label file unfolds to.
MAX_TEXT_BYTES = 16 << 20
MAX_MATRIX_BYTES = 2 * MAX_PIXELS

# Pillow's own limit would warn of pictures that are allowed here; it still raises at twice ours.
Image.MAX_IMAGE_PIXELS = MAX_PIXELS


def check_size(where, size: tuple[int, int]) -> None:
  """Refuses a picture of (width, height) pixels before it is decoded.

  Raises:
    DataError: no pixels, too many, or a strip.
  """
  width, height = size
  if width * height > MAX_PIXELS or not width * height:
    raise DataError(
      f"{where}: expected at most {MAX_PIXELS:,} pixels, got {width} x {height}; "
      "make the picture smaller"
    )
  if max(size) > MAX_ASPECT * min(size):
    raise DataError(
      f"{where}: expected a picture at most {MAX_ASPECT} times as long as wide, got "
      f"{width} x {height}; cut it"
    )
