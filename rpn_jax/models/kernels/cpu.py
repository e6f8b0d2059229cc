"""Attention head by head, and the gradients of convolutions, for CPUs.

The attention maps of 512 x 512 images would go through main memory several times; those of one head
stay in the cache (docs/benchmarks.md).

Shape letters: N tokens, M tokens attended to, H heads of all images, d width of a head; in a
convolution as in `layers`.
"""

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.ad_checkpoint import checkpoint_name

from rpn_jax.models import layers
from rpn_jax.models.kernels import lean

# A layer whose attention maps have more elements than this, 16 MB, goes head by head.
MAX_MAP_ELEMENTS = 2**22


def attend(
  q_BxNxHxd: jax.Array, k_BxMxHxd: jax.Array, v_BxMxHxd: jax.Array, causal: bool = False
) -> jax.Array:
  """`layers.attend`, head by head where all maps at once are too large for the cache."""
  batch, tokens, heads, _ = q_BxNxHxd.shape
  large = batch * heads * tokens * k_BxMxHxd.shape[1] > MAX_MAP_ELEMENTS
  if causal or not large:
    return lean.attend(q_BxNxHxd, k_BxMxHxd, v_BxMxHxd, causal)
  split = lambda x: rearrange(x, "b n h d -> (b h) n d")
  out = attend_by_head(split(q_BxNxHxd), split(k_BxMxHxd), split(v_BxMxHxd))
  return rearrange(out, "(b h) n d -> b n h d", h=heads)


@jax.custom_vjp
def attend_by_head(q_HxNxd: jax.Array, k_HxMxd: jax.Array, v_HxMxd: jax.Array) -> jax.Array:
  """softmax(q kᵀ / √d) v, one head after another: (H, N, d).

  A map's rows are stored as the logarithms of their sums; the backward pass computes the map again
  from these, without its product with v (FlashAttention, Dao et al., 2022).
  """
  return attend_forward(q_HxNxd, k_HxMxd, v_HxMxd)[0]


def attend_forward(
  q_HxNxd: jax.Array, k_HxMxd: jax.Array, v_HxMxd: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
  def one_head(qkv: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
    q, k, v = qkv
    scores = (q * q.shape[-1] ** -0.5 @ k.T).astype(jnp.float32)
    largest = scores.max(-1, keepdims=True)
    weights = jnp.exp(scores - largest)
    total = weights.sum(-1, keepdims=True)
    out = ((weights.astype(v.dtype) @ v) / total).astype(v.dtype)
    return out, (largest + jnp.log(total))[:, 0]

  out, log_total = jax.lax.map(one_head, (q_HxNxd, k_HxMxd, v_HxMxd))
  # The name is the one that the policy "dots" of `remat.REMAT_POLICIES` stores.
  return out, (q_HxNxd, k_HxMxd, v_HxMxd, checkpoint_name(log_total, "attention"))


def attend_backward(stored: tuple[jax.Array, ...], g_HxNxd: jax.Array) -> tuple[jax.Array, ...]:
  # Maps as M x N and keys transposed beforehand, so that no product contains a transposed map:
  # these have a slower kernel. The barrier keeps that copy of the keys out of the forward pass.
  q_HxNxd, k_HxMxd, v_HxMxd, log_total_HxN = stored
  scale = q_HxNxd.shape[-1] ** -0.5
  k_HxMxd, g_HxNxd = jax.lax.optimization_barrier((k_HxMxd, g_HxNxd))

  def one_head(arrays: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    q, k, v, log_total, g, k_dxM = arrays
    q = q * scale
    weights = jnp.exp((k @ q.T).astype(jnp.float32) - log_total)
    scores = (v @ g.T).astype(jnp.float32)
    scores = (weights * (scores - (weights * scores).sum(0))).astype(q.dtype)
    return k_dxM @ scores * scale, scores @ q, weights.astype(g.dtype) @ g

  dq_HxdxN, dk, dv = jax.lax.map(
    one_head, (q_HxNxd, k_HxMxd, v_HxMxd, log_total_HxN, g_HxNxd, k_HxMxd.swapaxes(1, 2))
  )
  return dq_HxdxN.swapaxes(1, 2), dk, dv


attend_by_head.defvjp(attend_forward, attend_backward)


@jax.custom_vjp
def convolve(x_NxHxWxC: jax.Array, kernel_KxKxCxF: jax.Array) -> jax.Array:
  """`layers.convolve` with gradients that are fast inside of loops.

  In the body of a loop XLA's CPU compiler has a fast convolution for arrays in their usual order
  alone, and otherwise one that takes a hundred times as long. The gradient of the kernel is a
  matrix product for each of its pixels, which is faster outside of loops, too.
  """
  return layers.convolve(x_NxHxWxC, kernel_KxKxCxF)


def convolve_forward(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
  return layers.convolve(x, kernel), (x, kernel)


def convolve_backward(
  stored: tuple[jax.Array, ...], g_NxHxWxF: jax.Array
) -> tuple[jax.Array, jax.Array]:
  x, kernel = stored
  # The barrier keeps the compiler from expressing the reversal by another order of the arrays.
  reversed_KxKxFxC = jax.lax.optimization_barrier(kernel[::-1, ::-1].swapaxes(2, 3))
  dx = layers.convolve(g_NxHxWxF, reversed_KxKxFxC)
  side = kernel.shape[0]
  _, height, width, _ = x.shape
  padding = (0, 0), (side // 2, side // 2), (side // 2, side // 2), (0, 0)
  padded = jnp.pad(x, padding)
  rows = [
    [
      jnp.einsum("nhwc,nhwf->cf", padded[:, i : i + height, j : j + width], g_NxHxWxF)
      for j in range(side)
    ]
    for i in range(side)
  ]
  return dx, jnp.array(rows)


convolve.defvjp(convolve_forward, convolve_backward)
