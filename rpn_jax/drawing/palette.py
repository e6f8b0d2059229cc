"""Colors: of classes, in two palettes, of text, and of the hatch over ignored pixels."""

import functools
import zlib
from collections.abc import Sequence

import numpy as np

# The easiest to tell apart; small label sets use no others.
FIRST_COLORS = (
  (222, 45, 60),  # red
  (52, 118, 235),  # blue
  (46, 174, 82),  # green
  (255, 196, 26),  # amber
  (160, 72, 205),  # violet
  (38, 205, 220),  # cyan
  (246, 122, 40),  # orange
  (240, 112, 190),  # pink
  (140, 86, 44),  # brown
  (182, 230, 62),  # lime
  (30, 62, 140),  # navy
  (0, 122, 112),  # teal
)
# Okabe and Ito (2008), "Color universal design", without black.
SAFE_COLORS = (
  (230, 159, 0),  # orange
  (86, 180, 233),  # sky blue
  (0, 158, 115),  # bluish green
  (240, 228, 66),  # yellow
  (0, 114, 178),  # blue
  (213, 94, 0),  # vermillion
  (204, 121, 167),  # reddish purple
)
PALETTES = {"default": FIRST_COLORS, "colorblind": SAFE_COLORS}
# Full protanopia and deuteranopia on linear RGB (Machado, Oliveira and Fernandes, 2009).
BLINDNESS = (
  ((0.1523, 1.0526, -0.2049), (0.1145, 0.7863, 0.0992), (-0.0039, -0.0481, 1.0520)),
  ((0.3673, 0.8606, -0.2280), (0.2801, 0.6725, 0.0474), (-0.0118, 0.0429, 0.9689)),
)  # fmt: skip
FULL_VISION = ((1, 0, 0), (0, 1, 0), (0, 0, 1))
HATCH = ((38, 38, 38), (96, 96, 96))
INK, QUIET = (28, 28, 28), (96, 96, 96)  # text, and lesser text


def class_colors(names: Sequence[str], palette: str = "default") -> np.ndarray:
  """A color per class, (C, 3) uint8, chosen by the class's name.

  A name has the same color in every list, unless an earlier name of the list has taken it: then it
  gets the next free one. Few classes use only the first colors of the palette, which are the
  easiest to tell apart. Equal names have equal colors.

  Args:
    names: C class names.
    palette: "default", or "colorblind", which stays distinct without red and green.

  Raises:
    ValueError: another palette.
  """
  if palette not in PALETTES:
    raise ValueError(f"expected a palette of {', '.join(PALETTES)}, got {palette!r}")
  slots: dict[str, int] = {}
  taken: set[int] = set()
  for name in dict.fromkeys(names):
    start, size = 0, len(PALETTES[palette])
    while taken.issuperset(range(start, start + size)):
      start, size = start + size, max(24, (start + size) // 3)
    wish = zlib.crc32(name.encode()) % size
    slot = next(slot for k in range(size) if (slot := start + (wish + k) % size) not in taken)
    taken.add(slot)
    slots[name] = slot
  colors = _distinct_colors(palette, max(taken, default=-1) + 1)
  return colors[[slots[name] for name in names]].reshape(-1, 3).copy()


@functools.cache
def _distinct_colors(palette: str, count: int) -> np.ndarray:
  """The first `count` colors (count, 3) uint8; a longer list begins with a shorter one.

  Each is the farthest in CIELAB from all before it; in the palette for color-blind readers by the
  smallest of the distances that full vision, protanopia and deuteranopia leave.

  Computed, not stored: a table would need these lines, too, to be made and checked. They take
  0.03 s for 60 classes and 1 s for 847, once per process, and nothing for the first colors.
  """
  first = PALETTES[palette]
  if count <= len(first):
    return np.array(first[:count], np.uint8).reshape(count, 3)
  views = (FULL_VISION, *BLINDNESS) if palette == "colorblind" else (FULL_VISION,)
  levels = np.linspace(0, 255, 18)
  lattice = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), -1).reshape(-1, 3).round()
  lab = _lab(lattice)
  # Grays, near-blacks and near-whites would be taken for the hatch or for the page; neon colors
  # tire the eye on large areas.
  chroma = np.hypot(lab[:, 1], lab[:, 2])
  usable = (lab[:, 0] > 28) & (lab[:, 0] < 92) & (chroma > 14) & (chroma < 78)
  lattice = lattice[usable]
  seen = [_lab(lattice, view) for view in views]

  def distances(color: np.ndarray | tuple) -> np.ndarray:
    return np.min([((s - _lab(color, view)) ** 2).sum(1) for s, view in zip(seen, views)], axis=0)

  nearest = np.min([distances(c) for c in (*first, *HATCH, (255, 255, 255))], axis=0)
  colors = list(first)
  while len(colors) < count:
    best = int(nearest.argmax())
    if nearest[best] == 0:  # thousands of classes: the lattice is used up, so start over
      return np.resize(np.array(colors, np.uint8), (count, 3))
    colors.append(lattice[best])
    nearest = np.minimum(nearest, distances(lattice[best]))
  return np.array(colors, np.uint8)


def _lab(rgb: np.ndarray | tuple, view: tuple = FULL_VISION) -> np.ndarray:
  """CIELAB (D65) of sRGB values (..., 3) in 0..255, seen through a matrix on linear RGB."""
  linear = np.clip(_linear(rgb) @ np.asarray(view).T, 0, 1)
  to_xyz = np.array(
    [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]], np.float64
  )
  xyz = linear @ (to_xyz / to_xyz.sum(1, keepdims=True)).T
  f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
  x, y, z = np.moveaxis(f, -1, 0)
  return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], -1)


def _linear(rgb: np.ndarray | tuple) -> np.ndarray:
  c = np.asarray(rgb, np.float64) / 255
  return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
