"""A table of ablations, row by row: python -m rpn_jax sweep table5 --config=FILE --seeds=3

FILE is a config file with TABLES, such as configs/ablations.py:dataset=shapes; words behind the
colon are for every row. Each row and seed is a run of main.py in a workdir of its own under --root;
other --config.… flags are passed on to all of them. Finished runs are not repeated, and rows with
the same settings are one run in all tables. Ctrl-C and SIGTERM save the runs under way; the same
command continues them. A failed run is listed with its log and tried again by the next call.

--tune-lr first finds a learning rate for every row, see `rpn_jax.analysis.rates`: of the grid of
the config file the one with the best score on held-out training images; the runs of the table then
use it. The scores by rate are in ROOT/report/rates.

At the end the table is printed, with the paper's scores where they are known, and written to
ROOT/report/TABLE as Markdown, CSV, JSON and a plot with error bars. Of several tables, "all" or
names joined by commas, the runs of the first seed come first.
"""

import argparse
import concurrent.futures
import contextlib
import dataclasses
import json
import os
import pathlib
import queue
import re
import runpy
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence

from rpn_jax.analysis import paired, rates, report
from rpn_jax.analysis.runs import Row, read_run
from rpn_jax.base.console import Progress, progress
from rpn_jax.base.errors import InputError
from rpn_jax.base.paths import expand_local, write_json
from rpn_jax.config.stored import read_config
from rpn_jax.inference import published

LOG = "log.txt"
# What --tune-lr sets.
TUNED = ("optimizer.base_lr", "optimizer.groups", "data.held_out")
HELD_OUT = 0.2  # share of the training images
SHOWN_LOG_LINES = 3  # of a failed run


def read_tables(path: str) -> dict:
  """What a config file defines, of which TABLES are table -> row -> changes.

  Raises:
    InputError: there is no such file, or it has no TABLES.
  """
  if not os.path.isfile(path):
    raise InputError(f"--config={path}: no such file; expected one with TABLES")
  content = runpy.run_path(path)
  if "TABLES" not in content:
    raise InputError(f"--config={path}: has no TABLES; expected one like configs/ablations.py")
  return content


def directory(root: pathlib.Path, changes: Mapping, seed: int) -> pathlib.Path:
  """The workdir of a row: named after what it changes, so that equal rows share it."""
  words = [f"{field.rpartition('.')[2]}={value}" for field, value in sorted(changes.items())]
  name = re.sub(r"[^\w=+.,-]", "_", ",".join(words)) or "base"
  return root / f"{name}_seed{seed}"


def claim(root: pathlib.Path, words: str, flags: Sequence[str]) -> None:
  """Marks the folder as that of one recipe, or checks that it is.

  Raises:
    InputError: its runs have other settings.
  """
  path, settings = root / "settings.json", {"config": words, "flags": sorted(flags)}
  try:
    there = json.loads(path.read_text(encoding="utf-8")) if path.exists() else settings
  except ValueError:
    there = "unreadable"
  if there != settings:
    raise InputError(f"runs in {root} are of {there}, asked for: {settings}; give another --root")
  root.mkdir(parents=True, exist_ok=True)
  write_json(path, settings)


def check_passed_on(flags: Sequence[str], rows: Sequence[Mapping], tuned: bool) -> None:
  """Refuses flags for all runs that set what differs between rows, by their changes, or seeds: the
  last flag counts, so that these would silently be the same run.
  """
  for flag in flags:
    field = re.split(r"[=\[]", flag.removeprefix("--config."))[0]
    if tuned and field in TUNED:
      raise InputError(f"--tune-lr chooses what {flag} sets: leave out one of both")
    if field == "seed" or any(field in changes for changes in rows):
      by = "--seeds" if field == "seed" else "a row of the table"
      raise InputError(f"{flag}: is for all runs, and {by} sets that field: leave the flag out")


def run(command: Sequence[str], workdir: pathlib.Path, running: set[subprocess.Popen]) -> str:
  """Runs a command with its output in the workdir's log; returns what went wrong, or "".

  The process is in `running` meanwhile.
  """
  workdir.mkdir(parents=True, exist_ok=True)
  with (
    open(workdir / LOG, "w", encoding="utf-8") as log,
    subprocess.Popen(command, stdout=log, stderr=log) as process,
  ):
    running.add(process)
    code = process.wait()
    running.discard(process)
  if code == 0 and is_done(workdir):
    return ""
  log_text = (workdir / LOG).read_text(encoding="utf-8", errors="replace")
  lines = log_text.strip().splitlines()[-SHOWN_LOG_LINES:]
  return f"{workdir}: exit status {code}, see {workdir / LOG}: {' / '.join(lines)}"


