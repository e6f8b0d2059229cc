"""Many runs side by side: python -m rpn_jax report runs/* --out=runs/report

Runs that differ only in their seed make one row: mean ± sample standard deviation over seeds. A row
is named after its workdir, with a few config fields that tell it from others of the same data set
and network, without the values that most of these share. The files are report.md, report.csv and
report.json (the last two in fractions, not percent) and report.png, or one such figure for each
data set. Runs that cannot be read are listed with the reason.

--keep=FILE.json also writes the runs' scores into one small file, which is read like a run: tables
and figures are made from it where the runs are no more.
"""

import argparse
import csv
import io
import os
import pathlib
import re
import textwrap
from collections.abc import Sequence

import numpy as np

from rpn_jax.analysis import kept
from rpn_jax.analysis.runs import METRICS, Row, differing, group_runs, read_run
from rpn_jax.base.buckets import is_bucket
from rpn_jax.base.console import table
from rpn_jax.base.errors import InputError
from rpn_jax.base.paths import expand, write_json, write_text
from rpn_jax.drawing.images import save_png
from rpn_jax.drawing.plots import (
  METRIC_TITLES,
  SMOOTHED_POINTS,
  figure,
  legend_beside,
  line_style,
  step_ticks,
)

SELECTED = "selected on the evaluation classes"


def columns(rows: Sequence[Row]) -> tuple[str, ...]:
  """The metrics to show: of seen and unseen classes where a split has both, the means where one has
  not."""
  split = [bool(row.values("last", "hiou")) for row in rows]
  means = () if all(split) else ("miou_gt", "miou_union")
  return (*means, *(("miou_seen", "miou_unseen", "hiou") if any(split) else ()))


def data_sets(rows: Sequence[Row]) -> dict[str, list[int]]:
  """Data set -> positions of its rows."""
  found: dict[str, list[int]] = {}
  for i, row in enumerate(rows):
    found.setdefault(row.runs[0].data_set, []).append(i)
  return found


def mean_and_deviation(values: Sequence[float]) -> str:
  """Percent: "42.4 ± 0.6" (sample standard deviation), "42.4" for one value, "-" for none."""
  if not values:
    return "-"
  percent = 100 * np.array(values, np.float64)
  spread = f" ± {percent.std(ddof=1):.1f}" if len(values) > 1 else ""
  return f"{round(percent.mean(), 1) + 0.0:.1f}{spread}"  # no "-0.0"


def score_table(rows: Sequence[Row], *, markdown: bool = False) -> str:
  """Scores in percent, a line per row: of the last checkpoints, then of the best ones."""
  shown = [("last", "pAcc"), *(("last", m) for m in columns(rows))]
  shown += [("best", m) for m in columns(rows)]
  heads = [("best* " if c == "best" else "") + METRIC_TITLES[m] for c, m in shown]
  cells = [
    [
      i, row.label, row.runs[0].data_set, row.runs[0].network, len(row.runs),
      *(mean_and_deviation(row.values(c, m)) for c, m in shown), *row.extra_columns.values(),
    ]
    for i, row in enumerate(rows, 1)
  ]  # fmt: skip
  heads = ["row", "%", "data set", "network", "seeds", *heads, *rows[0].extra_columns]
  text = table(cells, heads, markdown=markdown)
  note = f"Last checkpoint, mean ± sample standard deviation over seeds; best*: {SELECTED}."
  return f"{text}\n\n{note}"


def evaluation_table(rows: Sequence[Row], *, markdown: bool = False) -> str:
  """Mean IoU in percent on the data sets evaluated after training, of the rows of which any was.

  "" if there are none.
  """
  sets = dict.fromkeys(name for row in rows for run in row.runs for name in run.evaluations)
  shown = [(name, m) for name in sets for m in ("miou_gt", "miou_union")]
  cells = [
    [i, row.label, *(mean_and_deviation(row.evaluated(*column)) for column in shown)]
    for i, row in enumerate(rows, 1)
    if any(run.evaluations for run in row.runs)
  ]
  heads = [f"{name} {metric.removeprefix('miou_')}" for name, metric in shown]
  text = table(cells, ["row", "mIoU, --mode=eval", *heads], markdown=markdown)
  note = "gt: over classes in the truth; union: over classes in truth or prediction."
  return f"{text}\n\n{note}" if sets else ""


