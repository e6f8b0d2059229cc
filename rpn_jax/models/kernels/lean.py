"""Layers that store little for the backward pass, for every platform.

Automatic differentiation keeps several arrays of each layer: the input and the output of a sigmoid,
the input of a norm with and without its mean. The matrix products of a frozen tower need no stored
input, so these arrays would be most of a training step's memory.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from rpn_jax.models import layers

# Name of what a norm stores of its rows, for policies of `models.remat`.
STATISTICS = "statistics"

# An activation stores its input alone.
ACTIVATIONS = {
  name: jax.checkpoint(jax.jit(function, inline=True))
  for name, function in layers.ACTIVATIONS.items()
}


def attend(
  q_BxNxHxd: jax.Array, k_BxMxHxd: jax.Array, v_BxMxHxd: jax.Array, causal: bool = False
) -> jax.Array:
  """`layers.attend` by JAX's own function, which chooses an implementation for the device."""
  return jax.nn.dot_product_attention(q_BxNxHxd, k_BxMxHxd, v_BxMxHxd, is_causal=causal)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def layer_norm(x: jax.Array, scale_D: jax.Array, bias_D: jax.Array, epsilon: float) -> jax.Array:
  """`layers.layer_norm`; stores its input, and mean and 1 / standard deviation of every row."""
  return layer_norm_forward(x, scale_D, bias_D, epsilon)[0]


# Inline: traced once for the norms of one size, and the program is the same as without.
@functools.partial(jax.jit, static_argnums=3, inline=True)
def layer_norm_forward(
  x: jax.Array, scale_D: jax.Array, bias_D: jax.Array, epsilon: float
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
  wide = x.astype(jnp.float32)
  mean = checkpoint_name(wide.mean(-1, keepdims=True), STATISTICS)
  if x.dtype == jnp.float32:
    variance = ((wide - mean) ** 2).mean(-1, keepdims=True)
  else:
    # Both sums in one pass over x, whose own rounding loses more than this difference.
    variance = jnp.maximum((wide**2).mean(-1, keepdims=True) - mean**2, 0)
  rate = checkpoint_name(jax.lax.rsqrt(variance + epsilon), STATISTICS)
  return (wide - mean) * (rate * scale_D) + bias_D, (x, scale_D, mean, rate)


def layer_norm_backward(
  epsilon: float, stored: tuple[jax.Array, ...], g: jax.Array
) -> tuple[jax.Array, ...]:
  del epsilon
  x, scale_D, mean, rate = stored
  x_wide, scaled = x.astype(jnp.float32), g * scale_D
  # Multiplied out, so that no array of x's size depends on x alone: XLA would compute that in the
  # forward pass already, and keep it.
  average = lambda y: y.mean(-1, keepdims=True)
  middle = average(scaled)
  slope = rate**3 * (average(scaled * x_wide) - middle * mean)
  dx = rate * scaled - slope * x_wide + (slope * mean - rate * middle)
  over_rows = lambda y: y.reshape(-1, y.shape[-1]).sum(0)
  dscale = over_rows(g * rate * x_wide) - over_rows(g * (rate * mean))
  return dx.astype(x.dtype), dscale, over_rows(g)


layer_norm.defvjp(layer_norm_forward, layer_norm_backward)
