"""Your own data: folders of labelme's JSON files, one for each image."""

import base64
import dataclasses
import functools
import io
import math
import os
import pathlib
from collections.abc import Sequence
from types import NoneType
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from data_pipelines.sources import class_file
from data_pipelines.sources.builder import Painted, RawExample
from data_pipelines.sources.coco_masks import read_mask
from data_pipelines.sources.files import check_label_format
from data_pipelines.sources.own_data import (
  BACKGROUND_NAMES,
  IGNORED_NAMES,
  Annotations,
  Canvas,
  ImageFiles,
  clean,
  into_splits,
  read_json,
  size_of,
  split_of,
  told_size,
  upright_size,
)
from rpn_jax.base.errors import InputError
from rpn_jax.base.picture_files import SUFFIXES
from rpn_jax.base.pictures import check_size
from rpn_jax.base.words import suggestion

# Points of each kind of shape, at least and at most. Files of version 3 have no kind: polygons.
_POINTS = {
  None: (3, math.inf),
  "polygon": (3, math.inf),
  "rectangle": (2, 4),
  "oriented_rectangle": (4, 4),
  "rotation": (4, 4),  # the same in X-AnyLabeling, whose rectangles have four points, too
  "circle": (2, 2),
  "line": (2, 2),
  "linestrip": (2, math.inf),
  "point": (1, 1),
  "mask": (1, 2),
}
_WITHOUT_AREA = ("line", "linestrip", "point")
_LABELS_FILE = "labels.txt"
_LINE_WIDTH = 10  # pixels, as labelme draws what has no area


@dataclasses.dataclass(frozen=True)
class _File:
  """What is kept of a JSON file until its image is read."""

  path: pathlib.Path
  image: str  # path, relative to the file or from another machine
  embedded: bool
  labels: tuple[str, ...]
  without_area: int


class Labelme(Annotations):
  """labelme's shapes: a pixel has the class of the smallest that its center is in.

  Pixels of shapes with the label "_background_" count as not annotated, those with "__ignore__"
  have no class. Lines and points, which have no area, are drawn as wide as in labelme.
  """

  name = "labelme"
  title = "your own data, as labelme's JSON files"
  names_from = "the labels of the shapes"
  layout = """**/*.json, as labelme writes them; a folder train or val in the path tells the split
  (without: one image in ten is for val)
the images, in the files (imageData), where imagePath says, or anywhere below
labels.txt (may be missing: the class names in order, as for labelme --labels; else those found)
unseen.txt (may be missing: the names that are never trained on)"""

  def examples(self, manual_dir):
    present = ImageFiles(manual_dir)
    summaries = {path: _summarize(path) for path in present.with_suffixes((".json",))}
    files = [file for file in summaries.values() if file]
    if not files:
      raise InputError(
        f"{manual_dir}: expected labelme's JSON files (with shapes), got none; put them there"
      )
    if others := [path for path, file in summaries.items() if file is None]:
      print(
        f"{manual_dir}: left out, as JSON files without shapes: {len(others):,}, such as "
        f"{others[0]}",
        flush=True,
      )
    labels = self.set_classes(manual_dir, _names(manual_dir, files))
    if count := sum(file.without_area for file in files):
      print(
        f"{manual_dir}: lines and points, which have no area, are drawn {_LINE_WIDTH} pixels wide, "
        f"as labelme does: {count:,}",
        flush=True,
      )
    missing, used = [], set()
    found: dict[str | None, list[RawExample]] = {}
    for file in files:
      inside = file.path.relative_to(manual_dir)
      split = split_of(inside.parent)
      image = _find_image(file, present, split)
      used.add(image)
      if image is None and not file.embedded:
        missing.append(f"{file.path}: expected its image {file.image!r}, got no such file")
        continue
      read_image = functools.partial(_embedded_image, file.path) if file.embedded else None
      read_label = functools.partial(self._paint, file.path, image, labels)
      name = inside.with_suffix("").as_posix()
      found.setdefault(split, []).append(
        RawExample(name, image or file.path, file.path, read_label, read_image)
      )
    self.leave_out(missing)
    if idle := [path for path in present.with_suffixes(SUFFIXES) if path not in used]:
      print(
        f"{manual_dir}: left out, as images without a JSON file: {len(idle):,}, such as {idle[0]}",
        flush=True,
      )
    return into_splits(found, manual_dir)

  def _paint(
    self, path: pathlib.Path, image: pathlib.Path | None, labels: dict[str, int]
  ) -> Painted:
    data = _read(path)
    shape = told_size(str(path), data.get("imageHeight"), data.get("imageWidth"))
    if shape is None and (image is None or data.get("imageData")):
      with Image.open(io.BytesIO(_embedded_image(path))) as file:
        shape = upright_size(file, path)
    shape = shape or size_of(image)
    check_size(path, shape[::-1])
    canvas = self.canvas(shape)
    for position, shape_ in enumerate(data["shapes"]):
      try:
        _draw(canvas, shape_, labels[_label(shape_)], shape)
      except InputError:
        raise
      except Exception as error:  # damage surfaces as a dozen kinds
        raise InputError(
          f"{path}: expected a shape of labelme as entry {position} of shapes, got "
          f"{type(error).__name__} ({' '.join(str(error).split())}); correct or remove it"
        ) from error
    return canvas.painted()


