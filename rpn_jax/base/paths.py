"""Files and folders: atomic writes, locks, JSON, the cache folder."""

import contextlib
import fcntl
import functools
import json
import os
import pathlib
import secrets
import socket
import unicodedata
from collections.abc import Iterator, Mapping

from absl import logging

from rpn_jax.base.errors import InputError


def expand(path: str | os.PathLike) -> pathlib.Path:
  """Expands a leading `~`, which the shell does not do in `--flag=~/path`.

  Letters like é are one character or two (Unicode's NFC and NFD, which macOS writes), and look
  alike: where only a path of the other form exists, that one is meant.

  Raises:
    InputError: there is no such home folder.
  """
  try:
    path = pathlib.Path(path).expanduser()
  except RuntimeError as error:
    raise InputError(f"{path}: expected a path, {error}; write the whole path") from None
  if not str(path).isascii() and not os.path.exists(path):
    others = (pathlib.Path(unicodedata.normalize(form, str(path))) for form in ("NFC", "NFD"))
    return next((other for other in others if os.path.exists(other)), path)
  return path


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[pathlib.Path]:
  """Atomic write: a temporary path in the folder of `path`, renamed to it when the block succeeds.

  Readers see either the old file or the new one, never a part.

  Raises:
    OSError: the file cannot be written; no temporary file remains.
  """
  path = pathlib.Path(path)
  # Random: in containers that share a folder every process may be number 1, and threads share one.
  temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
  try:
    yield temporary
    os.replace(temporary, path)
  finally:
    with contextlib.suppress(OSError):  # the disk may be gone
      temporary.unlink(missing_ok=True)


def write_text(path: str | os.PathLike, text: str) -> None:
  """Writes UTF-8 text atomically."""
  with replacing(path) as temporary:
    temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike, content: Mapping) -> None:
  """Writes indented JSON atomically."""
  write_text(path, json.dumps(content, indent=1) + "\n")


@contextlib.contextmanager
def locked(
  path: pathlib.Path, resource: str, remedy: str = "", *, wait: bool = False
) -> Iterator[None]:
  """Holds a lock file during the block, so that only one process at a time uses `resource`.

  The operating system releases the lock however the process ends; a killed process leaves behind an
  unlocked file with its name.

  Args:
    path: path of the lock file; its folder must exist.
    resource: what is locked, for messages.
    remedy: alternative to waiting, for messages.
    wait: wait for another process, which is named, to release the lock.

  Raises:
    InputError: without `wait`, another process, which is named, holds the lock.
    OSError: the lock file cannot be opened.
  """
  with open(path, "a+", encoding="utf-8") as file:

    def read_holder() -> str:
      file.seek(0)
      return " ".join(file.read(200).split())

    holder = read_holder()
    try:
      try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except BlockingIOError:
        holder = read_holder()  # who got it since
        if not wait:
          raise
        print(f"{resource} is in use by {holder or 'another process'}: waiting", flush=True)
        fcntl.flock(file, fcntl.LOCK_EX)
        holder = read_holder()  # empty, unless that process was killed
    except BlockingIOError:
      remedy = f", or {remedy}" if remedy else ""
      raise InputError(
        f"{resource} is in use by {holder or 'another process'}: wait for it to end{remedy}"
      ) from None
    except OSError as error:  # some network file systems do not support locks
      print(
        f"{resource} cannot be locked ({error.strerror}): do not start a second process there",
        flush=True,
      )
      yield
      return
    if holder:
      print(f"{resource} was in use by {holder}, which was killed: taking over", flush=True)
    with contextlib.suppress(OSError):  # on a full disk the lock works without a name
      file.truncate(0)
      file.write(f"process {os.getpid()} on {socket.gethostname()}")
      file.flush()
    try:
      yield
    finally:  # after an error, too: the next process need not hear of this one
      with contextlib.suppress(OSError):
        file.truncate(0)


def cache_path() -> pathlib.Path:
  """Path of the cache folder: `rpn_jax` in XDG_CACHE_HOME, by default in `~/.cache`.

  Raises:
    RuntimeError: there is no home folder.
  """
  xdg = os.environ.get("XDG_CACHE_HOME", "")
  # The XDG specification says to ignore relative paths.
  root = pathlib.Path(xdg) if os.path.isabs(xdg) else pathlib.Path.home() / ".cache"
  return root / "rpn_jax"


@functools.cache
def cache_dir() -> pathlib.Path | None:
  """The cache folder, to be written to.

  None, with a warning, if it cannot be created, as in a container without a home folder.
  """
  try:
    folder = cache_path()
    folder.mkdir(parents=True, exist_ok=True)
    if os.access(folder, os.W_OK | os.X_OK):
      return folder
    reason = f"{folder} is not writable"
  except (OSError, RuntimeError) as error:
    reason = " ".join(str(error).split())
  logging.warning(
    "nothing is cached for later runs (%s): set XDG_CACHE_HOME to a writable folder", reason
  )
  return None
