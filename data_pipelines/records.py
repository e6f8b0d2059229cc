"""Prepared data sets on disk: where they lie, how they are read, how their shards are written.

The records of <data_dir>/<name>[/<config>]/<version> are in array_record files, described by TFDS's
metadata; reading them needs neither the raw files nor the builder.
"""

import collections
import contextlib
import dataclasses
import json
import os
import pathlib
import re
import shlex
import shutil
from collections.abc import Iterator, Sequence
from typing import Any

import tensorflow_datasets as tfds
from array_record.python import array_record_module

from data_pipelines import downloads, registry, vocabularies
from rpn_jax.base import paths
from rpn_jax.base.errors import InputError
from rpn_jax.base.words import check_known, composed

# Beside the records of a set whose raw files bring the class names.
NAMES_FILE = "names.json"
# Split -> what its images are for, and what to do about a set that has none.
_WITHOUT = {
  "train": (
    "train on",
    "add some to its raw files and prepare it with --rebuild, train on another set, or only "
    "evaluate on this one",
  ),
  "val": (
    "evaluate on",
    "add some to its raw files and prepare it with --rebuild (of your own images without val, one "
    "in ten is kept for it), or hold out training images: --config.data.held_out=0.1",
  ),
}


# Reading


def source(
  name: str, data_dir: str | os.PathLike, split: str, config: str | None = None
) -> "Records":
  """Random access to a prepared data set; see `Records`.

  Args:
    name: for `prepare`.
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
      there = [*builder.info.splits]
      if split in _WITHOUT and split not in there:
        purpose, remedy = _WITHOUT[split]
        raise InputError(
          f"{folder}: expected images to {purpose} ({split}), got a set that has only "
          f"{', '.join(there)}; {remedy}"
        ) from error
      raise InputError(
        f"{folder}: expected one of the splits {', '.join(there)} or a slice of one, got "
        f"{split!r}; correct the name"
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


def prepared_folder(
  name: str, data_dir: str | os.PathLike, config: str | None = None
) -> pathlib.Path:
  """The folder of a prepared data set.

  Raises:
    InputError: it is not prepared, with the command that does it, or lacks files.
  """
  cls = registry.builder_class(name)
  folder = folder_of(cls, data_dir, config_name(cls, config, data_dir))
  if not folder.exists():
    which = f" --config={shlex.quote(config)}" if config else ""
    raise InputError(
      f"expected {name} prepared in {folder}, got no such folder; run: "
      f"python -m data_pipelines.prepare {name}{which} {downloads.option(name)} "
      f"--data_dir={shlex.quote(str(data_dir))}"
    )
  count_examples(folder)
  return folder


def stored_vocabulary(
  name: str, data_dir: str | os.PathLike, config: str | None
) -> vocabularies.Vocabulary:
  """The classes of a prepared set whose raw files brought their names; see `write_names`.

  Raises:
    InputError: nothing is prepared under this name, or the file of the names is damaged.
  """
  path = prepared_folder(name, data_dir, config) / NAMES_FILE
  try:
    stored = json.loads(path.read_text(encoding="utf-8"))
    # Sets prepared by version 0.2.0 have no values.
    return vocabularies.of_names(name, stored["names"], stored["unseen"], stored.get("values"))
  except (OSError, ValueError, KeyError, TypeError, RecursionError, AttributeError) as error:
    raise InputError(
      f"{path}: expected the names of a prepared folder, got {type(error).__name__}; "
      f"delete {path.parent} and prepare it again"
    ) from error


def write_names(classes: vocabularies.Vocabulary, folder: pathlib.Path) -> None:
  """Writes what `stored_vocabulary` reads."""
  stored = {
    "names": classes.names,
    "unseen": [classes.names[i] for i in classes.unseen],
    "values": list(classes.ids),
  }
  write_json(folder / NAMES_FILE, stored)


def count_examples(folder: pathlib.Path) -> dict[str, int]:
  """Examples per split of a prepared folder.

  Raises:
    InputError: files are missing or damaged.
  """
  try:
    splits = tfds.builder_from_directory(folder).info.splits
    missing = [p for s in splits.values() for p in s.filepaths if not paths.expand(p).is_file()]
  except Exception as error:  # TFDS fails in many ways on a damaged folder
    missing = [f"{type(error).__name__} in dataset_info.json"]
  if missing or not splits:
    raise InputError(
      f"{folder}: expected a prepared data set, got one without {(missing or ['splits'])[0]}; "
      "delete the folder and prepare it again"
    )
  return {split: info.num_examples for split, info in splits.items()}


def read_summary(folder: pathlib.Path) -> dict[str, Any]:
  """`summary.json` of a prepared folder; {} if it is gone: it is for people, sets do without."""
  try:
    return dict(json.loads((folder / "summary.json").read_text(encoding="utf-8")))
  except (OSError, ValueError, TypeError):
    return {}


def contents(folder: pathlib.Path) -> dict[str, dict]:
  """What identifies the examples of every split of a prepared folder, without reading them.

  Returns:
    Split -> {"images": their number, "bytes": of their records, "sha256": of names, images and
    labels in any order}, the last not of sets that earlier versions prepared.
  """
  splits = tfds.builder_from_directory(folder).info.splits
  hashes = read_summary(folder).get("sha256")
  hashes = hashes if isinstance(hashes, dict) else {}
  return {
    split: {"images": info.num_examples, "bytes": info.num_bytes}
    | ({"sha256": hashes[split]} if split in hashes else {})
    for split, info in splits.items()
  }


# Places


def folder_of(cls: type, data_dir: str | os.PathLike, config: str) -> pathlib.Path:
  """Where a builder's records belong; `config` is "" for sets without configs."""
  return paths.expand(data_dir) / cls.name / config / str(cls.VERSION)


