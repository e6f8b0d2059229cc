"""Many runs side by side: python -m rpn_jax.report runs/* --out=runs/report

Runs that differ only in their seed make one row: mean ± sample standard deviation over seeds. A row
is called after a few config fields that tell it from the others, without the values that most rows
share; the row that has all of these is "base". Written are report.md, report.csv and report.json
(both in fractions, not percent) and report.png. Runs that cannot be read are listed with the
reason.
"""

import argparse
import contextlib
import csv
import dataclasses
import io
import json
import os
import pathlib
import re
import sys
import textwrap
from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np

from rpn_jax import visualize
from rpn_jax.checkpoint import FREE_FIELDS
from rpn_jax.errors import InputError
from rpn_jax.logging import read_history, table, write_json

SELECTED = "selected on the evaluation classes"
METRICS = ("pAcc", "miou_gt", "miou_union", "miou_seen", "miou_unseen", "hiou")
# A value in a row's name; longer ones are cut there, not in report.json.
VALUE_LETTERS = 40


@dataclasses.dataclass(frozen=True)
class Run:
  """What a workdir tells.

  Attributes:
    directory: the workdir.
    config: nested fields, as in `metrics.json`.
    last, best: metrics, with the step.
    history: name -> [(step, value)], empty for a run without training.
    evaluations: data set -> metrics, of `--mode=eval` after the training.
    trained_parameters: how many; None where the files do not say.
  """

  directory: pathlib.Path
  config: Mapping
  last: Mapping
  best: Mapping
  history: Mapping[str, Sequence[tuple[int, float]]]
  evaluations: Mapping[str, Mapping]
  trained_parameters: int | None = None


