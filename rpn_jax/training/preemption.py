"""SIGTERM, the notice that a machine is taken away: the run saves and ends well."""

import contextlib
import signal
import sys
from collections.abc import Iterator

import jax
from jax.experimental import multihost_utils


class PreemptionGuard:
  """Tells a training loop that SIGTERM has come; a context manager.

  Outside of `deferred` there is nothing to save, and the process ends at once with status 0: a
  checkpoint of the state that is being evaluated is written before. Within it, the loop asks
  `reached` after every step.

  Of several processes, which must stop at the same step, JAX's coordination service listens for
  the signal; there an evaluation is not interrupted by it.
  """

  def __enter__(self) -> "PreemptionGuard":
    self._came = self._deferred = False
    self._old = None
    if jax.process_count() == 1:
      # Only a main thread can have handlers: elsewhere, as in notebooks' servers, there are none.
      with contextlib.suppress(ValueError):
        self._old = signal.signal(signal.SIGTERM, self._handle)
    return self

  def __exit__(self, *_: object) -> None:
    if self._old is not None:
      signal.signal(signal.SIGTERM, self._old)

  def _handle(self, *_: object) -> None:
    if self._came:
      return
    self._came = True
    self._check()

  @contextlib.contextmanager
  def deferred(self, deferred: bool = True) -> Iterator[None]:
    """Here a signal waits for `reached`; with False, inside, it again does not."""
    before, self._deferred = self._deferred, deferred
    try:
      self._check()
      yield
    finally:
      self._deferred = before
    self._check()

  def _check(self) -> None:
    if self._came and not self._deferred:
      self.end()

  def reached(self, step: int) -> bool:
    """Whether to save and end after this step, agreed between all processes."""
    if jax.process_count() > 1:
      return multihost_utils.reached_preemption_sync_point(step)
    return self._came

  def end(self) -> None:
    """Ends the process with status 0."""
    print("SIGTERM: ending here; the same command continues the run", flush=True)
    sys.exit(0)
