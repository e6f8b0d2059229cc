"""Ultralytics' text files for segmentation: a row for each region, and `data.yaml`."""

import json
import re
from collections.abc import Sequence

from rpn_jax.annotations import polygons
from rpn_jax.annotations.options import Options
from rpn_jax.annotations.regions import Instance

# Of coordinates, as shares of the image: a thousandth of a pixel of the largest image.
DECIMALS = 8
# What YAML refuses or takes for line ends, and JSON leaves as it is.
_ESCAPED = re.compile("[\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff]")


def rows(instances: Sequence[Instance], size: tuple[int, int], options: Options) -> str:
  """The text of an image: `class x1 y1 x2 y2 …`, x and y divided by the image's width and height.

  Args:
    instances: of the image; every region is a row, since a row has one outline.
    size: (H, W) of the image, pixels.
    options: `simplify`.
  """
  lines = []
  for instance in instances:
    for region in instance.regions:
      ring = polygons.polygon(region, options.simplify) / size[::-1]
      numbers = " ".join(f"{value:.{DECIMALS}f}".rstrip("0").rstrip(".") for value in ring.ravel())
      lines.append(f"{instance.class_id} {numbers}\n")
  return "".join(lines)


def data_yaml(names: Sequence[str]) -> str:
  """The text of `data.yaml`, which is read from its own folder, as it names no other `path`.

  Args:
    names: C class names, also those without pixels.
  """
  # JSON's strings are YAML's: quoted, a name may have commas, colons and any letters.
  quoted = (json.dumps(name, ensure_ascii=False) for name in names)
  escaped = (_ESCAPED.sub(lambda found: f"\\u{ord(found[0]):04x}", name) for name in quoted)
  listed = "".join(f"  {i}: {name}\n" for i, name in enumerate(escaped))
  return (
    "train: images\n"
    "val: images  # the same ones: put some into a folder of their own before training\n"
    f"names:\n{listed}"
  )
