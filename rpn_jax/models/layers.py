"""Activations, LayerNorm, attention and convolution as the papers write them.

Plain `jax.numpy`, differentiated automatically. `models/kernels` holds versions that compute the
same values and gradients with less memory or time.

Shape letters: B batch, N tokens, M tokens attended to, H heads, d width of a head, D width, F
channels of a fused projection, P extra tokens; in a convolution N images, H/W pixels, C channels, F
features, K side of the kernel.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

# The value CLIP was trained with (PyTorch's default); Flax's own default is 1e-6.
LAYER_NORM_EPSILON = 1e-5
# Sums in float32, whatever the type of what is multiplied.
wide_einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def in_float32(function: Callable) -> Callable:
  """The elementwise function, computed in float32 and rounded to its input's type."""
  return lambda x: function(x.astype(jnp.float32)).astype(x.dtype)


ACTIVATIONS = {
  "quick_gelu": in_float32(lambda x: x * jax.nn.sigmoid(1.702 * x)),
  "gelu": in_float32(lambda x: jax.nn.gelu(x, approximate=False)),
}


def layer_norm(x: jax.Array, scale_D: jax.Array, bias_D: jax.Array, epsilon: float) -> jax.Array:
  """(x - mean) / sqrt(variance + epsilon) * scale + bias over the last axis, in float32."""
  x = x.astype(jnp.float32)
  centered = x - x.mean(-1, keepdims=True)
  variance = (centered**2).mean(-1, keepdims=True)
  return centered / jnp.sqrt(variance + epsilon) * scale_D + bias_D


def attend(
  q_BxNxHxd: jax.Array, k_BxMxHxd: jax.Array, v_BxMxHxd: jax.Array, causal: bool = False
) -> jax.Array:
  """softmax(q kᵀ / √d) v for every head, sums and softmax in float32: (B, N, H, d)."""
  scores = wide_einsum("bnhd,bmhd->bhnm", q_BxNxHxd, k_BxMxHxd) * q_BxNxHxd.shape[-1] ** -0.5
  if causal:
    scores = jnp.where(jnp.tril(jnp.ones(scores.shape[-2:], bool)), scores, -jnp.inf)
  weights = jax.nn.softmax(scores).astype(v_BxMxHxd.dtype)
  return wide_einsum("bhnm,bmhd->bnhd", weights, v_BxMxHxd).astype(v_BxMxHxd.dtype)


def join(x_BxNxHxd: jax.Array, extra_BxPxHxd: jax.Array) -> jax.Array:
  """(B, N + P, H, d)."""
  return jnp.concatenate([x_BxNxHxd, extra_BxPxHxd], axis=1)


def self_attend(
  attend: Callable,
  qkv_BxNxF: jax.Array,
  extra_BxPxF: jax.Array | None,
  heads: int,
  causal: bool = False,
  join: Callable = join,
) -> jax.Array:
  """Attention of tokens to themselves and to extra ones, from CLIP's fused projections: (B, N, D).

  Args:
    attend: (q, k, v, causal) -> (B, N, H, d).
    qkv_BxNxF: queries, keys and values side by side, F = 3 D channels.
    extra_BxPxF: of tokens that are attended to only; their queries are not used.
    heads: H.
    causal: no token attends to later ones; not with extra tokens.
    join: (keys or values of the tokens, those of the extra tokens) -> of both.
  """
  # The gradient of `jnp.split` joins its parts; that of indexing would add them up, each padded.
  by_head = lambda x: rearrange(x, "b n (h d) -> b n h d", h=heads)
  split = lambda x: map(by_head, jnp.split(x, 3, axis=-1))
  q, k, v = split(qkv_BxNxF)
  if extra_BxPxF is not None:
    _, *more = split(extra_BxPxF)
    k, v = (join(*pair) for pair in zip((k, v), more))
  return rearrange(attend(q, k, v, causal), "b n h d -> b n (h d)")


