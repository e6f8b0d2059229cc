"""Turns the raw files of a data set into checked records, once: what training reads.

    python -m data_pipelines.prepare NAME --manual_dir=RAW_FILES --data_dir=data
    python -m data_pipelines.prepare --list

Records lie in shards below <data_dir>/<name>[/<config>]/<version>, which appears when all are
written. Until then they lie beside it in <version>.partial: whatever ends a preparation, the same
command goes on from the last finished shard.
"""

import argparse
import collections
import concurrent.futures
import contextlib
import dataclasses
import difflib
import fcntl
import functools
import hashlib
import importlib
import itertools
import json
import os
import pathlib
import re
import shlex
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import tensorflow_datasets as tfds
import tqdm
from absl import logging
from array_record.python import array_record_module

from data_pipelines import preview, shapes, vocabularies
from data_pipelines.builder import RawExample, SegmentationBuilder
from rpn_jax.base.errors import InputError

# Loaded when asked for: one set's needs are not every set's.
BUILDERS = {
  "voc": "data_pipelines.voc:Voc",
  "context": "data_pipelines.context:Context",
  "context459": "data_pipelines.context459:Context459",
  "coco_stuff": "data_pipelines.coco_stuff:CocoStuff",
  "ade150": "data_pipelines.ade150:Ade150",
  "ade847": "data_pipelines.ade847:Ade847",
  "folder": "data_pipelines.folder:Folder",
}
SHARD_EXAMPLES = 500
_THREADS = min(8, os.cpu_count() or 1)
_PREVIEWED = 8


# What others read


def prepare(
  name: str,
  manual_dir: str | pathlib.Path | None,
  data_dir: str | pathlib.Path,
  *,
  config: str | None = None,
  allow_partial: bool = False,
) -> pathlib.Path:
  """Prepares a data set, or what is left of it; a finished one is left alone.

  Args:
    name: a key of BUILDERS, or "shapes", which needs no files.
    manual_dir: the folder of the raw files; see `--list` for what belongs there.
    data_dir: the root of all prepared sets; made if missing.
    config: a TFDS config of the set; for "folder" the name to prepare it under, by default the
      folder's own.
    allow_partial: take what is there where images of the published number are missing.

  Returns:
    The prepared folder, with the records, summary.json and preview.png.

  Raises:
    InputError: an unknown name or config, missing or bad raw files, a data_dir without room or
      permission, or another process that prepares this set.
  """
  if name == "shapes":
    folder = shapes.prepare(data_dir)
    print(f"prepared in {folder}")
    return folder
  builder_class = _builder_class(name)
  if name == "folder" and not config:
    config = _raw(builder_class, manual_dir).name
  config = _config_name(builder_class, config)
  folder = _folder(builder_class, data_dir, config)
  if folder.exists():
    return _already(builder_class, folder, manual_dir)
  manual_dir = _raw(builder_class, manual_dir)
  with _storing(folder):
    folder.parent.mkdir(parents=True, exist_ok=True)
  with _locked(folder.with_name(f".{folder.name}.lock"), folder):
    if not folder.exists():  # the process that held the lock may have finished it
      builder = _builder(builder_class, data_dir, config)
      splits = _list_examples(builder, manual_dir, allow_partial)
      _write(builder, splits, folder, manual_dir)
      return folder
  return _already(builder_class, folder, manual_dir)


def prepared_folder(
  name: str, data_dir: str | pathlib.Path, config: str | None = None
) -> pathlib.Path:
  """The folder of a prepared data set.

  Raises:
    InputError: it is not prepared, with the command that does it, or lacks files.
  """
  builder_class = _builder_class(name)
  folder = _folder(builder_class, data_dir, _config_name(builder_class, config, data_dir))
  if not folder.exists():
    option = f" --config={shlex.quote(config)}" if config else ""
    raise InputError(
      f"expected {name} prepared in {folder}, got no such folder; run: "
      f"python -m data_pipelines.prepare {name}{option} --manual_dir=RAW_FILES "
      f"--data_dir={shlex.quote(str(data_dir))}"
    )
  _counts(folder)
  return folder


