"""The study's tables and figures, from scores that were kept: nothing is trained.

    python -m rpn_jax study docs/study/runs.json --out=docs/study

The file is what `sweep --keep` wrote of a config file like configs/study.py, which says by TOWERS,
GAINS and AXES what is compared with what. Beside the scores, a towers.json in the same folder tells
of each tower: its zero-shot accuracy and how local its patches are. Records of towers that were
made here, runs/study/towers/NAME/metrics.json and locality.json, are added to it.

Written: study.md, all tables, gains by groups of classes and at equal rates, and which runs are
missing; locality.png, the gain of relationship prompts around each tower by the measures of
locality; data.png, by seen classes and training scenes.
"""

import argparse
import json
import os
import pathlib
import textwrap
from collections.abc import Mapping, Sequence

import numpy as np

from rpn_jax.analysis import gains, kept, rates, report
from rpn_jax.analysis.gains import MEASURES, Gain
from rpn_jax.analysis.plan import Plan, read_tables
from rpn_jax.analysis.runs import Row
from rpn_jax.analysis.sweep import compared
from rpn_jax.base.errors import InputError
from rpn_jax.base.paths import expand, write_json, write_text
from rpn_jax.drawing.images import save_png
from rpn_jax.drawing.plots import figure, legend_beside, line_style

# Where `make study` makes the towers.
TOWERS = "runs/study/towers"
RECORDS = {
  "metrics.json": ("top1", "images", "seconds"),
  "locality.json": (*MEASURES, "fingerprint"),
}


def open_plan(path: pathlib.Path) -> Plan:
  """The sweep that keeps a file, with the rates that it chose.

  Raises:
    InputError: it is no such file, or its config file has gone.
  """
  settings = kept.read_content(path).sweep
  if settings is None:
    raise InputError(f"{path}: expected a file of `sweep --keep`, got one of `report --keep`")
  if not os.path.isfile(settings["file"]):
    raise InputError(
      f"{path}: is of {settings['file']}, which is not here: run this in the folder of the clone "
      "that the sweep was run in"
    )
  content, root = read_tables(settings["file"]), path.parent
  results = kept.Results(root, path, settings, only_kept=True)
  tuned = "tuning" in settings
  plan = Plan(
    settings["file"], settings["config"], content, root, settings["flags"], results, tuned
  )
  if tuned:
    plan.choose(plan.trials(list(content["TABLES"])))
  return plan


def draw_locality(path, towers: Mapping[str, Mapping], found: Sequence[Gain]) -> None:
  """Writes a PNG: gains by each measure of locality, a point for each tower."""
  fig, axes = figure((16, 5), 1, len(MEASURES), sharey=True)
  series = list(dict.fromkeys(gain.series for gain in found))
  for ax, (measure, title) in zip(axes[0], MEASURES.items()):
    at_place: dict[str, float] = {}
    ax.margins(x=0.2)  # for names, and for series beside each other
    for i, name in enumerate(series):
      points = [
        (100 * towers[gain.place][measure], *gain.point, gain.place)
        for gain in found
        if gain.series == name and towers.get(gain.place, {}).get(measure) is not None
      ]
      if not points:
        continue
      x, y, half, places = zip(*points)
      _points(ax, x, y, half, i, name, line=False)
      at_place |= dict(zip(places, x))
    # A line for each, since several may be at one place.
    for i, place in enumerate(sorted(at_place, key=lambda place: at_place[place])):
      at = at_place[place], 0.98 - 0.055 * i
      ax.annotate(place, at, xycoords=("data", "axes fraction"), ha="center", va="top", fontsize=9)
      ax.axvline(at[0], color="0.85", linewidth=0.8, zorder=0)
    ax.axhline(0, color="0.4", linewidth=0.8)
    ax.set_xlabel(textwrap.fill(title, 30))
  bottom, top = axes[0, 0].get_ylim()
  below = max(0.1, 0.97 - 0.055 * len(towers))  # the part of the axis that names leave
  axes[0, 0].set_ylim(bottom, bottom + (top - bottom) / below)
  axes[0, 0].set_ylabel("gain in hIoU (points)")
  axes[0, 0].set_title(
    "Each tower: seeds' mean, 95 % interval (hollow: one seed)", loc="left", fontsize=12
  )
  if series:
    legend_beside(axes[0, -1])
  save_png(path, fig)


