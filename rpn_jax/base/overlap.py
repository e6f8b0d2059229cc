"""Work of threads beside the work of the caller: read ahead of it, written behind it.

Decoding, drawing and encoding are calls of C that leave Python's lock to others, as JAX's are.
"""

import collections
import concurrent.futures
import os
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

# More would wait for each other; each holds an image.
MAX_THREADS = 8
# Images under way for each thread: it need not wait for the caller to take the last one.
AHEAD = 2
# Bytes of all images under way, unless a single one is larger.
MAX_BYTES = 2**28


def mapped(
  function: Callable[[Item], Result],
  items: Iterable[Item],
  size: Callable[[Item], int] = lambda item: 0,
) -> Iterator[Result]:
  """The results of `function` in order, computed by threads while the caller does other work.

  Few items are under way at a time, so that memory does not grow with their number. When the
  caller stops, as after an error or Ctrl-C, calls that have begun are waited for, so that what they
  write is complete, and no other begins.

  Args:
    function: called by threads; what it raises is raised here, when its turn comes.
    items: taken by the caller's thread, a few ahead of the results.
    size: bytes that an item will hold while it is under way.
  """
  threads = min(os.cpu_count() or 1, MAX_THREADS)
  under_way: collections.deque[tuple[concurrent.futures.Future[Result], int]] = collections.deque()
  with concurrent.futures.ThreadPoolExecutor(threads) as pool:
    try:
      for item in items:
        held = size(item)
        while under_way and (
          len(under_way) >= AHEAD * threads
          or held + sum(other for _, other in under_way) > MAX_BYTES
        ):
          yield under_way.popleft()[0].result()
        under_way.append((pool.submit(function, item), held))
      while under_way:
        yield under_way.popleft()[0].result()
    finally:
      for future, _ in under_way:
        future.cancel()