def source(
  name: str, data_dir: str | pathlib.Path, split: str, config: str | None = None
) -> "Records":
  """Random access to a prepared data set; see `Records`.

  Args:
    name: a key of BUILDERS.
    data_dir: as given to `prepare`.
    split: "train" or "val", or a TFDS slice such as "train[:10%]".
    config: as given to `prepare`; a folder's name.

  Raises:
    InputError: the set is not prepared or has no such split.
  """
  return Records(prepared_folder(name, data_dir, config), split)


class Records:
  """Random access to the records of one split.

  Items are {'image': bytes of a JPEG or PNG file, 'label': uint8 or uint16 [H,W] in the numbering
  of the raw files, 'id': str}. Pickles to its arguments, so that worker processes can open it.
  """

  def __init__(self, folder: pathlib.Path, split: str):
    self._arguments = (folder, split)
    builder = tfds.builder_from_directory(folder)
    try:
      self._records = builder.as_data_source(
        split=split, decoders={"image": tfds.decode.SkipDecoding()}
      )
    except ValueError as error:
      raise InputError(
        f"{folder}: expected one of the splits {', '.join(builder.info.splits)} or a slice of one, "
        f"got {split!r}; correct the name or prepare the set with it"
      ) from error

  def __len__(self) -> int:
    return len(self._records)

  def __getitem__(self, index: int) -> dict:
    if not 0 <= index < len(self):  # array_record raises ValueError, which breaks iteration
      raise IndexError(f"example {index} of {len(self)}")
    record = self._records[index]
    label = record["label"]
    label = label[..., 0] if label.ndim == 3 else label
    return {"image": record["image"], "label": label, "id": record["id"].decode()}

  def __reduce__(self):
    return Records, self._arguments


def overview(data_dir: str | pathlib.Path) -> str:
  """Every data set: what it is, where its files come from, and what of it is prepared."""
  parts = []
  for name in BUILDERS:
    cls = _builder_class(name)
    counts = [f"{count:,} {split}" for split, count in cls.counts.items()]
    lines = [f"{name}: {cls.title}", f"  images    {', '.join(counts) or 'any number'}"]
    lines += [f"  raw size  {cls.raw_size}", f"  licence   {cls.licence}"]
    lines.append(f"  obtain    {cls.obtain}")
    for word, line in itertools.zip_longest(["layout"], cls.layout.splitlines(), fillvalue=""):
      lines.append(f"  {word:<8}  {line}")
    states = [_state(folder) for folder in _folders(cls, data_dir)]
    lines += [f"  prepared  {state}" for state in states or ["no"]]
    parts.append("\n".join(lines))
  parts.append("shapes: the embedded world, drawn when first used")
  return "\n\n".join(parts)


# Names and places


def _builder_class(name: str) -> type[SegmentationBuilder]:
  _known("data set", name, [*BUILDERS, "shapes"])
  if name == "shapes":
    raise InputError("shapes: the embedded world is opened by data_pipelines.shapes.source")
  module, _, cls = BUILDERS[name].partition(":")
  return getattr(importlib.import_module(module), cls)


def _raw(cls, manual_dir: str | pathlib.Path | None) -> pathlib.Path:
  if manual_dir is None or not pathlib.Path(manual_dir).is_dir():
    got = "none" if manual_dir is None else f"no folder {manual_dir}"
    raise InputError(
      f"expected the raw files of {cls.title} in --manual_dir, got {got}; "
      "python -m data_pipelines.prepare --list says which and where they are obtained"
    )
  return pathlib.Path(manual_dir).resolve()


