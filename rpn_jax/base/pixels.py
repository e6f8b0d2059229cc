"""Image input: reading, resizing and normalizing, for prediction and for data sets.

`to_network` is the same preprocessing as that of the data pipelines for evaluation; `square` is
OpenAI's for classification.
"""

import collections
import functools
import io
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import BinaryIO

import cv2
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from rpn_jax.base import buckets, paths
from rpn_jax.base.errors import InputError

# Argument of `read`.
ImageSource = str | os.PathLike | BinaryIO | Image.Image | np.ndarray
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
# Of images that `list_images` does not take, and says so.
_OTHER_SUFFIXES = (".avif", ".bmp", ".gif", ".heic", ".heif", ".jfif", ".jp2", ".tif", ".tiff")
# 20,000 x 10,000, for images and masks. Larger ones are rejected before decoding, which would fill
# the memory (600 MB at three bytes per pixel; Pillow's own limit only warns).
MAX_PIXELS = 200_000_000
# Ratio of long to short side: images are resized by their short side.
MAX_ASPECT = 100
# Keeps Pillow from warning about allowed images; it raises an error at twice its limit.
Image.MAX_IMAGE_PIXELS = MAX_PIXELS
# Per channel (R, G, B), for values in [0, 1]: CLIP's training, and the official RPN code.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def find(path: str) -> list[pathlib.Path]:
  """The path itself if it is a file, or the image files directly in the folder.

  Raises:
    InputError: there are none.
  """
  root = paths.expand(path)
  if not root.exists():
    raise InputError(f"{path}: expected an image or a folder of images, no such file or folder")
  if root.is_file():
    return [root]
  files = list_images(root)
  if not files:
    raise InputError(f"{path}: no {', '.join(SUFFIXES)} file in this folder")
  return files


def list_images(
  *folders: pathlib.Path, suffixes: Sequence[str] = SUFFIXES, recursive: bool = False
) -> list[pathlib.Path]:
  """The image files in some folders, by the order of the folders and by path.

  A line is printed about what looks like an image and is left out: hidden files, as macOS puts
  beside the images on other disks and in archives (`._a.jpg`), folders named like images, and
  images of other formats.

  Args:
    folders: existing folders.
    suffixes: of the files, in lower case; files may have them in upper case.
    recursive: also take the files in subfolders, but for hidden ones.

  Raises:
    OSError: a folder that cannot be read.
  """
  files: list[pathlib.Path] = []
  left_out: dict[str, list[pathlib.Path]] = collections.defaultdict(list)
  for folder in folders:
    for path in sorted(_walk(folder) if recursive else folder.iterdir()):
      suffix = path.suffix.lower()
      if suffix in suffixes:
        if path.name.startswith("."):
          left_out["hidden"].append(path)
        elif path.exists() and not path.is_file():  # who reads a broken link names it
          left_out["not a file"].append(path)
        else:
          files.append(path)
      elif suffix in _OTHER_SUFFIXES and not path.name.startswith("."):
        left_out["of another format"].append(path)
  told = [f"{len(found)} {why}, such as {found[0]}" for why, found in left_out.items()]
  if told:
    print(f"left out of the images: {'; '.join(told)}", flush=True)
  return files


def _walk(folder: pathlib.Path) -> Iterator[pathlib.Path]:
  """Files and folders at any depth; unlike `Path.rglob` it does not pass over unreadable ones."""

  def refuse(error: OSError) -> None:
    raise error

  for parent, folders, files in os.walk(folder, onerror=refuse):
    folders[:] = [name for name in folders if not name.startswith(".")]
    yield from (pathlib.Path(parent, name) for name in (*folders, *files))


def read(image: ImageSource, max_pixels: int = MAX_PIXELS) -> np.ndarray:
  """An image as uint8 RGB (H, W, 3), rotated according to its EXIF orientation.

  Args:
    image: a path, an open binary file, a PIL image, or an array: (H, W, 3) or (H, W), uint8.

  Raises:
    InputError: not an image, damaged, too elongated, or more than `max_pixels` pixels.
  """
  if isinstance(image, np.ndarray):
    return _from_array(image)
  return _decoded(image, max_pixels, to_rgb)


