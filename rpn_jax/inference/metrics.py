"""Segmentation metrics from one summed confusion matrix.

Divisions happen once, after the confusion matrix of the whole evaluation is complete.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike


def confusion_matrix(
  label: ArrayLike, prediction: ArrayLike, classes: int, ignore_label: int = 255
) -> np.ndarray:
  """Pixel counts (C, C) int64 without ignored pixels; rows are ground truth, columns prediction.

  Args:
    label: integers of any shape, 0..C-1 or `ignore_label`.
    prediction: integers of the same shape, 0..C-1.
    classes: C.
    ignore_label: must not be a class id; 255 works for up to 255 classes.

  Raises:
    ValueError: the shapes differ, or a value is out of range.
  """
  label = np.asarray(label).astype(np.int64)
  prediction = np.asarray(prediction).astype(np.int64)
  if label.shape != prediction.shape:
    raise ValueError(f"label {label.shape} and prediction {prediction.shape} differ in shape")
  if 0 <= ignore_label < classes:
    raise ValueError(f"{ignore_label} cannot mean 'ignored': it is one of {classes} classes")
  valid = label != ignore_label
  index = label[valid] * classes + prediction[valid]
  for name, ids in (("label", label[valid]), ("prediction", prediction)):
    wrong = ids[(ids < 0) | (ids >= classes)]
    if wrong.size:
      raise ValueError(
        f"expected a {name} of class ids 0..{classes - 1}"
        f"{f' or {ignore_label}' if name == 'label' else ''}, got {wrong[0]}"
      )
  return np.bincount(index, minlength=classes**2).reshape(classes, classes)


def harmonic_mean(a: float, b: float) -> float:
  """2ab / (a + b), 0 where both are."""
  return 2 * a * b / (a + b) if a + b else 0.0


def scores(confusion_CxC: np.ndarray, seen: Sequence[int] = (), unseen: Sequence[int] = ()) -> dict:
  """Metrics as fractions in [0, 1]; None if there is nothing to average.

  `miou_gt` averages over the classes present in the ground truth, `miou_union` over those present
  in ground truth or prediction. The means over seen and unseen classes are of the second kind, as
  in the official code, and `hiou` is their harmonic mean. Without unseen classes
  there are no groups: the mean over the seen ones would be that over all.

  Args:
    confusion_CxC: pixel counts; rows are ground truth, columns prediction.
    seen: ids of the seen classes.
    unseen: ids of the unseen classes.

  Returns:
    pAcc, miou_gt, miou_union, miou_seen, miou_unseen, hiou, and `iou`, a list of C values.
  """
  correct = np.diag(confusion_CxC).astype(np.float64)
  truth, predicted = confusion_CxC.sum(1), confusion_CxC.sum(0)
  union = truth + predicted - correct
  iou = np.divide(correct, union, out=np.full_like(correct, np.nan), where=union > 0)

  def mean(ids: Sequence[int] | np.ndarray) -> float | None:
    values = iou[np.asarray(ids, np.int64)]
    values = values[~np.isnan(values)]
    return float(values.mean()) if len(values) else None

  s, u = mean(seen) if len(unseen) else None, mean(unseen)
  harmonic = None if s is None or u is None else harmonic_mean(s, u)
  total = confusion_CxC.sum()
  return {
    "pAcc": float(correct.sum() / total) if total else None,
    "miou_gt": mean(np.flatnonzero(truth > 0)),
    "miou_union": mean(np.flatnonzero(union > 0)),
    "miou_seen": s,
    "miou_unseen": u,
    "hiou": harmonic,
    "iou": [None if np.isnan(v) else float(v) for v in iou],
  }
