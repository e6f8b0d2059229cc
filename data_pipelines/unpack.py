"""Archives of strangers: files of a pattern are taken out, and nothing else that an archive says.

No path leads out of the folder, no link and no device is made, no more is written than declared. A
file has its name once it is whole, so that unpacking that was interrupted continues.
"""

import fnmatch
import functools
import gzip
import io
import lzma
import os
import pathlib
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import IO, NamedTuple

from rpn_jax.base.console import progress
from rpn_jax.base.errors import InputError
from rpn_jax.base.transfer import MB, Hints, writing

# Times the declared size, which is an estimate: that of an unpacked set is published nowhere.
SLACK = 4
# No header of an honest archive is longer; it is read at once, whatever length it claims.
_MAX_READ = 16 << 20
_MAX_ENTRIES = 1_000_000
_CHUNK = 1 << 20
_TEMPORARY = ".unpacking.tmp"
# What damage surfaces as.
_DAMAGED = (
  tarfile.TarError, zipfile.BadZipFile, gzip.BadGzipFile, zlib.error, lzma.LZMAError, struct.error,
  EOFError, ArithmeticError, ValueError, RuntimeError,
)  # fmt: skip


class _TooMuch(Exception):
  """More bytes than declared."""


class _Entry(NamedTuple):
  """What an archive says of something in it that is no folder."""

  name: str
  size: int
  is_file: bool
  open: Callable[[], IO[bytes] | None]


def unpack(
  archive: pathlib.Path,
  folder: pathlib.Path,
  holds: Sequence[str],
  *,
  into: str = "",
  declared: int = 0,
  hints: Hints,
) -> None:
  """Takes files out of a tar (with or without gzip) or zip archive.

  Files that are there with the size that the archive says are left as they are.

  Args:
    archive: the file.
    folder: where the patterns count from.
    holds: patterns of the files to take, such as "images/train2017/*.jpg". Each must occur.
    into: what comes before the names in the archive, such as "images/".
    declared: bytes that the files should take.
    hints: for messages about the disk.

  Raises:
    InputError: a damaged archive, one that holds other files, names that lead elsewhere, links or
      devices, far more bytes than declared, a full disk.
  """
  limit = SLACK * max(declared, archive.stat().st_size, MB)
  remedy = f"delete {archive} and run the same command again"
  missing = dict.fromkeys(holds)
  touched: set[pathlib.Path] = set()
  left = limit
  try:
    for entry in progress(_entries(archive, limit), f"unpack {archive.name}", "file"):
      target = into + _safe_name(archive, entry.name)
      pattern = next((p for p in holds if fnmatch.fnmatchcase(target, p)), None)
      # macOS leaves files beside files, "._a.jpg".
      if pattern is None or target.rpartition("/")[2].startswith("."):
        continue
      if not entry.is_file:
        raise InputError(
          f"{archive}: expected a file as {entry.name}, got a link or device; refused"
        )
      missing.pop(pattern, None)
      left -= entry.size
      if left < 0:
        raise _TooMuch
      path = folder / target
      if path.parent not in touched:
        path.parent.mkdir(parents=True, exist_ok=True)
        touched.add(path.parent)
      if not path.is_file() or path.stat().st_size != entry.size:
        _write(entry, path, hints)
  except InputError:
    raise
  except _TooMuch:
    raise InputError(
      f"{archive}: expected at most {limit / MB:,.0f} MB in it, got more, as of an archive that is "
      f"made to fill disks; {remedy}"
    ) from None
  except _DAMAGED as error:
    reason = " ".join(str(error).split()) or type(error).__name__
    raise InputError(f"{archive}: expected an intact archive, got {reason}; {remedy}") from None
  finally:
    for parent in touched:  # also what a process left that was killed
      (parent / _TEMPORARY).unlink(missing_ok=True)
  if missing:
    raise InputError(
      f"{archive}: expected files {', '.join(missing)} in it, got none; if the publisher packs "
      "them in another way now, unpack it by hand and run the command without --download"
    )


def _safe_name(archive: pathlib.Path, name: str) -> str:
  """The name below a folder.

  Raises:
    InputError: it leads elsewhere. No data set has such names, so the whole archive is refused.
  """
  parts = [part for part in name.split("/") if part not in ("", ".")]
  if name.startswith("/") or ".." in parts or "\\" in name or "\0" in name or name[1:2] == ":":
    raise InputError(f"{archive}: expected names below a folder, got {name[:80]!r}; refused")
  return "/".join(parts)


def _write(entry: _Entry, path: pathlib.Path, hints: Hints) -> None:
  temporary = path.parent / _TEMPORARY
  source = entry.open()
  if source is None:
    raise EOFError(f"no bytes of {entry.name}")
  copied = 0
  with source, writing(temporary, "wb", hints) as out:
    while chunk := source.read(_CHUNK):
      copied += len(chunk)
      if copied > entry.size:
        raise _TooMuch
      out.write(chunk)
  if copied < entry.size:
    raise EOFError(f"{copied:,} of {entry.size:,} bytes of {entry.name}")
  os.replace(temporary, path)


def _entries(archive: pathlib.Path, limit: int) -> Iterator[_Entry]:
  """The entries in the order of the archive, each to be read before the next one is asked for."""
  with open(archive, "rb") as file:
    begin = file.read(2)
    file.seek(0)
    entries = _of_zip(file) if begin == b"PK" else _of_tar(file, begin == b"\x1f\x8b", limit)
    for count, entry in enumerate(entries):
      if count >= _MAX_ENTRIES:
        raise _TooMuch
      yield entry


def _of_zip(file: IO[bytes]) -> Iterator[_Entry]:
  with zipfile.ZipFile(file) as opened:
    for info in opened.infolist():
      kind = stat.S_IFMT(info.external_attr >> 16)
      if not info.is_dir():
        is_file = kind in (0, stat.S_IFREG)  # 0 of archives that were packed elsewhere than on Unix
        yield _Entry(info.filename, info.file_size, is_file, functools.partial(opened.open, info))


def _of_tar(file: IO[bytes], is_gzip: bool, limit: int) -> Iterator[_Entry]:
  stream = _Bounded(gzip.GzipFile(fileobj=file) if is_gzip else file, limit)
  with tarfile.open(fileobj=stream, mode="r:") as opened:
    for member in opened:
      if not member.isdir():
        read = functools.partial(opened.extractfile, member)
        yield _Entry(member.name, member.size, member.isreg(), read)


class _Bounded(io.RawIOBase):
  """A stream of which no more is read than a limit, and no header that would fill the memory."""

  def __init__(self, stream: IO[bytes], limit: int):
    super().__init__()
    self._stream, self._limit = stream, limit

  def read(self, size: int = -1) -> bytes:
    if not 0 <= size <= _MAX_READ or self._stream.tell() > self._limit:
      raise _TooMuch
    return self._stream.read(size)

  def seek(self, position: int, whence: int = io.SEEK_SET) -> int:
    if whence != io.SEEK_SET or position > self._limit:
      raise _TooMuch
    return self._stream.seek(position)

  def tell(self) -> int:
    return self._stream.tell()

  def seekable(self) -> bool:
    return True

  def readable(self) -> bool:
    return True
