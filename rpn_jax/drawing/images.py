"""Label maps in color: overlays, grids of predictions, index images.

A label map holds class ids 0..C-1; any other value (255 by convention) is ignored and is drawn as
a dark hatch.
"""

from __future__ import annotations

import io
import os
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import cv2
import numpy as np

from rpn_jax.base.origins import png_with
from rpn_jax.base.paths import exact, replacing
from rpn_jax.drawing.fonts import load_font
from rpn_jax.drawing.legend import draw_legend, legend_entries
from rpn_jax.drawing.palette import HATCH, INK, class_colors

if TYPE_CHECKING:
  from matplotlib.figure import Figure
  from PIL import Image

MAX_OVERLAY_SIDE = 2000  # pixels


def colorize(label_HxW: np.ndarray, colors_Cx3: np.ndarray) -> np.ndarray:
  """A label map in colors, (H, W, 3) uint8; ids outside 0..C-1 become a dark hatch.

  Args:
    label_HxW: integers.
    colors_Cx3: uint8, from `class_colors`.

  Raises:
    ValueError: the label is not a 2-D array of integers.
  """
  table, index = _hatched(np.asarray(colors_Cx3, np.uint8), _checked_label(label_HxW))
  return table.take(index, 0)


def _hatched(colors_Cx3: np.ndarray, label_HxW: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Colors (C+2, 3) with those of the hatch, and the one (H, W) of every pixel."""
  classes = len(colors_Cx3)
  table = np.concatenate([colors_Cx3.reshape(-1, 3), np.array(HATCH, np.uint8)])
  ignored = (label_HxW < 0) | (label_HxW >= classes)
  if not ignored.any():
    return table, label_HxW
  height, width = label_HxW.shape
  # Stripes in proportion to the image: visible at 96 pixels and at 4000.
  stripe = max(2, max(height, width) // 64)
  diagonal = (np.arange(height)[:, None] + np.arange(width)[None]) // stripe % 2
  return table, np.where(ignored, classes + diagonal, label_HxW)


def overlay(
  image_HxWx3: np.ndarray, label_HxW: np.ndarray, colors_Cx3: np.ndarray, alpha: float = 0.55
) -> np.ndarray:
  """`(1 - alpha) * image + alpha * color`, (H, W, 3) uint8.

  Args:
    image_HxWx3: uint8 RGB.
    label_HxW: integers of the same height and width.
    colors_Cx3: uint8.
    alpha: weight of the colors, 0 to 1.

  Raises:
    ValueError: a wrong shape, dtype or alpha.
  """
  image, label = _checked_image(image_HxWx3), _checked_label(label_HxW)
  if image.shape[:2] != label.shape:
    raise ValueError(f"expected image and label of one size, got {image.shape} and {label.shape}")
  if not 0 <= alpha <= 1:
    raise ValueError(f"expected alpha in [0, 1], got {alpha}")
  table, index = _hatched(np.asarray(colors_Cx3, np.uint8), label)
  # In 32 bits, and what can be done once for each color is not done for each pixel.
  mixed = image * np.float32(1 - alpha)
  mixed += (alpha * table + 0.5).astype(np.float32).take(index, 0)
  return mixed.astype(np.uint8)


def overlay_with_legend(
  image_HxWx3: np.ndarray,
  label_HxW: np.ndarray,
  names: Sequence[str],
  *,
  alpha: float = 0.55,
  palette: str = "default",
  areas: tuple[np.ndarray, int] | None = None,
) -> Image.Image:
  """An image under the colors of its classes, above a legend with each one's share of the pixels.

  Images of more than MAX_OVERLAY_SIDE pixels are reduced, and tiny ones enlarged.

  Args:
    image_HxWx3: uint8 RGB.
    label_HxW: class ids of the same height and width; pixels of other values stay as they are.
    names: C class names.
    alpha: weight of the colors, 0 to 1.
    palette: of `class_colors`.
    areas: pixels of each class (C,), and those of no class, where the label is a reduced one.
  """
  from PIL import Image

  image, label = _checked_image(image_HxWx3), _checked_label(label_HxW)
  colors = class_colors(names, palette)
  size = display_size(label.shape)
  # In proportion to the image, which a page or a viewer reduces to what fits.
  letters = max(16, max(size) // 40)
  margin = letters
  legend_width = max(size[0], 24 * letters)
  entries = legend_entries([label], names, colors, share=True, rest="other", areas=areas)
  legend = draw_legend(entries, legend_width, letters)
  colored = tinted(image, label, colors, size, alpha)
  page = Image.new(
    "RGB", (legend_width + 2 * margin, size[1] + legend.height + 3 * margin), "white"
  )
  page.paste(Image.fromarray(colored), (margin + (legend_width - size[0]) // 2, margin))
  page.paste(legend, (margin, size[1] + 2 * margin))
  return page


def display_size(shape: tuple[int, int], most: int = MAX_OVERLAY_SIDE) -> tuple[int, int]:
  """(width, height) at which an (H, W) image is shown: at most `most` a side; tiny ones larger."""
  if max(shape) > most:
    return fitted_size(shape, most)
  return fitted_size(shape, 512) if max(shape) < 512 else shape[::-1]


def tinted(
  image_HxWx3: np.ndarray,
  label_HxW: np.ndarray,
  colors_Cx3: np.ndarray,
  size: tuple[int, int],
  alpha: float = 0.55,
) -> np.ndarray:
  """An `overlay` at (width, height) `size`; pixels of no class stay as they are."""
  scaled, ids = _resized(image_HxWx3, size, average=True), _resized(label_HxW, size)
  colored = overlay(scaled, ids, colors_Cx3, alpha)
  outside = (ids < 0) | (ids >= len(colors_Cx3))
  if outside.any():
    colored[outside] = scaled[outside]
  return colored


def prediction_grid(
  path: str | os.PathLike,
  images: Sequence[np.ndarray],
  labels: Sequence[np.ndarray],
  predictions: Sequence[np.ndarray],
  names: Sequence[str],
  *,
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
  letters, gap, margin = 17, 14, 22
  sizes = [fitted_size(label.shape, long_side) for label in labels]
  column = max(max(w for w, _ in sizes), 200)
  width = 3 * column + 2 * gap

  entries = legend_entries([*labels, *predictions], names, colors, unseen=unseen)
  legend = draw_legend(entries, width, letters)
  head_font = load_font(18, bold=True)

  top = margin + 30
  height = top + sum(h + gap for _, h in sizes) + gap + legend.height + margin
  page = Image.new("RGB", (width + 2 * margin, height), "white")
  draw = ImageDraw.Draw(page)
  for k, text in enumerate(("image", "truth", "prediction")):
    x = margin + k * (column + gap) + column // 2
    draw.text((x, top - 18), text, INK, head_font, anchor="mm")
  y = top
  for image, label, prediction, (w, h) in zip(images, labels, predictions, sizes):
    panels = [_resized(image, (w, h), average=True)]
    for ids in (label, prediction):
      # Colored before it is enlarged, so that the hatch grows with the pixels.
      if w < ids.shape[1]:
        panels.append(colorize(_resized(ids, (w, h)), colors))
      else:
        panels.append(_resized(colorize(ids, colors), (w, h)))
    for k, panel in enumerate(panels):
      x = margin + k * (column + gap) + (column - w) // 2
      page.paste(Image.fromarray(np.ascontiguousarray(panel)), (x, y))
    y += h + gap
  page.paste(legend, (margin, y + gap))
  return save_png(path, page)


def no_class_id(classes: int) -> int:
  """The value of pixels of no class in a saved label map of so many classes."""
  return 255 if classes <= 255 else 65535


def index_image(
  label_HxW: np.ndarray, names: Sequence[str], palette: str = "default"
) -> Image.Image:
  """An image whose pixel values are class ids, and `no_class_id` where there is none.

  Up to 255 classes it is a palette PNG (mode P: an index that viewers show in color), beyond that
  16-bit gray (mode I;16).

  Raises:
    ValueError: a wrong shape or dtype, or an id that the file cannot hold.
  """
  from PIL import Image

  label, largest = _checked_label(label_HxW), no_class_id(len(names))
  if label.size and (label.min() < 0 or label.max() > largest):
    raise ValueError(
      f"expected class ids 0..{largest} for {len(names)} classes, got {label.min()}..{label.max()}"
    )
  if largest > 255:
    return Image.fromarray(label.astype(np.uint16))
  index = Image.fromarray(label.astype(np.uint8))
  table = np.tile(np.array(HATCH[0], np.uint8), (256, 1))
  table[: len(names)] = class_colors(names, palette)
  index.putpalette(table.tobytes())
  return index


def save_png(
  path: str | os.PathLike, image: Image.Image | Figure, source: str | None = None
) -> pathlib.Path:
  """Writes an image or a figure, see `replacing`, and makes its folder.

  Args:
    path: of the file.
    image: of PIL, or a figure.
    source: of an image, what it was made of, see `base.origins`.

  Returns:
    The path.
  """
  path, stream = exact(path), io.BytesIO()
  if hasattr(image, "savefig"):
    image.savefig(stream, format="png")
  elif image.mode == "RGB":  # in a fifth of Pillow's time, and to smaller files
    options = [
      cv2.IMWRITE_PNG_COMPRESSION, 1, cv2.IMWRITE_PNG_FILTER, cv2.IMWRITE_PNG_FILTER_UP,
    ]  # fmt: skip
    bgr = cv2.cvtColor(np.asarray(image), cv2.COLOR_RGB2BGR)
    stream.write(cv2.imencode(".png", bgr, options)[1].tobytes())
  else:
    # Level 6 takes seconds on a 12-megapixel label for a few per cent.
    image.save(stream, format="PNG", compress_level=4)
  png = stream.getvalue()
  path.parent.mkdir(parents=True, exist_ok=True)
  with replacing(path) as temporary:
    temporary.write_bytes(png if source is None else png_with(png, source))
  return path


def _checked_image(image: np.ndarray) -> np.ndarray:
  image = np.asarray(image)
  if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
    raise ValueError(f"expected an image (H, W, 3) uint8, got {image.shape} {image.dtype}")
  return image


def _checked_label(label: np.ndarray) -> np.ndarray:
  label = np.asarray(label)
  if label.ndim != 2 or not np.issubdtype(label.dtype, np.integer):
    raise ValueError(f"expected a label (H, W) of integers, got {label.shape} {label.dtype}")
  # Wider than any label type, so that adding to ids cannot wrap around.
  return label.astype(np.int64) if label.dtype.itemsize > 4 else label.astype(np.int32)


def fitted_size(shape: tuple[int, int], long_side: int) -> tuple[int, int]:
  """(width, height) in pixels at which an (H, W) image fills a square of `long_side`."""
  scale = long_side / max(shape)
  # Whole factors keep every pixel of a small image the same size.
  scale = int(scale) if scale >= 2 else scale
  return max(1, round(shape[1] * scale)), max(1, round(shape[0] * scale))


def _resized(array: np.ndarray, size: tuple[int, int], average: bool = False) -> np.ndarray:
  """Array at (width, height): nearest neighbor, or the average where an image shrinks."""
  from PIL import Image

  if (array.shape[1], array.shape[0]) == size:
    return array
  if average and array.shape[1] > size[0]:
    return np.asarray(Image.fromarray(array).resize(size, Image.Resampling.BOX))
  rows = ((np.arange(size[1]) + 0.5) * array.shape[0] / size[1]).astype(int)
  columns = ((np.arange(size[0]) + 0.5) * array.shape[1] / size[0]).astype(int)
  return array[rows[:, None], columns]
