"""COCO's annotations: one JSON file for many images."""

import json
import pathlib
import re
from collections.abc import Mapping, Sequence

import numpy as np

from rpn_jax.annotations import polygons
from rpn_jax.annotations.options import Options
from rpn_jax.annotations.regions import Instance
from rpn_jax.base.origins import FIELD

DESCRIPTION = "segmented by rpn_jax"
# How a file begins, and more bytes than that takes.
_INFO, _INFO_BYTES = re.compile(r'{"info": ({"description": "segmented by rpn_jax".*?})'), 1 << 14


def source_of(path: pathlib.Path) -> str | None:
  """What `document` was told of the input; None of a file that it did not make."""
  try:
    # The beginning is enough: files of many images are large.
    with path.open("rb") as file:
      info = _INFO.match(file.read(_INFO_BYTES).decode("utf-8", "ignore"))
    return json.loads(info[1])[FIELD] if info else None
  except (OSError, ValueError, KeyError):
    return None


def annotation(instance: Instance, size: tuple[int, int], options: Options) -> dict:
  """An annotation without the ids of itself and its image.

  `iscrowd` is 0, also of run lengths, as in COCO-Stuff. Categories count from 1.

  Args:
    instance: of an image.
    size: (H, W) of the image, pixels.
    options: `coco` and `simplify`.
  """
  segmentation: dict | list
  if options.coco == "rle":
    segmentation, area = run_lengths(instance, size), float(instance.area)
    box = instance.union()
    height, width = box.mask.shape
    bbox = [box.left, box.top, width, height]
  else:
    rings = [polygons.polygon(region, options.simplify) for region in instance.regions]
    segmentation = [ring.ravel().tolist() for ring in rings]
    area = sum(polygons.area(ring) for ring in rings)
    points = np.concatenate(rings)
    low, high = points.min(0), points.max(0)
    bbox = [*low.tolist(), *(high - low).tolist()]
  return {
    "category_id": instance.class_id + 1, "iscrowd": 0, "area": area, "bbox": bbox,
    "segmentation": segmentation,
  }  # fmt: skip


def run_lengths(instance: Instance, size: tuple[int, int]) -> dict:
  """COCO's compressed run lengths, {"size": [H, W], "counts": text}."""
  from pycocotools import mask as coco_mask

  height, width = size
  region = instance.union()
  # Runs go down the columns: where a pixel and the one above it differ.
  columns = np.pad(region.mask.T, ((0, 0), (1, 1)))
  column, row = np.nonzero(columns[:, 1:] != columns[:, :-1])
  changes = (region.left + column) * height + region.top + row
  # A run that ends at the bottom may continue at the top of the next column.
  through = np.flatnonzero(changes[1:] == changes[:-1])
  changes = np.delete(changes, np.concatenate([through, through + 1]))
  ends = np.append(changes[changes < height * width], height * width)
  counts = np.diff(ends, prepend=0).tolist()
  packed = coco_mask.frPyObjects({"size": [height, width], "counts": counts}, height, width)
  return {"size": [height, width], "counts": packed["counts"].decode()}


def document(
  images: Sequence[Mapping], annotations: Sequence[Sequence[Mapping]], names: Sequence[str],
  source: str = "",
) -> dict:  # fmt: skip
  """The content of the file.

  Args:
    images: `file_name`, `width` and `height` of each.
    annotations: of each image, from `annotation`.
    names: C class names.
    source: of a file for one image, see `source_of`.
  """
  numbered: list[dict] = []
  for image_id, found in enumerate(annotations, 1):
    for each in found:
      numbered.append({"id": len(numbered) + 1, "image_id": image_id, **each})
  return {
    "info": {"description": DESCRIPTION, FIELD: source},
    "licenses": [],
    "images": [{"id": i, **image} for i, image in enumerate(images, 1)],
    "categories": [{"id": i, "name": name, "supercategory": ""} for i, name in enumerate(names, 1)],
    "annotations": numbered,
  }
