"""The legend below an image: which classes appear, with their colors and shares."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from rpn_jax.drawing.fonts import font_for, load_font, wrap
from rpn_jax.drawing.palette import HATCH, INK, QUIET

if TYPE_CHECKING:
  from PIL import Image

# A longer legend is not read; the remaining classes share one entry.
MAX_ENTRIES = 80
UNSEEN_NOTE = "* unseen: the network was not trained on this class"


class Entry(NamedTuple):
  """A line of a legend.

  Attributes:
    color: (3,) uint8; None is the hatch of ignored pixels, and () is no swatch.
    text: a name, cut short where there is no room.
    suffix: what follows the name and is never cut.
  """

  color: np.ndarray | tuple | None
  text: str
  suffix: str = ""


def share_text(fraction: float) -> str:
  """A share of the pixels in percent; one that is there is never 0.0."""
  return f"{100 * fraction:.1f} %" if fraction >= 0.0005 or not fraction else "<0.1 %"


def legend_entries(
  labels: Sequence[np.ndarray],
  names: Sequence[str],
  colors_Cx3: np.ndarray,
  *,
  unseen: Sequence[int] = (),
  share: bool = False,
  rest: str | None = None,
  areas: tuple[np.ndarray, int] | None = None,
) -> list[Entry]:
  """Entries of the classes that appear, largest first, then of the pixels of no class.

  Args:
    labels: (H, W) class ids each.
    names: C class names.
    colors_Cx3: uint8.
    unseen: ids of classes to mark with a `*`.
    share: with each one's percentage of all pixels.
    rest: name for the pixels of no class where they are left as they are; None if hatched.
    areas: pixels of each class (C,), and those of no class; None: those of the labels.
  """
  counts, ignored = _areas(labels, len(names)) if areas is None else areas
  total = max(1, int(counts.sum()) + ignored)

  def suffix(count: int) -> str:
    return f": {share_text(count / total)}" if share else ""

  order = [int(i) for i in np.argsort(-counts, kind="stable") if counts[i]]
  listed, others = order[:MAX_ENTRIES], order[MAX_ENTRIES:]
  marks = {int(i): " *" for i in unseen}
  entries = [Entry(colors_Cx3[i], names[i], marks.get(i, "") + suffix(counts[i])) for i in listed]
  if others:
    entries.append(Entry((), f"and {len(others)} with fewer pixels", suffix(counts[others].sum())))
  if ignored:
    color, text = (None, "ignored") if rest is None else ((), rest)
    entries.append(Entry(color, text, suffix(ignored)))
  return entries


def _areas(labels: Sequence[np.ndarray], classes: int) -> tuple[np.ndarray, int]:
  """Pixels of each class (C,), and those of no class."""
  counts = np.zeros(classes, np.int64)
  ignored = 0
  for label in labels:
    valid = (label >= 0) & (label < classes)
    counts += np.bincount(label[valid], minlength=classes)
    ignored += int(label.size - valid.sum())
  return counts, ignored


def draw_legend(entries: Sequence[Entry], width: int, size: int) -> Image.Image:
  """An image `width` pixels wide: a swatch and a text per entry, in columns read downwards.

  If an entry has the mark of an unseen class, a last line explains it.

  Args:
    entries: from `legend_entries`.
    width: pixels.
    size: letter height in pixels.
  """
  from PIL import Image, ImageDraw

  path, printable = font_for([entry.text + entry.suffix for entry in entries])
  if any(p != e.text + e.suffix for p, e in zip(printable, entries, strict=True)):
    suffixes = font_for([entry.suffix for entry in entries])[1]
    entries = [
      Entry(e.color, p.removesuffix(suffix), suffix)
      for e, p, suffix in zip(entries, printable, suffixes)
    ]
  font, gap = load_font(size, path=path), size // 2
  swatch, line = round(1.1 * size), round(1.35 * size)
  spare = swatch + gap + 2 * gap  # of a column, beside its text
  widest = max((font.getlength(entry.text + entry.suffix) for entry in entries), default=0)
  # One long name must not force all others into a single column: it is wrapped instead.
  text_width = min(np.ceil(widest), max(width / 4, 16 * size) - spare, width - spare)
  columns = max(1, min(int(width // (text_width + spare)), len(entries)))
  text_width = width // columns - spare
  texts = [wrap(entry.text, font, text_width, 3, entry.suffix) for entry in entries]
  per_column = -(-len(entries) // columns)
  pitch = [
    max(len(lines) for lines in texts[row::per_column]) * line + gap for row in range(per_column)
  ]
  tops = np.concatenate([[0], np.cumsum(pitch)]).astype(int)
  marked = any(" *" in entry.suffix for entry in entries)
  notes = wrap(UNSEEN_NOTE, font, width, 3) if marked else []
  image = Image.new("RGB", (width, int(tops[-1]) + len(notes) * line), "white")
  draw = ImageDraw.Draw(image)
  for i, (entry, lines) in enumerate(zip(entries, texts, strict=True)):
    x, y = i // per_column * (width // columns), int(tops[i % per_column])
    box = (x, y + (line - swatch) // 2)
    if entry.color is None:
      # Not from `colorize`: a swatch is too small for stripes in proportion to an image.
      hatch = np.array(HATCH, np.uint8)[np.add.outer(np.arange(swatch), np.arange(swatch)) // 4 % 2]
      image.paste(Image.fromarray(hatch), box)
    elif len(entry.color):
      corner = (box[0] + swatch - 1, box[1] + swatch - 1)
      draw.rectangle((*box, *corner), fill=tuple(map(int, entry.color)), outline=QUIET)
    for k, text in enumerate(lines):
      draw.text((x + swatch + gap, y + k * line + line // 2), text, INK, font, anchor="lm")
  for k, text in enumerate(notes):
    draw.text((0, int(tops[-1]) + k * line + line // 2), text, QUIET, font, anchor="lm")
  return image
