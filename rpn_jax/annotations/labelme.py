"""labelme's JSON: a file for each image, with polygons or masks."""

import base64
import hashlib
import io
import json
import pathlib
from collections.abc import Sequence

import numpy as np
from PIL import Image

from rpn_jax.annotations import polygons
from rpn_jax.annotations.options import Options
from rpn_jax.annotations.regions import Instance, Region

# Of the format; masks came with 5.2.
VERSION = "5.5.0"
# Field beside those of the format, which labelme keeps: the input, and a digest of the shapes.
MARK = "rpn_jax"


def document(
  instances: Sequence[Instance],
  names: Sequence[str],
  size: tuple[int, int],
  options: Options,
  image_path: str,
  image: np.ndarray | None,
  source: str,
) -> dict:
  """The content of a file.

  A shape is one region; those of an annotation of a class share a `group_id`.

  Args:
    instances: of the image.
    names: C class names.
    size: (H, W) of the image, pixels.
    options: `instances`, `labelme` and `simplify`.
    image_path: from the folder of the file, with "/".
    image: (H, W, 3) uint8, to be embedded; None if the file at `image_path` is to be read.
    source: see `source_of`.
  """
  shapes = []
  for instance in instances:
    group = instance.class_id if options.instances == "classes" else None
    for region in instance.regions:
      shape = _mask(region) if options.labelme == "masks" else _polygon(region, options.simplify)
      shapes.append(
        {"label": names[instance.class_id], "group_id": group, "description": "", "flags": {},
         **shape}
      )  # fmt: skip
  return {
    "version": VERSION, "flags": {}, "shapes": shapes, "imagePath": image_path,
    "imageData": None if image is None else _png(image), "imageHeight": size[0],
    "imageWidth": size[1], MARK: {"source": source, "digest": _digest(shapes)},
  }  # fmt: skip


def source_of(path: pathlib.Path) -> str | None:
  """The input of a file that is as `document` made it; None of one that was edited, or another."""
  try:
    content = json.loads(path.read_text(encoding="utf-8"))
    mark = content[MARK]
    return mark["source"] if mark["digest"] == _digest(content["shapes"]) else None
  except (OSError, ValueError, KeyError, TypeError):
    return None


def _digest(shapes: Sequence[dict]) -> str:
  return hashlib.sha256(json.dumps(shapes, sort_keys=True).encode()).hexdigest()[:16]


def _polygon(region: Region, tolerance: float) -> dict:
  points = polygons.polygon(region, tolerance).tolist()
  return {"shape_type": "polygon", "points": points, "mask": None}


def _mask(region: Region) -> dict:
  height, width = region.mask.shape
  # The last pixels are inside, here and in no other form.
  last = [region.left + width - 1, region.top + height - 1]
  return {
    "shape_type": "mask", "points": [[region.left, region.top], last], "mask": _png(region.mask)
  }  # fmt: skip


def _png(image: np.ndarray) -> str:
  file = io.BytesIO()
  Image.fromarray(image).save(file, format="PNG")
  return base64.b64encode(file.getvalue()).decode()
