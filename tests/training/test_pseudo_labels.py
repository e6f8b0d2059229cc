"""Pseudo-labels: where they go, and from when on."""

import jax.numpy as jnp
import numpy as np

from rpn_jax.training import pseudo_labels

IGNORE, UNLABELLED = 255, 254
# Classes 0 and 1 are seen, 2 and 3 unseen. Class 0 scores highest everywhere: it must not be
# chosen. Class 2 wins on the left patch, 3 on the right one.
LOGITS = np.float32([[[[9, 0, 3, 1], [9, 0, 1, 3]]]])
LABEL = np.int32([[[0, UNLABELLED, IGNORE, UNLABELLED], [1, IGNORE, UNLABELLED, 0]]])


def relabel(step, start=5):
  return np.asarray(
    pseudo_labels.relabel(
      jnp.asarray(LOGITS), jnp.asarray(LABEL), step,
      unseen=(2, 3), unlabelled=UNLABELLED, ignore=IGNORE, start=start,
    )
  )  # fmt: skip


def test_before_the_start_unlabelled_pixels_are_ignored():
  np.testing.assert_array_equal(relabel(4), [[[0, IGNORE, IGNORE, IGNORE], [1, IGNORE, IGNORE, 0]]])


def test_marked_pixels_take_the_best_unseen_class():
  np.testing.assert_array_equal(relabel(5), [[[0, 2, IGNORE, 3], [1, IGNORE, 3, 0]]])
