"""How an image is laid out in windows for a network.

A layout is a name that config.eval.layout and `Protocol.layout` select; any network can use it.
"""

import dataclasses
from collections.abc import Iterator
from typing import ClassVar

import numpy as np

from rpn_jax.inference.views import Resized, View, interpolation_weights

# What detectron2 pads both sides of an image to a multiple of, pixels (its size_divisibility).
PADDED_MULTIPLE = 32


def window_corners(height: int, width: int, crop: int, stride: int) -> list[tuple[int, int]]:
  """Top left corners (y, x) of the windows, in row-major order.

  The last window of a row or column is shifted back into the image. If the image is smaller than
  the crop there is one window, which extends beyond it.

  Raises:
    ValueError: a stride above the crop, which leaves pixels between the windows without a score.
  """
  rows, columns = (window_starts(size, crop, stride) for size in (height, width))
  return [(y, x) for y in rows for x in columns]


def window_starts(size: int, crop: int, stride: int) -> list[int]:
  """The first pixels of the windows along an axis; see `window_corners`."""
  if not 1 <= stride <= crop:
    raise ValueError(f"expected a stride of 1 to {crop} pixels, the crop, got {stride}")
  count = max(size - crop + stride - 1, 0) // stride + 1
  return [max(min(i * stride, size - crop), 0) for i in range(count)]


def resize_image(image_hxwx3: np.ndarray, height: int, width: int) -> np.ndarray:
  """Bilinear resize without antialias, on the host to avoid compiling a program per size."""
  for axis, size in enumerate((height, width)):
    left, weight = interpolation_weights(image_hxwx3.shape[axis], size)
    right = np.minimum(left + 1, image_hxwx3.shape[axis] - 1)
    weight = weight.reshape(-1, *[1] * (2 - axis))
    a, b = np.take(image_hxwx3, left, axis), np.take(image_hxwx3, right, axis)
    image_hxwx3 = a + (b - a) * weight
  return image_hxwx3


@dataclasses.dataclass(frozen=True)
class Layout:
  """Windows of an image, and how their logits are put together again.

  Attributes:
    crop: side of the windows that the network is given, pixels.
    stride: step between windows, pixels.
    square: side of the square of the layout of that name, pixels.
    keep_padding: whether the scores of the padded image are stretched over the image (`Whole`).
    multiple: what the sides of a window of any shape are padded to multiples of (`Image`), pixels.
    scales: image sizes that scores are averaged over, as factors of the given size.
    flip: also average over mirrored images.

  Raises:
    ValueError: no scale, one that is not above 0, or others than 1 in a layout that resizes; what
      `window_corners` refuses.
  """

  crop: int
  stride: int
  square: int = 0
  keep_padding: bool = True
  multiple: int = 1
  scales: tuple[float, ...] = (1.0,)
  flip: bool = False

  # Whether the number of windows depends on the size of the image.
  varies: ClassVar[bool] = False

  def __post_init__(self) -> None:
    if not self.scales or min(self.scales) <= 0:
      raise ValueError(f"scales: expected factors above 0, as in (1.0,), got {self.scales}")

  def windows(self, image_hxwx3: np.ndarray) -> list[np.ndarray]:
    """The windows of all views, (crop, crop, 3) each."""
    raise NotImplementedError

  def views(self, size: tuple[int, int], grid: tuple[int, int]) -> list[View]:
    """The views of an image of `size`, from logits (*grid, C) of each window."""
    raise NotImplementedError

  @property
  def mirrorings(self) -> tuple[bool, ...]:
    return (False, True) if self.flip else (False,)


class Windows(Layout):
  """Overlapping windows of the image as it is (mmsegmentation's slide mode).

  Smaller images are padded with 0 at the bottom and on the right.
  """

  varies = True

  def __post_init__(self) -> None:
    super().__post_init__()
    window_corners(1, 1, self.crop, self.stride)  # raises early

  def _scaled(self, size: tuple[int, int]) -> Iterator[tuple[float, int, int, list]]:
    """Of each scale: itself, height, width and corners of windows."""
    for scale in self.scales:
      height, width = (max(1, int(side * scale + 0.5)) for side in size)
      yield scale, height, width, window_corners(height, width, self.crop, self.stride)

  def windows(self, image_hxwx3: np.ndarray) -> list[np.ndarray]:
    windows = []
    for scale, height, width, corners in self._scaled(image_hxwx3.shape[:2]):
      resized = resize_image(image_hxwx3, height, width) if scale != 1 else image_hxwx3
      padding = [(0, max(self.crop - side, 0)) for side in (height, width)]
      for mirrored in self.mirrorings:
        view = np.pad(resized[:, ::-1] if mirrored else resized, (*padding, (0, 0)))
        windows += [view[y : y + self.crop, x : x + self.crop] for y, x in corners]
    return windows

  def views(self, size: tuple[int, int], grid: tuple[int, int]) -> list[View]:
    return [
      View(height, width, tuple(corners), (self.crop, self.crop), mirrored)
      for _, height, width, corners in self._scaled(size)
      for mirrored in self.mirrorings
    ]


