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
  count, left_out = len(order) + 1, len(names) - len(order)
  columns = min(count, 3 if count <= 9 else 4 if count <= 16 else 6)
  rows = -(-count // columns)
  width, height = fitted_size(image_HxWx3.shape[:2], {4: 320, 6: 250}.get(columns, 380))
  column = max(width, 160)

  suffixes = [f": {peaks[i]:.2f}" for i in order]
  path, texts = font_for([names[i] + suffix for i, suffix in zip(order, suffixes)])
  font, line = load_font(_LETTERS, path=path), round(1.35 * _LETTERS)
  titles = [
    wrap(text.removesuffix(suffix), font, column, 2, suffix)
    for text, suffix in zip(texts, suffixes)
  ]
  head = max(map(len, titles)) * line + 4
  pitch = column + _GAP, head + height + _GAP
  bar_left, bar_top = _MARGIN + columns * pitch[0] + _GAP, _MARGIN + head
  bar_height = max(height, 120)
  bottom = max(_MARGIN + rows * pitch[1], bar_top + bar_height + _GAP) + (line if left_out else 0)
  page = Image.new("RGB", (bar_left + _BAR + 4 * _LETTERS, bottom + _MARGIN - _GAP), "white")
  draw = ImageDraw.Draw(page)

  table = _colors()
  resized = Image.fromarray(image_HxWx3).resize((width, height), Image.Resampling.BOX)
  panels = [(["image"], resized)]
  for i, title in zip(order, titles):
    heat = table[np.round(255 * scores_hxwxC[..., i]).astype(np.uint8)]
    panels.append((title, Image.fromarray(heat).resize(resized.size, Image.Resampling.BILINEAR)))
  for k, (title, panel) in enumerate(panels):
    x, y = _MARGIN + k % columns * pitch[0], _MARGIN + k // columns * pitch[1]
    page.paste(panel, (x, y + head))
    for n, text in enumerate(title):
      draw.text((x, y + n * line), text, INK, font)
  if left_out:
    text = f"and {left_out} more, whose highest scores are lower"
    draw.text((_MARGIN, page.height - _MARGIN), text, QUIET, font, anchor="lb")

  bar = Image.fromarray(np.repeat(table[::-1, None], _BAR, 1)).resize((_BAR, bar_height))
  page.paste(bar, (bar_left, bar_top))
  for value in (0, 0.5, 1):
    y = round(bar_top + (1 - value) * (bar_height - 1))
    draw.text((bar_left + _BAR + 6, y), f"{value:g}", INK, load_font(_LETTERS), anchor="lm")
  draw.text((bar_left, bar_top - _LETTERS // 2), "score", INK, load_font(_LETTERS), anchor="lb")
  return page


def _colors() -> np.ndarray:
  """The color map (256, 3) uint8."""
  import matplotlib

  return (matplotlib.colormaps[COLORMAP](np.arange(256))[:, :3] * 255 + 0.5).astype(np.uint8)
