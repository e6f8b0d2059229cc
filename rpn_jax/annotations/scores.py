"""Score maps as files: an array, and a picture of a heat map for each class."""

import pathlib
from collections.abc import Sequence

import numpy as np

from rpn_jax.base.paths import replacing
from rpn_jax.drawing.heat import score_grid
from rpn_jax.drawing.images import save_png


def save(
  directory: pathlib.Path,
  stem: str,
  image_HxWx3: np.ndarray,
  scores_hxwxC: np.ndarray,
  names: Sequence[str],
  source: str | None = None,
) -> list[pathlib.Path]:
  """Writes `<stem>_scores.npz` and `<stem>_scores.png`, and makes the folder.

  The archive holds `scores` (h, w, C) float16, `names` (C,) and `size`, (H, W) of the image. Half
  precision is off by at most 0.00025 for scores in [0, 1].

  Args:
    directory: of the files.
    stem: beginning of their names.
    image_HxWx3: uint8.
    scores_hxwxC: in [0, 1].
    names: C class names.
    source: see `save_png`.

  Returns:
    Both paths.
  """
  grid = score_grid(image_HxWx3, scores_hxwxC, names)
  picture = save_png(directory / f"{stem}_scores.png", grid, source)
  path = directory / f"{stem}_scores.npz"
  with replacing(path) as temporary, open(temporary, "wb") as file:
    np.savez_compressed(
      file,
      scores=scores_hxwxC.astype(np.float16),
      names=np.array(names),
      size=np.array(image_HxWx3.shape[:2]),
    )
  return [path, picture]
