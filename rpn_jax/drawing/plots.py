"""Plots of a run: curves, confusion matrices, and the figure that every plot starts from."""

from __future__ import annotations

import os
import pathlib
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from rpn_jax.drawing.fonts import font_for
from rpn_jax.drawing.images import save_png
from rpn_jax.drawing.legend import UNSEEN_NOTE

if TYPE_CHECKING:
  from matplotlib.axes import Axes
  from matplotlib.figure import Figure
  from matplotlib.font_manager import FontProperties

# Metrics that are fractions in [0, 1] and plotted in percent, with their titles.
METRIC_TITLES = {
  "pAcc": "pAcc",
  "miou_gt": "mIoU, classes in truth",
  "miou_union": "mIoU, truth or prediction",
  "miou_seen": "mIoU seen",
  "miou_unseen": "mIoU unseen",
  "hiou": "hIoU",
}
LINE_COLORS = (
  "#0b62b8", "#d1495b", "#2a9d5c", "#e08e0b", "#7b4ab5", "#17a2b0", "#8a5a33", "#444444",
)  # fmt: skip
LINE_STYLES = ("-", "--", ":", "-.")
# The names of a larger confusion matrix could not be read: its worst pairs are listed instead.
MAX_MATRIX_CLASSES = 40
MAX_PAIRS = 30
# Series of at least this many points are smoothed; of shorter ones every point is a marker.
SMOOTHED_POINTS = 30


def figure(
  size: tuple[float, float], rows: int = 1, columns: int = 1, **options: Any
) -> tuple[Figure, np.ndarray]:
  """A figure and its axes, an array (rows, columns), with a grid behind the data.

  It has an Agg canvas and no pyplot: nothing global is touched, and no display is needed. Write it
  with `images.save_png`.

  Args:
    size: (width, height) in inches.
    rows, columns: of axes.
    **options: of `Figure.subplots`.
  """
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  fig = Figure(figsize=size, dpi=110)
  FigureCanvasAgg(fig)
  fig.set_layout_engine("constrained", w_pad=0.12, h_pad=0.12, wspace=0.04, hspace=0.06)
  axes = fig.subplots(rows, columns, squeeze=False, **options)
  for ax in axes.flat:
    ax.grid(True, color="0.9", linewidth=0.8)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
  return fig, axes


def step_ticks(ax: Axes) -> None:
  """Labels the x axis with training steps: 500, 1k, 1.5k."""
  from matplotlib.ticker import EngFormatter, MaxNLocator

  ax.xaxis.set_major_locator(
    MaxNLocator(nbins=7, integer=True, min_n_ticks=1, steps=[1, 2, 2.5, 5, 10])
  )
  ax.xaxis.set_major_formatter(EngFormatter(sep=""))
  ax.set_xlabel("training step")


