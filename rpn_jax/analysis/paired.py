"""Rows compared seed by seed."""

import math
from collections.abc import Sequence

import numpy as np

from rpn_jax.analysis.runs import Row


def differences(row: Row, reference: Row, metric: str = "hiou") -> list[float]:
  """A score of a row less that of another one, seed by seed; [] for the same one.

  Runs of a seed see the same images in the same order: differences spread less than scores do.
  """
  if row.runs[0].config.get("method") == "training_free":
    return []
  scores = [
    {run.config["seed"]: score for run in r.runs if (score := run.last.get(metric)) is not None}
    for r in (row, reference)
  ]
  if [run.directory for run in row.runs] == [run.directory for run in reference.runs]:
    return []
  return [score - scores[1][seed] for seed, score in scores[0].items() if seed in scores[1]]


def interval(values: Sequence[float]) -> tuple[float, float]:
  """Mean, and half of Student's interval around it that holds the true mean in 95 of 100 such
  samples, in percent; NaN for one value, which tells nothing of how far it may be off."""
  from scipy import stats  # slow to import

  percent = 100 * np.array(values, np.float64)
  if len(percent) == 1:
    return float(percent[0]), math.nan
  half = stats.t.ppf(0.975, len(percent) - 1) * percent.std(ddof=1) / len(percent) ** 0.5
  return float(percent.mean()), float(half)


def slope(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
  """Slope of the line through points by least squares, and half of its 95 % interval; NaN for what
  fewer than two different x, or than three points, do not tell."""
  from scipy import stats

  if len(set(x)) < 2:
    return math.nan, math.nan
  fit = stats.linregress(x, y)
  half = stats.t.ppf(0.975, len(x) - 2) * fit.stderr if len(x) > 2 else math.nan
  return float(fit.slope), float(half)


def mean_and_interval(values: Sequence[float], seeds: int = 0) -> str:
  """Percent: "1.6 [0.4, 2.8]", see `interval`; "1.6" for one value, "-" for none.

  Args:
    values: differences.
    seeds: of the row; how many differences there are is said where these are more.
  """
  if not values:
    return "-"
  text = with_interval(*interval(values))
  return text if len(values) >= seeds else f"{text}, {len(values)} of {seeds} seeds"


def with_interval(value: float, half: float) -> str:
  """ "1.6 [0.4, 2.8]"; "1.6" if half an interval is NaN, "-" if the value is."""
  if math.isnan(value):
    return "-"
  rounded = lambda x: f"{round(x, 1) + 0.0:.1f}"  # no "-0.0"
  between = "" if math.isnan(half) else f" [{rounded(value - half)}, {rounded(value + half)}]"
  return rounded(value) + between