def folders_of(cls: type, data_dir: str | os.PathLike) -> list[pathlib.Path]:
  """Prepared folders of all configs of a builder."""
  root, version = paths.expand(data_dir) / cls.name, str(cls.VERSION)
  return [f for f in (root / version, *sorted(root.glob(f"*/{version}"))) if f.is_dir()]


def config_name(cls: type, config: str | None, data_dir: str | os.PathLike = "") -> str:
  """The folder of a config below the set's, empty for sets without configs.

  Raises:
    InputError: an unknown config, one too many, or none where a name is needed.
  """
  if cls.own_classes:
    slug = re.sub(r"\W+", "_", composed(config or "")).strip("_").lower()
    if not slug:
      there = [folder.parent.name for folder in folders_of(cls, data_dir)]
      raise InputError(
        f"expected the name of a prepared folder, got {config!r}; prepared in {data_dir or '.'}: "
        f"{', '.join(there) or 'none'}"
      )
    return slug
  configs = [c.name for c in cls.BUILDER_CONFIGS]
  if config is not None:
    if not configs:
      raise InputError(f"{cls.name} has no configs, got {config!r}; leave it out")
    check_known(f"config of {cls.name} ", config, configs)
  return config or (configs[0] if configs else "")


# Writing


@dataclasses.dataclass
class Tally:
  """What was counted in some examples.

  Attributes:
    pixels: raw label value -> number of pixels.
    notes: "upright" or "stored" -> number of images that EXIF data turns and that were read so;
      "blank" -> number of images without a pixel of any class; "empty" -> number of annotations
      that no pixel's center is in.
    digest: sum of the examples' digests, so that their order does not matter.
  """

  pixels: collections.Counter
  notes: collections.Counter
  digest: int

  @classmethod
  def empty(cls) -> "Tally":
    return cls(collections.Counter(), collections.Counter(), 0)

  def update(self, other: "Tally") -> None:
    """Adds what was counted in further examples."""
    self.pixels.update(other.pixels)
    self.notes.update(other.notes)
    self.digest = (self.digest + other.digest) % 2**256


