"""Self-training on unseen classes (transductive setting)."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from rpn_jax.training.losses import interpolation_matrix


def pseudo_labels(
  logits_BxhxwxC: jax.Array,
  label_BxHxW: jax.Array,
  unseen: Sequence[int] | np.ndarray,
  *,
  unlabelled: int = -1,
) -> jax.Array:
  """Labels with the unlabelled pixels filled by the model's best unseen class.

  The arg-max over unseen classes of the detached sigmoid scores of the same forward pass, without
  a confidence threshold; other pixels, ignored ones included, stay as they are.

  Args:
    logits_BxhxwxC: logits of all classes on the patch grid.
    label_BxHxW: class ids; `unlabelled` marks the pixels to fill.
    unseen: ids of the unseen classes.
    unlabelled: that mark.
  """
  unseen_U = jnp.asarray(unseen)
  _, height, width = label_BxHxW.shape
  _, h, w, _ = logits_BxhxwxC.shape
  # A sigmoid is monotonic: the arg-max of logits is the arg-max of scores.
  scores = jax.lax.stop_gradient(logits_BxhxwxC[..., unseen_U]).astype(jnp.float32)

  def best(scores_hxwxU: jax.Array) -> jax.Array:
    rows, columns = interpolation_matrix(h, height), interpolation_matrix(w, width)
    highest = jax.lax.Precision.HIGHEST
    return jnp.einsum("Hh,hwu,Ww->HWu", rows, scores_hxwxU, columns, precision=highest).argmax(-1)

  # Image by image: upsampled scores of a whole batch would be the largest array of the step.
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
  """The labels of one training step of the transductive setting.

  Until `start` the unlabelled pixels are ignored; from then on they carry pseudo-labels.

  Args:
    logits_BxhxwxC: of the step's own forward pass.
    label_BxHxW: class ids, `unlabelled` on pixels of unseen classes, `ignore` on others.
    step: steps done.
    unseen: ids of the unseen classes.
    unlabelled: mark of the pixels to fill.
    ignore: mark of the pixels that the truth leaves out.
    start: first step with pseudo-labels.
    pixels: "unseen" fills the marked pixels, which the truth gave to some unseen class (the
      dagger rows of the literature); "unlabelled" fills the left-out ones as well, so that the
      truth does not tell where unseen classes are.
  """
  waiting = jnp.where(label_BxHxW == unlabelled, ignore, label_BxHxW)
  if pixels == "unlabelled":
    label_BxHxW = jnp.where(label_BxHxW == ignore, unlabelled, label_BxHxW)
  filled = pseudo_labels(logits_BxhxwxC, label_BxHxW, unseen, unlabelled=unlabelled)
  return jnp.where(step < start, waiting, filled)
