"""One file over HTTP: it resumes where it stopped, and has its name only once it is whole.

The session, headers, cache folder and variables (HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE, proxies)
are those of huggingface_hub. Its own download is not used: it starts over in every process, and
compares no checksum. Nor is hf_xet, the other protocol of the hub: what is stored there is served
by HTTP as well, with ranges, and nothing but HTTP could be tried where this was written.
"""

import contextlib
import errno
import hashlib
import os
import pathlib
import shutil
import time
from collections.abc import Iterator, Mapping
from typing import Any

from rpn_jax.base.console import progress
from rpn_jax.base.errors import InputError
from rpn_jax.weights.arrays import sha256

MB = 1_000_000
# Seconds before another try, while the connection breaks without a new byte.
WAITS = (1.0, 2.0, 4.0)


class TransferError(InputError):
  """Why an address gave nothing that can be used: a phrase for the message of the caller."""


def explain(error: Exception) -> TransferError:
  """The reason, in words, why a request failed."""
  import httpx2
  from huggingface_hub import errors

  if isinstance(error, TransferError):
    return error
  if isinstance(error, errors.OfflineModeIsEnabled):
    return TransferError("HF_HUB_OFFLINE is set, so nothing is fetched: unset it")
  if isinstance(error, errors.HfHubHTTPError):
    return TransferError(_of_status(error.response))
  if isinstance(error, httpx2.TimeoutException):
    return TransferError("no answer in time: check the network, or try again later")
  reason = " ".join(str(error).split()) or type(error).__name__
  if isinstance(error, (httpx2.ReadError, httpx2.RemoteProtocolError)):
    return TransferError(f"the connection broke ({reason}): the same command continues")
  if isinstance(error, httpx2.HTTPError):
    return TransferError(
      f"no connection ({reason}): check the network and HTTPS_PROXY, or set HF_ENDPOINT to a mirror"
    )
  # The answer of a portal, a firewall or a mirror of another kind, mostly a page of HTML.
  return TransferError(
    "the answer is not the hub's but some page: check proxy, login page and HF_ENDPOINT"
  )


@contextlib.contextmanager
def explained() -> Iterator[None]:
  """Turns the errors of requests into TransferError."""
  import httpx2
  from huggingface_hub import errors

  try:
    yield
  except InputError:
    raise
  except (
    httpx2.HTTPError, errors.OfflineModeIsEnabled, errors.HfHubHTTPError, errors.FileMetadataError,
    ValueError, TypeError, KeyError,
  ) as error:  # fmt: skip
    raise explain(error) from None


def _of_status(response: Any) -> str:
  status, code = response.status_code, response.headers.get("X-Error-Code", "")
  if code == "GatedRepo":
    return f"HTTP {status}: accept the terms on the page first, then set HF_TOKEN to your token"
  if status == 401:
    return "HTTP 401: no such repository, or a private one: check the name, or set HF_TOKEN"
  if status == 403:
    return "HTTP 403, access refused: check HF_TOKEN, and that no firewall is in between"
  if status == 404:
    missing = {"RevisionNotFound": "revision", "EntryNotFound": "file"}.get(code, "page")
    return f"HTTP 404, no such {missing}: check the name"
  if status == 429:
    after = response.headers.get("Retry-After", "")
    return f"HTTP 429, too many requests: try again in {after + ' s' if after else 'some minutes'}"
  return f"HTTP {status}: try again later"


