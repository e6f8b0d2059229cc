"""Prepared records are read from a local disk: copies of those in a bucket or on a slow disk.

array_record reads no bucket, and a folder that gcsfuse or NFS shows like a disk is read at random
places there, one request each. A copy is made once per host and continued after an interruption.
"""

import concurrent.futures
import contextlib
import hashlib
import json
import os
import pathlib
import shlex
import shutil
import time
from collections.abc import Iterator

from data_pipelines import downloads, records, registry
from rpn_jax.base import buckets, paths
from rpn_jax.base.console import progress
from rpn_jax.base.errors import InputError

# Files at a time.
THREADS = 8
# What makes a folder a prepared set; the last file to arrive in a bucket.
LAST = "dataset_info.json"


def localized(c, data_set: registry.DataSet):
  """`config.data` with a local folder as data_dir, which has the records of a set if there are any.

  Args:
    c: `config.data`. It is returned as it is if data_dir is local and local_copy is not set.
    data_set: the set to copy.

  Raises:
    InputError: the set is not prepared, does not fit on the disk, or DIR has a copy of another one.
  """
  wanted = c.local_copy
  if not wanted and not buckets.is_bucket(c.data_dir):
    return c
  root = local_root(c.data_dir, wanted)
  if data_set.builder is None:
    below = data_set.prepared
  else:
    cls = registry.builder_class(data_set.prepared)
    variant = records.config_name(cls, data_set.variant(c), c.data_dir)
    folder = records.folder_of(cls, ".", variant)
    below = folder.as_posix()
  copy(paths.expand(c.data_dir) / below, root, below, data_set)
  local = c.copy_and_resolve_references().unlock()
  local.data_dir = str(root)
  return local.lock()


def local_root(data_dir: str | os.PathLike, wanted: str = "") -> pathlib.Path:
  """The folder that stands for `data_dir` on this host: `wanted`, or one in the cache folder.

  Raises:
    InputError: there is no cache folder, or `wanted` is no local path.
  """
  if wanted:
    return paths.expand_local(wanted, "config.data.local_copy")
  cache = paths.cache_dir()
  if cache is None:
    raise InputError(f"expected config.data.local_copy=DIR, where records of {data_dir} are copied")
  name = hashlib.sha256(str(paths.expand(data_dir)).encode()).hexdigest()[:12]
  return cache / "records" / name


def copy(source: pathlib.Path, root: pathlib.Path, below: str, data_set: registry.DataSet) -> None:
  """Copies what is missing of `source` to `root/below`; several processes of a host wait for one.

  Nothing is copied of a set that is drawn when it is first used and was not drawn there.

  Raises:
    InputError: see `localized`.
  """
  with _copying(root, below, source) as done:
    found = {name: stamp for name, *stamp in _files(source)}
    if not any(name.rpartition("/")[2] == LAST for name in found):
      if data_set.builder is None:
        return
      got = (
        "files without a dataset_info.json, as of an upload that was cut off" if found else "none"
      )
      raise InputError(
        f"expected {data_set.prepared} prepared in {source}, got {got}; run: python -m "
        f"data_pipelines.prepare {data_set.prepared} {downloads.option(data_set.prepared)} "
        f"--data_dir={shlex.quote(str(source).removesuffix(below).rstrip('/'))}"
      )
    target = root / below
    missing = [
      name for name, stamp in found.items()
      if done.get(name) != stamp or not (target / name).is_file()
    ]  # fmt: skip
    if not missing:
      return
    size = sum(found[name][0] for name in missing)
    free = shutil.disk_usage(root).free
    if size > free:
      raise InputError(
        f"{root}: expected {size / 1e9:.1f} GB for a copy of {source}, got {free / 1e9:.1f} GB; "
        "free some disk space, or set config.data.local_copy to a larger disk"
      )
    print(f"copying {len(missing)} files, {size / 1e9:.2f} GB, of {source} to {target}", flush=True)

    def fetch(name: str) -> str:
      (target / name).parent.mkdir(parents=True, exist_ok=True)
      with paths.replacing(target / name) as temporary:
        if buckets.is_bucket(source):
          buckets.download(source / name, temporary)
        else:
          shutil.copyfile(source / name, temporary)
      return name

    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
      for name in progress(_Mapped(pool.map(fetch, missing), len(missing)), "copy", "file"):
        done[name] = found[name]


def upload(folder: pathlib.Path, root: pathlib.Path, below: str, target: pathlib.Path) -> None:
  """Copies a prepared folder to a bucket, its `dataset_info.json` last; continues if repeated.

  Raises:
    OSError: the storage cannot be reached, or refuses.
  """
  import google_crc32c

  there = {
    os.fspath(path).removeprefix(f"{target}/"): found.crc32c for path, found in buckets.walk(target)
  }

  def send(name: str) -> None:
    checksum = google_crc32c.Checksum()
    with open(folder / name, "rb") as file:
      while chunk := file.read(buckets.CHUNK_BYTES):
        checksum.update(chunk)
    if there.get(name) != buckets.encode_crc32c(checksum.digest()):
      buckets.upload(folder / name, target / name)

  names = [name for name, *_ in _files(folder) if name != LAST]
  with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
    for _ in progress(_Mapped(pool.map(send, names), len(names)), "upload", "file"):
      pass
  send(LAST)
  with _copying(root, below, target) as done:  # this host need not copy them back
    done.update({name: stamp for name, *stamp in _files(target)})


class _Mapped:
  """The results of a pool as something with a length."""

  def __init__(self, results: Iterator, count: int):
    self._results, self._count = results, count

  def __iter__(self) -> Iterator:
    return self._results

  def __len__(self) -> int:
    return self._count


def _files(folder: pathlib.Path) -> Iterator[tuple[str, int, str]]:
  """Name below the folder, size, and what changes with the content, of every file."""
  if buckets.is_bucket(folder):
    for path, found in buckets.walk(folder):
      yield os.fspath(path).removeprefix(f"{folder}/"), found.size, found.generation
    return
  for path in sorted(folder.rglob("*")) if folder.is_dir() else ():
    if path.is_file():
      stat = path.stat()
      yield path.relative_to(folder).as_posix(), stat.st_size, str(stat.st_mtime_ns)


@contextlib.contextmanager
def _copying(root: pathlib.Path, below: str, source: pathlib.Path) -> Iterator[dict[str, list]]:
  """Name -> [size, stamp] of what was copied, locked during the block and kept after it.

  Raises:
    InputError: the copy there is of another source.
  """
  folder = root / ".copies"
  folder.mkdir(parents=True, exist_ok=True)
  kept = folder / f"{below.replace('/', '-')}.json"
  with paths.locked(kept.with_suffix(".lock"), f"the copy of {source} in {root}", wait=True):
    try:
      stored = json.loads(kept.read_text(encoding="utf-8"))
      origin, done = str(stored["source"]), dict(stored["files"])
    except (OSError, ValueError, KeyError, TypeError):
      origin, done = str(source), {}
    if origin != str(source):
      raise InputError(
        f"{root / below}: expected a copy of {source}, got one of {origin}; give another "
        "config.data.local_copy, or delete it and " + str(kept)
      )
    before = dict(done)
    try:
      yield done
    finally:
      if done != before:
        paths.write_json(kept, {"source": str(source), "files": done, "time": time.time()})
