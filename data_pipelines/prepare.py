"""Turns the raw files of a data set into checked records, once: what training reads.

    python -m data_pipelines.prepare NAME --download --data_dir=data
    python -m data_pipelines.prepare NAME --manual_dir=RAW_FILES --data_dir=data
    python -m data_pipelines.prepare --list

The prepared folder appears when it is complete. Until then its shards lie beside it in
<version>.partial: whatever ends a preparation, the same command continues after the last finished
shard. Raw files of one's own that were edited since are noticed; --rebuild prepares them anew.
"""

import argparse
import collections
import concurrent.futures
import contextlib
import functools
import hashlib
import json
import os
import pathlib
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from data_pipelines import (
  downloads,
  finished,
  local_copy,
  overview,
  preview,
  raw_files,
  records,
  registry,
  shapes,
  summary,
  vocabularies,
)
from data_pipelines.bad_files import BadFiles
from data_pipelines.sources.builder import OPTIONS, RawExample, SegmentationBuilder
from rpn_jax.base import buckets, paths
from rpn_jax.base.console import progress, run_command
from rpn_jax.base.errors import InputError

SHARD_EXAMPLES = 500
_THREADS = min(8, os.cpu_count() or 1)
_PREVIEWED_EXAMPLES = 8
# Why a set does not take an option.
_OF_ITS_OWN = {
  "values": "has label values of its own",
  "background": "says itself which pixels are background",
}


def prepare(
  name: str,
  manual_dir: str | os.PathLike | None,
  data_dir: str | os.PathLike,
  *,
  config: str | None = None,
  values: Sequence[int] | None = None,
  background: str | None = None,
  allow_partial: bool = False,
  rebuild: bool = False,
  local_dir: str = "",
  download: bool = False,
  mirror: str = "",
  remove_archives: bool = False,
) -> pathlib.Path:
  """Prepares a data set, or what is left of it; a finished one is left alone.

  For a bucket it is prepared on a local disk and then copied there.

  Args:
    name: of a set that `--list` shows.
    manual_dir: the folder of the raw files; see `--list` for what belongs there.
    data_dir: the root of all prepared sets; made if missing.
    config: a TFDS config of the set; for data of one's own the name to prepare them under, by
      default the folder's.
    values: for "folder" the mask value of every name in names.txt; by default their positions.
    background: for annotations the class of pixels without one; by default they have no class.
    allow_partial: accept fewer images than the published number, or than are annotated.
    rebuild: prepare a finished set anew; it is replaced when the new one is complete.
    local_dir: for a data_dir in a bucket the folder to prepare in; by default in the cache folder.
    download: fetch what is missing of the raw files first; manual_dir is by default `downloads` in
      data_dir.
    mirror: see `downloads.fetch`.
    remove_archives: see `downloads.fetch`.

  Returns:
    The prepared folder, with the records, summary.json and preview.png.

  Raises:
    InputError: an unknown name or config, missing or bad raw files, a data_dir without space or
      permission, another process that prepares this set, a finished set of one's own whose raw
      files have changed, or raw files that cannot be fetched.
  """
  if download:
    downloads.check(name, mirror)
  elif mirror or remove_archives:
    raise InputError("--mirror and --remove_archives belong to --download: add it, or leave them")
  if buckets.is_bucket(data_dir):
    root = local_copy.local_root(data_dir, local_dir)
    folder = prepare(
      name, manual_dir, root, config=config, values=values, background=background,
      allow_partial=allow_partial, rebuild=rebuild, download=download, mirror=mirror,
      remove_archives=remove_archives,
    )  # fmt: skip
    below = folder.relative_to(root).as_posix()
    # Drawn sets are copied whole, see `local_copy.localized`.
    local_copy.upload(folder, root, below, paths.expand(data_dir) / below)
    print(f"copied to {paths.expand(data_dir) / below}")
    return folder
  if local_dir:
    raise InputError("--local_dir is for a --data_dir in a bucket: leave it out here")
  if name == "shapes":
    folder = shapes.prepare(data_dir)
    print(f"prepared in {folder}")
    return folder
  cls = registry.builder_class(name)
  given = {"values": None if values is None else tuple(values), "background": background}
  for option in OPTIONS:
    if given[option] is not None and option not in cls.options:
      raise InputError(f"{name} {_OF_ITS_OWN[option]}; leave --{option} out")
  if cls.own_classes and not config:
    config = raw_files.folder_of(cls, manual_dir).name
  config = records.config_name(cls, config)
  folder = records.folder_of(cls, data_dir, config)
  if folder.exists() and not rebuild:
    return finished.report(cls, folder, manual_dir, given)
  if download:
    manual_dir = manual_dir or paths.expand(data_dir) / "downloads"
    downloads.fetch(name, manual_dir, mirror=mirror, remove_archives=remove_archives)
  manual_dir = raw_files.folder_of(cls, manual_dir)
  lock = folder.with_name(f".{folder.name}.lock")
  with contextlib.ExitStack() as stack:
    with records.storing(folder):
      folder.parent.mkdir(parents=True, exist_ok=True)
      stack.enter_context(paths.locked(lock, str(folder)))
      paths.check_renames(folder.parent)
    if rebuild or not folder.exists():  # the process that held the lock may have finished it
      builder = raw_files.make_builder(cls, data_dir, config, given)
      splits = raw_files.list_examples(builder, manual_dir, allow_partial)
      _write(builder, splits, folder, manual_dir)
      return folder
  return finished.report(cls, folder, manual_dir, given)


