"""GEM (Bousselham et al., CVPR 2024): a second stream through the last blocks, whose tokens look at
those that are alike in queries, keys or values."""

from typing import Any

import jax
import jax.numpy as jnp

from rpn_jax.models.training_free.forward import Forward


def depth(settings: Any) -> int:
  """GEM's depth: 7, whose stream goes through the last 6 blocks; in a tower of fewer than 12, half
  of the blocks and one."""
  return settings.gem_depth or 1 + min(6, max(1, settings.clip.vision_layers // 2))


def check(settings: Any) -> None:
  layers = settings.clip.vision_layers
  if not 2 <= depth(settings) <= layers + 1:
    raise ValueError(
      f"gem_depth={settings.gem_depth}: expected 2 to {layers + 1}, one more than blocks of the "
      f"second stream, in a tower of {layers}"
    )


def tokens(forward: Forward) -> jax.Array:
  """Patch tokens of the second stream; without residual the last block's contribution alone."""
  first = len(forward.inputs) + 1 - depth(forward.settings)
  stream = forward.inputs[first]
  for i in range(first, len(forward.inputs)):
    added = forward.output(i, _alike(forward, i)).astype(stream.dtype)
    stream = stream + added if forward.residual else added
  return stream[:, 1:]


def _alike(forward: Forward, i: int) -> jax.Array:
  """Mean of softmax(T s sᵀ) v over s = v, k and q with unit length: (B, N, H, d).

  T is the mean length of the normalized tokens of an image, divided by √d. Before, s is replaced
  `gem_iterations` times by softmax(T s sᵀ) s, and brought to unit length again.
  """
  q, k, v = forward.project(i)
  normalized = forward.tower.block[i].ln_1(forward.inputs[i])
  # `attend` divides by √d itself.
  temperature_B = jnp.linalg.norm(normalized, axis=-1).mean(-1)
  read = lambda s, v: forward.attend(
    (s * temperature_B[:, None, None, None]).astype(v.dtype), s.astype(v.dtype), v
  )
  found = jnp.zeros(v.shape, jnp.float32)
  for s in (v, k, q):
    s = _unit(s)
    for _ in range(forward.settings.gem_iterations):
      s = _unit(read(s, s.astype(v.dtype)))
    found += read(s, v).astype(jnp.float32)
  return (found / 3).astype(v.dtype)


def _unit(x: jax.Array) -> jax.Array:
  x = x.astype(jnp.float32)
  return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
