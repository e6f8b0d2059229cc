"""Initial values of what is trained."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def uniform(bound: float) -> Callable:
  """Uniform in [-bound, bound): the values of a draw of that shape, as the first of a longer one.

  XLA compiles every shape that a program draws, for half a second on a CPU. So the shapes of a
  network share lengths of 256, 1024, 4096 … values; a draw begins with those of every shorter one.
  """

  def init(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    count, length = math.prod(shape), 256
    while length < count:
      length *= 4
    values = jax.random.uniform(key, (length,), dtype, -bound, bound)
    return values[:count].reshape(shape)

  return init