@dataclasses.dataclass(frozen=True)
class Row:
  """Runs that differ only in their seed, under one name.

  Attributes:
    label: the name.
    runs: at least one.
    beside: title -> text, further columns of the table, the same titles in all rows.
  """

  label: str
  runs: tuple[Run, ...]
  beside: Mapping[str, str] = dataclasses.field(default_factory=dict)

  def values(self, checkpoint: str, metric: str) -> list[float]:
    """The metric of every run, at its "last" or "best" checkpoint; [] where one has none."""
    values = [getattr(run, checkpoint).get(metric) for run in self.runs]
    return [] if None in values else values

  def evaluated(self, name: str, metric: str) -> list[float]:
    """The metric of every run on a data set evaluated afterwards; [] where one was not."""
    values = [run.evaluations.get(name, {}).get(metric) for run in self.runs]
    return [] if None in values else values

  def curve(self, metric: str) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Steps, means and deviations of an evaluated metric; None if there is no common step.

    Only steps that all runs have are averaged, since a mean over fewer seeds would jump.
    """
    points = [
      {s: v for s, v in run.history.get(f"eval/{metric}", ()) if np.isfinite(v)}
      for run in self.runs
    ]
    steps = sorted(set.intersection(*map(set, points)))
    if not steps:
      return None
    values = np.array([[p[s] for s in steps] for p in points], np.float64)
    deviation = values.std(0, ddof=1) if len(values) > 1 else np.zeros(len(steps))
    return np.array(steps), values.mean(0), deviation


def read_run(directory) -> Run:
  """The run in a workdir.

  Raises:
    InputError: there is none, it has not ended, or a file of it is damaged.
  """
  directory = pathlib.Path(directory)
  if not (directory / "metrics.json").exists():
    raise InputError(_why_missing(directory))
  config, last, best, trained = _read_scores(directory / "metrics.json")
  total = config.get("steps", 0)
  if config.get("method") != "training_free" and last["step"] < total:
    raise InputError(
      f"{directory}: not finished, step {last['step']} of {total}; repeat its command"
    )
  history = read_history(directory / "metrics.jsonl")
  evaluations = {}
  path = directory / "eval.json"
  if path.exists():
    evaluations = _read_evaluations(path, config["data"]["name"])
    for evaluated in evaluations.values():
      if evaluated["step"] != last["step"]:
        raise InputError(
          f"{path}: of step {evaluated['step']}, and the run ended at {last['step']}; "
          "repeat --mode=eval"
        )
  return Run(directory, config, last, best, history, evaluations, trained)


def _read_scores(path: pathlib.Path) -> tuple[dict, dict, dict, int | None]:
  """Config, last and best metrics and size of a file that `evaluate.write_metrics` wrote."""
  with _complaint(path):
    content = json.loads(path.read_text())
    config = dict(content["config"])
    if not config["data"]["name"]:
      raise ValueError
    trained = content.get("trained_parameters")
    return config, _numbers(content["last"]), _numbers(content["best"]), trained


def _read_evaluations(path: pathlib.Path, trained_on: str) -> dict[str, dict]:
  """Data set -> metrics of the last checkpoint, of one set or of `config.eval.sets`."""
  with _complaint(path):
    content = json.loads(path.read_text())
    sets = content.get("sets") or {trained_on: content}
    return {name: _numbers(result["last"]) for name, result in sets.items()}


def _numbers(scores: Mapping) -> dict:
  scores = {m: scores.get(m) for m in ("step", *METRICS)}
  if not isinstance(scores["step"], int):
    raise ValueError
  if not np.isfinite([v for v in scores.values() if v is not None]).all():
    raise ValueError
  return scores


@contextlib.contextmanager
def _complaint(path: pathlib.Path):
  try:
    yield
  except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
    raise InputError(
      f"{path}: expected config, last and best scores of a segmentation run; "
      "it is damaged or of another task"
    ) from None


def _why_missing(directory: pathlib.Path) -> str:
  if not directory.is_dir():
    return f"{directory}: no such folder"
  config, history = directory / "config.json", directory / "metrics.jsonl"
  if config.exists() or history.exists():
    steps = [s for points in read_history(history).values() for s, _ in points]
    try:
      total = json.loads(config.read_text())["config"]["steps"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
      total = "?"
    return f"{directory}: not finished, step {max(steps, default=0)} of {total}; repeat its command"
  inside = sum((child / "metrics.json").exists() for child in directory.iterdir())
  hint = f"; {inside} folders in it have one: give {directory}/*" if inside else ""
  return f"{directory}: no metrics.json{hint}"


def flatten(config: Mapping, prefix: str = "") -> dict:
  """{"model.head": "paper", …} of nested fields."""
  flat = {}
  for name, value in config.items():
    path = f"{prefix}{name}"
    flat |= flatten(value, f"{path}.") if isinstance(value, Mapping) else {path: value}
  return flat


def differing(configs: Sequence[Mapping]) -> dict[str, list[str]]:
  """Field -> its value in each config, as text, for the fields in which they differ.

  The seed and fields that do not change a result (`checkpoint.FREE_FIELDS`) are left out.
  """
  flat = [flatten(config) for config in configs]
  fields = list(dict.fromkeys(name for config in flat for name in config))
  texts = {
    name: [_text(config[name]) if name in config else "absent" for config in flat]
    for name in fields
    if name != "seed" and name.rpartition(".")[2] not in FREE_FIELDS
  }
  return {name: values for name, values in texts.items() if len(set(values)) > 1}


def _text(value) -> str:
  return value if isinstance(value, str) else repr(value)


def rows_of(runs: Sequence[Run], labels: Sequence[str] = ()) -> tuple[list[Row], list[str]]:
  """Runs as rows, in order, and why some are left out.

  Args:
    runs: at least one.
    labels: names for the rows, in their order; without, they are named after what differs: the
      fewest fields found that tell all rows apart.

  Raises:
    InputError: another number of labels than there are rows, or one given twice.
  """
  fields = differing([run.config for run in runs])
  groups: dict[tuple, dict] = {}
  left_out = []
  for i, run in enumerate(runs):
    seeds = groups.setdefault(tuple(values[i] for values in fields.values()), {})
    first = seeds.setdefault(run.config.get("seed"), run)
    if first is not run:
      left_out.append(f"{run.directory}: config and seed of {first.directory}, which is counted")
  members = [tuple(seeds.values()) for seeds in groups.values()]
  if labels:
    if len(labels) != len(members) or len(set(labels)) != len(labels):
      shown = "; ".join(f"{i}: {m[0].directory}" for i, m in enumerate(members, 1))
      raise InputError(
        f"--labels: expected {len(members)} different names, got {len(labels)}; the rows begin "
        f"with {shown}"
      )
  else:
    labels = _labels(members, list(fields), list(groups))
  return [Row(label, runs) for label, runs in zip(labels, members)], left_out


def _labels(members, fields: list[str], keys: list[tuple]) -> list[str]:
  """A name for every row: its values of a few fields in which all rows differ.

  Values that more than half of the rows share go without saying.
  """
  pairs = list(combinations(range(len(keys)), 2))
  chosen = []
  while pairs:
    told = [sum(keys[a][k] != keys[b][k] for a, b in pairs) for k in range(len(fields))]
    # Of two fields that tell as much the one that takes less room.
    letters = [len(name) + max(len(key[k]) for key in keys) for k, name in enumerate(fields)]
    best = max(range(len(fields)), key=lambda k: (told[k], -letters[k]))
    chosen.append(best)
    pairs = [(a, b) for a, b in pairs if keys[a][best] == keys[b][best]]
  if not chosen:
    name = members[0][0].directory.resolve().name
    return [re.sub(r"[_. -]*(seed)?[_. -]*\d+$", "", name) or name]
  usual = {k: [key[k] for key in keys] for k in sorted(chosen)}
  labels = [
    ", ".join(
      f"{fields[k]}={_cut(key[k])}" for k in usual if 2 * usual[k].count(key[k]) <= len(keys)
    )
    for key in keys
  ]
  return [
    (label or "base") if labels.count(label) == 1 else f"{label} ({runs[0].directory.name})"
    for label, runs in zip(labels, members)
  ]


def _cut(text: str) -> str:
  return text if len(text) <= VALUE_LETTERS else text[: VALUE_LETTERS - 1] + "…"


def columns(rows: Sequence[Row]) -> tuple[str, ...]:
  """The metrics to show: of seen and unseen classes where there are such, else the means."""
  if any(row.values("last", "hiou") for row in rows):
    return ("miou_seen", "miou_unseen", "hiou")
  return ("miou_gt", "miou_union")


def mean_and_deviation(values: Sequence[float]) -> str:
  """Percent: "42.4 ± 0.6" (sample standard deviation), "42.4" for one value, "-" for none."""
  if not values:
    return "-"
  values = 100 * np.array(values, np.float64)
  spread = f" ± {values.std(ddof=1):.1f}" if len(values) > 1 else ""
  return f"{round(values.mean(), 1) + 0.0:.1f}{spread}"  # no "-0.0"


def score_table(rows: Sequence[Row], *, markdown: bool = False) -> str:
  """Scores in percent, a line per row: of the last checkpoints, then of the best ones."""
  shown = [("last", "pAcc"), *(("last", m) for m in columns(rows))]
  shown += [("best", m) for m in columns(rows)]
  heads = [("best* " if c == "best" else "") + visualize.METRICS[m] for c, m in shown]
  cells = [
    [
      i, row.label, len(row.runs),
      *(mean_and_deviation(row.values(c, m)) for c, m in shown), *row.beside.values(),
    ]
    for i, row in enumerate(rows, 1)
  ]  # fmt: skip
  heads = ["row", "%", "seeds", *heads, *rows[0].beside]
  text = table(cells, heads, markdown=markdown)
  note = f"Last checkpoint, mean ± sample standard deviation over seeds; best*: {SELECTED}."
  return f"{text}\n\n{note}"


def evaluation_table(rows: Sequence[Row], *, markdown: bool = False) -> str:
  """Mean IoU in percent on the sets that were evaluated after the training; "" if none was."""
  sets = dict.fromkeys(name for row in rows for run in row.runs for name in run.evaluations)
  shown = [(name, m) for name in sets for m in ("miou_gt", "miou_union")]
  cells = [
    [i, row.label, *(mean_and_deviation(row.evaluated(*column)) for column in shown)]
    for i, row in enumerate(rows, 1)
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
    row_is = {"label": row.label, "beside": dict(row.beside), "config": config}
    summaries.append({**row_is, **scores, "runs": runs})
  return {"rows": summaries, "left_out": list(left_out), "best": SELECTED}


def write(out, rows: Sequence[Row], left_out: Sequence[str] = ()) -> pathlib.Path:
  """Writes report.md, report.csv, report.json and report.png into a folder, which it returns."""
  out = pathlib.Path(out)
  out.mkdir(parents=True, exist_ok=True)
  content = summary(rows, left_out)
  write_json(out / "report.json", content)

  fields = list(content["rows"][0]["config"])
  lines = [score_table(rows, markdown=True), "", "![Scores](report.png)"]
  if evaluations := evaluation_table(rows, markdown=True):
    lines += ["", evaluations]
  if fields:
    cells = [[i, *row["config"].values()] for i, row in enumerate(content["rows"], 1)]
    lines += ["", "All that differs:", "", table(cells, ["row", *fields], markdown=True)]
  if left_out:
    lines += ["", "Left out:", "", *(f"- {reason}" for reason in left_out)]
  _write_text(out / "report.md", "\n".join(lines) + "\n")

  names = [(c, m) for c in ("last", "best") for m in METRICS]
  heads = [f"{c}_{m}_{part}" for c, m in names for part in ("mean", "deviation")]
  text = io.StringIO()
  writer = csv.writer(text, lineterminator="\n")
  beside = list(rows[0].beside)
  writer.writerow(["label", "seeds", *heads, *fields, *beside])
  for row in content["rows"]:
    scores = [row[c].get(m, {}).get(part) for c, m in names for part in ("mean", "deviation")]
    scores += [*row["config"].values(), *row["beside"].values()]
    writer.writerow([row["label"], len(row["runs"]), *scores])
  _write_text(out / "report.csv", text.getvalue())

  plot(out / "report.png", rows)
  return out


def _write_text(path: pathlib.Path, text: str) -> None:
  visualize.write(path, lambda file: file.write(text.encode()))


def plot(path, rows: Sequence[Row]) -> pathlib.Path:
  """Writes a PNG: a bar for every row and metric, and below it the curves over training steps.

  Bars are the last checkpoints, with ± one deviation over seeds; a row has one colour and one
  number in all panels.
  """
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  metrics = columns(rows)
  curves = [{m: c for m in metrics if (c := row.curve(m))} for row in rows]
  labels = [textwrap.fill(row.label, 44, break_on_hyphens=False) for row in rows]
  heights = [0.18 * (label.count("\n") + 1) + 0.2 for label in labels]
  bars_high = max(1.2, sum(heights)) + 0.6
  # A single evaluation is no curve, and its bar says it all.
  curves_high = 3.6 if any(len(steps) > 1 for c in curves for steps, *_ in c.values()) else 0

  figure = Figure(figsize=(5 + 3.6 * len(metrics), bars_high + curves_high), dpi=110)
  FigureCanvasAgg(figure)
  figure.set_layout_engine("constrained", w_pad=0.1, h_pad=0.1)
  ratios = [bars_high, curves_high] if curves_high else [bars_high]
  axes = figure.subplots(len(ratios), len(metrics), squeeze=False, height_ratios=ratios)

  # A row is as high as its name.
  ends = np.cumsum(heights)
  centres = ends - np.array(heights) / 2
  styles = [visualize.style(i) for i in range(len(rows))]
  for column, metric in enumerate(metrics):
    ax = axes[0, column]
    for i, row in enumerate(rows):
      values = row.values("last", metric)
      if not values:
        continue
      mean = 100 * np.mean(values)
      deviation = 100 * np.std(values, ddof=1) if len(values) > 1 else 0.0
      error = {"xerr": deviation, "ecolor": "0.2", "capsize": 3} if deviation else {}
      ax.barh(centres[i], mean, 0.26, color=styles[i]["color"], alpha=0.85, **error)
      ax.annotate(
        mean_and_deviation(values),
        (mean + deviation, centres[i]),
        (6, 0),
        textcoords="offset points",
        va="center",
        fontsize=9,
      )
    ax.set_title(f"{visualize.METRICS[metric]} (%)", loc="left", fontsize=12, fontweight="bold")
    ax.set_ylim(ends[-1], 0)
    # Room for the numbers behind the bars.
    ax.set_xlim(0, 1.45 * max(1, ax.dataLim.x1))
    ax.set_yticks(centres, [f"{label}  [{i}]" for i, label in enumerate(labels, 1)])
    if column:
      ax.set_yticklabels([])
    ax.tick_params(axis="y", length=0, labelsize=9)
    ax.grid(True, axis="x", color="0.9", linewidth=0.8)
    if not curves_high:
      continue
    ax = axes[1, column]
    for i, curves_of_row in enumerate(curves):
      if not curves_of_row:
        continue
      # A row without this metric leaves no line here, only its place in the legend.
      steps, mean, deviation = curves_of_row.get(metric, np.zeros((3, 0)))
      marker = "o" if len(steps) < visualize.SMOOTH_FROM else None
      ax.plot(steps, 100 * mean, marker=marker, markersize=3, label=f"[{i + 1}]", **styles[i])
      if deviation.any():
        band = 100 * (mean - deviation), 100 * (mean + deviation)
        ax.fill_between(steps, *band, color=styles[i]["color"], alpha=0.15, linewidth=0)
    visualize.step_ticks(ax)
    ax.set_xlabel("training step")
    ax.grid(True, color="0.9", linewidth=0.8)
  for ax in axes.ravel():
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
  if curves_high:
    axes[1, 0].set_ylabel("score (%)")
    visualize.legend_beside(axes[1, -1])
  return visualize.write(path, lambda file: figure.savefig(file, format="png"))


def main(arguments=None) -> int:
  parser = argparse.ArgumentParser(prog="python -m rpn_jax.report", description=__doc__)
  parser.formatter_class = argparse.RawDescriptionHelpFormatter
  parser.add_argument("runs", nargs="+", metavar="RUN", help="workdirs")
  parser.add_argument("--out", default="report", help="folder for the files (default: report)")
  parser.add_argument("--labels", nargs="+", default=(), metavar="NAME", help="one per row")
  args = parser.parse_args(arguments)
  runs, left_out = [], []
  for directory in dict.fromkeys(os.path.normpath(name) for name in args.runs):
    try:
      runs.append(read_run(directory))
    except (InputError, OSError) as error:
      left_out.append(str(error))
  try:
    if not runs:
      raise InputError("no readable run:\n" + "\n".join(left_out))
    rows, repeated = rows_of(runs, args.labels)
    out = write(args.out, rows, left_out + repeated)
  except (InputError, OSError) as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  print("\n\n".join(filter(None, [score_table(rows), evaluation_table(rows)])))
  for reason in left_out + repeated:
    print(f"left out: {reason}")
  print(f"Written: {out}/report.md, report.csv, report.json, report.png")
  return 0


if __name__ == "__main__":
  sys.exit(main())
