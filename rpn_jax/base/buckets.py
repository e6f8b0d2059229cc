"""Paths in Google Cloud Storage, `gs://bucket/name`, through etils.epath and gcsfs.

An object is written whole or not at all, so no temporary names are needed; a folder is what several
names begin with, so it is neither made nor renamed, but its objects are copied. gcsfs is imported
when the first such path is met.
"""

import base64
import contextlib
import errno
import functools
import glob
import io
import logging
import os
import pathlib
import re
import time
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

from rpn_jax.base.errors import InputError

PREFIX = "gs://"
# Seconds in which a request must be answered, the content of an object included.
REQUEST_SECONDS = 120
# Bytes of an object that are read or sent in one request.
CHUNK_BYTES = 2**25
# Requests at a time.
THREADS = 8

CREDENTIALS = (
  "run gcloud auth application-default login, set GOOGLE_APPLICATION_CREDENTIALS, or give the "
  "machine's service account the role Storage Object User"
)


class Version(NamedTuple):
  """An object at one moment.

  Attributes:
    generation: number of the write that made it.
    age: seconds since then, by the server's clock.
    size: bytes.
    crc32c: checksum of its content, as the server writes it.
  """

  generation: str
  age: float
  size: int
  crc32c: str


def is_bucket(path: str | os.PathLike) -> bool:
  """Whether a path is in a bucket."""
  return os.fspath(path).startswith(PREFIX)


def open_path(path: str | os.PathLike) -> pathlib.Path:
  """The path object of `gs://bucket/name`; it has the methods of a `pathlib.Path` that we use.

  Raises:
    InputError: the bucket's name is missing, gcsfs is not installed, or the bucket does not exist
      or cannot be listed.
  """
  text = os.fspath(path)
  match = re.match(r"gs://([a-z0-9][a-z0-9._-]+)(/|$)", text)
  if not match:
    raise InputError(f"{text}: expected gs://BUCKET/NAME, with the name of a bucket; correct it")
  _check_bucket(match[1])
  return cast(pathlib.Path, _classes()[1](text))


@functools.cache
def _check_bucket(bucket: str) -> None:
  """Asks for a bucket once, so that what is wrong with it is said before any work."""
  fs = file_system()
  try:
    fs.call("GET", "b/{}/o", bucket, maxResults=1)
  except OSError as error:
    raise InputError(f"{PREFIX}{bucket}: expected a bucket, {error.strerror}") from error


@functools.cache
def file_system() -> Any:
  """The file system of all buckets.

  Raises:
    InputError: gcsfs is not installed.
  """
  import fsspec

  made = _classes()[0]
  for name in ("gs", "gcs"):  # what Orbax and TFDS ask for by name
    fsspec.register_implementation(name, made, clobber=True)
  return fsspec.filesystem("gcs", finalize_on_close=True)  # the instance of epath


@functools.cache
def _classes() -> tuple[type, type]:
  """The classes of the file system and of its paths, which need gcsfs."""
  # Neither gRPC nor TensorFlow is wanted, both of which take seconds.
  os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
  os.environ.setdefault("EPATH_USE_TF", "false")
  try:
    import fsspec
    import gcsfs.core
    from etils import epath
  except ImportError as error:
    raise InputError(
      f"expected the package gcsfs for paths in a bucket, got {error}; "
      "pip install gcsfs==2026.10.1, or use a local path"
    ) from None
  # It logs the traceback of every request that failed, though it may be repeated or expected.
  logging.getLogger("gcsfs").setLevel(logging.CRITICAL + 1)

  class Buckets(gcsfs.core.GCSFileSystem):
    """gcsfs with the system's errors, so that what cannot be reached is never taken for missing."""

    def __init__(self, **options: Any):
      if os.environ.get("STORAGE_EMULATOR_HOST"):
        options.setdefault("token", "anon")
      # Other processes write, too: what was listed a moment ago may have changed.
      super().__init__(use_listings_cache=False, requests_timeout=REQUEST_SECONDS, **options)

    async def _call(self, method: str, path: str, *args: Any, **options: Any) -> Any:
      try:
        return await super()._call(method, path, *args, **options)
      except Exception as error:
        raise _as_system_error(error, path, args, options) from error

    call = fsspec.asyn.sync_wrapper(_call)

    async def _isdir(self, path: str) -> bool:
      try:
        return (await self._info(path))["type"] == "directory"
      except FileNotFoundError:
        return False

    async def _isfile(self, path: str) -> bool:
      try:
        return (await self._info(path))["type"] == "file"
      except FileNotFoundError:
        return False

    async def _mkdir(self, path: str, *_: Any, **__: Any) -> None:
      """Folders are not made, and buckets not by accident."""

    async def _makedirs(self, path: str, exist_ok: bool = False) -> None:
      """See `_mkdir`."""

  class BucketPath(epath.gpath.PosixGPath):
    """A path whose methods do what those of `pathlib.Path` do."""

    def read_bytes(self) -> bytes:
      return read(cast(pathlib.Path, self))

    def read_text(self, encoding: str | None = None, errors: str | None = None) -> str:
      return self.read_bytes().decode(encoding or "utf-8", errors or "strict")

    def write_bytes(self, data: bytes) -> int:
      write(cast(pathlib.Path, self), data)
      return len(data)

    def write_text(self, data: str, encoding: str | None = None, **_: Any) -> int:
      return self.write_bytes(data.encode(encoding or "utf-8"))

    def open(self, mode: str = "r", **options: Any) -> Any:
      if mode == "rb":
        return io.BytesIO(self.read_bytes())
      if mode == "r":
        return io.StringIO(self.read_text(options.get("encoding")))
      return super().open(mode, **options)

    def glob(self, pattern: str) -> Iterator[Any]:
      # In the folder's own name a bracket is a bracket.
      names = file_system().glob(f"{glob.escape(os.fspath(self))}/{pattern}")
      return (type(self)(PREFIX + name) for name in names)

    def stat(self) -> Any:
      return SimpleNamespace(st_size=version(cast(pathlib.Path, self)).size)

    def rename(self, target: Any) -> Any:
      rename(cast(pathlib.Path, self), target)
      return target

    def mkdir(self, *_: Any, **__: Any) -> None:
      pass

    def resolve(self, strict: bool = False) -> "BucketPath":
      return self

    absolute = resolve

  return Buckets, BucketPath


