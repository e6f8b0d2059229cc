"""PAMR against its formula, pixel by pixel; test_training_free_parity.py has recorded arrays."""

import functools
import itertools

import jax
import numpy as np
import pytest

from rpn_jax.models.pamr import CHUNK, pamr


def by_hand(image, scores, steps, dilations):
  height, width = image.shape[:2]
  signs = [s for s in itertools.product((-1, 0, 1), repeat=2) if s != (0, 0)]
  inside = lambda y, x: (min(max(y, 0), height - 1), min(max(x, 0), width - 1))
  weights = {}
  for y, x in np.ndindex(height, width):
    places = [inside(y + d * a, x + d * b) for d in dilations for a, b in signs]
    around = np.stack([image[p] for p in places] + [image[y, x]] * len(dilations))
    deviation = around.std(0, ddof=1)
    score = [-np.mean(abs(image[y, x] - image[p]) / (1e-8 + 0.1 * deviation)) for p in places]
    e = np.exp(score - np.max(score))
    weights[y, x] = list(zip(e / e.sum(), places))
  for _ in range(steps):
    scores = np.array([[sum(w * scores[p] for w, p in weights[y, x]) for x in range(width)]
                       for y in range(height)])  # fmt: skip
  return scores


@pytest.fixture(scope="module")
def case():
  rng = np.random.default_rng(0)
  image = rng.normal(size=(7, 9, 3)).astype(np.float32)
  image[:3, :4] = 0.25  # without any deviation
  # Chunks of classes that do not divide their number.
  return image, rng.normal(size=(7, 9, CHUNK + 3)).astype(np.float32)


refine = jax.jit(pamr, static_argnames=("steps", "dilations"))


def test_formula(case):
  want = by_hand(*map(np.float64, case), 2, (1, 3))
  got = refine(*case, case[0].shape[:2], steps=2, dilations=(1, 3))
  np.testing.assert_allclose(got, want, atol=1e-5)


def test_images_that_are_padded_share_a_program(case):
  image, scores = case
  before = refine._cache_size()
  for height, width in ((7, 9), (5, 8), (1, 1)):
    part = image[:height, :width], scores[:height, :width]
    exact = functools.partial(pamr, size=(height, width), steps=3, dilations=(2,))
    want = jax.jit(exact)(*part)
    # Whatever lies beyond.
    whole = np.full((12, 12, 3), 1e6, np.float32), np.full((12, 12, CHUNK + 3), np.nan, np.float32)
    for array, inside in zip(whole, part):
      array[:height, :width] = inside
    got = refine(*whole, (np.int32(height), np.int32(width)), steps=3, dilations=(2,))
    np.testing.assert_allclose(got[:height, :width], want, atol=1e-5)
  assert refine._cache_size() == before + 1


def test_few_classes(case):
  image, scores = case
  got = refine(image, scores[..., :2], (7, 9), steps=2, dilations=(1, 3))
  np.testing.assert_allclose(got, by_hand(image, scores[..., :2], 2, (1, 3)), atol=1e-5)