def _config_name(cls, config: str | None, data_dir: str | pathlib.Path = "") -> str:
  """The folder of a config below the set's, empty for sets without configs."""
  if cls.name == "folder":
    slug = re.sub(r"\W+", "_", config or "").strip("_").lower()
    if not slug:
      there = [folder.parent.name for folder in _folders(cls, data_dir)]
      raise InputError(
        f"expected the name of a prepared folder, got {config!r}; prepared in {data_dir or '.'}: "
        f"{', '.join(there) or 'none'}"
      )
    return slug
  configs = [c.name for c in cls.BUILDER_CONFIGS]
  if config is not None:
    if not configs:
      raise InputError(f"{cls.name} has no configs, got {config!r}; leave it out")
    _known(f"config of {cls.name}", config, configs)
  return config or (configs[0] if configs else "")


def _folder(cls, data_dir: str | pathlib.Path, config: str) -> pathlib.Path:
  return pathlib.Path(data_dir) / cls.name / config / str(cls.VERSION)


def _folders(cls, data_dir: str | pathlib.Path) -> list[pathlib.Path]:
  """Prepared folders of all configs."""
  root, version = pathlib.Path(data_dir) / cls.name, str(cls.VERSION)
  return [f for f in (root / version, *sorted(root.glob(f"*/{version}"))) if f.is_dir()]


def _builder(cls, data_dir: str | pathlib.Path, config: str) -> SegmentationBuilder:
  builder_config = cls.builder_configs.get(config)
  if config and builder_config is None:  # a folder's name
    builder_config = tfds.core.BuilderConfig(name=config)
  verbosity = logging.get_verbosity()
  logging.set_verbosity(logging.ERROR)  # TFDS warns of configs of one's own
  try:
    return cls(data_dir=data_dir, config=builder_config, file_format="array_record")
  finally:
    logging.set_verbosity(verbosity)


def _known(what: str, name: str, known: Iterable[str]) -> None:
  if name not in known:
    near = difflib.get_close_matches(name, known, 1, 0.0)[0]
    raise InputError(
      f"{what} {name!r} is not known; did you mean {near!r}? Known: {', '.join(known)}"
    )


def _counts(folder: pathlib.Path) -> dict[str, int]:
  """Examples per split of a prepared folder.

  Raises:
    InputError: files are missing or damaged.
  """
  try:
    splits = tfds.builder_from_directory(folder).info.splits
    missing = [p for s in splits.values() for p in s.filepaths if not pathlib.Path(p).is_file()]
  except Exception as error:  # TFDS fails in many ways on a damaged folder
    missing = [f"{type(error).__name__} in dataset_info.json"]
  if missing or not splits:
    raise InputError(
      f"{folder}: expected a prepared data set, got one without {(missing or ['splits'])[0]}; "
      "delete the folder and prepare it again"
    )
  return {split: info.num_examples for split, info in splits.items()}


def _already(cls, folder: pathlib.Path, manual_dir: str | pathlib.Path | None) -> pathlib.Path:
  """Says that a set is finished; two folders of one name are told apart."""
  counts = _counts(folder)
  try:
    made_from = json.loads((folder / "summary.json").read_text(encoding="utf-8"))["manual_dir"]
  except (OSError, ValueError, KeyError):  # for people only
    made_from = None
  asked = None if manual_dir is None else str(pathlib.Path(manual_dir).resolve())
  if cls.name == "folder" and None not in (asked, made_from) and asked != made_from:
    raise InputError(
      f"{folder} was prepared from {made_from}, got {asked}; give the new one a name of its own "
      "with --config=NAME, or delete the old"
    )
  note = ""
  if any(counts.get(split, 0) != count for split, count in cls.counts.items()):
    note = f" (published: {_listed(cls.counts)}; to take in more images, delete the folder)"
  print(f"already prepared: {_listed(counts)} in {folder}{note}")
  return folder


def _state(folder: pathlib.Path) -> str:
  try:
    return f"{_listed(_counts(folder))} in {folder}"
  except InputError as error:
    return f"damaged: {error}"


def _listed(counts: dict[str, int]) -> str:
  return ", ".join(f"{count:,} {split}" for split, count in counts.items())


