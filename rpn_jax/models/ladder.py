"""Ladder side tuning (Sung et al., 2022): a narrow network beside the frozen tower."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from rpn_jax.models import prompts
from rpn_jax.models.clip import CLIPConfig
from rpn_jax.models.kernels import TEXTBOOK, Kernels

zeros = nn.initializers.zeros


def dense_of(module: nn.Module) -> Callable:
  """(features, name, kernel_init) -> a projection of the module's compute type."""
  settings = {"dtype": module.dtype, "product": module.kernels.product}
  uniform = nn.initializers.lecun_uniform()
  return lambda features, name, kernel_init=uniform: prompts.Dense(
    features, kernel_init=kernel_init, name=name, **settings
  )


class SideBlock(nn.Module):
  """A pre-norm block of the side network, all of it in `prompts`."""

  heads: int
  activation: str
  dtype: Any = jnp.float32
  kernels: Kernels = TEXTBOOK

  @nn.compact
  def __call__(self, x_BxNxD: jax.Array) -> jax.Array:
    width, kernels, dense = x_BxNxD.shape[-1], self.kernels, dense_of(self)
    norm = lambda name, x: prompts.LayerNorm(function=kernels.layer_norm, name=name)(x)
    qkv = dense(3 * width, "in_proj")(norm("ln_1", x_BxNxD))
    x = x_BxNxD + dense(width, "out_proj")(kernels.self_attend(qkv, None, self.heads))
    hidden = dense(4 * width, "c_fc")(norm("ln_2", x))
    return x + dense(width, "c_proj")(kernels.activations[self.activation](hidden))


class LadderSide(nn.Module):
  """Ladder side tuning: narrow blocks read the tower's tokens and are added to its last ones.

  Attributes:
    clip: architecture of the tower.
    reduction: how many times narrower the side network is.
    dtype: compute type.
    kernels: see `Kernels`.
  """

  clip: CLIPConfig
  reduction: int = 8
  dtype: Any = jnp.float32
  kernels: Kernels = TEXTBOOK

  @nn.compact
  def __call__(self, hidden: list[jax.Array]) -> jax.Array:
    """Tokens before the first block and after every block, each (B, N, D) -> (B, N, D) to add."""
    width, dense = self.clip.vision_width // self.reduction, dense_of(self)
    # A gate's temperature of 0.1 and its start in the middle are the paper's.
    gates = prompts.prompt(self, "gate", zeros, (self.clip.vision_layers,))
    # Tower and input are frozen: no gradient is passed back through them.
    hidden = jax.lax.stop_gradient(hidden)
    settings = (self.clip.vision_heads, self.clip.activation, self.dtype, self.kernels)
    side = dense(width, "down_0")(hidden[0])
    for i, x in enumerate(hidden[1:]):
      mu = jax.nn.sigmoid(gates[i] / 0.1).astype(side.dtype)
      side = mu * side + (1 - mu) * dense(width, f"down_{i + 1}")(x)
      side = SideBlock(*settings, name=f"block_{i}")(side).astype(self.dtype)
    side = prompts.LayerNorm(function=self.kernels.layer_norm, name="norm")(side)
    return dense(self.clip.vision_width, "up", zeros)(side)
