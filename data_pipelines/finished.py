"""Data sets that are prepared already: what they hold, and whether that is what is asked for."""

import os
import pathlib
from collections.abc import Mapping
from typing import Any

from data_pipelines import overview, raw_files, records
from data_pipelines.sources.builder import SegmentationBuilder
from rpn_jax.base import paths
from rpn_jax.base.errors import InputError

# Of how images and labels are read. Shards made by other rules are not continued. 2: images are
# turned upright by their EXIF data unless the label has the stored size; images of 16 bits are not
# clipped; labels that were saved with loss are refused. 3: images are read as for prediction: what
# is transparent lies on white, 16 bits are scaled where they use few of them, color profiles count
# in folders of one's own. 4: where no images are for val, those below a tenth of the hashes are.
READING_RULES = 4
_BEFORE = {
  1: "did not turn all images as their EXIF data says and took masks that were saved with loss",
  2: "used color profiles, transparency and few of 16 bits in another way than prediction does",
  3: "where no images were for val chose others for it, or none",
}


def report(
  cls: type[SegmentationBuilder],
  folder: pathlib.Path,
  manual_dir: str | os.PathLike | None,
  options: Mapping[str, Any],
) -> pathlib.Path:
  """Prints what a finished set holds, and returns its folder.

  Raises:
    InputError: it was made from another folder, or by other label values, than asked for, or its
      raw files have changed.
  """
  counts = records.count_examples(folder)
  summary = records.read_summary(folder)
  asked = None if manual_dir is None else str(paths.expand(manual_dir).resolve())
  if cls.own_classes and (asked or any(value is not None for value in options.values())):
    made_from = summary.get("manual_dir", asked)
    if asked not in (None, made_from):
      raise InputError(
        f"{folder} was prepared from {made_from}, got {asked}; prepare the new one under another "
        "name with --config=NAME, or replace the old one with --rebuild"
      )
    classes = records.stored_vocabulary(cls.name, folder.parents[2], folder.parent.name)
    positions = tuple(range(len(classes.ids)))
    made_with = {"values": tuple(classes.ids), "background": summary.get("background")}
    asked_for = {"values": options["values"] or positions, "background": options["background"]}
    for option in cls.options:
      if made_with[option] != asked_for[option]:
        made, got = (_as_typed(choice[option]) for choice in (made_with, asked_for))
        raise InputError(
          f"{folder} was prepared with --{option}={made}, got {got}; use the same, prepare it "
          "under another name with --config=NAME, or replace it with --rebuild"
        )
  notes, rules = [], summary.get("reading_rules", 1)
  if not cls.counts:  # published files are not edited, and are often deleted once they are prepared
    made_from = summary.get("manual_dir", asked)
    if made_from and os.path.isdir(made_from):
      by_split = rules == READING_RULES
      _check_unchanged(cls, folder, paths.expand(made_from), options, by_split)
    else:
      notes.append("not compared with its raw files, which are no longer there")
  if any(counts.get(split, 0) != count for split, count in cls.counts.items()):
    published = overview.count_text(cls.counts)
    notes.append(f"published: {published}; to take in more images, add --rebuild")
  # Images of published sets are JPEGs, which the third rules do not change, and have their splits.
  if summary and rules in _BEFORE and (rules == 1 or cls.own_classes):
    notes.append(f"by an earlier version, which {_BEFORE[rules]}; to read them anew, add --rebuild")
  note = f" ({'; '.join(notes)})" if notes else ""
  print(f"already prepared: {overview.count_text(counts)} in {folder}{note}")
  return folder


def _check_unchanged(
  cls: type[SegmentationBuilder],
  folder: pathlib.Path,
  manual_dir: pathlib.Path,
  options: Mapping[str, Any],
  by_split: bool,
) -> None:
  """Compares the raw files with those that a finished set was prepared from.

  Args:
    cls, folder, manual_dir, options: of the set.
    by_split: whether to compare in which split they are, too.

  Raises:
    InputError: they, or the class names beside them, have changed; says which.
  """
  data_dir, config = folder.parents[2], folder.parent.name
  builder = raw_files.make_builder(cls, data_dir, config, options)
  splits = raw_files.list_examples(builder, manual_dir, allow_partial=True)
  changes, then = [], raw_files.read(folder)
  if cls.own_classes:
    stored = records.stored_vocabulary(cls.name, data_dir, config)
    changes += raw_files.changed_classes(stored, builder.classes, cls.names_from)
  if then is None:
    counts, found = records.count_examples(folder), {s: len(raws) for s, raws in splits.items()}
    if not by_split:
      counts, found = ({"all": sum(each.values())} for each in (counts, found))
    changes += raw_files.changed_counts(counts, found)
  else:
    changes += raw_files.changed_files(
      then, raw_files.describe(builder, splits, manual_dir), splits=by_split
    )
  if changes:
    raise InputError(
      f"{manual_dir} has changed since {folder} was prepared from it: {'; '.join(changes)}; read "
      "it anew with --rebuild, or prepare it under another name with --config=NAME"
    )


def _as_typed(option: tuple[int, ...] | str | None) -> str:
  return ",".join(map(str, option)) if isinstance(option, tuple) else option or "none"