def draw_axes(path, axes_of: Mapping[str, Mapping[int, str]], found: Sequence[Gain]) -> None:
  """Writes a PNG: gains by a number, such as that of seen classes: title -> number -> table."""
  fig, axes = figure((4.6 * len(axes_of) + 3, 4.4), 1, len(axes_of), sharey=True)
  places_of: dict[str, set[str]] = {}
  for gain in found:
    places_of.setdefault(gain.series, set()).add(gain.place)
  # Beside lines, a point of its own shows nothing of what the axes are about.
  series = [name for name, there in places_of.items() if len(there) > 1] or list(places_of)
  for ax, (title, places) in zip(axes[0], axes_of.items()):
    ax.margins(x=0.12)  # for series beside each other
    for i, name in enumerate(series):
      by_place = {gain.place: gain.point for gain in found if gain.series == name}
      points = [(x, *by_place[place]) for x, place in sorted(places.items()) if place in by_place]
      if points:
        x, y, half = zip(*points)
        _points(ax, x, y, half, i, name, line=True)
    ax.axhline(0, color="0.4", linewidth=0.8)
    ax.set_xscale("log", base=2)
    ax.set_xticks(list(places), [f"{x:,}" for x in places])
    ax.set_xlabel(title)
  axes[0, 0].set_ylabel("gain in hIoU (points)")
  if series:
    legend_beside(axes[0, -1])
  save_png(path, fig)


def _points(
  ax, x: Sequence, y: Sequence, half: Sequence, i: int, label: str, *, line: bool
) -> None:
  """Series i, four points of the page right of the one before: they share their places."""
  from matplotlib.transforms import ScaledTranslation

  style = {"color": line_style(i)["color"], "label": label, "capsize": 3, "markersize": 5}
  drawn = ax.errorbar(x, y, half, fmt="os^Dv"[i % 5] + ("-" if line else ""), **style)
  artists = [*drawn.get_children()]
  single = [at for at, of_point in zip(zip(x, y), half) if np.isnan(of_point)]
  if single:  # hollow: without an interval nobody knows how far these may be off
    artists += ax.plot(*zip(*single), "os^Dv"[i % 5], color="white", markersize=3, zorder=4)
  # Afterwards, so that the axis is that of the places.
  aside = ax.transData + ScaledTranslation(4 * i / 72, 0, ax.figure.dpi_scale_trans)
  for artist in artists:
    artist.set_transform(aside)


def read_towers(folder: pathlib.Path, made: Mapping[str, pathlib.Path]) -> dict[str, dict]:
  """towers.json of a folder, with the records of towers that were made here, which is written.

  Args:
    folder: of towers.json.
    made: tower -> workdir of its pre-training.

  Raises:
    InputError: a damaged file, or a record of another tower than that of towers.json.
  """
  path, towers = folder / "towers.json", {}
  if path.exists():
    towers = _read_object(path)
  before = json.dumps(towers)
  for name, workdir in made.items():
    for file, keys in RECORDS.items():
      if (workdir / file).exists():
        record = _read_object(workdir / file)
        there = towers.setdefault(name, {})
        if there.get("fingerprint") not in (None, record.get("fingerprint")):
          raise InputError(
            f"{workdir / file}: is of a tower with fingerprint {record.get('fingerprint')}, "
            f"{path} has {there['fingerprint']}: one of both was made elsewhere; delete the other's"
          )
        there |= {key: record[key] for key in (*keys, "fingerprint") if key in record}
  if json.dumps(towers) != before:
    write_json(path, towers)
  return towers


def _read_object(path: pathlib.Path) -> dict:
  try:
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
      raise ValueError
    return content
  except (OSError, ValueError) as error:
    raise InputError(f"{path}: expected JSON with the records of towers, got {error}") from None


def missing_runs(plan: Plan, table: str, there: Sequence[Row], seeds: int) -> str:
  """ "lpm 0, 1, 2; rpn 2": labels and seeds of a table's runs that are not there, and why.

  Args:
    plan: of the sweep.
    table: its name.
    there: its rows that have a run.
    seeds: how many there should be.
  """
  rows = plan.content["TABLES"][table]
  found = {row.label: {run.config["seed"] for run in row.runs} for row in there}
  given_up = plan.diverged(rows, seeds)
  lines = []
  for label, changes in rows.items():
    if plan.workdir(changes, 0) is None:
      lines.append(f"{label} (no rate yet)")
      continue
    absent = [seed for seed in plan.workdirs(changes, seeds) if seed not in found.get(label, ())]
    texts = [f"{s} (diverged)" if s in given_up.get(label, ()) else str(s) for s in absent]
    if texts:
      lines.append(f"{label} {', '.join(texts)}")
  return "; ".join(lines)


