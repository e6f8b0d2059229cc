"""Your own data: a folder of images, a folder of masks and a list of class names."""

import functools
import os
import pathlib
from collections.abc import Sequence

from data_pipelines import vocabularies
from data_pipelines.sources import class_file
from data_pipelines.sources.builder import RawExample, SegmentationBuilder
from data_pipelines.sources.files import COLORS_REMEDY, ColorTable, list_files, require
from data_pipelines.sources.own_data import into_splits, read_unseen, split_of
from rpn_jax.base.errors import InputError
from rpn_jax.base.picture_files import SUFFIXES, folders_of_images, list_images
from rpn_jax.base.words import composed

_MASK_SUFFIXES = (".png", ".bmp", ".gif", ".tif", ".tiff")
_LOSSY_SUFFIXES = (".jpg", ".jpeg", ".webp")
# The first that is there counts.
_CLASS_FILES = (class_file.LABELMAP, "names.txt")


class Folder(SegmentationBuilder):
  """Masks of class ids: label k is line k + 1 of names.txt; 255 (or 65535) is no class.

  Without a folder of images for evaluation one in ten becomes "val", by a hash of its name.
  """

  name = "folder"
  title = "your own data, as in names.txt"
  own_classes = True
  options = ("values",)
  counts = {}  # noqa: RUF012
  obtain = "put the file there or remove its partner"
  license = "yours"
  raw_size = "yours"
  layout = """images/{train,val}/*.{jpg,png,webp} (or all in images/; without val one in ten is for
  val; folders may also be named training, valid or validation; test is left out)
labels/{train,val}/*.png (or all in labels/), named as the images; gray or palette, 8 or 16 bit
  whose values are class ids, 255 for no class (65535 where there are more than 255 classes)
names.txt (one class name per line; the first is class 0, or the first of --values); for masks of
  colors a line is NAME:RED,GREEN,BLUE; or CVAT's labelmap.txt
unseen.txt (may be missing: the names that are never trained on)"""
  wide = True
  colors_remedy = (
    f"{COLORS_REMEDY}, or write the color of every class behind its name in names.txt, as in "
    "road:128,64,128"
  )

  def examples(self, manual_dir):
    self.classes, colors = read_classes(manual_dir, self.obtain, self.values)
    self.by_color = colors is not None
    if self.by_color:  # without, the names are all that it says
      self.class_files = [manual_dir / name for name in _CLASS_FILES]
    images, labels = manual_dir / "images", manual_dir / "labels"
    found: dict[str | None, list[RawExample]] = {}
    missing: list[str] = []
    for folder in _split_folders(images, labels):
      split = split_of(pathlib.PurePath(folder.name))
      if split == "test":  # its masks are often not there
        raws = [RawExample(file.stem, file, file) for file in list_images(folder)]
      else:
        raws, alone = _pairs(folder, labels / folder.name, self.obtain, colors)
        missing += alone
      found.setdefault(split, []).extend(raws)
    if not found:
      found[None], missing = _pairs(images, labels, self.obtain, colors)
    self.leave_out(missing)
    return into_splits(found, images)

  def wrong_values_remedy(self, values):
    count = len(self.classes.names)
    if len(values) > 2 * count + 2:
      return (
        f"{len(values)} values of {count} classes are those of smoothed edges, of a mask that was "
        "once a JPEG, or of scores: export the masks anew as PNG, without smoothing"
      )
    # A mask with as many values as there are names probably shows every class once.
    shown = values if len(values) == count else ["VALUE", "VALUE", "…"]
    return (
      f"if they stand for classes, add --values={','.join(map(str, shown))}: the mask value of "
      "every name in names.txt, in order"
    )


