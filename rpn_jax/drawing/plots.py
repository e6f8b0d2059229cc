"""Plots of a run: curves and confusion matrices, with matplotlib's Agg canvas."""

import pathlib
import textwrap
from collections.abc import Mapping, Sequence

import numpy as np

from rpn_jax.base.paths import replacing
from rpn_jax.drawing.legend import UNSEEN_NOTE, drawable

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


def save(figure, path) -> pathlib.Path:
  """Writes a figure as PNG, whole or not at all, and makes its folder."""
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  with replacing(path) as temporary:
    figure.savefig(temporary, format="png")
  return path


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


def line_style(i: int) -> dict:
  line_style = LINE_STYLES[i // len(LINE_COLORS) % len(LINE_STYLES)]
  return {"color": LINE_COLORS[i % len(LINE_COLORS)], "linestyle": line_style}


def plot_confusion(
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
  plot_confusion = np.asarray(confusion_CxC, np.float64)
  truth = plot_confusion.sum(1)
  shares = 100 * np.divide(
    plot_confusion,
    truth[:, None],
    out=np.full_like(plot_confusion, np.nan),
    where=truth[:, None] > 0,
  )
  marks = {int(i): " *" for i in unseen}
  texts = [textwrap.shorten(n, 28, placeholder="…") + marks.get(i, "") for i, n in enumerate(names)]
  from matplotlib.font_manager import FontProperties

  path_of_font, texts = drawable(texts)
  font = FontProperties(fname=path_of_font, size=9)
  figure, (ax,) = _figure(1)
  ax.grid(False)
  draw = _matrix if len(names) <= CONFUSION_CLASSES else _confused_pairs
  draw(figure, ax, plot_confusion, shares, texts, font)
  if marks:
    figure.text(0.01, 0.005, UNSEEN_NOTE, fontsize=9, color="0.4")
  return save(figure, path)


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


def _confused_pairs(figure, ax, plot_confusion, shares, texts, font) -> None:
  wrong = plot_confusion.copy()
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


def plot_curves(
  path, history: Mapping[str, Sequence[tuple[int, float]]], *, title: str | None = None
) -> pathlib.Path:
  """Writes a PNG with the plot_curves of one run.

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
      line, text = line_style(i), _display(name, order)
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
      ax.ticklabel_format(axis="y", line_style="sci", scilimits=(-2, 3))
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
  return save(figure, path)
