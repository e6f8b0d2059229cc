"""Labels of an image that is too large for memory, in strips of windows.

The windows are those of the whole image, each is computed once, and so a pixel gets the scores that
it would get in the whole image. In memory are a row of windows, the logits of the rows that reach
into a block, and the block.
"""

import collections
import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from rpn_jax.base.errors import InputError
from rpn_jax.inference.layouts import Windows, window_starts
from rpn_jax.inference.sliding import SlidingWindow, WindowLogits
from rpn_jax.inference.views import View

# Sides of a block, pixels: multiples of those of the tiles in which scores are merged.
BLOCK_ROWS, BLOCK_COLUMNS = 512, 2048


class Block(NamedTuple):
  """A part of the image: its upper left corner and (height, width) in pixels, and its logits."""

  top: int
  left: int
  size: tuple[int, int]
  logits: WindowLogits


def block_count(size: tuple[int, int]) -> int:
  """Number of blocks of an image of (height, width)."""
  return -(-size[0] // BLOCK_ROWS) * -(-size[1] // BLOCK_COLUMNS)


def blocks(
  window: SlidingWindow, size: tuple[int, int], read: Callable[[int, int], np.ndarray]
) -> Iterator[Block]:
  """The blocks of an image in row-major order.

  Args:
    window: of the layout "windows", which leaves the resolution as it is, without refinement.
    size: (height, width), pixels.
    read: (first row, number of rows) -> these rows, normalized, (rows, width, 3).

  Raises:
    InputError: a layout that needs the whole image.
  """
  layout = window.layout
  plain = isinstance(layout, Windows) and layout.scales == (1.0,) and not layout.flip
  if not plain or window.refinement.name != "none":
    raise InputError(
      "expected a protocol of windows of one scale, without mirroring and refinement, for an image "
      f"in strips, got {type(layout).__name__.lower()} with scales={layout.scales}, "
      f"flip={layout.flip}, refine={window.refinement.name}: use another model or method, "
      "--refine=none, or cut the image into pieces"
    )
  (height, width), crop = size, layout.crop
  tops = window_starts(height, crop, layout.stride)
  lefts = window_starts(width, crop, layout.stride)

  def windows() -> Iterator[np.ndarray]:
    for top in tops:
      rows = read(top, min(crop, height - top))
      padding = [(0, crop - len(rows)), (0, max(crop - width, 0)), (0, 0)]
      rows = np.pad(rows, padding) if np.any(padding) else rows
      yield from (rows[:, left : left + crop] for left in lefts)

  logits = window.logits(windows())
  kept: collections.deque[tuple[int, list[np.ndarray]]] = collections.deque()
  done = 0
  for top, next_top in itertools.zip_longest(tops, tops[1:], fillvalue=height):
    kept.append((top, list(itertools.islice(logits, len(lefts)))))
    # No later window reaches above the next row of them.
    while done < height and (bottom := min(done + BLOCK_ROWS, height)) <= next_top:
      while kept[0][0] + crop <= done:
        kept.popleft()
      for left in range(0, width, BLOCK_COLUMNS):
        part = bottom - done, min(BLOCK_COLUMNS, width - left)
        corners, found = [], []
        for y, row in kept:
          for x, each in zip(lefts, row):
            if y < bottom and left - crop < x < left + part[1]:
              corners.append((y - done, x - left))
              found.append(each)
        view = View(*part, tuple(corners), (crop, crop))
        yield Block(done, left, part, window.joined([view], found))
      done = bottom
