"""Your own data: COCO's JSON files of polygons and run lengths, and its panoptic form."""

import functools
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from data_pipelines.sources.builder import Painted, RawExample
from data_pipelines.sources.coco_masks import count_empty, read_mask
from data_pipelines.sources.files import read_colors
from data_pipelines.sources.own_data import (
  Annotations,
  ImageFiles,
  clean,
  into_splits,
  read_json,
  size_of,
  split_of,
  told_size,
)
from rpn_jax.base.errors import InputError
from rpn_jax.base.pictures import check_size

_IDS = (int, float, str)
_LISTS = ("images", "annotations", "categories")
_FOLDERS = (".", "annotations", "train", "val", "valid", "test")


class CocoJson(Annotations):
  """COCO's instances: a pixel has the class of the smallest annotation that covers it.

  Crowds (`iscrowd`) are annotations like others. An annotation of a box alone tells of no pixel
  which class it has: what nothing else covers in it has no class. In the panoptic form every image
  has a PNG in the folder named like the JSON file, whose colors are the numbers of segments.
  """

  name = "coco_json"
  title = "your own data, as COCO JSON"
  names_from = "the categories"
  layout = """*.json, annotations/*.json or {train,val,valid}/*.json, with images, annotations and
  categories; train or val in a name tells the split (without: one image in ten is for val)
the images, anywhere below; file_name is the end of their paths
{JSON file without suffix}/*.png of the panoptic form
unseen.txt (may be missing: the names that are never trained on)"""

  def examples(self, manual_dir):
    files = _json_files(manual_dir)
    contents = {path: _read(path) for path in files}
    categories = {path: _categories(path, data) for path, data in contents.items()}
    labels = self.set_classes(
      manual_dir, (name for names in categories.values() for name in names.values())
    )
    # Of other files every image has its own as label.
    self.class_files = [path for path, data in contents.items() if _is_panoptic(data)]
    masks = [path.with_suffix("") for path in self.class_files]
    images = ImageFiles(manual_dir, masks)
    missing, told = [], _Told()
    found: dict[str | None, list[RawExample]] = {}
    for path, data in contents.items():
      split = split_of(path.relative_to(manual_dir).with_suffix(""))
      ids = {number: labels[name] for number, name in categories[path].items()}
      listed = _images(path, data)
      panoptic = _is_panoptic(data)
      segments = _segments(path, data, ids, listed) if panoptic else {}
      annotations = {} if panoptic else _by_image(path, data, ids, listed)
      _check_pixels(path, data["annotations"])
      for number, image in sorted(listed.items(), key=lambda item: item[1]["name"]):
        file = images.find(image["name"], split)
        if file is None:
          got = "one in a folder of another split" if images.find(image["name"]) else "no such file"
          missing.append(
            f"{image['name']}: expected this image of {path.name} below {manual_dir}, got {got}"
          )
          continue
        if number in segments:
          mask, own = segments[number]
          read = functools.partial(_read_segments, mask, own, self.unannotated)
        else:
          mask, own = path, annotations.get(number, [])
          told.count(own)
          read = functools.partial(self._paint, path, file, image["size"], own)
        found.setdefault(split, []).append(RawExample(image["name"], file, mask, read))
    self.leave_out(missing)
    told.say(files)
    return into_splits(found, manual_dir)

  def _paint(
    self,
    path: pathlib.Path,
    file: pathlib.Path,
    size: tuple[int, int] | None,
    annotations: Sequence[tuple[int, dict]],
  ) -> Painted:
    shape = size or size_of(file)
    check_size(f"{path}, {file.name}", shape[::-1])
    canvas = self.canvas(shape)
    try:
      for label, annotation in annotations:
        if _is_box(annotation):
          canvas.leave_open([float(x) for x in annotation["bbox"]])
        elif _has_area(annotation.get("segmentation")):
          canvas.paint(read_mask(annotation["segmentation"], shape), label)
    except Exception as error:  # pycocotools raises any kind, Exception itself among them
      where = f"annotation {annotation.get('id')!r} of {file.name}"
      raise InputError(
        f"{path}: expected {where} as RLE or polygons on {shape[1]}x{shape[0]} pixels, got "
        f"{type(error).__name__} ({' '.join(str(error).split())}); correct or remove it"
      ) from error
    return canvas.painted()


