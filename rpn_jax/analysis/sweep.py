"""A table of ablations, row by row: python -m rpn_jax sweep table5 --config=FILE --seeds=3

FILE is a config file with TABLES, such as configs/ablations.py:dataset=shapes; words behind the
colon are for every row. Each row and seed is a run of main.py in a workdir of its own under --root;
other --config.… flags are passed on to all of them. Finished runs are not repeated, and rows with
the same settings are one run in all tables. Ctrl-C and SIGTERM save the runs under way; the same
command continues them. A failed run is listed with its log and tried again by the next call.

--tune-lr first finds a learning rate for every row, see `rpn_jax.analysis.rates`: of the grid of
the config file the one with the best score on held-out training images; the runs of the table then
use it. A row that sets optimizer.base_lr or optimizer.groups keeps them. The scores by rate are in
ROOT/report/rates.

--keep=FILE.json adds the scores of each run that ends to a small file, and takes those that it has
for done: with it a sweep goes on where its workdirs are not, on another machine or another day.
--together=N trains up to N runs that differ by seed or learning rate only as one program, see `rpn
train_together --help`: on an accelerator, which one small run would leave idle.
Weights that the config file has under WEIGHTS are pre-trained first, where a run needs them.

At the end the table is printed, with the paper's scores where they are known, and written to
ROOT/report/TABLE as Markdown, CSV, JSON and a plot with error bars. Of several tables, "all" or
names joined by commas, the runs of the first seed come first.
"""

import argparse
import dataclasses
import os
import pathlib
import signal
import sys
from collections.abc import Callable, Mapping, Sequence

from rpn_jax.analysis import kept, paired, rates, report
from rpn_jax.analysis.jobs import run_all
from rpn_jax.analysis.plan import (
  Plan,
  check_passed_on,
  check_weights,
  claim,
  directory,
  is_free,
  is_made,
  key,
  read_tables,
)
from rpn_jax.analysis.runs import FinishedRun, Row
from rpn_jax.base.console import progress
from rpn_jax.base.errors import InputError
from rpn_jax.base.paths import expand, expand_local
from rpn_jax.inference import published

HELD_OUT = 0.2  # share of the training images
# Points of hIoU between the last two evaluations; a row that moves less has converged.
CONVERGED = 1.0
LATE_CHANGE = "hIoU since the evaluation before"


def interrupt(*_: object) -> None:
  """SIGTERM ends a sweep as Ctrl-C does, and with it its runs."""
  raise KeyboardInterrupt


def table_rows(
  rows: Mapping[str, Mapping],
  workdir: Callable[[Mapping, int], pathlib.Path | None],
  seeds: int,
  read: Callable[[pathlib.Path], FinishedRun],
) -> tuple[list[Row], list[str]]:
  """The rows of which at least one seed is there, and what is missing.

  Args:
    rows: label -> changes.
    workdir: of changes and a seed; None where no rate was chosen for them.
    seeds: how many.
    read: the run of a workdir.
  """
  found, missing = [], []
  for label, changes in rows.items():
    runs = []
    for seed in range(1 if is_free(changes) else seeds):  # has no seeds
      try:
        if (directory := workdir(changes, seed)) is None:
          raise InputError("no rate was chosen for it")
        runs.append(read(directory))
      except (InputError, OSError) as error:
        missing.append(f"{label}, seed {seed}: {error}")
    if runs:
      found.append(Row(label, tuple(runs)))
  return found, missing


def late_change(row: Row) -> str:
  """How much the mean hIoU moved between the last two evaluations, in points, and whether that is
  more than CONVERGED; "-" where there are not two."""
  curve = row.curve("hiou")
  if curve is None or len(curve[0]) < 2:
    return "-"
  change = round(100 * float(curve[1][-1] - curve[1][-2]), 1) + 0.0  # no "-0.0"
  return f"{change:+.1f}" + (", not converged" if abs(change) >= CONVERGED else "")


def extra_columns(
  table: str,
  row: Row,
  references: Mapping[str, Row | None],
  diverged: Mapping[str, Sequence[int]],
) -> dict[str, str]:
  """Further columns of a row: title -> text.

  Args:
    table: its name.
    row: what the columns are of.
    references: label -> row to which differences are taken; None if it is not there.
    diverged: label -> seeds of which there is no score; there is a column if there are any.
  """
  columns = {
    "trained": f"{row.runs[0].trained_parameters or 0:,}",
    LATE_CHANGE: late_change(row),
  }
  for label, reference in references.items():
    values = paired.differences(row, reference) if reference else []
    columns[f"hIoU less {label}'s [95 %]"] = paired.mean_and_interval(values, len(row.runs))
  if diverged:
    columns["diverged seeds"] = ", ".join(map(str, diverged.get(row.label, ()))) or "-"
  if table == "table10":
    columns["paper, VOC hIoU"] = str(published.TUNERS.get(row.label, "-"))
  return columns


