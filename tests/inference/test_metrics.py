"""Metrics against cases computed by hand."""

import numpy as np
import pytest

from rpn_jax.inference import metrics


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
  matrix = metrics.confusion_matrix(np.full((2, 2), 65535), np.zeros((2, 2), int), 1000, 65535)
  assert matrix.shape == (1000, 1000) and not matrix.any()
  result = metrics.scores(matrix, [0], [1])
  assert result.pop("iou") == [None] * 1000
  assert set(result.values()) == {None}


def test_a_thousand_classes():
  # Every class covers 2 pixels; of each but class 255, one is taken for the next class.
  label = np.repeat(np.arange(1000, dtype=np.uint16), 2)
  prediction = (label + np.tile([0, 1], 1000)) % 1000
  prediction[511] = 255
  matrix = metrics.confusion_matrix(label, prediction, 1000, ignore_label=65535)
  assert matrix.sum() == 2000 and (matrix.sum(1) == 2).all()
  result = metrics.scores(matrix, range(999), [999])
  # One right of three in the union; 255 has both and one of 254's; 256 lost nothing to 255.
  assert result["iou"][0] == pytest.approx(1 / 3) and result["iou"][255] == pytest.approx(2 / 3)
  assert result["iou"][256] == pytest.approx(1 / 2)
  assert result["miou_gt"] == pytest.approx((998 / 3 + 2 / 3 + 1 / 2) / 1000)
  assert result["pAcc"] == pytest.approx(1001 / 2000)


def test_one_class():
  matrix = metrics.confusion_matrix(np.array([0, 0, 255]), np.zeros(3, int), 1)
  result = metrics.scores(matrix, [0])  # without unseen classes, the mean over all is no other
  assert matrix.tolist() == [[2]] and result["pAcc"] == result["miou_gt"] == 1
  assert result["miou_seen"] is result["miou_unseen"] is result["hiou"] is None


def test_absent_classes_are_in_no_mean():
  # Class 1 is nowhere, class 2 only in the prediction.
  matrix = np.array([[3, 0, 1], [0, 0, 0], [0, 0, 0]])
  result = metrics.scores(matrix, [0, 1], [1])
  assert result["iou"] == [0.75, None, 0.0]
  assert result["miou_gt"] == 0.75 and result["miou_union"] == 0.375
  assert result["miou_seen"] == 0.75 and result["miou_unseen"] is None


@pytest.mark.parametrize(
  "label, prediction, classes, ignore, message",
  [
    ([0, 3], [0, 0], 3, 255, r"label of class ids 0\.\.2 or 255, got 3"),
    ([0, -1], [0, 0], 3, 255, r"label .* got -1"),
    # 1 * 3 + 4 would have been counted as truth 2, prediction 1.
    ([0, 1], [0, 4], 3, 255, r"prediction of class ids 0\.\.2, got 4"),
    ([2, 1], [-3, 0], 3, 255, r"prediction .* got -3"),
    ([0, 255], [0, 9], 3, 255, r"prediction .* got 9"),
    ([0], [0], 256, 255, "255 cannot mean 'ignored'"),
  ],
)
def test_values_outside_the_classes_are_refused(label, prediction, classes, ignore, message):
  with pytest.raises(ValueError, match=message):
    metrics.confusion_matrix(np.array(label), np.array(prediction), classes, ignore)


def test_harmonic_mean():
  result = metrics.scores(np.array([[3, 1], [0, 4]]), seen=[0], unseen=[1])
  s, u = 3 / 4, 4 / 5
  assert result["hiou"] == pytest.approx(2 * s * u / (s + u))


def test_shapes_must_agree():
  with pytest.raises(ValueError, match="differ in shape"):
    metrics.confusion_matrix(np.zeros((2, 2)), np.zeros((2, 3)), 2)


def test_both_averages_are_those_of_detectron2(golden_catseg):
  with np.load(golden_catseg / "metrics.npz") as recorded:
    confusion = recorded["confusion"][:-1, :-1].T  # the last column counts ignored pixels
    # The other two, weighted by frequency and the mean accuracy, are not reported here.
    miou, _, _, pixel_accuracy = recorded["miou_fwiou_macc_pacc"].tolist()
    before_2022_07 = recorded["miou_before_2022_07"].item()
    iou = recorded["iou_per_class"]
  present = confusion.sum(1) > 0
  assert not present.all() and confusion.sum(0)[~present].any()  # the two averages differ
  result = metrics.scores(confusion)
  assert 100 * result["miou_gt"] == pytest.approx(miou, rel=1e-6)
  assert 100 * result["miou_union"] == pytest.approx(before_2022_07, rel=1e-6)
  assert 100 * result["pAcc"] == pytest.approx(pixel_accuracy, rel=1e-6)
  np.testing.assert_allclose(100 * np.float64(result["iou"])[present], iou[present], rtol=1e-6)
  assert np.isnan(iou[~present]).all()
