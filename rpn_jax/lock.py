"""One run per workdir."""

import contextlib
import fcntl
import os
import pathlib
import socket
from collections.abc import Iterator

import jax

from rpn_jax.errors import InputError

NAME = ".lock"


@contextlib.contextmanager
def held(workdir: pathlib.Path) -> Iterator[None]:
  """Holds the workdir for this run's first process, for itself and its fellows.

  The system gives a lock back when its process ends, however that ends: what a killed run leaves
  is a file with its name, and no lock.

  Raises:
    InputError: another run holds it, with the name of its process.
  """
  if jax.process_index():
    yield
    return
  workdir.mkdir(parents=True, exist_ok=True)
  path = workdir / NAME
  try:
    file = open(path, "a+", encoding="utf-8")  # noqa: SIM115 (closed below)
  except OSError as error:
    raise InputError(
      f"expected a workdir to write to, {path} cannot be opened ({error.strerror}): use another "
      "--workdir"
    ) from error
  with file:
    file.seek(0)
    holder = " ".join(file.read(200).split())
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise InputError(
        f"{workdir} is in use by {holder or 'another process'}: wait for it to end, or use another "
        "--workdir"
      ) from None
    except OSError as error:  # some network file systems have no locks
      print(f"{workdir} cannot be locked ({error.strerror}): start no second run there", flush=True)
      yield
      return
    if holder:
      print(f"{workdir} was left by {holder}, which is gone: taking over", flush=True)
    with contextlib.suppress(OSError):  # a full disk: the lock holds without its name
      file.truncate(0)
      file.write(f"process {os.getpid()} on {socket.gethostname()}")
      file.flush()
    yield
    with contextlib.suppress(OSError):
      file.truncate(0)