def convolve(x_NxHxWxC: jax.Array, kernel_KxKxCxF: jax.Array) -> jax.Array:
  """Convolution with an odd kernel, of the image padded with 0 to keep its size: (N, H, W, F)."""
  return jax.lax.conv_general_dilated(
    x_NxHxWxC, kernel_KxKxCxF, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
  )


def convolve_patches(
  product: Callable,
  x_NxHxWxC: jax.Array,
  kernel_KxKxCxF: jax.Array,
  *settings: Any,
  **others: Any,
) -> jax.Array:
  """The convolution of patches side by side, as one matrix product: (N, H / K, W / K, F).

  For `flax.linen.Conv`, whose settings say nothing that the kernel does not. cuDNN's convolution
  takes five times as long (docs/benchmarks.md). `product`: see `kernels.Kernels`.
  """
  del settings, others
  side = kernel_KxKxCxF.shape[0]
  patches = rearrange(x_NxHxWxC, "n (h y) (w x) c -> n h w (y x c)", y=side, x=side)
  return product(patches, rearrange(kernel_KxKxCxF, "y x c f -> (y x c) f"))


def check_shape(module: Any, name: str, value: Any, shape: tuple[int, ...]) -> None:
  """Compares a stored tensor of `module` with the shape that the module asks for.

  Raises:
    flax.errors.ScopeParamShapeError: they differ.
  """
  if value.shape != tuple(shape):
    path = f"/{'/'.join(module.path)}"
    raise flax.errors.ScopeParamShapeError(name, path, value.shape, tuple(shape))


class StoredParams:
  """Mixin: a parameter that is there has its shape compared, and no more.

  Flax would trace its initializer each time to learn the shape, a fifth of the time that it takes
  to trace CLIP.
  """

  def param(self: Any, name: str, init_fn: Callable, *init_args: Any, **init_kwargs: Any) -> Any:
    if not self.has_variable("params", name):
      return super().param(name, init_fn, *init_args, **init_kwargs)  # type: ignore[misc]
    value = self.get_variable("params", name)
    # The shape is the first argument of every initializer that linen's layers use.
    check_shape(self, name, value, init_args[0])
    return value


class Dense(StoredParams, nn.Module):
  """A projection with a bias, as `nn.Dense`.

  Attributes:
    features: channels out.
    dtype: compute type, and that of the result.
    kernel_init: initializer of the kernel (D, features).
    bias_init: of the bias (features,).
    product: of input and kernel, see `kernels.Kernels`.
  """

  features: int
  dtype: Any = jnp.float32
  kernel_init: Callable = nn.initializers.lecun_normal()
  bias_init: Callable = nn.initializers.zeros
  product: Callable = jnp.matmul

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """(..., D) -> (..., features)."""
    kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features), jnp.float32)
    bias = self.param("bias", self.bias_init, (self.features,), jnp.float32)
    out = self.product(x.astype(self.dtype), kernel.astype(self.dtype))
    return (out + bias.astype(out.dtype)).astype(self.dtype)


class LayerNorm(StoredParams, nn.Module):
  """LayerNorm over the last axis with scale and bias, in float32 whatever the input type.

  In bfloat16 the mean of wide activations would be lost.

  Attributes:
    epsilon: added to the variance.
    trained: whether scale and bias are trained. Their gradients are then summed before the gradient
      of x is passed on; XLA's CPU scheduler would leave the sums to the end of the step and keep an
      array for each norm until then.
    function: (x, scale, bias, epsilon) -> float32; see `kernels.Kernels.layer_norm`.
  """

  epsilon: float = LAYER_NORM_EPSILON
  trained: bool = False
  function: Callable = layer_norm

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """(..., D) of any float type -> (..., D) float32."""
    scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
    bias = self.param("bias", nn.initializers.zeros, x.shape[-1:])
    if self.trained:
      x, scale, bias = jax.lax.optimization_barrier((x, scale, bias))
    return self.function(x, scale, bias, self.epsilon)
