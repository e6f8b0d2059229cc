"""The machine's own peak, beside which the speed of a network is read; imports no framework."""

import time
from collections.abc import Callable
from typing import Any

# A product of square matrices of this side takes some tenths of a second on two cores.
SIDE = 2048


def gflops(multiply: Callable[[], Any], calls: int = 6) -> float:
  """Billions of operations a second of the fastest of some products of matrices of side SIDE."""
  multiply()
  seconds = []
  for _ in range(calls):
    began = time.perf_counter()
    multiply()
    seconds.append(time.perf_counter() - began)
  return 2 * SIDE**3 / min(seconds) / 1e9