def summary(rows: Sequence[Row], left_out: Sequence[str]) -> dict:
  """Everything, for report.json; scores are fractions."""
  fields = differing([row.runs[0].config for row in rows])
  summaries = []
  for i, row in enumerate(rows):
    scores = {}
    for checkpoint in ("last", "best"):
      values = {m: row.values(checkpoint, m) for m in METRICS}
      scores[checkpoint] = {
        m: {
          "mean": float(np.mean(v)),
          "deviation": float(np.std(v, ddof=1)) if len(v) > 1 else None,
        }
        for m, v in values.items()
        if v
      }
    runs = [
      {
        "directory": str(run.directory),
        "seed": run.config.get("seed"),
        "last": run.last,
        "best": run.best,
        "evaluations": run.evaluations,
      }
      for run in row.runs
    ]
    config = {name: values[i] for name, values in fields.items()}
    first = row.runs[0]
    named = {"label": row.label, "data_set": first.data_set, "network": first.network}
    row_is = {"beside": dict(row.extra_columns), "config": config}
    summaries.append({**named, **row_is, **scores, "runs": runs})
  return {"rows": summaries, "left_out": list(left_out), "best": SELECTED}


def write(out, rows: Sequence[Row], left_out: Sequence[str] = ()) -> pathlib.Path:
  """Writes report.md, report.csv, report.json and report.png into a folder, which it returns."""
  out = expand(out)
  out.mkdir(parents=True, exist_ok=True)
  content = summary(rows, left_out)
  write_json(out / "report.json", content)

  fields = list(content["rows"][0]["config"])
  figures = plot_each(out, rows)
  lines = [score_table(rows, markdown=True)]
  lines += [line for figure in figures for line in ("", f"![Scores]({figure.name})")]
  if evaluations := evaluation_table(rows, markdown=True):
    lines += ["", evaluations]
  if fields:
    cells = [[i, *row["config"].values()] for i, row in enumerate(content["rows"], 1)]
    lines += ["", "All that differs:", "", table(cells, ["row", *fields], markdown=True)]
  if left_out:
    lines += ["", "Left out:", "", *(f"- {reason}" for reason in left_out)]
  write_text(out / "report.md", "\n".join(lines) + "\n")

  names = [(c, m) for c in ("last", "best") for m in METRICS]
  heads = [f"{c}_{m}_{part}" for c, m in names for part in ("mean", "deviation")]
  text = io.StringIO()
  writer = csv.writer(text, lineterminator="\n")
  extra = list(rows[0].extra_columns)
  writer.writerow(["label", "data_set", "network", "seeds", *heads, *fields, *extra])
  for row in content["rows"]:
    scores = [row[c].get(m, {}).get(part) for c, m in names for part in ("mean", "deviation")]
    scores += [*row["config"].values(), *row["beside"].values()]
    named = [row[name] for name in ("label", "data_set", "network")]
    writer.writerow([*named, len(row["runs"]), *scores])
  write_text(out / "report.csv", text.getvalue())

  return out


def plot_each(out: pathlib.Path, rows: Sequence[Row]) -> list[pathlib.Path]:
  """`plot` for every data set, since scores of two are not compared: report.png if there is one."""
  names = figure_names(rows)
  return [
    plot(out / name, [rows[i] for i in positions], [i + 1 for i in positions])
    for name, positions in zip(names, data_sets(rows).values())
  ]


def figure_names(rows: Sequence[Row]) -> list[str]:
  """File names of the figures of `plot_each`."""
  sets = data_sets(rows)
  if len(sets) == 1:
    return ["report.png"]
  return ["report_" + re.sub(r"[^\w.-]+", "_", name) + ".png" for name in sets]