@dataclasses.dataclass
class Shard:
  """A file of records, to be written or finished, and the file of what was counted in it."""

  split: str
  path: pathlib.Path
  tally_path: pathlib.Path
  raws: Sequence

  def is_finished(self) -> bool:
    try:
      self.tally()
      records = array_record_module.ArrayRecordReader(str(self.path)).num_records()
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError):
      return False
    return records == len(self.raws)

  def tally(self) -> Tally:
    stored = json.loads(self.tally_path.read_text(encoding="utf-8"))
    pixels = {int(value): count for value, count in stored["pixels"].items()}
    return Tally(
      collections.Counter(pixels), collections.Counter(stored["notes"]), stored["digest"]
    )

  def write(self, results: Iterator[tuple[bytes, Tally]], progress) -> None:
    """Writes records; the file gets its name when it is complete."""
    tally = Tally.empty()
    with contextlib.ExitStack() as stack:
      with storing(self.path):
        temporary = stack.enter_context(paths.replacing(self.path))
        writer = array_record_module.ArrayRecordWriter(str(temporary), "group_size:1")
      try:
        for record, counted in results:
          with storing(self.path):
            writer.write(record)
          tally.update(counted)
          progress.update()
      finally:
        with storing(self.path):
          writer.close()
      with storing(self.path):
        counted = {"pixels": tally.pixels, "notes": tally.notes, "digest": tally.digest}
        write_json(self.tally_path, counted)
        stack.close()  # renames


def claim_partial(partial: pathlib.Path, plan: str) -> None:
  """Makes the folder of the shards; keeps what is in it if that follows the same plan."""
  path = partial / "progress" / "plan.json"
  with storing(partial):
    if path.exists() and path.read_text(encoding="utf-8") == plan:
      for cut_off in partial.glob(".*.tmp"):  # of a process that was killed while it wrote
        cut_off.unlink()
      return
    if partial.exists():
      print(f"{partial} was begun with other files, options or rules: starting over")
      shutil.rmtree(partial)
    path.parent.mkdir(parents=True)
    paths.write_text(path, plan)


def plan_shards(
  builder: tfds.core.DatasetBuilder,
  splits: dict[str, Sequence],
  folder: pathlib.Path,
  shard_examples: int,
) -> list[Shard]:
  """The shards of all splits in `folder`, written or not."""
  shards = []
  for split, raws in splits.items():
    parts = [raws[i : i + shard_examples] for i in range(0, len(raws), shard_examples)]
    for i, part in enumerate(parts):
      file = _template(builder, folder, split).sharded_filepath(
        shard_index=i, num_shards=len(parts)
      )
      tally_path = folder / "progress" / f"{file.name}.json"
      shards.append(Shard(split, paths.expand(file), tally_path, part))
  return shards


def write_metadata(
  builder: tfds.core.DatasetBuilder, shards: list[Shard], folder: pathlib.Path
) -> None:
  """Writes what TFDS needs to open the shards in `folder`."""
  infos = []
  for split in dict.fromkeys(shard.split for shard in shards):
    own = [shard for shard in shards if shard.split == split]
    infos.append(
      tfds.core.SplitInfo(
        name=split,
        shard_lengths=[len(shard.raws) for shard in own],
        num_bytes=sum(shard.path.stat().st_size for shard in own),
        filename_template=_template(builder, folder, split),
      )
    )
  tfds.folder_dataset.write_metadata(
    data_dir=folder,
    features=builder.info.features,
    version=str(builder.VERSION),
    split_infos=infos,
    check_data=False,  # would need TensorFlow
  )


def _template(builder, folder: pathlib.Path, split: str) -> tfds.core.ShardedFileTemplate:
  return tfds.core.ShardedFileTemplate(
    dataset_name=builder.name, data_dir=folder, split=split, filetype_suffix="array_record"
  )


def write_json(path: pathlib.Path, content: dict) -> None:
  """Writes JSON with letters of every script as they are; see `paths.replacing`."""
  paths.write_text(path, json.dumps(content, indent=1, ensure_ascii=False))


@contextlib.contextmanager
def storing(path: pathlib.Path) -> Iterator[None]:
  """Turns failures to write, array_record's included, into one line."""
  try:
    yield
  except (OSError, RuntimeError) as error:
    raise InputError(
      f"{path}: expected to write here, got {' '.join(str(error).split())}; free some disk space "
      "or correct the permissions, and rerun the command: finished shards are kept"
    ) from error