class _Told:
  """What is left out of the annotations, counted."""

  def __init__(self):
    self.total = self.boxes = self.empty = 0

  def count(self, annotations: Sequence[tuple[int, dict]]) -> None:
    for _, annotation in annotations:
      self.total += 1
      if _is_box(annotation):
        self.boxes += 1
      elif not _has_area(annotation.get("segmentation")):
        self.empty += 1

  def say(self, files: Sequence[pathlib.Path]) -> None:
    """
    Raises:
      InputError: all are boxes.
    """
    where = ", ".join(path.name for path in files)
    if self.boxes and self.boxes == self.total:
      raise InputError(
        f"{where}: expected masks (segmentation: polygons or RLE), got {self.boxes:,} annotations "
        "that are boxes only; export the masks, or draw them"
      )
    parts = {
      "boxes only, so that their pixels have no class": self.boxes,
      "without area": self.empty,
    }
    if lines := [f"{what}: {count:,}" for what, count in parts.items() if count]:
      print(f"{where}: of {self.total:,} annotations: {'; '.join(lines)}", flush=True)


def _json_files(manual_dir: pathlib.Path) -> list[pathlib.Path]:
  """The annotation files; beside COCO's own those of captions and keypoints are left out."""
  files = [path for folder in _FOLDERS for path in sorted((manual_dir / folder).glob("*.json"))]
  files = [path for path in files if not path.name.startswith(".")]
  chosen = [path for path in files if path.name.startswith("instances")] or files
  if not chosen:
    raise InputError(
      f"{manual_dir}: expected COCO's annotations as *.json here or in "
      f"{', '.join(_FOLDERS[1:])}, got no such file; put it there"
    )
  if len(chosen) < len(files):
    others = ", ".join(path.name for path in files if path not in chosen)
    print(f"read are the files named instances…; left out: {others}", flush=True)
  return chosen


def _read(path: pathlib.Path) -> dict:
  data = read_json(path, "COCO's annotations")
  lists = [isinstance(data, dict) and isinstance(data.get(key), list) for key in _LISTS]
  if not all(lists):
    got = ", ".join(list(data)[:6]) if isinstance(data, dict) else type(data).__name__
    raise InputError(
      f"{path}: expected COCO's annotations with the lists {', '.join(_LISTS)}, got {got}; move "
      "files of other kinds elsewhere"
    )
  return data


def _entries(path: pathlib.Path, data: dict, kind: str, *keys: str) -> list[dict]:
  """The entries of a list, each with some keys."""
  for position, entry in enumerate(data[kind]):
    lacks = [key for key in keys if not isinstance(entry, dict) or entry.get(key) is None]
    if lacks:
      raise InputError(
        f"{path}: expected {lacks[0]} in every entry of {kind}, got none in entry {position}; "
        "export the file again"
      )
  return data[kind]


def _unique(path: pathlib.Path, kind: str, entries: list[dict]) -> dict:
  """Entries by their ids."""
  found: dict = {}
  for entry in entries:
    number = entry["id"]
    if not isinstance(number, _IDS):
      raise InputError(f"{path}: expected numbers as ids of {kind}, got {number!r}; correct it")
    if number in found:
      raise InputError(
        f"{path}: expected {kind} of different ids, got {number!r} twice; give one a new id"
      )
    found[number] = entry
  return found


def _categories(path: pathlib.Path, data: dict) -> dict:
  """Id -> name of the categories, whose ids may have gaps, by id."""
  found = _unique(path, "categories", _entries(path, data, "categories", "id", "name"))
  order = sorted(found, key=lambda number: (isinstance(number, str), number))
  names = {number: clean(found[number]["name"]) for number in order}
  double = len(names) - len({*names.values()})
  if double:
    print(f"{path.name}: categories that have the name of another, and are its class: {double}")
  return names


def _images(path: pathlib.Path, data: dict) -> dict:
  """Id -> file name and size, see `told_size`."""
  images = {}
  for number, entry in _unique(
    path, "images", _entries(path, data, "images", "id", "file_name")
  ).items():
    name = str(entry["file_name"])
    size = told_size(f"{path}, {name}", entry.get("height"), entry.get("width"))
    images[number] = {"name": name, "size": size}
  return images


