"""Inference through windows (mmsegmentation's slide mode, by which the official RPN code
evaluates, and the other `layouts`).

The network is compiled once, for a fixed number of windows, which may come from several images;
`views` merges their logits.
"""

import collections
import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from rpn_jax.base.errors import InputError
from rpn_jax.base.words import check_known
from rpn_jax.inference.decision import BEST, Decision
from rpn_jax.inference.layouts import LAYOUTS
from rpn_jax.inference.process import check_process
from rpn_jax.inference.refinement import (
  REFINEMENTS,
  UNREFINED,
  Refined,
  Refinement,
  Scores,
)
from rpn_jax.inference.views import View, all_scores, merge_views
from rpn_jax.models.heads import unchanged

# Windows of layouts with any number of them are padded to at least so many: their logits are small.
MIN_WINDOWS = 8


@dataclasses.dataclass(frozen=True)
class WindowLogits:
  """The logits of an image's windows: small, and sufficient to merge any map of the image.

  Attributes:
    views: views of the image.
    logits: for each view, the logits of its windows.
    penalty_C: subtracted from the scores.
    activation: logits -> scores.
  """

  views: list[View]
  logits: list[jax.Array]
  penalty_C: np.ndarray
  activation: Callable

  @property
  def nbytes(self) -> int:
    return sum(logits.nbytes for logits in self.logits)

  def merge(
    self, output: Callable, size: tuple[int, int], bias_C: np.ndarray | float = 0.0,
    more: tuple = (),
  ) -> Any:  # fmt: skip
    """See `refinement.Scores`.

    Raises:
      InputError: `check_process` refuses the process.
    """
    check_process()
    penalty_C = np.asarray(self.penalty_C - bias_C, np.float32)
    return merge_views(
      self.views, self.logits, penalty_C, size, activation=self.activation, output=output, more=more
    )


