"""Text in figures: fonts, wrapping, the legend."""

import functools
import os
from collections.abc import Sequence

import numpy as np
from absl import logging

from rpn_jax.drawing.palette import HATCH

# A legend longer than this stops being read; what is left is summed up in one entry.
LEGEND_ENTRIES = 80
UNSEEN_NOTE = "* unseen: the network was not trained on this class"
INK, QUIET = (28, 28, 28), (96, 96, 96)


# Text and legends, in pixels


@functools.cache
def get_font(size: int, bold: bool = False, path: str = ""):
  """DejaVu Sans, which matplotlib brings along: the same letters on every machine."""
  from PIL import ImageFont

  return ImageFont.truetype(path or _dejavu(bold), size)


def _dejavu(bold: bool = False) -> str:
  import matplotlib

  name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
  return os.path.join(matplotlib.get_data_path(), "fonts", "ttf", name)


@functools.cache
def _letters(path: str) -> frozenset[str]:
  """The letters that a font can draw."""
  from matplotlib.ft2font import FT2Font

  try:
    return frozenset(map(chr, FT2Font(path).get_charmap()))
  except (RuntimeError, OSError, ValueError):  # a font file of some other kind
    return frozenset()


@functools.cache
def _font_with(wanted: frozenset[str]) -> str:
  """Path of an installed font with most of these letters: of DejaVu Sans if it has them all."""
  from matplotlib import font_manager

  def rank(path):
    regular = "Bold" not in path and "Regular" in path
    return len(wanted - _letters(path)), path != _dejavu(), not regular, path

  if wanted <= _letters(_dejavu()):
    return _dejavu()
  # A font without plain letters draws symbols only; one that cannot be scaled draws bitmaps.
  installed = [
    path
    for path in sorted(font_manager.findSystemFonts())
    if {"a", "0", "…"} <= _letters(path) and "Mono" not in path and "Color" not in path
  ]
  return min([_dejavu(), *installed], key=rank)


def drawable(texts: Sequence[str]) -> tuple[str, list[str]]:
  """Path of a font for these texts, and the texts, with codes for letters that no font has."""
  wanted = frozenset("".join(texts)) - frozenset(map(chr, range(127)))
  if not wanted:
    return _dejavu(), list(texts)
  path = _font_with(wanted)
  lacking = {ord(c): f"<U+{ord(c):04X}>" for c in wanted - _letters(path) if not c.isspace()}
  if lacking:
    _warn_of_letters("".join(sorted(map(chr, lacking)))[:20])
  return path, [text.translate(lacking) for text in texts]


@functools.cache
def _warn_of_letters(letters: str) -> None:
  logging.warning(
    "no installed font has the letters %s: pictures show their codes; install a font that has "
    "them, such as Debian's fonts-noto-cjk for Chinese, Japanese and Korean",
    letters,
  )


def wrap(text: str, font, width: float, lines: int, end: str = "") -> list[str]:
  """`text` and `end` in at most `lines` lines of `width` pixels; only `text` is ever cut short."""
  wrapped, rest = [], " ".join(text.split()) + end
  while rest:
    if font.getlength(rest) <= width:
      return [*wrapped, rest]
    last = len(wrapped) + 1 == lines
    tail = f"…{end}" if last else ""
    cut = len(rest)
    while cut > 1 and font.getlength(rest[:cut].rstrip() + tail) > width:
      cut -= 1
    if last:
      return [*wrapped, rest[:cut].rstrip() + tail]
    space = rest.rfind(" ", 0, cut + 1)
    cut = space if space > 0 else cut
    wrapped.append(rest[:cut].rstrip())
    rest = rest[cut:].lstrip()
  return wrapped or [""]


