"""Attention that never writes its maps to memory, for TPUs.

A Pallas kernel of our own, since those that JAX ships (flash, splash) take queries, keys and values
apart and one head at a time: the 64 channels of a head fill half of the 128 lanes in which a TPU
stores arrays, so these would be copied to another order and to twice their size, and so would the
row sums that they keep. Here a block is 128 channels of the fused projection, where queries, keys
and values lie side by side, and tokens that are attended to only are an array of their own.

On-chip memory holds all keys of a block of queries, so that a softmax takes one pass, and the
backward pass needs nothing of the forward pass but its inputs.

Shape letters: B images, N tokens, P extra tokens, H heads, d width of a head, D = H d, F = 3 D
channels of the fused projection, L lanes of a block, R queries of a chunk.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from rpn_jax.models import layers
from rpn_jax.models.kernels import lean

if TYPE_CHECKING:  # a third of a second; imported by the functions that use it
  from jax.experimental import pallas as pl

LANES = 128
# Scores of one head for one chunk of queries: 1 MB, a few of which are alive at a time.
CHUNK_SCORES = 2**18
# On-chip memory that the arrays of a program may take; the compiler gives it 16 MB.
ARRAY_BYTES = 8 * 2**20


def self_attend(
  qkv_BxNxF: jax.Array, extra_BxPxF: jax.Array | None, heads: int, causal: bool = False
) -> jax.Array:
  """`layers.self_attend` by the kernel where its blocks fit, by `lean.attend` elsewhere.

  A last block that heads do not fill, as of the narrow tower of `ladder.LadderSide`, has heads of
  zeros beside them.
  """
  if not fits(qkv_BxNxF, extra_BxPxF, heads):
    return layers.self_attend(lean.attend, qkv_BxNxF, extra_BxPxF, heads, causal)
  wide = qkv_BxNxF.shape[-1] // 3
  missing = -wide % LANES
  arrays = [qkv_BxNxF] if extra_BxPxF is None else [qkv_BxNxF, extra_BxPxF]
  if not missing:
    return attend(arrays[0], tuple(arrays[1:]), heads, causal)
  fill = lambda x: jnp.pad(x.reshape(*x.shape[:2], 3, wide), ((0, 0),) * 3 + ((0, missing),))
  qkv, *extra = (fill(x).reshape(*x.shape[:2], -1) for x in arrays)
  return attend(qkv, tuple(extra), heads + missing * heads // wide, causal)[..., :wide]


def fits(qkv_BxNxF: jax.Array, extra_BxPxF: jax.Array | None, heads: int) -> bool:
  """Whether a block of 128 lanes has whole heads, and the backward pass fits on the chip."""
  _, tokens, channels = qkv_BxNxF.shape
  width = channels // 3 // heads
  extra = 0 if extra_BxPxF is None else extra_BxPxF.shape[1]
  # What is read and written, twice since the next block is under way, and sums in float32.
  arrays = 2 * (5 * tokens + 3 * extra) * qkv_BxNxF.dtype.itemsize + 2 * 4 * (tokens + extra)
  return LANES % width == 0 and arrays * LANES <= ARRAY_BYTES


def layer_norm(x: jax.Array, scale_D: jax.Array, bias_D: jax.Array, epsilon: float) -> jax.Array:
  """`lean.layer_norm` of rows that lie one after another.

  For the two sums of a row XLA would choose another order of axes, in which the norm is written to
  memory and copied, not computed where the product after it reads.
  """
  from jax.experimental.layout import Layout, with_layout_constraint

  x = with_layout_constraint(x, Layout(tuple(range(x.ndim))))
  return lean.layer_norm(x, scale_D, bias_D, epsilon)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def attend(
  qkv_BxNxF: jax.Array, extra: tuple[jax.Array, ...], heads: int, causal: bool
) -> jax.Array:
  """softmax(q kᵀ / √d) v of every head, (B, N, D); `extra` is () or (extra_BxPxF,)."""
  from jax.experimental import pallas as pl
  from jax.experimental.pallas import tpu as pltpu

  batch, tokens, channels = qkv_BxNxF.shape
  wide = channels // 3
  blocks = wide // LANES
  rows = chunk_rows(tokens, keys_of(qkv_BxNxF, extra))

  def block(count: int, part: int) -> pl.BlockSpec:
    """All `count` tokens of an image, a block of lanes of the queries (0), keys or values."""
    return pl.BlockSpec((1, count, LANES), lambda b, l, r: (b, 0, part * blocks + l))

  queries = pl.BlockSpec((1, rows, LANES), lambda b, l, r: (b, r, l))
  arrays, specs = [qkv_BxNxF] * 3, [queries, block(tokens, 1), block(tokens, 2)]
  for x in extra:
    arrays, specs = [*arrays, x, x], [*specs, block(x.shape[1], 1), block(x.shape[1], 2)]
  return pl.pallas_call(
    functools.partial(forward_kernel, width=wide // heads, causal=causal),
    grid=(batch, blocks, pl.cdiv(tokens, rows)),
    in_specs=specs,
    out_specs=queries,
    out_shape=jax.ShapeDtypeStruct((batch, tokens, wide), qkv_BxNxF.dtype),
    cost_estimate=cost(qkv_BxNxF, extra, heads, products=2, passes=1),
    compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
    name="attend",
  )(*arrays)


def forward_kernel(q_ref: Any, *refs: Any, width: int, causal: bool) -> None:
  from jax.experimental import pallas as pl

  *inputs, out_ref = refs
  q, (keys, values) = q_ref[0], ([ref[0] for ref in inputs[i::2]] for i in range(2))
  first = pl.program_id(2) * q.shape[0]
  out = jnp.zeros(q.shape, jnp.float32)
  for head in range(LANES // width):
    weights, rate = softmax(only(head, q, width), keys, width, first, causal)
    read = sum(product(w, v, 1, 0) for w, v in zip(weights, values))
    out = jnp.where(lanes_of(head, width), rate * read, out)
  out_ref[0] = out.astype(out_ref.dtype)


def attend_forward(
  qkv_BxNxF: jax.Array, extra: tuple[jax.Array, ...], heads: int, causal: bool
) -> tuple[jax.Array, tuple]:
  return attend(qkv_BxNxF, extra, heads, causal), (qkv_BxNxF, extra)


def attend_backward(heads: int, causal: bool, stored: tuple, g_BxNxD: jax.Array) -> tuple:
  from jax.experimental import pallas as pl
  from jax.experimental.pallas import tpu as pltpu

  qkv_BxNxF, extra = stored
  batch, _, channels = qkv_BxNxF.shape
  blocks = channels // 3 // LANES

  def block(x: jax.Array, part: int | None) -> pl.BlockSpec:
    """A block of lanes of an image's queries, keys or values; None: of each in turn."""
    at = lambda b, l, turn: (b, 0, (turn if part is None else part) * blocks + l)
    return pl.BlockSpec((1, x.shape[1], LANES), at)

  whole: list[jax.Array] = [qkv_BxNxF, *extra]
  arrays = [qkv_BxNxF] * 3 + [x for x in extra for _ in range(2)]
  specs = [block(qkv_BxNxF, part) for part in range(3)]
  specs += [block(x, part) for x in extra for part in (1, 2)]
  # The gradients of a block are computed in its first turn; each turn writes one of them.
  kept = [pltpu.VMEM((x.shape[1], LANES), jnp.float32) for x in whole for _ in range(2)]
  dqkv, *dextra = pl.pallas_call(
    functools.partial(backward_kernel, width=channels // 3 // heads, causal=causal),
    grid=(batch, blocks, 3),
    in_specs=[block(g_BxNxD, 0), *specs],
    out_specs=[block(x, None) for x in whole],
    out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in whole],
    scratch_shapes=kept,
    cost_estimate=cost(qkv_BxNxF, extra, heads, products=5, passes=2),
    compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
    name="attend_backward",
  )(g_BxNxD.astype(qkv_BxNxF.dtype), *arrays)
  return dqkv, tuple(dextra)


