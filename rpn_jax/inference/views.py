"""Scores of an image merged from the logits of its windows, a tile of the result at a time.

The scores of an image, (height, width, C), would take gigabytes with 847 classes, so they are
computed for one square tile of the result at a time, from the windows' logits to the argmax. A
tile's shapes depend on the image only by the ratio of its size to the network's, rounded
(`tile_sides`), and everything else is data, so that images of all sizes share a few programs.

Shape letters: N windows, h/w grid of the logits, C rows of logits (classes or synonyms); M side of
a tile of a view's map, T side of a tile of the result.
"""

import collections
import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# Sides of a tile, in pixels: the small one wastes less on small images, the large one takes fewer
# calls for large ones, which are those with a side above LARGE_IMAGE.
SMALL_TILE, LARGE_TILE, LARGE_IMAGE = 128, 256, 384
# Scalars in the scores of one tile: 128 MB in float32.
TILE_ELEMENTS = 2**25
# Tiles that are computed while earlier ones are fetched.
TILES_UNDER_WAY = 4
# Programs that are kept, the most recently used; each takes 4 MB (docs/reliability.md).
KEPT_PROGRAMS = 48


def round_up(size: int) -> int:
  """The smallest number of 1, 2, 3, 4, 6, 8, 12, … that is at least `size`."""
  power = 1 << (size - 1).bit_length()
  return 3 * power // 4 if power >= 4 and size <= 3 * power // 4 else power


def round_down(size: int) -> int:
  """The largest number of 1, 2, 3, 4, 6, 8, 12, … that is at most `size`."""
  power = 1 << (size.bit_length() - 1)
  return 3 * power // 2 if size >= 3 * power // 2 else power


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


@dataclasses.dataclass(frozen=True)
class Resized:
  """A size that a view's map is resized to on the way to the result.

  Attributes:
    size: (height, width), pixels.
    kept: (height, width) of its top left part that goes on.
  """

  size: tuple[int, int]
  kept: tuple[int, int]


@dataclasses.dataclass(frozen=True)
class View:
  """A resized or mirrored version of an image; scores are averaged over its views.

  Logits of a window are upsampled to its part of the view's map and become scores there.

  Attributes:
    height, width: size of the map in pixels.
    corners: top left corners of the windows in the map.
    window: (height, width) of a window in the map, pixels.
    mirrored: left and right are swapped.
    steps: sizes that the map is resized to before that of the result.
  """

  height: int
  width: int
  corners: tuple[tuple[int, int], ...]
  window: tuple[int, int]
  mirrored: bool = False
  steps: tuple[Resized, ...] = ()

  @property
  def maps(self) -> list[tuple[int, int]]:
    """Sizes of the map: its own, and what is kept of each step."""
    return [(self.height, self.width), *(step.kept for step in self.steps)]

  def ratios(self, size: tuple[int, int]) -> list[float]:
    """Of each resize on the way to a result of `size`: inputs for one output, of the worse axis."""
    outputs = [*(step.size for step in self.steps), size]
    return [max(n / m for n, m in zip(*pair)) for pair in zip(self.maps, outputs)]

  def tile(
    self, logits_NxhxwxC: jax.Array, corner: tuple[int, int], side: int, size: tuple[int, int],
    merged: tuple[int, ...],
  ) -> tuple:  # fmt: skip
    """The `part` of `tile_scores` for the tile at `corner`, in a result of `size`.

    Args:
      logits_NxhxwxC: of the windows.
      corner: (y, x) of the tile.
      side: T.
      size: (height, width).
      merged: M of the map and of each step.
    """
    axes = [
      self._axis(axis, corner[axis], side, size[axis], (*merged[1:], side)) for axis in (0, 1)
    ]
    overlapping = [
      i for i, window in enumerate(self.corners)
      if all(
        at <= last and at + side > first
        for at, side, (first, last, _) in zip(window, self.window, axes)
      )
    ]  # fmt: skip
    corners_Nx2 = np.zeros((len(logits_NxhxwxC), 2), np.int32)
    corners_Nx2[: len(self.corners)] = self.corners
    order_N = np.zeros(len(logits_NxhxwxC), np.int32)
    order_N[: len(overlapping)] = overlapping
    (top, _, rows), (left, _, columns) = axes
    position = np.array([top, left, len(overlapping)], np.int32)
    return logits_NxhxwxC, corners_Nx2, order_N, position, tuple(zip(rows, columns))

  def _axis(
    self, axis: int, begin: int, count: int, outputs: int, padded: tuple[int, ...]
  ) -> tuple[int, int, list]:
    """What `count` pixels of an axis of the result, from `begin` on, are made from.

    Returns:
      The first and the last pixel of the map, and for each resize, from the map on, the indices
      and weights of `interpolate`, padded to the numbers in `padded`.
    """
    inputs = [size[axis] for size in self.maps]
    sizes = [*(step.size[axis] for step in self.steps), outputs]
    pairs: list[tuple[np.ndarray, np.ndarray]] = []
    end = begin + count
    for i in reversed(range(len(inputs))):
      left, weight = interpolation_weights(inputs[i], sizes[i])
      if i == len(inputs) - 1:
        if axis == 1 and self.mirrored:
          left, weight = left[::-1], weight[::-1]
      else:
        left, weight = left[: inputs[i + 1]], weight[: inputs[i + 1]]
      left, weight = left[begin:end], weight[begin:end]
      begin, last = int(left.min()), int(left.max()) + 1
      end = last + 1
      pad = (0, padded[i] - len(left))
      pairs.insert(0, (np.pad(left - begin, pad, "edge"), np.pad(weight, pad, "edge")))
    return begin, last, pairs


