"""Your own data: folders in the manner of PASCAL VOC, as CVAT, labelme and others export masks."""

import functools
import os
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from data_pipelines.sources import class_file
from data_pipelines.sources.builder import RawExample
from data_pipelines.sources.files import (
  ColorTable,
  is_colored,
  read_index_image,
  read_lines,
)
from data_pipelines.sources.own_data import (
  BACKGROUND_NAMES,
  IGNORED_NAMES,
  Annotations,
  ImageFiles,
  into_splits,
  split_of,
)
from data_pipelines.vocabularies import IGNORE
from rpn_jax.base.errors import InputError

_CLASS_FILES = (class_file.LABELMAP, "class_names.txt", "names.txt", "classes.txt", "labels.txt")
# Newer and older versions of labelme's converter; the others have the first.
_MASK_FOLDERS = ("SegmentationClass", "SegmentationClassPNG")
_IMAGE_FOLDERS = ("JPEGImages", "images")
_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
_BORDER = (224, 224, 192)  # VOC's color of pixels of no class, index 255


class VocFolder(Annotations):
  """Masks of VOC's form: index k is line k of the class file, from 0, the background; 255 no class.

  The background counts as pixels without annotation. If the file does not list it, its first line
  is index 1. Masks of RGB colors have those of the class file, or VOC's.
  """

  name = "voc_folder"
  title = "your own data, in the manner of VOC"
  names_from = "the class file"
  layout = """JPEGImages/*.jpg (or images/)
SegmentationClass/*.png (or SegmentationClassPNG/), of indices or of colors
ImageSets/Segmentation/{train,val}.txt, names of images (without: one image in ten is for val)
labelmap.txt as CVAT writes it, or class_names.txt, names.txt, classes.txt or labels.txt with a name
  per line, the background first or left out
unseen.txt (may be missing: the names that are never trained on)"""

  def examples(self, manual_dir):
    listed = _class_file(manual_dir)
    self.class_files = [listed.path]
    labels = self.set_classes(manual_dir, (n for n in listed.names if not _is_background(n)))
    labels |= dict.fromkeys(BACKGROUND_NAMES, self.unannotated)
    masks = _mask_folder(manual_dir)
    folder = next((manual_dir / f for f in _IMAGE_FOLDERS if (manual_dir / f).is_dir()), None)
    if folder is None:
      raise InputError(
        f"{manual_dir / _IMAGE_FOLDERS[0]}: expected the images, got no such folder; export them "
        "with the masks, or copy them there"
      )
    images = ImageFiles(folder)
    read = functools.partial(
      self._read, _Masks(listed, labels, self.unannotated, self.classes.ignore)
    )
    found: dict[str | None, list[RawExample]] = {}
    missing = []
    for split, names in _lists(manual_dir, masks).items():
      for name in names:
        image = next(filter(None, (images.find(name + s) for s in _IMAGE_SUFFIXES)), None)
        mask = masks / f"{name}.png"
        if image is None:
          missing.append(f"{folder / name}.*: expected the image of {name}, got no such file")
        elif not os.path.isfile(mask):
          missing.append(f"{mask}: expected the mask of {image}, got no such file")
        else:
          raw = RawExample(name, image, mask, functools.partial(read, mask))
          found.setdefault(split, []).append(raw)
    self.leave_out(missing)
    return into_splits(found, manual_dir)

  def _read(self, masks: "_Masks", path: pathlib.Path) -> np.ndarray:
    if masks.has_colors or is_colored(path):
      return masks.colors.read(path)
    label_HxW = read_index_image(path, self._colors)
    known = masks.indices[np.minimum(label_HxW, len(masks.indices) - 1)]
    wrong = np.unique(label_HxW[(known < 0) | (label_HxW >= len(masks.indices))])
    if len(wrong):
      raise InputError(
        f"{path}: expected indices 0…{masks.last} of {masks.path.name}, or {IGNORE}, got "
        f"{', '.join(map(str, wrong[:5]))}; write the missing names, or, if its pixels have the "
        f"colors of classes, the colors (as {class_file.LABELMAP} has them: NAME:RED,GREEN,BLUE::)"
      )
    return known.astype(np.uint16)


