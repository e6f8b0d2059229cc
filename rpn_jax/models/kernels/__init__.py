"""Which version of products, attention, LayerNorm, activations and convolutions a device runs.

A version computes the values and gradients of `rpn_jax.models.layers`. It is chosen by the platform
that a program is compiled for, which need not be the platform of the compiling process.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax
import jax.numpy as jnp

from rpn_jax.models import layers
from rpn_jax.models.kernels import cpu, gpu, lean, tpu


@dataclasses.dataclass(frozen=True)
class Kernels:
  """The functions that a network computes its layers with. Hashable: part of a program's key.

  Attributes:
    attend: (q (B, N, H, d), k (B, M, H, d), v (B, M, H, d), causal=False) -> (B, N, H, d).
    self_attend: the same from CLIP's fused projections; `layers.self_attend` without its first
      argument.
    layer_norm: (x (..., D), scale (D,), bias (D,), epsilon) -> (..., D) float32.
    activations: name -> elementwise function; the names are those of `layers.ACTIVATIONS`.
    product: (x (..., K), w (K, F)) -> (..., F) of the operands' type, or float32 for one to round.
    convolve: (x (N, H, W, C), kernel (K, K, C, F)) -> (N, H, W, F), where x needs a gradient. The
      convolutions of Flax's own layers are not of this.
  """

  attend: Callable
  self_attend: Callable
  layer_norm: Callable
  activations: Mapping[str, Callable]
  product: Callable = jnp.matmul
  convolve: Callable = layers.convolve

  def __reduce__(self) -> str | tuple:
    """Pickled and copied by a name: some of the functions have none to find them by."""
    if self is TEXTBOOK:
      return "TEXTBOOK"
    for platform in (*PLATFORMS, "others"):
      if for_platform(platform) == self:
        return for_platform, (platform,)
    return Kernels, tuple(getattr(self, field.name) for field in dataclasses.fields(self))


def by(attend: Callable) -> dict[str, Any]:
  """The two fields of attention, both by `attend`."""
  return {"attend": attend, "self_attend": functools.partial(layers.self_attend, attend)}


TEXTBOOK = Kernels(
  **by(layers.attend),
  layer_norm=layers.layer_norm,
  activations=flax.core.FrozenDict(layers.ACTIVATIONS),
)
LEAN = Kernels(
  **by(lean.attend),
  layer_norm=lean.layer_norm,
  activations=flax.core.FrozenDict(lean.ACTIVATIONS),
)
PLATFORMS = {
  "cpu": dataclasses.replace(LEAN, **by(cpu.attend), product=cpu.product, convolve=cpu.convolve),
  "gpu": dataclasses.replace(LEAN, attend=gpu.attend, self_attend=gpu.self_attend),
  "tpu": dataclasses.replace(LEAN, self_attend=tpu.self_attend, layer_norm=tpu.layer_norm),
}


def for_platform(platform: str) -> Kernels:
  """The kernels of a platform, as `device.platform` names it; LEAN where it has none of its own."""
  return PLATFORMS.get(platform, LEAN)