def tile_sides(
  size: tuple[int, int], views: Sequence[View], classes: int
) -> tuple[int, tuple[tuple[int, ...], ...]]:
  """T of a result of `size`, and for each of its views M of the map and of each of its steps.

  The largest of them is about SMALL_TILE or LARGE_TILE, so that a tile is as much work whether the
  result is larger than the network's input or smaller.
  """
  largest = max(*size, *(side for view in views for map_ in view.maps for side in map_))
  limit = LARGE_TILE if largest > LARGE_IMAGE else SMALL_TILE
  while limit > 1 and limit**2 * classes > TILE_ELEMENTS:
    limit //= 2
  # Of each map to the result.
  ratios = [math.prod(r[i:]) for r in (v.ratios(size) for v in views) for i in range(len(r))]
  tile = round_down(min(limit, int(limit / max(ratios)) + 1))

  def sides(view: View) -> tuple[int, ...]:
    found: list[int] = []
    count = tile
    for ratio in reversed(view.ratios(size)):
      # n neighboring pixels read ceil((n - 1) * ratio) + 2 of what they are resized from.
      span = max(1, math.ceil((count - 1) * ratio))
      found.insert(0, 3 + (1 << (span - 1).bit_length()))
      count = span + 2
    return tuple(found)

  return tile, tuple(sides(view) for view in views)