def _names(manual_dir: pathlib.Path, files: Sequence[_File]) -> list[str]:
  """The lines of labels.txt, which all labels must be among, or the labels by the alphabet."""
  found = {label: file.path for file in files for label in file.labels}
  path = manual_dir / _LABELS_FILE
  if not path.exists():
    return sorted(found)
  names = [clean(name) for name in class_file.read(path).names]
  for label in found:
    if label not in names and label not in (*IGNORED_NAMES, BACKGROUND_NAMES[0]):
      raise InputError(
        f"{found[label]}: expected labels of {path.name}, got {label!r}; did you mean "
        f"{suggestion(label, names)!r}? Correct it, or write it into {path.name}"
      )
  return names


def _read(path: pathlib.Path) -> dict[str, Any]:
  data = read_json(path, "labelme's shapes")
  return data if isinstance(data, dict) else {}


def _summarize(path: pathlib.Path) -> _File | None:
  """The labels and the image of a file; None for JSON files of another kind."""
  data = _read(path)
  shapes = data.get("shapes")
  if not isinstance(shapes, list):
    return None
  for position, shape in enumerate(shapes):
    item = shape if isinstance(shape, dict) else {}
    label, kind = item.get("label"), item.get("shape_type")
    named = isinstance(label, str) and label.strip()
    if not named or not isinstance(kind, (str, NoneType)) or kind not in _POINTS:
      raise InputError(
        f"{path}: expected shapes with a label, of the kinds {', '.join(filter(None, _POINTS))}, "
        f"got the label {label!r} and the kind {kind!r} in entry {position}; correct or remove it"
      )
  return _File(
    path,
    str(data.get("imagePath") or path.stem),
    bool(data.get("imageData")),
    tuple(_label(shape) for shape in shapes),
    sum(shape.get("shape_type") in _WITHOUT_AREA for shape in shapes),
  )


def _label(shape: dict) -> str:
  return clean(shape["label"])


def _find_image(file: _File, images: ImageFiles, split: str | None) -> pathlib.Path | None:
  """Where imagePath says, from the JSON file, or the file below the folder that it may mean."""
  for suffix in ("", *SUFFIXES):  # a file without imagePath means the image of its own name
    beside = file.path.parent / (file.image.replace("\\", "/") + suffix)
    if os.path.isfile(beside):
      return beside.parent.resolve() / beside.name
  return images.find(file.image, split)


def _embedded_image(path: pathlib.Path) -> bytes:
  """The image file in a JSON file."""
  try:
    return base64.b64decode(_read(path)["imageData"], validate=False)
  except (ValueError, TypeError, KeyError) as error:
    raise InputError(
      f"{path}: expected an image as base64 in imageData, got {type(error).__name__}; save it again"
    ) from error


def _draw(canvas: Canvas, shape: dict, label: int, size: tuple[int, int]) -> None:
  """Paints a shape on a label map of (height, width)."""
  kind = shape.get("shape_type")
  least, most = _POINTS[kind]
  points = [(float(x), float(y)) for x, y in shape["points"]]
  if not least <= len(points) <= most:
    raise ValueError(f"{len(points)} points of a {kind or 'polygon'}")
  if not all(abs(value) <= 2 * max(size) for point in points for value in point):
    raise ValueError("corners far outside")
  if kind == "mask":
    mask_HxW = _place(_stored_mask(shape["mask"]), points[0], size)
  elif kind in ("circle", "point"):
    radius = math.dist(*points) if kind == "circle" else _LINE_WIDTH / 2
    mask_HxW = _disk(points[0], radius, size)
  elif kind in ("line", "linestrip"):
    image = Image.new("1", size[::-1])
    ImageDraw.Draw(image).line(points, fill=1, width=_LINE_WIDTH, joint="curve")
    mask_HxW = np.array(image)
  else:
    if kind == "rectangle" and len(points) != 4:
      (left, top), (right, bottom) = points
      points = [(left, top), (right, top), (right, bottom), (left, bottom)]
    mask_HxW = read_mask([[value for point in points for value in point]], size)
  canvas.paint(mask_HxW, label)


def _disk(center: Sequence[float], radius: float, size: tuple[int, int]) -> np.ndarray:
  """bool [H,W], the pixels whose centers are in a circle."""
  rows, columns = (np.arange(length) + 0.5 for length in size)
  return (rows[:, None] - center[1]) ** 2 + (columns - center[0]) ** 2 <= radius**2


def _stored_mask(text: str) -> np.ndarray:
  """bool [h,w] of a PNG in base64."""
  with Image.open(io.BytesIO(base64.b64decode(text))) as file:
    check_size("mask", file.size)
    check_label_format("mask", file)
    return np.array(file.convert("L")) > 0


def _place(mask: np.ndarray, corner: tuple[float, float], size: tuple[int, int]) -> np.ndarray:
  """bool [H,W], the mask with its upper left pixel at a corner (x, y), cut at the edges."""
  left, top = (round(value) for value in corner)
  whole = np.zeros(size, bool)
  rows, columns = slice(max(0, top), top + mask.shape[0]), slice(max(0, left), left + mask.shape[1])
  part = whole[rows, columns]
  part |= mask[max(0, -top) :, max(0, -left) :][: part.shape[0], : part.shape[1]]
  return whole
