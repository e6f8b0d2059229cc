"""From scores to the class of every pixel, with thresholds for a background."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from rpn_jax.inference.refinement import Scores
from rpn_jax.inference.views import class_ids


@dataclasses.dataclass(frozen=True)
class Decision:
  """How a pixel gets its class: that of the name with the highest score, but for two thresholds.

  With several names for a class, its probability is the largest of theirs, not their sum. Both
  thresholds are those of the segmentors of SCLIP and of those that followed it (prob_thd,
  area_thd), and speak of class 0, the background.

  Attributes:
    probability: pixels whose largest probability is lower get class 0; 0 is off.
    area: other classes than 0 that cover at most this share of what all of them cover get no pixel;
      0 is off.

  Raises:
    ValueError: a threshold that is no share, 0 to 1.
  """

  probability: float = 0.0
  area: float = 0.0

  def __post_init__(self) -> None:
    for name, value in (("probability", self.probability), ("area", self.area)):
      if not 0 <= value <= 1:
        raise ValueError(f"{name}: expected a threshold of 0 to 1, got {value}")

  def __call__(
    self,
    scores: Scores,
    size: tuple[int, int],
    probabilities: Callable,
    class_of_row: np.ndarray,
  ) -> np.ndarray:
    """Class ids (height, width) int32.

    Args:
      scores: of the image.
      size: (height, width).
      probabilities: scores (..., R) -> values in [0, 1], a module-level function.
      class_of_row: (R,) class id of every row.
    """
    if not self.probability and not self.area:
      return class_of_row[scores.merge(class_ids, size)].astype(np.int32)
    row, probability = scores.merge(best_row(probabilities), size)
    label = class_of_row[row].astype(np.int32)
    if self.area:
      areas = np.bincount(label.ravel(), minlength=class_of_row.max() + 1)
      small = areas <= self.area * areas[1:].sum()
      small[0] = False
      if small[label].any():  # their pixels get the best of the other classes
        kept_R = ~small[class_of_row]
        row, probability = scores.merge(best_kept_row(probabilities), size, more=(kept_R,))
        label = class_of_row[row].astype(np.int32)
    if self.probability:  # penalized scores may be below 0, which is no threshold then
      label = np.where(probability < self.probability, 0, label).astype(np.int32)
    return label


# Without thresholds.
BEST = Decision()


# Cached, since an output is a static argument: equal networks share one function and one program.
@functools.cache
def best_row(probabilities: Callable) -> Callable:
  """Scores -> index of the best row and its probability."""
  return lambda scores: (scores.argmax(-1), probabilities(scores).max(-1))


@functools.cache
def best_kept_row(probabilities: Callable) -> Callable:
  """(scores, kept_R) -> the same, among the rows that are kept."""

  def best(scores: jax.Array, kept_R: jax.Array) -> tuple[jax.Array, jax.Array]:
    kept = jnp.where(kept_R, probabilities(scores), -jnp.inf)
    return kept.argmax(-1), kept.max(-1)

  return best
