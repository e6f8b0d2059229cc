"""The largest batch that fits into a chip's memory, in few compilations."""

import math
from collections.abc import Callable

# Compilations of one search.
TRIES = 16
# How close it comes, as a share of the batch. Closer it is chance: short of memory, XLA recomputes
# by itself, and refused 115 images where 116 fitted.
CLOSE = 1 / 32


def search(share: Callable[[int], float], start: int) -> int:
  """A batch that fits, where one larger by CLOSE does not; 0 if 1 does not.

  Args:
    share: of a batch, the share of the memory that it takes; above 1 it does not fit. It is asked
      at most TRIES times: compiling takes a minute.
    start: the first batch to ask for.
  """
  known = {0: 0.0}
  batch, before = max(1, start), math.inf
  while len(known) <= TRIES:
    known[batch] = share(batch)
    *_, below, low = [0, *sorted(b for b in known if known[b] <= 1)]
    high = min((b for b in known if known[b] > 1), default=0)
    if high and high - low <= max(1, CLOSE * low):
      break
    batch = (low + high) // 2 if high else 2 * low
    # Better where the line through the batches next to the limit meets it, since memory grows by
    # the image, unless that contradicts what is known or gained little the last time.
    width = high - low if high else math.inf
    gained, before = width <= before / 2, width
    left, right = (low, high) if high and math.isfinite(known[high]) else (below, low)
    rise = known[right] - known[left]
    if rise > 0 and gained:
      meets = left + math.floor((1 - known[left]) * (right - left) / rise)
      if low <= meets <= (high or 8 * low):
        batch = min(max(meets, low + 1), high - 1 if high else meets + 1)
  return low
