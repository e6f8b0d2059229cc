"""Runs that are killed at random moments, and what becomes of them.

    python -m tests.tools.kill_test --runs=20
    python -m tests.tools.kill_test --runs=20 --bucket

A run of the tiny network is killed with SIGKILL, then started again, until it has ended; its final
parameters, optimizer state and curves must be those of a run that nobody touched, to the bit. The
moments are drawn within a phase: in training, while a checkpoint is written, in an evaluation,
while the data are prepared. Every second run has a reader process, which must be gone with it, and
some starts are under JAX_ENABLE_X64, which must change nothing. In between, some find a checkpoint
that cannot be read: they must be refused and leave everything as it is. Other runs get SIGTERM and
must end by themselves, with status 0. With --bucket the workdirs are on gs://, of a server on
loopback, and no checkpoint is made unreadable.
"""

import argparse
import collections
import contextlib
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

from rpn_jax.base.buckets import is_bucket
from rpn_jax.base.paths import expand
from rpn_jax.training.bucket_checkpoints import MARK
from tests import tiny
from tests.tools import bucket_server

ROOT = pathlib.Path(__file__).parent.parent.parent
STEPS, EVAL_EVERY, SAVE_EVERY = 40, 10, 4
PHASES = ("training", "save", "evaluation", "preparation")
# Seconds in which a process must reach its phase or its end; compilation is most of it.
PATIENCE = 300


class Run:
  """One workdir with data of its own, and the processes that work on it.

  Args:
    home: with the tiny weights.
    name: of the workdir below it.
    data: name of the folder of prepared data below it.
    where: the folder of the workdir, by default home.
  """

  def __init__(self, home: pathlib.Path, name: str, data: str = "data", where=None):
    self.home, self.workdir, self.data = home, (where or home) / name, home / data
    self.log = home / f"{name}.log"
    self.process = None

  def start(self, *options: str, **variables: str) -> "Run":
    environment = {
      **os.environ,
      **variables,
      "JAX_PLATFORMS": "cpu",
      "XLA_FLAGS": os.environ.get("XLA_FLAGS", "--xla_backend_optimization_level=0"),
    }
    command = [
      sys.executable, "main.py", "--config=configs/shapes.py:runlocal",
      f"--workdir={self.workdir}", f"--config.clip={self.home}/clip.safetensors",
      f"--config.data.data_dir={self.data}", f"--config.steps={STEPS}",
      f"--config.eval_every={EVAL_EVERY}", f"--config.save_every={SAVE_EVERY}",
      "--config.log_every=1", *tiny.FLAGS, *options,
    ]  # fmt: skip
    with open(self.log, "a") as log:
      self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
    return self

  def said(self) -> str:
    return self.log.read_text()

  def end(self, expected: int = 0) -> None:
    """Waits for an end with that status."""
    status = self.process.wait(timeout=PATIENCE)
    assert status == expected, f"status {status}:\n{self.said()[-3000:]}"

  def wait_for(self, condition: Callable[[], bool]) -> bool:
    """Whether it came true before the process ended."""
    until = time.monotonic() + PATIENCE
    while self.process.poll() is None:
      if condition():
        return True
      assert time.monotonic() < until, f"waited in vain:\n{self.said()[-3000:]}"
      time.sleep(0.02 if self.is_remote() else 0.0005)
    return False

  def is_remote(self) -> bool:
    return is_bucket(self.workdir)

  def kill(self, how: int = signal.SIGKILL) -> float:
    """Seconds until it was gone; its reader processes must be, too, soon after."""
    began, readers = time.monotonic(), self.children()
    self.process.send_signal(how)
    self.process.wait(timeout=PATIENCE)
    seconds = time.monotonic() - began
    while left := [pid for pid in readers if pathlib.Path(f"/proc/{pid}").exists()]:
      assert time.monotonic() < began + seconds + 30, f"still there: {left}"
      time.sleep(0.01)
    return seconds

  def children(self) -> list[str]:
    threads = pathlib.Path(f"/proc/{self.process.pid}/task").glob("*/children")
    return [pid for thread in threads for pid in thread.read_text().split()]

  # What a process is doing, as its files show it.

  def entries(self) -> list[dict]:
    try:
      lines = (self.workdir / "metrics.jsonl").read_bytes().split(b"\n")[:-1]
    except FileNotFoundError:
      return []
    return [json.loads(line) for line in lines]

  def trained(self) -> int:
    return max((e["step"] for e in self.entries() if "train/loss" in e), default=0)

  def saved(self) -> list[int]:
    folder = self.workdir / "checkpoints"
    names = [p.name for p in folder.iterdir()] if folder.is_dir() else []
    steps = sorted(int(name) for name in names if name.isdigit())
    return [n for n in steps if (folder / f"{n}/{MARK}").exists()] if self.is_remote() else steps

  def is_saving(self) -> bool:
    if self.is_remote():
      folder = self.workdir / "checkpoints"
      steps = folder.iterdir() if folder.is_dir() else []
      return any(path.name.isdigit() and not (path / MARK).exists() for path in steps)
    return any((self.workdir / "checkpoints").glob("*.orbax-checkpoint-tmp"))

  def is_evaluating(self) -> bool:
    newest = max(self.saved(), default=0)
    if not newest or (newest % EVAL_EVERY and newest != STEPS):
      return False
    return not any(e["step"] == newest and "eval/pAcc" in e for e in self.entries())

  def is_preparing(self) -> bool:
    return self.data.is_dir() and not any(self.data.rglob("dataset_info.json"))

  def result(self) -> dict:
    """What must be equal: final parameters and optimizer state, curves, scores."""
    meta = json.loads((self.workdir / f"checkpoints/{STEPS}/meta/metadata").read_text())
    curves = collections.defaultdict(dict)
    for entry in self.entries():
      for name, value in entry.items():
        if name not in ("step", "time"):
          curves[name][entry["step"]] = value
    scores = json.loads((self.workdir / "metrics.json").read_text())
    return {
      "checksums": meta["checksums"], "curves": dict(curves),
      "last": scores["last"], "best": scores["best"],
    }  # fmt: skip