def legend_beside(ax: Axes) -> None:
  """A legend to the right of the axes: inside, it would hide some curve or other."""
  columns = -(-len(ax.get_legend_handles_labels()[1]) // 14)  # as many lines as a panel is high
  ax.legend(
    loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False, fontsize=9, ncols=max(1, columns)
  )


def line_style(i: int) -> dict:
  """Color and dashes of the i-th line, as arguments of `plot`."""
  dashes = LINE_STYLES[i // len(LINE_COLORS) % len(LINE_STYLES)]
  return {"color": LINE_COLORS[i % len(LINE_COLORS)], "linestyle": dashes}


def plot_curves(
  path: str | os.PathLike, history: Mapping[str, Sequence[tuple[int, float]]]
) -> pathlib.Path:
  """Writes a PNG with the curves of one run.

  Panels, where there is something to show: losses (logarithmic once they span a factor of 50; long
  series smoothed over a faint raw line), metrics in percent, learning rate, gradient norm, others,
  among them the number of skipped steps if any was. Values that are not finite are left out.

  Args:
    path: of the PNG.
    history: name -> [(step, value)], as `read_history` returns it; metrics as fractions.

  Returns:
    The path.
  """
  panels: dict[str, dict[str, np.ndarray]] = {}
  for name, series in history.items():
    points = np.array(sorted(series), np.float64).reshape(-1, 2)
    points = points[np.isfinite(points[:, 1])]
    if len(points) and not (_is_skips(name) and not points[:, 1].any()):
      panels.setdefault(_panel(name), {})[name] = points
  heads = {
    "loss": ("Loss", "loss"),
    "metric": ("Evaluation", "score (%)"),
    "lr": ("Learning rate", "learning rate (per step)"),
    "gradient": ("Gradient norm", "L2 norm of the gradient"),
    "other": ("Other", "value"),
  }
  kinds = [kind for kind in heads if kind in panels]
  count = max(1, len(kinds))
  columns = min(2, count)
  rows = -(-count // columns)
  fig, axes = figure((7.5 * columns, 4.0 * rows), rows, columns)
  for ax in axes.flat[count:]:
    ax.remove()
  for ax, kind in zip(axes.flat, kinds):
    _draw_panel(ax, kind, panels[kind])
    ax.set_title(heads[kind][0], loc="left", fontsize=12, fontweight="bold")
    ax.set_ylabel(heads[kind][1])
  if not kinds:
    axes[0, 0].set_axis_off()
    axes[0, 0].text(0.5, 0.5, "nothing was recorded yet", ha="center", va="center", fontsize=14)
  return save_png(path, fig)


def _is_skips(name: str) -> bool:
  return name == "train/skipped"


def _panel(name: str) -> str:
  """The panel that a series belongs to."""
  group, _, leaf = name.rpartition("/")
  if leaf in METRIC_TITLES:
    return "metric"
  if leaf == "learning_rate":
    return "lr"
  if leaf == "grad_norm":
    return "gradient"
  # The terms of a loss are named after what they measure: focal, dice, cross_entropy.
  loss = "loss" in leaf or (group == "train" and not _is_skips(name))
  return "loss" if loss else "other"


def _draw_panel(ax: Axes, kind: str, series: Mapping[str, np.ndarray]) -> None:
  """Lines of one panel: name -> points (n, 2)."""
  # Known metrics in the order of their table, the rest as they came.
  ranks = {name: i for i, name in enumerate(METRIC_TITLES)}
  names = sorted(series, key=lambda name: ranks.get(name.rpartition("/")[2], len(ranks)))
  for i, name in enumerate(names):
    steps, values = series[name].T
    values = 100 * values if kind == "metric" else values
    style, label = line_style(i), _label(name, names)
    if kind == "metric":
      label += f": {values[-1]:.1f}"
    if len(values) >= SMOOTHED_POINTS and kind in ("loss", "gradient"):
      ax.plot(steps, values, alpha=0.22, linewidth=0.8, color=style["color"])
      ax.plot(steps, _moving_mean(values), linewidth=1.8, label=label, **style)
    else:
      marker = "o" if len(values) < SMOOTHED_POINTS else None
      ax.plot(steps, values, marker=marker, markersize=4, linewidth=1.8, label=label, **style)
  every = np.concatenate([points[:, 1] for points in series.values()])
  if kind in ("loss", "gradient") and every.min() > 0 and every.max() / every.min() > 50:
    ax.set_yscale("log")
  elif kind == "lr":
    ax.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    ax.set_ylim(bottom=0)
  step_ticks(ax)
  if len(names) > 1 or kind == "metric":
    legend_beside(ax)


def _label(name: str, names: Sequence[str]) -> str:
  """A name without its group, unless another series ends alike."""
  leaf = name.rpartition("/")[2]
  alone = sum(other.rpartition("/")[2] == leaf for other in names) == 1
  return METRIC_TITLES.get(leaf, leaf.replace("_", " ")) if alone else name


def _moving_mean(values: np.ndarray) -> np.ndarray:
  """Centered moving mean over 1/25 of the series.

  At the beginning, where losses fall steeply, the window shrinks on both sides; at the end, where
  they are flat and the last value is what one looks for, only on the side that has no values.
  """
  half = max(2, len(values) // 50)
  sums = np.concatenate([[0.0], np.cumsum(values)])
  index = np.arange(len(values))
  before = np.minimum(half, index)
  after = np.minimum(before, len(values) - 1 - index)
  return (sums[index + after + 1] - sums[index - before]) / (before + after + 1)


def plot_confusion(
  path: str | os.PathLike,
  confusion_CxC: np.ndarray,
  names: Sequence[str],
  *,
  unseen: Sequence[int] = (),
) -> pathlib.Path:
  """Writes a PNG of what is taken for what.

  Up to MAX_MATRIX_CLASSES classes it is the matrix, each row in percent of the truth's pixels; a
  class that is not in the truth has an empty row. Beyond, it lists the pairs of classes with the
  most wrong pixels.

  Args:
    path: of the PNG.
    confusion_CxC: pixels, rows truth, columns prediction.
    names: C class names.
    unseen: ids of classes not trained on, marked with a `*`.

  Returns:
    The path.
  """
  from matplotlib.font_manager import FontProperties

  confusion = np.asarray(confusion_CxC, np.float64)
  truth = confusion.sum(1, keepdims=True)
  shares = 100 * np.divide(confusion, truth, out=np.full_like(confusion, np.nan), where=truth > 0)
  marks = {int(i): " *" for i in unseen}
  texts = [textwrap.shorten(n, 28, placeholder="…") + marks.get(i, "") for i, n in enumerate(names)]
  font_path, texts = font_for(texts)
  font = FontProperties(fname=font_path, size=9)
  draw = _draw_matrix if len(names) <= MAX_MATRIX_CLASSES else _draw_worst_pairs
  fig = draw(confusion, shares, texts, font)
  if marks:
    fig.text(0.01, 0.005, UNSEEN_NOTE, fontsize=9, color="0.4")
  return save_png(path, fig)


def _draw_matrix(
  confusion: np.ndarray, shares: np.ndarray, texts: Sequence[str], font: FontProperties
) -> Figure:
  count = len(texts)
  side = max(4.0, 0.34 * count)
  fig, ((ax,),) = figure((side + 3.5, side + 2.2))
  ax.grid(False)
  matrix = ax.imshow(shares, cmap="Blues", vmin=0, vmax=100)
  for i, j in np.argwhere(shares >= 1):
    color = "white" if shares[i, j] > 60 else "0.15"
    ax.text(
      j,
      i,
      f"{shares[i, j]:.0f}",
      ha="center",
      va="center",
      fontsize=8,
      color=color,
      in_layout=False,
    )
  turned = {"rotation": 60, "ha": "right", "rotation_mode": "anchor"}
  ax.set_xticks(range(count), texts, fontproperties=font, **turned)
  ax.set_yticks(range(count), texts, fontproperties=font)
  ax.set_xlabel("prediction")
  ax.set_ylabel("truth")
  ax.set_title("Share of the truth's pixels (%; below 1 not written)", fontsize=12)
  fig.colorbar(matrix, ax=ax, label="% of the truth's pixels", fraction=0.04)
  return fig


def _draw_worst_pairs(
  confusion: np.ndarray, shares: np.ndarray, texts: Sequence[str], font: FontProperties
) -> Figure:
  wrong = confusion.copy()
  np.fill_diagonal(wrong, 0)
  order = np.argsort(-wrong, axis=None, kind="stable")[:MAX_PAIRS]
  pairs = [(i, j) for i, j in zip(*np.unravel_index(order, wrong.shape)) if wrong[i, j]]
  fig, ((ax,),) = figure((11, 0.3 * max(len(pairs), 4) + 1.4))
  ax.grid(False)
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
  return fig
