"""Pictures: coloured label maps, grids of predictions, and curves of a run.

Pictures of pixels are drawn with Pillow, where text is measured before it is placed, and plots
with matplotlib's Agg canvas without pyplot, so that nothing global is touched and no display is
needed. Both are imported when first used. Every file appears whole or not at all.

A label map holds class ids 0..C-1; any other value (255 by convention) is ignored and is drawn as
a dark hatch.
"""

import functools
import os
import pathlib
import textwrap
import zlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from absl import logging

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

# A legend longer than this stops being read; what is left is summed up in one entry.
LEGEND_ENTRIES = 80
OVERLAY_LONG_SIDE = 2000
UNSEEN_NOTE = "* unseen: the network was not trained on this class"
INK, QUIET = (28, 28, 28), (96, 96, 96)

# Fractions in [0, 1], plotted in percent.
METRICS = {
  "pAcc": "pAcc",
  "miou": "mIoU",
  "miou_gt": "mIoU, classes in truth",
  "miou_union": "mIoU, truth or prediction",
  "miou_seen": "mIoU seen",
  "miou_unseen": "mIoU unseen",
  "hiou": "hIoU",
  "top1": "top-1 accuracy",
  "accuracy": "accuracy",
}
LINE_COLORS = (
  "#0b62b8",
  "#d1495b",
  "#2a9d5c",
  "#e08e0b",
  "#7b4ab5",
  "#17a2b0",
  "#8a5a33",
  "#444444",
)
LINE_STYLES = ("-", "--", ":", "-.")
# Up to here a confusion matrix is drawn; beyond, its names could not be read.
CONFUSION_CLASSES = 40
CONFUSED_PAIRS = 30
# From here on a loss is smoothed; below, every point is a marker.
SMOOTH_FROM = 30


# Colours


def _linear(rgb: np.ndarray) -> np.ndarray:
  c = np.asarray(rgb, np.float64) / 255
  return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)


def _lab(rgb: np.ndarray, seen_through=FULL_VISION) -> np.ndarray:
  """CIELAB (D65) of sRGB values (..., 3) in 0..255, as a row of BLINDNESS lets one see them."""
  linear = np.clip(_linear(rgb) @ np.asarray(seen_through).T, 0, 1)
  to_xyz = np.array(
    [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]], np.float64
  )
  xyz = linear @ (to_xyz / to_xyz.sum(1, keepdims=True)).T
  f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
  x, y, z = np.moveaxis(f, -1, 0)
  return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], -1)


@functools.cache
def _palette(name: str, count: int) -> np.ndarray:
  """The first `count` colours (count, 3) uint8; a longer palette begins with a shorter one.

  Each is the farthest in CIELAB from all before it, in the colour-blind palette by the smallest
  of the distances that full colour vision, protanopia and deuteranopia leave.
  """
  first = PALETTES[name]
  views = (FULL_VISION, *BLINDNESS) if name == "colorblind" else (FULL_VISION,)
  levels = np.linspace(0, 255, 18)
  lattice = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), -1).reshape(-1, 3).round()
  lab = _lab(lattice)
  # Greys, near-blacks and near-whites would be taken for the hatch or for the page; neon colours
  # tire the eye on large areas.
  chroma = np.hypot(lab[:, 1], lab[:, 2])
  usable = (lab[:, 0] > 28) & (lab[:, 0] < 92) & (chroma > 14) & (chroma < 78)
  lattice = lattice[usable]
  seen = [_lab(lattice, view) for view in views]

  def distances(color):
    return np.min(
      [((s - _lab(color, view)) ** 2).sum(1) for s, view in zip(seen, views)], axis=0
    )

  nearest = np.min([distances(c) for c in (*first, *HATCH, (255, 255, 255))], axis=0)
  colors = list(first[:count])
  while len(colors) < count:
    best = int(nearest.argmax())
    if nearest[best] == 0:  # thousands of classes: the lattice is used up, so begin again
      return np.resize(np.array(colors, np.uint8), (count, 3))
    colors.append(lattice[best])
    nearest = np.minimum(nearest, distances(lattice[best]))
  return np.array(colors, np.uint8).reshape(count, 3)


