"""Sliding-window inference (mmsegmentation's slide mode, by which the official RPN code evaluates).

The network is compiled once, for a fixed number of windows, which may come from several images. The
scores of an image, (height, width, C), would take gigabytes with 847 classes, so they are computed
for one square tile of the result at a time, from the windows' logits on the patch grid to the
argmax. A tile's shapes depend on the image only by the ratio of its size to the network's, rounded
(`tile_sides`), and everything else is data, so that images of all sizes share a few programs.

Shape letters: N windows, h/w patch grid, C rows of logits (classes or synonyms); M side of a tile
at the network's resolution, T side of a tile of the result.
"""

import collections
import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rpn_jax.base.errors import InputError
from rpn_jax.inference.process import check_process

# Sides of a tile, in pixels: the small one wastes less on small images, the large one takes fewer
# calls for large ones, which are those with a side above LARGE_IMAGE.
SMALL_TILE, LARGE_TILE, LARGE_IMAGE = 128, 256, 384
# Scalars in the scores of one tile: 128 MB in float32.
TILE_ELEMENTS = 2**25
# Windows are padded to at least so many: their logits are small.
MIN_WINDOWS = 8
# Programs that are kept, the most recently used; each takes 4 MB (docs/reliability.md).
KEPT_PROGRAMS = 48


def window_corners(height: int, width: int, crop: int, stride: int) -> list[tuple[int, int]]:
  """Top left corners (y, x) of the windows, in row-major order.

  The last window of a row or column is shifted back into the image. If the image is smaller than
  the crop there is one window, which extends beyond it.

  Raises:
    ValueError: a stride above the crop, which leaves pixels between the windows without a score.
  """
  if not 1 <= stride <= crop:
    raise ValueError(f"expected a stride of 1 to {crop} pixels, the crop, got {stride}")

  def starts(size: int) -> list[int]:
    count = max(size - crop + stride - 1, 0) // stride + 1
    return [max(min(i * stride, size - crop), 0) for i in range(count)]

  return [(y, x) for y in starts(height) for x in starts(width)]


def round_up(size: int) -> int:
  """The smallest number of 1, 2, 3, 4, 6, 8, 12, … that is at least `size`."""
  power = 1 << (size - 1).bit_length()
  return 3 * power // 4 if power >= 4 and size <= 3 * power // 4 else power


def round_down(size: int) -> int:
  """The largest number of 1, 2, 3, 4, 6, 8, 12, … that is at most `size`."""
  power = 1 << (size.bit_length() - 1)
  return 3 * power // 2 if size >= 3 * power // 2 else power


def tile_sides(
  size: tuple[int, int], views: Sequence["View"], classes: int
) -> tuple[int, tuple[int, ...]]:
  """T of a result of `size`, and M for each of its views.

  The larger of the two is about SMALL_TILE or LARGE_TILE, so that a tile is as much work whether
  the result is larger than the network's input or smaller.
  """
  largest = max(*size, *(side for view in views for side in (view.height, view.width)))
  limit = LARGE_TILE if largest > LARGE_IMAGE else SMALL_TILE
  while limit > 1 and limit**2 * classes > TILE_ELEMENTS:
    limit //= 2
  ratios = [max(view.height / size[0], view.width / size[1]) for view in views]
  tile = round_down(min(limit, int(limit / max(ratios)) + 1))
  # T neighboring pixels of the result read ceil((T - 1) * ratio) + 2 of a view.
  spans = [max(1, math.ceil((tile - 1) * ratio)) for ratio in ratios]
  return tile, tuple(3 + (1 << (span - 1).bit_length()) for span in spans)


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

  def tile(
    self, logits_NxhxwxC: jax.Array, corner: tuple[int, int], side: int, size: tuple[int, int],
    crop: int,
  ) -> tuple:  # fmt: skip
    """The `part` of `tile_scores` for the tile at `corner`, in a result of `size`."""
    first, last, pairs = [], [], []
    for axis, inputs in enumerate((self.height, self.width)):
      left, weight = interpolation_weights(inputs, size[axis])
      if axis == 1 and self.mirrored:
        left, weight = left[::-1], weight[::-1]
      left, weight = (x[corner[axis] : corner[axis] + side] for x in (left, weight))
      first.append(int(left.min()))
      last.append(int(left.max()) + 1)
      pad = (0, side - len(left))
      pairs.append((np.pad(left - first[axis], pad, "edge"), np.pad(weight, pad, "edge")))
    overlapping = [
      i for i, window in enumerate(self.corners)
      if all(at <= end and at + crop > begin for at, begin, end in zip(window, first, last))
    ]  # fmt: skip
    corners_Nx2 = np.zeros((len(logits_NxhxwxC), 2), np.int32)
    corners_Nx2[: len(self.corners)] = self.corners
    order_N = np.zeros(len(logits_NxhxwxC), np.int32)
    order_N[: len(overlapping)] = overlapping
    position = np.array([*first, len(overlapping)], np.int32)
    return logits_NxhxwxC, corners_Nx2, order_N, position, *pairs


