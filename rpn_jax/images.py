"""Pictures in: files read, and brought into the form that a network wants.

`to_network` is what `data_pipelines` does to the pictures of a data set at evaluation, and `square`
what OpenAI's preprocessing does for classification.
"""

import functools
import pathlib
from collections.abc import Sequence

import cv2
import numpy as np
from PIL import Image, ImageOps

from rpn_jax.errors import InputError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
# Larger pictures are refused: decoded they would fill memory (Pillow's own limit only warns).
MAX_PIXELS = 200_000_000
# Of a long side to a short one: pictures are enlarged until the short side fits a window.
MAX_ASPECT = 100
# Pillow's own limit would warn of pictures that are allowed here; it still raises at twice ours.
Image.MAX_IMAGE_PIXELS = MAX_PIXELS
# Per channel, of values in [0, 1]: what CLIP was trained with.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def find(path: str) -> list[pathlib.Path]:
  """The image files a path names: itself, or those directly in the folder.

  Raises:
    InputError: nothing is there.
  """
  root = pathlib.Path(path).expanduser()
  if not root.exists():
    raise InputError(f"{path}: expected a picture or a folder of pictures, no such file or folder")
  if root.is_file():
    return [root]
  files = sorted(p for p in root.iterdir() if p.suffix.lower() in SUFFIXES)
  if not files:
    raise InputError(f"{path}: no {', '.join(SUFFIXES)} file in this folder")
  return files


def read(image, max_pixels: int = MAX_PIXELS) -> np.ndarray:
  """A picture as uint8 RGB (H, W, 3), turned upright as its EXIF data says.

  Args:
    image: a path, an open binary file, a PIL image, or an array: (H, W, 3) or (H, W), uint8.

  Raises:
    InputError: not a picture, damaged, a strip, or of more than `max_pixels` pixels.
  """
  if isinstance(image, np.ndarray):
    return _from_array(image)
  if isinstance(image, Image.Image):
    return _decoded(image, "the image", max_pixels)
  try:
    path = pathlib.Path(image).expanduser() if isinstance(image, str) else image
    with Image.open(path) as file:
      return _decoded(file, image, max_pixels)
  except FileNotFoundError:
    raise InputError(f"{image}: expected a picture, no such file") from None
  except InputError:
    raise
  except Exception as error:  # damage surfaces as a dozen kinds, struct's and EXIF's among them
    raise InputError(
      f"{image}: expected a readable jpg, png or webp picture, got {type(error).__name__} "
      f"({' '.join(str(error).split())}); open it in a viewer to see whether it is damaged"
    ) from error


def _decoded(file: Image.Image, name, max_pixels: int) -> np.ndarray:
  width, height = file.size
  if not 0 < width * height <= max_pixels:
    raise InputError(
      f"{name}: expected at most {max_pixels:,} pixels, got {width} x {height}; "
      "make the picture smaller"
    )
  if max(file.size) > MAX_ASPECT * min(file.size):
    raise InputError(
      f"{name}: expected a picture at most {MAX_ASPECT} times as long as wide, got "
      f"{width} x {height}; cut it"
    )
  return np.array(ImageOps.exif_transpose(file).convert("RGB"))


def _from_array(image: np.ndarray) -> np.ndarray:
  if image.ndim == 2:
    image = np.repeat(image[..., None], 3, axis=2)
  if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or not image.size:
    raise InputError(
      f"expected an image array (H, W, 3) uint8 in RGB, got {image.shape} {image.dtype}"
    )
  return image


def to_network(
  image_HxWx3: np.ndarray, short_side: int, mean: Sequence[float], std: Sequence[float]
) -> np.ndarray:
  """Resized to a short side (bilinear, no antialias, as released) and normalised: float32."""
  height, width = image_HxWx3.shape[:2]
  factor = short_side / min(height, width)
  size = int(width * factor + 0.5), int(height * factor + 0.5)
  resized = cv2.resize(image_HxWx3, size, interpolation=cv2.INTER_LINEAR)
  return normalized(resized, mean, std)


def normalized(image_HxWx3: np.ndarray, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
  """(value / 255 - mean) / std of a uint8 picture: float32."""
  return cv2.LUT(image_HxWx3, _table(tuple(mean), tuple(std)))


@functools.cache
def _table(mean: tuple[float, ...], std: tuple[float, ...]) -> np.ndarray:
  """(value / 255 - mean) / std for the 256 values of each channel."""
  mean, std = (np.float32(np.asarray(x, np.float64) * 255) for x in (mean, std))
  return ((np.arange(256, dtype=np.float32)[:, None] - mean) / std)[None]


def for_classification(image, side: int) -> np.ndarray:
  """A picture as OpenAI's preprocessing (`clip.load`) makes it: normalised f32 (side, side, 3).

  Only the turning upright by EXIF data is not theirs. Raises what `read` does.
  """
  return cv2.LUT(square(read(image), side), _table(CLIP_MEAN, CLIP_STD))


def square(image_HxWx3: np.ndarray, side: int) -> np.ndarray:
  """Short side resized to `side`, bicubic with antialias, then the middle: uint8."""
  height, width = image_HxWx3.shape[:2]
  short = min(height, width)
  # Integer division: torchvision cuts off the fraction of the long side.
  size = (side * width // short, side * height // short)
  resized = Image.fromarray(image_HxWx3).resize(size, Image.Resampling.BICUBIC)
  left, top = (round((length - side) / 2) for length in size)
  return np.asarray(resized)[top : top + side, left : left + side]