# The work


def _list_examples(
  builder: SegmentationBuilder, manual_dir: pathlib.Path, allow_partial: bool
) -> dict[str, list[RawExample]]:
  """What there is to do, checked against the published numbers."""
  splits = builder.examples(manual_dir)
  for split, raws in splits.items():
    repeated = [n for n, count in collections.Counter(r.id for r in raws).items() if count > 1]
    if repeated:
      raise InputError(
        f"{manual_dir}: expected {split} images of different names, got {repeated[0]} more than "
        "once; remove the copy"
      )
  for split, count in builder.counts.items():
    found = len(splits.get(split, ()))
    if found != count and not allow_partial:
      raise InputError(
        f"{manual_dir}: expected {count:,} {split} images of {builder.title}, got {found:,}; "
        f"{builder.obtain}; --allow_partial takes what is there"
      )
  splits = {split: raws for split, raws in splits.items() if raws}
  if not splits:
    raise InputError(f"{manual_dir}: expected images of {builder.title}, got none")
  return splits


@dataclasses.dataclass
class _Shard:
  """A file of records to be, and the file that says what was counted in it."""

  split: str
  path: pathlib.Path
  counted: pathlib.Path
  raws: list[RawExample]

  def is_finished(self) -> bool:
    try:
      self.pixels()
      records = array_record_module.ArrayRecordReader(str(self.path)).num_records()
    except (OSError, ValueError, RuntimeError):
      return False
    return records == len(self.raws)

  def pixels(self) -> collections.Counter:
    """Raw value -> number of pixels."""
    pixels = json.loads(self.counted.read_text(encoding="utf-8"))
    return collections.Counter({int(value): count for value, count in pixels.items()})


def _write(
  builder: SegmentationBuilder,
  splits: dict[str, list[RawExample]],
  folder: pathlib.Path,
  manual_dir: pathlib.Path,
) -> None:
  """All shards, then the metadata; the folder gets its name last."""
  started = time.time()
  partial = folder.with_name(f"{folder.name}.partial")
  progress = partial / "progress"  # the plan, and what was counted in each finished shard
  shards = []
  for split, raws in splits.items():
    parts = [raws[i : i + SHARD_EXAMPLES] for i in range(0, len(raws), SHARD_EXAMPLES)]
    for i, part in enumerate(parts):
      file = _template(builder, partial, split).sharded_filepath(
        shard_index=i, num_shards=len(parts)
      )
      counted = progress / f"{file.name}.json"
      shards.append(_Shard(split, pathlib.Path(file), counted, part))
  plan = json.dumps(_plan(builder, splits, manual_dir), indent=1)
  with _storing(partial):
    if not _same(progress / "plan.json", plan):
      if partial.exists():
        shutil.rmtree(partial)
      progress.mkdir(parents=True)
      _write_text(progress / "plan.json", plan)
  open_shards = [shard for shard in shards if not shard.is_finished()]
  total = sum(len(shard.raws) for shard in shards)
  kept = total - sum(len(shard.raws) for shard in open_shards)
  # disable=None: no bar where stderr is not a terminal.
  bar = tqdm.tqdm(total=total, initial=kept, desc=builder.name, unit="image", disable=None)
  read = functools.partial(_read, builder)
  with bar, concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
    for shard in open_shards:
      _write_shard(shard, _in_order(pool, read, shard.raws), bar)
  classes = vocabularies.load(builder.vocabulary) if builder.vocabulary else builder.classes
  summary = {
    "name": builder.name,
    "config": _config_of(builder),
    "version": str(builder.VERSION),
    "manual_dir": str(manual_dir),
    "images": {split: len(raws) for split, raws in splits.items()},
    "shards": {split: sum(shard.split == split for shard in shards) for split in splits},
    "bytes": sum(shard.path.stat().st_size for shard in shards),
    "seconds": round(time.time() - started, 1),
    "images_of_earlier_runs": kept,
    **_class_summary(shards, classes),
  }
  with _storing(partial):
    _write_metadata(builder, shards, partial)
    _write_text(partial / "summary.json", json.dumps(summary, indent=1, ensure_ascii=False))
    if not builder.vocabulary:  # whose names no file of this package has
      names = {"names": classes.names, "unseen": [classes.names[i] for i in classes.unseen]}
      _write_text(partial / "names.json", json.dumps(names, indent=1, ensure_ascii=False))
    first = Records(partial, next(iter(splits)))
    picked = np.unique(np.linspace(0, len(first) - 1, _PREVIEWED).round().astype(int))
    preview.draw([first[i] for i in picked.tolist()], classes, partial / "preview.png")
    os.rename(partial, folder)
    shutil.rmtree(folder / "progress", ignore_errors=True)
  print(_report(summary, folder))


