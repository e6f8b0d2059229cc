"""Products of bfloat16, attention head by head, and the gradients of convolutions, for CPUs.

The attention maps of 512 x 512 images would go through main memory several times; those of one head
stay in the cache (docs/benchmarks.md).

Shape letters: N tokens, M tokens attended to, H heads of all images, d width of a head, K and F
channels in and out of a product; in a convolution as in `layers`.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.ad_checkpoint import checkpoint_name

from rpn_jax.models import layers

# A layer whose attention maps have more elements than this, 8 MB, goes head by head.
MAX_MAP_ELEMENTS = 2**21


def product(x: jax.Array, w_KxF: jax.Array) -> jax.Array:
  """x w, (..., F): float32 of bfloat16 operands, which the caller rounds where it is stored.

  Processors with units for it multiply bfloat16 to a float32 result at twice the speed at which
  XLA multiplies it to a bfloat16 result (docs/benchmarks.md), and nothing is rounded on the way.
  """
  return jnp.matmul(x, w_KxF) if x.dtype != jnp.bfloat16 else product_bfloat16(x, w_KxF)


@jax.custom_vjp
def product_bfloat16(x: jax.Array, w_KxF: jax.Array) -> jax.Array:
  return jnp.matmul(x, w_KxF, preferred_element_type=jnp.float32)


def product_forward(x: jax.Array, w_KxF: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
  return product_bfloat16(x, w_KxF), (x, w_KxF)


def product_backward(stored: tuple[jax.Array, ...], g: jax.Array) -> tuple[jax.Array, jax.Array]:
  # Differentiated automatically, the products would be those of float32, of g's type.
  x, w_KxF = stored
  g = g.astype(x.dtype)
  rows = lambda y: y.reshape(-1, y.shape[-1])
  dx = layers.wide_einsum("...f,kf->...k", g, w_KxF)
  dw = layers.wide_einsum("nk,nf->kf", rows(x), rows(g))
  return dx.astype(x.dtype), dw.astype(w_KxF.dtype)


product_bfloat16.defvjp(product_forward, product_backward)


def attend(
  q_BxNxHxd: jax.Array, k_BxMxHxd: jax.Array, v_BxMxHxd: jax.Array, causal: bool = False
) -> jax.Array:
  """`layers.attend`, head by head where all maps at once are too large for the cache."""
  split = lambda x: rearrange(x, "b n h d -> (b h) n d")
  out = attend_heads(split(q_BxNxHxd), split(k_BxMxHxd), split(v_BxMxHxd), causal)
  return rearrange(out, "(b h) n d -> b n h d", h=q_BxNxHxd.shape[2])


def dot(a_NxK: jax.Array, b_MxK: jax.Array) -> jax.Array:
  """a bᵀ, (N, M) float32. Of bᵀ XLA would make an array of float32, and multiply that."""
  return layers.wide_einsum("nk,mk->nm", a_NxK, b_MxK)


def each_head(function: Callable, q_HxNxd: jax.Array, k_HxMxd: jax.Array, *more: jax.Array) -> Any:
  """`function` of the arrays of each head: of all of them at once, or of one after another."""
  heads, tokens, _ = q_HxNxd.shape
  large = heads * tokens * k_HxMxd.shape[1] > MAX_MAP_ELEMENTS
  every = functools.partial(jax.lax.map, function) if large else jax.vmap(function)
  return every((q_HxNxd, k_HxMxd, *more))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def attend_heads(
  q_HxNxd: jax.Array, k_HxMxd: jax.Array, v_HxMxd: jax.Array, causal: bool
) -> jax.Array:
  """softmax(q kᵀ / √d) v of every head: (H, N, d).

  A map's rows are stored as the logarithms of their sums; the backward pass computes the map again
  from these, without its product with v (FlashAttention, Dao et al., 2022).
  """
  return attend_forward(q_HxNxd, k_HxMxd, v_HxMxd, causal)[0]


def attend_forward(
  q_HxNxd: jax.Array, k_HxMxd: jax.Array, v_HxMxd: jax.Array, causal: bool
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
  def one_head(qkv: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
    q, k, v = qkv
    # The scale is applied last, so that XLA does it in the loop of the exponential, and in that of
    # the product where no gradient is wanted.
    scores, scale = dot(q, k), q.shape[-1] ** -0.5
    if causal:
      scores = jnp.where(jnp.tril(jnp.ones(scores.shape, bool)), scores, -jnp.inf)
    largest = scores.max(-1, keepdims=True)
    weights = jnp.exp((scores - largest) * scale).astype(v.dtype)
    total = weights.astype(jnp.float32).sum(-1, keepdims=True)
    return product(weights, v) / total, (largest * scale + jnp.log(total))[:, 0]

  out, log_total = each_head(one_head, q_HxNxd, k_HxMxd, v_HxMxd)
  # The name is the one that the policy "dots" of `remat.REMAT_POLICIES` stores.
  stored = q_HxNxd, k_HxMxd, v_HxMxd, checkpoint_name(log_total, "attention")
  return out.astype(v_HxMxd.dtype), stored


def attend_backward(
  causal: bool, stored: tuple[jax.Array, ...], g_HxNxd: jax.Array
) -> tuple[jax.Array, ...]:
  # Maps as M x N and keys transposed beforehand, so that no product contains a transposed map:
  # these have a slower kernel. The barrier keeps that copy of the keys out of the forward pass.
  q_HxNxd, k_HxMxd, v_HxMxd, log_total_HxN = stored
  scale = q_HxNxd.shape[-1] ** -0.5
  k_HxMxd, g_HxNxd = jax.lax.optimization_barrier((k_HxMxd, g_HxNxd))

  def one_head(arrays: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    q, k, v, log_total, g, k_dxM = arrays
    logits = dot(k, q) * scale - log_total
    if causal:
      logits = jnp.where(jnp.triu(jnp.ones(logits.shape, bool)), logits, -jnp.inf)
    weights = jnp.exp(logits).astype(g.dtype)
    wide, slopes = weights.astype(jnp.float32), dot(v, g)
    slopes = (wide * (slopes - (wide * slopes).sum(0))).astype(q.dtype)
    return product(k_dxM, slopes) * scale, product(slopes, q) * scale, product(weights, g)

  dq_HxdxN, dk, dv = each_head(
    one_head, q_HxNxd, k_HxMxd, v_HxMxd, log_total_HxN, g_HxNxd, k_HxMxd.swapaxes(1, 2)
  )
  return tuple(x.astype(q_HxNxd.dtype) for x in (dq_HxdxN.swapaxes(1, 2), dk, dv))


attend_heads.defvjp(attend_forward, attend_backward)


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
