"""What `prepare --list` prints: every data set, and what of it is prepared."""

import itertools
import os
import pathlib

from data_pipelines import downloads, records, registry, vocabularies
from rpn_jax.base.errors import InputError


def describe_sets(data_dir: str | os.PathLike) -> str:
  """Every data set: what it is, where its files come from, and what of it is prepared."""
  parts = []
  for name, data_sets in registry.prepared_sets().items():
    if data_sets[0].builder is None:
      sets = ", ".join(_describe(row) for row in data_sets)
      parts.append(f"{name}: needs no raw files\n  sets      {sets}")
      continue
    cls = registry.builder_class(name)
    lines = [f"{name}: {cls.title}", f"  images    {count_text(cls.counts) or 'any number'}"]
    lines += [f"  raw size  {cls.raw_size}", f"  license   {cls.license}"]
    lines.append(f"  obtain    {cls.obtain}")
    lines += [f"  download  {text}" for text in _download(name)]
    for word, line in itertools.zip_longest(["layout"], cls.layout.splitlines(), fillvalue=""):
      lines.append(f"  {word:<8}  {line}")
    lines.append(f"  sets      {', '.join(map(_describe, data_sets))}")
    states = [_state(folder) for folder in records.folders_of(cls, data_dir)]
    lines += [f"  prepared  {state}" for state in states or ["no"]]
    parts.append("\n".join(lines))
  return "\n\n".join(parts)


def _describe(data_set: registry.DataSet) -> str:
  """`voc20 (20 classes, 5 unseen)`."""
  if data_set.classes is None:
    return data_set.name
  vocabulary = vocabularies.load(data_set.name)
  facts = [f"{vocabulary.num_classes} classes"]
  if vocabulary.unseen:
    facts.append(f"{len(vocabulary.unseen)} unseen")
  if vocabulary.evaluation_only:
    facts.append("evaluation only")
  return f"{data_set.name} ({', '.join(facts)})"


def _download(name: str) -> list[str]:
  """What `--download` does, in at most one line."""
  found = downloads.files(name)
  if not found:
    return []
  fetched, unpacked = (sum(sizes) / 1e9 for sizes in zip(*((f.size, f.unpacked) for f in found)))
  size = f"{fetched:.1f} GB, {unpacked:.1f} GB unpacked"
  if all(file.urls for file in found):
    return [f"--download fetches {size}"]
  return [f"needs an account; --download unpacks what you put into archives: {size}"]


def _state(folder: pathlib.Path) -> str:
  try:
    return f"{count_text(records.count_examples(folder))} in {folder}"
  except InputError as error:
    return f"damaged: {error}"


def count_text(counts: dict[str, int]) -> str:
  """`7 train, 2 val`."""
  return ", ".join(f"{count:,} {split}" for split, count in counts.items())