class _Masks:
  """What the pixels of masks stand for.

  Attributes:
    path: of the class file.
    last: the highest index of a class.
    indices: index -> label, int32; -1 for others.
    has_colors: whether the class file has colors.
    colors: reads masks of colors.
  """

  def __init__(
    self,
    listed: class_file.ClassFile,
    labels: Mapping[str, int],
    unannotated: int,
    ignore: int,
  ):
    self.path = listed.path
    self.has_colors = listed.colors is not None
    names = listed.names
    if not self.has_colors:
      names = names[names[0] in IGNORED_NAMES :]  # -1 in labelme's numbering
      for number, name in enumerate(names[1:], 2):
        if _is_background(name):
          raise InputError(
            f"{listed.path}: expected the background as name 1, since it is index 0 of the masks, "
            f"got {name!r} as name {number}; move it there (if index 0 is {names[0]!r}, "
            "use `prepare folder` instead)"
          )
      if not _is_background(names[0]):
        print(
          f"{listed.path}: lists no background, so that index 0 has no annotation and index 1 is "
          f"{names[0]!r}",
          flush=True,
        )
        names = (BACKGROUND_NAMES[0], *names)
      if len(names) > IGNORE:
        raise InputError(
          f"{listed.path}: expected at most {IGNORE} names, with the background, since index "
          f"{IGNORE} is no class, got {len(names)}; use `prepare folder`, or masks of colors that "
          "stand behind the names"
        )
    self.last = len(names) - 1
    self.indices = np.full(max(len(names), IGNORE) + 1, -1, np.int32)
    self.indices[: len(names)] = [labels.get(name, unannotated) for name in names]
    self.indices[IGNORE] = ignore
    palette = listed.colors or [_voc_color(i) for i in range(len(names))]
    table = {(0, 0, 0): unannotated, _BORDER: ignore}
    table |= {tuple(color): labels.get(name, unannotated) for color, name in zip(palette, names)}
    self.colors = ColorTable(table, listed.path)


def _is_background(name: str) -> bool:
  return name.lower() in BACKGROUND_NAMES


def _class_file(manual_dir: pathlib.Path) -> class_file.ClassFile:
  path = next((manual_dir / f for f in _CLASS_FILES if (manual_dir / f).exists()), None)
  if path is None:
    raise InputError(
      f"{manual_dir}: expected the class names in {' or '.join(_CLASS_FILES)}, got no such file; "
      "write names.txt with a name per line, the background first"
    )
  return class_file.read(path)


def _mask_folder(manual_dir: pathlib.Path) -> pathlib.Path:
  """The first folder with PNG files: labelme's converters put other files into one of them."""
  for name in _MASK_FOLDERS:
    if any((manual_dir / name).rglob("*.png")):
      return manual_dir / name
  raise InputError(
    f"{manual_dir / _MASK_FOLDERS[0]}: expected masks as PNG here or in {_MASK_FOLDERS[1]}, got "
    "none; export them as PNG"
  )


def _lists(manual_dir: pathlib.Path, masks: pathlib.Path) -> dict[str | None, Sequence[str]]:
  """Split -> names of images, from ImageSets or, without, of all masks."""
  folder = manual_dir / "ImageSets" / "Segmentation"
  files: dict[str | None, list[pathlib.Path]] = {}
  for path in sorted(folder.glob("[!.]*.txt")):  # macOS puts ._train.txt beside train.txt
    files.setdefault(split_of(pathlib.PurePath(path.stem)), []).append(path)
  if {"train", "val"} & {*files}:
    files.pop(None, None)  # lists of both, as trainval.txt
  if not files:
    names = (path.relative_to(masks).with_suffix("") for path in sorted(masks.rglob("*.png")))
    return {None: [name.as_posix() for name in names if not name.name.startswith(".")]}
  found: dict[str | None, list[str]] = {}
  for split, paths in files.items():
    lines = [line for path in paths for line in read_lines(path, "names of images, one per line")]
    found[split] = [_name(paths[0], line) for line in dict.fromkeys(filter(None, lines))]
  return found


def _name(path: pathlib.Path, line: str) -> str:
  """The name of a line, without the suffix that some tools write."""
  name = line.replace("\\", "/")
  if name.startswith("/") or ".." in name.split("/") or "\0" in name:
    raise InputError(f"{path}: expected names of images, got the path {line[:60]!r}; refused")
  stem, dot, suffix = name.rpartition(".")
  return stem if dot and f".{suffix.lower()}" in _IMAGE_SUFFIXES else name


def _voc_color(index: int) -> tuple[int, int, int]:
  """VOC's color of an index: its bits spread over the high bits of red, green and blue."""
  red = green = blue = 0
  for position in range(8):
    bits = index >> 3 * position
    red |= (bits & 1) << 7 - position
    green |= (bits >> 1 & 1) << 7 - position
    blue |= (bits >> 2 & 1) << 7 - position
  return red, green, blue
