"""Scores refined with the colors of the image, after any network."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from rpn_jax.inference.layouts import resize_image
from rpn_jax.inference.process import check_process
from rpn_jax.inference.views import KEPT_PROGRAMS, all_scores, round_up, write_tiles
from rpn_jax.models.pamr import CHUNK, pamr

# Scalars of the scores in a strip that `output` gets: 32 MB in float32, a few times.
STRIP_ELEMENTS = 2**23


@dataclasses.dataclass(frozen=True)
class Refinement:
  """How scores are refined; the defaults are those of the evaluations that use PAMR.

  Attributes:
    name: one of REFINEMENTS; "none" leaves the scores as they are.
    steps: of PAMR.
    dilations: distances of PAMR's neighbors, pixels.
  """

  name: str = "none"
  steps: int = 10
  dilations: tuple[int, ...] = (8, 16)


# Value of config.eval.refine.
REFINEMENTS = ("none", "pamr")
UNREFINED = Refinement()


class Scores(Protocol):
  """What an image's scores are read from: the logits of its windows, refined or not.

  Attributes:
    nbytes: what is held in memory.
  """

  @property
  def nbytes(self) -> int: ...

  def merge(
    self, output: Callable, size: tuple[int, int], bias_C: Any = 0.0, more: tuple = ()
  ) -> Any:
    """`output` of the scores (height, width, C) at `size`, with `bias_C` added to them.

    Args:
      output: (scores of a part, *more) -> arrays (rows, columns, …), of that part.
      size: (height, width).
      bias_C: added to the scores.
      more: arrays for `output`.
    """
    ...


class Refined:
  """The scores of an image after a refinement at the size that is asked for.

  The scores of the last size are kept, (height, width, C) in float32.

  Args:
    scores: of the image.
    image_hxwx3: normalized.
    refinement: see `Refinement`.
  """

  def __init__(self, scores: Scores, image_hxwx3: np.ndarray, refinement: Refinement):
    self.scores, self.image, self.refinement = scores, image_hxwx3, refinement
    # Not an lru_cache of a method, a cycle that would keep the scores of earlier images alive.
    self._kept: tuple[tuple[int, int], np.ndarray] | None = None

  @property
  def nbytes(self) -> int:
    """See `Scores`."""
    return self.scores.nbytes + (self._kept[1].nbytes if self._kept else 0)

  def _at(self, size: tuple[int, int]) -> np.ndarray:
    """Scores (*size, C)."""
    if self._kept is None or self._kept[0] != size:
      self._kept = None  # freed before there are others
      scores = self.scores.merge(all_scores, size)
      self._kept = size, refine(scores, resize_image(self.image, *size), self.refinement)
    return self._kept[1]

  def merge(
    self, output: Callable, size: tuple[int, int], bias_C: Any = 0.0, more: tuple = ()
  ) -> Any:
    """See `Scores`."""
    check_process()
    scores_HxWxC = self._at(size)
    height, width, classes = scores_HxWxC.shape
    # Strips of a rounded size, so that images of many sizes share programs.
    columns = round_up(width)
    rows = max(1, min(round_up(height), STRIP_ELEMENTS // (columns * classes)))
    program = strip_program((rows, columns, classes), output)
    bias_C = np.broadcast_to(np.float32(bias_C), classes)

    def strip(corner: tuple[int, int]) -> Any:
      part = scores_HxWxC[corner[0] : corner[0] + rows]
      padding = ((0, rows - len(part)), (0, columns - width), (0, 0))
      return program(np.pad(part, padding), bias_C, *more)

    corners = [(y, 0) for y in range(0, height, rows)]
    return write_tiles(map(strip, corners), corners, size)


@functools.lru_cache(KEPT_PROGRAMS)
def strip_program(shape: tuple[int, ...], output: Callable) -> Callable:
  """The jitted (scores of a strip, bias_C, *more) -> `output`; kept as `tile_program` is."""
  del shape
  return jax.jit(lambda scores, bias_C, *more: output(scores + bias_C, *more))


@functools.lru_cache(KEPT_PROGRAMS)
def _pamr_program(shape: tuple[int, ...], steps: int, dilations: tuple[int, ...]) -> Callable:
  """The jitted (image, scores, size) -> scores, for a padded shape (H, W, C)."""
  del shape
  return jax.jit(functools.partial(pamr, steps=steps, dilations=dilations))


def refine(scores_HxWxC: np.ndarray, image_HxWx3: np.ndarray, refinement: Refinement) -> np.ndarray:
  """Refined scores, which replace the given ones in their memory.

  A few classes at a time: in PAMR none depends on the others.

  Args:
    scores_HxWxC: float32.
    image_HxWx3: normalized, of the same size.
    refinement: other than "none".
  """
  height, width, classes = scores_HxWxC.shape
  rows, columns = round_up(height), round_up(width)
  chunk = min(classes, CHUNK)
  program = _pamr_program((rows, columns, chunk), refinement.steps, refinement.dilations)

  def padded(x: np.ndarray, channels: int) -> jax.Array:
    whole = np.zeros((rows, columns, channels), np.float32)
    whole[:height, :width, : x.shape[-1]] = x
    return jnp.asarray(whole)

  image, size = padded(image_HxWx3, 3), np.array([height, width], np.int32)
  for first in range(0, classes, chunk):
    part = scores_HxWxC[..., first : first + chunk]
    refined = program(image, padded(part, chunk), size)
    part[...] = np.asarray(refined)[:height, :width, : part.shape[-1]]
  return scores_HxWxC
