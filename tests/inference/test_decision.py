"""Thresholds of a background, against a plain computation over the whole image."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rpn_jax.inference import views
from rpn_jax.inference.decision import Decision
from rpn_jax.inference.refinement import Refined, Refinement
from rpn_jax.inference.sliding import SlidingWindow
from rpn_jax.models.heads import unchanged

ROWS = np.array([0, 0, 1, 2, 2, 2, 3, 4])
SIZE = 45, 70


def probabilities(scores):
  return jax.nn.softmax(40 * scores, axis=-1)


@pytest.fixture(scope="module")
def scores():
  """Cosines in blocks, of which some classes get few."""
  rng = np.random.default_rng(0)
  coarse = rng.normal(size=(5, 7, len(ROWS))) - np.linspace(0, 1.5, len(ROWS))
  return np.float32(0.06 * np.kron(coarse, np.ones((9, 10, 1))))


class Whole:
  """Scores that are there already."""

  def __init__(self, scores):
    self.scores, self.merges = scores, 0

  def merge(self, output, size, bias_C=0.0, more=()):
    assert size == self.scores.shape[:2]
    self.merges += 1
    return jax.tree.map(np.asarray, output(jnp.asarray(self.scores + bias_C), *more))


def plain(scores, decision):
  """The rules of SCLIP's segmentor, on arrays of the whole image."""
  p = np.asarray(probabilities(scores))
  p = np.stack([p[..., i == ROWS].max(-1) for i in range(ROWS.max() + 1)], -1)
  if decision.area:
    areas = np.bincount(p.argmax(-1).ravel(), minlength=p.shape[-1])
    for i in range(1, p.shape[-1]):
      if areas[i] <= decision.area * areas[1:].sum():
        p[..., i] = 0
  return np.where(p.max(-1) < decision.probability, 0, p.argmax(-1)), p


@pytest.mark.parametrize(
  "decision", [Decision(), Decision(0.45), Decision(0, 0.15), Decision(0.45, 0.15)]
)
def test_decisions_are_those_of_the_whole_image(scores, decision):
  want, _ = plain(scores, decision)
  whole = Whole(scores)
  got = decision(whole, SIZE, probabilities, ROWS)
  assert got.dtype == np.int32
  np.testing.assert_array_equal(got, want)
  assert whole.merges == (2 if decision.area else 1)
  base, _ = plain(scores, Decision())
  changed = (want != base).mean()
  assert (0.02 < changed < 0.9) if decision != Decision() else changed == 0
  assert len(np.unique(want)) >= 2


def test_small_classes_leave_their_pixels_to_the_next_best(scores):
  base = Decision()(Whole(scores), SIZE, probabilities, ROWS)
  got = Decision(0, 0.15)(Whole(scores), SIZE, probabilities, ROWS)
  areas = np.bincount(base[base > 0], minlength=5)
  small = [i for i in range(1, 5) if 0 < areas[i] <= 0.15 * areas.sum()]
  assert small and not np.isin(got, small).any()
  assert (got[np.isin(base, small)] > 0).any()  # not only the background


def test_pixels_of_a_small_class_go_to_the_best_of_the_others_whatever_its_score():
  """As those of RPN, from whose probabilities the penalty of seen classes is subtracted."""
  scores = np.full((1, 40, 3), np.float32([-0.1, -0.05, -0.2]))
  scores[0, 0, 2] = 0.5
  got = Decision(area=0.1)(Whole(scores), (1, 40), unchanged, np.arange(3))
  np.testing.assert_array_equal(got, np.ones((1, 40)))


def test_a_class_scores_as_its_best_name_and_not_as_their_sum():
  # Two names at 0.3 each lose against one of 0.4.
  p = np.log(np.float32([[[0.1, 0.1, 0.4, 0.3, 0.3, 0.1, 0.1, 0.1]]])) / 40
  assert Decision()(Whole(p), (1, 1), probabilities, ROWS).item() == 1


@pytest.mark.parametrize("values", [(1.5, 0), (0, -0.1), (float("nan"), 0)])
def test_thresholds_are_shares(values):
  with pytest.raises(ValueError, match="expected a threshold of 0 to 1, got"):
    Decision(*values)


def test_evaluation_decides_after_refining(scores, monkeypatch):
  """`SlidingWindow` on an image: windows, then PAMR at the size of the labels, then thresholds."""
  monkeypatch.setattr(views, "TILE_ELEMENTS", len(ROWS) * 16**2)
  image = np.random.default_rng(1).normal(size=(32, 48, 3)).astype(np.float32)
  kernel = np.random.default_rng(2).normal(size=(3, len(ROWS))).astype(np.float32) / 20

  def network(windows):
    return jnp.asarray(windows)[:, ::4, ::4] @ kernel

  def window(**options):
    return SlidingWindow(
      network, len(ROWS), crop=16, stride=8, activation=unchanged, probabilities=probabilities,
      class_of_row=ROWS, **options,
    )  # fmt: skip

  refinement = Refinement("pamr", steps=2, dilations=(1, 3))
  decision = Decision(0.2, 0.1)
  got = window(decision=decision, refinement=refinement)(image, SIZE)
  logits = next(window().window_logits([image]))
  refined = Refined(logits, image, refinement).merge(views.all_scores, SIZE)
  want, _ = plain(refined, decision)
  assert (got == want).mean() > 0.99  # rounding may decide elsewhere
  for other in (window(decision=decision), window(refinement=refinement)):
    assert (got == other(image, SIZE)).mean() < 0.99
