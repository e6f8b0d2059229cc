"""Masks as COCO stores them, against a plain reading of the format, and all that is refused."""

import numpy as np
import pytest

from data_pipelines.sources.coco_masks import count_empty, read_mask
from tests.data_pipelines.raw_pascal import packed, rle

# pycocotools 2.0.11 has the array interface of NumPy 1.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (1, 40), (60, 90), (300, 200)])
def test_run_lengths(shape, compressed):
  rng = np.random.default_rng(0)
  masks = [np.zeros(shape, bool), np.ones(shape, bool), rng.random(shape) < 0.5]
  masks.append(np.arange(shape[0] * shape[1]).reshape(shape) // 37 % 3 == 1)
  for mask in masks:
    np.testing.assert_array_equal(read_mask(rle(mask, compressed), shape), mask)


WHOLE = packed([3, 20, 7])


@pytest.mark.parametrize(
  ("counts", "complaint"),
  [
    ("", "in place of run lengths"),
    (WHOLE[:-1], "run lengths of 23 of 30"),
    (packed([3, 20, 8]), "run lengths of 31 of 30"),
    (packed([0, 1000, 7])[:-2], "that end early"),
    (packed([0, 40, -10]), "negative"),
    (packed([2**33]), "of 30 pixels"),
    ("oooooooo0", "too many bits"),
    ("03 3", "in place of run lengths"),
    ("ä", "ascii"),
    ([], "no integers"),
    ([3.0, 27.0], "no integers"),
    ([3, 20], "run lengths of 23 of 30"),
    ([2**62, 2**62, 2**62, 2**62, 30], "of 30 pixels"),  # 30, if the sum overflowed
    (30, "no integers"),
    (None, "no integers"),
  ],
)
def test_run_lengths_that_do_not_cover_the_image(counts, complaint):
  with pytest.raises(ValueError, match=complaint):
    read_mask({"size": [6, 5], "counts": counts}, (6, 5))


def test_polygons():
  mask = np.zeros((9, 8), bool)
  mask[2:5, 1:7] = mask[6:8, 0:3] = True
  whole = [[1, 2, 7, 2, 7, 5, 1, 5], [0, 6, 3, 6, 3, 8, 0, 8]]
  np.testing.assert_array_equal(read_mask(whole, (9, 8)), mask)
  empty = [[], [3, 3], [1, 1, 6, 6]]  # two points would be a box for pycocotools
  np.testing.assert_array_equal(read_mask([*empty, *whole], (9, 8)), mask)
  assert not read_mask(empty, (9, 8)).any() and not read_mask([], (9, 8)).any()


@pytest.mark.parametrize(
  ("polygons", "complaint"),
  [
    ([[0, 0, 3, 0, 3, 3, 0]], "of 7 numbers in place of pairs"),
    ([[1, 2, 3]], "of 3 numbers in place of pairs"),
    ([0, 0, 3, 0, 3, 3], "of 1 numbers in place of pairs"),
    ([[0, 0, 3, 0, 99, 3]], "far outside"),
    ([[0, 0, 3, 0, float("nan"), 3]], "far outside"),
    ([["x"] * 6], "could not convert"),
  ],
)
def test_polygons_that_are_none(polygons, complaint):
  with pytest.raises(ValueError, match=complaint):
    read_mask(polygons, (9, 8))


def test_empty_polygons_are_counted():
  assert count_empty([[], [1, 1], [1, 1, 2, 2], [0, 0, 3, 0, 3, 3], [1, 2, 3]]) == 3
  assert count_empty([]) == 1
  assert count_empty({"size": [1, 1], "counts": ""}) == count_empty(None) == 0
