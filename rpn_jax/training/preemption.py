"""SIGTERM, which announces a preemption, and Ctrl-C: the run saves and exits cleanly.

Google's machines tell their metadata server of a preemption first: who listens there has all of
the half minute that is left.
"""

import contextlib
import http.client
import os
import signal
import sys
import threading
import urllib.request
from collections.abc import Iterator

import jax
from jax.experimental import multihost_utils

# What a machine of Google says of itself.
PRODUCT = "/sys/class/dmi/id/product_name"
METADATA = "computeMetadata/v1/instance/preempted"

NAMES = {signal.SIGTERM: "SIGTERM", signal.SIGINT: "Ctrl-C"}


class PreemptionGuard:
  """Context manager that tells a training loop whether SIGTERM or SIGINT (Ctrl-C) has arrived.

  Outside of `deferred` there is nothing to save (a state is checkpointed before it is evaluated),
  and the process ends at once. Inside, the loop calls `reached` after every step. The end is an
  exit with status 0 after SIGTERM and a `KeyboardInterrupt` after Ctrl-C. A second Ctrl-C does not
  wait: it ends a command; in a notebook, or wherever else Python's own handler was in place, it
  raises `KeyboardInterrupt`.

  Several processes must stop at the same step: there JAX's coordination service listens for
  SIGTERM, which then does not interrupt an evaluation, and Ctrl-C is not handled.
  """

  def __enter__(self) -> "PreemptionGuard":
    self._received: signal.Signals | None = None
    self._deferred = False
    self._old = {}
    if jax.process_count() == 1:
      # Only the main thread may set handlers; elsewhere, as in a notebook server, there is none.
      with contextlib.suppress(ValueError):
        self._old[signal.SIGTERM] = signal.signal(signal.SIGTERM, self._handle)
        if signal.getsignal(signal.SIGINT) not in (signal.SIG_IGN, None):  # under nohup
          self._old[signal.SIGINT] = signal.signal(signal.SIGINT, self._handle)
    self._ended = threading.Event()
    if _on_google():
      threading.Thread(target=_listen, args=(self._ended,), daemon=True).start()
    return self

  def __exit__(self, *_: object) -> None:
    self._ended.set()
    for number, old in self._old.items():
      signal.signal(number, old)

  def _handle(self, number: int, _: object) -> None:
    if number == signal.SIGINT:
      # The next one. Of a command it would have been the turn of `interrupts.interrupt`.
      old = self._old[signal.SIGINT]
      self._old[signal.SIGINT] = old if old is signal.default_int_handler else signal.SIG_DFL
      signal.signal(signal.SIGINT, self._old[signal.SIGINT])
      if self._deferred:  # not print, which may be what was interrupted
        os.write(2, b"\nCtrl-C: saving after this step; press it again to end at once\n")
    if self._received:
      return
    self._received = signal.Signals(number)
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
    """Whether to save and exit after this step; all processes agree.

    Args:
      step: counted from 1 in this call of the command, as JAX's service does: a notice that comes
        before the first one asks for an exit after step 1, and after no later one.
    """
    if jax.process_count() > 1:
      return multihost_utils.reached_preemption_sync_point(step)
    return self._received is not None

  @property
  def name(self) -> str:
    """What has arrived, for messages."""
    return NAMES[self._received or signal.SIGTERM]

  def end(self) -> None:
    """Exits with status 0, or raises `KeyboardInterrupt` if it was Ctrl-C that arrived."""
    if self._received == signal.SIGINT:
      raise KeyboardInterrupt
    print("SIGTERM: exiting; the same command resumes the run", flush=True)
    sys.exit(0)


def _on_google() -> bool:
  try:
    with open(PRODUCT, encoding="utf-8") as file:
      return file.read().strip() == "Google Compute Engine"
  except OSError:
    return False


def _listen(ended: threading.Event) -> None:
  """Sends this process a SIGTERM when the metadata server announces a preemption."""
  host = os.environ.get("GCE_METADATA_HOST", "metadata.google.internal")
  query = ""  # first what is so already, then changes
  while not ended.is_set():
    request = urllib.request.Request(
      f"http://{host}/{METADATA}{query}", headers={"Metadata-Flavor": "Google"}
    )
    try:
      with urllib.request.urlopen(request, timeout=90) as answer:
        preempted = answer.read(100).strip() == b"TRUE"
    except (OSError, http.client.HTTPException):  # SIGTERM comes in any case
      ended.wait(5)
      continue
    if preempted:
      print("this machine is being preempted", flush=True)
      os.kill(os.getpid(), signal.SIGTERM)
      return
    query = "?wait_for_change=true&timeout_sec=60"
