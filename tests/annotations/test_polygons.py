"""Polygons are filled by other means, and hold the pixels of the mask within the tolerance."""

import cv2
import numpy as np
import pytest
from PIL import Image, ImageDraw
from pycocotools import mask as coco_mask

from rpn_jax.annotations import polygons
from rpn_jax.annotations.options import Options
from rpn_jax.annotations.regions import Region, find_instances
from tests.annotations import scenes

SIZES = [(1, 1), (1, 9), (9, 1), (2, 2), (13, 17), (24, 31)]


def scene(kind):
  if kind == "nested":
    return scenes.nested()
  if kind == "blobs":
    rough = np.random.default_rng(5).random((6, 8)).astype(np.float32)
    return np.where(cv2.resize(rough, (80, 60), interpolation=cv2.INTER_CUBIC) > 0.5, 0, 1)
  return scenes.noise(*SIZES[kind], kind)


def filled(ring, size):
  """The pixels whose centers are inside by the even-odd rule, with exact arithmetic."""
  height, width = size
  rows, columns = np.arange(height) + 0.5, np.arange(width) + 0.5
  mask = np.zeros(size, bool)
  for (x0, y0), (x1, y1) in zip(ring, np.roll(ring, -1, 0)):
    for row in np.flatnonzero((y0 <= rows) != (y1 <= rows)):
      mask[row] ^= columns > x0 + (rows[row] - y0) / (y1 - y0) * (x1 - x0)
  return mask


def filled_by_coco(ring, size):
  runs = coco_mask.frPyObjects([ring.ravel().tolist()], *size)
  return coco_mask.decode(coco_mask.merge(runs)).astype(bool)


def distance(points, ring):
  """Of each point (n, 2) to the nearest place on the ring."""
  found = np.full(len(points), np.inf)
  for start, end in zip(ring, np.roll(ring, -1, 0)):
    along = end - start
    share = np.clip((points - start) @ along / (along @ along or 1), 0, 1)
    found = np.minimum(found, np.hypot(*(points - start - share[:, None] * along).T))
  return found


@pytest.mark.parametrize("kind", ["nested", "blobs", *range(len(SIZES))])
def test_masks_come_back(kind):
  label = scene(kind)
  covered = np.full(label.shape, -1)
  for instance in find_instances(label, Options()):
    (region,) = instance.regions
    mask = scenes.full_mask(region, label.shape)
    covered[mask] = instance.class_id
    exact = polygons.polygon(region, 0)
    np.testing.assert_array_equal(filled(exact, label.shape), mask)
    np.testing.assert_array_equal(filled_by_coco(exact, label.shape), mask)
    assert polygons.area(exact) == mask.sum()
    for tolerance in (1, 2.5):
      ring = polygons.polygon(region, tolerance)
      assert len(ring) >= 3 and polygons.area(ring) > 0
      assert ring.min() >= 0 and (ring.max(0) <= label.shape[::-1]).all()
      for fill in (filled, filled_by_coco):
        wrong = np.argwhere(fill(ring, label.shape) != mask)[:, ::-1] + 0.5
        assert (distance(wrong, ring) <= tolerance).all()
  np.testing.assert_array_equal(covered, label)  # every pixel with a class, and no other


def test_simplifying_leaves_out_points():
  label = scene("blobs")
  points = lambda tolerance: sum(
    len(polygons.polygon(r, tolerance)) for i in find_instances(label, Options()) for r in i.regions
  )
  exact, one, three = map(points, (0, 1, 3))
  assert exact > 3 * one > 3 * three


def test_a_long_thin_spike_stays():
  """A point beyond the ends of a chord is near the chord's line, and far from the chord."""
  mask = np.zeros((30, 60), bool)
  mask[10:, 10:20] = True
  mask[10, 10:55] = True
  ring = polygons.polygon(Region(0, 0, mask), 1.5)
  assert ring[:, 0].max() >= 55 - 1.5
  ring = np.array([(0, 0), (10, 0), (90, 1), (10, 1), (10, 8), (0, 8)])
  assert 90 in polygons.simplified(ring, 1)[:, 0]


def test_a_ring_that_would_vanish_stays():
  for mask in (np.ones((1, 1), bool), np.ones((1, 40), bool), np.eye(7, dtype=bool)):
    (outline,) = polygons.outlines(mask)
    ring = polygons.simplified(outline, 20)
    assert polygons.area(ring) == mask.sum() and len(ring) >= 4


def test_cuts_paint_nothing_outside():
  """Programs that draw the outline, too, as labelme: at most the pixels at the region's edge."""
  label = scenes.nested()
  for instance in find_instances(label, Options()):
    mask = scenes.full_mask(instance.regions[0], label.shape)
    drawn = Image.new("1", mask.shape[::-1])
    points = [tuple(point) for point in polygons.polygon(instance.regions[0], 0).tolist()]
    ImageDraw.Draw(drawn).polygon(points, fill=1, outline=1)
    painted = np.array(drawn)
    around = cv2.dilate(mask.astype(np.uint8), np.ones((3, 3), np.uint8)).astype(bool)
    assert painted[mask].all() and not painted[~around].any()


def test_holes_and_islands():
  label = scenes.nested()
  by_class = {i: [] for i in range(5)}
  for instance in find_instances(label, Options()):
    by_class[instance.class_id].append(instance)
  assert [len(by_class[i]) for i in range(5)] == [6, 2, 0, 2, 3]
  rings = polygons.outlines(by_class[0][0].regions[0].mask)
  assert len(rings) == 2 and polygons.area(rings[1]) == 26 * 22
  (diagonal,) = (i for i in by_class[3] if i.area == 3)
  assert diagonal.regions[0].mask.tolist() == np.eye(3, dtype=bool).tolist()


def test_what_is_small_is_left_out_and_filled():
  label = scenes.nested()
  areas = lambda **options: [i.area for i in find_instances(label, Options(**options))]
  every = areas()
  assert every == sorted(every, reverse=True) and sum(every) == (label >= 0).sum()
  assert areas(min_area=4) == [area for area in every if area >= 4]
  assert areas(min_area=10**6) == []
  (frame,) = (
    i for i in find_instances(label, Options(min_hole=13)) if i.regions[0].mask.shape == (3, 14)
  )
  assert frame.area == 3 * 14  # its hole has 12 pixels
  assert sum(areas(min_hole=10**6)) > label.size  # holes are filled, islands within stay


def test_an_instance_of_each_class():
  label = scenes.nested()
  found = find_instances(label, Options(instances="classes"))
  assert sorted(i.class_id for i in found) == [0, 1, 3, 4]
  for instance in found:
    mask = scenes.full_mask(instance.union(), label.shape)
    np.testing.assert_array_equal(mask, label == instance.class_id)