def _by_image(path: pathlib.Path, data: dict, labels: dict, images: dict) -> dict:
  """Image id -> its annotations with their labels."""
  found: dict = {number: [] for number in images}
  for annotation in _entries(path, data, "annotations", "image_id", "category_id"):
    _check_listed(path, annotation, "image_id", found)
    _check_listed(path, annotation, "category_id", labels)
    found[annotation["image_id"]].append((labels[annotation["category_id"]], annotation))
  return found


def _check_listed(path: pathlib.Path, annotation: dict, key: str, known: dict) -> None:
  number = annotation.get(key)
  if not isinstance(number, _IDS) or number not in known:
    raise InputError(
      f"{path}: expected the {key} of annotation {annotation.get('id')!r} among the ids that "
      f"the file lists, got {number!r}; correct it or remove the annotation"
    )


def _check_pixels(path: pathlib.Path, annotations: Sequence[dict]) -> None:
  """Refuses polygons that are shares of the image's size, which would be within its first pixel."""
  parts = [a["segmentation"] for a in annotations if isinstance(a.get("segmentation"), list)]
  polygons = [p for part in parts for p in part if isinstance(p, list) and not count_empty([p])]
  numbers = (x for polygon in polygons for x in polygon)
  if polygons and all(isinstance(x, (int, float)) and abs(x) <= 1 for x in numbers):
    raise InputError(
      f"{path}: expected corners of polygons in pixels, got {len(polygons):,} polygons with all "
      "corners in 0…1, which are shares of the image's size; multiply x by the width of the image "
      "and y by its height"
    )


def _is_panoptic(data: dict) -> bool:
  return any(isinstance(item, dict) and "segments_info" in item for item in data["annotations"][:1])


def _segments(path: pathlib.Path, data: dict, labels: dict, images: dict) -> dict:
  """Image id -> its PNG file, and the labels of the segments in it by their numbers."""
  found: dict = {}
  for entry in _entries(path, data, "annotations", "image_id", "file_name", "segments_info"):
    _check_listed(path, entry, "image_id", images)
    own, listed = {}, entry["segments_info"]
    for segment in listed if isinstance(listed, list) else [None]:
      if not isinstance(segment, dict) or not isinstance(segment.get("id"), int):
        raise InputError(
          f"{path}: expected segments with numbers as ids in segments_info of "
          f"{str(entry['file_name'])!r}, got {segment!r:.60}; export the file again"
        )
      _check_listed(path, segment, "category_id", labels)
      own[segment["id"]] = labels[segment["category_id"]]
    name = pathlib.PurePath(str(entry["file_name"]).replace("\\", "/")).name
    found[entry["image_id"]] = path.with_suffix("") / name, own
  return found


def _read_segments(mask: pathlib.Path, labels: dict[int, int], unannotated: int) -> np.ndarray:
  """The label map of a panoptic PNG; the number 0 is no segment.

  Raises:
    InputError: a segment that the JSON file does not list.
    FileNotFoundError: no such file.
  """
  codes = read_colors(mask)
  numbers, places = np.unique(
    codes & 0xFF00 | codes >> 16 | (codes & 0xFF) << 16, return_inverse=True
  )
  unlisted = [number for number in numbers.tolist() if number and number not in labels]
  if unlisted:
    raise InputError(
      f"{mask}: expected the segments in {mask.parent.name}.json, got {unlisted[0]} too, which is "
      "not in segments_info of this file; export both again"
    )
  table = [
    labels.get(number, unannotated) if number else unannotated for number in numbers.tolist()
  ]
  return np.array(table, np.uint16)[places].reshape(codes.shape)


def _is_box(annotation: dict) -> bool:
  """Whether only a box tells where the object is."""
  box = annotation.get("bbox")
  is_box = isinstance(box, list) and len(box) == 4
  return is_box and not _has_area(annotation.get("segmentation"))


def _has_area(segmentation: Any) -> bool:
  """Whether there are run lengths, or polygons of at least three points; what is neither counts."""
  if isinstance(segmentation, list):
    return count_empty(segmentation) < len(segmentation)
  return bool(segmentation)
