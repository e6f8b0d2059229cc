"""Files and folders: written whole or not at all, locked, as JSON; where caches live."""

import contextlib
import fcntl
import functools
import json
import os
import pathlib
import socket
from collections.abc import Iterator, Mapping

from absl import logging

from rpn_jax.base.errors import InputError


def expand(path: str | os.PathLike) -> pathlib.Path:
  """The path with a leading `~` resolved: behind `=` the shell leaves it as it is.

  Raises:
    InputError: there is no such home folder.
  """
  try:
    return pathlib.Path(path).expanduser()
  except RuntimeError as error:
    raise InputError(f"{path}: expected a path, {error}; write the whole path") from None


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[pathlib.Path]:
  """A temporary path in the folder of `path`, renamed to `path` when the block ends well.

  Readers see the old file or the new one, never a part of either.

  Raises:
    OSError: the file cannot be written; nothing is left of it.
  """
  path = pathlib.Path(path)
  temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
  try:
    yield temporary
    os.replace(temporary, path)
  finally:
    with contextlib.suppress(OSError):  # the disk may be gone altogether
      temporary.unlink(missing_ok=True)


def write_text(path: str | os.PathLike, text: str) -> None:
  """Writes text in UTF-8; see `replacing`."""
  with replacing(path) as temporary:
    temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike, content: Mapping) -> None:
  """Writes JSON, indented; see `replacing`."""
  write_text(path, json.dumps(content, indent=1) + "\n")


@contextlib.contextmanager
def locked(path: pathlib.Path, resource: str, remedy: str = "") -> Iterator[None]:
  """Holds a lock file while the block runs, so that one process at a time uses `resource`.

  The system releases the lock when the process ends, however it ends: what a killed process leaves
  is a file with its name and no lock.

  Args:
    path: of the lock file; its folder exists.
    resource: what is locked, for messages.
    remedy: what else to do than wait, for messages.

  Raises:
    InputError: another process holds the lock, with its name.
    OSError: the file cannot be opened.
  """
  with open(path, "a+", encoding="utf-8") as file:
    file.seek(0)
    holder = " ".join(file.read(200).split())
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      remedy = f", or {remedy}" if remedy else ""
      raise InputError(
        f"{resource} is in use by {holder or 'another process'}: wait for it to end{remedy}"
      ) from None
    except OSError as error:  # some network file systems have no locks
      print(
        f"{resource} cannot be locked ({error.strerror}): do not start a second process there",
        flush=True,
      )
      yield
      return
    if holder:
      print(f"{resource} was left by {holder}, which is gone: taking over", flush=True)
    with contextlib.suppress(OSError):  # a full disk: the lock holds without its name
      file.truncate(0)
      file.write(f"process {os.getpid()} on {socket.gethostname()}")
      file.flush()
    yield
    with contextlib.suppress(OSError):
      file.truncate(0)


@functools.cache
def cache_dir() -> pathlib.Path | None:
  """The folder for what can be made again: `~/.cache/rpn_jax`, or that of XDG_CACHE_HOME.

  None where there is no place for it, as in a container without a home folder; a warning says so
  once.
  """
  given = os.environ.get("XDG_CACHE_HOME", "")
  try:
    # The standard says to ignore relative paths.
    root = pathlib.Path(given) if os.path.isabs(given) else pathlib.Path.home() / ".cache"
    folder = root / "rpn_jax"
    folder.mkdir(parents=True, exist_ok=True)
    if os.access(folder, os.W_OK | os.X_OK):
      return folder
    reason = f"{folder} is not writable"
  except (OSError, RuntimeError) as error:
    reason = " ".join(str(error).split())
  logging.warning(
    "nothing is kept for the next run (%s): set XDG_CACHE_HOME to a writable folder", reason
  )
  return None
