"""Heads: per-patch class logits from patches, class token and text (RPN, Eq. 7, Tables 6 and 7)."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from rpn_jax.models import prompts
from rpn_jax.models.clip import l2_normalize
from rpn_jax.models.kernels import TEXTBOOK, Kernels


def unchanged(scores: jax.Array) -> jax.Array:
  """Where logits are scores already, or scores probabilities."""
  return scores


def sigmoid(logits: jax.Array) -> jax.Array:
  """`jax.nn.sigmoid`, which is compiled already and for that cannot be pickled."""
  return jax.nn.sigmoid(logits)


def softmax(logits: jax.Array) -> jax.Array:
  """`jax.nn.softmax` over the last axis; see `sigmoid`."""
  return jax.nn.softmax(logits)


# Logits (..., C) to scores, by the loss that the logits were trained with; cosines are compared as
# they are. Named functions, since a function is part of a compiled program's key.
SCORES = {"sigmoid": sigmoid, "bce": sigmoid, "softmax": softmax, "cosine": unchanged}


def text_branch(cls_BxE: jax.Array, text_CxE: jax.Array, letter: str) -> tuple[jax.Array, ...]:
  """What a head compares the patches with, each (B, C, E): t, t * g, or both (Tables 6 and 7)."""
  t = jnp.broadcast_to(text_CxE, (cls_BxE.shape[0], *text_CxE.shape))
  tg = text_CxE * cls_BxE[:, None]
  return {"a": (t,), "b": (tg,), "c": (tg, t)}[letter]


def tfpm(
  patches_BxNxE: jax.Array, cls_BxE: jax.Array, text_CxE: jax.Array, letter: str
) -> jax.Array:
  """The head without Linear and LayerNorm: logits (B, N, C).

  Both branches have length 1 here and sqrt(E) after LPM's LayerNorm, so the cosine is scaled to
  logits of LPM's size; variant c adds its two texts up.
  """
  first, *others = text_branch(cls_BxE, text_CxE, letter)
  text = l2_normalize(sum(others, first))
  return jnp.einsum("bne,bce->bnc", patches_BxNxE, text) * patches_BxNxE.shape[-1] ** 0.5


class LPM(nn.Module):
  """Linear projection module, the head: per-patch class logits.

  LN(Linear(p)) . LN(Linear(text))^T / sqrt(E), the text being t (variant a), t * g (b) or
  [t * g, t] (c, Eq. 7). `released` is c with one more Linear: u = Linear([t * g, t]), text branch
  LN(Linear(u)).

  Attributes:
    variant: "lpm_a", "lpm_b", "lpm_c" or "released".
    dtype: compute type of the Linear layers.
    kernels: see `Kernels`.
  """

  variant: str = "lpm_c"
  dtype: Any = jnp.float32
  kernels: Kernels = TEXTBOOK

  @nn.compact
  def __call__(
    self, patches_BxNxE: jax.Array, cls_BxE: jax.Array, text_CxE: jax.Array
  ) -> jax.Array:
    """Logits (B, N, C), float32."""
    embed = patches_BxNxE.shape[-1]
    released = self.variant == "released"
    letter = "c" if released else self.variant[-1]
    text = jnp.concatenate(text_branch(cls_BxE, text_CxE, letter), axis=-1)
    small = nn.initializers.normal(0.02)
    if released:
      dense = prompts.torch_dense(embed, 2 * embed, self.dtype, product=self.kernels.product)
      text = dense.copy(name="text_reduce")(text)
    text = self.branch("text", text, embed, small)
    patches = self.branch("patch", patches_BxNxE, embed, small)
    return jnp.einsum("bne,bce->bnc", patches, text) * embed**-0.5

  def branch(self, name: str, x: jax.Array, features: int, kernel_init: Callable) -> jax.Array:
    """LN(Linear(x)), the norm in float32."""
    product = self.kernels.product
    dense = prompts.torch_dense(features, x.shape[-1], self.dtype, kernel_init, product)
    x = dense.copy(name=f"{name}_proj")(x)
    return prompts.LayerNorm(function=self.kernels.layer_norm, name=f"{name}_norm")(x)
