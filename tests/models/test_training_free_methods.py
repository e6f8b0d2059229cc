"""Parts of the training-free methods against their formulas, number by number; the recorded arrays
of the official code are in tests/test_training_free_parity.py."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rpn_jax.models.clip import CLIPConfig
from rpn_jax.models.training_free import attention, default_method, pearl, res_clip, sc_clip


def softmax(x):
  e = np.exp(x - x.max(-1, keepdims=True))
  return e / e.sum(-1, keepdims=True)


def places(height, width):
  return list(itertools.product(range(height), range(width)))


def test_scores_head_by_head():
  q, v = (np.asarray(jax.random.normal(jax.random.key(i), (2, 5, 3, 4))) for i in range(2))
  bias = np.random.default_rng(0).normal(size=(2, 5, 5))
  attend = lambda v, q: attention.attend_by_scores(lambda q: attention.dot(q, q) + bias, v, q)
  got = jax.jit(attend)(v, q)
  for image, head in itertools.product(range(2), range(3)):
    own = q[image, :, head]
    want = softmax(own @ own.T / 2 + bias[image]) @ v[image, :, head]
    np.testing.assert_allclose(got[image, :, head], want, atol=1e-5)


def test_neighborhood():
  omega = np.asarray(attention.neighborhood(3, 5, 1.5))
  assert not omega[0].any() and not omega[:, 0].any()
  for (i, (y, x)), (j, (b, a)) in itertools.product(enumerate(places(3, 5)), repeat=2):
    want = np.exp(-((y - b) ** 2 + (x - a) ** 2) / (2 * 1.5**2))
    np.testing.assert_allclose(omega[1 + i, 1 + j], want, rtol=1e-5)


# SC-CLIP


def test_outlier_factor():
  x = np.random.default_rng(0).normal(size=(2, 9, 3)).astype(np.float32) + 100
  x[1, 4] += 5
  got = jax.jit(sc_clip.outlier_factor, static_argnums=1)(x, 3)
  for image, factors in zip(np.float64(x), got):
    squared = [[((a - b) ** 2).sum() for b in image] for a in image]
    nearest = [sorted((d, j) for j, d in enumerate(row) if j != i)[:3]
               for i, row in enumerate(squared)]  # fmt: skip
    density = [1 / near[-1][0] for near in nearest]
    want = [np.mean([density[j] for _, j in near]) / density[i] for i, near in enumerate(nearest)]
    np.testing.assert_allclose(factors, want, rtol=1e-4)
  assert got[1].argmax() == 4


def test_outliers_are_filled_from_the_neighbors_of_their_own_grid():
  """On 2 x 4 patches, where rows taken for columns would give other neighbors."""
  x = np.arange(8, dtype=np.float32)[None, :, None] ** 2
  outlier = np.zeros((1, 8), bool)
  outlier[0, [1, 5, 7]] = True
  fill = jax.jit(sc_clip.fill_outliers, static_argnums=2)
  got = fill(x, outlier, (2, 4))[0, :, 0]
  want = x[0, :, 0].copy()
  want[1] = want[5] = (0 + 2**2 + 4**2 + 6**2) / 4  # 1 and 5 are beside each other
  want[7] = (2**2 + 3**2 + 6**2) / 3
  np.testing.assert_allclose(got, want)
  np.testing.assert_array_equal(fill(x, np.ones((1, 8), bool), (2, 4)), x)


def test_focus_and_average():
  similarity = np.float32([[[1.0, 0.2], [0.2, 0.6]]])
  focused = jax.jit(sc_clip.focused)
  got = focused(similarity)  # the mean is 0.5
  np.testing.assert_allclose(got, [[[1, 0], [0, 1]]])
  similarity = np.float32([[[1, 0.9, -1], [0.9, 1, -1], [-1, -1, 1]]])
  e = np.exp(3 * 0.1)
  want = [[e / (1 + e), 1 / (1 + e), 0], [1 / (1 + e), e / (1 + e), 0], [0, 0, 1]]
  np.testing.assert_allclose(focused(similarity)[0], want, rtol=1e-5)
  x = np.float32([[[1, 0], [0, 2]]])
  weight = np.float32([[[1, 3], [0, 0]]])
  np.testing.assert_allclose(
    jax.jit(sc_clip.average)(x, weight), [[[0.25, 1.5], [0, 0]]], rtol=1e-5
  )


# ResCLIP


@pytest.mark.parametrize("height, width", [(4, 4), (3, 6), (5, 2), (1, 1)])
def test_lines_that_leave_a_label(height, width):
  label = np.random.default_rng(height).integers(0, 2, (height, width))
  longest = max(height, width) - 1
  got = np.asarray(jax.jit(res_clip.connected)(label))
  for (i, start), (j, end) in itertools.product(enumerate(places(height, width)), repeat=2):
    distance = max(abs(start[0] - end[0]), abs(start[1] - end[1]))
    clear = True
    for n in range(distance + 1):
      t = n / max(longest, 1)
      at = tuple(round(a * (1 - t) + b * t) for a, b in zip(start, end))  # halves to even
      clear &= label[at] == label[start]
    assert got[i, j] == clear, (start, end)


def test_feedback():
  label = np.array([[0, 0, 1, 0], [0, 0, 1, 0]])
  feedback = jax.jit(res_clip.feedback, static_argnames=("std", "decay"))
  got = np.asarray(feedback(label, std=0.5, decay=True))
  flat, at = label.ravel(), places(2, 4)
  connected = np.asarray(jax.jit(res_clip.connected)(label))
  weight = np.zeros((8, 8))
  for i, j in itertools.product(range(8), repeat=2):
    distance = max(abs(at[i][0] - at[j][0]), abs(at[i][1] - at[j][1]))
    if flat[i] == flat[j]:
      weight[i, j] = 1 if connected[i, j] else np.exp(-distance / 3)
  assert not connected[0, 3] and weight[0, 3] == np.exp(-1)
  # 6 · 0.5 + 1 = 4 taps are made 5, and rows run over into the next row of the grid.
  kernel = np.exp(-((np.arange(5) - 2) ** 2) / (2 * 0.5**2))
  want = np.stack([np.convolve(row, kernel / kernel.sum(), "same") for row in weight])
  want /= want.sum(-1, keepdims=True)
  np.testing.assert_allclose(got[1:, 1:], want, atol=1e-6)
  assert not got[0].any() and not got[:, 0].any()

  plain = np.asarray(feedback(label, std=0.5, decay=False))
  want = np.stack([np.convolve(row, kernel / kernel.sum(), "same") for row in weight > 0])
  np.testing.assert_allclose(plain[1:, 1:], want / want.sum(-1, keepdims=True), atol=1e-6)


def test_patch_labels():
  probability = np.zeros((5, 4, 3), np.float32)  # patches of 2 pixels, and a row that is left over
  labels = [[2, 2, 1, 1], [2, 0, 0, 0], [1, 2, 2, 2], [1, 2, 2, 2], [0, 0, 0, 0]]
  for (y, x), label in np.ndenumerate(labels):
    probability[y, x, label] = 0.5
  labels_of = jax.jit(res_clip.patch_labels, static_argnums=(1, 2, 3))
  got = labels_of(probability, 2, (2, 2), 0.4)
  np.testing.assert_array_equal(got, [[2, 0], [1, 2]])  # ties go to the first
  unsure = labels_of(probability, 2, (2, 2), 0.6)
  assert not unsure.any()


def test_cross_attention_without_blocks_is_nothing():
  own = jnp.ones((1, 2, 1, 3))
  nothing = res_clip.cross_attention(None, [], own)
  np.testing.assert_array_equal(res_clip.blend(own, nothing, (1.0, 0.0)), own)
  np.testing.assert_allclose(res_clip.blend(own, 4 * own, (2.0, 0.25)), 2 * (0.75 + 1) * own)


# PEARL


def test_rotation_is_the_nearest():
  """Of a matrix whose singular values are close, where five steps are enough."""
  rng = np.random.default_rng(0)
  u, _, vt = np.linalg.svd(rng.normal(size=(4, 4)))
  m = u @ np.diag([1.0, 1.2, 1.5, 1.9]) @ vt
  got = jax.jit(pearl.nearest_rotation)(np.float32(m[None]))[0]
  np.testing.assert_allclose(got, u @ vt, atol=2e-4)


def test_rotated_scores():
  rng = np.random.default_rng(1)
  q, k = rng.normal(size=(2, 1, 7, 4)).astype(np.float32)
  got = jax.jit(pearl.rotated_scores)(q, k, 0.3)[0]
  q, k = np.float64(q[0]), np.float64(k[0])
  weight = np.array([0, *(np.sqrt((row**2).sum()) for row in q[1:])])
  weight /= weight.sum()
  centered = {
    name: x - sum(w * row for w, row in zip(weight, x)) for name, x in (("q", q), ("k", k))
  }
  m = centered["k"].T @ centered["q"]
  a = m.T @ m
  size = np.sqrt((a**2).sum())
  y, z = a / size + 1e-6 * np.eye(4), np.eye(4)
  for _ in range(5):
    y, z = y @ (3 * np.eye(4) - z @ y) / 2, (3 * np.eye(4) - z @ y) @ z / 2
  rotated = k @ (m @ z / np.sqrt(size))
  want = (q @ rotated.T + 0.3 * centered["k"] @ centered["k"].T) / 2
  np.testing.assert_allclose(got, want, atol=1e-4)


def test_the_default_method_follows_the_tower():
  b16 = CLIPConfig()
  l14 = dataclasses.replace(b16, vision_layers=24, patch_size=14)
  assert default_method(b16) == default_method(dataclasses.replace(b16, patch_size=32)) == "sc_clip"
  assert default_method(l14) == "naclip"
  assert default_method(dataclasses.replace(b16, vision_layers=6)) == "sclip"
  # Fewer patches than SC-CLIP compares one with.
  assert default_method(dataclasses.replace(b16, image_size=64)) == "naclip"
