"""How a method takes the position embedding to the grid of an image.

Each rule is (positions (1 + S * S, D), height, width) -> (1 + height * width, D): the class row as
it is, and the square grid of the others resized.
"""

import functools
from collections.abc import Callable

import jax

from rpn_jax.models.clip import resize_positions
from rpn_jax.models.resizing import bicubic_matrix, resize_by_matrices


def bicubic(grid_hxwxD: jax.Array, height: int, width: int, *, excess: float = 0.0) -> jax.Array:
  """PyTorch's bicubic resize; `excess` is what is added to a side before the factor is taken."""
  rows, columns = (
    bicubic_matrix(inputs, outputs, span=outputs + excess)
    for inputs, outputs in zip(grid_hxwxD.shape, (height, width))
  )
  return resize_by_matrices(grid_hxwxD, rows, columns)


def smooth_bicubic(grid_hxwxD: jax.Array, height: int, width: int) -> jax.Array:
  """PyTorch's bicubic resize with antialias, whose kernel is JAX's (a = -0.5)."""
  if grid_hxwxD.shape[:2] == (height, width):
    return grid_hxwxD
  shape = (height, width, *grid_hxwxD.shape[2:])
  exact = jax.lax.Precision.HIGHEST
  return jax.image.resize(grid_hxwxD, shape, "cubic", antialias=True, precision=exact)


def if_counts_differ(
  positions_NxD: jax.Array, height: int, width: int, *, excess: float = 0.0
) -> jax.Array:
  """Bicubic, but of a grid with as many patches as the tower's the positions are taken as they are,
  in order, whatever its shape: the official codes compare counts."""
  if height * width + 1 == len(positions_NxD):
    return positions_NxD
  return resize_positions(positions_NxD, height, width, functools.partial(bicubic, excess=excess))


def gem(positions_NxD: jax.Array, height: int, width: int) -> jax.Array:
  """GEM's: bicubic with antialias."""
  return resize_positions(positions_NxD, height, width, smooth_bicubic)


POSITIONS: dict[str, Callable] = {
  # SCLIP's code and those that began as copies of it, most of them.
  "sclip": functools.partial(if_counts_differ, excess=0.1),
  "maskclip": if_counts_differ,
  "gem": gem,
  "bilinear": resize_positions,  # RPN's
}
