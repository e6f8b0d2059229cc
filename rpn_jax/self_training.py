"""Self-training on unseen classes (transductive setting)."""

import jax
import jax.numpy as jnp

from rpn_jax.losses import interpolation_matrix


def pseudo_labels(logits_BxhxwxC, label_BxHxW, unseen, *, unlabelled: int = -1) -> jax.Array:
  """Labels with the unlabelled pixels filled by the model's best unseen class.

  The arg-max over unseen classes of the detached sigmoid scores of the same forward pass, without
  a confidence threshold; other pixels, ignored ones included, stay as they are.

  Args:
    logits_BxhxwxC: logits of all classes on the patch grid.
    label_BxHxW: class ids; `unlabelled` marks the pixels to fill.
    unseen: ids of the unseen classes.
    unlabelled: that mark.
  """
  unseen = jnp.asarray(unseen)
  _, height, width = label_BxHxW.shape
  _, h, w, _ = logits_BxhxwxC.shape
  # A sigmoid is monotonic: the arg-max of logits is the arg-max of scores.
  scores = jax.lax.stop_gradient(logits_BxhxwxC[..., unseen]).astype(jnp.float32)
  best = jnp.einsum(
    "Hh,bhwc,Ww->bHWc",
    interpolation_matrix(h, height),
    scores,
    interpolation_matrix(w, width),
    precision=jax.lax.Precision.HIGHEST,
  ).argmax(-1)
  return jnp.where(label_BxHxW == unlabelled, unseen[best], label_BxHxW)