# The work


def _write(
  builder: SegmentationBuilder,
  splits: dict[str, list[RawExample]],
  folder: pathlib.Path,
  manual_dir: pathlib.Path,
) -> None:
  """All shards, then the metadata; the folder gets its name last."""
  started = time.time()
  partial = folder.with_name(f"{folder.name}.partial")
  files = raw_files.describe(builder, splits, manual_dir)  # before reading: later edits are noticed
  records.claim_partial(partial, _plan(builder, splits, manual_dir, files))
  shards = records.plan_shards(builder, splits, partial, SHARD_EXAMPLES)
  unfinished = [shard for shard in shards if not shard.is_finished()]
  total = sum(len(shard.raws) for shard in shards)
  kept = total - sum(len(shard.raws) for shard in unfinished)
  bar = progress(total, f"prepare {builder.name}", "image", initial=kept)
  read, bad = functools.partial(_read, builder), BadFiles()
  with bar, concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
    for shard in unfinished:
      shard.write(bad.left_out(_in_order(pool, read, shard.raws)), bar)
  bad.check()
  tally = records.Tally.empty()
  by_split = {split: records.Tally.empty() for split in splits}
  for shard in shards:
    by_split[shard.split].update(shard.tally())
  for counted in by_split.values():
    tally.update(counted)
  _check_values(builder, tally, folder, manual_dir)
  content = {
    "name": builder.name,
    "config": _config_of(builder),
    "version": str(builder.VERSION),
    "reading_rules": finished.READING_RULES,
    "manual_dir": str(manual_dir),
    "images": {split: len(raws) for split, raws in splits.items()},
    "shards": {split: sum(shard.split == split for shard in shards) for split in splits},
    "bytes": sum(shard.path.stat().st_size for shard in shards),
    "sha256": {split: f"{counted.digest:064x}" for split, counted in by_split.items()},
    "seconds": round(time.time() - started, 1),
    "images_of_earlier_runs": kept,
    "exif": {how: tally.notes[how] for how in ("upright", "stored")},
    "images_without_a_class": tally.notes["blank"],
    "annotations_without_a_pixel": tally.notes["empty"],
    "background": builder.background,
    **summary.of_classes(tally, builder.classes),
  }
  with records.storing(partial):
    records.write_metadata(builder, shards, partial)
    records.write_json(partial / "summary.json", content)
    if builder.own_classes:
      records.write_names(builder.classes, partial)
    if not builder.counts:
      raw_files.write(files, partial)
    first = records.Records(partial, next(iter(splits)))
    picked = np.unique(np.linspace(0, len(first) - 1, _PREVIEWED_EXAMPLES).round().astype(int))
    examples = [first[i] for i in picked.tolist()]
    preview.draw(examples, builder.classes, partial / "preview.png")
    replaced = folder.with_name(f"{folder.name}.replaced")
    if folder.exists():
      shutil.rmtree(replaced, ignore_errors=True)
      os.rename(folder, replaced)
    os.rename(partial, folder)
    for leftover in (folder / "progress", replaced):
      shutil.rmtree(leftover, ignore_errors=True)
  print(summary.report(type(builder), content, folder))


