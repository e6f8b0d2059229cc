"""Your own data: YOLO's text files of polygons with a data.yaml, as ultralytics trains on them."""

import functools
import os
import pathlib
import re
from collections.abc import Iterator

import numpy as np
import yaml

from data_pipelines.sources import class_file
from data_pipelines.sources.builder import Painted, RawExample
from data_pipelines.sources.coco_masks import read_mask
from data_pipelines.sources.files import read_lines
from data_pipelines.sources.own_data import (
  Annotations,
  ImageFiles,
  clean,
  into_splits,
  size_of,
  split_of,
)
from rpn_jax.base.errors import InputError
from rpn_jax.base.picture_files import list_images
from rpn_jax.base.words import read_text

# Of the images that ultralytics reads, those that are read here.
_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
_SPLITS = {"train": ("train",), "val": ("val", "validation", "valid"), "test": ("test",)}
_NAMES = ("data.yaml", "dataset.yaml", "data.yml", "dataset.yml")
_LIST = "classes.txt"  # a name per line, in place of these, as Label Studio exports it
_MARGIN = 0.01  # of coordinates beyond the edges, as ultralytics allows
_BOX = 5  # numbers in the line of a box


class _Loader(yaml.SafeLoader):
  """YAML in which a whole number that is not written as one, as 007 or 12:30, stays text."""


_Loader.add_constructor(
  "tag:yaml.org,2002:int",
  lambda _, node: int(node.value) if re.fullmatch("0|[1-9][0-9]*", node.value) else node.value,
)


class YoloSeg(Annotations):
  """YOLO's polygons: a pixel has the class of the smallest that covers it.

  An image without a label file, or with an empty one, has no objects.
  """

  name = "yolo_seg"
  title = "your own data, as YOLO's segmentation"
  names_from = "data.yaml"
  layout = """data.yaml (names; train and val: folders or lists of images, from path or from here)
classes.txt (a name per line; in place of data.yaml)
images/…/*.jpg, with labels/…/*.txt of the same names: a class index and corners x y x y … in 0…1
  on each line
unseen.txt (may be missing: the names that are never trained on)"""

  def examples(self, manual_dir):
    path = _find_yaml(manual_dir)
    self.class_files = [path]
    data = _read_yaml(path)
    names = _names(path, data)
    by_name = self.set_classes(manual_dir, names)
    labels = [by_name[clean(name)] for name in names]
    found: dict[str | None, list[RawExample]] = {}
    for split, files in _splits(path, data, manual_dir).items():
      for file in files:
        inside = file.is_relative_to(manual_dir)
        name = file.relative_to(manual_dir).as_posix() if inside else str(file)
        text = _label_file(file)
        read = functools.partial(self._paint, text, file, path, labels)
        # Where there is no label file the image stands for it: it is there, and may change.
        there = text if text.exists() else file
        found.setdefault(split, []).append(RawExample(name, file, there, read))
    self._check(found, path)
    return into_splits(found, manual_dir)

  def _check(self, found: dict[str | None, list[RawExample]], path: pathlib.Path) -> None:
    """Says what has no labels; refuses data sets in which nothing has."""
    raws = [raw for split, examples in found.items() for raw in examples if split != "test"]
    if not raws:
      raise InputError(
        f"{path}: expected train and val, folders or lists of images, or images below, got none; "
        "write them there"
      )
    without = [raw for raw in raws if raw.label == raw.image]
    if len(without) == len(raws):
      raise InputError(
        f"{_label_file(raws[0].image)}: expected the labels of {raws[0].image}, got no such file, "
        f"and none for any of {len(raws):,} images; put labels beside images"
      )
    if without:
      print(
        f"{path.parent}: images without a label file, and so without objects: {len(without):,} of "
        f"{len(raws):,}, such as {without[0].image}",
        flush=True,
      )

  def _paint(
    self, text: pathlib.Path, image: pathlib.Path, path: pathlib.Path, labels: list[int]
  ) -> Painted:
    height, width = shape = size_of(image)
    canvas = self.canvas(shape)
    if text.exists():
      for index, corners in _polygons(text, path, len(labels)):
        polygon = (np.clip(corners, 0, 1) * (width, height)).ravel().tolist()
        canvas.paint(read_mask([polygon], shape), labels[index])
    return canvas.painted()


