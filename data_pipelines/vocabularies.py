"""Class names, seen/unseen splits and raw-id tables of the published data sets.

The data are JSON files in the folder of the same name; this module gives them names and checks
them. Splits are those of RPN and ZegCLIP (VOC, COCO-Stuff) and MaskCLIP (Context).
"""

import dataclasses
import difflib
import functools
import json
import pathlib
from collections.abc import Iterable, Mapping

from rpn_jax.base.errors import InputError

_FOLDER = pathlib.Path(__file__).parent / "vocabularies"

IGNORE = 255
IGNORE_WIDE = 65535  # of sets whose class ids reach 255


@dataclasses.dataclass(frozen=True)
class Vocabulary:
  """What a data set calls its classes and how its files number them.

  Attributes:
    name: as given to `load`.
    names: prompted class names in id order; "a, b, c" lists synonyms.
    seen, unseen: class ids of the zero-shot split; without one, all are seen.
    ids: raw value in the label files -> class id or `ignore`.
    unlisted: "ignore" if a raw value outside `ids` carries no class, "error" if it is wrong.
    ignore: label of pixels without a class, 255 or 65535.
    scored_as: scored class of every prompted name. The identity, except where several names
      stand for the background.
  """

  name: str
  names: tuple[str, ...]
  seen: tuple[int, ...]
  unseen: tuple[int, ...]
  ids: Mapping[int, int]
  unlisted: str
  ignore: int
  scored_as: tuple[int, ...]

  @property
  def num_classes(self) -> int:
    """Classes that are scored."""
    return max(self.scored_as) + 1


@dataclasses.dataclass(frozen=True)
class _Entry:
  """Where one vocabulary's parts are; files without their suffix."""

  names: str
  count: int  # names in the file
  split: str = ""
  ids: str = ""  # a table file; empty means raw = class id + 1, raw 0 as `zero`
  zero: int | None = None  # class id of raw 0; None: pixels without a class
  shift: int = 0  # added to the class ids of the table file
  scored: int | None = None  # names from this one on are all scored as this class
  background: bool = False  # "background" comes before the names of the file


_ENTRIES = {
  "voc20": _Entry("voc20", 20, split="voc_split"),
  # PAS-21: the background is a class like others, prompted with that word.
  "voc21": _Entry("voc20", 21, zero=0, background=True),
  # PAS-20b: 20 classes and a background that is prompted with 39 names of PASCAL Context.
  "voc20b": _Entry("voc20b_catseg", 59, zero=20, scored=20),
  "context59": _Entry("context59", 59, ids="context459id_to_59train"),
  "context60": _Entry(
    "context60", 60, split="context_split", ids="context459id_to_59train", zero=0, shift=1
  ),
  "context459": _Entry("context459", 459),
  "coco_stuff171": _Entry("coco_stuff171", 171, split="coco_split", ids="coco_stuff_raw_to_train"),
  "ade150": _Entry("ade150", 150),
  "ade847": _Entry("ade847", 847, ids="ade847_objectid_to_train"),
}

# Of data sets that are not this project's, by name: put yours here (docs/extending.md).
REGISTERED: dict[str, Vocabulary] = {}


def vocabulary_names() -> tuple[str, ...]:
  """The names of the published sets that `load` knows."""
  return tuple(_ENTRIES)


@functools.cache
def load(name: str, naming: str = "dataset") -> Vocabulary:
  """A vocabulary by name.

  Args:
    name: one of `vocabulary_names()`.
    naming: "dataset", the names in the data set's files; "maskclip", the wording MaskCLIP
      prompts with ("potted plant"); "spaced", context459 with its words apart.

  Raises:
    InputError: an unknown name or naming, with the nearest known one, or a damaged file.
  """
  if name in REGISTERED:
    _known(f"naming of {name}", naming, ["dataset"])
    return REGISTERED[name]
  _known("vocabulary", name, [*_ENTRIES, *REGISTERED])
  entry = _ENTRIES[name]
  namings = _namings(name)
  _known(f"naming of {name}", naming, namings)
  names = (("background",) if entry.background else ()) + tuple(namings[naming]())
  if len(names) != entry.count:
    raise InputError(
      f"expected {entry.count} names of {name} ({naming}), got {len(names)} in {_FOLDER.name}; "
      "restore the file"
    )
  seen, unseen = tuple(range(entry.count)), ()
  if entry.split:
    split = _read(entry.split)
    seen, unseen = tuple(split["seen"]), tuple(split["unseen"])
  scored_as = tuple(i if entry.scored is None else min(i, entry.scored) for i in range(entry.count))
  ignore = IGNORE if max(scored_as) < IGNORE else IGNORE_WIDE
  if entry.ids:
    ids = {int(raw): new + entry.shift for raw, new in _read(entry.ids)["map"].items()}
    unlisted = "ignore"
  else:
    classes = entry.count if entry.scored is None else entry.scored
    ids = {i if entry.background else i + 1: i for i in range(classes)}
    unlisted = "error"
  # COCO-Stuff is the one set whose raw 0 is a class; its table says so.
  ids.setdefault(0, ignore if entry.zero is None else entry.zero)
  return Vocabulary(name, names, seen, unseen, ids, unlisted, ignore, scored_as)


def of_names(name: str, names: Iterable[str], unseen_names: Iterable[str] = ()) -> Vocabulary:
  """The vocabulary of a set whose label files hold class ids themselves."""
  names, unseen_names = tuple(names), tuple(unseen_names)
  ids = tuple(range(len(names)))
  unseen = tuple(i for i in ids if names[i] in unseen_names)
  seen = tuple(i for i in ids if i not in unseen)
  ignore = IGNORE if len(ids) <= IGNORE else IGNORE_WIDE
  return Vocabulary(name, names, seen, unseen, {i: i for i in ids}, "error", ignore, ids)


def _namings(name: str) -> dict:
  """Naming -> a function that reads the names."""
  namings = {"dataset": lambda: _read(_ENTRIES[name].names)}
  if name in _read("prompt_names_maskclip"):
    namings["maskclip"] = lambda: _read("prompt_names_maskclip")[name]
  if name == "context459":
    namings["spaced"] = lambda: _read("context459_spaced")
  return namings


def _known(what: str, name: str, known: Iterable[str]) -> None:
  known = list(known)
  if name not in known:
    near = difflib.get_close_matches(name, known, 1, 0.0)
    raise InputError(
      f"{what} {name!r} is not known; did you mean {near[0]!r}? Known: {', '.join(known)}"
    )


@functools.cache
def _read(file: str):
  path = _FOLDER / f"{file}.json"
  try:
    return json.loads(path.read_text(encoding="utf-8"))
  except (OSError, ValueError) as error:
    raise InputError(
      f"expected a JSON file of this package at {path}, got {type(error).__name__}; reinstall it"
    ) from error