def class_colors(names: Sequence[str], palette: str = "default") -> np.ndarray:
  """A colour per class, (C, 3) uint8, that belongs to its name.

  A name picks its colour by itself, in whatever list it stands, unless an earlier name of the list
  has taken it: then it takes the next free one. While there are few classes only the first colours
  of the palette are used, which are the easiest to tell apart. A name given twice has one colour.

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
  colors = _palette(palette, max(taken, default=-1) + 1)
  return colors[[slots[name] for name in names]].reshape(-1, 3).copy()


def colorize(label_HxW: np.ndarray, colors_Cx3: np.ndarray) -> np.ndarray:
  """Label map in colours, (H, W, 3) uint8; ids outside 0..C-1 become a dark hatch.

  Args:
    label_HxW: integers.
    colors_Cx3: uint8, from `class_colors`.

  Raises:
    ValueError: the label is not a 2-D array of integers.
  """
  label = _checked_label(label_HxW)
  height, width = label.shape
  classes = len(colors_Cx3)
  # Stripes in proportion to the picture: visible at 96 pixels and at 4000.
  stripe = max(2, max(label.shape, default=0) // 64)
  diagonal = (np.arange(height)[:, None] + np.arange(width)[None]) // stripe % 2
  ignored = (label < 0) | (label >= classes)
  table = np.concatenate([np.asarray(colors_Cx3, np.uint8).reshape(-1, 3), np.uint8(HATCH)])
  return table[np.where(ignored, classes + diagonal, label)]


def overlay(
  image_HxWx3: np.ndarray, label_HxW: np.ndarray, colors_Cx3: np.ndarray, alpha: float = 0.55
) -> np.ndarray:
  """`(1 - alpha) * image + alpha * colour`, (H, W, 3) uint8.

  Args:
    image_HxWx3: uint8 RGB.
    label_HxW: integers of the same height and width.
    colors_Cx3: uint8.
    alpha: weight of the colours, 0 to 1.

  Raises:
    ValueError: a wrong shape, dtype or alpha.
  """
  image, label = _checked_image(image_HxWx3), _checked_label(label_HxW)
  if image.shape[:2] != label.shape:
    raise ValueError(f"expected image and label of one size, got {image.shape} and {label.shape}")
  if not 0 <= alpha <= 1:
    raise ValueError(f"expected alpha in [0, 1], got {alpha}")
  mixed = (1 - alpha) * image.astype(np.float32) + alpha * colorize(label, colors_Cx3)
  return (mixed + 0.5).astype(np.uint8)


def _checked_image(image) -> np.ndarray:
  image = np.asarray(image)
  if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
    raise ValueError(f"expected an image (H, W, 3) uint8, got {image.shape} {image.dtype}")
  return image


def _checked_label(label) -> np.ndarray:
  label = np.asarray(label)
  if label.ndim != 2 or not np.issubdtype(label.dtype, np.integer):
    raise ValueError(f"expected a label (H, W) of integers, got {label.shape} {label.dtype}")
  # Wider than any label type, so that adding to ids cannot wrap around.
  return label.astype(np.int64) if label.dtype.itemsize > 4 else label.astype(np.int32)


# Files


def write(path, save: Callable) -> pathlib.Path:
  """Calls `save(open file)` on a file beside `path`, then renames it to `path`."""
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
  try:
    with open(temporary, "wb") as file:
      save(file)
    os.replace(temporary, path)
  finally:
    temporary.unlink(missing_ok=True)
  return path


def _write_png(path, picture) -> pathlib.Path:
  # Level 6 takes seconds on a 12-megapixel label for a few per cent.
  return write(path, lambda file: picture.save(file, format="PNG", compress_level=4))


# Text and legends, in pixels


@functools.cache
def _font(size: int, bold: bool = False, path: str = ""):
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


def _drawable(texts: Sequence[str]) -> tuple[str, list[str]]:
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


def _wrap(text: str, font, width: float, lines: int, end: str = "") -> list[str]:
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


def _legend(entries: Sequence[tuple], width: int, size: int, note: str = ""):
  """A picture `width` pixels wide with a swatch and a text per entry, in columns read downwards.

  Args:
    entries: (swatch (3,) uint8 or None for the hatch or () for none, text, end of the text).
    width: pixels.
    size: letter height in pixels.
    note: a line below.
  """
  from PIL import Image, ImageDraw

  path, drawn = _drawable([text + end for _, text, end in entries])
  if any(d != t + e for d, (_, t, e) in zip(drawn, entries, strict=True)):
    ends = _drawable([end for *_, end in entries])[1]
    entries = [
      (color, d.removesuffix(end), end) for (color, *_), d, end in zip(entries, drawn, ends)
    ]
  font, gap = _font(size, path=path), size // 2
  swatch, line = round(1.1 * size), round(1.35 * size)
  spare = swatch + gap + 2 * gap  # of a column, beside its text
  widest = max((font.getlength(text + end) for _, text, end in entries), default=0)
  # One long name must not force all others into a single column: it is wrapped instead.
  text_width = min(np.ceil(widest), max(width / 4, 16 * size) - spare, width - spare)
  columns = max(1, min(int(width // (text_width + spare)), len(entries)))
  text_width = width // columns - spare
  texts = [_wrap(text, font, text_width, 3, end) for _, text, end in entries]
  per_column = -(-len(entries) // columns)
  pitch = [
    max(len(lines) for lines in texts[row::per_column]) * line + gap for row in range(per_column)
  ]
  tops = np.concatenate([[0], np.cumsum(pitch)]).astype(int)
  notes = _wrap(note, font, width, lines=3) if note else []
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


def _entries(
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


def _fit(shape: tuple[int, int], long_side: int) -> tuple[int, int]:
  """(width, height) in pixels at which an (H, W) picture fills a square of `long_side`."""
  scale = long_side / max(shape)
  # Whole factors keep every pixel of a small picture the same size.
  scale = int(scale) if scale >= 2 else scale
  return max(1, round(shape[1] * scale)), max(1, round(shape[0] * scale))


def _resized(array: np.ndarray, size: tuple[int, int], smooth: bool = False) -> np.ndarray:
  """Array resized to (width, height): nearest neighbour, or averaged where it shrinks."""
  from PIL import Image

  if (array.shape[1], array.shape[0]) == size:
    return array
  if smooth and array.shape[1] > size[0]:
    return np.asarray(Image.fromarray(array).resize(size, Image.Resampling.BOX))
  rows = ((np.arange(size[1]) + 0.5) * array.shape[0] / size[1]).astype(int)
  columns = ((np.arange(size[0]) + 0.5) * array.shape[1] / size[0]).astype(int)
  return array[rows[:, None], columns]


# Pictures


def prediction_grid(
  path,
  images: Sequence[np.ndarray],
  labels: Sequence[np.ndarray],
  predictions: Sequence[np.ndarray],
  names: Sequence[str],
  *,
  title: str | None = None,
  unseen: Sequence[int] = (),
  palette: str = "default",
) -> pathlib.Path:
  """Writes a PNG: one row per example, columns image, truth, prediction, and a legend below.

  Small scenes are enlarged by whole factors, large ones reduced. The legend names the classes that
  appear in truth or prediction, by area; unseen ones carry a `*`.

  Args:
    path: of the PNG.
    images: (h, w, 3) uint8 each, resized to the size of its label where they differ.
    labels: (H, W) integers each, ids outside 0..C-1 ignored.
    predictions: the same shapes as `labels`.
    names: C class names.
    title: a line above.
    unseen: ids of classes not trained on.
    palette: of `class_colors`.

  Returns:
    The path.

  Raises:
    ValueError: no example, lists of different lengths, or a wrong shape or dtype.
  """
  from PIL import Image, ImageDraw

  if not len(images) or not len(images) == len(labels) == len(predictions):
    raise ValueError(
      "expected as many images as labels and predictions, and at least one, got "
      f"{len(images)}, {len(labels)} and {len(predictions)}"
    )
  images = [_checked_image(x) for x in images]
  labels, predictions = [[_checked_label(x) for x in maps] for maps in (labels, predictions)]
  for i, (label, prediction) in enumerate(zip(labels, predictions)):
    if label.shape != prediction.shape:
      raise ValueError(
        f"example {i}: expected a prediction of the label's shape {label.shape}, "
        f"got {prediction.shape}"
      )
  colors = class_colors(names, palette)
  count = len(images)
  long_side = 480 if count <= 2 else 384 if count <= 4 else 288
  size, gap, margin = 17, 14, 22
  sizes = [_fit(label.shape, long_side) for label in labels]
  column = max(max(w for w, _ in sizes), 200)
  width = 3 * column + 2 * gap

  entries = _entries([*labels, *predictions], names, colors, unseen)
  note = UNSEEN_NOTE if any(" *" in end for *_, end in entries) else ""
  legend = _legend(entries, width, size, note)
  title_font, head_font = _font(22, bold=True), _font(18, bold=True)
  title_lines = _wrap(title, title_font, width, lines=3) if title else []

  top = margin + 30 * len(title_lines) + (gap if title_lines else 0) + 30
  height = top + sum(h + gap for _, h in sizes) + gap + legend.height + margin
  page = Image.new("RGB", (width + 2 * margin, height), "white")
  draw = ImageDraw.Draw(page)
  for k, text in enumerate(title_lines):
    draw.text((page.width // 2, margin + 30 * k + 15), text, INK, title_font, anchor="mm")
  for k, text in enumerate(("image", "truth", "prediction")):
    x = margin + k * (column + gap) + column // 2
    draw.text((x, top - 18), text, INK, head_font, anchor="mm")
  y = top
  for image, label, prediction, (w, h) in zip(images, labels, predictions, sizes):
    # Colours before enlarging, so that the hatch grows with the pixels; reducing goes first.
    panels = [_resized(image, (w, h), smooth=True)]
    for ids in (label, prediction):
      if w < ids.shape[1]:
        panels.append(colorize(_resized(ids, (w, h)), colors))
      else:
        panels.append(_resized(colorize(ids, colors), (w, h)))
    for k, panel in enumerate(panels):
      x = margin + k * (column + gap) + (column - w) // 2
      page.paste(Image.fromarray(np.ascontiguousarray(panel)), (x, y))
    y += h + gap
  page.paste(legend, (margin, y + gap))
  return _write_png(path, page)


def annotated(
  image_HxWx3: np.ndarray,
  label_HxW: np.ndarray,
  names: Sequence[str],
  *,
  alpha: float = 0.55,
  palette: str = "default",
  rest: str = "other",
):
  """An image under the colours of its classes, with a legend of each one's share of the pixels.

  The picture has at most 2000 pixels on the long side, and tiny images are enlarged.

  Args:
    image_HxWx3: uint8 RGB.
    label_HxW: class ids of the same height and width; pixels of other values stay as they are.
    names: C class names.
    alpha: weight of the colours, 0 to 1.
    palette: of `class_colors`.
    rest: what the legend calls the pixels of no class.

  Returns:
    A PIL image.
  """
  from PIL import Image

  image, label = _checked_image(image_HxWx3), _checked_label(label_HxW)
  colors = class_colors(names, palette)
  long_side = max(label.shape)
  size = label.shape[::-1]
  if long_side > OVERLAY_LONG_SIDE:
    size = _fit(label.shape, OVERLAY_LONG_SIDE)
  elif long_side < 512:
    size = _fit(label.shape, 512)
  # The letters grow with the picture, since a large one is looked at from farther away.
  letters = int(np.clip(max(size) // 56, 16, 32))
  margin = letters
  legend_width = max(size[0], 24 * letters)
  entries = _entries([label], names, colors, share=True, rest=rest)
  legend = _legend(entries, legend_width, letters)
  picture, shown = _resized(image, size, smooth=True), _resized(label, size)
  inside = (shown >= 0) & (shown < len(names))
  picture = np.where(inside[..., None], overlay(picture, shown, colors, alpha), picture)
  page = Image.new(
    "RGB", (legend_width + 2 * margin, size[1] + legend.height + 3 * margin), "white"
  )
  page.paste(Image.fromarray(picture), (margin + (legend_width - size[0]) // 2, margin))
  page.paste(legend, (margin, size[1] + 2 * margin))
  return page


def no_class(classes: int) -> int:
  """The value of pixels of no class in a saved label map."""
  return 255 if classes <= 255 else 65535


def index_picture(label_HxW: np.ndarray, names: Sequence[str], palette: str = "default"):
  """A PIL image whose pixel values are class ids, and `no_class` where there is none.

  In a palette PNG (mode P, so that it is an index and can be looked at) up to 255 classes, in
  16-bit grey (mode I;16) beyond.

  Raises:
    ValueError: a wrong shape or dtype, or an id that the file cannot hold.
  """
  from PIL import Image

  label, limit = _checked_label(label_HxW), no_class(len(names))
  if label.size and (label.min() < 0 or label.max() > limit):
    raise ValueError(
      f"expected class ids 0..{limit} for {len(names)} classes, got {label.min()}..{label.max()}"
    )
  if limit > 255:
    return Image.fromarray(label.astype(np.uint16))
  index = Image.fromarray(label.astype(np.uint8))
  table = np.tile(np.uint8(HATCH[0]), (256, 1))
  table[: len(names)] = class_colors(names, palette)
  index.putpalette(table.tobytes())
  return index


def save_prediction(
  directory,
  stem: str,
  image_HxWx3: np.ndarray,
  label_HxW: np.ndarray,
  names: Sequence[str],
  **options,
) -> list[pathlib.Path]:
  """Writes one segmented image as `<stem>_overlay.png` and `<stem>_labels.png`.

  Args:
    directory: made if it is missing.
    stem: beginning of both file names.
    image_HxWx3: uint8 RGB.
    label_HxW: class ids of the same height and width, and `no_class`.
    names: C class names.
    **options: of `annotated`.

  Returns:
    Both paths: of a picture of `annotated` and of an `index_picture`.

  Raises:
    ValueError: a wrong shape or dtype, or an id that the file cannot hold.
  """
  image, label = _checked_image(image_HxWx3), _checked_label(label_HxW)
  if image.shape[:2] != label.shape or not label.size:
    raise ValueError(f"expected image and label of one size, got {image.shape} and {label.shape}")
  index = index_picture(label, names, options.get("palette", "default"))
  directory = pathlib.Path(directory)
  return [
    _write_png(directory / f"{stem}_overlay.png", annotated(image, label, names, **options)),
    _write_png(directory / f"{stem}_labels.png", index),
  ]


# Plots


def _panel(name: str) -> str:
  """Which plot a metric belongs to."""
  group, _, leaf = name.rpartition("/")
  if leaf in METRICS:
    return "metric"
  if leaf in ("lr", "learning_rate"):
    return "lr"
  if leaf == "grad_norm":
    return "gradient"
  # The terms of a loss carry the name of what they measure: focal, dice, cross_entropy.
  return "loss" if "loss" in leaf or group == "train" else "other"


def _display(name: str, names: Sequence[str]) -> str:
  """A name without its group, where the leaf alone says which is meant."""
  leaf = name.rpartition("/")[2]
  alone = sum(other.rpartition("/")[2] == leaf for other in names) == 1
  return METRICS.get(leaf, leaf.replace("_", " ")) if alone else name


def _moving_mean(values: np.ndarray) -> np.ndarray:
  """Centred moving mean over 1/25 of the series.

  At the beginning, where losses fall steeply, the window shrinks to both sides; at the end, where
  they are flat and the last value is what one looks for, only on the side that has no values.
  """
  half = max(2, len(values) // 50)
  sums = np.concatenate([[0.0], np.cumsum(values)])
  index = np.arange(len(values))
  before = np.minimum(half, index)
  after = np.minimum(before, len(values) - 1 - index)
  return (sums[index + after + 1] - sums[index - before]) / (before + after + 1)


def _figure(panels: int):
  """An Agg figure with one axes per panel, in up to two columns."""
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  columns = min(2, panels)
  rows = -(-panels // columns)
  figure = Figure(figsize=(7.5 * columns, 4.0 * rows), dpi=110, layout="constrained")
  FigureCanvasAgg(figure)
  figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12, wspace=0.04, hspace=0.06)
  axes = figure.subplots(rows, columns, squeeze=False).ravel()
  for extra in axes[panels:]:
    extra.remove()
  for ax in axes[:panels]:
    ax.grid(True, color="0.9", linewidth=0.8)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_xlabel("training step")
  return figure, axes[:panels]


def step_ticks(ax) -> None:
  from matplotlib.ticker import EngFormatter, MaxNLocator

  ax.xaxis.set_major_locator(
    MaxNLocator(nbins=7, integer=True, min_n_ticks=1, steps=[1, 2, 2.5, 5, 10])
  )
  ax.xaxis.set_major_formatter(EngFormatter(sep=""))


def legend_beside(ax) -> None:
  """A legend to the right of the axes: inside, it would hide some curve or other."""
  columns = -(-len(ax.get_legend_handles_labels()[1]) // 14)  # as many lines as a panel is high
  ax.legend(
    loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False, fontsize=9, ncols=max(1, columns)
  )


def _title(figure, title: str | None) -> None:
  """A title above all panels, wrapped to the figure's width."""
  if title:
    # About 8 letters of 14-point type to the inch.
    figure.suptitle(textwrap.fill(title, int(8 * figure.get_figwidth())), fontsize=14)