def _find_yaml(manual_dir: pathlib.Path) -> pathlib.Path:
  files = sorted([*manual_dir.glob("*.yaml"), *manual_dir.glob("*.yml")])
  files = [path for path in files if not path.name.startswith(".")]
  chosen = [path for path in files if path.name in _NAMES] or files
  if not chosen and (manual_dir / _LIST).is_file():
    return manual_dir / _LIST
  if len(chosen) != 1:
    got = " and ".join(path.name for path in chosen[:2]) or "none"
    raise InputError(
      f"{manual_dir}: expected one YAML file with names, train and val, as data.yaml, got {got}; "
      f"name it data.yaml, or write {_LIST} with a name per line"
    )
  return chosen[0]


def _read_yaml(path: pathlib.Path) -> dict:
  if path.name == _LIST:
    return {"names": list(class_file.read(path).names)}
  text = read_text(path, "names, train and val")
  try:
    data = yaml.load(text, _Loader)
  except Exception as error:  # damage surfaces as a dozen kinds
    raise InputError(
      f"{path}: expected YAML with names, train and val, got {type(error).__name__} "
      f"({' '.join(str(error).split())[:200]}); correct it"
    ) from error
  if not isinstance(data, dict) or not data.get("names"):
    raise InputError(f"{path}: expected names, train and val, got no names; write them there")
  return data


def _names(path: pathlib.Path, data: dict) -> list[str]:
  """The class names by index, from a list, or a table of all indices from 0."""
  names = data["names"]
  if isinstance(names, dict):
    if {*names} != {*range(len(names))}:
      missing = sorted({*range(len(names))} - {*names})
      raise InputError(
        f"{path}: expected a name for every index from 0 to {len(names) - 1}, got none for "
        f"{missing[0]}; number them without gaps"
      )
    names = [names[i] for i in range(len(names))]
  if not isinstance(names, list) or any(isinstance(name, (list, dict)) for name in names):
    raise InputError(f"{path}: expected names as a list or as a table of indices, got others")
  for index, name in enumerate(names):
    if not isinstance(name, str) and type(name) is not int:
      raise InputError(
        f"{path}: expected the name of class {index} as text, got what YAML reads as {name!r}; put "
        "the name in quotes"
      )
  names = [str(name) for name in names]
  double = [name for i, name in enumerate(names) if name in names[:i]]
  if double:
    raise InputError(f"{path}: expected different names, got {double[0]!r} twice; rename one")
  count = data.get("nc", len(names))
  if count != len(names):
    raise InputError(
      f"{path}: expected as many names as nc says, got nc {count!r} and {len(names)} names; "
      "correct one of them"
    )
  return names


def _splits(
  path: pathlib.Path, data: dict, manual_dir: pathlib.Path
) -> dict[str | None, list[pathlib.Path]]:
  """The images of every split; of a file that names none all that are below its folder."""
  keys = {split: next((k for k in keys if data.get(k)), "") for split, keys in _SPLITS.items()}
  found: dict[str | None, list[pathlib.Path]] = {}
  if any(keys.values()):
    images = _Images(path, data, manual_dir)
    return {split: images.of(key, split == "test") for split, key in keys.items() if key}
  print(f"{path}: names no train or val, so that all images below are read", flush=True)
  for file in list_images(path.parent, suffixes=_SUFFIXES, recursive=True):
    found.setdefault(split_of(file.relative_to(manual_dir).parent), []).append(file)
  return found


