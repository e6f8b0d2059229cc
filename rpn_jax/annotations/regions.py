"""The connected regions of a label map."""

import dataclasses
from collections.abc import Sequence

import cv2
import numpy as np

from rpn_jax.annotations.options import Options


@dataclasses.dataclass(frozen=True)
class Region:
  """A mask within its bounding box.

  Attributes:
    left, top: pixels.
    mask: (h, w) bool.
  """

  left: int
  top: int
  mask: np.ndarray


@dataclasses.dataclass(frozen=True)
class Instance:
  """What one annotation is about.

  Attributes:
    class_id: of the label map.
    regions: connected ones; several only where the annotation is of a class.
  """

  class_id: int
  regions: Sequence[Region]

  @property
  def area(self) -> int:
    """Pixels."""
    return sum(int(region.mask.sum()) for region in self.regions)

  def union(self) -> Region:
    """All regions as one mask."""
    left, top = (min(getattr(r, side) for r in self.regions) for side in ("left", "top"))
    right = max(r.left + r.mask.shape[1] for r in self.regions)
    bottom = max(r.top + r.mask.shape[0] for r in self.regions)
    mask = np.zeros((bottom - top, right - left), bool)
    for r in self.regions:
      height, width = r.mask.shape
      mask[r.top - top :, r.left - left :][:height, :width] |= r.mask
    return Region(left, top, mask)


def find_instances(labels_HxW: np.ndarray, options: Options) -> list[Instance]:
  """The instances of a label map, the largest first, so that what is drawn later stays visible.

  Pixels that touch at a corner are connected, as for OpenCV's contours.

  Args:
    labels_HxW: class ids; -1 is no class.
    options: its `instances`, `min_area` and `min_hole`.
  """
  found = []
  for class_id in np.flatnonzero(np.bincount(labels_HxW[labels_HxW >= 0])).tolist():
    regions = _regions(labels_HxW == class_id, options)
    if options.instances == "regions":
      found += [Instance(class_id, [region]) for region in regions]
    elif regions:
      found.append(Instance(class_id, regions))
  return sorted(found, key=lambda instance: -instance.area)


def _regions(mask_HxW: np.ndarray, options: Options) -> list[Region]:
  mask = mask_HxW.astype(np.uint8)
  x, y, width, height = cv2.boundingRect(mask)
  count, ids, stats, _ = cv2.connectedComponentsWithStats(
    mask[y : y + height, x : x + width], connectivity=8
  )
  regions = []
  for i in range(1, count):
    left, top, w, h, area = stats[i].tolist()
    if area >= options.min_area:
      region = ids[top : top + h, left : left + w] == i
      if options.min_hole:
        region = _filled(region, options.min_hole)
      regions.append(Region(x + left, y + top, region))
  return regions


def _filled(mask: np.ndarray, min_hole: int) -> np.ndarray:
  """The mask with its holes of fewer pixels filled."""
  outside = np.pad(~mask, 1, constant_values=True).astype(np.uint8)
  # The complement of regions that connect at corners connects at edges only.
  _, ids, stats, _ = cv2.connectedComponentsWithStats(outside, connectivity=4)
  small = stats[:, cv2.CC_STAT_AREA] < min_hole
  small[[0, ids[0, 0]]] = False  # the mask itself, and what surrounds it
  return mask | small[ids][1:-1, 1:-1]