def plot(path, rows: Sequence[Row], numbers: Sequence[int] = ()) -> pathlib.Path:
  """Writes a PNG: a bar for every row and metric, and below it the curves over training steps.

  Bars are of the last checkpoints, with ± one deviation over seeds; a row has one color and one
  number in all panels, by default counted from 1.
  """
  numbers = numbers or range(1, len(rows) + 1)
  metrics = columns(rows)
  curves = [{m: c for m in metrics if (c := row.curve(m))} for row in rows]
  labels = [textwrap.fill(row.label, 44, break_on_hyphens=False) for row in rows]
  heights = [0.18 * (label.count("\n") + 1) + 0.2 for label in labels]
  bars_high = max(1.2, sum(heights)) + 0.6
  # A single evaluation is no curve, and its bar says it all.
  curves_high = 3.6 if any(len(steps) > 1 for c in curves for steps, *_ in c.values()) else 0

  ratios = [bars_high, curves_high] if curves_high else [bars_high]
  size = (5 + 3.6 * len(metrics), sum(ratios) + 0.3)  # with the name of the data set
  fig, axes = figure(size, len(ratios), len(metrics), height_ratios=ratios)
  fig.suptitle(rows[0].runs[0].data_set, x=0.01, ha="left", fontsize=12)

  # A row is as high as its name.
  ends = np.cumsum(heights)
  centers = ends - np.array(heights) / 2
  styles = [line_style(i) for i in range(len(rows))]
  for column, metric in enumerate(metrics):
    ax = axes[0, column]
    for i, row in enumerate(rows):
      values = row.values("last", metric)
      if not values:
        continue
      mean = 100 * np.mean(values)
      deviation = 100 * np.std(values, ddof=1) if len(values) > 1 else 0.0
      error = {"xerr": deviation, "ecolor": "0.2", "capsize": 3} if deviation else {}
      ax.barh(centers[i], mean, 0.26, color=styles[i]["color"], alpha=0.85, **error)
      ax.annotate(
        mean_and_deviation(values),
        (mean + deviation, centers[i]),
        (6, 0),
        textcoords="offset points",
        va="center",
        fontsize=9,
      )
    ax.set_title(f"{METRIC_TITLES[metric]} (%)", loc="left", fontsize=12, fontweight="bold")
    ax.set_ylim(ends[-1], 0)
    # Room for the numbers behind the bars.
    ax.set_xlim(0, 1.45 * max(1, ax.dataLim.x1))
    ax.set_yticks(centers, [f"{label}  [{i}]" for i, label in zip(numbers, labels)])
    if column:
      ax.set_yticklabels([])
    ax.tick_params(axis="y", length=0, labelsize=9)
    ax.grid(False, axis="y")
    if not curves_high:
      continue
    ax = axes[1, column]
    for i, curves_of_row in enumerate(curves):
      if not curves_of_row:
        continue
      # A row without this metric leaves no line here, only its place in the legend.
      steps, means, deviations = curves_of_row.get(metric, np.zeros((3, 0)))
      marker = "o" if len(steps) < SMOOTHED_POINTS else None
      ax.plot(steps, 100 * means, marker=marker, markersize=3, label=f"[{numbers[i]}]", **styles[i])
      if deviations.any():
        band = 100 * (means - deviations), 100 * (means + deviations)
        ax.fill_between(steps, *band, color=styles[i]["color"], alpha=0.15, linewidth=0)
    step_ticks(ax)
  if curves_high:
    axes[1, 0].set_ylabel("score (%)")
    legend_beside(axes[1, -1])
  return save_png(path, fig)


def main(arguments: list[str]) -> int:
  parser = argparse.ArgumentParser(prog="rpn report", description=__doc__)
  parser.formatter_class = argparse.RawDescriptionHelpFormatter
  parser.add_argument("runs", nargs="+", metavar="RUN", help="workdirs, or files of --keep")
  parser.add_argument("--out", default="report", help="folder for the files (default: report)")
  parser.add_argument("--labels", nargs="+", default=(), metavar="NAME", help="one per row")
  parser.add_argument("--keep", metavar="FILE.json", help="write the scores of the runs there, too")
  args = parser.parse_args(arguments)
  if args.keep and not args.keep.endswith(kept.SUFFIX):
    raise InputError(f"--keep={args.keep}: expected a file called *{kept.SUFFIX}")
  runs, left_out = [], []
  normal = [name if is_bucket(name) else os.path.normpath(name) for name in args.runs]
  for directory in dict.fromkeys(normal):
    try:
      runs += kept.read(directory) if directory.endswith(kept.SUFFIX) else [read_run(directory)]
    except (InputError, OSError) as error:
      left_out.append(str(error))
  if not runs:
    raise InputError("no readable run: " + "; ".join(left_out))
  rows, repeated = group_runs(runs, args.labels)
  if args.keep:
    print(f"Kept: {kept.keep(args.keep, runs)}, {len(runs)} runs")
  out = write(expand(args.out), rows, left_out + repeated)
  print("\n\n".join(filter(None, [score_table(rows), evaluation_table(rows)])))
  for reason in left_out + repeated:
    print(f"left out: {reason}")
  print(f"Written: {out}/report.md, report.csv, report.json, {', '.join(figure_names(rows))}")
  return 0
