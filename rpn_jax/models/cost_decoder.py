"""CAT-Seg's decoder: the maps of the classes, enlarged under the guidance of the vision tower.

Shape letters as in `cost_aggregation`; F channels.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from rpn_jax.models import initializers, prompts
from rpn_jax.models.cost_aggregation import Guided, in_chunks
from rpn_jax.models.kernels import TEXTBOOK, Kernels
from rpn_jax.models.layers import LAYER_NORM_EPSILON


class Upsample(nn.Module):
  """Transposed convolution whose stride is its kernel's side: every pixel becomes a square.

  Attributes:
    features: channels out.
    factor: side of the square.
    dtype: compute type.
  """

  features: int
  factor: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """(…, h, w, D) -> (…, h * factor, w * factor, features)."""
    factor, features = self.factor, self.features
    # PyTorch's fan-in is that of the output.
    init = initializers.uniform((features * factor**2) ** -0.5)
    kernel = prompts.prompt(self, "kernel", init, (x.shape[-1], factor, factor, features))
    bias = prompts.prompt(self, "bias", init, (features,)).astype(self.dtype)
    y = x.astype(self.dtype) @ kernel.reshape(x.shape[-1], -1).astype(self.dtype)
    y = rearrange(y, "... h w (i j f) -> ... (h i) (w j) f", i=factor, j=factor)
    return y + bias


def norm_groups(channels: int) -> int:
  """Groups that channels are normalized in: one for each whole 16 of them, all of one size.

  Raises:
    ValueError: there are none, or they do not divide the channels.
  """
  groups = channels // 16
  if not groups or channels % groups:
    raise ValueError(
      f"expected 16 channels or more that {channels} // 16 groups divide, as a multiple of 16, got "
      f"{channels}"
    )
  return groups


class GroupNorm(nn.Module):
  """Normalizes the channels of each of `norm_groups` over the image, in float32 whatever the input
  type."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """(B, C, h, w, F) -> (B, C, h, w, F) float32."""
    features = x.shape[-1]
    scale = prompts.prompt(self, "scale", nn.initializers.ones, (features,))
    bias = prompts.prompt(self, "bias", nn.initializers.zeros, (features,))
    pattern, count = "b c h w (g f) -> b c h w g f", norm_groups(features)
    groups = rearrange(x.astype(jnp.float32), pattern, g=count)
    centered = groups - groups.mean((2, 3, 5), keepdims=True)
    variance = (centered**2).mean((2, 3, 5), keepdims=True)
    normalized = centered * jax.lax.rsqrt(variance + LAYER_NORM_EPSILON)
    return normalized.reshape(x.shape) * scale + bias


class UpsampleStep(nn.Module):
  """Doubles the resolution; two convolutions, of which the first mixes in what guides.

  Attributes:
    features: channels out.
    guidance_width: G.
    dtype: compute type.
    kernels: see `Kernels`.
  """

  features: int
  guidance_width: int
  dtype: Any = jnp.float32
  kernels: Kernels = TEXTBOOK

  @nn.compact
  def __call__(self, x: jax.Array, guidance_Bx1xhxwxG: jax.Array) -> jax.Array:
    """(B, C, h, w, D) -> (B, C, 2 h, 2 w, features)."""
    x = Upsample(x.shape[-1] - self.guidance_width, 2, self.dtype, name="up")(x)
    for i, guidance in enumerate((guidance_Bx1xhxwxG, guidance_Bx1xhxwxG[..., :0])):
      conv = Guided(self.features, (3, 3), False, self.dtype, self.kernels, name=f"conv_{i}")
      x = jax.nn.relu(GroupNorm(name=f"norm_{i}")(conv(x, guidance)))
    return x


class Decoder(nn.Module):
  """Doubles the resolution twice, class by class, guided by blocks of the vision tower.

  Attributes:
    widths: channels after each doubling, see `norm_groups`.
    guidance_widths: G and G'.
    remat: whether chunks of classes are computed again in the backward pass.
    dtype: compute type.
    kernels: see `Kernels`.
  """

  widths: tuple[int, int]
  guidance_widths: tuple[int, int]
  remat: bool = False
  dtype: Any = jnp.float32
  kernels: Kernels = TEXTBOOK

  def setup(self) -> None:
    self.step = [
      UpsampleStep(width, guidance, self.dtype, self.kernels)
      for width, guidance in zip(self.widths, self.guidance_widths)
    ]
    self.head = Guided(1, (3, 3), True, self.dtype, self.kernels)

  def __call__(self, x_BxCxhxwxD: jax.Array, guidance: tuple[jax.Array, ...]) -> jax.Array:
    """Logits (B, C, 4 h, 4 w), of guidance (B, 2 h, 2 w, G) and (B, 4 h, 4 w, G')."""

    def decode(module: Decoder, x: jax.Array, *guidance: jax.Array) -> jax.Array:
      for step, g in zip(module.step, guidance):
        x = step(x, g[:, None])
        module.sow("intermediates", "step", x)
      return module.head(x, x[..., :0])[..., 0].astype(jnp.float32)

    x = x_BxCxhxwxD
    pixels, (first, second) = len(x) * x.shape[2] * x.shape[3], self.widths
    elements = pixels * max(4 * x.shape[-1], 16 * first, 16 * second)
    return in_chunks(decode, self, (x,), guidance, axis=1, elements=elements, remat=self.remat)
