"""Ctrl-C in a command: the first one ends it in order, the second one at once."""

import contextlib
import signal
import sys
import types
from collections.abc import Iterator

# Seconds until an exception that was dropped is raised again.
AGAIN_SECONDS = 0.02


def end_at_once() -> None:
  """Leaves Ctrl-C to the system in a process that begins, or is about to end.

  Nothing is lost there, and Python would show a traceback of its imports or of its exit, in which
  threads of JAX and grain can crash.
  """
  if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not under nohup
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextlib.contextmanager
def handled() -> Iterator[None]:
  """Ctrl-C raises `KeyboardInterrupt` once within the block; see `interrupt`.

  Leaves the signal alone where another handler is in place, or none, as under nohup; so blocks can
  be nested. Only the main thread may set handlers: elsewhere nothing is changed.
  """
  before, hook = signal.getsignal(signal.SIGINT), sys.unraisablehook
  try:
    if before in (signal.default_int_handler, signal.SIG_DFL):
      signal.signal(signal.SIGINT, interrupt)
      sys.unraisablehook = raise_again
  except ValueError:
    pass
  try:
    yield
  finally:
    sys.unraisablehook = hook
    if signal.getsignal(signal.SIGINT) is interrupt:
      signal.signal(signal.SIGINT, before)


def interrupt(number: int, frame: types.FrameType | None) -> None:
  """The first Ctrl-C ends the command, whose cleanup can take seconds; the second ends that, too.

  The second by the system's own action, which is at once even within a compilation. Python's would
  raise in the middle of the cleanup, after which threads of JAX and grain can crash. The first,
  too, within an import: what is raised while jaxlib's modules initialize ends in a segmentation
  fault, and before JAX is there nothing has been done.
  """
  signal.signal(signal.SIGINT, signal.SIG_DFL)
  while frame is not None:
    if frame.f_code.co_filename.startswith("<frozen importlib"):
      signal.raise_signal(number)
    frame = frame.f_back
  raise KeyboardInterrupt


def raise_again(dropped: "sys.UnraisableHookArgs") -> None:
  """Raises `KeyboardInterrupt` and `SystemExit` again, where Python had to drop them.

  A signal that arrives while garbage is collected, as often while JAX traces, is handled in JAX's
  callback of the collector; what a callback or a finalizer raises is dropped, and the command would
  go on.
  """
  error = dropped.exc_value
  if not isinstance(error, (KeyboardInterrupt, SystemExit)):
    return sys.__unraisablehook__(dropped)
  kind, arguments = type(error), error.args

  def again(number: int, frame: types.FrameType | None) -> None:
    signal.signal(number, before)
    raise kind(*arguments)

  before = signal.signal(signal.SIGALRM, again)
  signal.setitimer(signal.ITIMER_REAL, AGAIN_SECONDS)