def read_classes(
  manual_dir: pathlib.Path, obtain: str, values: Sequence[int] | None = None
) -> tuple[vocabularies.Vocabulary, ColorTable | None]:
  """The classes in names.txt, or CVAT's labelmap.txt, and unseen.txt, and the colors of the masks.

  Args:
    manual_dir: the folder with the two files.
    obtain: what to do about a missing file.
    values: the mask value of every name; None for its position.

  Returns:
    The vocabulary, and what reads masks of colors if the file has colors.

  Raises:
    InputError: no such file, damaged files, or values that do not fit the names.
  """
  path = manual_dir / class_file.LABELMAP
  if not path.exists():
    path = require(manual_dir / "names.txt", "the class names, one per line", obtain)
  listed = class_file.read(path)
  names = listed.classes
  if not 0 < len(names) <= vocabularies.IGNORE_WIDE:
    raise InputError(
      f"{path}: expected at most {vocabularies.IGNORE_WIDE} names, got {len(names)}; "
      "masks have 16 bits"
    )
  unseen = read_unseen(manual_dir, names, path.name)
  if values is not None:
    if listed.colors:
      raise InputError(
        f"{path}: expected colors or --values, got both; leave --values out, or the colors"
      )
    distinct = len(set(values)) == len(values) == len(names)
    if not distinct or not all(0 <= value <= 65535 for value in values):
      raise InputError(
        f"--values={','.join(map(str, values))}: expected a different number in 0…65535 for each "
        f"of the {len(names)} names in {path}"
      )
  classes = vocabularies.of_names("folder", names, unseen, values)
  if not listed.colors:
    return classes, None
  labels = {name: i for i, name in enumerate(names)}
  return classes, listed.table({name: labels.get(name, classes.ignore) for name in listed.names})


def _split_folders(images: pathlib.Path, labels: pathlib.Path) -> list[pathlib.Path]:
  """The folders in `images` whose names tell a split.

  Raises:
    InputError: images in another folder, at any depth, or beside such folders; a folder of masks
      without one of images.
  """
  if not images.is_dir():  # who lists the images says so
    return []
  folders = [f for f in sorted(images.iterdir()) if f.is_dir() and not f.name.startswith(".")]
  splits = [folder for folder in folders if split_of(pathlib.PurePath(folder.name))]
  for root in (images, *splits):  # which may be links
    for parent, below, _ in os.walk(root):
      below[:] = sorted(name for name in below if not name.startswith("."))
      here = root / os.path.relpath(parent, root)
      if others := [folder for folder in folders_of_images(here) if folder not in splits]:
        raise InputError(
          f"{others[0]}: expected images in images/train and images/val or all in images, got "
          "some in this folder; move them, or name it train, val or test in images"
        )
  if splits and (stray := list_images(images)):
    raise InputError(
      f"{stray[0]}: expected images in images/train and images/val or all in images, got both; "
      "move this one into one of the two"
    )
  for folder in folders_of_images(labels) if splits and labels.is_dir() else ():
    split = split_of(pathlib.PurePath(folder.name))
    if split in ("train", "val") and not (images / folder.name).is_dir():
      raise InputError(
        f"{images / folder.name}: expected the images of the masks in {folder}, got no such "
        "folder; put it there, or move the masks elsewhere"
      )
  return splits


def _pairs(
  images: pathlib.Path, labels: pathlib.Path, obtain: str, colors: ColorTable | None
) -> tuple[list[RawExample], list[str]]:
  """Images with their masks, sorted by name; and a line for each that lacks its partner."""
  by_name = _by_name(list_files(images, SUFFIXES, "images", obtain), "image")
  masks = _by_name(_list_masks(labels, obtain), "mask")
  no_mask, no_image = sorted({*by_name} - {*masks}), sorted({*masks} - {*by_name})
  alone = [
    *(
      f"{labels / n}.png: expected the mask of {by_name[n]}, got {_nearly(n, no_image)}"
      for n in no_mask
    ),
    *(f"{images / n}.*: expected the image of {masks[n]}, got no such file" for n in no_image),
  ]
  pairs = [
    RawExample(
      name, by_name[name], masks[name], colors and functools.partial(colors.read, masks[name])
    )
    for name in sorted({*by_name} & {*masks})
  ]
  return pairs, alone


def _nearly(name: str, masks: Sequence[str]) -> str:
  """What there is in place of a mask: one whose name begins with that of the image, or nothing."""
  begin = (mask for mask in masks if mask.casefold().startswith(name.casefold()))
  other = next(begin, None)
  return f"{other!r}, which needs the name of the image" if other else "no such file"


def _list_masks(labels: pathlib.Path, obtain: str) -> list[pathlib.Path]:
  """The masks; where there are no others, files of formats that reading will refuse."""
  for suffixes in (_MASK_SUFFIXES, _LOSSY_SUFFIXES):
    if labels.is_dir() and any(path.suffix.lower() in suffixes for path in labels.iterdir()):
      return list_files(labels, suffixes, "masks", obtain)
  return list_files(labels, _MASK_SUFFIXES[:1], "masks", obtain)


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
