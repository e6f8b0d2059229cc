"""The `prompts` collection: layers whose parameters are trained while CLIP's stay frozen.

A linen layer asks for its parameters by `self.param`. The mixin below answers from the collection
`prompts` instead of `params`, so that `apply({'params': clip, 'prompts': prompts}, ...)` takes the
two trees apart and `jax.grad` with respect to `prompts` never touches the tower.
"""

from collections.abc import Callable
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from rpn_jax.models import initializers, layers

COLLECTION = "prompts"


def prompt(module: Any, name: str, init: Callable, shape: tuple[int, ...]) -> jax.Array:
  """A bare trained tensor of `module`, kept in the `prompts` collection.

  Raises:
    flax.errors.ScopeParamShapeError: the stored tensor has another shape. `self.variable` alone
      does not check it, and a wrong shape would broadcast silently.
  """
  value = module.variable(
    COLLECTION, name, lambda: init(module.make_rng(COLLECTION), shape, jnp.float32)
  ).value
  layers.check_shape(module, name, value, shape)
  return value


def tree(module: nn.Module, name: str, init: Callable) -> dict:
  """Several trained tensors of `module` as one nested dict; `init(key)` makes them.

  Raises:
    flax.errors.ScopeParamShapeError: as for `prompt`.
  """
  value = module.variable(COLLECTION, name, lambda: init(module.make_rng(COLLECTION))).value
  shapes = lambda x: jax.tree.map(lambda leaf: tuple(leaf.shape), x)
  # The key is made inside, since one made here would be a part of every traced forward pass.
  got, want = shapes(value), shapes(jax.eval_shape(lambda: init(jax.random.key(0))))
  if got != want:
    raise flax.errors.ScopeParamShapeError(name, f"/{'/'.join(module.path)}", got, want)
  return value


class PromptParams:
  """Mixin: the layer's parameters live in `prompts`."""

  def param(
    self, name: str, init_fn: Callable, *init_args: Any, unbox: bool = True, **init_kwargs: Any
  ) -> Any:
    del unbox
    # Shape and type are the first two arguments of every initializer that linen's layers use.
    shape = init_args[0] if init_args else ()
    return prompt(self, name, lambda key, *_: init_fn(key, *init_args, **init_kwargs), shape)


class Dense(PromptParams, layers.Dense):
  """`layers.Dense` in `prompts`."""


class LayerNorm(PromptParams, layers.LayerNorm):
  """`layers.LayerNorm` in `prompts`."""

  trained: bool = True


class Conv(PromptParams, nn.Conv):
  """`nn.Conv` in `prompts`."""


def torch_dense(
  features: int,
  fan_in: int,
  dtype: Any,
  kernel_init: Callable | None = None,
  product: Callable = jnp.matmul,
) -> Dense:
  """A `Dense` with the initial values of PyTorch's Linear: uniform within 1/sqrt(fan_in)."""
  bound = initializers.uniform(fan_in**-0.5)
  kernel_init = kernel_init or bound
  return Dense(features, dtype=dtype, product=product, kernel_init=kernel_init, bias_init=bound)


def example_keys(key: jax.Array, example_offset: jax.Array | int, batch: int) -> jax.Array:
  """One key per example, from its position in the global batch: (B,) keys.

  A batch split over devices draws the same numbers as the whole batch on one device.
  """
  return jax.vmap(jax.random.fold_in, (None, 0))(key, example_offset + jnp.arange(batch))


def dropout(x_BxPxD: jax.Array, rate: float, keys_B: jax.Array) -> jax.Array:
  """Zeroes scalars with probability `rate` and scales the others by 1 / (1 - rate)."""
  if rate == 1:
    return jnp.zeros_like(x_BxPxD)  # of a division by zero the gradients are no numbers
  kept = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, x_BxPxD.shape[1:]))(keys_B)
  return jnp.where(kept, x_BxPxD / (1 - rate), 0)


def count(tree: Any) -> int:
  """Number of scalars in a tree of arrays or shapes."""
  return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))