def tile_scores(part: tuple, *, merged: int, crop: int, activation: Callable) -> jax.Array:
  """Upsampled scores averaged over windows and resized to a tile of the result: (T, T, C).

  Args:
    part: result of `View.tile`.
    merged: M, side of the tile before it is resized.
    crop: window side, pixels.
    activation: logits -> scores.
  """
  logits_NxhxwxC, corners_Nx2, order_N, (top, left, overlapping), row_pair, column_pair = part
  _, h, w, classes = logits_NxhxwxC.shape

  def within(start: jax.Array, corner: jax.Array, patches: int) -> tuple[jax.Array, ...]:
    """For one axis of the tile: which pixels a window has, and their interpolation."""
    at = start + jnp.arange(merged) - corner
    index = jnp.clip(at, 0, crop - 1)
    neighbor, weight = map(jnp.asarray, interpolation_weights(patches, crop))
    return (at >= 0) & (at < crop), neighbor[index], weight[index]

  def add(i: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    y, x = corners_Nx2[order_N[i]]
    rows, row_left, row_weight = within(top, y, h)
    columns, column_left, column_weight = within(left, x, w)
    inside = (rows[:, None] & columns).astype(jnp.float32)[..., None]
    logits = interpolate(logits_NxhxwxC[order_N[i]], row_left, row_weight, 0)
    scores = activation(interpolate(logits, column_left, column_weight, 1)) * inside
    return carry[0] + scores, carry[1] + inside

  zeros = jnp.zeros((merged, merged, classes)), jnp.zeros((merged, merged, 1))
  total, count = jax.lax.fori_loop(0, overlapping, add, zeros)
  scores = total / jnp.maximum(count, 1)  # 0 for padding; windows cover the image itself
  (left_W, weight_W), (left_R, weight_R) = column_pair, row_pair
  return interpolate(interpolate(scores, left_W, weight_W, 1), left_R, weight_R, 0)


def class_ids(scores_TxTxC: jax.Array) -> jax.Array:
  return scores_TxTxC.argmax(-1)


def all_scores(scores_TxTxC: jax.Array) -> jax.Array:
  return scores_TxTxC


@functools.lru_cache(KEPT_PROGRAMS)
def tile_program(
  shapes: tuple, merged: tuple[int, ...], crop: int, activation: Callable, output: Callable
) -> Callable[[tuple[tuple, ...], np.ndarray], Any]:
  """(parts, penalty_C) -> `output` of scores averaged over views and minus the penalty.

  A jitted function of its own for each set of `shapes`: JAX frees a program with its function, and
  so the program that was not used for the longest time.
  """
  del shapes

  def merge_tile(parts: tuple[tuple, ...], penalty_C: jax.Array) -> Any:
    scores = [
      tile_scores(part, merged=m, crop=crop, activation=activation)
      for part, m in zip(parts, merged)
    ]
    return output(sum(scores[1:], scores[0]) / len(scores) - penalty_C)

  return jax.jit(merge_tile)


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
    output: scores of a tile -> arrays (rows, columns, …). Pass the same function object each
      time: another one means another program.
  """
  height, width = size
  side, merged = tile_sides(size, views, len(penalty_C))
  shapes = side, *((x.shape, str(x.dtype)) for x in logits)
  program = tile_program(shapes, merged, crop, activation, output)

  def row_of_tiles(top: int) -> list:
    return [
      program(
        tuple(v.tile(x, (top, left), side, size, crop) for v, x in zip(views, logits)), penalty_C
      )
      for left in range(0, width, side)
    ]

  # All are dispatched before the first one is fetched.
  tiles = [row_of_tiles(top) for top in range(0, height, side)]
  join = lambda axis: lambda *parts: np.concatenate([np.asarray(p) for p in parts], axis)
  rows = [jax.tree.map(join(1), *row) for row in tiles]
  return jax.tree.map(lambda *parts: join(0)(*parts)[:height, :width], *rows)


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
    """`output` of the scores (height, width, C) at `size`, with `bias_C` added to them.

    Raises:
      InputError: `check_process` refuses the process.
    """
    check_process()
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
    ValueError: no scale, or one that is not above 0; a stride above the crop; a penalty that is
      not finite.
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
    window_corners(1, 1, crop, stride)  # raises early
    self.logits_fn = logits_fn
    self.crop, self.stride, self.window_batch = crop, stride, window_batch
    self.penalty_C = np.zeros(classes, np.float32)
    self.penalty_C[list(penalized)] = penalty
    if not np.isfinite(penalty):
      raise ValueError(f"penalty: expected a finite number, got {penalty}")
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
    """The logits of each image, in order; windows of several images share a call.

    Raises:
      InputError: logits are NaN or infinite.
    """
    # Views of images that still miss the logits of some windows.
    pending: collections.deque[list[View]] = collections.deque()
    windows: list[np.ndarray] = []
    logits: list[np.ndarray] = []
    # One call is always under way, so that the device need not wait for the host.
    running: tuple[jax.Array, int] | None = None
    for image in images_hxwx3:
      views, new = self._views(np.asarray(image))
      pending.append(views)
      windows += new
      while len(windows) >= self.window_batch:
        started = self._start(windows[: self.window_batch])
        windows = windows[self.window_batch :]
        logits += self._fetch(running)
        running = started
      while pending and sum(len(v.corners) for v in pending[0]) <= len(logits):
        views = pending.popleft()
        parts, logits = _split(logits, views)
        yield WindowLogits(self, views, parts)
    last = self._start(windows) if windows else None
    logits += self._fetch(running)
    logits += self._fetch(last)
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

  def _start(self, windows: list[np.ndarray]) -> tuple[jax.Array, int]:
    """Logits of up to `window_batch` windows, which are padded to that number, and how many."""
    padding = [windows[0]] * (self.window_batch - len(windows))
    return self.logits_fn(np.stack([*windows, *padding])), len(windows)

  def _fetch(self, running: tuple[jax.Array, int] | None) -> list[np.ndarray]:
    """Waits for logits (h, w, C) of `_start`, one for each window."""
    if running is None:
      return []
    logits = np.asarray(running[0])[: running[1]]
    if not np.isfinite(logits).all():
      count = logits.size - np.isfinite(logits).sum()
      raise InputError(
        f"expected finite scores of the network, {count:,} of {logits.size:,} are NaN or infinite: "
        "use config.dtype=float32, or get the weights and the prompts again"
      )
    return list(logits)


def _split(
  logits: list[np.ndarray], views: Sequence[View]
) -> tuple[list[jax.Array], list[np.ndarray]]:
  """The first logits stacked for each view, padded to a rounded-up number, and the rest."""
  parts = []
  for view in views:
    count = len(view.corners)
    part, logits = logits[:count], logits[count:]
    padded = max(MIN_WINDOWS, 1 << (count - 1).bit_length())
    # Stacked by NumPy: JAX would compile and keep a program for every number of windows.
    parts.append(jax.device_put(np.stack([*part, *part[:1] * (padded - count)])))
  return parts, logits