def main(arguments: list[str]) -> int:
  parser = argparse.ArgumentParser(prog="rpn sweep", description=__doc__)
  parser.formatter_class = argparse.RawDescriptionHelpFormatter
  parser.add_argument("tables", help='e.g. table5, or table4,table5, or "all"')
  parser.add_argument("--config", default="configs/ablations.py", help="file with TABLES[:words]")
  parser.add_argument("--seeds", type=int, default=3, help="runs of every row (default 3)")
  parser.add_argument("--jobs", type=int, default=1, help="runs at a time, sharing the cores")
  parser.add_argument("--together", type=int, default=1, help="runs of a process (default 1)")
  parser.add_argument("--root", default="runs/sweep", help="where the runs go")
  parser.add_argument("--tune-lr", action="store_true", help="choose a learning rate for every row")
  parser.add_argument(
    "--held-out", type=float,
    help=f"share of the training images that --tune-lr chooses rates on ({HELD_OUT})",
  )  # fmt: skip
  parser.add_argument(
    "--tune-steps", type=int, metavar="N", help="steps of the runs that --tune-lr compares"
  )
  parser.add_argument("--keep", metavar="FILE.json", help="what has ended, here or elsewhere")
  args, passed_on = parser.parse_known_args(arguments)
  path, _, words = args.config.partition(":")
  root = expand_local(args.root, "--root")
  wrong = [flag for flag in passed_on if not flag.startswith("--config.")]
  if wrong:
    raise InputError(f"unknown argument {wrong[0]!r}; only --config.… flags are passed on")
  if min(args.seeds, args.jobs, args.together) < 1:
    raise InputError("--seeds, --jobs and --together: expected 1 or more")
  if not os.path.exists("main.py"):
    raise InputError("no main.py here: run this in the folder of a clone of the project")
  if args.keep and not args.keep.endswith(kept.SUFFIX):
    raise InputError(f"--keep={args.keep}: expected a file called *{kept.SUFFIX}")
  content = read_tables(path)
  known = content["TABLES"]
  tables = list(known) if args.tables == "all" else args.tables.split(",")
  unknown = [table for table in tables if table not in known]
  if unknown:
    raise InputError(f"no table {unknown[0]!r} in {path}; it has {', '.join(known)}")
  tuning = tuning_flags(args)
  settings = {"config": words, "flags": sorted(passed_on)}
  of_all = {"file": path, **settings, **({"tuning": tuning} if tuning else {})}
  results = kept.Results(root, expand(args.keep) if args.keep else None, of_all)
  plan = Plan(path, words, content, root, passed_on, results, args.tune_lr)
  check_passed_on(passed_on, plan, tables)
  trials = plan.trials(tables) if args.tune_lr else {}
  claim(root, settings)
  if trials:  # of scores on other images none is to be taken for one of these
    claim(root / "rates", {**settings, "flags": sorted([*passed_on, *tuning])})
  plan.choose(trials)  # of rows whose trials are all there
  plan.check_runs(tables, trials, args.seeds, tuple(tuning))

  before = signal.signal(signal.SIGTERM, interrupt)
  try:
    failures = _run_all(plan, tables, trials, tuning, args)
  except KeyboardInterrupt:
    raise KeyboardInterrupt("interrupted: the same command continues the sweep") from None
  finally:
    signal.signal(signal.SIGTERM, before)

  if trials:
    out = rates.write(root / "report/rates", trials)
    print(f"\nrates\n{rates.rate_table(trials)}\nWritten: {out}/rates.md, .json, .png")
    for note in rates.notes(trials):
      print(note)
  for table in tables:
    rows, missing = compared(plan, table, args.seeds)
    if rows:
      out = report.write(root / "report" / table, rows, missing)
      print(f"\n{table}\n{report.score_table(rows)}\nWritten: {out}/report.md, .csv, .json, .png")
    for line in missing:
      print(f"missing: {line}")
  for failure in failures:
    print(f"failed: {failure}", file=sys.stderr)
  return 1 if failures else 0


