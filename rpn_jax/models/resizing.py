"""Resizes of arrays, and as matrices that multiply an axis; without antialias unless told."""

import jax
import jax.numpy as jnp
import numpy as np


def resize_grid(grid_hxwxD: jax.Array, height: int, width: int) -> jax.Array:
  """Bilinear resize of the two leading axes, align_corners=False, no antialias."""
  if grid_hxwxD.shape[:2] == (height, width):
    return grid_hxwxD
  sides = zip(grid_hxwxD.shape, (height, width))
  return resize_by_matrices(grid_hxwxD, *(interpolation_matrix(*side) for side in sides))


def interpolation_matrix(inputs: int, outputs: int) -> np.ndarray | jax.Array:
  """(outputs, inputs) weights of a bilinear resize, align_corners=False, no antialias."""
  if not (isinstance(inputs, int) and isinstance(outputs, int)):  # sizes left open in an export
    return jax.image.resize(jnp.eye(inputs), (outputs, inputs), "bilinear", antialias=False)
  # By NumPy: traced, the weights of a small network's resizes take a fifth of its time.
  at = np.clip((np.arange(outputs) + 0.5) * inputs / outputs - 0.5, 0, inputs - 1)
  return np.maximum(0, 1 - np.abs(at[:, None] - np.arange(inputs))).astype(np.float32)


def aligned_matrix(inputs: int, outputs: int) -> np.ndarray:
  """(outputs, inputs) weights of a bilinear resize with aligned corners."""
  at = np.linspace(0, inputs - 1, outputs)
  return np.maximum(0, 1 - np.abs(at[:, None] - np.arange(inputs))).astype(np.float32)


def bicubic_matrix(inputs: int, outputs: int, span: float) -> np.ndarray:
  """(outputs, inputs) weights of a bicubic resize by half pixels, without antialias.

  JAX's own has a = -0.5, and cuts the kernel off at the border where this one repeats the edge.

  Args:
    inputs: rows before.
    outputs: rows after.
    span: how many new rows the old ones span. PyTorch with the factor (outputs + 0.1) / inputs
      makes `outputs` rows that are spaced as if there were 0.1 more.
  """
  a = -0.75  # slope of the kernel
  at = (np.arange(outputs) + 0.5) * inputs / span - 0.5
  left = np.floor(at).astype(int)
  matrix = np.zeros((outputs, inputs), np.float32)
  for offset in (-1, 0, 1, 2):
    x = np.abs(at - (left + offset))
    near = ((a + 2) * x - (a + 3)) * x**2 + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    np.add.at(
      matrix,
      (np.arange(outputs), np.clip(left + offset, 0, inputs - 1)),
      np.where(x <= 1, near, far),
    )
  return matrix


def resize_by_matrices(
  grid_hxwxD: jax.Array, rows_Hxh: np.ndarray | jax.Array, columns_Wxw: np.ndarray | jax.Array
) -> jax.Array:
  """(H, W, D): both axes resized by matrices of their weights; D may be several axes."""
  exact = jax.lax.Precision.HIGHEST
  return jnp.einsum("Hh,hw...,Ww->HW...", rows_Hxh, grid_hxwxD, columns_Wxw, precision=exact)


def resize_bicubic(
  grid_hxwxD: jax.Array, height: int, width: int, excess: float = 0.0
) -> jax.Array:
  """PyTorch's bicubic resize of the two leading axes, align_corners=False, no antialias.

  `excess` is what is added to each new side where PyTorch takes a factor instead of a size.
  """
  if grid_hxwxD.shape[:2] == (height, width) and not excess:
    return grid_hxwxD
  rows, columns = (
    bicubic_matrix(inputs, outputs, outputs + excess)
    for inputs, outputs in zip(grid_hxwxD.shape, (height, width))
  )
  return resize_by_matrices(grid_hxwxD, rows, columns)


def resize_antialiased(grid_hxwxD: jax.Array, height: int, width: int) -> jax.Array:
  """PyTorch's bicubic resize with antialias, whose kernel is JAX's (a = -0.5)."""
  shape = (height, width, *grid_hxwxD.shape[2:])
  exact = jax.lax.Precision.HIGHEST
  return jax.image.resize(grid_hxwxD, shape, "cubic", antialias=True, precision=exact)
