"""A figure of some examples of a prepared set, which shows whether the labels fit the images."""

import colorsys
import io
import pathlib
import warnings
from collections.abc import Sequence

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image

from data_pipelines.vocabularies import Vocabulary
from rpn_jax.base.words import split_synonyms

_COLUMNS = 2  # examples side by side
_MAX_LEGEND_CLASSES = 12  # a longer list would not fit beside its mask
_MAX_NAME_LETTERS = 24
_NO_CLASS_COLOR = (70, 70, 70)
_LONG_SIDE = 640  # pixels; more would not show


def draw(examples: Sequence[dict], vocabulary: Vocabulary, path: pathlib.Path) -> None:
  """Writes a PNG of every example's image, its mask in colors, and the names of the colors.

  A class has one color throughout; the classes of the largest areas have the clearest.

  Args:
    examples: as `records.Records` yields them.
    vocabulary: of the raw ids in the labels.
    path: of the PNG.
  """
  table = np.full(65536, -1)
  for raw, class_id in vocabulary.ids.items():
    table[raw] = -1 if class_id == vocabulary.ignore else class_id
  images, labels = [], []
  for example in examples:
    with Image.open(io.BytesIO(example["image"])) as file:
      image = file.convert("RGB")
    image.thumbnail((_LONG_SIDE, _LONG_SIDE))
    label = Image.fromarray(table[example["label"]].astype(np.int32))
    images.append(image)
    labels.append(np.array(label.resize(image.size, Image.Resampling.NEAREST)))
  areas = np.bincount(np.concatenate([label.ravel() for label in labels]) + 1)
  ranks = np.argsort(np.argsort(-areas[1:], kind="stable"))
  colors = np.array([_NO_CLASS_COLOR, *(_color(rank) for rank in ranks)], np.uint8)

  rows = -(-len(examples) // _COLUMNS)
  figure = Figure((15, 3.1 * rows), dpi=100, layout="constrained")
  FigureCanvasAgg(figure)
  axes = figure.subplots(rows, 3 * _COLUMNS, squeeze=False, width_ratios=[3, 3, 2] * _COLUMNS)
  for ax in axes.flat:
    ax.axis("off")
  for i, (example, image, label) in enumerate(zip(examples, images, labels)):
    photo, mask, legend = axes[i // _COLUMNS, 3 * (i % _COLUMNS) :][:3]
    photo.imshow(image)
    height, width = example["label"].shape
    photo.set_title(f"{example['id'][-32:]}  {width} x {height}", fontsize=8, parse_math=False)
    mask.imshow(colors[label + 1], interpolation="nearest")
    legend.legend(
      handles=_entries(label, vocabulary, colors),
      loc="center left",
      bbox_to_anchor=(-0.15, 0.5),
      fontsize=8,
      frameon=False,
    )
  with warnings.catch_warnings():
    warnings.filterwarnings("ignore", "Glyph")  # letters that no font has show as boxes
    figure.savefig(path)


def _entries(label: np.ndarray, vocabulary: Vocabulary, colors: np.ndarray) -> list[Patch]:
  """The classes in a mask, largest first, and the pixels without one."""
  values, counts = np.unique(label, return_counts=True)
  order = [v for v in values[np.argsort(-counts, kind="stable")].tolist() if v >= 0]
  names = {i: name for name, i in zip(reversed(vocabulary.names), reversed(vocabulary.scored_as))}
  entries = [
    _entry(split_synonyms(names[i])[0], colors[i + 1]) for i in order[:_MAX_LEGEND_CLASSES]
  ]
  if len(order) > _MAX_LEGEND_CLASSES:
    entries.append(_entry(f"and {len(order) - _MAX_LEGEND_CLASSES} more", (255, 255, 255)))
  if values[0] < 0:
    entries.append(_entry("(no class)", colors[0]))
  return entries


def _entry(name: str, color: Sequence[int]) -> Patch:
  name = name if len(name) <= _MAX_NAME_LETTERS else f"{name[: _MAX_NAME_LETTERS - 1]}…"
  return Patch(color=np.divide(color, 255), label=name.replace("$", r"\$"))


def _color(rank: int) -> tuple[float, ...]:
  """Hues a golden angle apart in turns of brightness, so that neighbors in rank differ most."""
  saturation, value = ((0.85, 0.95), (0.5, 1.0), (0.9, 0.6))[rank // 8 % 3]
  return tuple(255 * c for c in colorsys.hsv_to_rgb(rank * 0.618034 % 1, saturation, value))
