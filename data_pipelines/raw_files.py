"""The raw files of a data set: where they are, which they are, and whether they have changed."""

import collections
import json
import os
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import tensorflow_datasets as tfds
from absl import logging

from data_pipelines import downloads, records
from data_pipelines.sources.builder import RawExample, SegmentationBuilder
from data_pipelines.vocabularies import Vocabulary
from rpn_jax.base import paths
from rpn_jax.base.errors import InputError

# Beside the records.
FILE = "raw_files.json"
# Split, or CLASSES -> file, relative to the raw folder -> [bytes, time of the last change in ns].
Files = Mapping[str, Mapping[str, Sequence[int]]]
# Of the files that say which class a label is; sets of earlier versions have no such entry.
CLASSES = "classes"


def folder_of(cls: type[SegmentationBuilder], manual_dir: str | os.PathLike | None) -> pathlib.Path:
  """The folder of the raw files, as an absolute path.

  Raises:
    InputError: none is given, or there is no such folder.
  """
  folder = None if manual_dir is None else paths.expand_local(manual_dir, "--manual_dir")
  if folder is None or not folder.is_dir():
    got = "none" if folder is None else f"no folder {folder}"
    fetched = "--download fetches them, and " if downloads.files(cls.name) else ""
    raise InputError(
      f"expected the raw files of {cls.title} in --manual_dir, got {got}; {fetched}"
      "python -m data_pipelines.prepare --list says which and where they are obtained"
    )
  return folder.resolve()


def make_builder(
  cls: type, data_dir: str | os.PathLike, config: str, options: Mapping[str, Any]
) -> SegmentationBuilder:
  """The builder of a set, told what it is to read and to write.

  Args:
    cls: the builder.
    data_dir: the root of all prepared sets.
    config: "" for sets without configs.
    options: values of the builder's attributes `OPTIONS`.
  """
  builder_config = cls.builder_configs.get(config)
  if config and builder_config is None:  # a folder's name
    builder_config = tfds.core.BuilderConfig(name=config)
  verbosity = logging.get_verbosity()
  logging.set_verbosity(logging.ERROR)  # TFDS warns of configs that the class does not list
  try:
    builder = cls(
      data_dir=paths.expand(data_dir), config=builder_config, file_format="array_record"
    )
  finally:
    logging.set_verbosity(verbosity)
  for name, value in options.items():
    setattr(builder, name, value)
  return builder


def list_examples(
  builder: SegmentationBuilder, manual_dir: pathlib.Path, allow_partial: bool
) -> dict[str, list[RawExample]]:
  """The raw files of every split, checked against the published numbers.

  Raises:
    InputError: none, two of one name, one whose name is no UTF-8, or another number than the
      published one.
  """
  builder.allow_partial = allow_partial
  splits = builder.examples(manual_dir)
  for split, raws in splits.items():
    repeated = [n for n, count in collections.Counter(r.id for r in raws).items() if count > 1]
    if repeated:
      raise InputError(
        f"{manual_dir}: expected {split} images of different names, got {repeated[0]} more than "
        "once; remove the copy"
      )
    if foreign := [raw.image for raw in raws if re.search("[\ud800-\udfff]", raw.id)]:
      raise InputError(f"{foreign[0]}: expected a name in UTF-8, got other bytes; rename the file")
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


# Changes


def describe(
  builder: SegmentationBuilder, splits: Mapping[str, Sequence[RawExample]], manual_dir: pathlib.Path
) -> Files:
  """Sizes and times of the images and labels of every split, and of the builder's class files."""
  listed: dict[str, Sequence[pathlib.Path]] = {
    split: [path for raw in raws for path in (raw.image, raw.label)]
    for split, raws in splits.items()
  }
  listed[CLASSES] = builder.class_files
  return {key: dict(_stamps(files, manual_dir)) for key, files in listed.items()}


def _stamps(
  files: Sequence[pathlib.Path], manual_dir: pathlib.Path
) -> Iterator[tuple[str, list[int]]]:
  for path in files:
    inside = path.is_relative_to(manual_dir)
    name = path.relative_to(manual_dir).as_posix() if inside else str(path)
    try:
      stat = path.stat()
    except OSError:  # whoever reads the file says so
      continue
    yield name, [stat.st_size, stat.st_mtime_ns]


def write(files: Files, folder: pathlib.Path) -> None:
  """Writes what `read` reads."""
  records.write_json(folder / FILE, {"files": files})


def read(folder: pathlib.Path) -> Files | None:
  """What a set was prepared from; None where that is not known, as of sets of version 0.2.0."""
  try:
    files = json.loads((folder / FILE).read_text(encoding="utf-8"))["files"]
    return {
      split: {name: [int(x) for x in stamp] for name, stamp in stamps.items()}
      for split, stamps in files.items()
    }
  except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
    return None


def changed_files(then: Files, now: Files, *, splits: bool) -> list[str]:
  """What is different in the files, with `splits` in which they are, too, in words; else []."""
  if CLASSES not in then:
    now = {key: files for key, files in now.items() if key != CLASSES}
  old = {name: (split, *stamp) for split, files in then.items() for name, stamp in files.items()}
  new = {name: (split, *stamp) for split, files in now.items() for name, stamp in files.items()}
  both = old.keys() & new.keys()
  found = {
    "added": new.keys() - old.keys(),
    "removed": old.keys() - new.keys(),
    "changed": {name for name in both if old[name][1:] != new[name][1:]},
    "in another split": {name for name in both if splits and old[name][0] != new[name][0]},
  }
  return [
    f"{len(names):,} file{'s' * (len(names) > 1)} {how}, such as {min(names)}"
    for how, names in found.items()
    if names
  ]


def changed_counts(then: Mapping[str, int], now: Mapping[str, int]) -> list[str]:
  """The same of a set of which only the number of images in each split is known."""
  return [
    f"{split} has {now.get(split, 0):,} images, had {then.get(split, 0):,}"
    for split in dict.fromkeys([*then, *now])
    if now.get(split, 0) != then.get(split, 0)
  ]


def changed_classes(then: Vocabulary, now: Vocabulary, names_from: str) -> list[str]:
  """What is different in the class names and in which of them are unseen, in words."""
  found = []
  if len(then.names) != len(now.names):
    found.append(f"{names_from} has {len(now.names)} names, had {len(then.names)}")
  for line, (old, new) in enumerate(zip(then.names, now.names), 1):
    if old != new:
      found.append(f"line {line} of {names_from} is {new!r}, was {old!r}")
      break
  old, new = ([c.names[i] for i in c.unseen] for c in (then, now))
  if not found and old != new:
    found.append(f"unseen are {', '.join(new) or 'none'}, were {', '.join(old) or 'none'}")
  return found
