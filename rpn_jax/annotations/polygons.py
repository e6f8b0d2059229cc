"""Outlines of regions: along the edges of pixels, simplified, with holes cut in.

A ring is an array (n, 2) of (x, y), closed from its last point to its first.
"""

import cv2
import numpy as np

from rpn_jax.annotations.regions import Region

# Decimals of coordinates in pixels: those of a cut end between pixels.
DECIMALS = 3


def polygon(region: Region, tolerance: float) -> np.ndarray:
  """A region as a single ring in the image's coordinates, by the even-odd rule.

  Args:
    region: connected.
    tolerance: pixels whose center is farther from the ring are inside if they are of the region,
      else outside.
  """
  outer, *holes = (simplified(ring, tolerance) for ring in outlines(region.mask))
  corner = np.array([region.left, region.top])
  return np.round(joined(outer, holes) + corner, DECIMALS)


def outlines(mask: np.ndarray) -> list[np.ndarray]:
  """The rings of a connected mask along the edges of its pixels, holes after the outer one.

  OpenCV's contours go through the centers of the outermost pixels: a pixel would be a point, and a
  line of pixels have no area. On the doubled mask they pass on either side of every edge.
  """
  doubled = mask.astype(np.uint8).repeat(2, 0).repeat(2, 1)
  contours, hierarchy = cv2.findContours(doubled, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
  parents = np.asarray(hierarchy)[0, :, 3]
  order = np.argsort(parents >= 0, kind="stable")
  return [_corners((contours[i][:, 0] + 1) // 2) for i in order]


def _corners(ring: np.ndarray) -> np.ndarray:
  """The ring without repeated points and without those on straight lines."""
  ring = ring[(ring != np.roll(ring, 1, 0)).any(1)]
  before, after = ring - np.roll(ring, 1, 0), np.roll(ring, -1, 0) - ring
  return ring[before[:, 0] * after[:, 1] != before[:, 1] * after[:, 0]]


def simplified(ring: np.ndarray, tolerance: float) -> np.ndarray:
  """Some of the ring's points, from whose polygon no other point is farther than the tolerance.

  Douglas and Peucker (1973), with distances to segments: `cv2.approxPolyDP` measures them to
  infinite lines, and may lose a long thin spike. A ring of which nothing would remain is returned
  as it is.
  """
  if not tolerance:
    return ring
  closed = np.concatenate([ring, ring[:1]]).astype(np.float64)
  farthest = int(((closed - closed[0]) ** 2).sum(1).argmax())
  keep = np.zeros(len(ring), bool)
  keep[[0, farthest]] = True
  pending = [(0, farthest), (farthest, len(ring))]
  while pending:
    start, end = pending.pop()
    if end - start > 1:
      squared = _squared_distances(closed[start + 1 : end], closed[start], closed[end])
      if squared.max() > tolerance**2:
        middle = start + 1 + int(squared.argmax())
        keep[middle] = True
        pending += [(start, middle), (middle, end)]
  kept = ring[keep]
  return kept if area(kept) else ring


def _squared_distances(points: np.ndarray, start: np.ndarray, end: np.ndarray) -> np.ndarray:
  """Squared distances of points (n, 2) to a segment, which may be a point."""
  along = end - start
  length = along @ along
  share = np.clip((points - start) @ along / length, 0, 1) if length else np.zeros(len(points))
  return ((points - start - share[:, None] * along) ** 2).sum(1)


def area(ring: np.ndarray) -> float:
  """The area within a ring, in squared pixels; what is within a hole that is joined is not."""
  x, y = np.asarray(ring, np.float64).T
  return abs(float((x * np.roll(y, -1) - np.roll(x, -1) * y).sum())) / 2


def joined(outer: np.ndarray, holes: list[np.ndarray]) -> np.ndarray:
  """A ring with its holes: each joined to what is to its left by a cut that is passed twice.

  The formats have no holes, and a cut has no area. It ends at the nearest edge, so that it lies
  within the region, and a program that also draws the outline paints no other pixels.
  """
  ring = outer
  # From left to right, so that what a cut ends at is already part of the ring.
  for hole in sorted(holes, key=lambda hole: hole[:, 0].min()):
    k = int(hole[:, 0].argmin())
    x, y = hole[k].astype(np.float64)
    start, end = ring.astype(np.float64), np.roll(ring, -1, 0).astype(np.float64)
    rises = end[:, 1] - start[:, 1]
    crossed = (start[:, 1] <= y) != (end[:, 1] <= y)
    share = np.divide(y - start[:, 1], rises, out=np.zeros(len(ring)), where=crossed)
    at = start[:, 0] + share * (end[:, 0] - start[:, 0])
    at[~crossed | (at > x)] = -np.inf
    i = int(at.argmax())
    if np.isfinite(at[i]):
      door = np.array([at[i], y])
    else:  # simplified, the hole reaches beyond the region
      i = int(((start - (x, y)) ** 2).sum(1).argmin())
      door = start[i]
    parts = [start[: i + 1], door[None], hole[k:], hole[: k + 1], door[None], start[i + 1 :]]
    ring = np.concatenate(parts)
  return ring[(ring != np.roll(ring, 1, 0)).any(1)]
