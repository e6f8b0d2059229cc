"""Attention that never writes its maps to memory, for GPUs: cuDNN's, where it takes the arrays.

cuDNN attends in 16 bits on NVIDIA's chips from Ampere on, and takes any number of tokens.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from rpn_jax.models import layers
from rpn_jax.models.kernels import lean

# The first generation that has the instructions: Ampere.
CAPABILITY = (8, 0)


def self_attend(
  qkv_BxNxF: jax.Array, extra_BxPxF: jax.Array | None, heads: int, causal: bool = False
) -> jax.Array:
  """`layers.self_attend`; extra keys and values are joined in the way that is fast on GPUs."""
  return layers.self_attend(attend, qkv_BxNxF, extra_BxPxF, heads, causal, join)


def join(x_BxNxHxd: jax.Array, extra_BxPxHxd: jax.Array) -> jax.Array:
  """Both along the tokens, as a sum, which XLA writes four times as fast as a concatenation."""
  pad = lambda x, *sides: jnp.pad(x, ((0, 0), sides, (0, 0), (0, 0)))
  return pad(x_BxNxHxd, 0, extra_BxPxHxd.shape[1]) + pad(extra_BxPxHxd, x_BxNxHxd.shape[1], 0)


def attend(
  q_BxNxHxd: jax.Array, k_BxMxHxd: jax.Array, v_BxMxHxd: jax.Array, causal: bool = False
) -> jax.Array:
  """`layers.attend` by cuDNN where it can, by `lean.attend` elsewhere."""
  function = by_cudnn if fits(q_BxNxHxd) and has_cudnn() else lean.attend
  return function(q_BxNxHxd, k_BxMxHxd, v_BxMxHxd, causal)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def by_cudnn(
  q_BxNxHxd: jax.Array, k_BxMxHxd: jax.Array, v_BxMxHxd: jax.Array, causal: bool
) -> jax.Array:
  return jax.nn.dot_product_attention(
    q_BxNxHxd, k_BxMxHxd, v_BxMxHxd, is_causal=causal, implementation="cudnn"
  )


def by_cudnn_even(
  q_BxNxHxd: jax.Array, k_BxMxHxd: jax.Array, v_BxMxHxd: jax.Array, causal: bool
) -> jax.Array:
  """The same; JAX differentiates it for even numbers of tokens only."""
  batch, tokens = q_BxNxHxd.shape[:2]
  keys = k_BxMxHxd.shape[1]
  # A key more must be told from the others, unless it comes after all that a query may attend to.
  lengths = jnp.full((batch,), keys, jnp.int32) if keys % 2 and not causal else None
  even = lambda x: jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0)))
  out = jax.nn.dot_product_attention(
    even(q_BxNxHxd),
    even(k_BxMxHxd),
    even(v_BxMxHxd),
    key_value_seq_lengths=lengths,
    is_causal=causal,
    implementation="cudnn",
  )
  return out[:, :tokens]


def by_cudnn_forward(
  q_BxNxHxd: jax.Array, k_BxMxHxd: jax.Array, v_BxMxHxd: jax.Array, causal: bool
) -> tuple[jax.Array, Callable]:
  function = functools.partial(by_cudnn_even, causal=causal)
  return jax.vjp(function, q_BxNxHxd, k_BxMxHxd, v_BxMxHxd)


def by_cudnn_backward(causal: bool, pull: Callable, g_BxNxHxd: jax.Array) -> tuple[jax.Array, ...]:
  del causal
  return pull(g_BxNxHxd)


by_cudnn.defvjp(by_cudnn_forward, by_cudnn_backward)


def fits(q_BxNxHxd: jax.Array) -> bool:
  """Whether cuDNN has a kernel for this type and width of heads."""
  width = q_BxNxHxd.shape[-1]
  return q_BxNxHxd.dtype in (jnp.bfloat16, jnp.float16) and width % 8 == 0 and width <= 128


@functools.cache
def has_cudnn() -> bool:
  """Whether every GPU of this process is one that cuDNN attends on.

  Without a GPU, as when a program is exported, it is not: JAX asks the devices at hand.
  """
  try:
    devices = jax.local_devices(backend="cuda")
  except RuntimeError:
    return False
  capability = lambda device: tuple(map(int, device.compute_capability.split(".")))
  return all(capability(device) >= CAPABILITY for device in devices)