def backward_kernel(g_ref: Any, q_ref: Any, *refs: Any, width: int, causal: bool) -> None:
  from jax.experimental import pallas as pl

  sources = 1 if len(refs) == 5 else 2  # of keys: the tokens, and those that are attended to only
  inputs, refs = refs[: 2 * sources], refs[2 * sources :]
  outputs, kept = refs[:sources], refs[sources:]
  turn, tokens = pl.program_id(2), q_ref.shape[1]
  rows = chunk_rows(tokens, sum(ref.shape[1] for ref in inputs[::2]))

  def chunk(first: Any, count: int) -> None:
    """Adds what `count` queries contribute, and writes their own gradient."""
    at = pl.ds(first, count)
    q, g = q_ref[0, at, :], g_ref[0, at, :]
    keys, values = ([ref[0] for ref in inputs[i::2]] for i in range(2))
    dq = jnp.zeros(q.shape, jnp.float32)
    for head in range(LANES // width):
      mine = lanes_of(head, width)
      q_head, g_head = only(head, q, width), only(head, g, width)
      weights, rate = softmax(q_head, keys, width, first, causal)
      weights = [w * rate for w in weights]
      slopes = [product(g_head, v, 1, 1) for v in values]
      middle = sum((w * s).sum(-1, keepdims=True) for w, s in zip(weights, slopes))
      for i, (w, s, k) in enumerate(zip(weights, slopes, keys)):
        dscores = (w * (s - middle) * width**-0.5).astype(k.dtype)
        dq += jnp.where(mine, product(dscores, k, 1, 0), 0)
        kept[2 * i][...] += product(dscores, q_head, 0, 0)
        kept[2 * i + 1][...] += product(w, g_head, 0, 0)
    outputs[0][0, at, :] = dq.astype(outputs[0].dtype)

  @pl.when(turn == 0)
  def _() -> None:
    for ref in kept:
      ref[...] = jnp.zeros_like(ref)
    whole, rest = divmod(tokens, rows)

    def body(i: Any, carry: None) -> None:
      chunk(pl.multiple_of(i * rows, rows), rows)
      return carry

    jax.lax.fori_loop(0, whole, body, None)
    if rest:
      chunk(whole * rows, rest)
    for ref in outputs[1:]:
      ref[...] = jnp.zeros_like(ref)

  for part in (1, 2):

    @pl.when(turn == part)
    def _(part: int = part) -> None:
      for ref, sums in zip(outputs, kept[part - 1 :: 2]):
        ref[0] = sums[...].astype(ref.dtype)


attend.defvjp(attend_forward, attend_backward)


def softmax(
  q_RxL: jax.Array, keys: Any, width: int, first: Any, causal: bool
) -> tuple[list[jax.Array], jax.Array]:
  """For the queries `first`, `first + 1`, …: the weights of each array of keys, and their factor.

  Weights (R, keys) and factor (R, 1), float32; a row of the products is a softmax.
  """
  scores = [product(q_RxL, k, 1, 1) * width**-0.5 for k in keys]
  if causal:
    row, column = (jax.lax.broadcasted_iota(jnp.int32, scores[0].shape, axis) for axis in (0, 1))
    scores[0] = jnp.where(column <= row + first, scores[0], -jnp.inf)
  largest = functools.reduce(jnp.maximum, [s.max(-1, keepdims=True) for s in scores])
  weights = [jnp.exp(s - largest) for s in scores]
  total = functools.reduce(jnp.add, [w.sum(-1, keepdims=True) for w in weights])
  return weights, 1 / total


def product(a: jax.Array, b: jax.Array, axis_a: int, axis_b: int) -> jax.Array:
  """The matrix product over one axis of each, in the type of `b`, summed in float32."""
  dims = (((axis_a,), (axis_b,)), ((), ()))
  return jax.lax.dot_general(a.astype(b.dtype), b, dims, preferred_element_type=jnp.float32)


def lanes_of(head: int, width: int) -> jax.Array:
  """Which lanes of a block are of its head number `head`: (1, L)."""
  lane = jax.lax.broadcasted_iota(jnp.int32, (1, LANES), 1)
  return (lane >= head * width) & (lane < (head + 1) * width)


def only(head: int, x: jax.Array, width: int) -> jax.Array:
  """x with 0 in the lanes of other heads, so that a product over all lanes is that of one head.

  A matrix unit multiplies 128 channels in the time of 64, and no lanes need be moved.
  """
  return jnp.where(lanes_of(head, width), x, 0)


def keys_of(qkv_BxNxF: jax.Array, extra: tuple[jax.Array, ...]) -> int:
  return qkv_BxNxF.shape[1] + sum(x.shape[1] for x in extra)


def chunk_rows(tokens: int, keys: int) -> int:
  """R: about equal chunks of whole 16 queries, the rows that bfloat16 is stored in."""
  chunks = -(-tokens * keys // CHUNK_SCORES)
  rows = 16 * -(-tokens // (16 * chunks))
  return min(tokens, rows)


def cost(
  qkv_BxNxF: jax.Array, extra: tuple[jax.Array, ...], heads: int, products: int, passes: int
) -> pl.CostEstimate:
  """What the compiler cannot see: `products` of a map with its channels, arrays read and written.

  `passes` is how often the fused projections are read or written as a whole; the output, or its
  gradient, is once.
  """
  from jax.experimental import pallas as pl

  batch, tokens, channels = qkv_BxNxF.shape
  keys, size = keys_of(qkv_BxNxF, extra), qkv_BxNxF.dtype.itemsize
  fused = batch * channels * (keys if passes > 1 else keys - sum(x.shape[1] for x in extra) / 3)
  return pl.CostEstimate(
    flops=2 * products * batch * tokens * keys * channels // 3,
    transcendentals=batch * heads * tokens * keys,
    bytes_accessed=int(passes * fused + batch * tokens * channels // 3) * size,
  )
