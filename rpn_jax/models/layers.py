"""Activation, LayerNorm and attention, with backward passes that store as little as they can.

Automatic differentiation would keep several arrays of each: what a sigmoid was computed from and
what came out, the input of a norm with and without its mean. The tower is frozen, so its matrix
products need no stored input, and these arrays would be most of a training step's memory.

Shape letters: N tokens, M tokens that are looked at, D width, H heads (of all images), d width of a
head.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jax.ad_checkpoint import checkpoint_name

# Of an activation only the input is stored.
ACTIVATIONS = {
  "quick_gelu": jax.checkpoint(lambda x: x * jax.nn.sigmoid(1.702 * x)),
  "gelu": jax.checkpoint(lambda x: jax.nn.gelu(x, approximate=False)),
}

# The value CLIP was trained with (PyTorch's default); Flax's own default is 1e-6.
LAYER_NORM_EPSILON = 1e-5


class LayerNorm(nn.Module):
  """Over the last axis, with scale and bias, in float32 whatever comes in: bfloat16 would lose the
  mean of wide activations.

  Attributes:
    epsilon: added to the variance.
    trained: scale and bias are, and their gradients are summed before that of x is passed on;
      XLA's CPU scheduler would leave them to the end of the step, with an array for each norm.
  """

  epsilon: float = LAYER_NORM_EPSILON
  trained: bool = False

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """(..., D) of any float type -> (..., D) float32."""
    scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
    bias = self.param("bias", nn.initializers.zeros, x.shape[-1:])
    if self.trained:
      x, scale, bias = jax.lax.optimization_barrier((x, scale, bias))
    return normalize(x, scale, bias, self.epsilon)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def normalize(x, scale_D, bias_D, epsilon: float):
  """(x - mean) / sqrt(variance + epsilon) * scale + bias over the last axis, in float32."""
  return normalize_forward(x, scale_D, bias_D, epsilon)[0]


def normalize_forward(x, scale_D, bias_D, epsilon):
  wide = x.astype(jnp.float32)
  mean = wide.mean(-1, keepdims=True)
  rate = jax.lax.rsqrt(((wide - mean) ** 2).mean(-1, keepdims=True) + epsilon)
  return (wide - mean) * (rate * scale_D) + bias_D, (x, scale_D, mean, rate)


def normalize_backward(epsilon, stored, g):
  del epsilon
  x, scale_D, mean, rate = stored
  x_wide, scaled = x.astype(jnp.float32), g * scale_D
  # Multiplied out, so that nothing of x's size depends on x alone: XLA would compute that in the
  # forward pass already, and keep it.
  average = lambda y: y.mean(-1, keepdims=True)
  middle = average(scaled)
  slope = rate**3 * (average(scaled * x_wide) - middle * mean)
  dx = rate * scaled - slope * x_wide + (slope * mean - rate * middle)
  over_rows = lambda y: y.reshape(-1, y.shape[-1]).sum(0)
  dscale = over_rows(g * rate * x_wide) - over_rows(g * (rate * mean))
  return dx.astype(x.dtype), dscale, over_rows(g)


normalize.defvjp(normalize_forward, normalize_backward)


# Numbers of one layer's attention maps above which a CPU takes one head after another: 16 MB.
MAP_ELEMENTS = 2**22


def attend(q_BxNxHxd, k_BxMxHxd, v_BxMxHxd, causal: bool = False):
  """softmax(q kᵀ / √d) v for every head: (B, N, H, d).

  On a CPU, where all maps of 512 x 512 images would go through main memory several times, heads
  are taken one by one (docs/benchmarks.md).
  """
  batch, tokens, heads, _ = q_BxNxHxd.shape
  large = batch * heads * tokens * k_BxMxHxd.shape[1] > MAP_ELEMENTS
  if causal or not large or jax.default_backend() != "cpu":
    return jax.nn.dot_product_attention(q_BxNxHxd, k_BxMxHxd, v_BxMxHxd, is_causal=causal)
  split = lambda x: rearrange(x, "b n h d -> (b h) n d")
  out = attend_by_head(split(q_BxNxHxd), split(k_BxMxHxd), split(v_BxMxHxd))
  return rearrange(out, "(b h) n d -> b n h d", h=heads)


@jax.custom_vjp
def attend_by_head(q_HxNxd, k_HxMxd, v_HxMxd):
  """softmax(q kᵀ / √d) v, one head after another: (H, N, d).

  Of a map only the logarithm of each row's sum is stored; the backward pass computes it again
  from that, without its product with v (FlashAttention, Dao et al., 2022).
  """
  return attend_forward(q_HxNxd, k_HxMxd, v_HxMxd)[0]


def attend_forward(q_HxNxd, k_HxMxd, v_HxMxd):
  def one_head(qkv):
    q, k, v = qkv
    scores = (q * q.shape[-1] ** -0.5 @ k.T).astype(jnp.float32)
    largest = scores.max(-1, keepdims=True)
    weights = jnp.exp(scores - largest)
    total = weights.sum(-1, keepdims=True)
    out = ((weights.astype(v.dtype) @ v) / total).astype(v.dtype)
    return out, (largest + jnp.log(total))[:, 0]

  out, log_total = jax.lax.map(one_head, (q_HxNxd, k_HxMxd, v_HxMxd))
  return out, (q_HxNxd, k_HxMxd, v_HxMxd, checkpoint_name(log_total, "attention"))


def attend_backward(stored, g_HxNxd):
  # Maps as M x N, and keys transposed beforehand, so that no product has a transposed map in it:
  # these have a slower kernel. The barrier keeps that copy of the keys out of the forward pass.
  q_HxNxd, k_HxMxd, v_HxMxd, log_total_HxN = stored
  scale = q_HxNxd.shape[-1] ** -0.5
  k_HxMxd, g_HxNxd = jax.lax.optimization_barrier((k_HxMxd, g_HxNxd))

  def one_head(arrays):
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
