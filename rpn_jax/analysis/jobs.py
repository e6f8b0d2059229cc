"""Runs of main.py as processes, several at a time, each on cores of its own."""

import concurrent.futures
import contextlib
import dataclasses
import os
import pathlib
import queue
import subprocess
import sys
from collections.abc import Callable, Collection, Mapping, Sequence

from rpn_jax.base.console import Progress
from rpn_jax.base.errors import InputError
from rpn_jax.config.stored import read_config
from rpn_jax.training.loop import LOG
from rpn_jax.training.side_by_side import BETWEEN, OWN_FIELDS

SHOWN_LOG_LINES = 3  # of a failed run


# What runs that `train_together` takes may have of their own.
OWN_FLAGS = tuple(f"--config.{field}=" for field in OWN_FIELDS)
SEVERAL, LOG_OF_SEVERAL = "train_together", "train_together.txt"
TRAIN = "--mode=train"


@dataclasses.dataclass(frozen=True)
class Job:
  """A process that makes one run, or several side by side.

  Attributes:
    workdirs: of the runs.
    command: of the process.
  """

  workdirs: tuple[pathlib.Path, ...]
  command: tuple[str, ...]

  @property
  def log(self) -> pathlib.Path:
    """What the process prints; a run's own log must not tell of others."""
    return self.workdirs[0] / (LOG if len(self.workdirs) == 1 else LOG_OF_SEVERAL)


def run_all(
  runs: Mapping[pathlib.Path, Sequence[str]],
  jobs: int,
  bar: Progress,
  ended: Callable[[pathlib.Path], bool],
  keep: Callable[[Sequence[pathlib.Path]], None] = lambda _: None,
  together: int = 1,
  alone: Collection[pathlib.Path] = (),
) -> list[str]:
  """Runs the commands of what has not come to an end; returns what failed.

  Args:
    runs: workdir -> command.
    jobs: processes at a time.
    bar: counts them.
    ended: whether what belongs into a workdir has come to an end that counts.
    keep: called with workdirs whose runs have ended.
    together, alone: see `grouped`.
  """
  there = [workdir for workdir in runs if ended(workdir)]
  keep(there)
  todo = grouped(
    {w: command for w, command in runs.items() if w not in set(there)}, together, alone
  )
  bar.update(len(there), earlier=len(there))
  shares: queue.SimpleQueue[list[int]] = queue.SimpleQueue()
  for share in core_shares(jobs):
    shares.put(share)
  failures: list[str] = []

  def pin_thread():
    # Linux keeps the cores of each thread, and a child inherits those of the thread that starts
    # it. Pinning the child itself, in `preexec_fn`, would fork a process with JAX's threads.
    if share := shares.get():
      os.sched_setaffinity(0, share)

  def work(job):
    bar.set_postfix(run=job.workdirs[0].name)
    earlier = [share_done(workdir) for workdir in job.workdirs]
    code = run(job, jobs, running)
    return job, earlier, code

  running: set[subprocess.Popen] = set()
  pool = concurrent.futures.ThreadPoolExecutor(jobs, initializer=pin_thread)
  try:
    for done in concurrent.futures.as_completed([pool.submit(work, job) for job in todo]):
      job, earlier, code = done.result()
      well = [workdir for workdir in job.workdirs if ended(workdir)]
      if well:
        keep(well)
      failures += [failure(code, w, job.log) for w in job.workdirs if w not in set(well)]
      for share in earlier:
        bar.update(earlier=share)
  except KeyboardInterrupt:
    pool.shutdown(wait=False, cancel_futures=True)
    begin = "; those side by side will begin again" if together > 1 else ""
    print(f"\nending the runs under way, which save{begin}; Ctrl-C ends at once", file=sys.stderr)
    for process in tuple(running):
      process.terminate()  # a terminal's Ctrl-C has reached them, too; what `kill` sends has not
    raise
  except BaseException:  # as a file that cannot be kept: hours of other runs would come before it
    pool.shutdown(cancel_futures=True)
    raise
  finally:
    pool.shutdown()
  return failures


def run(job: Job, jobs: int, running: set[subprocess.Popen]) -> int:
  """Runs a process, which is in `running` meanwhile; returns its exit status."""
  for workdir in job.workdirs:
    workdir.mkdir(parents=True, exist_ok=True)
  env = dict(os.environ)
  if jobs > 1:  # the first one would take most of a GPU's memory
    env.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
  with (
    open(job.log, "w", encoding="utf-8") as log,
    subprocess.Popen(job.command, stdout=log, stderr=log, env=env) as process,
  ):
    running.add(process)
    code = process.wait()
    running.discard(process)
  return code


def failure(code: int, workdir: pathlib.Path, log: pathlib.Path) -> str:
  """What went wrong in a run, in a line."""
  lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-SHOWN_LOG_LINES:]
  return f"{workdir}: exit status {code}, see {log}: {' / '.join(lines)}"


def grouped(
  runs: Mapping[pathlib.Path, Sequence[str]], most: int, alone: Collection[pathlib.Path] = ()
) -> list[Job]:
  """The processes that make runs, in the order of the first run of each.

  Training runs that differ by seed and learning rate only and have not begun go together.

  Args:
    runs: workdir -> command of main.py.
    most: runs of a process.
    alone: those that cannot be trained with others.
  """
  groups: dict[tuple, list[pathlib.Path]] = {}
  for workdir, command in runs.items():
    shared = tuple(
      argument for argument in command if not argument.startswith(("--workdir=", *OWN_FLAGS))
    )
    begun = (workdir / "checkpoints").exists()
    single = most == 1 or workdir in alone or TRAIN not in command or begun
    groups.setdefault((workdir,) if single else shared, []).append(workdir)
  found = []
  for workdirs in groups.values():
    parts = -(-len(workdirs) // most)
    for part in (workdirs[i::parts] for i in range(parts)):
      command = list(runs[part[0]])
      if len(part) > 1:
        of_each = [[a for a in runs[workdir][2:] if a != TRAIN] for workdir in part]
        several = [argument for one in of_each for argument in (BETWEEN, *one)][1:]
        command = [command[0], "-m", "rpn_jax", SEVERAL, *several]
      found.append(Job(tuple(part), tuple(command)))
  return found


def core_shares(jobs: int) -> list[list[int]]:
  """The cores of each of several simultaneous runs, which are faster on cores of their own than
  when they share all; empty where there is nothing to pin."""
  if jobs == 1 or not hasattr(os, "sched_setaffinity"):
    return [[]] * jobs
  cores = sorted(os.sched_getaffinity(0))
  return [cores[i::jobs] for i in range(jobs)]


def share_done(workdir: pathlib.Path) -> float:
  """The share of its steps, 0 to 1, after which an interrupted run resumes."""
  with contextlib.suppress(InputError, OSError):
    checkpoints = [path.name for path in (workdir / "checkpoints").iterdir()]
    saved = max((int(name) for name in checkpoints if name.isdecimal()), default=0)
    return min(1.0, saved / read_config(workdir).steps)
  return 0.0
