"""Files that cannot be read at the moment, as opposed to damaged ones.

Tensorstore raises the same kinds of errors for both; the system's words are in their text.
"""

import contextlib
import errno
import os
import pathlib
import sys
import warnings
from collections.abc import Iterator

from absl import logging

# What the system says when it gives a file or memory to nobody, whatever the file holds.
SYSTEM_ERRORS = (
  errno.EACCES, errno.EPERM, errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE,
  errno.ENOSPC, errno.EROFS, errno.EFBIG, errno.EDQUOT, errno.ENXIO, errno.ENODEV, errno.ENOTCONN,
  errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EREMOTEIO,
)  # fmt: skip
# The same in the words of XLA, of tensorstore and of Python's threads.
OUT_OF_RESOURCES = ("resource_exhausted", "bad_alloc", "can't start new thread")

CHUNK_BYTES = 2**22


class DamagedCheckpoint(Exception):
  """The content of a checkpoint differs from what was saved."""


def read_files(folder: pathlib.Path) -> None:
  """Reads every file below a folder, one at a time, which shows the system's own error.

  Raises:
    OSError: a folder or file cannot be read.
  """

  def stop(error: OSError) -> None:
    raise error

  for parent, _, names in os.walk(folder, onerror=stop):
    for name in names:
      path = os.path.join(parent, name)
      with open(path, "rb", buffering=0) as file:
        try:
          while file.read(CHUNK_BYTES):
            pass
        except OSError as error:
          raise OSError(error.errno, error.strerror, path) from error


def system_error(error: BaseException) -> str | None:
  """The system's words if an error, or one that caused it, says nothing about a file's content."""
  for each in _chain(error, set()):
    if isinstance(each, MemoryError):
      return os.strerror(errno.ENOMEM)
    if isinstance(each, OSError) and each.errno in SYSTEM_ERRORS:
      return each.strerror
    text = str(each).lower()
    for code in SYSTEM_ERRORS:
      if os.strerror(code).lower() in text:
        return os.strerror(code)
    # After the system's own words: tensorstore also calls a full descriptor table exhausted.
    if any(words in text for words in OUT_OF_RESOURCES):
      return os.strerror(errno.ENOMEM)
  return None


def _chain(error: BaseException | None, seen: set[int]) -> Iterator[BaseException]:
  """An error, what caused it, and the members of a group of errors."""
  if error is None or id(error) in seen:
    return
  seen.add(id(error))
  yield error
  for other in (*getattr(error, "exceptions", ()), error.__cause__, error.__context__):
    yield from _chain(other, seen)


def reason_of(error: BaseException) -> str:
  """A short reason from an error: the messages of tensorstore are pages long."""
  if isinstance(error, OSError) and error.strerror:
    return error.strerror
  text = " ".join(str(error).split())
  return system_error(error) or f"{type(error).__name__}: {text[:120]}"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
  """Silences Orbax: its log, and its coroutines, which warn when collected after a failure.

  Failures are reported in one line instead. Collect garbage in the block once the error is gone:
  its traceback keeps the coroutines alive.
  """
  verbosity, hook = logging.get_verbosity(), sys.unraisablehook
  logging.set_verbosity(logging.FATAL)
  sys.unraisablehook = lambda _: None
  try:
    with warnings.catch_warnings():
      warnings.simplefilter("ignore", RuntimeWarning)
      yield
  finally:
    sys.unraisablehook = hook
    logging.set_verbosity(verbosity)