def reach(run: Run, phase: str, draw: random.Random) -> bool:
  """Waits for a random moment of a phase; False if the run ended before."""
  if phase == "training":
    goal = draw.randint(run.trained() + 1, STEPS - 1) if run.trained() < STEPS - 1 else STEPS
    there = run.wait_for(lambda: run.trained() >= goal)
  elif phase == "save":
    skipped = draw.randrange(4)  # not always the first one
    there = True
    for _ in range(skipped):
      there = there and run.wait_for(run.is_saving) and run.wait_for(lambda: not run.is_saving())
    there = there and run.wait_for(run.is_saving)
  elif phase == "evaluation":
    goal = draw.randint(1, STEPS // EVAL_EVERY) * EVAL_EVERY
    there = run.wait_for(lambda: run.is_evaluating() and max(run.saved()) >= goal)
  else:
    there = run.wait_for(run.is_preparing)
  if there:
    time.sleep(draw.uniform(0, {"save": 0.03, "evaluation": 0.3}.get(phase, 0.1)))
  return there


def refuse(run: Run, draw: random.Random) -> str:
  """A start that must fail and leave the checkpoints as they are; returns what was unreadable."""
  checkpoints = run.workdir / "checkpoints"
  before = sorted(checkpoints.rglob("*"))
  file = draw.choice([p for p in (checkpoints / f"{max(run.saved())}").rglob("*") if p.is_file()])
  kept = file.rename(run.home / "kept")
  file.symlink_to(file)  # root may read everything, but not follow a link to itself
  run.start().end(2)
  assert "cannot be read" in run.said()
  kept.rename(file)
  assert sorted(checkpoints.rglob("*")) == before
  return file.name


def attempt(home: pathlib.Path, number: int, phase: str, draw: random.Random, where) -> str:
  """One run, killed once or twice; returns what happened, and raises where it went wrong."""
  data = f"data{number}" if phase == "preparation" else "data"
  run = Run(home, f"run{number}", data, where)
  options = (f"--config.data.workers={number % 2}",)
  moments = []

  def start() -> None:
    run.start(*options, JAX_ENABLE_X64=draw.choice("01"))

  for _ in range(draw.randint(1, 2)):
    start()
    if not reach(run, phase, draw):
      break
    doing = [name for name in ("saving", "evaluating", "preparing") if getattr(run, f"is_{name}")()]
    run.kill()
    moments.append(f"step {run.trained()} ({', '.join(doing) or 'training'})")
    if not run.is_remote() and run.saved() and draw.random() < 0.3:
      moments[-1] += f", refused with an unreadable {refuse(run, draw)}"
  else:
    start()
  run.end()
  return f"{phase}: killed at " + "; ".join(moments) if moments else f"{phase}: ended too early"


def difference(got: dict, want: dict) -> str | None:
  return next((key for key in want if got[key] != want[key]), None)


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--runs", type=int, default=20)
  parser.add_argument("--terms", type=int, default=6, help="runs that get SIGTERM")
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--bucket", action="store_true", help="workdirs on gs://")
  args = parser.parse_args()
  draw = random.Random(args.seed)
  began, failed, kills, ends = time.time(), 0, 0, []
  with contextlib.ExitStack() as stack:
    home = where = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
    if args.bucket:
      server = stack.enter_context(bucket_server.Server("bucket"))
      os.environ.update(bucket_server.environment(server.port))
      where = expand("gs://bucket/runs")
    tiny.save(home / "clip.safetensors")
    reference = Run(home, "reference").start()
    reference.end()
    want = reference.result()
    for number in range(args.runs):
      told = attempt(home, number, PHASES[number % len(PHASES)], draw, where)
      wrong = difference(Run(home, f"run{number}", where=where).result(), want)
      failed += wrong is not None
      kills += told.count("step")
      print(f"{number + 1:>3} {'DIFFERENT ' + wrong if wrong else 'identical'}  {told}", flush=True)
    for number in range(args.terms):
      phase = PHASES[number % 3]
      run = Run(home, f"term{number}", where=where).start()
      if reach(run, phase, draw):
        ends.append(run.kill(signal.SIGTERM))
        status, newest = run.process.returncode, max(run.saved(), default=0)
        trained = run.trained()
        run.start()
      else:
        status, newest, trained = 0, STEPS, STEPS
      run.end()
      wrong = difference(run.result(), want)
      if status != 0 or newest < trained:
        wrong = f"status {status}, {trained - newest} steps not saved"
      failed += bool(wrong)
      print(f"SIGTERM in {phase} at step {trained}, saved {newest}: "
            f"{ends[-1]:.2f} s, {wrong or 'identical'}", flush=True)  # fmt: skip
  print(
    f"{args.runs} runs, {kills} kills, {args.terms} ended by SIGTERM (at most "
    f"{max(ends, default=0):.2f} s), {failed} different, {time.time() - began:.0f} s in all"
  )
  return 1 if failed else 0


if __name__ == "__main__":
  sys.exit(main())
