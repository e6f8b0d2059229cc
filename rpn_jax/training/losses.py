"""The losses of the official RPN code as (sum, normalizer) pairs, at label resolution.

Logits are on the patch grid, labels have full size. All upsampled logits would be B x H x W x C
scalars (164 MB per 512 x 512 image with 156 classes), so a scan upsamples a few rows at a time,
adds them to the sums, and recomputes them in the backward pass.

Shape letters: B batch, h/w logit grid, H/W label pixels, C classes, Y rows of one chunk.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax
import jax
import jax.numpy as jnp

from rpn_jax.models.resizing import interpolation_matrix

# Scalars in one upsampled chunk: 64 MB in float32.
CHUNK_ELEMENTS = 2**24

FOCAL_ALPHA = 0.25
FOCAL_GAMMA = 2.0
FOCAL_WEIGHT = 100.0
DICE_WEIGHT = 1.0


@flax.struct.dataclass
class Term:
  """A loss as sum and normalizer, which are summed over devices before dividing.

  Attributes:
    total: sum.
    normalizer: number of summands, of all devices together when `value` is taken.
    skip_empty: what `value` is if the normalizer is 0: 0, or else the sum, as if it were 1.
  """

  total: jax.Array
  normalizer: jax.Array
  skip_empty: bool = flax.struct.field(pytree_node=False, default=False)

  @property
  def value(self) -> jax.Array:
    mean = self.total / jnp.maximum(self.normalizer, 1)
    return mean * (self.normalizer > 0) if self.skip_empty else mean


def rows_per_chunk(batch: int, height: int, width: int, classes: int, logit_rows: int) -> int:
  """The largest divisor of `height` whose chunk stays within CHUNK_ELEMENTS (at least 1).

  And within the pixels of two rows of logits: more were measured to be no faster, and take more
  memory.
  """
  limit = max(1, min(-(-2 * height // logit_rows), CHUNK_ELEMENTS // (batch * width * classes)))
  return max(d for d in range(1, height + 1) if height % d == 0 and d <= limit)


def sum_over_chunks(
  function: Callable[[jax.Array, jax.Array], Any], logits_BxhxwxC: jax.Array, label_BxHxW: jax.Array
) -> Any:
  """Sum over row chunks of `function(logits_BxYxWxC, label_BxYxW)`, a tree of arrays."""
  batch, height, width = label_BxHxW.shape
  _, h, w, classes = logits_BxhxwxC.shape
  rows = rows_per_chunk(batch, height, width, classes, h)
  # The default precision on TPU would round the interpolation weights to bfloat16.
  einsum = lambda *a: jnp.einsum(*a, precision=jax.lax.Precision.HIGHEST)
  row_weights = interpolation_matrix(h, height).reshape(-1, rows, h)
  column_weights = interpolation_matrix(w, width)
  labels = jnp.moveaxis(label_BxHxW.reshape(batch, -1, rows, width), 1, 0)

  # Rows first: nothing between the logits and a chunk is then larger than either, in particular
  # not the gradient that each chunk adds to.
  @jax.checkpoint
  def body(total: Any, chunk: tuple[jax.Array, jax.Array]) -> tuple[Any, None]:
    weights_Yxh, label = chunk
    tall = einsum("Yh,bhwc->bYwc", weights_Yxh, logits_BxhxwxC)
    part = function(einsum("Ww,bYwc->bYWc", column_weights, tall), label)
    return jax.tree.map(jnp.add, total, part), None

  shapes = jax.eval_shape(function, jnp.zeros((batch, rows, width, classes)), labels[0])
  zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
  return jax.lax.scan(body, zeros, (row_weights, labels))[0]


def softplus(x: jax.Array) -> jax.Array:
  """log(1 + exp(x)). jax.nn.softplus, which handles infinities, doubles the time of the loss."""
  return jnp.maximum(x, 0) + jnp.log1p(jnp.exp(-jnp.abs(x)))


def sigmoid_loss(
  logits_BxhxwxC: jax.Array,
  label_BxHxW: jax.Array,
  *,
  ignore_label: int = 255,
  mask_ignored: bool = False,
  skip_empty: bool = False,
) -> dict[str, Term]:
  """Focal and dice loss of the official code, already weighted (100 and 1).

  Focal loss: mean over pixels, summed over all images and classes. Dice loss: summed over the
  classes present in each image. Both are divided by the number of (image, present class) pairs.

  Args:
    logits_BxhxwxC: class logits on the patch grid.
    label_BxHxW: class ids 0..C-1, or `ignore_label`.
    ignore_label: label of pixels without a class.
    mask_ignored: leave these pixels out of the focal mean. False, as in the official code, makes
      them negatives of every class.
    skip_empty: a batch whose pixels are all ignored adds nothing. False, as in the official code,
      divides its focal loss by 1 and not by a number of masks, so it weighs more than others.
  """
  _, height, width = label_BxHxW.shape
  classes = logits_BxhxwxC.shape[-1]

  def sums(logits: jax.Array, label: jax.Array) -> dict[str, jax.Array]:
    y = label[..., None] == jnp.arange(classes)
    valid = (label != ignore_label)[..., None]
    against = jnp.where(y, -logits, logits)
    wrong = jax.nn.sigmoid(against)
    p = jnp.where(y, 1 - wrong, wrong)
    cross_entropy = softplus(against)
    focal = jnp.where(y, FOCAL_ALPHA, 1 - FOCAL_ALPHA) * wrong**FOCAL_GAMMA * cross_entropy
    if mask_ignored:
      focal = focal * valid
    return {
      # As in the official code, ignored pixels count in the dice loss by their probability.
      "focal": focal.sum((1, 2)),
      "overlap": (p * y).sum((1, 2)),
      "probability": p.sum((1, 2)),
      "truth": y.sum((1, 2), dtype=jnp.float32),
      "valid": valid.sum((1, 2), dtype=jnp.float32),
    }

  s = sum_over_chunks(sums, logits_BxhxwxC.astype(jnp.float32), label_BxHxW)
  present = s["truth"] > 0
  dice = 1 - (2 * s["overlap"] + 1) / (s["probability"] + s["truth"] + 1)
  pixels = jnp.maximum(s["valid"], 1) if mask_ignored else height * width
  masks = present.sum().astype(jnp.float32)
  return {
    "loss_mask": Term(FOCAL_WEIGHT * (s["focal"] / pixels).sum(), masks, skip_empty),
    "loss_dice": Term(DICE_WEIGHT * (dice * present).sum(), masks, skip_empty),
  }


def softmax_loss(
  logits_BxhxwxC: jax.Array, label_BxHxW: jax.Array, *, ignore_label: int = 255
) -> dict[str, Term]:
  """Softmax cross-entropy over classes, averaged over pixels that are not ignored."""

  def sums(logits: jax.Array, label: jax.Array) -> tuple[jax.Array, jax.Array]:
    valid = label != ignore_label
    log_p = jax.nn.log_softmax(logits)
    picked = jnp.take_along_axis(log_p, jnp.where(valid, label, 0)[..., None], axis=-1)[..., 0]
    return -(picked * valid).sum(), valid.sum(dtype=jnp.float32)

  total, pixels = sum_over_chunks(sums, logits_BxhxwxC.astype(jnp.float32), label_BxHxW)
  return {"loss_ce": Term(total, pixels)}


def bce_loss(
  logits_BxhxwxC: jax.Array,
  label_BxHxW: jax.Array,
  *,
  ignore_label: int = 255,
  mask_ignored: bool = False,
) -> dict[str, Term]:
  """Mean binary cross-entropy over pixels and classes, the loss of CAT-Seg.

  Args:
    logits_BxhxwxC: class logits.
    label_BxHxW: class ids 0..C-1, or `ignore_label`.
    ignore_label: label of pixels without a class.
    mask_ignored: leave these pixels out. False, as in the official code, makes them negatives of
      every class.
  """
  classes = logits_BxhxwxC.shape[-1]

  def sums(logits: jax.Array, label: jax.Array) -> tuple[jax.Array, jax.Array]:
    against = jnp.where(label[..., None] == jnp.arange(classes), -logits, logits)
    cross_entropy = softplus(against)
    counted = jnp.ones(label.shape, bool) if not mask_ignored else label != ignore_label
    return (cross_entropy * counted[..., None]).sum(), counted.sum(dtype=jnp.float32)

  total, pixels = sum_over_chunks(sums, logits_BxhxwxC.astype(jnp.float32), label_BxHxW)
  return {"loss_bce": Term(total, pixels * classes)}


LOSSES = {"sigmoid": sigmoid_loss, "softmax": softmax_loss, "bce": bce_loss}
# Fields of config.loss that each of them takes.
OPTIONS = {"sigmoid": ("mask_ignored", "skip_empty"), "softmax": (), "bce": ("mask_ignored",)}


def make_loss(config: Any, ignore_label: int) -> Callable[[jax.Array, jax.Array], dict[str, Term]]:
  """The loss of a config section as a function of logits and labels."""
  taken = {name: config[name] for name in OPTIONS[config.name]}
  return functools.partial(LOSSES[config.name], ignore_label=ignore_label, **taken)