def _template(builder, partial: pathlib.Path, split: str) -> tfds.core.ShardedFileTemplate:
  return tfds.core.ShardedFileTemplate(
    dataset_name=builder.name, data_dir=partial, split=split, filetype_suffix="array_record"
  )


def _write_metadata(builder, shards: list[_Shard], partial: pathlib.Path) -> None:
  infos = []
  for split in dict.fromkeys(shard.split for shard in shards):
    own = [shard for shard in shards if shard.split == split]
    infos.append(
      tfds.core.SplitInfo(
        name=split,
        shard_lengths=[len(shard.raws) for shard in own],
        num_bytes=sum(shard.path.stat().st_size for shard in own),
        filename_template=_template(builder, partial, split),
      )
    )
  tfds.folder_dataset.write_metadata(
    data_dir=partial,
    features=builder.info.features,
    version=str(builder.VERSION),
    split_infos=infos,
    check_data=False,  # would need TensorFlow
  )


def _plan(builder, splits: dict[str, list[RawExample]], manual_dir: pathlib.Path) -> dict:
  """What a folder of finished shards must agree in to be gone on with."""
  hashes = {}
  for split, raws in splits.items():
    files = "".join(f"{raw.id}\0{raw.image}\0{raw.label}\n" for raw in raws)
    hashes[split] = hashlib.sha256(os.fsencode(files)).hexdigest()
  return {
    "manual_dir": str(manual_dir),
    "config": _config_of(builder),
    "shard_examples": SHARD_EXAMPLES,
    "examples": hashes,
  }


def _config_of(builder: SegmentationBuilder) -> str | None:
  return builder.builder_config.name if builder.builder_config else None


def _read(builder: SegmentationBuilder, raw: RawExample) -> tuple[bytes, dict[int, int]]:
  """The record as bytes, and raw value -> number of pixels."""
  record = builder.read(raw)
  counts = np.bincount(record["label"].ravel())
  values = np.flatnonzero(counts)
  pixels = dict(zip(values.tolist(), counts[values].tolist()))
  return builder.info.features.serialize_example(builder.encode(record)), pixels


def _in_order(pool: concurrent.futures.Executor, function: Callable, items: Iterable) -> Iterator:
  """The results in the order of the items, computed a few ahead."""
  waiting = collections.deque()
  for item in items:
    waiting.append(pool.submit(function, item))
    if len(waiting) > 2 * _THREADS:
      yield waiting.popleft().result()
  while waiting:
    yield waiting.popleft().result()


def _write_shard(shard: _Shard, results: Iterator[tuple[bytes, dict]], bar) -> None:
  """Writes a shard, under its name only when it is whole."""
  writing = shard.path.with_name(f"writing-{shard.path.name}")
  pixels = collections.Counter()
  with _storing(shard.path):
    writer = array_record_module.ArrayRecordWriter(str(writing), "group_size:1")
  try:
    for record, more in results:
      with _storing(shard.path):
        writer.write(record)
      pixels.update(more)
      bar.update()
  finally:
    with _storing(shard.path):
      writer.close()
  with _storing(shard.path):
    _write_text(shard.counted, json.dumps(pixels))
    os.replace(writing, shard.path)