def _as_system_error(error: Exception, url: str, args: tuple, options: dict) -> Exception:
  """An error of gcsfs as the `OSError` that a disk would raise; others as they are."""
  code = getattr(error, "code", None)
  text = " ".join(str(error).split())
  bucket, name = _names(url, args)
  name = name or options.get("name", "")
  where = PREFIX + "/".join(filter(None, (bucket, name)))
  if isinstance(error, FileNotFoundError):
    words = "no such object" if name else "there is no such bucket: create it, or correct the name"
    return FileNotFoundError(errno.ENOENT, words, where)
  if isinstance(error, FileExistsError):  # a condition on the generation
    return FileExistsError(errno.EEXIST, "changed by another process", where)
  if text.startswith("Forbidden") or code in (401, 403, "401", "403"):
    return PermissionError(errno.EACCES, f"access is denied: {CREDENTIALS}", where)
  module = type(error).__module__.split(".")[0]
  if module == "google":
    return PermissionError(errno.EACCES, f"no valid credentials: {CREDENTIALS}", where)
  network = (TimeoutError, ConnectionError)
  if code or module in ("aiohttp", "requests", "gcsfs") or isinstance(error, network):
    reason = f"answers {code}" if code else f"{type(error).__name__}"
    return OSError(
      errno.EHOSTDOWN, f"the storage cannot be reached ({reason}), after several tries", where
    )
  return error


def _names(url: str, args: tuple) -> tuple[str, str]:
  """Bucket and object that a request of gcsfs is about."""
  if args:
    return args[0], args[1] if len(args) > 1 else ""
  match = re.search(r"/b/([^/?]+)(?:/o/([^/?]+))?", url)
  return (match[1], (match[2] or "").replace("%2F", "/")) if match else ("", "")


def _split(path: pathlib.Path) -> tuple[str, str]:
  bucket, _, name = os.fspath(path).removeprefix(PREFIX).partition("/")
  return bucket, name


def version(path: pathlib.Path) -> Version:
  """The version of an object.

  Raises:
    FileNotFoundError: there is none.
    OSError: the storage cannot be reached, or refuses.
  """
  import email.utils
  import json

  fs = file_system()
  headers, content = fs.call("GET", "b/{}/o/{}", *_split(path))
  found = json.loads(content)
  age = 0.0
  if "Date" in headers:
    now = email.utils.parsedate_to_datetime(headers["Date"])
    age = (now - fs._parse_timestamp(found["updated"])).total_seconds()
  return Version(found["generation"], age, int(found["size"]), found.get("crc32c", ""))


def read(path: pathlib.Path) -> bytes:
  """The content of an object.

  Raises:
    OSError: there is none, the storage cannot be reached, or refuses.
  """
  _, content = file_system().call("GET", "b/{}/o/{}", *_split(path), alt="media")
  return content


def write(path: pathlib.Path, content: bytes, generation: str | None = None) -> str:
  """Writes an object, whole or not at all.

  Args:
    path: of the object.
    content: of the object.
    generation: only if this is its generation now, "0" for none; None for any.

  Returns:
    Its new generation.

  Raises:
    FileExistsError: it has another generation.
    OSError: the storage cannot be reached, or refuses.
  """
  import json

  bucket, name = _split(path)
  fs = file_system()
  options = {} if generation is None else {"ifGenerationMatch": generation}
  url = f"{fs._location}/upload/storage/v1/b/{bucket}/o"
  try:
    _, answer = fs.call("POST", url, uploadType="media", name=name, data=content, **options)
  except FileExistsError:
    # A request that was repeated because its answer was lost meets what it wrote itself.
    if read(path) == content:
      return version(path).generation
    raise
  return json.loads(answer)["generation"]


