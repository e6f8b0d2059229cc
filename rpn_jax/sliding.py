"""Sliding-window inference (mmsegmentation's slide mode, as RPN's release evaluates).

The network runs on a fixed number of windows at a time, so it is compiled once; only the cheap
merging is compiled again for each image size.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from rpn_jax.errors import InputError
from rpn_jax.losses import interpolation_matrix
from rpn_jax.models.clip import resize_grid

# Numbers of one strip of full-size scores before its arg-max: 64 MB in float32.
STRIP_ELEMENTS = 2**24


def window_corners(height: int, width: int, crop: int, stride: int) -> list[tuple[int, int]]:
  """Top left corners (y, x) of the windows, in row order.

  The last window of a row or column is shifted back inside the image, so windows always have the
  full size.

  Raises:
    InputError: a side shorter than the crop.
  """
  if min(height, width) < crop:
    raise InputError(
      f"a window of {crop} pixels needs an image of at least that, got {height}x{width}: "
      "config.data.short_side must be at least config.eval.crop"
    )

  def starts(size):
    count = max(size - crop + stride - 1, 0) // stride + 1
    return [min(i * stride, size - crop) for i in range(count)]

  return [(y, x) for y in starts(height) for x in starts(width)]


@functools.partial(jax.jit, static_argnames=("corners", "height", "width", "crop", "activation"))
def merge_windows(logits_WxhxwxC, penalty_C, *, corners, height, width, crop, activation):
  """Mean over windows of the upsampled scores, less a per-class penalty: (height, width, C)."""
  classes = logits_WxhxwxC.shape[-1]
  total = jnp.zeros((height, width, classes))
  count = np.zeros((height, width, 1), np.float32)
  for i, (y, x) in enumerate(corners):
    scores = activation(resize_grid(logits_WxhxwxC[i], crop, crop))
    total = total.at[y : y + crop, x : x + crop].add(scores)
    count[y : y + crop, x : x + crop] += 1
  return total / count - penalty_C


@functools.partial(jax.jit, static_argnames=("height", "width"))
def resized_argmax(scores_hxwxC, *, height, width):
  """Arg-max over classes of the scores resized to (height, width), strip by strip: int32."""
  h, _, classes = scores_hxwxC.shape
  wide = resize_grid(scores_hxwxC, h, width)
  if h == height:
    return wide.argmax(-1)
  rows_Hxh = interpolation_matrix(h, height)
  strips = -(-height * width * classes // STRIP_ELEMENTS)
  size = -(-height // strips)
  rows_Hxh = jnp.pad(rows_Hxh, ((0, strips * size - height), (0, 0)))

  def strip(rows):
    scores = jnp.einsum("Hh,hwc->Hwc", rows, wide, precision=jax.lax.Precision.HIGHEST)
    return scores.argmax(-1)

  return jax.lax.map(strip, rows_Hxh.reshape(strips, size, h)).reshape(-1, width)[:height]


class SlidingWindow:
  """Segments images of any size with a network that sees square windows.

  Args:
    logits_fn: (windows (W, crop, crop, 3)) -> logits (W, h, w, C); jitted by the caller.
    classes: C.
    crop: window side, pixels.
    stride: step between windows, pixels.
    window_batch: windows per call of the network.
    penalty: subtracted from the scores of the classes in `penalized` (0.1 from seen classes in
      zero-shot evaluation).
    penalized: those classes.
    activation: logits -> scores, over the class axis.
  """

  def __init__(
    self,
    logits_fn: Callable,
    classes: int,
    *,
    crop: int,
    stride: int,
    window_batch: int = 4,
    penalty: float = 0.0,
    penalized: Sequence[int] = (),
    activation: Callable = jax.nn.sigmoid,
  ):
    self.logits_fn = logits_fn
    self.crop, self.stride, self.window_batch = crop, stride, window_batch
    self.penalty_C = np.zeros(classes, np.float32)
    self.penalty_C[list(penalized)] = penalty
    self.activation = activation

  def scores(self, image_hxwx3: np.ndarray) -> jax.Array:
    """Mean scores (h, w, C) of one normalised image."""
    height, width, _ = image_hxwx3.shape
    crop = self.crop
    corners = window_corners(height, width, crop, self.stride)
    windows = np.stack([image_hxwx3[y : y + crop, x : x + crop] for y, x in corners])
    padding = -len(windows) % self.window_batch
    windows = np.concatenate([windows, np.repeat(windows[:1], padding, 0)])
    logits = jnp.concatenate(
      [
        self.logits_fn(windows[i : i + self.window_batch])
        for i in range(0, len(windows), self.window_batch)
      ]
    )
    return merge_windows(
      logits[: len(corners)],
      self.penalty_C,
      corners=tuple(corners),
      height=height,
      width=width,
      crop=crop,
      activation=self.activation,
    )

  def __call__(self, image_hxwx3: np.ndarray, size: tuple[int, int] | None = None) -> np.ndarray:
    """Class ids at (height, width) `size`, by default the image's own: int32."""
    height, width = size or image_hxwx3.shape[:2]
    return np.asarray(resized_argmax(self.scores(image_hxwx3), height=height, width=width))