class SlidingWindow:
  """Segments images of any size with a network that sees windows.

  Args:
    logits_fn: (windows (W, H, W, 3)) -> logits (W, h, w, C); jitted by the caller.
    classes: C.
    layout: how windows are laid over an image, one of LAYOUTS.
    window_batch: windows per call of the network, which are of one shape.
    penalty: subtracted from the scores of the rows in `penalized` (0.1 from seen classes in
      zero-shot evaluation).
    penalized: rows of the logits.
    activation: logits -> scores, over the class axis. Pass the same function object each time:
      another one means another program.
    class_of_row: class id of every row of the logits, if several rows belong to one class.
    probabilities: scores -> values in [0, 1], for the thresholds of `decision`.
    decision: how a pixel gets its class.
    refinement: of the scores, before that.
    **geometry: attributes of `layouts.Layout`: `crop` and `stride`, and those with defaults.

  Raises:
    ValueError: what the layout refuses, or a penalty that is not finite.
  """

  def __init__(
    self,
    logits_fn: Callable,
    classes: int,
    *,
    layout: str = "windows",
    window_batch: int = 4,
    penalty: float = 0.0,
    penalized: Sequence[int] = (),
    activation: Callable = jax.nn.sigmoid,
    class_of_row: Sequence[int] | np.ndarray | None = None,
    probabilities: Callable = unchanged,
    decision: Decision = BEST,
    refinement: Refinement = UNREFINED,
    **geometry: Any,
  ):
    check_known("layout ", layout, LAYOUTS)
    self.layout = LAYOUTS[layout](**geometry)
    self.logits_fn, self.window_batch = logits_fn, window_batch
    self.penalty_C = np.zeros(classes, np.float32)
    self.penalty_C[list(penalized)] = penalty
    if not np.isfinite(penalty):
      raise ValueError(f"penalty: expected a finite number, got {penalty}")
    self.activation = activation
    self.class_of_row = np.arange(classes) if class_of_row is None else np.asarray(class_of_row)
    check_known("refinement ", refinement.name, REFINEMENTS)
    self.probabilities, self.decision, self.refinement = probabilities, decision, refinement

  def scores(self, image_hxwx3: np.ndarray, size: tuple[int, int] | None = None) -> np.ndarray:
    """Scores (height, width, C) of a normalized image; may take gigabytes."""
    size = size or image_hxwx3.shape[:2]
    return next(self.scored([image_hxwx3])).merge(all_scores, size)

  def __call__(self, image_hxwx3: np.ndarray, size: tuple[int, int] | None = None) -> np.ndarray:
    """Class ids at (height, width) `size`, by default the image's own: int32."""
    return next(self.stream([(image_hxwx3, size or image_hxwx3.shape[:2])]))

  def stream(self, pairs: Iterable[tuple[np.ndarray, tuple[int, int]]]) -> Iterator[np.ndarray]:
    """Class ids of many (image, size), in order; windows of several images share a call."""
    sizes: collections.deque[tuple[int, int]] = collections.deque()

    def images() -> Iterator[np.ndarray]:
      for image, size in pairs:
        sizes.append(size)
        yield image

    for scores in self.scored(images()):
      yield self.decision(scores, sizes.popleft(), self.probabilities, self.class_of_row)

  def scored(
    self,
    images_hxwx3: Iterable[np.ndarray],
    smooth: Callable[[WindowLogits], WindowLogits] | None = None,
  ) -> Iterator[Scores]:
    """The scores of each image, in order; see `window_logits`.

    Args:
      images_hxwx3: normalized.
      smooth: called with the logits of every image in turn, as `smoothing.Smoothing`; what it
        returns is refined, if that is asked for.
    """
    images_hxwx3, inputs = itertools.tee(images_hxwx3)
    # In this order: the logits come first, so that `tee` keeps no more images than are pending.
    for logits, image in zip(self.window_logits(inputs), images_hxwx3):
      scores = smooth(logits) if smooth else logits
      if self.refinement.name == "none":
        yield scores
      else:
        yield Refined(scores, np.asarray(image), self.refinement)

  def window_logits(self, images_hxwx3: Iterable[np.ndarray]) -> Iterator[WindowLogits]:
    """The logits of each image, in order; windows of several images share a call.

    Raises:
      InputError: logits are NaN or infinite.
    """
    # Size and number of windows of the images that still miss the logits of some.
    pending: collections.deque[tuple[tuple[int, int], int]] = collections.deque()

    def windows() -> Iterator[np.ndarray]:
      for image in images_hxwx3:
        new = self.layout.windows(np.asarray(image))
        pending.append((image.shape[:2], len(new)))
        yield from new

    found: list[np.ndarray] = []
    for logits in self.logits(windows()):
      found.append(logits)
      if len(found) == pending[0][1]:
        yield self._joined(pending.popleft()[0], found)
        found = []

  def logits(self, windows: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """The logits (h, w, C) of each window, in order, `window_batch` of one shape in a call.

    Raises:
      InputError: logits are NaN or infinite.
    """
    # One call is always under way, so that the device need not wait for the host.
    running: tuple[jax.Array, int] | None = None
    for batch in self._batches(windows):
      started = self._start(batch)
      yield from self._fetch(running)
      running = started
    yield from self._fetch(running)

  def _batches(self, windows: Iterable[np.ndarray]) -> Iterator[list[np.ndarray]]:
    """Neighbors of one shape, `window_batch` of them at most."""
    batch: list[np.ndarray] = []
    for window in windows:
      if batch and window.shape != batch[0].shape:
        yield batch
        batch = []
      batch.append(window)
      if len(batch) == self.window_batch:
        yield batch
        batch = []
    if batch:
      yield batch

  def _joined(self, size: tuple[int, int], logits: list[np.ndarray]) -> WindowLogits:
    """The logits of an image's windows, stacked for each view."""
    return self.joined(self.layout.views(size, logits[0].shape[:2]), logits)

  def joined(self, views: list[View], logits: list[np.ndarray]) -> WindowLogits:
    """The logits of the windows of some views, one view after another, stacked for each."""
    parts = []
    for view in views:
      count = len(view.corners)
      part, logits = logits[:count], logits[count:]
      padding = 0
      if self.layout.varies:
        padding = max(MIN_WINDOWS, 1 << (count - 1).bit_length()) - count
      # Stacked by NumPy: JAX would compile and keep a program for every number of windows.
      parts.append(jax.device_put(np.stack([*part, *part[:1] * padding])))
    return WindowLogits(views, parts, self.penalty_C, self.activation)

  def _start(self, windows: list[np.ndarray]) -> tuple[jax.Array, int]:
    """Logits of up to `window_batch` windows, which are padded to that number, and how many."""
    padding = [windows[0]] * (self.window_batch - len(windows))
    return self.logits_fn(np.stack([*windows, *padding])), len(windows)

  def _fetch(self, running: tuple[jax.Array, int] | None) -> list[np.ndarray]:
    """Waits for logits (h, w, C) of `_start`, one for each window."""
    if running is None:
      return []
    logits = np.asarray(running[0])[: running[1]]
    if not np.isfinite(logits).all():
      count = logits.size - np.isfinite(logits).sum()
      raise InputError(
        f"expected finite scores of the network, {count:,} of {logits.size:,} are NaN or infinite: "
        "use config.dtype=float32, or get the weights and the prompts again"
      )
    return list(logits)
