"""The moving average of a film's scores, by its formula."""

import dataclasses

import numpy as np
import pytest

from rpn_jax.inference.sliding import WindowLogits
from rpn_jax.inference.smoothing import Smoothing, mean_of
from rpn_jax.inference.views import View
from rpn_jax.models.heads import unchanged


def logits(z, views=()):
  return WindowLogits(list(views), [z], np.zeros(z.shape[-1], np.float32), unchanged)


def test_the_formula():
  rng = np.random.default_rng(0)
  z = rng.normal(size=(5, 2, 3, 3, 4)).astype(np.float32)
  smoothing, means = Smoothing(0.75), []
  for t in range(5):
    smoothed = smoothing(logits(z[t]))
    means.append(mean_of(smoothed)[0])
    # By its weights: those of a geometric series, and of the first frame what is left.
    weights = [0.25 * 0.75 ** (t - k) if k else 0.75**t for k in range(t + 1)]
    np.testing.assert_allclose(means[t], np.tensordot(weights, z[: t + 1], 1), rtol=1e-5, atol=1e-6)
  again = Smoothing(0.75, [means[2]])
  np.testing.assert_array_equal(mean_of(again(logits(z[3])))[0], means[3])


def test_another_size_begins_anew():
  smoothing = Smoothing(0.5)
  first = logits(np.ones((2, 3, 3, 4), np.float32))
  smoothing(first)
  larger = dataclasses.replace(first, logits=[np.zeros((3, 3, 3, 4), np.float32)])
  assert not mean_of(smoothing(larger))[0].any()


def test_upright_frames_are_no_average_of_lying_ones():
  """Whose windows are as many, but in other places."""
  z = np.ones((6, 3, 3, 4), np.float32)
  lying = View(448, 560, tuple((y, x) for y in (0, 112) for x in (0, 112, 224)), (336, 336))
  upright = View(560, 448, tuple((y, x) for y in (0, 112, 224) for x in (0, 112)), (336, 336))
  smoothing = Smoothing(0.5)
  smoothing(logits(z, [lying]))
  assert mean_of(smoothing(logits(0 * z, [lying])))[0].any()
  assert not mean_of(smoothing(logits(0 * z, [upright])))[0].any()


@pytest.mark.parametrize("past", [-0.1, 1.0, float("nan")])
def test_no_weight(past):
  with pytest.raises(ValueError, match="weight of the past of at least 0 and below 1"):
    Smoothing(past)