def _of_no_row(plan: Plan, trials: Mapping[str, Sequence[rates.Trial]], seeds: int) -> list[str]:
  """Names of kept runs that no row asks for, as after a change of a row or of its chosen rate."""
  rows = plan.rows(list(plan.content["TABLES"]))
  asked = [w for _, changes in rows for w in plan.workdirs(changes, seeds).values()]
  asked += [trial.workdir for of_row in trials.values() for trial in of_row]
  names = {plan.results.name(workdir) for workdir in asked if workdir is not None}
  return [name for name in plan.results.runs() if name not in names]


def _check_towers(path: pathlib.Path, known: Mapping[str, Mapping], rows: Mapping) -> None:
  """That runs around a tower are around the one whose measures are known."""
  for name, record in known.items():
    for run in [run for row in rows.get(name, ()) for run in row.runs]:
      if record.get("fingerprint") not in (None, run.clip) and run.clip:
        raise InputError(
          f"{run.directory} is around a tower with fingerprint {run.clip}, {path} measured "
          f"{name} with {record['fingerprint']}: one was made elsewhere; remove the other's record"
        )


def write(plan: Plan, folder: pathlib.Path, out: pathlib.Path, seeds: int) -> list[pathlib.Path]:
  """Writes what the module says; returns the files, figures only where there is something to draw.

  Args:
    plan: of the sweep.
    folder: of towers.json.
    out: the files go there.
    seeds: what a row should have; more are taken, too.
  """
  content = plan.content
  tables, names = content["TABLES"], content.get("TOWERS", ())
  known = read_towers(folder, {name: expand(TOWERS) / name for name in names})
  towers = {name: known.get(name, {}) for name in names}
  most = max([seeds, *(1 + run.config["seed"] for run in plan.results.runs().values())])
  trials = plan.trials(list(tables)) if plan.tuned else {}
  plan.check_runs(list(tables), trials, most, tuple(plan.results.settings.get("tuning", ())))
  rows, absent, sections = {}, [], []
  for name in tables:
    rows[name], _ = compared(plan, name, most)
    if rows[name]:
      sections += ["", f"## {name}", "", report.score_table(rows[name], markdown=True)]
    if missing := missing_runs(plan, name, rows[name], seeds):
      absent.append(f"- {name}: {missing}")
  _check_towers(folder / "towers.json", known, rows)
  pairs = content.get("GAINS", {})
  found = gains.gains(rows, pairs, list(tables))
  head = ["# Tables of the study", "", gains.tower_table(towers, rows, found)]
  others = (
    gains.trend_table(towers, found),
    gains.group_table(rows, pairs, towers),
    gains.rate_table(plan, trials, pairs, towers),
  )
  for text in filter(None, others):
    head += ["", text]
  if plan.tuned:
    tried = {row: t for row, t in trials.items() if any(x.score is not None for x in t)}
    notes = [f"- {note}" for note in rates.notes(tried)]
    head += ["", "## Rates", "", rates.rate_table(tried, markdown=True), "", *notes]
  last = ["", "## Missing runs, by their seeds", "", *absent] if absent else []
  if strays := _of_no_row(plan, trials, most):
    last += ["", "## Kept runs of no row", "", *(f"- {name}" for name in strays)]
  out.mkdir(parents=True, exist_ok=True)
  files = [out / "study.md"]
  write_text(files[0], "\n".join([*head, *sections, *last]) + "\n")
  around = [g for g in found if any(key in towers.get(g.place, {}) for key in MEASURES)]
  if around:
    files.append(out / "locality.png")
    draw_locality(files[-1], towers, around)
  axes_of = content.get("AXES", {})
  of_axes = {place for places in axes_of.values() for place in places.values()}
  if axes_of and any(g.place in of_axes for g in found):
    files.append(out / "data.png")
    draw_axes(files[-1], axes_of, [g for g in found if g.place in of_axes])
  return files


def main(arguments: list[str]) -> int:
  parser = argparse.ArgumentParser(prog="rpn study", description=__doc__)
  parser.formatter_class = argparse.RawDescriptionHelpFormatter
  parser.add_argument("runs", metavar="FILE.json", help="of `sweep --keep`")
  parser.add_argument("--out", help="folder for the files (default: that of FILE.json)")
  parser.add_argument("--seeds", type=int, default=3, help="of every row (%(default)s)")
  args = parser.parse_args(arguments)
  if args.seeds < 1:
    raise InputError(f"--seeds={args.seeds}: expected 1 or more")
  path = expand(args.runs)
  out = expand(args.out) if args.out else path.parent
  files = write(open_plan(path), path.parent, out, args.seeds)
  print(files[0].read_text(encoding="utf-8"))
  print(f"Written: {', '.join(map(str, files))}")
  return 0
