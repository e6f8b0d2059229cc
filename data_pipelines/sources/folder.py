"""Your own data: a folder of images, a folder of masks and a list of class names."""

import hashlib
import pathlib
from collections.abc import Sequence

from data_pipelines import vocabularies
from data_pipelines.sources.builder import RawExample, SegmentationBuilder
from data_pipelines.sources.files import list_files, read_lines, require
from rpn_jax.base.errors import InputError
from rpn_jax.base.picture_files import SUFFIXES, list_images
from rpn_jax.base.words import composed

_SPLITS = ("train", "val")


class Folder(SegmentationBuilder):
  """Masks of class ids: label k is line k + 1 of names.txt; 255 (or 65535) is no class.

  Without split folders one image in ten becomes "val", chosen by a hash of its name.
  """

  name = "folder"
  title = "your own data, as in names.txt"
  own_classes = True
  counts = {}  # noqa: RUF012
  obtain = "put the file there or remove its partner"
  license = "yours"
  raw_size = "yours"
  layout = """images/{train,val}/*.{jpg,png,webp} (or all in images/: one in ten is for val)
labels/{train,val}/*.png (or all in labels/), named as the images; gray or palette, 8 or 16 bit
  whose values are class ids, 255 for no class (65535 where there are more than 255 classes)
names.txt (one class name per line; the first is class 0, or the first of --values)
unseen.txt (may be missing: the names that are never trained on)"""
  wide = True

  def examples(self, manual_dir):
    self.classes = read_classes(manual_dir, self.obtain, self.values)
    images, labels = manual_dir / "images", manual_dir / "labels"
    splits = [s for s in _SPLITS if (images / s).is_dir()]
    if not splits:
      return _split(_pairs(images, labels, self.obtain), images)
    if stray := list_images(images):
      raise InputError(
        f"{stray[0]}: expected images in images/train and images/val or all in images, got both; "
        "move this one into one of the two"
      )
    return {s: _pairs(images / s, labels / s, self.obtain) for s in splits}

  def wrong_values_remedy(self, values):
    # A mask with as many values as there are names probably shows every class once.
    shown = values if len(values) == len(self.classes.names) else ["VALUE", "VALUE", "…"]
    return (
      f"if they stand for classes, add --values={','.join(map(str, shown))}: the mask value of "
      "every name in names.txt, in order"
    )


def read_classes(
  manual_dir: pathlib.Path, obtain: str, values: Sequence[int] | None = None
) -> vocabularies.Vocabulary:
  """The classes in names.txt and unseen.txt.

  Args:
    manual_dir: the folder with the two files.
    obtain: what to do about a missing file.
    values: the mask value of every name; None for its position.

  Raises:
    InputError: no such file, damaged files, or values that do not fit the names.
  """
  path = require(manual_dir / "names.txt", "the class names, one per line", obtain)
  names, unseen = _read_names(path), []
  if len(names) > vocabularies.IGNORE_WIDE:
    raise InputError(
      f"{path}: expected at most {vocabularies.IGNORE_WIDE} names, got {len(names)}; "
      "masks have 16 bits"
    )
  if (manual_dir / "unseen.txt").exists():
    unseen = _read_names(manual_dir / "unseen.txt")
    unknown = [name for name in unseen if name not in names]
    if unknown or len(unseen) == len(names):
      got = f"{unknown[0]!r}, which is not one" if unknown else "all of them"
      raise InputError(
        f"{manual_dir / 'unseen.txt'}: expected some of the names in names.txt, got {got}; "
        "write them as there"
      )
  if values is not None:
    distinct = len(set(values)) == len(values) == len(names)
    if not distinct or not all(0 <= value <= 65535 for value in values):
      raise InputError(
        f"--values={','.join(map(str, values))}: expected a different number in 0…65535 for each "
        f"of the {len(names)} names in {path}"
      )
  return vocabularies.of_names("folder", names, unseen, values)


def _read_names(path: pathlib.Path) -> list[str]:
  """Names of a text file, none blank and none twice, since the line number is the id."""
  names = [composed(line) for line in read_lines(path, "class names, one per line,")]
  if not names:
    raise InputError(f"{path}: expected one name per line, got an empty file; write the names")
  first = {}
  for number, name in enumerate(names, 1):
    if not name or first.setdefault(name, number) != number:
      got = f"{name!r} in lines {first[name]} and {number}" if name else f"none in line {number}"
      raise InputError(f"{path}: expected a different name in every line, got {got}; correct it")
  return names


def _pairs(images: pathlib.Path, labels: pathlib.Path, obtain: str) -> list[RawExample]:
  """Images with their masks, sorted by name."""
  by_name = _by_name(list_files(images, SUFFIXES, "images", obtain), "image")
  masks = _by_name(list_files(labels, (".png",), "masks", obtain), "mask")
  no_mask, no_image = sorted({*by_name} - {*masks}), sorted({*masks} - {*by_name})
  alone = [
    *(f"{labels / n}.png: expected the mask of {by_name[n]}, got no such file" for n in no_mask),
    *(f"{images / n}.*: expected the image of {masks[n]}, got no such file" for n in no_image),
  ]
  if alone:
    more = f"; the same for {len(alone) - 1} more: " if len(alone) > 1 else ""
    others = ", ".join(line.partition(": ")[0] for line in alone[1:])
    raise InputError(f"{alone[0]}; {obtain}{more}{others}")
  return [RawExample(name, by_name[name], masks[name]) for name in sorted(by_name)]


def _by_name(files: list[pathlib.Path], what: str) -> dict[str, pathlib.Path]:
  """Name without suffix -> file. Names that look alike are alike: an é is one letter or two."""
  found: dict[str, pathlib.Path] = {}
  for file in files:
    name = composed(file.stem)
    if name in found:
      raise InputError(
        f"{file}: expected one {what} of this name, got {found[name].name} too; rename one and its "
        "partner"
      )
    found[name] = file
  return found


def _split(examples: list[RawExample], images: pathlib.Path) -> dict[str, list[RawExample]]:
  """A tenth for val, at least one: those whose names hash lowest."""
  if len(examples) < 2:
    raise InputError(
      f"{images}: expected at least two images, one to train on and one to test on, got one"
    )
  order = sorted(examples, key=lambda raw: hashlib.sha256(raw.id.encode()).digest())
  chosen = {raw.id for raw in order[: max(1, round(len(examples) / 10))]}
  return {
    "train": [raw for raw in examples if raw.id not in chosen],
    "val": [raw for raw in examples if raw.id in chosen],
  }
