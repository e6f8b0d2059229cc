"""How a method takes the position embedding to the grid of an image.

Each rule is (positions (1 + S * S, D), height, width) -> (1 + height * width, D): the class row as
it is, and the square grid of the others resized.
"""

import functools
from collections.abc import Callable

import jax

from rpn_jax.models.clip import resize_positions
from rpn_jax.models.resizing import resize_antialiased, resize_bicubic


def if_counts_differ(
  positions_NxD: jax.Array, height: int, width: int, *, excess: float = 0.0
) -> jax.Array:
  """Bicubic, but of a grid with as many patches as the tower's the positions are taken as they are,
  in order, whatever its shape: the official codes compare counts."""
  if height * width + 1 == len(positions_NxD):
    return positions_NxD
  resize = functools.partial(resize_bicubic, excess=excess)
  return resize_positions(positions_NxD, height, width, resize)


def antialiased(positions_NxD: jax.Array, height: int, width: int) -> jax.Array:
  """Bicubic with antialias, of any grid but the tower's."""
  if height == width and height * width + 1 == len(positions_NxD):
    return positions_NxD
  return resize_positions(positions_NxD, height, width, resize_antialiased)


POSITIONS: dict[str, Callable] = {
  # SCLIP's code and those that began as copies of it, most of them.
  "sclip": functools.partial(if_counts_differ, excess=0.1),
  "maskclip": if_counts_differ,
  "gem": antialiased,
  "bilinear": resize_positions,  # RPN's
}
