"""Masks as COCO's annotations hold them: run lengths, compressed or not, or polygons.

pycocotools, which fills the polygons, checks nothing: run lengths that end early give a mask of
whatever was in the memory, and polygons of four numbers are taken for boxes. So all is checked here
first, and run lengths are read here.
"""

import numpy as np
from pycocotools import mask as coco_mask

_BITS = 5  # of a run length in one character, of six with the mark that more follow
_MAX_CHARACTERS = 7  # of a run length: 34 bits and a sign, more than any image has pixels


def read_mask(segmentation: dict | list, shape: tuple[int, int]) -> np.ndarray:
  """The mask of a COCO segmentation, bool [H,W].

  Args:
    segmentation: {"size": [H, W], "counts": list of run lengths, or a text of them}; or a list of
      polygons [x, y, x, y, …] in pixels, of which those without area (see `count_empty`) are left
      out.
    shape: (H, W) of the image.

  Raises:
    ValueError, or another error of NumPy or Python: anything else, such as run lengths that do not
      cover the image exactly, or polygons far outside of it.
  """
  if isinstance(segmentation, list):
    return _fill(segmentation, shape)
  if tuple(segmentation["size"]) != shape:
    raise ValueError(f"a mask on {segmentation['size']}")
  counts = segmentation["counts"]
  if isinstance(counts, str):
    lengths = _unpack(counts)
  else:
    lengths = np.asarray(counts)
    if lengths.dtype.kind not in "iu" or lengths.ndim != 1:
      raise ValueError("run lengths that are no integers")
  if (lengths < 0).any():
    raise ValueError("a negative run length")
  covered, pixels = int(lengths.sum()), shape[0] * shape[1]
  if (lengths > pixels).any() or covered != pixels:
    raise ValueError(f"run lengths of {covered:,} of {pixels:,} pixels")
  # Runs of 0, 1, 0, … down the columns.
  return np.repeat(np.arange(len(lengths)) % 2 == 1, lengths).reshape(shape, order="F")


def count_empty(segmentation: object) -> int:
  """The number of polygons of fewer than three points; 1 for an empty list of polygons."""
  if not isinstance(segmentation, list):
    return 0
  return sum(map(_is_empty, segmentation)) if segmentation else 1


def _is_empty(polygon: object) -> bool:
  return isinstance(polygon, list) and len(polygon) < 6 and len(polygon) % 2 == 0


def _fill(polygons: list, shape: tuple[int, int]) -> np.ndarray:
  mask_HxW = np.zeros(shape, bool)
  for polygon in polygons:
    if _is_empty(polygon):
      continue
    corners = np.asarray(polygon, np.float64)
    if corners.ndim != 1 or len(corners) % 2:
      raise ValueError(f"a polygon of {corners.size} numbers in place of pairs")
    # pycocotools walks along every edge, however long.
    if not (np.abs(corners) <= 2 * max(shape)).all():
      raise ValueError("corners far outside")
    mask_HxW |= coco_mask.decode(coco_mask.frPyObjects([corners.tolist()], *shape))[..., 0] > 0
  return mask_HxW


def _unpack(text: str) -> np.ndarray:
  """Run lengths of COCO's compressed text, int64.

  A length is written from its lowest bits on, in two's complement; from the fourth on it is the
  difference to the one before the last.
  """
  codes = np.frombuffer(text.encode("ascii"), np.uint8).astype(np.int64) - 48
  if not codes.size or codes.min() < 0 or codes.max() > 63:
    raise ValueError(f"the text {text[:20]!r} in place of run lengths")
  is_last = codes & 32 == 0
  if not is_last[-1]:
    raise ValueError("compressed run lengths that end early")
  ends = np.flatnonzero(is_last)
  starts = np.concatenate([[0], ends[:-1] + 1])
  if (ends - starts).max() >= _MAX_CHARACTERS:
    raise ValueError("a compressed run length of too many bits")
  shifts = _BITS * (np.arange(len(codes)) - np.repeat(starts, ends - starts + 1))
  lengths = np.add.reduceat((codes & 31) << shifts, starts)
  lengths -= (codes[ends] >> 4 & 1) << (shifts[ends] + _BITS)  # the sign
  for first in (1, 2):
    lengths[first::2] = np.cumsum(lengths[first::2])
  return lengths