def _plan(
  builder: SegmentationBuilder,
  splits: dict[str, list[RawExample]],
  manual_dir: pathlib.Path,
  files: raw_files.Files,
) -> str:
  """What finished shards must agree in to be continued, as JSON."""
  hashes = {}
  for split, raws in splits.items():
    listed = os.fsencode("".join(f"{raw.id}\0{raw.image}\0{raw.label}\n" for raw in raws))
    # Published files are not edited; one that was damaged and is there again, 20,000 others need
    # not be read again for.
    stamps = b"" if builder.counts else json.dumps(files[split]).encode()
    hashes[split] = hashlib.sha256(listed + stamps).hexdigest()
  plan = {
    "manual_dir": str(manual_dir),
    "config": _config_of(builder),
    "shard_examples": SHARD_EXAMPLES,
    "reading_rules": finished.READING_RULES,
    "class_files": files[raw_files.CLASSES],
    "names": list(builder.classes.names) if builder.own_classes else None,
    "values": list(builder.classes.ids) if builder.own_classes else None,
    "background": builder.background,
    "examples": hashes,
  }
  return json.dumps(plan, indent=1)


def _config_of(builder: SegmentationBuilder) -> str | None:
  return builder.builder_config.name if builder.builder_config else None


def _read(
  builder: SegmentationBuilder, raw: RawExample
) -> tuple[bytes, records.Tally] | InputError:
  """The record as bytes, and what was counted in it; or why the files cannot be used."""
  try:
    record = builder.read(raw)
  except InputError as error:
    return error
  counts = np.bincount(record["label"].ravel())
  values = np.flatnonzero(counts)
  pixels = collections.Counter(dict(zip(values.tolist(), counts[values].tolist())))
  notes = collections.Counter([record["exif"]] if record["exif"] else [])
  ids, ignore = builder.classes.ids, builder.classes.ignore
  notes["blank"] += all(ids.get(value, ignore) == ignore for value in pixels)
  notes["empty"] = record["empty"]
  encoded = builder.info.features.serialize_example(builder.encode(record))
  digest = hashlib.sha256(f"{raw.id}\0{record['label'].shape}\0".encode())
  digest.update(record["label"].tobytes())
  digest.update(record["image"])
  return encoded, records.Tally(pixels, notes, int.from_bytes(digest.digest(), "big"))


def _in_order(pool: concurrent.futures.Executor, function: Callable, items: Iterable) -> Iterator:
  """The results in the order of the items, computed a few ahead."""
  pending = collections.deque()
  for item in items:
    pending.append(pool.submit(function, item))
    if len(pending) > 2 * _THREADS:
      yield pending.popleft().result()
  while pending:
    yield pending.popleft().result()


