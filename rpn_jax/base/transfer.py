"""One file over HTTP: it resumes where it stopped, and has its name only once it is whole."""

import contextlib
import dataclasses
import errno
import glob
import hashlib
import os
import pathlib
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from rpn_jax.base.console import progress
from rpn_jax.base.errors import InputError

MB = 1_000_000
# Seconds before another try, while the connection breaks without a new byte.
WAITS = (1.0, 2.0, 4.0)
# Seconds that a server may ask to wait; for longer, the person decides.
LONGEST_WAIT = 30.0
# Of servers that are busy for the moment.
_BUSY = (429, 500, 502, 503, 504)


class TransferError(InputError):
  """Why an address gave nothing that can be used: a phrase for the message of the caller."""


def refusal(response: Any) -> str:
  """A status above 399, in words."""
  status = response.status_code
  if status in (401, 403):
    return f"HTTP {status}, access refused: check that no firewall is in between"
  if status == 404:
    return "HTTP 404, no such file: it may have moved"
  if status == 429:
    after = response.headers.get("Retry-After", "")
    return f"HTTP 429, too many requests: try again in {after + ' s' if after else 'some minutes'}"
  return f"HTTP {status}: try again later"


class Hints(NamedTuple):
  """What to do, in the words of the caller.

  Attributes:
    connection: where no server answers, after "check the network and HTTPS_PROXY, or ".
    disk: where the disk is full, after "free some, or ".
    refusal: what a status above 399 means.
  """

  connection: str
  disk: str
  refusal: Callable[[Any], str] = refusal


def explain(error: Exception, hints: Hints) -> TransferError:
  """The reason, in words, why a request failed."""
  import httpx2

  if isinstance(error, httpx2.TimeoutException):
    return TransferError("no answer in time: check the network, or try again later")
  reason = " ".join(str(error).split()) or type(error).__name__
  if isinstance(error, (httpx2.ReadError, httpx2.RemoteProtocolError)):
    return TransferError(f"the connection broke ({reason}): the same command continues")
  return TransferError(
    f"no connection ({reason}): check the network and HTTPS_PROXY, or {hints.connection}"
  )


class _Again(Exception):
  """The request may succeed if it is repeated."""

  def __init__(self, reason: TransferError, seconds: float = 0.0):
    super().__init__(reason)
    self.reason, self.seconds = reason, seconds


def fetch(
  url: str,
  path: pathlib.Path,
  label: str,
  *,
  client: Any,
  hints: Hints,
  size: int | None = None,
  checksum: str = "",
  headers: Mapping[str, str] | None = None,
  timeout: float = 30.0,
  received: Callable[[int], None] | None = None,
) -> None:
  """Downloads a file, or what is still missing of it, and checks it.

  A file whose checksum is not known continues only if the server says that it is the same one still
  (its ETag, or when it was changed last); else it is fetched anew.

  Args:
    url: where it is.
    path: of the new file; what an interrupted transfer leaves is beside it, with suffix `.part`.
    label: for the progress bar and for messages.
    client: an `httpx2.Client` that follows redirects.
    hints: for messages.
    size: bytes, if known.
    checksum: 64 hex digits of SHA-256, 40 of git's blobs or 32 of MD5; others are not compared.
    headers: of the request.
    timeout: seconds without an answer or a byte.
    received: called with every number of bytes before they are written, a negative one where they
      were lost, in place of a progress bar of this file; what it raises ends the transfer.

  Raises:
    TransferError: no connection, a refusal, another content than announced.
    InputError: the disk is full.
  """
  import httpx2

  if path.exists() and checksum and checksum_like(path, checksum) == checksum:
    return  # whole, and not used yet
  part = part_of(path, checksum)
  for stale in path.parent.glob(f"{glob.escape(path.name)}.*.part*"):
    if stale not in (part, _stamp_of(part)):
      stale.unlink(missing_ok=True)
  part.touch()
  request = _Request(
    url, part, label, client, hints, size, _known(checksum), headers or {}, timeout, received
  )
  failures = 0
  while size is None or _size(part) < size:
    before = _size(part)
    wait = 0.0
    try:
      request.send()
      if size is None or _size(part) >= size:
        break
      broken = TransferError(f"the connection ended after {_size(part):,} of {size:,} bytes")
    except _Again as again:
      broken, wait = again.reason, again.seconds
    except httpx2.ConnectError as error:
      broken = explain(error, hints)
      if not before:  # there is no network, or no such host
        raise broken from None
    except httpx2.TransportError as error:
      broken = explain(error, hints)
    except httpx2.HTTPError as error:
      raise explain(error, hints) from None
    failures = 0 if _size(part) > before else failures + 1
    if failures > len(WAITS):
      raise broken
    time.sleep(max(wait, WAITS[max(failures - 1, 0)]))
  _check(part, size, checksum)
  os.replace(part, path)
  _stamp_of(part).unlink(missing_ok=True)