def core_shares(jobs: int) -> list[list[int]]:
  """The cores of each of several simultaneous runs, which are faster on cores of their own than
  when they share all; empty where there is nothing to pin."""
  if jobs == 1 or not hasattr(os, "sched_setaffinity"):
    return [[]] * jobs
  cores = sorted(os.sched_getaffinity(0))
  return [cores[i::jobs] for i in range(jobs)]


def is_done(workdir: pathlib.Path) -> bool:
  """Whether a run has ended well."""
  try:
    read_run(workdir)
  except (InputError, OSError):
    return False
  return True


def share_done(workdir: pathlib.Path) -> float:
  """The share of its steps, 0 to 1, after which an interrupted run resumes."""
  with contextlib.suppress(InputError, OSError):
    checkpoints = [path.name for path in (workdir / "checkpoints").iterdir()]
    saved = max((int(name) for name in checkpoints if name.isdecimal()), default=0)
    return min(1.0, saved / read_config(workdir).steps)
  return 0.0


def sweep(
  runs: Mapping[pathlib.Path, Sequence[str]],
  jobs: int,
  bar: Progress,
  ended: Callable[[pathlib.Path], bool] = is_done,
) -> list[str]:
  """Runs the commands whose workdirs hold no finished run; returns what failed.

  Args:
    runs: workdir -> command.
    jobs: runs at a time.
    bar: counts them.
    ended: whether the run of a workdir has come to an end that counts.
  """
  todo = [workdir for workdir in runs if not ended(workdir)]
  there = len(runs) - len(todo)
  bar.update(there, earlier=there)
  shares: queue.SimpleQueue[list[int]] = queue.SimpleQueue()
  for share in core_shares(jobs):
    shares.put(share)
  failures: list[str] = []

  def pin_thread():
    # Linux keeps the cores of each thread, and a child inherits those of the thread that starts
    # it. Pinning the child itself, in `preexec_fn`, would fork a process with JAX's threads.
    if share := shares.get():
      os.sched_setaffinity(0, share)

  def job(workdir):
    bar.set_postfix(run=workdir.name)
    earlier = share_done(workdir)
    failure = run(runs[workdir], workdir, running)
    return earlier, failure if not ended(workdir) else ""

  running: set[subprocess.Popen] = set()
  pool = concurrent.futures.ThreadPoolExecutor(jobs, initializer=pin_thread)
  try:
    for done in concurrent.futures.as_completed([pool.submit(job, w) for w in todo]):
      earlier, failure = done.result()
      failures += filter(None, [failure])
      bar.update(earlier=earlier)
  except KeyboardInterrupt:
    pool.shutdown(wait=False, cancel_futures=True)
    print("\nending the runs under way, which save; Ctrl-C ends at once", file=sys.stderr)
    for process in tuple(running):
      process.terminate()  # a terminal's Ctrl-C has reached them, too; what `kill` sends has not
    raise
  finally:
    pool.shutdown()
  return failures


def interrupt(*_: object) -> None:
  """SIGTERM ends a sweep as Ctrl-C does, and with it its runs."""
  raise KeyboardInterrupt


def table_rows(
  rows: Mapping[str, Mapping],
  workdir: Callable[[Mapping, int], pathlib.Path | None],
  seeds: int,
) -> tuple[list[Row], list[str]]:
  """The rows of which at least one seed is there, and what is missing.

  Args:
    rows: label -> changes.
    workdir: of changes and a seed; None where no rate was chosen for them.
    seeds: how many.
  """
  found, missing = [], []
  for label, changes in rows.items():
    runs = []
    for seed in range(1 if is_free(changes) else seeds):  # has no seeds
      try:
        if (directory := workdir(changes, seed)) is None:
          raise InputError("no rate was chosen for it")
        runs.append(read_run(directory))
      except (InputError, OSError) as error:
        missing.append(f"{label}, seed {seed}: {error}")
    if runs:
      found.append(Row(label, tuple(runs)))
  return found, missing


def extra_columns(table: str, row: Row, references: Mapping[str, Row]) -> dict[str, str]:
  """Further columns of a row: title -> text.

  Args:
    table: its name.
    row: what the columns are of.
    references: label -> row to which differences are taken.
  """
  columns = {"trained": f"{row.runs[0].trained_parameters or 0:,}"}
  for label, reference in references.items():
    columns[f"hIoU less {label}'s [95 %]"] = paired.mean_and_interval(
      paired.differences(row, reference)
    )
  if table == "table10":
    columns["paper, VOC hIoU"] = str(published.TUNERS.get(row.label, "-"))
  return columns


