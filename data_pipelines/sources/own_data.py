"""What the forms of people's own data share: class names, splits, images by name, painting.

The rules are the same in all of them. Of annotations that overlap the smaller is on top, and of two
equal ones the later. Pixels without annotation have no class, or that of `--background`. Without
images for evaluation, one in ten of the others is kept for it.
"""

import hashlib
import json
import os
import pathlib
import re
import urllib.parse
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from data_pipelines import vocabularies
from data_pipelines.sources.builder import Painted, RawExample, SegmentationBuilder
from data_pipelines.sources.files import read_lines
from rpn_jax.base import exif, pictures
from rpn_jax.base.errors import InputError
from rpn_jax.base.words import composed

# Words in the names of files and folders -> split; "test" is left out.
_SPLIT_WORDS = {
  "train": "train", "training": "train",
  "val": "val", "valid": "val", "validation": "val",
  "test": "test", "testing": "test",
}  # fmt: skip
# Names that annotation tools give to pixels that do not count, and to those of no object.
IGNORED_NAMES = ("__ignore__", "ignored")
_TENTH = (2**256 // 10).to_bytes(32, "big")  # of the values of SHA-256
BACKGROUND_NAMES = ("_background_", "__background__", "background")


class Annotations(SegmentationBuilder):
  """Data sets of annotated images, whose class names stand in the annotations.

  Labels are class ids, 255 (or 65535) for no class.
  """

  own_classes = True
  counts = {}  # noqa: RUF012
  obtain = "put the file there, or remove what names it"
  license = "yours"
  raw_size = "yours"
  wide = True
  options = ("background",)

  def set_classes(self, manual_dir: pathlib.Path, names: Iterable[str]) -> dict[str, int]:
    """Sets `classes` from names in any number, and unseen.txt.

    Returns:
      The label of every name; of those that annotation tools give to pixels of no object, too.

    Raises:
      InputError: no names, too many, or an unseen.txt that does not fit them.
    """
    classes = [n for n in dict.fromkeys(map(clean, names)) if n not in IGNORED_NAMES]
    classes = [n for n in classes if n != BACKGROUND_NAMES[0]]
    if "" in classes:
      raise InputError(
        f"{manual_dir}: expected a name for every class, got an empty one in {self.names_from}; "
        "name it there"
      )
    if self.background is not None:
      chosen = clean(self.background)
      if not chosen:
        raise InputError("--background: expected the name of a class, got none; name it")
      classes = classes if chosen in classes else [chosen, *classes]
    if not 0 < len(classes) <= vocabularies.IGNORE_WIDE:
      raise InputError(
        f"{manual_dir}: expected 1 to {vocabularies.IGNORE_WIDE} classes in {self.names_from}, got "
        f"{len(classes)}; check that this is the folder of the annotations"
      )
    unseen = read_unseen(manual_dir, classes, self.names_from)
    self.classes = vocabularies.of_names(self.name, classes, unseen)
    labels = {name: i for i, name in enumerate(classes)}
    labels |= dict.fromkeys(IGNORED_NAMES, self.classes.ignore)
    return {BACKGROUND_NAMES[0]: self.unannotated, **labels}

  @property
  def unannotated(self) -> int:
    """The label of pixels without annotation; after `set_classes`."""
    if self.background is None:
      return self.classes.ignore
    return self.classes.names.index(clean(self.background))

  def canvas(self, shape: tuple[int, int]) -> "Canvas":
    """An image (H, W) without annotations, to paint them on."""
    return Canvas(shape, self.unannotated, self.classes.ignore)


class Canvas:
  """A label map that annotations are painted on, the smaller ones on top."""

  def __init__(self, shape: tuple[int, int], unannotated: int, ignore: int):
    self._label = np.full(shape, unannotated, np.uint16)
    self._empty = 0
    self._area = np.full(shape, np.iinfo(np.int32).max, np.int32)  # of what is on top
    self._ignore = ignore

  def paint(self, mask_HxW: np.ndarray, label: int) -> None:
    """Gives the pixels of a mask a label, where nothing smaller is on top."""
    area = int(mask_HxW.sum())
    self._empty += not area
    where = mask_HxW & (self._area >= area)
    self._label[where] = label
    self._area[where] = area

  def leave_open(self, box: Sequence[float]) -> None:
    """Gives pixels of a box (x, y, width, height) that nothing else covers no class."""
    x, y, width, height = box
    rows = slice(max(0, int(y)), max(0, int(np.ceil(y + height))))
    columns = slice(max(0, int(x)), max(0, int(np.ceil(x + width))))
    free = self._area[rows, columns] == np.iinfo(np.int32).max
    self._label[rows, columns][free] = self._ignore

  def painted(self) -> Painted:
    """The label map, uint16 [H,W], and how many masks had no pixel."""
    return Painted(self._label, self._empty)


class ImageFiles:
  """The files below a folder, but for those in some others, by the ends of their paths."""

  def __init__(self, folder: pathlib.Path, without: Sequence[pathlib.Path] = ()):
    self.folder = folder
    self._by_name: dict[str, list[pathlib.Path]] = {}
    for parent, folders, files in os.walk(folder):
      folders[:] = sorted(name for name in folders if not name.startswith("."))
      here = folder / os.path.relpath(parent, folder)
      folders[:] = [name for name in folders if here / name not in without]
      for name in sorted(files):
        if not name.startswith("."):
          self._by_name.setdefault(_with_small_suffix(composed(name)), []).append(here / name)

  def find(self, name: str, split: str | None = None) -> pathlib.Path | None:
    """The file whose path ends in a name with "/" or "\\\\"; None if there is none.

    Of a path that leads out of the folder, as from another machine, and of an address as much of
    the end counts as any file has. In a folder of another split than the given one is another image
    of this name. Suffixes may differ in the case of their letters.

    Raises:
      InputError: several files.
    """
    foreign = bool(re.match(r"[\\/]|[A-Za-z][\w+.-]*:|\.\.", name))
    # Label Studio's addresses of files on its own disk are /data/local-files/?d=PATH.
    parts = [composed(part) for part in re.split(r"[\\/]+|\?d=", name) if part not in ("", ".")]
    parts = [part for part in parts if part != ".." and not re.fullmatch("[A-Za-z]:", part)]
    found = self._find(parts, split, foreign)
    if found is None and foreign and "%" in name:  # as addresses have blanks, and other letters
      return self._find([composed(urllib.parse.unquote(part)) for part in parts], split, foreign)
    return found

  def _find(self, parts: list[str], split: str | None, foreign: bool) -> pathlib.Path | None:
    while parts:
      found = self._by_name.get(_with_small_suffix(parts[-1]), [])
      found = [p for p in found if self._ends_in(p, parts)]
      found = [p for p in found if composed(p.name) == parts[-1]] or found
      found = [p for p in found if split is None or self._split_of(p) in (None, split)]
      found = [p for p in found if self._split_of(p) == split] or found
      if len(found) > 1:
        raise InputError(
          f"{self.folder}: expected one file {'/'.join(parts)}, got {found[0]} and {found[1]}; "
          "remove one of them, or put the parts of the data set into folders named train and val"
        )
      if found:
        return found[0]
      if not foreign:
        return None
      parts = parts[1:]
    return None

  def with_suffixes(self, suffixes: Sequence[str]) -> list[pathlib.Path]:
    """All files with one of some suffixes in lower case, by path."""
    files = (path for paths in self._by_name.values() for path in paths)
    return sorted(path for path in files if path.suffix.lower() in suffixes)

  def _split_of(self, path: pathlib.Path) -> str | None:
    return split_of(path.relative_to(self.folder).parent)

  def _ends_in(self, path: pathlib.Path, parts: Sequence[str]) -> bool:
    ending = path.relative_to(self.folder).parts[-len(parts) : -1]
    return [composed(part) for part in ending] == [*parts[:-1]]


def _with_small_suffix(name: str) -> str:
  stem, dot, suffix = name.rpartition(".")
  return f"{stem}.{suffix.lower()}" if dot else name


def clean(name: str) -> str:
  """A class name as it is compared and stored."""
  return composed(" ".join(str(name).split()))


def split_of(path: pathlib.PurePath) -> str | None:
  """ "train", "val" or "test", by the words in a relative path, the last one first."""
  for part in reversed(path.parts):
    words = [_SPLIT_WORDS.get(word) for word in re.split(r"[^a-z]+", part.lower())]
    if found := [word for word in words if word]:
      return found[-1]
  return None


def into_splits(
  found: Mapping[str | None, list[RawExample]], where: object
) -> dict[str, list[RawExample]]:
  """Train and val of examples by the split that their names tell, None for those that tell none.

  Raises:
    InputError: some tell it and some do not, or there are too few to split.
  """
  found = {split: examples for split, examples in found.items() if examples}
  test = found.pop("test", None)
  if test:
    first = test[0].image
    print(f"{where}: left out, as images for tests: {len(test):,}, such as {first}", flush=True)
  if None in found and len(found) > 1:
    raise InputError(
      f"{where}: expected all images in train and val or none, got also {found[None][0].label}, "
      "which is in neither; move it, or name the file or its folder train or val"
    )
  train, val = ({raw.image for raw in found.get(split, ())} for split in ("train", "val"))
  if both := train & val:
    print(
      f"{where}: images in train and in val: {len(both):,}, such as {min(both)}; scores will be of "
      "images that were trained on",
      flush=True,
    )
  if {*found} <= {None, "train"}:
    return one_in_ten([raw for examples in found.values() for raw in examples], where)
  return {split: found[split] for split in ("train", "val") if split in found}


def one_in_ten(examples: list[RawExample], where: object) -> dict[str, list[RawExample]]:
  """About a tenth for val, at least one and not all: those whose names hash below a tenth.

  So images that are added later never bring one to val that was trained on.

  Raises:
    InputError: fewer than two.
  """
  if len(examples) < 2:
    got = "one" if examples else "none"
    raise InputError(
      f"{where}: expected at least two images, one to train on and one to test on, got {got}"
    )
  # Names that are no UTF-8 are refused later, as in sets whose parts are told.
  names = {raw.id: raw.id.encode("utf-8", "surrogatepass") for raw in examples}
  hashes = {name: hashlib.sha256(encoded).digest() for name, encoded in names.items()}
  below = sum(value < _TENTH for value in hashes.values())
  chosen = {*sorted(hashes, key=hashes.__getitem__)[: min(max(1, below), len(hashes) - 1)]}
  return {
    "train": [raw for raw in examples if raw.id not in chosen],
    "val": [raw for raw in examples if raw.id in chosen],
  }


def read_unseen(manual_dir: pathlib.Path, names: Sequence[str], names_from: str) -> list[str]:
  """The names in unseen.txt, [] without the file.

  Raises:
    InputError: names that are not among the others, or all of them.
  """
  path = manual_dir / "unseen.txt"
  if not path.exists():
    return []
  lines = read_lines(path, "class names, one per line,")
  unseen = [clean(line) for line in lines if line]
  unknown = [name for name in unseen if name not in names]
  if unknown or len(unseen) == len(names):
    got = f"{unknown[0]!r}, which is not one" if unknown else "all of them"
    raise InputError(
      f"{path}: expected some of the names in {names_from}, got {got}; write them as there"
    )
  return unseen


def read_json(path: pathlib.Path, what: str):
  """The content of a JSON file.

  Raises:
    InputError: unreadable, or no JSON.
  """
  try:
    with path.open(encoding="utf-8-sig") as file:
      return json.load(file)
  except (OSError, ValueError, RecursionError) as error:
    raise InputError(
      f"{path}: expected {what} as JSON, got {type(error).__name__} "
      f"({' '.join(str(error).split())}); export it again"
    ) from error


def told_size(where: str, height: Any, width: Any) -> tuple[int, int] | None:
  """(height, width) in pixels as JSON files tell it, also as 40.0 or "40"; None without one.

  Args:
    where: the file, and the image in it.
    height, width: in the file; None if it is not there.

  Raises:
    InputError: something else than two positive whole numbers.
  """
  if height is None or width is None:
    return None
  sides = []
  for side in (height, width):
    is_number = isinstance(side, (int, float)) and not isinstance(side, bool)
    is_digits = isinstance(side, str) and re.fullmatch("[0-9]{1,9}", side)
    if not (is_number or is_digits) or not 0 < float(side) < 1e9 or float(side) % 1:
      raise InputError(
        f"{where}: expected height and width in pixels, got {height!r:.20} and {width!r:.20}; "
        "correct both, or remove both: then those of the image count"
      )
    sides.append(int(float(side)))
  return sides[0], sides[1]


def upright_size(file: Image.Image, where: object) -> tuple[int, int]:
  """(height, width) of an opened image, turned as its EXIF data says.

  Raises:
    InputError: too many pixels.
  """
  pictures.check_size(where, file.size)
  width, height = file.size
  turned = exif.orientation(file) in exif.ON_ITS_SIDE
  return (width, height) if turned else (height, width)


def size_of(path: pathlib.Path) -> tuple[int, int]:
  """`upright_size` of an image file.

  Raises:
    InputError: unreadable.
  """
  try:
    with Image.open(path) as file:
      return upright_size(file, path)
  except InputError:
    raise
  except Exception as error:  # damage surfaces as a dozen kinds
    raise InputError(
      f"{path}: expected a readable image, got {pictures.damage(error)}; replace the file"
    ) from error
