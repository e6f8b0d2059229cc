"""Sliding windows: geometry, averaging, strips."""

import jax.numpy as jnp
import numpy as np
import pytest

from rpn_jax import sliding
from rpn_jax.errors import InputError
from rpn_jax.models.clip import resize_grid


def test_windows_cover_and_stay_inside():
  corners = sliding.window_corners(512, 683, 512, 426)
  assert corners == [(0, 0), (0, 171)]
  for height, width in [(96, 80), (64, 64), (65, 200)]:
    seen = np.zeros((height, width), bool)
    for y, x in sliding.window_corners(height, width, 64, 53):
      assert 0 <= y <= height - 64 and 0 <= x <= width - 64
      seen[y : y + 64, x : x + 64] = True
    assert seen.all()


def test_small_image_is_refused():
  with pytest.raises(InputError, match=r"window of 64 .* got 40x80"):
    sliding.window_corners(40, 80, 64, 53)


def slider(**options):
  """A network whose two logits are the mean red and the mean green of each 8-pixel patch."""

  def logits_fn(windows):
    n, side = windows.shape[0], windows.shape[1] // 8
    return jnp.asarray(windows)[..., :2].reshape(n, side, 8, side, 8, 2).mean((2, 4))

  return sliding.SlidingWindow(
    logits_fn, 2, crop=32, stride=24, activation=lambda x: x, **options
  )


def test_window_covering_the_image_is_the_plain_forward():
  image = np.random.default_rng(0).random((32, 32, 3), np.float32)
  low = image[..., :2].reshape(4, 8, 4, 8, 2).mean((1, 3))
  np.testing.assert_allclose(slider().scores(image), resize_grid(low, 32, 32), atol=1e-6)


def test_overlapping_windows_are_averaged():
  image = np.random.default_rng(1).random((32, 50, 3), np.float32)
  total, count = np.zeros((32, 50, 2)), np.zeros((32, 50, 1))
  for y, x in sliding.window_corners(32, 50, 32, 24):
    total[y : y + 32, x : x + 32] += slider().scores(image[y : y + 32, x : x + 32])
    count[y : y + 32, x : x + 32] += 1
  np.testing.assert_allclose(slider().scores(image), total / count, atol=1e-6)
  # The number of windows per call changes nothing.
  one = slider(window_batch=1).scores(image)
  np.testing.assert_allclose(one, slider(window_batch=7).scores(image), atol=1e-6)


def test_penalty_moves_the_arg_max():
  image = np.zeros((32, 32, 3), np.float32)
  image[..., 0], image[..., 1] = 0.55, 0.5
  assert (slider()(image) == 0).all()
  assert (slider(penalty=0.1, penalized=[0])(image) == 1).all()


@pytest.mark.parametrize("size", [(32, 50), (45, 71), (16, 25)])
def test_strips_are_the_whole(size, monkeypatch):
  image = np.random.default_rng(2).random((32, 50, 3), np.float32)
  whole = np.asarray(resize_grid(slider().scores(image), *size)).argmax(-1)
  sliding.resized_argmax.clear_cache()
  monkeypatch.setattr(sliding, "STRIP_ELEMENTS", 500)
  np.testing.assert_array_equal(slider()(image, size), whole)
  sliding.resized_argmax.clear_cache()
