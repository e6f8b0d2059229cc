"""Pseudo-labels for self-training on unseen classes (transductive setting)."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from rpn_jax.models.resizing import interpolation_matrix


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
  _, height, width = label_BxHxW.shape
  _, h, w, _ = logits_BxhxwxC.shape
  # The sigmoid is monotonic: logits and scores have the same argmax.
  scores = jax.lax.stop_gradient(logits_BxhxwxC[..., unseen_U]).astype(jnp.float32)

  def best(scores_hxwxU: jax.Array) -> jax.Array:
    rows, columns = interpolation_matrix(h, height), interpolation_matrix(w, width)
    highest = jax.lax.Precision.HIGHEST
    return jnp.einsum("Hh,hwu,Ww->HWu", rows, scores_hxwxU, columns, precision=highest).argmax(-1)

  # One image at a time: the upsampled scores of a batch would be the largest array of the step.
  best_BxHxW = jax.lax.map(best, scores)
  return jnp.where(label_BxHxW == unlabelled, unseen_U[best_BxHxW], label_BxHxW)


def relabel(
  logits_BxhxwxC: jax.Array,
  label_BxHxW: jax.Array,
  step: jax.Array | np.int32,
  *,
  unseen: Sequence[int] | np.ndarray,
  unlabelled: int,
  ignore: int,
  start: int,
  pixels: str,
) -> jax.Array:
  """The labels of one training step in the transductive setting.

  Before step `start` the unlabeled pixels are ignored, from then on they get pseudo-labels.

  Args:
    logits_BxhxwxC: logits of the step's own forward pass.
    label_BxHxW: class ids, `unlabelled` for pixels of unseen classes, `ignore` for pixels without
      ground truth.
    step: steps done.
    unseen: ids of the unseen classes.
    unlabelled: label of pixels of unseen classes.
    ignore: label of pixels without ground truth.
    start: first step with pseudo-labels.
    pixels: "unseen" fills the pixels that the ground truth assigns to some unseen class (the
      dagger rows of the literature); "unlabelled" also fills those without ground truth, so that
      the positions of unseen classes are not revealed.
  """
  masked = jnp.where(label_BxHxW == unlabelled, ignore, label_BxHxW)
  if pixels == "unlabelled":
    label_BxHxW = jnp.where(label_BxHxW == ignore, unlabelled, label_BxHxW)
  filled = pseudo_labels(logits_BxhxwxC, label_BxHxW, unseen, unlabelled=unlabelled)
  return jnp.where(step < start, masked, filled)