def _check_values(
  builder: SegmentationBuilder,
  tally: records.Tally,
  folder: pathlib.Path,
  manual_dir: pathlib.Path,
) -> None:
  """Refuses sets of one's own without any class, and binary masks whose second is "no class".

  Raises:
    InputError: no pixel of a class; or two names, values not given, and no other values than 0 and
      255 in any mask.
  """
  names = builder.classes.names
  if not builder.own_classes:
    return
  if not {builder.classes.ids.get(value) for value in tally.pixels} & {*range(len(names))}:
    raise InputError(
      f"{manual_dir}: expected pixels of {', '.join(names[: summary.NAMES_SHOWN])}, got none in "
      f"any image; check that the annotations are complete, and their values (got "
      f"{', '.join(map(str, sorted(tally.pixels)[:5]))}, of which {builder.classes.ignore} is no "
      "class)"
    )
  read_as_ids = "values" in builder.options and builder.values is None and not builder.by_color
  if read_as_ids and len(names) == 2 and set(tally.pixels) == {0, vocabularies.IGNORE}:
    data_dir = folder.parents[2]
    command = (
      f"python -m data_pipelines.prepare {builder.name} --manual_dir={shlex.quote(str(manual_dir))}"
      f" --data_dir={shlex.quote(str(data_dir))} --config={folder.parent.name} --values=0,255"
    )
    raise InputError(
      f"{manual_dir}: expected masks of 0 ({names[0]}) and 1 ({names[1]}), got only 0 and 255, "
      f"which is no class unless --values says otherwise; if it is {names[1]}, run: {command} (if "
      "it is no class, the same with --values=0,1)"
    )


# The command


def main(arguments: list[str] | None = None) -> int:
  """The command; returns its exit status: 0, 2 after an InputError, 130 when interrupted."""

  def integers(text: str) -> list[int]:
    return [int(value) for value in text.split(",")]

  names = ", ".join(registry.prepared_sets())
  parser = argparse.ArgumentParser(
    prog="python -m data_pipelines.prepare",
    description="Turns the raw files of a data set into checked records.",
  )
  parser.add_argument("name", nargs="?", help=names)
  parser.add_argument("--manual_dir", help="folder of the raw files")
  parser.add_argument(
    "--download", action="store_true",
    help="fetch what is missing of the raw files, to --manual_dir or DATA_DIR/downloads",
  )  # fmt: skip
  parser.add_argument("--mirror", default="", help="address of a folder with the files to fetch")
  parser.add_argument(
    "--remove_archives", action="store_true", help="delete what was fetched once it is unpacked"
  )
  parser.add_argument("--data_dir", default="data", help="root of the prepared sets")
  parser.add_argument(
    "--local_dir", default="", help="where to prepare what goes to a bucket (default: a cache)"
  )
  parser.add_argument(
    "--config", help="a version of the set; for your own data, the name to give it"
  )
  parser.add_argument(
    "--values",
    type=integers,
    help="for folder, the mask value of every name in names.txt if not 0,1,2,…: for example 0,255",
  )
  parser.add_argument(
    "--background",
    help="for annotations, the class of pixels that have none (default: no class)",
  )
  parser.add_argument(
    "--allow_partial",
    action="store_true",
    help="accept fewer images than are published or annotated",
  )
  parser.add_argument(
    "--rebuild", action="store_true", help="prepare a finished set anew, from files that changed"
  )
  parser.add_argument("--list", action="store_true", help="describe every set")
  args = parser.parse_args(arguments)
  if args.name is None and not args.list:
    parser.error(f"expected a data set: {names}")

  def run() -> None:
    if args.list:
      print(overview.describe_sets(args.data_dir))
    else:
      prepare(
        args.name,
        args.manual_dir,
        args.data_dir,
        config=args.config,
        values=args.values,
        background=args.background,
        allow_partial=args.allow_partial,
        rebuild=args.rebuild,
        local_dir=args.local_dir,
        download=args.download,
        mirror=args.mirror,
        remove_archives=args.remove_archives,
      )

  return run_command(run, interrupted="interrupted; the same command continues where it was")


if __name__ == "__main__":
  sys.exit(main())
