"""SIGTERM, by which a machine announces its preemption: the run saves and exits cleanly."""

import contextlib
import signal
import sys
from collections.abc import Iterator

import jax
from jax.experimental import multihost_utils


class PreemptionGuard:
  """Context manager that tells a training loop whether SIGTERM has arrived.

  Outside of `deferred` there is nothing to save (a state is checkpointed before it is evaluated),
  and the process exits at once with status 0. Inside, the loop calls `reached` after every step.

  Several processes must stop at the same step: there JAX's coordination service listens for the
  signal, which then does not interrupt an evaluation.
  """

  def __enter__(self) -> "PreemptionGuard":
    self._received = self._deferred = False
    self._old = None
    if jax.process_count() == 1:
      # Only the main thread may set handlers; elsewhere, as in a notebook server, there is none.
      with contextlib.suppress(ValueError):
        self._old = signal.signal(signal.SIGTERM, self._handle)
    return self

  def __exit__(self, *_: object) -> None:
    if self._old is not None:
      signal.signal(signal.SIGTERM, self._old)

  def _handle(self, *_: object) -> None:
    if self._received:
      return
    self._received = True
    self._check()

  @contextlib.contextmanager
  def deferred(self, deferred: bool = True) -> Iterator[None]:
    """Defers the signal to `reached` within the block; with False, undoes this within the block."""
    before, self._deferred = self._deferred, deferred
    try:
      self._check()
      yield
    finally:
      self._deferred = before
    self._check()

  def _check(self) -> None:
    if self._received and not self._deferred:
      self.end()

  def reached(self, step: int) -> bool:
    """Whether to save and exit after this step; all processes agree."""
    if jax.process_count() > 1:
      return multihost_utils.reached_preemption_sync_point(step)
    return self._received

  def end(self) -> None:
    """Exits with status 0."""
    print("SIGTERM: exiting; the same command resumes the run", flush=True)
    sys.exit(0)