class _Resizing(Layout):
  """A layout that resizes every image to the same size."""

  def __post_init__(self) -> None:
    super().__post_init__()
    if tuple(self.scales) != (1.0,):
      raise ValueError(f"scales: expected (1.0,) where images are resized, got {self.scales}")


class Square(_Resizing):
  """Overlapping tiles of the image squashed to a square, and the whole image squashed to a window.

  Scores of the tiles are averaged, and then those of both (CAT-Seg).
  """

  def __post_init__(self) -> None:
    super().__post_init__()
    window_corners(1, 1, self.crop, self.stride)  # raises early
    if self.square < self.crop:
      raise ValueError(f"square: expected at least {self.crop} pixels, the crop, got {self.square}")

  @property
  def _corners(self) -> list[tuple[int, int]]:
    return window_corners(self.square, self.square, self.crop, self.stride)

  def windows(self, image_hxwx3: np.ndarray) -> list[np.ndarray]:
    windows = []
    for mirrored in self.mirrorings:
      image = image_hxwx3[:, ::-1] if mirrored else image_hxwx3
      large = resize_image(image, self.square, self.square)
      windows += [large[y : y + self.crop, x : x + self.crop] for y, x in self._corners]
      windows.append(resize_image(image, self.crop, self.crop))
    return windows

  def views(self, size: tuple[int, int], grid: tuple[int, int]) -> list[View]:
    large, window = (self.square, self.square), (self.crop, self.crop)
    views = []
    for mirrored in self.mirrorings:
      views.append(View(*large, tuple(self._corners), window, mirrored))
      step = Resized(large, large)
      views.append(View(*window, ((0, 0),), window, mirrored, (step,)))
    return views


class Whole(_Resizing):
  """The padded image squashed to one window; logits become scores on their own grid.

  Padding is with 0, at the bottom and on the right. The official code of CAT-Seg means to cut its
  scores off, but cuts the grid, which is rarely larger than the image in pixels, and so stretches
  the scores of the padded image over the image (`keep_padding`).
  """

  def windows(self, image_hxwx3: np.ndarray) -> list[np.ndarray]:
    size = image_hxwx3.shape[:2]
    padding = [(0, padded - side) for padded, side in zip(_padded(size, PADDED_MULTIPLE), size)]
    windows = []
    for mirrored in self.mirrorings:
      image = np.pad(image_hxwx3[:, ::-1] if mirrored else image_hxwx3, (*padding, (0, 0)))
      windows.append(resize_image(image, self.crop, self.crop))
    return windows

  def views(self, size: tuple[int, int], grid: tuple[int, int]) -> list[View]:
    steps: tuple[Resized, ...] = ()
    height, width = (min(*pair) for pair in zip(grid, size))
    if not self.keep_padding:
      (height, width), steps = grid, (Resized(_padded(size, PADDED_MULTIPLE), size),)
    return [View(height, width, ((0, 0),), grid, mirrored, steps) for mirrored in self.mirrorings]


class Image(_Resizing):
  """The image as it is, in one window of its own shape; logits become scores on their own grid.

  A network compiles for every shape. Sides that are no multiple of what the network takes
  (`multiple`) are padded with 0 at the bottom and on the right, and the scores of that cut off.
  """

  def windows(self, image_hxwx3: np.ndarray) -> list[np.ndarray]:
    size = image_hxwx3.shape[:2]
    padding = [(0, padded - side) for padded, side in zip(_padded(size, self.multiple), size)]
    return [
      np.pad(image_hxwx3[:, ::-1] if mirrored else image_hxwx3, (*padding, (0, 0)))
      for mirrored in self.mirrorings
    ]

  def views(self, size: tuple[int, int], grid: tuple[int, int]) -> list[View]:
    padded = _padded(size, self.multiple)
    steps = () if padded == size else (Resized(padded, size),)
    return [View(*grid, ((0, 0),), grid, mirrored, steps) for mirrored in self.mirrorings]


def _padded(size: tuple[int, int], multiple: int) -> tuple[int, int]:
  height, width = (-(-side // multiple) * multiple for side in size)
  return height, width


# Value of config.eval.layout -> layout.
LAYOUTS: dict[str, type[Layout]] = {
  "windows": Windows, "square": Square, "whole": Whole, "image": Image,
}  # fmt: skip