def fetch(
  url: str,
  path: pathlib.Path,
  label: str,
  *,
  size: int | None = None,
  checksum: str = "",
  headers: Mapping[str, str] | None = None,
) -> None:
  """Downloads a file, or what is still missing of it, and checks it.

  Args:
    url: where it is.
    path: of the new file; what an interrupted transfer leaves is beside it, with suffix `.part`.
    label: for the progress bar.
    size: bytes, if known.
    checksum: 64 hex digits of SHA-256, or 40 of git's blobs; anything else is not compared.
    headers: of the request.

  Raises:
    TransferError: no connection, a refusal, another content than announced.
    InputError: the disk is full.
  """
  import httpx2

  if path.exists() and checksum and checksum_like(path, checksum) == checksum:
    return  # whole, and not converted yet
  part = path.with_name(f"{path.name}.{checksum[:12] or 'unknown'}.part")
  for stale in path.parent.glob(f"{path.name}.*.part"):
    if stale != part:
      stale.unlink(missing_ok=True)
  part.touch()
  failures = 0
  while size is None or _size(part) < size:
    before = _size(part)
    with explained():
      try:
        _receive(url, part, size, label, headers or {})
        if size is None or _size(part) >= size:
          break
        broken = TransferError(f"the connection ended after {_size(part):,} of {size:,} bytes")
      except httpx2.ConnectError as error:
        if not before:  # there is no network, or no such host
          raise
        broken = explain(error)
      except httpx2.TransportError as error:
        broken = explain(error)
    failures = 0 if _size(part) > before else failures + 1
    if failures > len(WAITS):
      raise broken
    time.sleep(WAITS[max(failures - 1, 0)])
  _check(part, size, checksum)
  os.replace(part, path)


def _receive(
  url: str, part: pathlib.Path, size: int | None, label: str, headers: Mapping[str, str]
) -> None:
  """One request: appends to what is there if the server can begin in the middle."""
  from huggingface_hub import constants, get_session
  from huggingface_hub.utils import hf_raise_for_status

  have = _size(part)
  wanted = {"Range": f"bytes={have}-"} if have else {}
  with get_session().stream(
    "GET", url, headers={**headers, "Accept-Encoding": "identity", **wanted},
    timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
  ) as response:  # fmt: skip
    if response.status_code == 416:  # what is there is no beginning of this file
      part.unlink()
      raise TransferError("HTTP 416, the file has changed: run the same command again")
    hf_raise_for_status(response)
    if response.headers.get("Content-Type", "").startswith("text/html"):
      raise TransferError("a page of HTML came instead of the file: check proxy and login page")
    continued = response.headers.get("Content-Range", "").startswith(f"bytes {have}-")
    if not (continued and response.status_code == 206):
      have = 0
    length = response.headers.get("Content-Length")
    total = size if size is not None else have + int(length or 0)
    check_space(part.parent, total - have)
    with (
      _writing(part, "ab" if have else "wb") as file,
      progress(total // MB, label, "MB", have // MB)
      if total > MB
      else contextlib.nullcontext() as bar,
    ):
      for chunk in response.iter_bytes():  # as they come, so that none is lost
        file.write(chunk)
        if bar:
          bar.update((have + len(chunk)) // MB - have // MB)
        have += len(chunk)


@contextlib.contextmanager
def _writing(path: pathlib.Path, mode: str) -> Iterator[Any]:
  try:
    with open(path, mode) as file:
      yield file
  except OSError as error:
    if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO):
      raise
    raise InputError(
      f"cannot write {path} ({error.strerror}): free some disk space, or set XDG_CACHE_HOME to "
      "another disk; the same command continues"
    ) from None


def check_space(folder: pathlib.Path, needed: int) -> None:
  """
  Raises:
    InputError: the disk has less than the needed bytes.
  """
  free = shutil.disk_usage(folder).free
  if needed > free:
    raise InputError(
      f"expected {needed / MB:,.0f} MB of free disk space in {folder}, got {free / MB:,.0f} MB: "
      "free some, or set XDG_CACHE_HOME to another disk; the same command continues"
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


def checksum_like(path: pathlib.Path, checksum: str) -> str:
  """The checksum of a file, of the kind of another one; "" if that is of no known kind."""
  if len(checksum) == 64:
    return sha256(path)
  if len(checksum) == 40:  # a small file, kept by git itself
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
  return ""


def _size(path: pathlib.Path) -> int:
  return path.stat().st_size if path.exists() else 0
