"""Refined scores of images of any size; PAMR itself is tested in tests/models/test_pamr.py."""

import jax
import numpy as np
import pytest

from rpn_jax.base.errors import InputError
from rpn_jax.inference import refinement, views
from rpn_jax.inference.refinement import Refined, Refinement, refine
from rpn_jax.inference.sliding import SlidingWindow
from rpn_jax.models.pamr import pamr

SETTINGS = Refinement("pamr", steps=3, dilations=(1, 2))


def arrays(height, width, classes, seed=0):
  rng = np.random.default_rng(seed)
  return (
    rng.random((height, width, classes), np.float32),
    rng.random((height, width, 3), np.float32),
  )


def plain(scores, image, settings=SETTINGS):
  exact = jax.jit(pamr, static_argnums=2, static_argnames=("steps", "dilations"))
  options = {"steps": settings.steps, "dilations": settings.dilations}
  return np.asarray(exact(image, scores, image.shape[:2], **options))


@pytest.mark.parametrize("classes, chunk", [(5, 16), (5, 2), (1, 16)])
def test_classes_are_refined_in_chunks(classes, chunk, monkeypatch):
  monkeypatch.setattr(refinement, "CHUNK", chunk)
  scores, image = arrays(21, 34, classes)  # padded to 24 by 48
  want = plain(scores, image)
  assert abs(want - scores).max() > 0.1
  got = refine(scores, image, SETTINGS)
  assert got is scores  # in place
  np.testing.assert_allclose(got, want, atol=1e-5)


class Given:
  def __init__(self, scores):
    self.scores, self.sizes = scores, []

  def merge(self, output, size, bias_C=0.0, more=()):
    self.sizes.append(size)
    return self.scores[: size[0], : size[1]].copy()


def test_scores_are_refined_once_and_read_in_strips(monkeypatch):
  monkeypatch.setattr(refinement, "STRIP_ELEMENTS", 4 * 48 * 5)
  scores, image = arrays(21, 34, 5)
  given = Given(scores.copy())
  refined = Refined(given, image, SETTINGS)
  want = plain(scores, image)
  bias = np.float32([0, 0.2, 0, 0, -0.1])
  np.testing.assert_allclose(refined.merge(views.all_scores, (21, 34)), want, atol=1e-5)
  got = refined.merge(views.class_ids, (21, 34), bias)
  clear = np.abs(np.diff(np.sort(want + bias, -1)[..., -2:])[..., 0]) > 1e-4
  np.testing.assert_array_equal(got[clear], (want + bias).argmax(-1)[clear])
  assert got.shape == (21, 34) and given.sizes == [(21, 34)]
  refined.merge(views.class_ids, (10, 12))
  assert given.sizes == [(21, 34), (10, 12)]


def test_images_of_many_sizes_share_programs():
  refinement._pamr_program.cache_clear()
  refinement.strip_program.cache_clear()
  for height, width in [(17, 30), (20, 32), (24, 25), (18, 27)]:
    scores, image = arrays(height, width, 2)
    Refined(Given(scores), image, SETTINGS).merge(views.class_ids, (height, width))
  assert refinement._pamr_program.cache_info().misses == 1
  assert refinement.strip_program.cache_info().misses == 1


def test_an_unknown_refinement():
  with pytest.raises(InputError, match="refinement 'pamrr' is not known; did you mean 'pamr'"):
    SlidingWindow(None, 2, crop=8, stride=8, refinement=Refinement("pamrr"))