def _class_summary(shards: list[_Shard], classes: vocabularies.Vocabulary) -> dict:
  """Which classes occur, and the share of pixels without one."""
  pixels = sum((shard.pixels() for shard in shards), collections.Counter())
  found, unlabelled = set(), 0
  for value, count in pixels.items():
    class_id = classes.ids.get(value, classes.ignore)
    if class_id == classes.ignore:
      unlabelled += count
    else:
      found.add(class_id)
  return {
    "classes": classes.num_classes,
    "classes_found": len(found),
    "classes_missing": [n for n, i in zip(classes.names, classes.scored_as) if i not in found],
    "unlabelled_pixels": round(unlabelled / pixels.total(), 6),
  }


def _report(summary: dict, folder: pathlib.Path) -> str:
  lines = [
    f"{split:<6} {count:>9,} images {summary['shards'][split]:>5} shards"
    for split, count in summary["images"].items()
  ]
  lines.append(
    f"{summary['bytes'] / 1e6:,.1f} MB in {summary['seconds']:.0f} s; "
    f"{summary['classes_found']} of {summary['classes']} classes found; "
    f"{summary['unlabelled_pixels']:.1%} of the pixels without a class"
  )
  return "\n".join([*lines, f"prepared in {folder}; look at preview.png there"])


# Files


@contextlib.contextmanager
def _storing(path: pathlib.Path):
  """Failures to write, array_record's included, as one line."""
  try:
    yield
  except (OSError, RuntimeError) as error:
    raise InputError(
      f"{path}: expected to write here, got {' '.join(str(error).split())}; see to room and "
      "permission and run the command again: finished shards are kept"
    ) from error


@contextlib.contextmanager
def _locked(path: pathlib.Path, folder: pathlib.Path):
  """Holds a lock file, which ends with the process however that ends."""
  with _storing(path):
    file = path.open("a+", encoding="utf-8")
  with file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      file.seek(0)
      raise InputError(
        f"{folder} is being prepared by {file.read() or 'another process'}; wait for it to end"
      ) from error
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    yield


def _same(path: pathlib.Path, text: str) -> bool:
  return path.exists() and path.read_text(encoding="utf-8") == text


def _write_text(path: pathlib.Path, text: str) -> None:
  writing = path.with_name(f"writing-{path.name}")
  writing.write_text(text, encoding="utf-8")
  os.replace(writing, path)


def main(arguments: list[str] | None = None) -> int:
  """The command; returns its exit status: 0, 2 after a InputError, 130 when interrupted."""
  parser = argparse.ArgumentParser(
    prog="python -m data_pipelines.prepare",
    description="Turns the raw files of a data set into checked records.",
  )
  parser.add_argument("name", nargs="?", help=", ".join([*BUILDERS, "shapes"]))
  # Shells leave a ~ behind "=" as it is.
  parser.add_argument("--manual_dir", type=os.path.expanduser, help="folder of the raw files")
  parser.add_argument(
    "--data_dir", type=os.path.expanduser, default="data", help="root of the prepared sets"
  )
  parser.add_argument("--config", help="a version of the set; for folder, the name to give it")
  parser.add_argument(
    "--allow_partial", action="store_true", help="take what is there if images are missing"
  )
  parser.add_argument("--list", action="store_true", help="tell of every set")
  args = parser.parse_args(arguments)
  try:
    if args.list:
      print(overview(args.data_dir))
    elif args.name is None:
      parser.error(f"expected a data set: {', '.join([*BUILDERS, 'shapes'])}")
    else:
      prepare(
        args.name,
        args.manual_dir,
        args.data_dir,
        config=args.config,
        allow_partial=args.allow_partial,
      )
  except InputError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  except KeyboardInterrupt:
    print("interrupted; the same command goes on from the last finished shard", file=sys.stderr)
    return 130
  return 0


if __name__ == "__main__":
  sys.exit(main())
