"""Sliding-window inference (mmsegmentation's slide mode, as RPN's release evaluates).

The network runs on a fixed number of windows at a time, taken from as many images as it needs, so
it is compiled once. The scores of an image, (height, width, C), would be gigabytes with 847
classes: they exist for a few rows at a time only, from the windows' logits on the patch grid to the
arg-max. That program takes its sizes rounded up (`round_up`) and everything else as data, so images
of many sizes share it.

Shape letters: N windows, h/w patch grid, C rows of logits; M rows and S columns of the merged
scores at the network's resolution, R rows and W columns of the result.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# Numbers of one strip of scores: 128 MB in float32.
STRIP_ELEMENTS = 2**25


def window_corners(height: int, width: int, crop: int, stride: int) -> list[tuple[int, int]]:
  """Top left corners (y, x) of the windows, in row order.

  The last window of a row or column is shifted back inside the image. Where the image is smaller
  than the crop there is one window, which reaches beyond it.
  """

  def starts(size: int) -> list[int]:
    count = max(size - crop + stride - 1, 0) // stride + 1
    return [max(min(i * stride, size - crop), 0) for i in range(count)]

  return [(y, x) for y in starts(height) for x in starts(width)]


def round_up(size: int) -> int:
  """The smallest of 1, 2, 3, 4, 6, 8, 12, … that is not below `size`."""
  power = 1 << (size - 1).bit_length()
  return 3 * power // 4 if power >= 4 and size <= 3 * power // 4 else power


def neighbours(inputs: int, outputs: int) -> tuple[np.ndarray, np.ndarray]:
  """A bilinear resize (align_corners=False, no antialias) of one axis as data.

  Returns:
    Per output the left one of its two inputs, int32, and the weight of the right one, float32.
  """
  at = np.clip((np.arange(outputs) + 0.5) * inputs / outputs - 0.5, 0, inputs - 1)
  left = np.minimum(at.astype(np.int32), max(inputs - 2, 0))
  return left, (at - left).astype(np.float32)


def interpolate(x: jax.Array, left: jax.Array, weight: jax.Array, axis: int) -> jax.Array:
  """`x` with one axis resized as `neighbours` says."""
  take = functools.partial(jnp.take, x, axis=axis, mode="clip")
  return take(left) + (take(left + 1) - take(left)) * weight.reshape(-1, *[1] * (x.ndim - axis - 1))


def resize_image(image_hxwx3: np.ndarray, height: int, width: int) -> np.ndarray:
  """Bilinear, without antialias, on the host: no program for every size."""
  for axis, size in enumerate((height, width)):
    left, weight = neighbours(image_hxwx3.shape[axis], size)
    right = np.minimum(left + 1, image_hxwx3.shape[axis] - 1)
    weight = weight.reshape(-1, *[1] * (2 - axis))
    a, b = np.take(image_hxwx3, left, axis), np.take(image_hxwx3, right, axis)
    image_hxwx3 = a + (b - a) * weight
  return image_hxwx3


@dataclasses.dataclass(frozen=True)
class View:
  """One of the images that scores are averaged over: the given one, resized or mirrored.

  Attributes:
    height, width: pixels.
    corners: of its windows.
    mirrored: left and right are swapped.
  """

  height: int
  width: int
  corners: tuple[tuple[int, int], ...]
  mirrored: bool

  def strip(
    self, logits_NxhxwxC: jax.Array, top: int, rows: int, size: tuple[int, int], crop: int
  ) -> tuple:
    """What `strip_scores` needs for `rows` rows of a result of `size`, from row `top` on."""
    height, width = size
    left, weight = (x[top : top + rows] for x in neighbours(self.height, height))
    first, last = int(left[0]), int(left[-1]) + 1
    # The windows are in row order: those that reach into a range of rows follow one another.
    reach = [i for i, (y, _) in enumerate(self.corners) if y <= last and y + crop > first]
    pad = ((0, rows - len(left)),)
    row_pair = np.pad(left - first, pad, "edge"), np.pad(weight, pad, "edge")
    turn = -1 if self.mirrored else 1
    pair = (x[::turn] for x in neighbours(self.width, width))
    column_pair = tuple(np.pad(x, ((0, round_up(width) - width),), "edge") for x in pair)
    corners_Nx2 = np.zeros((len(logits_NxhxwxC), 2), np.int32)
    corners_Nx2[: len(self.corners)] = self.corners
    position = np.array([first, reach[0], reach[-1] + 1], np.int32)
    return logits_NxhxwxC, corners_Nx2, position, row_pair, column_pair


def strip_scores(
  part: tuple, *, merged: tuple[int, int], crop: int, activation: Callable
) -> jax.Array:
  """Mean over windows of the upsampled scores, resized to a strip of the result: (R, W, C).

  Args:
    part: of `View.strip`.
    merged: (M, S), rows and columns of the merged scores that the strip is made from.
    crop: window side, pixels.
    activation: logits -> scores.
  """
  logits_NxhxwxC, corners_Nx2, (first, begin, end), row_pair, column_pair = part
  _, h, w, classes = logits_NxhxwxC.shape
  (left_h, weight_h), (left_w, weight_w) = (map(jnp.asarray, neighbours(n, crop)) for n in (h, w))
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
  scores = total / jnp.maximum(count, 1)  # rows and columns beyond the image are in no window
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
  """`output` of the mean over views of `strip_scores` less a per-class penalty."""
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
  """`output` of the scores (height, width, C) of the averaged views, as numpy.

  Args:
    views: V of them.
    logits: of the windows of each view, V arrays (N or more, h, w, C).
    penalty_C: subtracted from the scores.
    size: (height, width) of the result.
    crop: window side, pixels.
    activation: logits -> scores.
    output: scores of a strip -> arrays (rows, columns, …); one function object for the same ones.
  """
  height, width = size
  columns = [round_up(max(view.width, crop)) for view in views]
  # Numbers that a row of the result stands for, in the largest of the arrays on the way.
  cost = max(round_up(width), *(s * v.height // height for v, s in zip(views, columns)))
  rows = max(1, STRIP_ELEMENTS // (cost * len(penalty_C)))
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
  """What the network said of one image: all that any map of it is merged from, and small.

  Attributes:
    window: the SlidingWindow that made it.
    views: of the image.
    logits: of the windows of each view.
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
    penalized: those rows of the logits.
    activation: logits -> scores, over the class axis. One function object for the same scores:
      another means another program.
    scales: sizes of the image that scores are averaged over, as factors on the image given.
    flip: also average over the mirrored images.
    class_of_row: class id of every row of the logits, where several rows stand for one class.

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
    """Mean scores (height, width, C) of one normalised image: gigabytes if all three are large."""
    size = size or image_hxwx3.shape[:2]
    return next(self.read([image_hxwx3])).merge(all_scores, size)

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

    for reading in self.read(images()):
      row = reading.merge(class_ids, sizes.popleft())
      yield self.class_of_row[row].astype(np.int32)

  def read(self, images_hxwx3: Iterable[np.ndarray]) -> Iterator[WindowLogits]:
    """What the network says of each image, in order; windows of several images share a call."""
    # Views of images not all of whose windows were read.
    waiting: collections.deque[list[View]] = collections.deque()
    windows, logits = [], []
    for image in images_hxwx3:
      views, new = self._views(np.asarray(image))
      waiting.append(views)
      windows += new
      while len(windows) >= self.window_batch:
        logits += self._run(windows[: self.window_batch])
        windows = windows[self.window_batch :]
      while waiting and sum(len(v.corners) for v in waiting[0]) <= len(logits):
        views = waiting.popleft()
        parts, logits = _split(logits, views)
        yield WindowLogits(self, views, parts)
    if windows:
      logits += self._run(windows)
    for views in waiting:
      parts, logits = _split(logits, views)
      yield WindowLogits(self, views, parts)

  def _views(self, image: np.ndarray) -> tuple[list[View], list[np.ndarray]]:
    """The views of an image, and the windows of all of them one after another."""
    views, windows = [], []
    for scale in self.scales:
      height, width = (max(1, int(side * scale + 0.5)) for side in image.shape[:2])
      resized = resize_image(image, height, width) if scale != 1 else image
      corners = window_corners(height, width, self.crop, self.stride)
      missing = [(0, max(self.crop - side, 0)) for side in (height, width)]
      for mirrored in (False, True) if self.flip else (False,):
        view = np.pad(resized[:, ::-1] if mirrored else resized, (*missing, (0, 0)))
        views.append(View(height, width, tuple(corners), mirrored))
        windows += [view[y : y + self.crop, x : x + self.crop] for y, x in corners]
    return views, windows

  def _run(self, windows: list[np.ndarray]) -> list[jax.Array]:
    """Logits (h, w, C) of up to `window_batch` windows, padded to as many."""
    padding = [windows[0]] * (self.window_batch - len(windows))
    out = self.logits_fn(np.stack([*windows, *padding]))
    return [out[i] for i in range(len(windows))]


def _split(
  logits: list[jax.Array], views: Sequence[View]
) -> tuple[list[jax.Array], list[jax.Array]]:
  """The first logits stacked for each view, to a number that few images differ in; the rest."""
  parts = []
  for view in views:
    count = len(view.corners)
    own, logits = logits[:count], logits[count:]
    parts.append(jnp.stack([*own, *own[:1] * (round_up(count) - count)]))
  return parts, logits
