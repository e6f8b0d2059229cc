"""Files and folders: atomic writes, locks, JSON, the cache folder.

A path is a `pathlib.Path`, or one of `base.buckets` with the same methods; `expand` makes both.
"""

import contextlib
import fcntl
import functools
import hashlib
import json
import os
import pathlib
import re
import secrets
import shutil
import socket
import tempfile
import unicodedata
from collections.abc import Iterable, Iterator, Mapping

from absl import logging

from rpn_jax.base import buckets, leases
from rpn_jax.base.errors import InputError

# Of no path of ours. Those of the hub, hf://owner/name, are for `weights.checkpoints`.
_ADDRESS = re.compile(
  r"gs:|(?!hf:|https?://(www\.)?(huggingface|hf)\.co)[a-z][a-z0-9+]+://", re.IGNORECASE
)
# Bytes of a file name on most disks.
_NAME_BYTES = 255
# What is mounted where.
_MOUNTS = pathlib.Path("/proc/self/mounts")


def expand(path: str | os.PathLike) -> pathlib.Path:
  """The path that a person typed: see `exact`, and an existing one that looks the same.

  Letters like é are one character or two (Unicode's NFC and NFD, which macOS writes): where only a
  path of the other form exists, that one is meant.

  Raises:
    InputError: see `exact`.
  """
  path = exact(path)
  if buckets.is_bucket(path) or str(path).isascii() or os.path.exists(path):
    return path
  others = (pathlib.Path(unicodedata.normalize(form, str(path))) for form in ("NFC", "NFD"))
  return next((other for other in others if os.path.exists(other)), path)


def exact(path: str | os.PathLike) -> pathlib.Path:
  """The path by these characters, as of files to write: in a bucket, or local, with `~` expanded.

  The shell does not expand `--flag=~/path`.

  Raises:
    InputError: it is empty; there is no such home folder; an address other than `gs://BUCKET/NAME`;
      a bucket that cannot be used, see `buckets.open_path`.
  """
  if not os.fspath(path):  # of which pathlib makes the current folder
    raise InputError(
      "expected a path, got an empty one, as of a variable that is not set; name a file or a folder"
    )
  if buckets.is_bucket(path):
    return buckets.open_path(path)
  if _ADDRESS.match(os.fspath(path)):
    raise InputError(f"{path}: expected a local path or gs://BUCKET/NAME; correct the address")
  local = pathlib.Path(path)
  if not str(local).startswith("~"):
    return local
  if not os.fspath(path).startswith("~"):  # "./~a.png", of which pathlib makes "~a.png"
    return local.absolute()
  try:
    return local.expanduser()
  except RuntimeError as error:
    if os.path.lexists(local):  # what the shell makes of "*.png" where a picture is called so
      return local.absolute()
    raise InputError(f"{path}: expected a path, {error}; write the whole path") from None


def name_key(path: str | os.PathLike) -> str:
  """Text that is the same for paths which some disks take for one: macOS does for NFC and NFD."""
  return unicodedata.normalize("NFC", os.fspath(path))


def check_utf8(path: str | os.PathLike) -> None:
  """Refuses the path of an image which is no text.

  Raises:
    InputError: see above.
  """
  try:
    os.fspath(path).encode()
  except UnicodeEncodeError:
    raise InputError(
      f"{path}: expected a file name in UTF-8, which results have: rename it"
    ) from None


def relative_path(image: pathlib.Path, folder: pathlib.Path) -> str:
  """The path of a local image from a local folder, with "/".

  Neither is below a link, as `..` leads out of what the link points to.
  """
  image, folder = image.absolute(), folder.absolute()
  path = os.path.relpath(image.parent.resolve() / image.name, folder.resolve())
  return pathlib.PurePath(path).as_posix()


def expand_local(path: str | os.PathLike, what: str) -> pathlib.Path:
  """`expand` of a path that cannot be in a bucket.

  Args:
    path: as typed.
    what: its flag, or what it is, for messages.

  Raises:
    InputError: see `expand`; a path in a bucket.
  """
  if buckets.is_bucket(path):
    raise InputError(f"{what}: expected a local path, got {os.fspath(path)}; copy it to a disk")
  return expand(path)


def is_gcsfuse(path: pathlib.Path) -> bool:
  """Whether a path is in a bucket that gcsfuse shows like a disk; on Kubernetes no mount tells."""
  try:
    mounts = [line.split() for line in _MOUNTS.read_text(encoding="utf-8").splitlines()]
  except OSError:  # not Linux
    return False
  unescape = functools.partial(re.sub, r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)))
  kinds = {pathlib.Path(unescape(target)): kind for _, target, kind, *_ in mounts}
  path = pathlib.Path(os.path.realpath(path))
  kind = next((kinds[each] for each in (path, *path.parents) if each in kinds), "")
  return kind == "fuse.gcsfuse"


