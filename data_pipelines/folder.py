"""Anyone's own data: a folder of pictures, a folder of masks and a list of names."""

import hashlib
import json
import pathlib

import numpy as np

from data_pipelines import prepare, vocabularies
from data_pipelines.builder import RawExample, SegmentationBuilder, listed, need
from data_pipelines.limits import MAX_TEXT_BYTES
from rpn_jax.base.errors import InputError

_PICTURES = (".jpg", ".jpeg", ".png", ".webp")
_SPLITS = ("train", "val")


class Folder(SegmentationBuilder):
  """Masks of class ids: label k is line k + 1 of names.txt; 255 (or 65535) is no class.

  Without split folders one picture in ten becomes "val", chosen by a hash of its name. Each
  folder is prepared under a name, the TFDS config; `examples` reads its list of names.

  Attributes:
    classes: the vocabulary of names.txt and unseen.txt, once `examples` was called.
  """

  name = "folder"
  code_path = pathlib.Path(__file__)
  title = "your own data, as in names.txt"
  vocabulary = ""
  counts = {}  # noqa: RUF012
  obtain = "put the file there or remove its partner"
  licence = "yours"
  raw_size = "yours"
  layout = """images/{train,val}/*.{jpg,png,webp} (or all in images/: one in ten is for val)
labels/{train,val}/*.png (or all in labels/), named as the images; grey or palette, 8 or 16 bit
  whose values are class ids, 255 for no class (65535 where there are more than 255 classes)
names.txt (one class name per line; the first is class 0)
unseen.txt (may be missing: the names that are never trained on)"""
  wide = True
  classes: vocabularies.Vocabulary

  def examples(self, manual_dir):
    self.classes = _read_classes(manual_dir, self.obtain)
    images, labels = manual_dir / "images", manual_dir / "labels"
    splits = [s for s in _SPLITS if (images / s).is_dir()]
    if not splits:
      return _split(_pairs(images, labels, self.obtain), images)
    stray = [p for p in images.iterdir() if p.suffix.lower() in _PICTURES]
    if stray:
      raise InputError(
        f"{stray[0]}: expected pictures in images/train and images/val or all in images, got both; "
        "move this one into one of the two"
      )
    return {s: _pairs(images / s, labels / s, self.obtain) for s in splits}

  def allowed(self):
    table = np.zeros(65536, bool)
    table[[*self.classes.ids, self.classes.ignore]] = True
    return table


def vocabulary(data_dir: str | pathlib.Path, name: str) -> vocabularies.Vocabulary:
  """The class names of a prepared folder.

  Raises:
    InputError: no folder is prepared under this name.
  """
  path = prepare.prepared_folder("folder", data_dir, name) / "names.json"
  try:
    classes = json.loads(path.read_text(encoding="utf-8"))
    return vocabularies.of_names("folder", classes["names"], classes["unseen"])
  except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
    raise InputError(
      f"{path}: expected the names of a prepared folder, got {type(error).__name__}; "
      f"delete {path.parent} and prepare it again"
    ) from error


def _read_classes(manual_dir: pathlib.Path, obtain: str) -> vocabularies.Vocabulary:
  path = need(manual_dir / "names.txt", "the class names, one per line", obtain)
  names, unseen = _read_lines(path), []
  if len(names) > vocabularies.IGNORE_WIDE:
    raise InputError(
      f"{path}: expected at most {vocabularies.IGNORE_WIDE} names, got {len(names)}; "
      "masks have 16 bits"
    )
  if (manual_dir / "unseen.txt").exists():
    unseen = _read_lines(manual_dir / "unseen.txt")
    unknown = [name for name in unseen if name not in names]
    if unknown or len(unseen) == len(names):
      got = f"{unknown[0]!r}, which is not one" if unknown else "all of them"
      raise InputError(
        f"{manual_dir / 'unseen.txt'}: expected some of the names in names.txt, got {got}; "
        "write them as there"
      )
  return vocabularies.of_names("folder", names, unseen)


def _read_lines(path: pathlib.Path) -> list[str]:
  """Names of a text file, none blank and none twice, since the line number is the id."""
  if path.stat().st_size > MAX_TEXT_BYTES:
    raise InputError(f"{path}: expected at most {MAX_TEXT_BYTES >> 20} MiB of names; shorten it")
  try:
    lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
  except UnicodeDecodeError as error:
    raise InputError(f"{path}: expected text in UTF-8, got other bytes; save it anew") from error
  if not lines:
    raise InputError(f"{path}: expected one name per line, got an empty file; write the names")
  first = {}
  for number, line in enumerate(lines, 1):
    if not line or first.setdefault(line, number) != number:
      got = f"{line!r} in lines {first[line]} and {number}" if line else f"none in line {number}"
      raise InputError(f"{path}: expected a name of its own in every line, got {got}; correct it")
  return lines


def _pairs(images: pathlib.Path, labels: pathlib.Path, obtain: str) -> list[RawExample]:
  """Pictures with their masks, sorted by name."""
  pictures = listed(images, _PICTURES, "pictures", obtain)
  masks = {p.stem: p for p in listed(labels, (".png",), "masks", obtain)}
  by_name = {}
  for picture in pictures:
    if picture.stem in by_name:
      raise InputError(
        f"{picture}: expected one picture of this name, got {by_name[picture.stem].name} too; "
        "rename one and its mask"
      )
    if picture.stem not in masks:
      raise InputError(
        f"{labels / picture.stem}.png: expected the mask of {picture}, got no such file; {obtain}"
      )
    by_name[picture.stem] = picture
  for name, mask in masks.items():
    if name not in by_name:
      raise InputError(
        f"{images / name}.*: expected the picture of {mask}, got no such file; {obtain}"
      )
  return [RawExample(name, by_name[name], masks[name]) for name in sorted(by_name)]


def _split(examples: list[RawExample], images: pathlib.Path) -> dict[str, list[RawExample]]:
  """A tenth for val, at least one: those whose names hash lowest."""
  if len(examples) < 2:
    raise InputError(
      f"{images}: expected at least two pictures, one to train on and one to test on, got one"
    )
  order = sorted(examples, key=lambda raw: hashlib.sha256(raw.id.encode()).digest())
  chosen = {raw.id for raw in order[: max(1, round(len(examples) / 10))]}
  return {
    "train": [raw for raw in examples if raw.id not in chosen],
    "val": [raw for raw in examples if raw.id in chosen],
  }
