"""Images in: files read, resized and normalized, for prediction and data sets alike.

`to_network` is what the data pipelines do to the images of a data set at evaluation, and `square`
what OpenAI's preprocessing does for classification.
"""

import functools
import os
import pathlib
from collections.abc import Sequence
from typing import BinaryIO

import cv2
import numpy as np
from PIL import Image, ImageOps

from rpn_jax.base.errors import InputError

# What `read` takes.
ImageSource = str | os.PathLike | BinaryIO | Image.Image | np.ndarray
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
# 20,000 x 10,000, of an image or a mask. Larger ones are refused before they are decoded: they
# would fill memory (three bytes a pixel are 600 MB; Pillow's own limit only warns).
MAX_PIXELS = 200_000_000
# Long side to short side: images are enlarged until the short side fits a window.
MAX_ASPECT = 100
# Pillow's own limit would warn of images that are allowed here; it still raises at twice ours.
Image.MAX_IMAGE_PIXELS = MAX_PIXELS
# Per channel (R, G, B), of values in [0, 1]: what CLIP was trained with, and what the official RPN
# code uses.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


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


def read(image: ImageSource, max_pixels: int = MAX_PIXELS) -> np.ndarray:
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


def check_size(where: object, size: tuple[int, int], max_pixels: int = MAX_PIXELS) -> None:
  """Refuses an image of (width, height) pixels before it is decoded.

  Raises:
    InputError: no pixels, too many, or a strip.
  """
  width, height = size
  if not 0 < width * height <= max_pixels:
    raise InputError(
      f"{where}: expected at most {max_pixels:,} pixels, got {width} x {height}; "
      "make the picture smaller"
    )
  if max(size) > MAX_ASPECT * min(size):
    raise InputError(
      f"{where}: expected a picture at most {MAX_ASPECT} times as long as wide, got "
      f"{width} x {height}; cut it"
    )


def _decoded(file: Image.Image, name: object, max_pixels: int) -> np.ndarray:
  check_size(name, file.size, max_pixels)
  return np.array(ImageOps.exif_transpose(file).convert("RGB"))


def _from_array(image: np.ndarray) -> np.ndarray:
  if image.ndim == 2:
    image = np.repeat(image[..., None], 3, axis=2)
  if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or not image.size:
    raise InputError(
      f"expected an image array (H, W, 3) uint8 in RGB, got {image.shape} {image.dtype}"
    )
  return image


def short_side_size(height: int, width: int, short_side: int) -> tuple[int, int]:
  """(height, width) with the short side exactly `short_side` pixels, however long the other."""
  factor = short_side / min(height, width)
  return int(height * factor + 0.5), int(width * factor + 0.5)


def resize(image_HxWx3: np.ndarray, size: tuple[int, int]) -> np.ndarray:
  """Resized to (height, width): bilinear on uint8, no antialiasing, as the official code trains."""
  return cv2.resize(image_HxWx3, size[::-1], interpolation=cv2.INTER_LINEAR)


def normalize(image_HxWx3: np.ndarray, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
  """(value / 255 - mean) / std per channel of a uint8 image: float32."""
  return cv2.LUT(image_HxWx3, _normalization_table(tuple(mean), tuple(std)))


@functools.cache
def _normalization_table(mean: tuple[float, ...], std: tuple[float, ...]) -> np.ndarray:
  """The 256 values of each channel, normalized in float32 as recorded: one pass over an image."""
  offset, scale = ((np.asarray(x, np.float64) * 255).astype(np.float32) for x in (mean, std))
  return ((np.arange(256, dtype=np.float32)[:, None] - offset) / scale)[None]


def to_network(
  image_HxWx3: np.ndarray, short_side: int, mean: Sequence[float], std: Sequence[float]
) -> np.ndarray:
  """Resized to a short side and normalized: float32."""
  height, width = image_HxWx3.shape[:2]
  size = short_side_size(height, width, short_side)
  return normalize(resize(image_HxWx3, size), mean, std)


def for_classification(image: ImageSource, side: int) -> np.ndarray:
  """A picture as OpenAI's preprocessing (`clip.load`) makes it: normalised f32 (side, side, 3).

  Only the turning upright by EXIF data is not theirs. Raises what `read` does.
  """
  return normalize(square(read(image), side), CLIP_MEAN, CLIP_STD)


def square(image_HxWx3: np.ndarray, side: int) -> np.ndarray:
  """Short side resized to `side`, bicubic with antialias, then the middle: uint8."""
  height, width = image_HxWx3.shape[:2]
  short = min(height, width)
  # Integer division: torchvision cuts off the fraction of the long side.
  size = (side * width // short, side * height // short)
  resized = Image.fromarray(image_HxWx3).resize(size, Image.Resampling.BICUBIC)
  left, top = (round((length - side) / 2) for length in size)
  return np.asarray(resized)[top : top + side, left : left + side]
