"""Resizes by matrices that NumPy computed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rpn_jax.models.resizing import (
  aligned_matrix,
  interpolation_matrix,
  resize_by_matrices,
  resize_grid,
)


@pytest.mark.parametrize("old, new", [((14, 14), (32, 20)), ((7, 5), (3, 5)), ((4, 1), (1, 6))])
def test_bilinear_is_jaxs_own(old, new):
  grid = jax.random.normal(jax.random.key(0), (*old, 2, 3))
  want = jax.image.resize(grid, (*new, 2, 3), "bilinear", antialias=False, precision="highest")
  np.testing.assert_allclose(resize_grid(grid, *new), want, rtol=1e-5, atol=1e-5)
  assert resize_grid(grid, *old) is grid


def test_aligned_corners_keep_their_values():
  coarse = np.float32([[0, 1], [2, 4]])
  got = resize_by_matrices(coarse, aligned_matrix(2, 3), aligned_matrix(2, 5))
  np.testing.assert_allclose(got[[0, 0, 2, 2], [0, 4, 0, 4]], [0, 1, 2, 4])
  np.testing.assert_allclose(got[1], [1, 1.375, 1.75, 2.125, 2.5])


def test_sizes_may_be_left_open():
  h, w = jax.export.symbolic_shape("h, w")
  shape = jax.ShapeDtypeStruct((h, w, 3), jnp.float32)
  resize = jax.jit(lambda grid: resize_grid(grid, *(2 * side for side in grid.shape[:2])))
  call = jax.jit(jax.export.export(resize)(shape).call)
  grid = jax.random.normal(jax.random.key(0), (3, 5, 3))
  np.testing.assert_allclose(call(grid), resize_grid(grid, 6, 10), rtol=1e-5, atol=1e-5)
  assert isinstance(interpolation_matrix(3, 6), np.ndarray)
