"""Metrics against cases computed by hand."""

import numpy as np
import pytest

from rpn_jax import metrics


def test_confusion_matrix_by_hand():
  label = np.array([[0, 0, 1], [1, 255, 2]], np.uint8)
  prediction = np.array([[0, 1, 1], [1, 0, 0]], np.int32)
  want = [[1, 1, 0], [0, 2, 0], [1, 0, 0]]
  matrix = metrics.confusion_matrix(label, prediction, 3)
  assert matrix.dtype == np.int64
  np.testing.assert_array_equal(matrix, want)


def test_scores_by_hand():
  # Class 0: 1 of union 3; class 1: 2 of union 3; class 2: 0 of union 1; class 3 nowhere.
  result = metrics.scores(
    np.array([[1, 1, 0, 0], [0, 2, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]), seen=[0, 1], unseen=[2, 3]
  )
  assert result["pAcc"] == pytest.approx(3 / 5)
  assert result["iou"] == [pytest.approx(1 / 3), pytest.approx(2 / 3), 0.0, None]
  assert result["miou_gt"] == result["miou_union"] == pytest.approx(1 / 3)
  assert result["miou_seen"] == pytest.approx(1 / 2)
  assert result["miou_unseen"] == 0.0 and result["hiou"] == 0.0


def test_union_counts_classes_that_were_only_predicted():
  result = metrics.scores(np.array([[1, 1], [0, 0]]))
  assert result["miou_gt"] == pytest.approx(1 / 2)
  assert result["miou_union"] == pytest.approx(1 / 4)
  assert result["hiou"] is None


def test_everything_ignored():
  matrix = metrics.confusion_matrix(np.full((2, 2), 255), np.zeros((2, 2)), 1000)
  assert matrix.shape == (1000, 1000) and not matrix.any()
  assert metrics.scores(matrix, [0], [1])["pAcc"] is None


def test_harmonic_mean():
  result = metrics.scores(np.array([[3, 1], [0, 4]]), seen=[0], unseen=[1])
  s, u = 3 / 4, 4 / 5
  assert result["hiou"] == pytest.approx(2 * s * u / (s + u))


def test_shapes_must_agree():
  with pytest.raises(ValueError, match="differ in shape"):
    metrics.confusion_matrix(np.zeros((2, 2)), np.zeros((2, 3)), 2)
