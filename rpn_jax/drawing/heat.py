"""Score maps in color: a grid with a panel for each class and a color bar."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from rpn_jax.drawing.fonts import font_for, load_font, wrap
from rpn_jax.drawing.images import fitted_size
from rpn_jax.drawing.palette import INK, QUIET

if TYPE_CHECKING:
  from PIL import Image

# Of a grid that one can still read; those with the highest scores are drawn.
MAX_CLASSES = 29
COLORMAP = "viridis"
_LETTERS, _GAP, _MARGIN, _BAR = 16, 14, 22, 18  # pixels


def score_grid(
  image_HxWx3: np.ndarray, scores_hxwxC: np.ndarray, names: Sequence[str]
) -> Image.Image:
  """The image and the scores of each class, from 0 (dark) to 1 (bright) in all panels.

  Panels are ordered by the highest score of their class, which stands behind its name. Of more than
  MAX_CLASSES classes the first ones are drawn, and the last line counts the others.

  Args:
    image_HxWx3: uint8 RGB.
    scores_hxwxC: in [0, 1], of any resolution.
    names: C class names.
  """
  from PIL import Image, ImageDraw

  peaks = scores_hxwxC.reshape(-1, len(names)).max(0)
  order = np.argsort(-peaks, kind="stable")[:MAX_CLASSES]
  count = len(order) + 1
  columns = min(count, 3 if count <= 9 else 4 if count <= 16 else 6)
  width, height = fitted_size(image_HxWx3.shape[:2], {3: 380, 4: 320, 6: 250}.get(columns, 420))
  path, texts = font_for([f"{names[i]}: {peaks[i]:.2f}" for i in order])
  font, line = load_font(_LETTERS, path=path), round(1.35 * _LETTERS)
  column = max(width, 160)
  titles = [["image"]]
  for i, text in zip(order, texts):
    suffix = f": {peaks[i]:.2f}"
    titles.append(wrap(text.removesuffix(suffix), font, column, 2, suffix))
  head = max(len(lines) for lines in titles) * line + 4
  left_out = len(names) - len(order)
  rows = -(-count // columns)
  pitch = (column + _GAP, head + height + _GAP)
  bar_left = 2 * _MARGIN + columns * pitch[0] - _GAP
  page_size = (
    bar_left + _BAR + 4 * _LETTERS,
    2 * _MARGIN + rows * pitch[1] + (line if left_out else 0),
  )
  page = Image.new("RGB", page_size, "white")
  draw = ImageDraw.Draw(page)
  table = _colors()
  photo = Image.fromarray(image_HxWx3).resize((width, height), Image.Resampling.BOX)
  for k, lines in enumerate(titles):
    x = _MARGIN + k % columns * pitch[0]
    y = _MARGIN + k // columns * pitch[1]
    for n, text in enumerate(lines):
      draw.text((x, y + n * line), text, INK, font)
    if k:
      heat = table[np.round(255 * scores_hxwxC[..., order[k - 1]]).astype(np.uint8)]
      panel = Image.fromarray(heat).resize((width, height), Image.Resampling.BILINEAR)
    else:
      panel = photo
    page.paste(panel, (x, y + head))
  if left_out:
    text = f"and {left_out} more, whose highest scores are lower"
    draw.text((_MARGIN, page.height - _MARGIN), text, QUIET, font, anchor="lb")
  top, bottom = _MARGIN + head, _MARGIN + head + max(height, 120)
  bar = Image.fromarray(np.repeat(table[::-1, None], _BAR, 1)).resize((_BAR, bottom - top))
  page.paste(bar, (bar_left, top))
  for value in (0, 0.5, 1):
    y = round(bottom - 1 - value * (bottom - 1 - top))
    draw.text((bar_left + _BAR + 6, y), f"{value:g}", INK, load_font(_LETTERS), anchor="lm")
  draw.text((bar_left, top - 8), "score", INK, load_font(_LETTERS), anchor="lb")
  return page


def _colors() -> np.ndarray:
  """The color map (256, 3) uint8."""
  import matplotlib

  return (matplotlib.colormaps[COLORMAP](np.arange(256))[:, :3] * 255 + 0.5).astype(np.uint8)