def draw_legend(entries: Sequence[tuple], width: int, size: int, note: str = ""):
  """A picture `width` pixels wide with a swatch and a text per entry, in columns read downwards.

  Args:
    entries: (swatch (3,) uint8 or None for the hatch or () for none, text, end of the text).
    width: pixels.
    size: letter height in pixels.
    note: a line below.
  """
  from PIL import Image, ImageDraw

  path, drawn = drawable([text + end for _, text, end in entries])
  if any(d != t + e for d, (_, t, e) in zip(drawn, entries, strict=True)):
    ends = drawable([end for *_, end in entries])[1]
    entries = [
      (color, d.removesuffix(end), end) for (color, *_), d, end in zip(entries, drawn, ends)
    ]
  font, gap = get_font(size, path=path), size // 2
  swatch, line = round(1.1 * size), round(1.35 * size)
  spare = swatch + gap + 2 * gap  # of a column, beside its text
  widest = max((font.getlength(text + end) for _, text, end in entries), default=0)
  # One long name must not force all others into a single column: it is wrapped instead.
  text_width = min(np.ceil(widest), max(width / 4, 16 * size) - spare, width - spare)
  columns = max(1, min(int(width // (text_width + spare)), len(entries)))
  text_width = width // columns - spare
  texts = [wrap(text, font, text_width, 3, end) for _, text, end in entries]
  per_column = -(-len(entries) // columns)
  pitch = [
    max(len(lines) for lines in texts[row::per_column]) * line + gap for row in range(per_column)
  ]
  tops = np.concatenate([[0], np.cumsum(pitch)]).astype(int)
  notes = wrap(note, font, width, lines=3) if note else []
  picture = Image.new("RGB", (width, int(tops[-1]) + len(notes) * line), "white")
  draw = ImageDraw.Draw(picture)
  for i, ((color, *_), lines) in enumerate(zip(entries, texts, strict=True)):
    x, y = i // per_column * (width // columns), int(tops[i % per_column])
    box = (x, y + (line - swatch) // 2)
    if color is None:
      # Not from `colorize`: a swatch is too small for stripes in proportion.
      hatch = np.uint8(HATCH)[np.add.outer(np.arange(swatch), np.arange(swatch)) // 4 % 2]
      picture.paste(Image.fromarray(hatch), box)
    elif len(color):
      corner = (box[0] + swatch - 1, box[1] + swatch - 1)
      draw.rectangle((*box, *corner), fill=tuple(map(int, color)), outline=QUIET)
    for k, text in enumerate(lines):
      draw.text((x + swatch + gap, y + k * line + line // 2), text, INK, font, anchor="lm")
  for k, text in enumerate(notes):
    draw.text((0, int(tops[-1]) + k * line + line // 2), text, QUIET, font, anchor="lm")
  return picture


def _areas(labels: Sequence[np.ndarray], classes: int) -> tuple[np.ndarray, int]:
  """Pixels of each class (C,), and those of no class."""
  counts = np.zeros(classes, np.int64)
  ignored = 0
  for label in labels:
    valid = (label >= 0) & (label < classes)
    counts += np.bincount(label[valid], minlength=classes)
    ignored += int(label.size - valid.sum())
  return counts, ignored


def legend_entries(
  labels: Sequence[np.ndarray],
  names: Sequence[str],
  colors: np.ndarray,
  unseen: Sequence[int] = (),
  share: bool = False,
  rest: str | None = None,
) -> list[tuple]:
  """Legend entries of the classes that appear, largest first, then what is ignored.

  With `rest`, a name for pixels of no class, these are not hatched but left as they are.
  """
  counts, ignored = _areas(labels, len(names))
  total = max(1, int(counts.sum()) + ignored)

  def end(count: int) -> str:
    if not share:
      return ""
    percent = 100 * count / total
    return f": {percent:.1f} %" if percent >= 0.05 else ": <0.1 %"

  order = [int(i) for i in np.argsort(-counts, kind="stable") if counts[i]]
  shown, others = order[:LEGEND_ENTRIES], order[LEGEND_ENTRIES:]
  marks = {int(i): " *" for i in unseen}
  entries = [(colors[i], names[i], marks.get(i, "") + end(counts[i])) for i in shown]
  if others:
    entries.append(((), f"and {len(others)} with fewer pixels", end(counts[others].sum())))
  if ignored:
    entries.append((None, "ignored", end(ignored)) if rest is None else ((), rest, end(ignored)))
  return entries
