"""Pseudo-labels: where they go, from when on, and that a run of the setting uses them."""

import jax.numpy as jnp
import numpy as np
import pytest

from rpn_jax.training import pseudo_labels

IGNORE, UNLABELLED = 255, 254
# Classes 0 and 1 are seen, 2 and 3 unseen. Class 0 scores highest everywhere: it must not be
# chosen. Class 2 wins on the left patch, 3 on the right one.
LOGITS = np.float32([[[[9, 0, 3, 1], [9, 0, 1, 3]]]])
LABEL = np.int32([[[0, UNLABELLED, IGNORE, UNLABELLED], [1, IGNORE, UNLABELLED, 0]]])


def relabel(step, pixels, start=5):
  return np.asarray(
    pseudo_labels.relabel(
      jnp.asarray(LOGITS), jnp.asarray(LABEL), step,
      unseen=(2, 3), unlabelled=UNLABELLED, ignore=IGNORE, start=start, pixels=pixels,
    )
  )  # fmt: skip


@pytest.mark.parametrize("pixels", ["unseen", "unlabelled"])
def test_before_the_start_unseen_pixels_are_ignored(pixels):
  np.testing.assert_array_equal(
    relabel(4, pixels), [[[0, IGNORE, IGNORE, IGNORE], [1, IGNORE, IGNORE, 0]]]
  )


def test_marked_pixels_take_the_best_unseen_class():
  np.testing.assert_array_equal(relabel(5, "unseen"), [[[0, 2, IGNORE, 3], [1, IGNORE, 3, 0]]])


def test_the_plain_form_fills_ignored_pixels_too():
  np.testing.assert_array_equal(relabel(5, "unlabelled"), [[[0, 2, 3, 3], [1, 2, 3, 0]]])
