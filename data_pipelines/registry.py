"""The table of data sets: what `config.data.name`, `prepare NAME` and `prepare --list` know.

The rows of the sets that come with the project are in `data_pipelines/__init__.py`; a file of your
own adds one with `data_pipelines.register(...)` (docs/extending.md).
"""

import dataclasses
import importlib
from collections.abc import Callable, Sequence
from typing import Any

from rpn_jax.base.errors import InputError
from rpn_jax.base.words import check_known, check_names, composed


@dataclasses.dataclass(frozen=True)
class DataSet:
  """One row of the table; the fields are the arguments of `register`."""

  name: str
  classes: Any
  unseen: tuple[str, ...]
  builder: str | type | None
  prepared: str
  source: str | Callable | None

  def variant(self, c: Any) -> str | None:
    """`config.data.variant`, which is that of the training set alone."""
    return c.variant or None if self.name == c.name else None


# By name, in the order in which they were registered.
DATA_SETS: dict[str, DataSet] = {}


def register(
  name: str,
  builder: str | type | None = None,
  classes: Any = None,
  *,
  unseen: Sequence[str] = (),
  prepared: str = "",
  source: str | Callable | None = None,
) -> None:
  """Adds a data set, or replaces the one of that name, so that a notebook cell can run twice.

  What takes long to import may be given as a string "module:name"; it is imported when needed.

  Args:
    name: for `config.data.name`.
    builder: the `SegmentationBuilder` subclass that finds the raw files.
    classes: what the values in the label files mean: a list of class names, of which value k is
      the k-th, from 0; a `vocabularies.Vocabulary` or `ClassFiles`; None if the raw files bring the
      names (`SegmentationBuilder.own_classes`).
    unseen: names in the list of classes that the zero-shot setting does not train on.
    prepared: name for `prepare`, by default `name`; sets that only count the classes of the same
      files differently share one.
    source: in place of a builder, for data that need no preparation: a function
      (config.data, split) -> examples as `pipeline` describes them.

  Raises:
    InputError: neither a builder nor a source, or both; duplicate or unknown class names.
  """
  if (builder is None) == (source is None):
    raise InputError(f"data set {name!r}: expected either a builder or a source")
  if isinstance(classes, (list, tuple)):
    classes, unseen = check_names(classes), [composed(name) for name in unseen]
    for unseen_name in unseen:
      check_known(f"unseen class of {name} ", unseen_name, classes)
  DATA_SETS[name] = DataSet(name, classes, tuple(unseen), builder, prepared or name, source)


def get(name: str) -> DataSet:
  """The data set of this name.

  Raises:
    InputError: an unknown name, with the nearest known one.
  """
  check_known("data set ", name, DATA_SETS)
  return DATA_SETS[name]


def prepared_sets() -> dict[str, list[DataSet]]:
  """Name for `prepare` -> the data sets that read what it makes."""
  groups: dict[str, list[DataSet]] = {}
  for data_set in DATA_SETS.values():
    groups.setdefault(data_set.prepared, []).append(data_set)
  return groups


def builder_class(prepared: str) -> type:
  """The builder of a name for `prepare`.

  Raises:
    InputError: an unknown name, or a set that is not made from raw files.
  """
  groups = prepared_sets()
  check_known("data set ", prepared, groups)
  first = groups[prepared][0]
  if first.builder is None:
    raise InputError(f"{prepared} is not prepared from raw files; open it with {first.source}")
  return resolve(first.builder)


def license_of(name: str) -> str:
  """The terms of a data set, "" where its row names none."""
  row = get(name)
  return getattr(resolve(row.builder or row.source), "license", "")


def resolve(reference: Any) -> Any:
  """What a "module:name" stands for; anything but a string is returned as it is."""
  if not isinstance(reference, str):
    return reference
  module, _, name = reference.partition(":")
  return getattr(importlib.import_module(module), name)
