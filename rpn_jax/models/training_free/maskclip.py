"""MaskCLIP's two refinements of scores (Zhou et al., ECCV 2022), as its official decode head has
them."""

import jax
import jax.numpy as jnp

# The score of a class that is suppressed.
SUPPRESSED = -100.0


def suppress(cosine_BxNxC: jax.Array, threshold: float, scale: float) -> jax.Array:
  """Prompt denoising: SUPPRESSED for every class that no patch gives a probability of `threshold`.

  Probabilities are softmax(scale · cosine). Where all classes are suppressed, the first one wins.
  In the mean of windows that overlap, a class that one of them suppresses is below every cosine.
  """
  best = jax.nn.softmax(scale * cosine_BxNxC).max(axis=1, keepdims=True)
  return jnp.where(best < threshold, SUPPRESSED, cosine_BxNxC)


def smooth(scores_BxNxC: jax.Array, keys_BxNxD: jax.Array, below: float) -> jax.Array:
  """Key smoothing: scores k kᵀ p of the patches whose own largest p is smaller than `below`.

  Each channel of the keys has length 1 over the patches of an image. The weights of a patch are not
  divided by their sum: they are small where an image has many patches, and the results of windows
  are comparable since all have as many.
  """
  exact = jax.lax.Precision.HIGHEST
  keys = keys_BxNxD.astype(jnp.float32)
  keys /= jnp.maximum(jnp.linalg.norm(keys, axis=1, keepdims=True), 1e-12)
  # Keys by scores first: no array has N x N elements.
  gathered_BxDxC = jnp.matmul(keys.mT, scores_BxNxC, precision=exact)
  smoothed = jnp.matmul(keys, gathered_BxDxC, precision=exact)
  return jnp.where(scores_BxNxC.max(-1, keepdims=True) < below, smoothed, scores_BxNxC)
