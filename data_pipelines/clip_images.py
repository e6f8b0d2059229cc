"""Pictures as CLIP's image tower saw them in its training, for classification."""

import pathlib

import numpy as np
from PIL import Image

from data_pipelines.datasets import read_image
from data_pipelines.transforms import CLIP_MEAN, CLIP_STD, Normalize

normalize = Normalize(CLIP_MEAN, CLIP_STD)


def load(path: pathlib.Path, side: int) -> np.ndarray:
  """A picture file as OpenAI's preprocessing (`clip.load`) makes it: normalised f32 [side,side,3].

  Only the turning upright by EXIF data is not theirs. Raises what `read_image` does.
  """
  return normalize({"image": square(read_image(path), side)})["image"]


def square(image: np.ndarray, side: int) -> np.ndarray:
  """Short side resized to `side`, bicubic with antialias, then the middle: uint8 [side,side,3]."""
  height, width = image.shape[:2]
  short = min(height, width)
  # Integer division: torchvision cuts off the fraction of the long side.
  size = (side * width // short, side * height // short)
  resized = Image.fromarray(image).resize(size, Image.Resampling.BICUBIC)
  left, top = (round((length - side) / 2) for length in size)
  return np.asarray(resized)[top : top + side, left : left + side]