def remove(path: pathlib.Path, generation: str) -> None:
  """Removes an object if it has that generation.

  Raises:
    OSError: it has not, the storage cannot be reached, or refuses.
  """
  file_system().call("DELETE", "b/{}/o/{}", *_split(path), ifGenerationMatch=generation)


def walk(folder: pathlib.Path) -> Iterator[tuple[pathlib.Path, Version]]:
  """The objects below a folder, by name, and their versions, of which the age is not known."""
  fs = file_system()
  try:
    found = fs.find(os.fspath(folder), detail=True)
  except FileNotFoundError:
    return
  for name, info in sorted(found.items()):
    about = Version(info["generation"], 0.0, info["size"], info.get("crc32c", ""))
    yield type(folder)(PREFIX + name), about


def encode_crc32c(digest: bytes) -> str:
  """A checksum as the server writes it."""
  return base64.b64encode(digest).decode()


def upload(source: pathlib.Path, path: pathlib.Path) -> None:
  """Copies a local file to an object.

  Raises:
    OSError: the file cannot be read or the object not written.
  """
  if source.stat().st_size <= CHUNK_BYTES:
    write(path, source.read_bytes())
  else:
    with open(source, "rb") as file, file_system().open(os.fspath(path), "wb") as target:
      while chunk := file.read(CHUNK_BYTES):
        target.write(chunk)


def download(path: pathlib.Path, target: pathlib.Path) -> None:
  """Copies an object to a local file, a chunk at a time.

  Raises:
    OSError: the object cannot be read or the file not written.
  """
  found = version(path)
  fs = file_system()
  # All chunks are of one version, whoever writes meanwhile.
  options = {"alt": "media", "generation": found.generation}
  with open(target, "wb") as file:
    for start in range(0, found.size, CHUNK_BYTES):
      header = {"Range": f"bytes={start}-{min(found.size, start + CHUNK_BYTES) - 1}"}
      _, chunk = fs.call("GET", "b/{}/o/{}", *_split(path), headers=header, **options)
      file.write(chunk)


def each(action: Callable[[Any], object], items: Sequence) -> None:
  """Does something with every item, several at a time; the first error is raised."""
  import concurrent.futures

  with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
    for _ in pool.map(action, items):
      pass


def rename(path: pathlib.Path, target: pathlib.Path) -> None:
  """Copies what is below a folder, or one object, to another name, then removes it.

  Nothing is lost if it is interrupted: what was not removed is at both places.
  """
  fs = file_system()
  old, new = os.fspath(path).removeprefix(PREFIX), os.fspath(target).removeprefix(PREFIX)
  names = [os.fspath(each).removeprefix(PREFIX) for each, _ in walk(path)] or [old]
  each(lambda name: fs.cp_file(name, new + name.removeprefix(old)), names)
  each(fs.rm_file, names)


class Pace:
  """When to do again what is done now and then, and takes half a minute where a network is cut.

  Args:
    seconds: from the end of one time to the next; nine times as long as it took, if that is more.
  """

  def __init__(self, seconds: float):
    self._seconds = seconds
    self._next_at = time.monotonic() + seconds

  def is_due(self) -> bool:
    return time.monotonic() >= self._next_at

  @contextlib.contextmanager
  def measured(self) -> Iterator[None]:
    """Around what is done, which may fail."""
    began = time.monotonic()
    try:
      yield
    finally:
      ended = time.monotonic()
      self._next_at = ended + max(self._seconds, 9 * (ended - began))


class GrowingObject:
  """A file that is appended to: an object is written as a whole, so it is written again and again.

  Args:
    path: of the object; it is written at once.
    content: its first content.
    seconds: time between two writes, but for `flush` and `close`.

  Raises:
    OSError: the storage cannot be reached, or refuses.
  """

  def __init__(self, path: pathlib.Path, content: bytes, seconds: float):
    self._path, self._content, self._pace = path, bytearray(content), Pace(seconds)
    self._sent = -1
    self.closed = False
    self.flush()

  def write(self, data: bytes) -> int:
    """Appends, and sends if it is time; what cannot be sent is kept for the next time."""
    self._content += data
    if self._pace.is_due():
      with contextlib.suppress(OSError):  # `flush` tells
        self.flush()
    return len(data)

  def flush(self) -> None:
    """Sends what was appended since the last time."""
    size = len(self._content)
    if size != self._sent:
      with self._pace.measured():
        write(self._path, bytes(self._content))
      self._sent = size

  def close(self) -> None:
    self.flush()
    self.closed = True
