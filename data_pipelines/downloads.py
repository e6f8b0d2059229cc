"""The raw files of published data sets by name: fetched, checked and unpacked; see `addresses`."""

import collections
import errno
import json
import os
import pathlib
import re
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence

from data_pipelines import addresses, unpack
from data_pipelines.addresses import File
from rpn_jax.base import paths, transfer
from rpn_jax.base.console import progress
from rpn_jax.base.errors import InputError
from rpn_jax.base.transfer import MB, TransferError

# Below the folder of the raw files.
ARCHIVES, RECORD = "archives", "record.json"
# Files at a time.
THREADS = 4
# Seconds without a byte.
TIMEOUT = 30.0
_HINTS = transfer.Hints("name a mirror with --mirror=URL", "give a --manual_dir on another disk")


def files(name: str) -> tuple[File, ...]:
  """The files that a data set is prepared from; () for a set that needs none, or has its own.

  Args:
    name: as `prepare` has it.
  """
  return addresses.TABLE.get(name, ())


def option(name: str) -> str:
  """What `prepare NAME` needs besides, for messages: where its raw files come from."""
  found = files(name)
  return "--download" if found and all(file.urls for file in found) else "--manual_dir=RAW_FILES"


def missing(name: str, folder: str | os.PathLike) -> list[File]:
  """Those of `files` whose content is not in a folder of raw files, or not wholly."""
  root = paths.expand_local(folder, "--manual_dir")
  record = _Record(root)
  return [file for file in files(name) if not _is_there(file, root, record)]


def check(name: str, mirror: str = "") -> None:
  """
  Raises:
    InputError: a set that has no files to fetch; a mirror that is no address.
  """
  if name not in addresses.TABLE:
    raise InputError(
      f"--download fetches {', '.join(addresses.TABLE)}, not {name!r}: correct the name, or leave "
      "--download out"
    )
  if mirror and not re.match(r"https?://[^/]", mirror):
    raise InputError(f"--mirror: expected the address of a folder, https://…, got {mirror!r}")


def fetch(
  name: str, folder: str | os.PathLike, *, mirror: str = "", remove_archives: bool = False
) -> pathlib.Path:
  """Fetches and unpacks what is missing of a data set's raw files; the same call continues.

  An archive that a person has put into the folder's `archives` is checked and used.

  Args:
    name: as `prepare` has it.
    folder: of the raw files, for `prepare`'s manual_dir; made if missing.
    mirror: address of a folder that has the files by their names, in place of the publishers'.
    remove_archives: delete each archive once it is unpacked.

  Returns:
    The folder.

  Raises:
    InputError: a set without files to fetch, files that need an account, no connection, a refusal,
      a damaged file, a full disk.
  """
  check(name, mirror)
  root = paths.expand_local(folder, "--manual_dir")
  archives = root / ARCHIVES
  archives.mkdir(parents=True, exist_ok=True)
  with paths.locked(archives / ".lock", f"{archives}", wait=True):
    record = _Record(root)
    wanted = [file for file in files(name) if not _is_there(file, root, record)]
    if wanted:
      _check_accounts(name, wanted, archives, mirror)
      transfer.check_space(root, _needed(wanted, root, record, remove_archives), _HINTS)
      _get_all(wanted, archives, record, mirror)
    for file in files(name):
      if file in wanted:
        _put_in_place(file, root, record)
      if remove_archives:
        (archives / file.name).unlink(missing_ok=True)
  print(
    f"the raw files of {name} are in {root}" + ("" if wanted else ": nothing to fetch"), flush=True
  )
  return root


class _Record:
  """What is known of the files of a folder, by their names, in a file beside the archives.

  "url" and "sha256" are of the first download; "unpacked" is False from its beginning to its end.
  """

  def __init__(self, root: pathlib.Path):
    self.path = root / ARCHIVES / RECORD
    self._lock = threading.Lock()
    try:
      content = json.loads(self.path.read_text(encoding="utf-8"))
      self._known = {str(name): dict(facts) for name, facts in content.items()}
    except (OSError, ValueError, TypeError, AttributeError):
      self._known = {}

  def get(self, file: File, fact: str) -> object:
    """A fact, or None."""
    return self._known.get(file.name, {}).get(fact)

  def set(self, file: File, **facts: object) -> None:
    """Writes facts to the disk."""
    with self._lock:
      self._known.setdefault(file.name, {}).update(facts)
      paths.write_json(self.path, self._known)


# What is there, and what is needed


def _is_there(file: File, root: pathlib.Path, record: _Record) -> bool:
  """Whether every pattern has a file; also where a person unpacked it."""
  if record.get(file, "unpacked") is False:  # begun, and not finished
    return False
  return all(next(_matches(pattern, root), None) for pattern in file.holds)


def _matches(pattern: str, root: pathlib.Path) -> Iterator[pathlib.Path]:
  """As in `unpack`: `*` stands for folders, too."""
  above, _, name = pattern.rpartition("/")
  return (root / above).rglob(name)


def _check_accounts(name: str, wanted: Sequence[File], archives: pathlib.Path, mirror: str) -> None:
  """
  Raises:
    InputError: files that a program may not fetch are not there either.
  """
  barred = [file for file in wanted if not (file.urls or mirror or (archives / file.name).exists())]
  if barred:
    listed = " and ".join(f"{file.name} ({file.size / 1e9:.1f} GB)" for file in barred)
    raise InputError(
      f"{name} needs an account: register on {barred[0].page}, get {listed} there, put what came "
      f"into {archives} and run the same command again"
    )


