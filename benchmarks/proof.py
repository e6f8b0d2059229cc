"""The comparison of docs/results.md: every method on the embedded world, several seeds.

    make proof          or: python -m benchmarks.proof --seeds=3 --jobs=2

Each row is a run of main.py in a process of its own, two at a time on one core each. A row whose
`metrics.json` exists is not run again, so the command can be interrupted and repeated. At the end
it prints the table, and writes it with the curves to `runs/proof` (see `rpn_jax.report`).
"""

import os
import pathlib
import platform
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed

from absl import app, flags

from rpn_jax import report
from rpn_jax.logging import progress

FLAGS = flags.FLAGS
flags.DEFINE_integer("seeds", 3, "Seeds of every trained row")
flags.DEFINE_integer("jobs", 2, "Runs at a time")
flags.DEFINE_integer("steps", 0, "Training steps; 0 keeps the config's")
flags.DEFINE_string("root", "runs/proof", "Where the runs go")

ROWS = {
  "RPN, paper": "preset=paper",
  "RPN, released": "preset=released",
  "paper without relationship prompts": "preset=paper,variant=no_rpm",
  "released without relationship prompts": "preset=released,variant=no_rpm",
  "VPT (40 deep tokens)": "preset=paper,variant=vpt",
  "LPM only": "preset=paper,variant=lpm",
  "training-free (MaskCLIP)": "preset=paper,variant=training_free",
}


def directory(row: str, seed: int) -> pathlib.Path:
  name = "".join(c if c.isalnum() else "_" for c in row)
  return pathlib.Path(FLAGS.root) / f"{name}_seed{seed}"


def run(row: str, seed: int, core: int) -> None:
  """One training run; its output goes to log.txt in the workdir."""
  workdir = directory(row, seed)
  if (workdir / "metrics.json").exists():
    return
  workdir.mkdir(parents=True, exist_ok=True)
  free = "training_free" in ROWS[row]
  command = [
    sys.executable,
    "main.py",
    f"--config=configs/shapes.py:{ROWS[row]}",
    f"--workdir={workdir}",
    f"--mode={'eval' if free else 'train'}",
    f"--config.seed={seed}",
    *([f"--config.steps={FLAGS.steps}"] if FLAGS.steps else []),
  ]
  cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
  pin = None
  if FLAGS.jobs > 1 and len(cores) >= FLAGS.jobs:
    # One core a run: two runs side by side get more done than one run on two cores.
    pin = lambda: os.sched_setaffinity(0, cores[core::FLAGS.jobs])
  with open(workdir / "log.txt", "w") as log:
    done = subprocess.run(command, stdout=log, stderr=log, preexec_fn=pin)
  if done.returncode:
    raise RuntimeError(f"{' '.join(command)} failed: see {workdir}/log.txt")


def runs() -> list[tuple[str, int]]:
  """(row, seed), seed by seed, so that a first full table is there early."""
  return [
    (row, seed)
    for seed in range(FLAGS.seeds)
    for row in ROWS
    if seed == 0 or "training_free" not in ROWS[row]
  ]


def main(argv) -> None:
  del argv
  todo = runs()
  began = time.time()
  free_cores = list(range(FLAGS.jobs))

  def job(item):
    core = free_cores.pop()
    try:
      run(*item, core)
    finally:
      free_cores.append(core)

  with ThreadPoolExecutor(FLAGS.jobs) as pool, progress(len(todo), "proof", "run") as bar:
    futures = [pool.submit(job, item) for item in todo]
    for _ in as_completed(futures):
      bar.update()
  failures = [str(e) for e in (f.exception() for f in futures) if e]
  if failures:  # the others have run all the same; the command repeats only these
    sys.exit("\n".join(failures))

  runs_of = {row: [directory(r, seed) for r, seed in todo if r == row] for row in ROWS}
  rows = [report.Row(row, tuple(map(report.read_run, runs_of[row]))) for row in ROWS]
  out = report.write(FLAGS.root, rows)
  print(report.score_table(rows))
  print(
    f"{platform.machine()}, {os.cpu_count()} cores, {time.time() - began:.0f} s in this call. "
    f"Written: {out}/report.md, report.png, report.csv, report.json"
  )


if __name__ == "__main__":
  app.run(main)
