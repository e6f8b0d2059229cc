"""The residual block of CLIP's towers (Radford et al., 2021), and where tuners reach into it.

Shape letters: B batch, N tokens, P extra tokens, D tower width; in attention H heads and d width of
a head.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jax.ad_checkpoint import checkpoint_name

from rpn_jax.models import layers
from rpn_jax.models.kernels import TEXTBOOK, Kernels
from rpn_jax.models.layers import LAYER_NORM_EPSILON, Dense, LayerNorm


def keep_result(site: str, x: jax.Array, y: jax.Array, layer: nn.Module | None = None) -> jax.Array:
  """The tune function that leaves the result y of a site as it is; see `tuners.Tune`."""
  del site, x, layer
  return y


class Attention(nn.Module):
  """Multi-head self-attention with CLIP's fused input projection.

  `causal`: no token attends to later ones.
  """

  width: int
  heads: int
  dtype: Any = jnp.float32
  kernels: Kernels = TEXTBOOK
  causal: bool = False

  def setup(self) -> None:
    product = self.kernels.product
    self.in_proj = Dense(3 * self.width, dtype=self.dtype, product=product)
    self.out_proj = Dense(self.width, dtype=self.dtype, product=product)

  def project(
    self, x_BxNxD: jax.Array, tune: Callable = keep_result
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries, keys and values, each (B, N, H, d)."""
    qkv = self.project_fused(x_BxNxD, tune)
    q, k, v = rearrange(qkv, "b n (three h d) -> three b n h d", three=3, h=self.heads)
    return q, k, v

  def project_fused(self, x_BxNxD: jax.Array, tune: Callable) -> jax.Array:
    """Queries, keys and values side by side: (B, N, 3 D)."""
    qkv = tune("in_proj", x_BxNxD, self.in_proj(x_BxNxD), self.in_proj)
    qkv = checkpoint_name(qkv, "attention")
    self.sow("intermediates", "qkv", qkv)
    return qkv

  def __call__(
    self,
    x_BxNxD: jax.Array,
    read: Callable | None = None,
    tune: Callable = keep_result,
    extra_BxPxD: jax.Array | None = None,
  ) -> jax.Array:
    """(B, N, D) -> (B, N, D).

    Args:
      x_BxNxD: normalized tokens.
      read: (q, k, v) -> (B, N, H, d), how the tokens read the values; None is CLIP's own
        softmax(q kᵀ / √d) v.
      tune: (site, x, y, layer) -> y, for `in_proj` and `out_proj`.
      extra_BxPxD: normalized tokens with keys and values only: the others attend to them, and
        nothing is returned for them.
    """
    qkv = self.project_fused(x_BxNxD, tune)
    extra = None if extra_BxPxD is None else self.project_fused(extra_BxPxD, tune)
    if read is None:
      out = self.kernels.self_attend(qkv, extra, self.heads, self.causal)
    else:
      out = layers.self_attend(lambda q, k, v, _: read(q, k, v), qkv, extra, self.heads)
    out = tune("out_proj", out, self.out_proj(out), self.out_proj)
    return checkpoint_name(out, "attention")


class MLP(nn.Module):
  """Two projections with an activation between them, `hidden` channels wide; None: 4 D."""

  width: int
  activation: str
  dtype: Any = jnp.float32
  kernels: Kernels = TEXTBOOK
  hidden: int | None = None

  def setup(self) -> None:
    product = self.kernels.product
    self.c_fc = Dense(self.hidden or 4 * self.width, dtype=self.dtype, product=product)
    self.c_proj = Dense(self.width, dtype=self.dtype, product=product)

  def __call__(self, x_BxNxD: jax.Array, tune: Callable = keep_result) -> jax.Array:
    hidden = tune("c_fc", x_BxNxD, self.c_fc(x_BxNxD), self.c_fc)
    hidden = self.kernels.activations[self.activation](hidden)
    return tune("c_proj", hidden, self.c_proj(hidden), self.c_proj)


class Block(nn.Module):
  """Pre-norm residual block of D channels; `epsilon` is of its norms, `mlp_width` of its MLP.

  `causal` is of its attention.
  """

  width: int
  heads: int
  activation: str
  dtype: Any = jnp.float32
  epsilon: float = LAYER_NORM_EPSILON
  kernels: Kernels = TEXTBOOK
  mlp_width: int | None = None
  causal: bool = False

  def setup(self) -> None:
    self.ln_1 = LayerNorm(self.epsilon, function=self.kernels.layer_norm)
    self.attn = Attention(self.width, self.heads, self.dtype, self.kernels, self.causal)
    self.ln_2 = LayerNorm(self.epsilon, function=self.kernels.layer_norm)
    self.mlp = MLP(self.width, self.activation, self.dtype, self.kernels, self.mlp_width)

  def project(self, x_BxNxD: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries, keys and values of the block's attention, each (B, N, H, d)."""
    return self.attn.project(self.ln_1(x_BxNxD))

  def __call__(
    self,
    x_BxNxD: jax.Array,
    read: Callable | None = None,
    residual: bool = True,
    tune: Callable | None = None,
    extra_BxPxD: jax.Array | None = None,
  ) -> jax.Array:
    """(B, N, D) -> (B, N, D).

    Args:
      x_BxNxD: tokens.
      read: see `Attention`.
      residual: False returns the attention's output alone: no residual connection, no MLP.
      tune: (site, x, y, layer) -> y may change what the projection or norm `site` makes of x;
        projections give themselves as the layer.
      extra_BxPxD: tokens that the others attend to, and that are not computed further.
    """
    x, tune = x_BxNxD, tune or keep_result
    norm = lambda x: tune("ln_1", x, self.ln_1(x))
    extra = None if extra_BxPxD is None else norm(extra_BxPxD)
    attended = self.attn(norm(x), read, tune, extra).astype(x.dtype)
    return self.feed_forward(x + attended, tune) if residual else attended

  def feed_forward(self, x_BxNxD: jax.Array, tune: Callable = keep_result) -> jax.Array:
    """The second half of the block: x + MLP(LN(x))."""
    x = x_BxNxD
    return x + self.mlp(tune("ln_2", x, self.ln_2(x)), tune).astype(x.dtype)
