"""PEARL (CVPR 2026), its attention: keys rotated towards the queries.

The paper's second part, a propagation of the full-size scores along the image's edges, is not here.
"""

import functools

import jax
import jax.numpy as jnp

from rpn_jax.models.training_free.attention import attend_by_scores
from rpn_jax.models.training_free.forward import Forward

# Newton-Schulz steps to the inverse square root, and what is added to its diagonal.
STEPS, RIDGE = 5, 1e-6
EXACT = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


def tokens(forward: Forward) -> jax.Array:
  """Patch tokens of softmax(q (k R)ᵀ / √d + α k' k'ᵀ / √d) v, where k' are the centered keys."""
  scores = functools.partial(rotated_scores, alpha=forward.settings.pearl_alpha)
  return forward.run_last(lambda q, k, v: attend_by_scores(scores, v, q, k))


def rotated_scores(q_BxNxd: jax.Array, k_BxNxd: jax.Array, alpha: float) -> jax.Array:
  """The scores of one head, (B, N, N) float32.

  R is the orthogonal matrix that turns the centered keys best onto the centered queries; the center
  is a mean weighted by the length of the queries, without the class token.
  """
  q, k = q_BxNxd.astype(jnp.float32), k_BxNxd.astype(jnp.float32)
  weight_BxN = jnp.linalg.norm(q, axis=-1) * (jnp.arange(q.shape[1]) > 0)
  weight_BxN /= weight_BxN.sum(-1, keepdims=True)
  center = lambda x: x - EXACT("bn,bnd->bd", weight_BxN, x)[:, None]
  centered = center(k)
  rotation_Bxdxd = nearest_rotation(EXACT("bnd,bne->bde", centered, center(q)))
  rotated = EXACT("bnd,bde->bne", k, rotation_Bxdxd)
  scores = EXACT("bnd,bmd->bnm", q, rotated) + alpha * EXACT("bnd,bmd->bnm", centered, centered)
  return scores * q.shape[-1] ** -0.5


def nearest_rotation(m_Bxdxd: jax.Array) -> jax.Array:
  """m (mᵀ m)^(-1/2), the orthogonal factor of m, by a fixed number of Newton-Schulz steps."""
  identity = jnp.eye(m_Bxdxd.shape[-1])
  square = EXACT("bde,bdf->bef", m_Bxdxd, m_Bxdxd)
  size = jnp.linalg.norm(square, axis=(1, 2), keepdims=True)
  # `root` goes to the square root of what it begins as, `inverse` to its inverse.
  root, inverse = square / size + RIDGE * identity, jnp.broadcast_to(identity, square.shape)
  for _ in range(STEPS):
    change = (3 * identity - EXACT("bde,bef->bdf", inverse, root)) / 2
    root, inverse = EXACT("bde,bef->bdf", root, change), EXACT("bde,bef->bdf", change, inverse)
  return EXACT("bde,bef->bdf", m_Bxdxd, inverse) / jnp.sqrt(size)
