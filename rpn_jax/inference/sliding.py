"""Sliding-window inference (mmsegmentation's slide mode, by which the official RPN code evaluates).

The network is compiled once, for a fixed number of windows, which may come from several images. The
scores of an image, (height, width, C), would take gigabytes with 847 classes, so they are computed
for a strip of a few rows at a time, from the windows' logits on the patch grid to the argmax. The
shapes in that program are rounded up (`round_up`) and everything else is data, so that images of
many sizes share it.

Shape letters: N windows, h/w patch grid, C rows of logits (classes or synonyms); M rows and S
columns of the merged scores at the network's resolution, R rows and W columns of the result.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# Scalars in one strip of scores: 128 MB in float32.
STRIP_ELEMENTS = 2**25


def window_corners(height: int, width: int, crop: int, stride: int) -> list[tuple[int, int]]:
  """Top left corners (y, x) of the windows, in row-major order.

  The last window of a row or column is shifted back into the image. If the image is smaller than
  the crop there is one window, which extends beyond it.
  """

  def starts(size: int) -> list[int]:
    count = max(size - crop + stride - 1, 0) // stride + 1
    return [max(min(i * stride, size - crop), 0) for i in range(count)]

  return [(y, x) for y in starts(height) for x in starts(width)]


def round_up(size: int) -> int:
  """The smallest number of 1, 2, 3, 4, 6, 8, 12, … that is at least `size`."""
  power = 1 << (size - 1).bit_length()
  return 3 * power // 4 if power >= 4 and size <= 3 * power // 4 else power


def interpolation_weights(inputs: int, outputs: int) -> tuple[np.ndarray, np.ndarray]:
  """Indices and weights of a bilinear resize of one axis (align_corners=False, no antialias).

  Returns:
    For each output, the index of the left one of its two inputs, int32, and the weight of the
    right one, float32.
  """
  at = np.clip((np.arange(outputs) + 0.5) * inputs / outputs - 0.5, 0, inputs - 1)
  left = np.minimum(at.astype(np.int32), max(inputs - 2, 0))
  return left, (at - left).astype(np.float32)


def interpolate(x: jax.Array, left: jax.Array, weight: jax.Array, axis: int) -> jax.Array:
  """Resizes one axis of `x` with `interpolation_weights`."""
  take = functools.partial(jnp.take, x, axis=axis, mode="clip")
  return take(left) + (take(left + 1) - take(left)) * weight.reshape(-1, *[1] * (x.ndim - axis - 1))


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
class View:
  """A resized or mirrored version of an image; scores are averaged over its views.

  Attributes:
    height, width: size in pixels.
    corners: top left corners of its windows.
    mirrored: left and right are swapped.
  """

  height: int
  width: int
  corners: tuple[tuple[int, int], ...]
  mirrored: bool

  def strip(
    self, logits_NxhxwxC: jax.Array, top: int, rows: int, size: tuple[int, int], crop: int
  ) -> tuple:
    """The `part` of `strip_scores` for rows `top` to `top + rows` of a result of `size`."""
    height, width = size
    left, weight = (x[top : top + rows] for x in interpolation_weights(self.height, height))
    first, last = int(left[0]), int(left[-1]) + 1
    # Windows are in row-major order: those that overlap with a range of rows are consecutive.
    overlapping = [i for i, (y, _) in enumerate(self.corners) if y <= last and y + crop > first]
    pad = ((0, rows - len(left)),)
    row_pair = np.pad(left - first, pad, "edge"), np.pad(weight, pad, "edge")
    step = -1 if self.mirrored else 1
    pair = (x[::step] for x in interpolation_weights(self.width, width))
    column_pair = tuple(np.pad(x, ((0, round_up(width) - width),), "edge") for x in pair)
    corners_Nx2 = np.zeros((len(logits_NxhxwxC), 2), np.int32)
    corners_Nx2[: len(self.corners)] = self.corners
    position = np.array([first, overlapping[0], overlapping[-1] + 1], np.int32)
    return logits_NxhxwxC, corners_Nx2, position, row_pair, column_pair


def strip_scores(
  part: tuple, *, merged: tuple[int, int], crop: int, activation: Callable
) -> jax.Array:
  """Upsampled scores averaged over windows and resized to a strip of the result: (R, W, C).

  Args:
    part: result of `View.strip`.
    merged: (M, S), rows and columns of the merged scores.
    crop: window side, pixels.
    activation: logits -> scores.
  """
  logits_NxhxwxC, corners_Nx2, (first, begin, end), row_pair, column_pair = part
  _, h, w, classes = logits_NxhxwxC.shape
  (left_h, weight_h), (left_w, weight_w) = (
    map(jnp.asarray, interpolation_weights(n, crop)) for n in (h, w)
  )
  rows = first + jnp.arange(merged[0])

  def add(i: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    y, x = corners_Nx2[i]
    inside = ((rows >= y) & (rows < y + crop)).astype(jnp.float32)[:, None, None]
    row = jnp.clip(rows - y, 0, crop - 1)
    logits = interpolate(logits_NxhxwxC[i], left_h[row], weight_h[row], 0)
    scores = activation(interpolate(logits, left_w, weight_w, 1)) * inside
    new = scores, jnp.broadcast_to(inside, (merged[0], crop, 1))
    old = (jax.lax.dynamic_slice(c, (0, x, 0), n.shape) for c, n in zip(carry, new))
    return tuple(
      jax.lax.dynamic_update_slice(c, o + n, (0, x, 0)) for c, o, n in zip(carry, old, new)
    )

  zeros = jnp.zeros((*merged, classes)), jnp.zeros((*merged, 1))
  total, count = jax.lax.fori_loop(begin, end, add, zeros)
  scores = total / jnp.maximum(count, 1)  # 0 for padding beyond the image
  (left_W, weight_W), (left_R, weight_R) = column_pair, row_pair
  return interpolate(interpolate(scores, left_W, weight_W, 1), left_R, weight_R, 0)


def class_ids(scores_RxWxC: jax.Array) -> jax.Array:
  return scores_RxWxC.argmax(-1)


def all_scores(scores_RxWxC: jax.Array) -> jax.Array:
  return scores_RxWxC


@functools.partial(jax.jit, static_argnames=("merged", "crop", "activation", "output"))
def strip(
  parts: tuple[tuple, ...],
  penalty_C: np.ndarray,
  *,
  merged: tuple[tuple[int, int], ...],
  crop: int,
  activation: Callable,
  output: Callable,
) -> Any:
  """`output` of the strip scores, averaged over views and minus a penalty per class."""
  scores = [
    strip_scores(part, merged=m, crop=crop, activation=activation) for part, m in zip(parts, merged)
  ]
  return output(sum(scores[1:], scores[0]) / len(scores) - penalty_C)


def merge_views(
  views: Sequence[View],
  logits: Sequence[jax.Array],
  penalty_C: np.ndarray,
  size: tuple[int, int],
  *,
  crop: int,
  activation: Callable,
  output: Callable,
) -> Any:
  """`output` of the scores (height, width, C) averaged over views, as numpy.

  Args:
    views: V views of an image.
    logits: for each view, the logits of its windows (N or more, h, w, C).
    penalty_C: subtracted from the scores.
    size: (height, width) of the result.
    crop: window side, pixels.
    activation: logits -> scores.
    output: scores of a strip -> arrays (rows, columns, …). Pass the same function object each
      time: another one means another program.
  """
  height, width = size
  columns = [round_up(max(view.width, crop)) for view in views]
  # Pixels per row of the result, in the largest of the intermediate arrays.
  row_pixels = max(round_up(width), *(s * v.height // height for v, s in zip(views, columns)))
  rows = max(1, STRIP_ELEMENTS // (row_pixels * len(penalty_C)))
  rows = min(1 << (rows.bit_length() - 1), round_up(height))
  merged = tuple(
    (round_up(min((rows - 1) * v.height // height + 3, max(v.height, 2))), s)
    for v, s in zip(views, columns)
  )
  strips = [
    strip(
      tuple(v.strip(part, top, rows, size, crop) for v, part in zip(views, logits)),
      penalty_C,
      merged=merged,
      crop=crop,
      activation=activation,
      output=output,
    )
    for top in range(0, height, rows)
  ]
  return jax.tree.map(
    lambda *parts: np.concatenate([np.asarray(p) for p in parts])[:height, :width], *strips
  )


@dataclasses.dataclass(frozen=True)
class WindowLogits:
  """The logits of an image's windows: small, and sufficient to merge any map of the image.

  Attributes:
    window: the SlidingWindow that computed them.
    views: views of the image.
    logits: for each view, the logits of its windows.
  """

  window: "SlidingWindow"
  views: list[View]
  logits: list[jax.Array]

  def merge(self, output: Callable, size: tuple[int, int], bias_C: np.ndarray | float = 0.0) -> Any:
    """`output` of the scores (height, width, C) at `size`, with `bias_C` added to them."""
    w = self.window
    penalty_C = np.asarray(w.penalty_C - bias_C, np.float32)
    return merge_views(
      self.views, self.logits, penalty_C, size,
      crop=w.crop, activation=w.activation, output=output,
    )  # fmt: skip


class SlidingWindow:
  """Segments images of any size with a network that sees square windows.

  Args:
    logits_fn: (windows (W, crop, crop, 3)) -> logits (W, h, w, C); jitted by the caller.
    classes: C.
    crop: window side, pixels; smaller images are padded with 0 at the bottom and on the right.
    stride: step between windows, pixels.
    window_batch: windows per call of the network.
    penalty: subtracted from the scores of the rows in `penalized` (0.1 from seen classes in
      zero-shot evaluation).
    penalized: rows of the logits.
    activation: logits -> scores, over the class axis. Pass the same function object each time:
      another one means another program.
    scales: image sizes that scores are averaged over, as factors of the given size.
    flip: also average over mirrored images.
    class_of_row: class id of every row of the logits, if several rows belong to one class.

  Raises:
    ValueError: no scale, or one that is not above 0.
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
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    class_of_row: Sequence[int] | np.ndarray | None = None,
  ):
    self.logits_fn = logits_fn
    self.crop, self.stride, self.window_batch = crop, stride, window_batch
    self.penalty_C = np.zeros(classes, np.float32)
    self.penalty_C[list(penalized)] = penalty
    self.activation = activation
    if not scales or min(scales) <= 0:
      raise ValueError(f"scales: expected factors above 0, as in (1.0,), got {scales}")
    self.scales, self.flip = tuple(scales), flip
    self.class_of_row = np.arange(classes) if class_of_row is None else np.asarray(class_of_row)

  def scores(self, image_hxwx3: np.ndarray, size: tuple[int, int] | None = None) -> np.ndarray:
    """Mean scores (height, width, C) of a normalized image; may take gigabytes."""
    size = size or image_hxwx3.shape[:2]
    return next(self.window_logits([image_hxwx3])).merge(all_scores, size)

  def __call__(self, image_hxwx3: np.ndarray, size: tuple[int, int] | None = None) -> np.ndarray:
    """Class ids at (height, width) `size`, by default the image's own: int32."""
    return next(self.stream([(image_hxwx3, size or image_hxwx3.shape[:2])]))

  def stream(self, pairs: Iterable[tuple[np.ndarray, tuple[int, int]]]) -> Iterator[np.ndarray]:
    """Class ids of many (image, size), in order; windows of several images share a call."""
    sizes: collections.deque[tuple[int, int]] = collections.deque()

    def images() -> Iterator[np.ndarray]:
      for image, size in pairs:
        sizes.append(size)
        yield image

    for logits in self.window_logits(images()):
      row = logits.merge(class_ids, sizes.popleft())
      yield self.class_of_row[row].astype(np.int32)

  def window_logits(self, images_hxwx3: Iterable[np.ndarray]) -> Iterator[WindowLogits]:
    """The logits of each image, in order; windows of several images share a call."""
    # Views of images that still miss the logits of some windows.
    pending: collections.deque[list[View]] = collections.deque()
    windows, logits = [], []
    for image in images_hxwx3:
      views, new = self._views(np.asarray(image))
      pending.append(views)
      windows += new
      while len(windows) >= self.window_batch:
        logits += self._run(windows[: self.window_batch])
        windows = windows[self.window_batch :]
      while pending and sum(len(v.corners) for v in pending[0]) <= len(logits):
        views = pending.popleft()
        parts, logits = _split(logits, views)
        yield WindowLogits(self, views, parts)
    if windows:
      logits += self._run(windows)
    for views in pending:
      parts, logits = _split(logits, views)
      yield WindowLogits(self, views, parts)

  def _views(self, image: np.ndarray) -> tuple[list[View], list[np.ndarray]]:
    """The views of an image, and the windows of all of them."""
    views, windows = [], []
    for scale in self.scales:
      height, width = (max(1, int(side * scale + 0.5)) for side in image.shape[:2])
      resized = resize_image(image, height, width) if scale != 1 else image
      corners = window_corners(height, width, self.crop, self.stride)
      padding = [(0, max(self.crop - side, 0)) for side in (height, width)]
      for mirrored in (False, True) if self.flip else (False,):
        view = np.pad(resized[:, ::-1] if mirrored else resized, (*padding, (0, 0)))
        views.append(View(height, width, tuple(corners), mirrored))
        windows += [view[y : y + self.crop, x : x + self.crop] for y, x in corners]
    return views, windows

  def _run(self, windows: list[np.ndarray]) -> list[jax.Array]:
    """Logits (h, w, C) of up to `window_batch` windows, which are padded to that number."""
    padding = [windows[0]] * (self.window_batch - len(windows))
    out = self.logits_fn(np.stack([*windows, *padding]))
    return [out[i] for i in range(len(windows))]


def _split(
  logits: list[jax.Array], views: Sequence[View]
) -> tuple[list[jax.Array], list[jax.Array]]:
  """The first logits stacked for each view, padded to a rounded-up number, and the rest."""
  parts = []
  for view in views:
    count = len(view.corners)
    part, logits = logits[:count], logits[count:]
    parts.append(jnp.stack([*part, *part[:1] * (round_up(count) - count)]))
  return parts, logits
