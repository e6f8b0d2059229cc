"""SC-CLIP (Bai et al., 2024): outliers among the patches are filled from their neighbors, and
patches are averaged with those that are alike in earlier blocks.

Rows and columns of a grid that is not square are kept apart here; the official code, made for
square windows, takes one for the other. Blocks are counted from 1.

Shape letters: B batch, N patches, D width.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange

from rpn_jax.models.training_free.attention import read_by
from rpn_jax.models.training_free.forward import Forward, check_blocks, in_proportion

# What a similarity's distance from the mean is multiplied by before the softmax.
SHARPNESS = 3.0


def blocks(settings: Any) -> tuple[int, ...]:
  """Whose output (1) says which patches are alike before the last block, (2) after it, and (3, 4)
  the first and the last of those that are added up: 9, 4, 4 and 10 of 12, in proportion of others.
  """
  return settings.sc_clip_blocks or in_proportion((9, 4, 4, 10), settings.clip.vision_layers)


def check(settings: Any) -> None:
  found = blocks(settings)
  check_blocks("sc_clip_blocks", found, settings.clip.vision_layers)
  if found[2] > found[3]:
    raise ValueError(
      f"sc_clip_blocks={found}: expected the first of those that are added up, {found[2]}, to be "
      f"no later than the last, {found[3]}"
    )
  if settings.residual == "kept":
    raise ValueError('residual="kept": sc_clip has no residual connection to keep')


def tokens(forward: Forward) -> jax.Array:
  """Patch tokens (B, N, D).

  Raises:
    ValueError: fewer patches than neighbors.
  """
  s, (height, width) = forward.settings, forward.grid
  if height * width <= s.sc_clip_neighbors:
    raise ValueError(
      f"sc_clip_neighbors={s.sc_clip_neighbors}: expected fewer than the {height} x {width} "
      "patches of an image or window; take larger ones"
    )
  before, after, first, last = blocks(s)
  tokens = lambda i: forward.inputs[i].astype(jnp.float32)
  patches = lambda i: tokens(i)[:, 1:]

  factor_BxN = outlier_factor(patches(-1), s.sc_clip_neighbors)
  threshold = jnp.quantile(factor_BxN, 1 - s.sc_clip_contamination, axis=1, keepdims=True)
  outlier_BxN = factor_BxN > threshold
  fill = lambda x: fill_outliers(x, outlier_BxN, forward.grid)
  alike = cosines(fill(patches(before)))
  cut = lambda similarity: jnp.where(similarity < s.sc_clip_beta, 0.0, similarity)
  alike_before, alike_after = cut(alike), cut(cosines(patches(after)))
  focus = focused(alike)
  recorded = {"lof": factor_BxN, "outliers": outlier_BxN, "before": alike_before}
  for name, value in {**recorded, "after": alike_after}.items():
    forward.record(name, value)

  def attention(x_BxNxD: jax.Array, cls_Bx1xD: jax.Array) -> jax.Array:
    """Half by `focus`, half by keys, among patches only, and a part of the class token."""
    _, k, v = forward.project(forward.last, x_BxNxD)
    by_focus = read_by(focus, v)
    out = forward.output(forward.last, (by_focus + forward.attend(k, k, v)) / 2)
    return out.astype(jnp.float32) + s.sc_clip_class_weight * cls_Bx1xD

  x = average(fill(patches(-1)), alike_before)
  x = average(attention(x, tokens(-1)[:, :1]), alike_after)
  total = functools.reduce(jnp.add, map(tokens, range(first, last + 1)))
  return x + average(attention(total[:, 1:], total[:, :1]), alike_after)


def outlier_factor(x_BxNxD: jax.Array, neighbors: int) -> jax.Array:
  """The local outlier factor of every patch, (B, N).

  The density of a patch is the inverse of the squared distance of its farthest neighbor, and its
  factor the mean density of its neighbors, in its own. (Breunig et al., 2000, take the mean of
  distances, each no smaller than that of the neighbor's own farthest.)
  """
  # Centered, so that the difference of large lengths does not lose the small distances.
  x = x_BxNxD - x_BxNxD.mean(1, keepdims=True)
  length = (x**2).sum(-1)
  products = jnp.matmul(x, x.mT, precision=jax.lax.Precision.HIGHEST)
  squared = jnp.maximum(length[:, :, None] + length[:, None] - 2 * products, 0)
  squared = jnp.where(jnp.eye(x.shape[1], dtype=bool), jnp.inf, squared)
  nearest, which_BxNxK = jax.lax.top_k(-squared, neighbors)
  density_BxN = -1 / nearest[..., -1]
  around = jax.vmap(lambda density, which: density[which])(density_BxN, which_BxNxK)
  return around.mean(-1) / density_BxN


def fill_outliers(x_BxNxD: jax.Array, outlier_BxN: jax.Array, grid: tuple[int, int]) -> jax.Array:
  """Outliers replaced by the mean of those of their eight neighbors that are none, if there are."""
  kept = rearrange(~outlier_BxN, "b (h w) -> b h w 1", h=grid[0]).astype(x_BxNxD.dtype)
  x = rearrange(x_BxNxD, "b (h w) d -> b h w d", h=grid[0])
  # An outlier is no part of its own window's sum.
  around = lambda x: jax.lax.reduce_window(x, 0.0, jax.lax.add, (1, 3, 3, 1), (1, 1, 1, 1), "SAME")
  count = around(kept)
  filled = jnp.where((kept == 0) & (count > 0), around(x * kept) / jnp.maximum(count, 1), x)
  return rearrange(filled, "b h w d -> b (h w) d")


def cosines(x_BxNxD: jax.Array) -> jax.Array:
  """(B, N, N) between patches."""
  x = x_BxNxD / jnp.linalg.norm(x_BxNxD, axis=-1, keepdims=True)
  return jnp.matmul(x, x.mT, precision=jax.lax.Precision.HIGHEST)


def focused(similarity_BxNxN: jax.Array) -> jax.Array:
  """Softmax over the similarities that are not below their mean over all pairs of an image."""
  above = SHARPNESS * (similarity_BxNxN - similarity_BxNxN.mean((1, 2), keepdims=True))
  return jax.nn.softmax(jnp.where(above < 0, -jnp.inf, above))


def average(x_BxNxD: jax.Array, weight_BxNxN: jax.Array) -> jax.Array:
  """The mean of the patches by weights."""
  share = weight_BxNxN / (weight_BxNxN.sum(-1, keepdims=True) + 1e-6)
  return jnp.matmul(share, x_BxNxD, precision=jax.lax.Precision.HIGHEST)
