"""A table of ablations, row by row: python -m rpn_jax sweep table5 --config=FILE --seeds=3

FILE is a config file with TABLES, such as configs/ablations.py:dataset=shapes; words behind the
colon are for every row. Each row and seed is a run of main.py in a workdir of its own under --root;
other --config.… flags are passed on to all of them. Finished runs are not repeated, and rows with
the same settings are one run in all tables. Ctrl-C and SIGTERM save the runs under way; the same
command continues them. A failed run is listed with its log and tried again by the next call.

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
from collections.abc import Mapping, Sequence

from rpn_jax.analysis import report
from rpn_jax.analysis.runs import Row, read_run
from rpn_jax.base.console import progress
from rpn_jax.base.errors import InputError
from rpn_jax.base.paths import expand_local, write_json
from rpn_jax.config.stored import read_config
from rpn_jax.inference import published

LOG = "log.txt"
SHOWN_LOG_LINES = 3  # of a failed run


def read_tables(path: str) -> dict[str, dict[str, Mapping]]:
  """Table -> row -> changes, of a config file.

  Raises:
    InputError: there is no such file, or it has no TABLES.
  """
  if not os.path.isfile(path):
    raise InputError(f"--config={path}: no such file; expected one with TABLES")
  content = runpy.run_path(path)
  if "TABLES" not in content:
    raise InputError(f"--config={path}: has no TABLES; expected one like configs/ablations.py")
  return content["TABLES"]


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


def sweep(runs: Mapping[pathlib.Path, Sequence[str]], jobs: int) -> list[str]:
  """Runs the commands whose workdirs hold no finished run; returns what failed.

  Args:
    runs: workdir -> command.
    jobs: runs at a time.
  """
  todo = [workdir for workdir in runs if not is_done(workdir)]
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
    return earlier, run(runs[workdir], workdir, running)

  running: set[subprocess.Popen] = set()
  with progress(len(runs), "sweep", "run", initial=len(runs) - len(todo)) as bar:
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
  table: str, rows: Mapping[str, Mapping], root: pathlib.Path, seeds: int
) -> tuple[list[Row], list[str]]:
  """The rows of which at least one seed is there, and what is missing."""
  found, missing = [], []
  for label, changes in rows.items():
    runs = []
    for seed in range(seeds):
      try:
        runs.append(read_run(directory(root, changes, seed)))
      except (InputError, OSError) as error:
        missing.append(f"{label}, seed {seed}: {error}")
      if is_free(changes):
        break  # has no seeds
    if runs:
      found.append(Row(label, tuple(runs)))
  plain = next((row for row in found if not rows[row.label]), None)
  with_columns = [
    dataclasses.replace(row, extra_columns=extra_columns(table, row, plain)) for row in found
  ]
  return with_columns, missing


def extra_columns(table: str, row: Row, plain: Row | None) -> dict[str, str]:
  """Further columns of a row: title -> text.

  Args:
    table: its name.
    row: what the columns are of.
    plain: the row that changes nothing, to which differences are taken.
  """
  columns = {"trained": f"{row.runs[0].trained_parameters or 0:,}"}
  if plain:
    columns[f"hIoU less {plain.label}'s"] = report.mean_and_deviation(differences(row, plain))
  if table == "table10":
    columns["paper, VOC hIoU"] = str(published.TUNERS.get(row.label, "-"))
  return columns


def differences(row: Row, plain: Row) -> list[float]:
  """hIoU of a row less that of the plain one, seed by seed; [] for the plain one itself.

  Runs of a seed see the same images in the same order: differences spread less than scores do.
  """
  if row is plain or is_free(row.runs[0].config):
    return []
  scores = [
    {run.config["seed"]: hiou for run in r.runs if (hiou := run.last.get("hiou")) is not None}
    for r in (row, plain)
  ]
  return [hiou - scores[1][seed] for seed, hiou in scores[0].items() if seed in scores[1]]


def is_free(changes: Mapping) -> bool:
  return changes.get("method") == "training_free"


def main(arguments: list[str]) -> int:
  parser = argparse.ArgumentParser(prog="rpn sweep", description=__doc__)
  parser.formatter_class = argparse.RawDescriptionHelpFormatter
  parser.add_argument("tables", help='e.g. table5, or table4,table5, or "all"')
  parser.add_argument("--config", default="configs/ablations.py", help="file with TABLES[:words]")
  parser.add_argument("--seeds", type=int, default=3, help="runs of every row (default 3)")
  parser.add_argument("--jobs", type=int, default=1, help="runs at a time, sharing the cores")
  parser.add_argument("--root", default="runs/sweep", help="where the runs go")
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
  known = read_tables(path)
  tables = list(known) if args.tables == "all" else args.tables.split(",")
  unknown = [table for table in tables if table not in known]
  if unknown:
    raise InputError(f"no table {unknown[0]!r} in {path}; it has {', '.join(known)}")
  claim(root, words, passed_on)

  runs = {}
  for seed in range(args.seeds):
    for table in tables:
      for row, changes in known[table].items():
        free = is_free(changes)
        workdir = directory(root, changes, seed)
        if workdir in runs or (free and seed):
          continue
        runs[workdir] = [
          sys.executable, "main.py", f"--workdir={workdir}",
          "--mode=eval" if free else "--mode=train",
          f"--config={','.join(filter(None, [f'{path}:{table}_{row}', words]))}",
          f"--config.seed={seed}", *passed_on,
        ]  # fmt: skip
  before = signal.signal(signal.SIGTERM, interrupt)
  try:
    failures = sweep(runs, args.jobs)
  except KeyboardInterrupt:
    raise KeyboardInterrupt("interrupted: the same command continues the sweep") from None
  finally:
    signal.signal(signal.SIGTERM, before)

  for table in tables:
    rows, missing = table_rows(table, known[table], root, args.seeds)
    if rows:
      out = report.write(root / "report" / table, rows, missing)
      print(f"\n{table}\n{report.score_table(rows)}\nWritten: {out}/report.md, .csv, .json, .png")
    for line in missing:
      print(f"missing: {line}")
  for failure in failures:
    print(f"failed: {failure}", file=sys.stderr)
  return 1 if failures else 0
