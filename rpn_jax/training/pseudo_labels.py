"""Pseudo-labels of unseen classes, in the transductive setting."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rpn_jax.models.resizing import interpolation_matrix


def upsampled(
  read: Callable[[jax.Array], jax.Array], logits_BxhxwxC: jax.Array, size: Sequence[int]
) -> jax.Array:
  """What `read` makes of the logits (H, W, C) of every image, resized bilinearly: (B, H, W).

  No gradient passes.
  """
  rows, columns = (interpolation_matrix(*n) for n in zip(logits_BxhxwxC.shape[1:3], size))
  highest = jax.lax.Precision.HIGHEST

  def one(logits_hxwxC: jax.Array) -> jax.Array:
    wide = jnp.einsum("Hh,hwc,Ww->HWc", rows, logits_hxwxC, columns, precision=highest)
    return read(wide)

  # One image at a time: the upsampled logits of a batch would be the largest array of the step.
  return jax.lax.map(one, jax.lax.stop_gradient(logits_BxhxwxC).astype(jnp.float32))


def pseudo_labels(
  logits_BxhxwxC: jax.Array,
  label_BxHxW: jax.Array,
  unseen: Sequence[int] | np.ndarray,
  *,
  unlabelled: int = -1,
) -> jax.Array:
  """Labels whose unlabeled pixels are set to the model's best unseen class.

  That is the argmax over unseen classes of the detached sigmoid scores of the same forward pass,
  without a confidence threshold. Other pixels, including ignored ones, are unchanged.

  Args:
    logits_BxhxwxC: logits of all classes on the patch grid.
    label_BxHxW: class ids, or `unlabelled` for the pixels to fill.
    unseen: ids of the unseen classes.
    unlabelled: label of the pixels to fill.
  """
  unseen_U = jnp.asarray(unseen)
  # The sigmoid is monotonic: logits and scores have the same argmax.
  logits_BxhxwxU = logits_BxhxwxC[..., unseen_U]
  best_BxHxW = upsampled(lambda x: x.argmax(-1), logits_BxhxwxU, label_BxHxW.shape[1:])
  return jnp.where(label_BxHxW == unlabelled, unseen_U[best_BxHxW], label_BxHxW)


def make_relabel(config: Any, data: Any) -> Callable | None:
  """Self-training as a function of logits, labels and step; None in the other settings."""
  if config.data.setting != "transductive":
    return None
  return functools.partial(
    relabel,
    unseen=data.unseen,
    unlabelled=data.unlabelled,
    ignore=data.ignore,
    start=round(config.self_training.start * config.steps),
  )


def relabel(
  logits_BxhxwxC: jax.Array,
  label_BxHxW: jax.Array,
  step: jax.Array | np.int32,
  *,
  unseen: Sequence[int] | np.ndarray,
  unlabelled: int,
  ignore: int,
  start: int,
) -> jax.Array:
  """The labels of one training step in the transductive setting.

  Before step `start` the unlabeled pixels are ignored, from then on they get pseudo-labels.

  Args:
    logits_BxhxwxC: logits of the step's own forward pass.
    label_BxHxW: class ids; `unlabelled` for pixels to fill, which are those of unseen classes and,
      by config.self_training.pixels, those without ground truth; `ignore` for others, as padding.
    step: steps done.
    unseen: ids of the unseen classes.
    unlabelled: label of the pixels to fill.
    ignore: label of ignored pixels.
    start: first step with pseudo-labels.
  """
  masked = jnp.where(label_BxHxW == unlabelled, ignore, label_BxHxW)
  filled = pseudo_labels(logits_BxhxwxC, label_BxHxW, unseen, unlabelled=unlabelled)
  return jnp.where(step < start, masked, filled)