def tuning_flags(args: argparse.Namespace) -> list[str]:
  """What --held-out and --tune-steps mean for the runs that --tune-lr compares.

  Raises:
    InputError: wrong values, or no --tune-lr.
  """
  if not args.tune_lr:
    for name in ("held_out", "tune_steps"):
      if getattr(args, name) is not None:
        raise InputError(f"--{name.replace('_', '-')} is for --tune-lr: give both or none")
    return []
  held_out = HELD_OUT if args.held_out is None else args.held_out
  if not 0 < held_out <= 0.9:
    raise InputError(f"--held-out={held_out:g}: expected a share above 0 and at most 0.9")
  flags = [f"--config.data.held_out={held_out}"]
  if (steps := args.tune_steps) is not None:
    if steps < 1:
      raise InputError(f"--tune-steps={steps}: expected 1 or more")
    flags += [f"--config.steps={steps}", f"--config.eval_every={steps}"]
  return flags


def _run_all(
  plan: Plan,
  tables: Sequence[str],
  trials: Mapping[str, Sequence[rates.Trial]],
  tuning: Sequence[str],
  args: argparse.Namespace,
) -> list[str]:
  """Makes weights, runs trials and rows, under one progress display; returns what failed."""
  results, ended = plan.results, plan.results.ended
  trained = {key(changes) for _, changes in plan.rows(tables) if not is_free(changes)}
  free = {key(changes) for _, changes in plan.rows(tables) if is_free(changes)}
  first = plan.trial_runs(trials, tuning)
  around = plan.around(tables, trials, args.seeds)
  weights = plan.weights()
  weights = {
    made: weights[made]
    for made, runs in around.items()
    if not all(run is not None and ended(run) for run in runs)
  }
  total = len(weights) + len(first) + len(trained) * args.seeds + len(free)
  with progress(total, "sweep", "run") as bar:
    failures = run_all(weights, args.jobs, bar, is_made)
    check_weights(results, around)

    def alone() -> set[pathlib.Path]:  # of workdirs that are known by now
      return plan.alone(tables, trials, args.seeds) if args.together > 1 else set()

    several = (ended, results.keep, args.together)
    failures += run_all(first, args.jobs, bar, *several, alone())
    plan.choose(trials)
    runs = plan.runs(tables, args.seeds)
    return failures + run_all(runs, args.jobs, bar, *several, alone())


def compared(plan: Plan, table: str, seeds: int) -> tuple[list[Row], list[str]]:
  """The rows of a table that are there, with `extra_columns`, and what is missing."""
  changes = plan.content["TABLES"][table]
  rows, missing = table_rows(changes, plan.workdir, seeds, plan.results.read)
  others, diverged = references(plan, seeds, changes), plan.diverged(changes, seeds)
  found = []
  for row in rows:
    all_others = {**others, **at_its_rate(plan, table, seeds, row.label)}
    columns = extra_columns(table, row, all_others, diverged)
    found.append(dataclasses.replace(row, extra_columns=columns))
  return found, missing


def at_its_rate(plan: Plan, table: str, seeds: int, label: str) -> dict[str, Row | None]:
  """What a table's row is compared with at its own rate, whichever is the other's: the config
  file's SAME_RATE, title -> row of each table, as far as there are such runs; else None.

  Raises:
    InputError: a run in the place of such a one has another config.
  """
  rows = plan.content["TABLES"][table]
  rate = plan.rate(rows[label])
  workdir = lambda changes, seed: directory(plan.root, {**changes, **rate}, seed)
  found: dict[str, Row | None] = {}
  for title, name in plan.content.get("SAME_RATE", {}).items():
    if name in rows:
      wanted = {title: rows[name]} if rate else {}
      there, _ = table_rows(wanted, workdir, seeds, plan.results.read)
      found[title] = there[0] if there else None
      for run in there[0].runs if there else ():
        # No row need have asked for it, so nothing else has looked at more than its name.
        plan.check_run(f"{table}_{name}", {**rate, "seed": run.config["seed"]}, run)
  return found


def references(plan: Plan, seeds: int, rows: Mapping[str, Mapping]) -> dict[str, Row]:
  """Label -> row that a table's other rows are compared with, of those that are there: the config
  file's REFERENCES, label -> changes or the name of a row of each table; without any, the table's
  row that changes nothing."""
  plain = {label: changes for label, changes in rows.items() if not changes}
  named = plan.content.get("REFERENCES") or plain
  wanted = {
    label: rows[changes] if isinstance(changes, str) else changes
    for label, changes in named.items()
    if not isinstance(changes, str) or changes in rows
  }
  found, _ = table_rows(wanted, plan.workdir, seeds, plan.results.read)
  return {row.label: row for row in found}
