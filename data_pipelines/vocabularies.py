"""What data sets call their classes, and how their label files number them.

The class names of the published sets are in `rpn_jax.base.vocabularies`; their splits, other
wordings and tables of raw ids are JSON files in the folder of the same name as this file. The table
in `data_pipelines/__init__.py` says which set takes which. Splits into seen and unseen classes are
those of RPN and ZegCLIP (VOC, COCO-Stuff) and MaskCLIP (Context).
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence

from data_pipelines import registry
from rpn_jax.base import vocabularies as class_names
from rpn_jax.base.errors import InputError
from rpn_jax.base.words import SEPARATOR, check_known

_FOLDER = pathlib.Path(__file__).parent / "vocabularies"

# Label of a pixel that belongs to no class; the wide one is for sets whose class ids reach 255.
IGNORE = 255
IGNORE_WIDE = 65535


@dataclasses.dataclass(frozen=True)
class Vocabulary:
  """The classes of a data set.

  Attributes:
    name: of the data set.
    names: prompted class names in id order; "a, b, c" lists synonyms.
    seen, unseen: class ids of the zero-shot split; without one, all are seen.
    ids: raw value in the label files -> class id or `ignore`.
    unlisted: "ignore" if a raw value outside `ids` carries no class, "error" if it is wrong.
    ignore: label of pixels without a class, 255 or 65535.
    scored_as: scored class of every prompted name. The identity, except where several names
      stand for the background.
    titles: what tables and legends call the scored classes where that is not what is prompted;
      () otherwise.
  """

  name: str
  names: tuple[str, ...]
  seen: tuple[int, ...]
  unseen: tuple[int, ...]
  ids: Mapping[int, int]
  unlisted: str
  ignore: int
  scored_as: tuple[int, ...]
  titles: tuple[str, ...] = ()

  @property
  def num_classes(self) -> int:
    """Number of scored classes."""
    return max(self.scored_as) + 1

  @property
  def evaluation_only(self) -> bool:
    """Whether several names are scored as one class, which a training loss cannot express."""
    return self.num_classes < len(self.names)


@dataclasses.dataclass(frozen=True)
class ClassFiles:
  """Where the vocabulary of a published set comes from; files are named without ".json".

  Attributes:
    names: file of the class names.
    count: number of prompted names, checked on loading.
    split: file of the seen and unseen class ids; without one, all are seen.
    ids: file of the table raw value -> class id; without one, raw value k is class k - 1.
    zero: class id of raw value 0; None for pixels without a class.
    shift: added to the class ids in `ids`.
    first: how many names of the file are classes, from the first on; None for all. The ids in `ids`
      behind them are class 0.
    scored: class as which all names from this position on are scored.
    background: whether the name "background" comes before those in the file.
    spaced: file of the names with their words apart, for the naming "spaced".
  """

  names: str
  count: int
  split: str = ""
  ids: str = ""
  zero: int | None = None
  shift: int = 0
  first: int | None = None
  scored: int | None = None
  background: bool = False
  spaced: str = ""


def load(name: str, naming: str = "dataset") -> Vocabulary:
  """The vocabulary of a registered data set.

  Args:
    name: as registered.
    naming: "dataset", the names in the data set's files; "maskclip", the wording MaskCLIP
      prompts with ("potted plant"); "spaced", context459 with its words apart; "catseg", "sclip",
      "clearclip", "proxyclip" or "itaclip", what the code of these prompts (`wordings.json`).

  Raises:
    InputError: an unknown name or naming, with the nearest known one; a damaged file; a set whose
      raw files bring the names (see `records.stored_vocabulary`).
  """
  row = registry.get(name)
  classes = registry.resolve(row.classes)
  if isinstance(classes, ClassFiles):
    return _from_files(name, classes, naming)
  check_known(f"naming of {name} ", naming, ["dataset"])
  if classes is None:
    raise InputError(f"{name} has no class names of its own: each prepared folder brings them")
  if isinstance(classes, Vocabulary):
    return classes
  return of_names(name, classes, row.unseen)


def of_names(
  name: str,
  names: Iterable[str],
  unseen_names: Iterable[str] = (),
  values: Sequence[int] | None = None,
) -> Vocabulary:
  """The vocabulary of a set with a list of class names.

  Args:
    name: of the data set.
    names: of the classes, in id order.
    unseen_names: those of `names` that the zero-shot setting does not train on.
    values: the value in the label files of every name; by default its position, from 0.
  """
  names, unseen_names = tuple(names), tuple(unseen_names)
  classes = tuple(range(len(names)))
  unseen = tuple(i for i in classes if names[i] in unseen_names)
  seen = tuple(i for i in classes if i not in unseen)
  ignore = IGNORE if len(names) <= IGNORE else IGNORE_WIDE
  ids = dict(zip(classes if values is None else values, classes, strict=True))
  return Vocabulary(name, names, seen, unseen, ids, "error", ignore, classes)


def namings(name: str) -> tuple[str, ...]:
  """The namings of a registered data set, see `load`."""
  classes = registry.get(name).classes
  return tuple(_namings(name, classes)) if isinstance(classes, ClassFiles) else ("dataset",)


def _namings(name: str, files: ClassFiles) -> dict[str, Callable[[], Sequence[str]]]:
  """Naming -> () -> prompted names of the classes in the files."""
  found = {"dataset": lambda: _own_names(files)}
  if name in _read("prompt_names_maskclip"):
    found["maskclip"] = lambda: _read("prompt_names_maskclip")[name]
  if files.spaced:
    found["spaced"] = lambda: _read(files.spaced)
  for naming, wordings in _read("wordings")["sets"].items():
    if name in wordings:
      found[naming] = functools.partial(_reworded, files, wordings[name])
  return found


def _own_names(files: ClassFiles) -> list[str]:
  return ["background"] * files.background + _read(files.names)[: files.first]


def _reworded(files: ClassFiles, wordings: Sequence[str]) -> list[str]:
  """The names as some entries of `wordings.json` have them; several for a class are synonyms."""
  names, prompted = _own_names(files), {}
  for wording in wordings:
    if wording == "joined":
      added = {name: [name.replace(" ", "")] for name in names if " " in name}
    else:
      added = _read("wordings")["wordings"][wording]
    for name, words in added.items():
      prompted[name] = prompted.get(name, []) + words
  return [SEPARATOR.join(prompted.get(name, [name])) for name in names]


@functools.cache
def _from_files(name: str, files: ClassFiles, naming: str) -> Vocabulary:
  namings = _namings(name, files)
  check_known(f"naming of {name} ", naming, namings)
  names = tuple(namings[naming]())
  if len(names) != files.count:
    raise InputError(
      f"expected {files.count} names of {name} ({naming}), got {len(names)} in {_FOLDER.name}; "
      "restore the file"
    )
  seen, unseen = tuple(range(files.count)), ()
  if files.split:
    split = _read(files.split)
    seen, unseen = tuple(split["seen"]), tuple(split["unseen"])
  scored_as = tuple(i if files.scored is None else min(i, files.scored) for i in range(files.count))
  ignore = IGNORE if max(scored_as) < IGNORE else IGNORE_WIDE
  if files.ids:
    first = files.first or files.count
    table = {int(raw): new for raw, new in _read(files.ids)["map"].items()}
    ids = {raw: new + files.shift if new < first else 0 for raw, new in table.items()}
    unlisted = "ignore"
  else:
    classes = files.count if files.scored is None else files.scored
    ids = {i if files.background else i + 1: i for i in range(classes)}
    unlisted = "error"
  # COCO-Stuff is the one set whose raw 0 is a class; its table says so.
  ids.setdefault(0, ignore if files.zero is None else files.zero)
  titles = () if files.scored is not None else tuple(_own_names(files))
  return Vocabulary(name, names, seen, unseen, ids, unlisted, ignore, scored_as, titles)


@functools.cache
def _read(file: str):
  if file in class_names.NAMES:
    return list(class_names.read(file))
  return class_names.load(_FOLDER / f"{file}.json")
