"""Images as arrays: resizing and normalizing, for prediction and for data sets.

`to_network` is the same preprocessing as that of the data pipelines for evaluation; `square` is
OpenAI's for classification.
"""

import functools
from collections.abc import Callable, Sequence

import cv2
import numpy as np
from PIL import Image

from rpn_jax.base import colors, exif, pictures

# In which `for_classification` resizes.
_OWN_MODES = ("RGB", "L", "P", "1", "RGBA", "LA", "PA", "CMYK", "YCbCr", "HSV", "RGBX")
# Per channel (R, G, B), for values in [0, 1]: CLIP's training, and the official RPN code.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def short_side_size(
  height: int, width: int, short_side: int, long_side: int = 0
) -> tuple[int, int]:
  """(height, width) of the same aspect with a short side of `short_side` pixels.

  If the long one then exceeds `long_side`, unless that is 0, it becomes that. As in detectron2, the
  second factor is applied to the result of the first.
  """
  shorter = min(height, width)
  factor = short_side / shorter
  sides = [float(short_side) if n == shorter else n * factor for n in (height, width)]
  if long_side and max(sides) > long_side:
    sides = [side * (long_side / max(sides)) for side in sides]
  return max(1, int(sides[0] + 0.5)), max(1, int(sides[1] + 0.5))


def _resize_opencv(image_HxWx3: np.ndarray, size: tuple[int, int]) -> np.ndarray:
  return cv2.resize(image_HxWx3, size[::-1], interpolation=cv2.INTER_LINEAR)


def _resize_pillow(image_HxWx3: np.ndarray, size: tuple[int, int]) -> np.ndarray:
  return np.array(Image.fromarray(image_HxWx3).resize(size[::-1], Image.Resampling.BILINEAR))


# By the library whose way it is: bilinear on uint8, without antialias and with it.
RESIZES = {"mmsegmentation": _resize_opencv, "detectron2": _resize_pillow}


def resize(
  image_HxWx3: np.ndarray, size: tuple[int, int], library: str = "mmsegmentation"
) -> np.ndarray:
  """Resizes uint8 to (height, width), bilinear, as one of RESIZES."""
  return RESIZES[library](image_HxWx3, size)


def normalize(image_HxWx3: np.ndarray, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
  """(value / 255 - mean) / std per channel of a uint8 image, as float32."""
  return cv2.LUT(image_HxWx3, _normalization_table(tuple(mean), tuple(std)))


@functools.cache
def _normalization_table(mean: tuple[float, ...], std: tuple[float, ...]) -> np.ndarray:
  """The 256 values of each channel, normalized in float32: a lookup table, in a single pass."""
  offset, scale = ((np.asarray(x, np.float64) * 255).astype(np.float32) for x in (mean, std))
  return ((np.arange(256, dtype=np.float32)[:, None] - offset) / scale)[None]


def to_network(
  image_HxWx3: np.ndarray,
  short_side: int,
  mean: Sequence[float],
  std: Sequence[float],
  long_side: int = 0,
  library: str = "mmsegmentation",
) -> np.ndarray:
  """Resizes, see `short_side_size` and `resize`, and normalizes: float32."""
  height, width = image_HxWx3.shape[:2]
  size = short_side_size(height, width, short_side, long_side)
  return normalize(resize(image_HxWx3, size, library), mean, std)


def for_classification(
  image: pictures.ImageSource,
  side: int,
  mean: Sequence[float] = CLIP_MEAN,
  std: Sequence[float] = CLIP_STD,
  squash: bool = False,
  told: Callable[[object, Sequence[colors.Note]], None] = lambda name, notes: None,
) -> np.ndarray:
  """OpenAI's preprocessing (`clip.load`) after EXIF rotation: normalized float32 (side, side, 3).

  As there, an image is resized in its own mode and converted to RGB then: one with a palette by
  its nearest pixels, one with transparency by how opaque they are, all without their profiles. The
  accuracies that publishers state hold for this, so nothing is laid on a matte here. What
  OpenAI's code cannot take, more than 8 bits or Lab, is read as by `pictures.load` first.

  Args:
    image: see `pictures.load`.
    side: of the square, pixels.
    mean: subtracted per channel, in [0, 1].
    std: divided by per channel.
    squash: whether the model was trained on images squashed to a square, not on the middle ones.
    told: gets what had to be decided about the image, such as a `pictures.Told`.

  Raises:
    InputError: see `pictures.load`.
  """
  if isinstance(image, np.ndarray):
    picture = Image.fromarray(pictures.load(image).image)
    return normalize(np.array(square(picture, side, squash)), mean, std)
  with pictures.opened(image) as file:
    if file.values is None and file.mode in _OWN_MODES:
      picture, notes = exif.upright(file.pillow), (*file.notes, *exif.notes(file.image))
    else:
      read = pictures.converted(file, colors.WHITE)
      picture, notes = Image.fromarray(read.image), read.notes
    told(file.name, notes)
    return normalize(np.array(square(picture, side, squash).convert("RGB")), mean, std)


def square(image: Image.Image, side: int, squash: bool = False) -> Image.Image:
  """Resizes the short side to `side`, bicubic with antialias, and crops the middle.

  Args:
    image: of any mode.
    side: of the square, pixels.
    squash: resize both sides to `side`, and crop nothing.
  """
  if squash:
    return image.resize((side, side), Image.Resampling.BICUBIC)
  # Integer division: torchvision truncates the long side.
  width, height = (side * length // min(image.size) for length in image.size)
  left, top = round((width - side) / 2), round((height - side) / 2)
  resized = image.resize((width, height), Image.Resampling.BICUBIC)
  return resized.crop((left, top, left + side, top + side))
