"""ResCLIP (Yang et al., CVPR 2025): the attention of middle blocks (RCS), and of a first pass's
labels (SFR), added to another method's.

Shape letters: B batch, N patches, H heads or rows of pixels, d width of a head, C classes.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from rpn_jax.models.pamr import pamr
from rpn_jax.models.resizing import resize_grid
from rpn_jax.models.training_free.attention import attend_by_scores, dot, neighborhood
from rpn_jax.models.training_free.forward import Forward, check_blocks, in_proportion

# Base -> which of queries and keys look at each other.
BASES = {"naclip": "k", "clearclip": "q", "sclip": "qk"}


def blocks(settings: Any) -> tuple[int, ...]:
  """Blocks of RCS, from 1: 6 to 9, as released for L/14 too; in proportion in a shallower tower."""
  layers = settings.clip.vision_layers
  return settings.res_clip_blocks or in_proportion((6, 7, 8, 9), min(layers, 12))


def check(settings: Any) -> None:
  if settings.res_clip_base not in BASES:
    raise ValueError(
      f"res_clip_base={settings.res_clip_base!r}: expected one of {', '.join(BASES)}"
    )
  check_blocks("res_clip_blocks", blocks(settings), settings.clip.vision_layers)


def tokens(forward: Forward) -> jax.Array:
  """Patch tokens (B, N, D) of the second pass; of one alone if SFR has no weight.

  In the attention, a map A of the base becomes τ ((1 - λ) A + λ R), R being the mean of the maps of
  `blocks` head by head, (τ, λ) = `res_clip_rcs`. In the second pass, scores s of the base become
  τ ((1 - λ) s + λ F), F the matrix of `feedback` divided by its largest element, which the official
  code rounds to float16, (τ, λ) = `res_clip_sfr`.
  """
  s = forward.settings
  pairs = [forward.project(i - 1)[:2] for i in blocks(s)] if s.res_clip_rcs[1] else []
  omega = neighborhood(*forward.grid, s.gaussian_std) if s.res_clip_base == "naclip" else 0.0

  def run(change: Callable[[jax.Array], jax.Array]) -> jax.Array:
    def read(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
      scores = lambda a: change(dot(a, a)) + omega
      own = sum(attend_by_scores(scores, v, {"q": q, "k": k}[x]) for x in BASES[s.res_clip_base])
      return blend(own, cross_attention(forward.attend, pairs, v), s.res_clip_rcs)

    return forward.run_last(read)

  if not s.res_clip_sfr[1]:
    return run(lambda scores: s.res_clip_sfr[0] * scores)
  cosine = rearrange(
    forward.classify(run(lambda scores: scores)), "b (h w) c -> b h w c", h=forward.grid[0]
  )

  def feedback_of(image_and_cosine: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    label = patch_labels(
      first_probabilities(*image_and_cosine, s.logit_scale),
      s.clip.patch_size, forward.grid, s.res_clip_threshold,
    )  # fmt: skip
    return label, feedback(label, s.gaussian_std, s.res_clip_decay)

  # Image by image: the probabilities of one are those of all its pixels.
  label, added = jax.lax.map(feedback_of, (forward.image, cosine))
  forward.record("patch_labels", label)
  forward.record("sfr", added)
  added /= added.max((1, 2), keepdims=True)
  return run(lambda scores: blend(scores, added, s.res_clip_sfr))


def blend(own: Any, other: Any, tau_lambda: tuple[float, float]) -> jax.Array:
  """τ ((1 - λ) own + λ other)."""
  tau, weight = tau_lambda
  return (tau * ((1 - weight) * own + weight * other)).astype(own.dtype)


def cross_attention(
  attend: Callable, pairs: list[tuple[jax.Array, ...]], v_BxNxHxd: jax.Array
) -> jax.Array | float:
  """R v, R being the mean of softmax(q kᵀ / √d) over pairs (q, k); 0 without any."""
  # The maps themselves are never needed, only what they make of the values.
  return sum(attend(q, k, v_BxNxHxd) for q, k in pairs) / max(len(pairs), 1)


def first_probabilities(image_HxWx3: jax.Array, cosine_hxwxC: jax.Array, scale: float) -> jax.Array:
  """softmax(scale · cosine) of every pixel, the cosines refined by PAMR: (H, W, C)."""
  height, width = image_HxWx3.shape[:2]
  cosine_HxWxC = resize_grid(cosine_hxwxC, height, width)
  return jax.nn.softmax(scale * pamr(image_HxWx3, cosine_HxWxC, (height, width)))


def patch_labels(
  probability_HxWxC: jax.Array, patch: int, grid: tuple[int, int], threshold: float
) -> jax.Array:
  """The most frequent label of each patch's pixels, the first of several: (h, w).

  Pixels whose largest probability is smaller than the threshold have label 0, whatever that is.
  """
  label = jnp.where(probability_HxWxC.max(-1) < threshold, 0, probability_HxWxC.argmax(-1))
  label = label[: grid[0] * patch, : grid[1] * patch]
  pixels = rearrange(label, "(h y) (w x) -> h w (y x)", y=patch, x=patch)
  count = functools.partial(jnp.bincount, length=probability_HxWxC.shape[-1])
  return jax.vmap(jax.vmap(count))(pixels).argmax(-1)


def feedback(label_hxw: jax.Array, std: float, decay: bool) -> jax.Array:
  """SFR's matrix, (1 + N, 1 + N), 0 at the class token; the rows of patches add up to 1.

  Patches of one label have weight 1; with `decay`, a pair whose connecting line leaves the label
  has exp(-distance / largest distance), both Chebyshev's. Each row is then blurred along the
  patches in their order, row after row of the grid, by a Gaussian of `std`.
  """
  flat = label_hxw.ravel()
  weight_NxN = (flat[:, None] == flat).astype(jnp.float32)
  if decay:
    distance = chebyshev(*label_hxw.shape)
    longest = max(1, max(label_hxw.shape) - 1)
    weight_NxN *= jnp.where(connected(label_hxw), 1.0, jnp.exp(distance / -longest))
  taps = min(flat.size, int(6 * std + 1)) | 1
  offset = jnp.arange(taps) - taps // 2
  kernel = jnp.exp(offset**2 / (-2 * std**2))
  blurred = jax.lax.conv_general_dilated(
    weight_NxN[:, None], (kernel / kernel.sum())[None, None], (1,), [(taps // 2, taps // 2)],
    precision=jax.lax.Precision.HIGHEST,
  )[:, 0]  # fmt: skip
  return jnp.pad(blurred / (blurred.sum(-1, keepdims=True) + 1e-8), ((1, 0), (1, 0)))


def chebyshev(height: int, width: int) -> jax.Array:
  """Distances between patches, the larger of rows and columns: (N, N)."""
  row, column = jnp.divmod(jnp.arange(height * width), width)
  return jnp.maximum(abs(row[:, None] - row), abs(column[:, None] - column))


def connected(label_hxw: jax.Array) -> jax.Array:
  """Whether the line from patch i to patch j has i's label everywhere, (N, N).

  It is walked in as many steps as the longest line of the grid has, of which as many are looked at
  as this one needs: of a short line the first part only, as in the official code.
  """
  height, width = label_hxw.shape
  flat, distance = label_hxw.ravel(), chebyshev(height, width)
  longest = max(height, width) - 1

  def step(clear: jax.Array, x: Any) -> tuple[jax.Array, None]:
    number, row_hxh, column_wxw = x
    at = row_hxh[:, None, :, None] * width + column_wxw[None, :, None, :]
    same = flat[at.reshape(flat.size, flat.size)] == flat[:, None]
    return clear & (same | (number > distance)), None

  steps = (np.arange(longest + 1), line_steps(height, longest), line_steps(width, longest))
  return jax.lax.scan(step, jnp.ones((flat.size, flat.size), bool), steps)[0]


@functools.cache
def line_steps(side: int, longest: int) -> np.ndarray:
  """(longest + 1, side, side): the coordinate of each step from i to j, rounded half to even.

  In float32 and by the official code's formula, since halves are frequent: the parts of the way are
  PyTorch's, counted up from 0 in the first half and down from 1 in the second.
  """
  number = np.arange(longest + 1)
  part = np.float32(1 / max(longest, 1))
  upwards = number < (longest + 1) // 2
  t = np.where(upwards, part * number.astype("f"), 1 - part * (longest - number).astype("f"))
  t = t.astype(np.float32)[:, None, None]
  place = np.arange(side, dtype=np.float32)
  return np.round(place[:, None] * (1 - t) + place * t).astype(np.int32)