def check_renames(folder: pathlib.Path) -> None:
  """Renames a small folder in another one, as checkpoints and prepared sets appear by a rename.

  gcsfuse does it where a bucket has a hierarchical namespace, else only if it was mounted so.

  Raises:
    InputError: folders cannot be renamed there.
  """
  try:
    probe = pathlib.Path(tempfile.mkdtemp(prefix=".rename_", dir=folder))
  except OSError:  # who needs the disk will say what is wrong with it
    return
  try:
    (probe / "old" / "sub").mkdir(parents=True)
    (probe / "old" / "sub" / "file").write_bytes(b"1")
    os.rename(probe / "old", probe / "new")
  except OSError as error:
    if error.filename2:  # of the rename
      raise InputError(
        f"{folder}: expected a disk, where folders can be renamed, got {error.strerror}, as in a "
        "bucket that gcsfuse shows; give gs://BUCKET/NAME instead of the folder"
      ) from error
  finally:
    shutil.rmtree(probe, ignore_errors=True)


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[pathlib.Path]:
  """Atomic write: a local temporary path, which becomes `path` when the block succeeds.

  Readers see either the old file or the new one, never a part. On a disk the temporary file is in
  the same folder and renamed; to a bucket it is copied.

  Raises:
    OSError: the file cannot be written; no temporary file remains.
  """
  # A file whose name looks the same is another one, and would be lost.
  path = exact(path)
  if buckets.is_bucket(path):
    with tempfile.TemporaryDirectory() as folder:
      temporary = pathlib.Path(folder, path.name)
      yield temporary
      buckets.upload(temporary, path)
    return
  # Random: in containers that share a folder every process may be number 1, and threads share one.
  token = secrets.token_hex(8)
  temporary = path.with_name(f".{path.name}.{token}.tmp")
  if len(os.fsencode(temporary.name)) > _NAME_BYTES:  # though that of the file itself may do
    temporary = path.with_name(f".{token}.tmp")
  try:
    yield temporary
    os.replace(temporary, path)
  finally:
    with contextlib.suppress(OSError):  # the disk may be gone
      temporary.unlink(missing_ok=True)


def write_text(path: str | os.PathLike, text: str) -> None:
  """Writes UTF-8 text atomically."""
  if buckets.is_bucket(path):
    exact(path).write_text(text, encoding="utf-8")
    return
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
  unlocked file with its name. In a bucket a lease takes its place, see `leases.held`.

  Args:
    path: path of the lock file; its folder must exist.
    resource: what is locked, for messages.
    remedy: alternative to waiting, for messages.
    wait: wait for another process, which is named, to release the lock.

  Raises:
    InputError: without `wait`, another process, which is named, holds the lock.
    OSError: the lock file cannot be opened.
  """
  if buckets.is_bucket(path):
    with leases.held(path, resource, remedy, wait=wait):
      yield
    return
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
    InputError: the folder would be in a bucket.
  """
  xdg = os.environ.get("XDG_CACHE_HOME", "")
  if buckets.is_bucket(xdg):
    raise InputError(
      f"XDG_CACHE_HOME: expected a local path, got {xdg}; only JAX's programs may be there, by "
      "JAX_COMPILATION_CACHE_DIR"
    )
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


def on_disk(path: str | os.PathLike, more: Iterable[str] = ()) -> pathlib.Path:
  """A local file with the content of a path: the path itself, or a copy of an object of a bucket.

  The copy is kept in the cache folder and made again when the object changes.

  Args:
    path: of a file. Those of the same folder that are JSON are copied, too.
    more: names of further ones, as far as they are there.

  Raises:
    InputError: there is no cache folder to copy to.
    OSError: the object cannot be read or the copy not written.
  """
  path = expand(path)
  if not buckets.is_bucket(path) or not path.is_file():
    return path
  versions = {}
  for each in {path, *path.parent.glob("*.json"), *map(path.parent.joinpath, more)}:
    with contextlib.suppress(FileNotFoundError):  # a folder
      versions[each.name] = buckets.version(each)
  key = "".join(f"{name}\0{found.generation}\n" for name, found in sorted(versions.items()))
  cache = cache_dir()
  if cache is None:
    raise InputError(
      f"{path}: expected a folder to copy it to; set XDG_CACHE_HOME to one that can be written"
    )
  digest = hashlib.sha256(f"{path.parent}\n{key}".encode()).hexdigest()[:16]
  folder = cache / "buckets" / digest
  folder.mkdir(parents=True, exist_ok=True)
  with locked(folder / ".lock", str(path), wait=True):
    for name, found in versions.items():
      if not (folder / name).exists():
        if name == path.name:
          print(f"copying {path} ({found.size / 1e6:.0f} MB) to {folder}", flush=True)
        with replacing(folder / name) as temporary:
          buckets.download(path.parent / name, temporary)
  return folder / path.name
