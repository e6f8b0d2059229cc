"""How EXIF data turn an image. Those that cannot be read turn nothing, as in viewers."""

import contextlib

import numpy as np
from PIL import ExifTags, Image, ImageOps

from rpn_jax.base.colors import Note

# Values of the field "orientation" that exchange width and height.
ON_ITS_SIDE = (5, 6, 7, 8)
# Values of it that change something -> stored pixels as a viewer shows them (EXIF 2.3, 4.6.4).
TURNS = {
  2: lambda x: x[:, ::-1],
  3: lambda x: x[::-1, ::-1],
  4: lambda x: x[::-1],
  5: lambda x: x.swapaxes(0, 1),
  6: lambda x: np.rot90(x, -1),
  7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
  8: lambda x: np.rot90(x),
}


def orientation(image: Image.Image) -> int:
  """The field of an image; 1, upright, where there is none that can be read."""
  if image.format == "PNG" and "exif" not in image.info:
    image.load()  # the data may stand behind the pixels, whose own damage is told
  with contextlib.suppress(Exception):  # damaged data raise all kinds of errors, but only once
    image.getexif()
  with contextlib.suppress(Exception):  # values are decoded when they are asked for
    found = image.getexif().get(ExifTags.Base.Orientation, 1)
    return found if isinstance(found, int) else 1
  return 1


def upright(image: Image.Image) -> Image.Image:
  """The image as viewers show it: itself, loaded, where nothing is to be turned."""
  image.load()  # which turns a TIFF
  return ImageOps.exif_transpose(image) if orientation(image) in TURNS else image


def notes(image: Image.Image | None) -> tuple[Note, ...]:
  """What must be said of the data of an image that was opened by Pillow, or was not."""
  try:
    # Not those of the image, about which Pillow may have passed over an error when it opened it.
    Image.Exif().load((image.info.get("exif") if image else None) or b"")
  except Exception:
    return (("exif", "its EXIF data cannot be read and are left out"),)
  return ()
