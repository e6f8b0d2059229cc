"""The largest batch that fits into a chip's memory, in few compilations."""

import math
from collections.abc import Callable

# Compilations of one search.
TRIES = 16


def search(share: Callable[[int], float], start: int) -> int:
  """The largest batch that fits, 0 if 1 does not.

  Args:
    share: of a batch, the share of the memory that it takes; above 1 it does not fit. It is asked
      at most TRIES times: compiling takes a minute.
    start: the first batch to ask for.
  """
  known: dict[int, float] = {}
  batch = max(1, start)
  while len(known) < TRIES:
    known[batch] = share(batch)
    low = max((b for b in known if known[b] <= 1), default=0)
    high = min((b for b in known if known[b] > 1), default=0)
    if high - low == 1:
      break
    batch = (low + high) // 2 if high else 2 * low
    # Better where the line through the batches next to the limit meets it, since memory grows by
    # the image, unless that contradicts what is known: short of memory, XLA recomputes by itself.
    near = sorted(known, key=lambda b: abs(known[b] - 1))[:2]
    below = (0, 0.0) if len(near) < 2 else (near[1], known[near[1]])
    slope = (known[near[0]] - below[1]) / (near[0] - below[0])
    if math.isfinite(slope) and slope > 0:
      meets = near[0] + math.floor((1 - known[near[0]]) / slope)
      if low <= meets <= (high or 8 * low):
        batch = min(max(meets, low + 1), high - 1 if high else meets + 1)
  return low