def style(i: int) -> dict:
  style = LINE_STYLES[i // len(LINE_COLORS) % len(LINE_STYLES)]
  return {"color": LINE_COLORS[i % len(LINE_COLORS)], "linestyle": style}


def confusion(
  path, confusion_CxC: np.ndarray, names: Sequence[str], *, unseen: Sequence[int] = ()
) -> pathlib.Path:
  """Writes a PNG of what is taken for what.

  Up to CONFUSION_CLASSES classes it is the matrix, each row in percent of the truth's pixels; a
  class that is not in the truth has an empty row. With more it is a list of the pairs that most
  wrong pixels are of.

  Args:
    path: of the PNG.
    confusion_CxC: pixels, rows truth, columns prediction.
    names: C class names.
    unseen: ids of classes not trained on, marked with a `*`.

  Returns:
    The path.
  """
  confusion = np.asarray(confusion_CxC, np.float64)
  truth = confusion.sum(1)
  shares = 100 * np.divide(
    confusion, truth[:, None], out=np.full_like(confusion, np.nan), where=truth[:, None] > 0
  )
  marks = {int(i): " *" for i in unseen}
  texts = [textwrap.shorten(n, 28, placeholder="…") + marks.get(i, "") for i, n in enumerate(names)]
  from matplotlib.font_manager import FontProperties

  path_of_font, texts = _drawable(texts)
  font = FontProperties(fname=path_of_font, size=9)
  figure, (ax,) = _figure(1)
  ax.grid(False)
  draw = _matrix if len(names) <= CONFUSION_CLASSES else _confused_pairs
  draw(figure, ax, confusion, shares, texts, font)
  if marks:
    figure.text(0.01, 0.005, UNSEEN_NOTE, fontsize=9, color="0.4")
  return write(path, lambda file: figure.savefig(file, format="png"))


def _matrix(figure, ax, confusion, shares, texts, font) -> None:
  count = len(texts)
  side = max(4.0, 0.34 * count)
  figure.set_size_inches(side + 3.5, side + 2.2)
  picture = ax.imshow(shares, cmap="Blues", vmin=0, vmax=100)
  for i, j in np.argwhere(shares >= 1):
    color = "white" if shares[i, j] > 60 else "0.15"
    ax.text(j, i, f"{shares[i, j]:.0f}", ha="center", va="center", fontsize=8, color=color)
  turned = {"rotation": 60, "ha": "right", "rotation_mode": "anchor"}
  ax.set_xticks(range(count), texts, fontproperties=font, **turned)
  ax.set_yticks(range(count), texts, fontproperties=font)
  ax.set_xlabel("prediction")
  ax.set_ylabel("truth")
  ax.set_title("Share of the truth's pixels (%; below 1 not written)", fontsize=12)
  figure.colorbar(picture, ax=ax, label="% of the truth's pixels", fraction=0.04)


def _confused_pairs(figure, ax, confusion, shares, texts, font) -> None:
  wrong = confusion.copy()
  np.fill_diagonal(wrong, 0)
  order = np.argsort(-wrong, axis=None, kind="stable")[:CONFUSED_PAIRS]
  pairs = [(i, j) for i, j in zip(*np.unravel_index(order, wrong.shape)) if wrong[i, j]]
  figure.set_size_inches(11, 0.3 * max(len(pairs), 4) + 1.4)
  values = [100 * wrong[i, j] / wrong.sum() for i, j in pairs]
  ax.barh(range(len(pairs)), values, color=LINE_COLORS[0], height=0.7)
  for k, (i, j) in enumerate(pairs):
    note = f" {values[k]:.2g}   ({shares[i, j]:.0f} % of {texts[i]})"
    ax.text(values[k], k, note, va="center", fontproperties=font, color="0.15")
  rows = [f"{texts[i]} → {texts[j]}" for i, j in pairs]
  ax.set_yticks(range(len(pairs)), rows, fontproperties=font)
  ax.set_ylim(max(len(pairs), 1) - 0.4, -0.6)
  ax.set_xlim(0, 1.5 * max(values, default=1))
  ax.set_xlabel("% of all wrong pixels")
  title = "Most frequent mistakes" if pairs else "No pixel is wrong"
  ax.set_title(f"{title}, {len(texts)} classes: truth → prediction", fontsize=12)


def curves(
  path, history: Mapping[str, Sequence[tuple[int, float]]], *, title: str | None = None
) -> pathlib.Path:
  """Writes a PNG with the curves of one run.

  Panels, where there is something to show: losses (logarithmic once they span a factor of 50; long
  series smoothed over a faint raw line), learning rate, gradient norm, metrics in percent, others.
  Values that are not finite are left out.

  Args:
    path: of the PNG.
    history: name -> [(step, value)], as `MetricWriter.history` returns it; metrics as fractions.
    title: a line above.

  Returns:
    The path.
  """
  panels: dict[str, dict[str, np.ndarray]] = {}
  for name, points in history.items():
    points = np.array(sorted(points), np.float64).reshape(-1, 2)
    points = points[np.isfinite(points[:, 1])]
    if len(points):
      panels.setdefault(_panel(name), {})[name] = points
  kinds = [k for k in ("loss", "metric", "lr", "gradient", "other") if k in panels]
  heads = {
    "loss": ("Loss", "loss"),
    "metric": ("Evaluation", "score (%)"),
    "lr": ("Learning rate", "learning rate (per step)"),
    "gradient": ("Gradient norm", "L2 norm of the gradient"),
    "other": ("Other", "value"),
  }
  figure, axes = _figure(max(1, len(kinds)))
  for ax, kind in zip(axes, kinds):
    series = panels[kind]
    # Known metrics in the table's order, the rest as they came.
    known = list(METRICS)
    order = sorted(
      series,
      key=lambda n: known.index(n.rpartition("/")[2]) if n.rpartition("/")[2] in METRICS else 99,
    )
    for i, name in enumerate(order):
      steps, values = series[name].T
      values = 100 * values if kind == "metric" else values
      line, text = style(i), _display(name, order)
      if kind == "metric":
        text += f": {values[-1]:.1f}"
      if len(values) >= SMOOTH_FROM and kind in ("loss", "gradient"):
        ax.plot(steps, values, alpha=0.22, linewidth=0.8, color=line["color"])
        ax.plot(steps, _moving_mean(values), linewidth=1.8, label=text, **line)
      else:
        marker = "o" if len(values) < SMOOTH_FROM else None
        ax.plot(steps, values, marker=marker, markersize=4, linewidth=1.8, label=text, **line)
    every = np.concatenate([points[:, 1] for points in series.values()])
    if kind in ("loss", "gradient") and every.min() > 0 and every.max() / every.min() > 50:
      ax.set_yscale("log")
    elif kind == "lr":
      ax.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
      ax.set_ylim(bottom=0)
    step_ticks(ax)
    ax.set_title(heads[kind][0], loc="left", fontsize=12, fontweight="bold")
    ax.set_ylabel(heads[kind][1])
    if len(order) > 1 or kind == "metric":
      legend_beside(ax)
  if not kinds:
    axes[0].set_axis_off()
    axes[0].text(0.5, 0.5, "nothing was recorded yet", ha="center", va="center", fontsize=14)
  _title(figure, title)
  return write(path, lambda file: figure.savefig(file, format="png"))
