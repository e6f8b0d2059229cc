"""Fonts that have the letters of a text, and texts broken into lines of a width."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from absl import logging

if TYPE_CHECKING:
  from PIL import ImageFont


@functools.cache
def load_font(size: int, bold: bool = False, path: str = "") -> ImageFont.FreeTypeFont:
  """A font, `size` pixels high; DejaVu Sans, which matplotlib ships, unless given a path."""
  from PIL import ImageFont

  return ImageFont.truetype(path or _dejavu(bold), size)


def _dejavu(bold: bool = False) -> str:
  name = os.path.join("fonts", "ttf", "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf")
  # Found without importing matplotlib, which would take as long as to draw some images.
  if (package := importlib.util.find_spec("matplotlib")) and package.origin:
    path = os.path.join(os.path.dirname(package.origin), "mpl-data", name)
    if os.path.exists(path):
      return path
  import matplotlib  # of a distribution that keeps its data elsewhere

  return os.path.join(matplotlib.get_data_path(), name)


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
  """Path of the installed font that has most of these letters; DejaVu Sans if it has them all."""
  from matplotlib import font_manager

  def rank(path: str) -> tuple:
    regular = "Bold" not in path and "Regular" in path
    return len(wanted - _letters(path)), path != _dejavu(), not regular, path

  if wanted <= _letters(_dejavu()):
    return _dejavu()
  # A font without plain letters holds only symbols; one that cannot be scaled holds bitmaps.
  installed = [
    path
    for path in sorted(font_manager.findSystemFonts())
    if {"a", "0", "…"} <= _letters(path) and "Mono" not in path and "Color" not in path
  ]
  return min([_dejavu(), *installed], key=rank)


def font_for(texts: Sequence[str]) -> tuple[str, list[str]]:
  """Path of a font for these texts, and the texts, with codes for letters that no font has."""
  wanted = frozenset("".join(texts)) - frozenset(map(chr, range(127)))
  if not wanted:
    return _dejavu(), list(texts)
  path = _font_with(wanted)
  missing = {ord(c): f"<U+{ord(c):04X}>" for c in wanted - _letters(path) if not c.isspace()}
  if missing:
    _warn_of_letters("".join(sorted(map(chr, missing)))[:20])
  return path, [text.translate(missing) for text in texts]


@functools.cache
def _warn_of_letters(letters: str) -> None:
  logging.warning(
    "no installed font has the letters %s: images show their codes; install a font that has "
    "them, such as Debian's fonts-noto-cjk for Chinese, Japanese and Korean",
    letters,
  )


def wrap(
  text: str, font: ImageFont.FreeTypeFont, width: float, max_lines: int, suffix: str = ""
) -> list[str]:
  """`text` and `suffix` in lines of `width` pixels; where they are too few, `text` is cut short."""
  wrapped: list[str] = []
  rest = " ".join(text.split()) + suffix
  while rest:
    if font.getlength(rest) <= width:
      return [*wrapped, rest]
    last = len(wrapped) + 1 == max_lines
    tail = f"…{suffix}" if last else ""
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