def _decoded(
  image: str | os.PathLike | BinaryIO | Image.Image, max_pixels: int, finish: Callable
) -> np.ndarray:
  """`finish(picture, name)` of an image, upright and in its own mode, while its file is open."""
  if isinstance(image, Image.Image):
    check_size("the image", image.size, max_pixels)
    return finish(ImageOps.exif_transpose(image), "the image")
  # Open files may have no name.
  name = image if isinstance(image, (str, os.PathLike)) else getattr(image, "name", "the image")
  try:
    source = paths.expand(image) if isinstance(image, str) else image
    if isinstance(source, os.PathLike) and buckets.is_bucket(source):
      source = io.BytesIO(buckets.read(paths.expand(source)))
    with Image.open(source) as file:
      check_size(name, file.size, max_pixels)
      return finish(ImageOps.exif_transpose(file), name)
  except FileNotFoundError:
    raise InputError(f"{name}: expected an image, no such file") from None
  except InputError:
    raise
  except Exception as error:  # damaged files raise all kinds of errors
    raise InputError(
      f"{name}: expected a readable jpg, png or webp image, got {damage(error)}; open it in a "
      "viewer to see whether it is damaged"
    ) from error


def damage(error: Exception) -> str:
  """What a decoder has said of a file, in one line and without an address in memory."""
  if isinstance(error, UnidentifiedImageError):
    return "no known image format"
  return f"{type(error).__name__} ({' '.join(str(error).split())})"


def check_size(where: object, size: tuple[int, int], max_pixels: int = MAX_PIXELS) -> None:
  """Checks the (width, height) of an image before it is decoded.

  Raises:
    InputError: no pixels, too many, or too elongated.
  """
  width, height = size
  if not 0 < width * height <= max_pixels:
    raise InputError(
      f"{where}: expected at most {max_pixels:,} pixels, got {width} x {height}; "
      "make the image smaller"
    )
  if max(size) > MAX_ASPECT * min(size):
    raise InputError(
      f"{where}: expected an image at most {MAX_ASPECT} times as long as wide, got "
      f"{width} x {height}; crop it"
    )


def to_rgb(image: Image.Image, name: object) -> np.ndarray:
  """The pixels of an image as it is stored, uint8 (H, W, 3); 16 bits lose the lower eight.

  Raises:
    InputError: gray values of 32 bits, of which nothing says what is black and what is white.
  """
  if image.mode in ("I", "F"):
    raise InputError(
      f"{name}: expected an image of 8 or 16 bits per channel, got mode {image.mode} (32 bits); "
      "convert it to 8 bits"
    )
  if image.mode.startswith("I;16"):  # Pillow's conversion clips: all values above 255 are white
    return np.repeat((np.array(image) >> 8).astype(np.uint8)[..., None], 3, axis=2)
  return np.array(image.convert("RGB"))


def _from_array(image: np.ndarray) -> np.ndarray:
  if image.ndim == 2:
    image = np.repeat(image[..., None], 3, axis=2)
  if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or not image.size:
    raise InputError(
      f"expected an image array (H, W, 3) uint8 in RGB, got {image.shape} {image.dtype}"
    )
  return image


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
  image: ImageSource,
  side: int,
  mean: Sequence[float] = CLIP_MEAN,
  std: Sequence[float] = CLIP_STD,
  squash: bool = False,
) -> np.ndarray:
  """OpenAI's preprocessing (`clip.load`) after EXIF rotation: normalized float32 (side, side, 3).

  As there, an image is resized in its own mode and converted to RGB then: one with a palette by
  its nearest pixels, one with transparency by how opaque they are.

  Args:
    image: see `read`.
    side: of the square, pixels.
    mean: subtracted per channel, in [0, 1].
    std: divided by per channel.
    squash: whether the model was trained on images squashed to a square, not on the middle ones.

  Raises:
    InputError: see `read`.
  """

  def finish(picture: Image.Image, name: object) -> np.ndarray:
    if picture.mode in ("I", "F") or picture.mode.startswith("I;16"):
      picture = Image.fromarray(to_rgb(picture, name))
    return np.array(square(picture, side, squash).convert("RGB"))

  if isinstance(image, np.ndarray):
    image = Image.fromarray(_from_array(image))
  return normalize(_decoded(image, MAX_PIXELS, finish), mean, std)


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
