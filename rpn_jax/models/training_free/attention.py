"""Ways to read the last block that need nothing but its attention.

Shape letters: B batch, N tokens (with the class token), H heads, d width of a head.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from rpn_jax.models.layers import wide_einsum
from rpn_jax.models.training_free.forward import Forward


def as_trained(attend: Callable, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
  """softmax(q kᵀ / √d) v."""
  return attend(q, k, v)


def own_value(attend: Callable, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
  """Every token keeps its own value."""
  del attend, q, k
  return v


def query_query(attend: Callable, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
  """softmax(q qᵀ / √d) v."""
  del k
  return attend(q, q, v)


def key_key(attend: Callable, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
  """softmax(k kᵀ / √d) v."""
  del q
  return attend(k, k, v)


def query_query_key_key(attend: Callable, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
  """(softmax(q qᵀ / √d) + softmax(k kᵀ / √d)) v."""
  return attend(q, q, v) + attend(k, k, v)


def dot(a_BxNxd: jax.Array, b_BxMxd: jax.Array) -> jax.Array:
  """a bᵀ / √d of one head, (B, N, M) float32."""
  return wide_einsum("bnd,bmd->bnm", a_BxNxd, b_BxMxd) * a_BxNxd.shape[-1] ** -0.5


def read_by(weights_BxNxM: jax.Array, v_BxMxHxd: jax.Array) -> jax.Array:
  """Values weighted alike in all heads, summed in float32: (B, N, H, d) of the values' type."""
  weights, v = weights_BxNxM.astype(v_BxMxHxd.dtype), v_BxMxHxd
  return wide_einsum("bnm,bmhd->bnhd", weights, v).astype(v.dtype)


def attend_by_scores(
  scores: Callable, v_BxNxHxd: jax.Array, *arrays_BxNxHxd: jax.Array
) -> jax.Array:
  """softmax(scores) v for every head, one head after another: (B, N, H, d).

  The scores of all heads at once would be gigabytes for a large image.

  Args:
    scores: (arrays of one head, each (B, N, d)) -> (B, N, N) float32.
    v_BxNxHxd: the values.
    *arrays_BxNxHxd: what the scores are made of.
  """

  def one_head(parts: tuple[jax.Array, ...]) -> jax.Array:
    *arrays, v_BxNxd = parts
    return read_by(jax.nn.softmax(scores(*arrays)), v_BxNxd[:, :, None])[:, :, 0]

  by_head = tuple(jnp.moveaxis(x, 2, 0) for x in (*arrays_BxNxHxd, v_BxNxHxd))
  return jnp.moveaxis(jax.lax.map(one_head, by_head), 0, 2)


def neighborhood(height: int, width: int, std: float) -> jax.Array:
  """NACLIP's ω, exp(-distance² / 2 std²) between patches, 0 at the class token: (1 + N, 1 + N)."""
  row, column = jnp.divmod(jnp.arange(height * width), width)
  distance = (row[:, None] - row) ** 2 + (column[:, None] - column) ** 2
  return jnp.pad(jnp.exp(distance / (-2 * std**2)), ((1, 0), (1, 0)))


def neighbor_keys(forward: Forward) -> jax.Array:
  """NACLIP: softmax(k kᵀ / √d + ω) v."""
  omega = neighborhood(*forward.grid, forward.settings.gaussian_std)
  forward.record("omega", omega)
  return forward.run_last(lambda q, k, v: attend_by_scores(lambda k: dot(k, k) + omega, v, k))


def neighbors_only(forward: Forward) -> jax.Array:
  """NACLIP's ablation: softmax(ω m / √d) v, m being the mean of |q| |k| over heads and pairs."""
  omega = neighborhood(*forward.grid, forward.settings.gaussian_std)

  def read(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    length = lambda x: jnp.linalg.norm(x.astype(jnp.float32), axis=-1).mean(1)
    mean_B = (length(q) * length(k)).mean(-1) * q.shape[-1] ** -0.5
    return read_by(jax.nn.softmax(omega * mean_B[:, None, None]), v)

  return forward.run_last(read)
