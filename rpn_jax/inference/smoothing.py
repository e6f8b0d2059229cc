"""The scores of a film's frames averaged over time."""

import dataclasses

import jax
import numpy as np

from rpn_jax.inference.refinement import Refined, Scores
from rpn_jax.inference.sliding import WindowLogits
from rpn_jax.inference.views import View


class Smoothing:
  """An exponential moving average of the logits of a film's windows.

  With z_t the logits of frame t as the network gives them and p the weight of the past,

      m_0 = z_0,    m_t = p m_(t-1) + (1 - p) z_t,

  and m_t takes the place of z_t: it is enlarged, becomes scores and is refined as z_t would be. A
  change is seen to 1 - p^n after n frames. Frames must have one size; where it changes, the average
  begins anew.

  Args:
    past: p, 0 <= p < 1; 0 changes nothing.
    mean: m of the frame before the first one, of `mean_of`; None where there is none.

  Raises:
    ValueError: p is out of its range.
  """

  def __init__(self, past: float, mean: list[np.ndarray] | None = None):
    if not 0 <= past < 1:
      raise ValueError(f"expected a weight of the past of at least 0 and below 1, got {past}")
    self.past, self._mean = np.float32(past), mean
    self._views: list[View] | None = None

  def __call__(self, new: WindowLogits) -> WindowLogits:
    mean = [np.asarray(logits, np.float32) for logits in new.logits]
    # By shapes alone 2 x 3 windows would be 3 x 2. Of the frame before the first they are all that
    # is known.
    alike = self._views in (None, new.views)
    if (old := self._mean) and alike and [x.shape for x in old] == [x.shape for x in mean]:
      mean = [self.past * x + (1 - self.past) * y for x, y in zip(old, mean)]
    self._mean, self._views = mean, new.views
    return dataclasses.replace(new, logits=[jax.device_put(x) for x in mean])


def mean_of(scores: Scores) -> list[np.ndarray]:
  """m_t of the frame that has these scores, from which another `Smoothing` goes on."""
  while isinstance(scores, Refined):
    scores = scores.scores
  assert isinstance(scores, WindowLogits)
  return [np.asarray(logits) for logits in scores.logits]