def part_of(path: pathlib.Path, checksum: str) -> pathlib.Path:
  """Where an interrupted transfer leaves what it has of a file."""
  return path.with_name(f"{path.name}.{checksum[:12] or 'unknown'}.part")


def _stamp_of(part: pathlib.Path) -> pathlib.Path:
  """Beside a part: what the server calls the version that it is of."""
  return part.with_name(f"{part.name}.stamp")


@dataclasses.dataclass(frozen=True)
class _Request:
  """See `fetch`; `is_known` says whether a checksum tells in the end that parts belong together."""

  url: str
  part: pathlib.Path
  label: str
  client: Any
  hints: Hints
  size: int | None
  is_known: bool
  headers: Mapping[str, str]
  timeout: float
  received: Callable[[int], None] | None

  def send(self) -> None:
    """Appends to what is there if the server can begin in the middle.

    Raises:
      _Again: a server that is busy, or whose file has changed, which leaves no part.
    """
    if self.received:
      self.received(0)
    have, stamp = _size(self.part), _read(_stamp_of(self.part))
    if have and not self.is_known and not stamp:
      self._begin_anew(have)
      have = 0
    wanted = {"Range": f"bytes={have}-"} if have else {}
    if have and not self.is_known:
      wanted["If-Range"] = stamp
    # As it is: what a server compresses on the way cannot be continued.
    asked = {**self.headers, "Accept-Encoding": "identity", **wanted}
    with self.client.stream("GET", self.url, headers=asked, timeout=self.timeout) as response:
      if response.status_code == 416:
        if response.headers.get("Content-Range", "") == f"bytes */{have}":
          return  # it had come to the last byte
        self._begin_anew(have)
        raise _Again(TransferError("HTTP 416, the file has changed: run the same command again"))
      self._check_answer(response)
      have = self._continued_at(response, have, stamp)
      self._write(response, have)

  def _check_answer(self, response: Any) -> None:
    status = response.status_code
    if status >= 400:
      reason = TransferError(self.hints.refusal(response))
      after = response.headers.get("Retry-After", "")
      seconds = float(after) if after.isdigit() else 0.0
      if status in _BUSY and seconds <= LONGEST_WAIT:
        raise _Again(reason, seconds)
      raise reason
    if response.headers.get("Content-Type", "").startswith("text/html"):
      raise TransferError("a page of HTML came instead of the file: check proxy and login page")

  def _is_coded(self, response: Any) -> bool:
    """Whether a server compressed the file, though it was asked for it as it is."""
    coding = response.headers.get("Content-Encoding", "") or "identity"
    # To some servers a .tar.gz is an encoding of a .tar.
    return coding != "identity" and not self.url.endswith(("gz", ".zip"))

  def _continued_at(self, response: Any, have: int, stamp: str) -> int:
    """How many bytes are there already, before those that come."""
    told = response.headers.get("Content-Range", "")
    coded = self._is_coded(response)
    continued = response.status_code == 206 and told.startswith(f"bytes {have}-") and not coded
    now = _stamp(response.headers)
    total = told.rpartition("/")[2]
    changed = self.size is not None and total.isdigit() and int(total) != self.size
    if not self.is_known:
      changed = changed or (bool(stamp) and now != stamp)
    if have and changed:
      print(f"{self.label} has changed on the server: it is fetched anew", flush=True)
    if have and (changed or not continued):
      self._begin_anew(have)
      if response.status_code == 206:
        raise _Again(TransferError("the file has changed while it was fetched: try again later"))
      have = 0
    if not have and not self.is_known and not coded:
      _stamp_of(self.part).write_text(now, encoding="utf-8")
    return have

  def _begin_anew(self, have: int) -> None:
    _stamp_of(self.part).unlink(missing_ok=True)
    self.part.write_bytes(b"")
    if self.received and have:
      self.received(-have)

  def _write(self, response: Any, have: int) -> None:
    length = response.headers.get("Content-Length")
    total = self.size if self.size is not None else have + int(length or 0)
    check_space(self.part.parent, total - have, self.hints)
    bar = None if self.received or total <= MB else progress(total // MB, self.label, "MB",
                                                             have // MB)  # fmt: skip
    shown = bar or contextlib.nullcontext()
    with writing(self.part, "ab" if have else "wb", self.hints) as file, shown:
      chunks = response.iter_bytes() if self._is_coded(response) else response.iter_raw()
      for chunk in chunks:  # as they come, so that none is lost
        if self.received:
          self.received(len(chunk))
        file.write(chunk)
        if bar:
          bar.update((have + len(chunk)) // MB - have // MB)
        have += len(chunk)


def _stamp(headers: Mapping[str, str]) -> str:
  """What `If-Range` takes; "" if the server tells nothing that is sure."""
  tag = headers.get("ETag", "")
  return tag if tag and not tag.startswith("W/") else headers.get("Last-Modified", "")


def _read(path: pathlib.Path) -> str:
  try:
    return path.read_text(encoding="utf-8")
  except (OSError, UnicodeDecodeError):
    return ""


@contextlib.contextmanager
def writing(path: pathlib.Path, mode: str, hints: Hints) -> Iterator[Any]:
  """An open file.

  Raises:
    InputError: the disk is full or fails.
  """
  try:
    with open(path, mode) as file:
      yield file
  except OSError as error:
    if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO):
      raise
    raise InputError(
      f"cannot write {path} ({error.strerror}): free some disk space, or {hints.disk}; the same "
      "command continues"
    ) from None


def check_space(folder: pathlib.Path, needed: int, hints: Hints) -> None:
  """
  Raises:
    InputError: the disk has less than the needed bytes.
  """
  free = shutil.disk_usage(folder).free
  if needed > free:
    raise InputError(
      f"expected {needed / MB:,.0f} MB of free disk space in {folder}, got {free / MB:,.0f} MB: "
      f"free some, or {hints.disk}; the same command continues"
    )


def _check(part: pathlib.Path, size: int | None, checksum: str) -> None:
  """
  Raises:
    TransferError: another size or checksum; the file is then deleted.
  """
  found = _size(part)
  if size is not None and found != size:
    part.unlink()
    raise TransferError(f"expected {size:,} bytes, got {found:,}: run the same command again")
  digest = checksum_like(part, checksum)
  if digest != checksum.lower() and digest:
    part.unlink()
    raise TransferError(
      f"expected the checksum {checksum}, got {digest}: the file was damaged on its way; run the "
      "same command again"
    )


def _known(checksum: str) -> bool:
  return len(checksum) in (32, 40, 64)


def checksum_like(file: pathlib.Path | bytes, checksum: str) -> str:
  """The checksum of a file or of its content, of the kind of another one; "" for unknown kinds."""
  if len(checksum) == 64:
    return hashlib.sha256(file).hexdigest() if isinstance(file, bytes) else sha256(file)
  if len(checksum) == 40:  # a small file, kept by git itself
    content = file if isinstance(file, bytes) else file.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
  if len(checksum) == 32:
    if isinstance(file, bytes):
      return hashlib.md5(file).hexdigest()
    with open(file, "rb") as opened:  # archives of gigabytes
      return hashlib.file_digest(opened, "md5").hexdigest()
  return ""


def sha256(path: pathlib.Path) -> str:
  """Checksum of a file, 64 hex digits."""
  with open(path, "rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def _size(path: pathlib.Path) -> int:
  return path.stat().st_size if path.exists() else 0