def is_free(changes: Mapping) -> bool:
  return changes.get("method") == "training_free"


@dataclasses.dataclass
class Plan:
  """Which runs a sweep makes, by what commands.

  Attributes:
    path, words: of --config=path:words.
    content: what that file defines.
    root: of the workdirs.
    passed_on: --config.… flags for all runs.
    chosen: changes of a row, as text -> the fields of its rate; without --tune-lr there are none.
  """

  path: str
  words: str
  content: Mapping
  root: pathlib.Path
  passed_on: Sequence[str]
  tuned: bool = False
  chosen: dict[str, Mapping] = dataclasses.field(default_factory=dict)

  def workdir(self, changes: Mapping, seed: int) -> pathlib.Path | None:
    """See `directory`; None if a rate is to be chosen and none was."""
    if not self.tuned or is_free(changes):
      return directory(self.root, changes, seed)
    if (fields := self.chosen.get(_key(changes))) is None:
      return None
    return directory(self.root, {**changes, **fields}, seed)

  def command(
    self, name: str, workdir: pathlib.Path, seed: int, free: bool, flags: Sequence[str] = ()
  ) -> list[str]:
    """main.py for the row called TABLE_ROW."""
    return [
      sys.executable, "main.py", f"--workdir={workdir}", f"--mode={'eval' if free else 'train'}",
      f"--config={self.path}:{self.arguments(name)}", f"--config.seed={seed}", *flags,
      *self.passed_on,
    ]  # fmt: skip

  def arguments(self, name: str) -> str:
    """Of the config file's `get_config`, for the row called TABLE_ROW."""
    return ",".join(filter(None, [name, self.words]))

  def runs(self, tables: Sequence[str], seeds: int) -> dict[pathlib.Path, list[str]]:
    """Workdir -> command; all of the first seed come first. Rows without a rate are left out."""
    found = {}
    for seed in range(seeds):
      for name, changes in self.rows(tables):
        workdir, free = self.workdir(changes, seed), is_free(changes)
        if workdir is None or workdir in found or (free and seed):
          continue
        fields = {} if free else self.chosen.get(_key(changes), {})
        found[workdir] = self.command(name, workdir, seed, free, _flags(fields))
    return found

  def rows(self, tables: Sequence[str]) -> list[tuple[str, Mapping]]:
    """(TABLE_ROW, changes) of every row."""
    known = self.content["TABLES"]
    return [(f"{table}_{row}", known[table][row]) for table in tables for row in known[table]]

  def trials(self, tables: Sequence[str]) -> dict[str, list[rates.Trial]]:
    """TABLE_ROW -> its runs at the rates of the grid, of rows with the same changes one."""
    if "rate_grid" not in self.content:
      raise InputError(
        f"--tune-lr: {self.path} has no function rate_grid, see configs/ablations.py"
      )
    found, there = {}, set()
    for name, changes in self.rows(tables):
      if is_free(changes) or _key(changes) in there:
        continue
      there.add(_key(changes))
      grid = self.content["rate_grid"](self.content["get_config"](self.arguments(name)))
      place = lambda fields, changes=changes: directory(
        self.root / "rates", {**changes, **fields}, rates.SEED
      )
      found[name] = rates.trials(name, grid, place)
    return found

  def trial_runs(
    self, trials: Mapping[str, Sequence[rates.Trial]], held_out: float
  ) -> dict[pathlib.Path, list[str]]:
    """Workdir -> command, of all trials."""
    shared = [f"--config.data.held_out={held_out}"]
    return {
      t.workdir: self.command(name, t.workdir, rates.SEED, False, [*_flags(t.fields), *shared])
      for name, of_row in trials.items()
      for t in of_row
    }

  def choose(self, trials: Mapping[str, Sequence[rates.Trial]]) -> None:
    """Takes the best rate of every row all of whose trials have ended."""
    rows = dict(self.rows(list(self.content["TABLES"])))
    for name, of_row in trials.items():
      if best := rates.choose(of_row):
        self.chosen[_key(rows[name])] = best.fields


def _key(changes: Mapping) -> str:
  return json.dumps(dict(changes), sort_keys=True, default=str)


def _flags(fields: Mapping) -> list[str]:
  return [f"--config.{field}={value}" for field, value in fields.items()]