def tile_scores(
  part: tuple, *, merged: int, window: tuple[int, int], activation: Callable
) -> jax.Array:
  """Upsampled scores averaged over windows and resized to a tile of the result: (T, T, C).

  Args:
    part: result of `View.tile`.
    merged: M, side of the tile before it is resized.
    window: (height, width) of a window in the map, pixels.
    activation: logits -> scores.
  """
  logits_NxhxwxC, corners_Nx2, order_N, (top, left, overlapping), resizes = part
  _, h, w, classes = logits_NxhxwxC.shape

  def within(start: jax.Array, corner: jax.Array, patches: int, side: int) -> tuple[jax.Array, ...]:
    """For one axis of the tile: which pixels a window has, and their interpolation."""
    at = start + jnp.arange(merged) - corner
    index = jnp.clip(at, 0, side - 1)
    neighbor, weight = map(jnp.asarray, interpolation_weights(patches, side))
    return (at >= 0) & (at < side), neighbor[index], weight[index]

  def add(i: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    y, x = corners_Nx2[order_N[i]]
    rows, row_left, row_weight = within(top, y, h, window[0])
    columns, column_left, column_weight = within(left, x, w, window[1])
    inside = (rows[:, None] & columns).astype(jnp.float32)[..., None]
    logits = interpolate(logits_NxhxwxC[order_N[i]], row_left, row_weight, 0)
    scores = activation(interpolate(logits, column_left, column_weight, 1)) * inside
    return carry[0] + scores, carry[1] + inside

  zeros = jnp.zeros((merged, merged, classes)), jnp.zeros((merged, merged, 1))
  total, count = jax.lax.fori_loop(0, overlapping, add, zeros)
  scores = total / jnp.maximum(count, 1)  # 0 for padding; windows cover the image itself
  for (left_R, weight_R), (left_W, weight_W) in resizes:
    scores = interpolate(interpolate(scores, left_W, weight_W, 1), left_R, weight_R, 0)
  return scores


def class_ids(scores_TxTxC: jax.Array) -> jax.Array:
  return scores_TxTxC.argmax(-1)


def all_scores(scores_TxTxC: jax.Array) -> jax.Array:
  return scores_TxTxC


@functools.lru_cache(KEPT_PROGRAMS)
def tile_program(
  shapes: tuple, merged: tuple[int, ...], windows: tuple[tuple[int, int], ...],
  activation: Callable, output: Callable,
) -> jax.stages.Wrapped:  # fmt: skip
  """(parts, penalty_C, *more) -> `output` of scores averaged over views and minus the penalty.

  A jitted function of its own for each set of `shapes`: JAX frees a program with its function, and
  so the program that was not used for the longest time.
  """
  del shapes

  def merge_tile(parts: tuple[tuple, ...], penalty_C: jax.Array, *more: jax.Array) -> Any:
    scores = [
      tile_scores(part, merged=m, window=window, activation=activation)
      for part, m, window in zip(parts, merged, windows)
    ]
    return output(sum(scores[1:], scores[0]) / len(scores) - penalty_C, *more)

  return jax.jit(merge_tile)


def merge_views(
  views: Sequence[View],
  logits: Sequence[jax.Array],
  penalty_C: np.ndarray,
  size: tuple[int, int],
  *,
  activation: Callable,
  output: Callable,
  more: tuple[np.ndarray, ...] = (),
) -> Any:
  """`output` of the scores (height, width, C) averaged over views, as numpy.

  Args:
    views: V views of an image.
    logits: for each view, the logits of its windows (N or more, h, w, C).
    penalty_C: subtracted from the scores.
    size: (height, width) of the result.
    activation: logits -> scores.
    output: (scores of a tile, *more) -> arrays (rows, columns, …). Pass the same function object
      each time: another one means another program.
    more: arrays for `output`.
  """
  height, width = size
  side, merged = tile_sides(size, views, len(penalty_C))
  shapes = side, merged, *((x.shape, str(x.dtype)) for x in logits)
  first, windows = tuple(m[0] for m in merged), tuple(view.window for view in views)
  program = tile_program(shapes, first, windows, activation, output)

  def tile(corner: tuple[int, int]) -> Any:
    parts = tuple(view.tile(x, corner, side, size, m) for view, x, m in zip(views, logits, merged))
    return program(parts, penalty_C, *more)

  corners = [(y, x) for y in range(0, height, side) for x in range(0, width, side)]
  return write_tiles(map(tile, corners), corners, size)


def write_tiles(
  tiles: Iterable[Any], corners: Sequence[tuple[int, int]], size: tuple[int, int]
) -> Any:
  """The arrays (height, width, …) of which tiles are given, as numpy.

  A few tiles are under way at a time, so that the device need not wait for the host, and so that
  not all of them are in memory beside the result.

  Args:
    tiles: arrays (rows, columns, …), or trees of them; what lies beyond `size` is left out.
    corners: (y, x) of each.
    size: (height, width).
  """
  result: Any = None
  under_way: collections.deque[tuple[Any, tuple[int, int]]] = collections.deque()

  def write() -> None:
    nonlocal result
    tile, (y, x) = under_way.popleft()
    if result is None:
      result = jax.tree.map(lambda part: np.empty((*size, *part.shape[2:]), part.dtype), tile)
    for whole, part in zip(jax.tree.leaves(result), jax.tree.leaves(tile)):
      into = whole[y : y + part.shape[0], x : x + part.shape[1]]
      into[...] = np.asarray(part)[: into.shape[0], : into.shape[1]]

  for tile, corner in zip(tiles, corners):
    under_way.append((tile, corner))
    if len(under_way) > TILES_UNDER_WAY:
      write()
  while under_way:
    write()
  return result