def _needed(
  wanted: Sequence[File], root: pathlib.Path, record: _Record, remove_archives: bool
) -> int:
  """Bytes that the disk must have when it is fullest."""
  archives = root / ARCHIVES
  taken = sum(file.size - _come(file, archives) for file in wanted)
  most = taken
  for file in wanted:
    done = 0
    if record.get(file, "unpacked") is False:
      done = sum(path.stat().st_size for p in file.holds for path in _matches(p, root))
    taken += max(0, file.unpacked - done)
    most = max(most, taken)
    if remove_archives:
      taken -= file.size
  return most


def _come(file: File, archives: pathlib.Path) -> int:
  """Bytes of a file that are here."""
  path = archives / file.name
  for place in (path, transfer.part_of(path, file.checksum)):
    if place.exists():
      return min(file.size, place.stat().st_size)
  return 0


# Transfers


class _Stopped(Exception):
  """Another transfer failed, or the person stopped the command."""


def _get_all(wanted: Sequence[File], archives: pathlib.Path, record: _Record, mirror: str) -> None:
  """Has every file whole in `archives`, several at a time."""
  import httpx2

  stop, lock = threading.Event(), threading.Lock()
  total = sum(file.size for file in wanted)
  here = sum(_come(file, archives) for file in wanted)
  print(
    f"fetching {', '.join(file.name for file in wanted)} to {archives}: {total / 1e9:.1f} GB"
    + (f", of which {here / 1e9:.1f} GB are here" if here else ""),
    flush=True,
  )
  bar = progress(total // MB, "fetch", "MB", here // MB)
  come = here

  def received(count: int) -> None:
    nonlocal come
    if stop.is_set():
      raise _Stopped
    with lock:
      before, come = come, come + count
      bar.update(come // MB - before // MB)

  with bar, httpx2.Client(follow_redirects=True, timeout=TIMEOUT) as client:

    def get(file: File) -> None:
      _get(file, archives, record, mirror, client, received)

    _in_threads(get, wanted, stop)


def _in_threads(
  function: Callable[[File], None], items: Sequence[File], stop: threading.Event
) -> None:
  """Calls a function with each item; the first error, or Ctrl-C, ends them all.

  Not by an executor: Python waits for its threads, and a server that is silent would make Ctrl-C
  wait as well.
  """
  queue, errors = collections.deque(items), []

  def work() -> None:
    while not stop.is_set():
      try:
        item = queue.popleft()
      except IndexError:
        return
      try:
        function(item)
      except _Stopped:
        return
      except Exception as error:
        errors.append(error)
        stop.set()

  threads = [threading.Thread(target=work, daemon=True) for _ in items[:THREADS]]
  for thread in threads:
    thread.start()
  try:
    for thread in threads:
      while thread.is_alive() and not stop.is_set():
        thread.join(0.05)
  finally:
    stop.set()
    for thread in threads:  # between two chunks
      thread.join(1.0)
  if errors:
    raise errors[0]


def _get(
  file: File,
  archives: pathlib.Path,
  record: _Record,
  mirror: str,
  client: object,
  received: Callable[[int], None],
) -> None:
  path = archives / file.name
  if not path.exists():
    urls = (f"{mirror.rstrip('/')}/{file.name}",) if mirror else file.urls
    reasons = []
    for url in urls:
      try:
        transfer.fetch(
          url, path, file.name, client=client, hints=_HINTS, size=file.bytes,
          checksum=file.checksum, timeout=TIMEOUT, received=received,
        )  # fmt: skip
        record.set(file, url=url)
        break
      except TransferError as error:
        reasons.append(f"{url}: {error}")
    else:
      raise InputError(
        f"{file.name} could not be fetched: {'; '.join(reasons)}. By hand: get it from "
        f"{file.page}, put it into {archives} and run the same command again"
      )
  elif file.checksum and transfer.checksum_like(path, file.checksum) != file.checksum:
    raise InputError(
      f"{path}: expected the checksum {file.checksum}, got another: it is damaged, or another "
      "file; delete it and run the same command again"
    )
  if not file.checksum:
    _compare_with_first(file, path, record)


def _compare_with_first(file: File, path: pathlib.Path, record: _Record) -> None:
  """No checksum is published: that of the first download is the one that others are compared with.

  Raises:
    InputError: it is another one; the file is then left for the person to look at.
  """
  digest, first = transfer.sha256(path), record.get(file, "sha256")
  if first is None:
    record.set(file, sha256=digest)
    print(f"{file.name}: no checksum is published; noted in {record.path}: {digest}", flush=True)
  elif first != digest:
    raise InputError(
      f"{path}: expected the checksum of the first download, {first}, got {digest}: it is damaged, "
      f"or the publisher has replaced it; delete it to fetch it again, or {record.path} to take it"
    )


# In its place


def _put_in_place(file: File, root: pathlib.Path, record: _Record) -> None:
  """Takes out of an archive what is needed; another file is moved."""
  source = root / ARCHIVES / file.name
  if file.is_archive:
    record.set(file, unpacked=False)
    unpack.unpack(
      source, root, file.holds, into=file.into, declared=file.unpacked, hints=_HINTS
    )  # fmt: skip
    record.set(file, unpacked=True)
    return
  target = root / file.holds[0]
  target.parent.mkdir(parents=True, exist_ok=True)
  try:
    os.replace(source, target)
  except OSError as error:
    if error.errno != errno.EXDEV:  # the folder may be a link to another disk
      raise
    with paths.replacing(target) as temporary:
      shutil.copyfile(source, temporary)
    source.unlink()
  record.set(file, unpacked=True)