class _Images:
  """The images that a data.yaml names, by ultralytics' rules."""

  def __init__(self, path: pathlib.Path, data: dict, manual_dir: pathlib.Path):
    self._yaml, self._data, self._manual_dir = path, data, manual_dir
    self._files: ImageFiles | None = None
    root = str(data.get("path") or ".").replace("\\", "/")
    self._root = path.parent / root  # an absolute one stays as it is
    if not os.path.isdir(self._root):
      # ultralytics would look in its own folder of data sets, or on another machine.
      self._root = path.parent
      if root not in (".", path.parent.name):
        print(f"{path}: no folder {root}, its images are looked for in {path.parent}", flush=True)

  def of(self, key: str, optional: bool) -> list[pathlib.Path]:
    """The image files of an entry: folders, or text files that list images, or a list of these.

    Args:
      key: of the entry.
      optional: whether there may be none, as of images for tests, which are left out: Roboflow
        always names a folder of them.

    Raises:
      InputError: there are none.
    """
    entries = self._data[key]
    entries = entries if isinstance(entries, list) else [entries]
    files = [file for entry in entries for file in self._entry(key, str(entry), optional)]
    return list(dict.fromkeys(files))

  def _entry(self, key: str, entry: str, optional: bool) -> list[pathlib.Path]:
    place = self._place(key, entry.replace("\\", "/").rstrip("/"))
    if place is None:
      if optional:
        return []
      raise InputError(
        f"{self._yaml}: expected a folder or a list of images at {key}: {entry}, got nothing at "
        f"{self._root / entry}; correct path or {key}, or remove the entry"
      )
    if place.is_dir():
      files = list_images(place.resolve(), suffixes=_SUFFIXES, recursive=True)
    else:
      files = [self._listed(place, line) for line in read_lines(place, "paths of images") if line]
    if not files and not optional:
      raise InputError(f"{place}: expected the {key} images, got none; put them there")
    return files

  def _place(self, key: str, text: str) -> pathlib.Path | None:
    """Where a folder or list is that an entry names; None if there is none."""
    places = [self._root / text, self._yaml.parent / text]
    if text.startswith("../"):  # as Roboflow writes what is beside the file
      places += [self._root / text[3:], self._yaml.parent / text[3:]]
    if place := next((place for place in places if os.path.exists(place)), None):
      return place
    if not re.match("/|[A-Za-z]:", text):
      return None
    # A path of another machine: as much of its end as there is.
    parts = [part for part in text.split("/") if part not in ("", ".", "..")]
    ends = (self._yaml.parent.joinpath(*parts[i:]) for i in range(len(parts)))
    place = next((place for place in ends if os.path.exists(place)), None)
    if place:
      print(f"{self._yaml}: no folder {text}, the {key} images are those of {place}", flush=True)
    return place

  def _listed(self, place: pathlib.Path, line: str) -> pathlib.Path:
    """The image of a line of a list."""
    name = line.replace("\\", "/")
    # datumaro, with which CVAT exports, writes data/ in front of a path from the list.
    for inside in (name, name.removeprefix("data/")):
      for folder in (place.parent, self._root):
        if os.path.isfile(folder / inside):
          return (folder / inside).resolve()
    self._files = self._files or ImageFiles(self._manual_dir)
    found = self._files.find(line)
    if found is None:
      raise InputError(f"{place}: expected the image {line}, got no such file; correct the list")
    return found


def _label_file(image: pathlib.Path) -> pathlib.Path:
  """labels/….txt of images/….jpg, by the last folder of that name; without one, beside it."""
  for folder in image.parents:
    if folder.name == "images":
      return (folder.with_name("labels") / image.relative_to(folder)).with_suffix(".txt")
  return image.with_suffix(".txt")


def _polygons(
  text: pathlib.Path, path: pathlib.Path, count: int
) -> Iterator[tuple[int, np.ndarray]]:
  """Class index and corners [n,2] in 0…1 of every line of a label file.

  Raises:
    InputError: a line that is no polygon.
  """
  for number, line in enumerate(read_lines(text, "a class index and corners per line"), 1):
    if not line:
      continue
    where = f"{text}, line {number}"
    try:
      values = np.array(line.split(), np.float64)
    except ValueError:
      values = np.array([np.nan])
    if len(values) == _BOX:
      raise InputError(
        f"{where}: expected a class index and at least 3 corners x y, got a box; export the "
        "segmentation, not the detection"
      )
    if len(values) < 7 or not len(values) % 2 or not np.isfinite(values).all():
      raise InputError(
        f"{where}: expected a class index and at least 3 corners x y, got {line[:60]!r}; correct it"
      )
    if values[0] % 1 or not 0 <= values[0] < count:
      raise InputError(
        f"{where}: expected a class index of 0…{count - 1}, as many as {path.name} has names, got "
        f"{values[0]:g}; correct one of them"
      )
    corners = values[1:].reshape(-1, 2)
    if corners.min() < -_MARGIN or corners.max() > 1 + _MARGIN:
      raise InputError(
        f"{where}: expected corners in 0…1, shares of width and height, got {corners.min():g}…"
        f"{corners.max():g}; divide pixels by the size of the image"
      )
    yield int(values[0]), corners