def main(arguments: list[str]) -> int:
  parser = argparse.ArgumentParser(prog="rpn sweep", description=__doc__)
  parser.formatter_class = argparse.RawDescriptionHelpFormatter
  parser.add_argument("tables", help='e.g. table5, or table4,table5, or "all"')
  parser.add_argument("--config", default="configs/ablations.py", help="file with TABLES[:words]")
  parser.add_argument("--seeds", type=int, default=3, help="runs of every row (default 3)")
  parser.add_argument("--jobs", type=int, default=1, help="runs at a time, sharing the cores")
  parser.add_argument("--root", default="runs/sweep", help="where the runs go")
  parser.add_argument("--tune-lr", action="store_true", help="choose a learning rate for every row")
  parser.add_argument(
    "--held-out", type=float,
    help=f"share of the training images that --tune-lr chooses rates on ({HELD_OUT})",
  )  # fmt: skip
  args, passed_on = parser.parse_known_args(arguments)
  path, _, words = args.config.partition(":")
  root = expand_local(args.root, "--root")
  wrong = [flag for flag in passed_on if not flag.startswith("--config.")]
  if wrong:
    raise InputError(f"unknown argument {wrong[0]!r}; only --config.… flags are passed on")
  if args.seeds < 1 or args.jobs < 1:
    raise InputError("--seeds and --jobs: expected 1 or more")
  if not os.path.exists("main.py"):
    raise InputError("no main.py here: run this in the folder of a clone of the project")
  content = read_tables(path)
  known = content["TABLES"]
  tables = list(known) if args.tables == "all" else args.tables.split(",")
  unknown = [table for table in tables if table not in known]
  if unknown:
    raise InputError(f"no table {unknown[0]!r} in {path}; it has {', '.join(known)}")
  if args.held_out is not None and not args.tune_lr:
    raise InputError("--held-out is for --tune-lr: give both or none")
  held_out = HELD_OUT if args.held_out is None else args.held_out
  if not 0 < held_out <= 0.9:
    raise InputError(f"--held-out={held_out:g}: expected a share above 0 and at most 0.9")
  plan = Plan(path, words, content, root, passed_on, args.tune_lr)
  check_passed_on(passed_on, [changes for _, changes in plan.rows(tables)], args.tune_lr)
  trials = plan.trials(tables) if args.tune_lr else {}
  claim(root, words, passed_on)
  if trials:  # of scores on other images none is to be taken for one of these
    claim(root / "rates", words, [*passed_on, f"--held-out={held_out:g}"])

  before = signal.signal(signal.SIGTERM, interrupt)
  try:
    failures = _run_all(plan, tables, plan.trial_runs(trials, held_out), trials, args)
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
    rows, missing = table_rows(known[table], plan.workdir, args.seeds)
    if rows:
      others = references(plan, args.seeds, known[table])
      rows = [
        dataclasses.replace(row, extra_columns=extra_columns(table, row, others)) for row in rows
      ]
      out = report.write(root / "report" / table, rows, missing)
      print(f"\n{table}\n{report.score_table(rows)}\nWritten: {out}/report.md, .csv, .json, .png")
    for line in missing:
      print(f"missing: {line}")
  for failure in failures:
    print(f"failed: {failure}", file=sys.stderr)
  return 1 if failures else 0


def _run_all(
  plan: Plan, tables: Sequence[str], first: Mapping, trials: Mapping, args: argparse.Namespace
) -> list[str]:
  """Runs the trials and the rows, under one progress display; returns what failed."""
  trained = {_key(changes) for _, changes in plan.rows(tables) if not is_free(changes)}
  free = {_key(changes) for _, changes in plan.rows(tables) if is_free(changes)}
  total = len(first) + len(trained) * args.seeds + len(free)
  with progress(total, "sweep", "run") as bar:
    ended = lambda workdir: is_done(workdir) or rates.diverged(workdir, LOG)
    failures = sweep(first, args.jobs, bar, ended)
    plan.choose(trials)
    return failures + sweep(plan.runs(tables, args.seeds), args.jobs, bar)


def references(plan: Plan, seeds: int, rows: Mapping[str, Mapping]) -> dict[str, Row]:
  """Label -> row that a table's other rows are compared with, of those that are there: the config
  file's REFERENCES, label -> changes; without any, the table's row that changes nothing."""
  plain = {label: changes for label, changes in rows.items() if not changes}
  wanted = plan.content.get("REFERENCES") or plain
  found, _ = table_rows(wanted, plan.workdir, seeds)
  return {row.label: row for row in found}
