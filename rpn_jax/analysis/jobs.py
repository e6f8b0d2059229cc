"""Runs of main.py as processes, several at a time, each on cores of its own."""

import concurrent.futures
import contextlib
import os
import pathlib
import queue
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence

from rpn_jax.analysis.kept import LOG
from rpn_jax.base.console import Progress
from rpn_jax.base.errors import InputError
from rpn_jax.config.stored import read_config

SHOWN_LOG_LINES = 3  # of a failed run


def run_all(
  runs: Mapping[pathlib.Path, Sequence[str]],
  jobs: int,
  bar: Progress,
  ended: Callable[[pathlib.Path], bool],
  keep: Callable[[Sequence[pathlib.Path]], None] = lambda _: None,
) -> list[str]:
  """Runs the commands of what has not come to an end; returns what failed.

  Args:
    runs: workdir -> command.
    jobs: runs at a time.
    bar: counts them.
    ended: whether what belongs into a workdir has come to an end that counts.
    keep: called with workdirs whose runs have ended.
  """
  there = [workdir for workdir in runs if ended(workdir)]
  keep(there)
  todo = [workdir for workdir in runs if workdir not in set(there)]
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

  def job(workdir):
    bar.set_postfix(run=workdir.name)
    earlier = share_done(workdir)
    code = run(runs[workdir], workdir, running)
    done = ended(workdir)
    return workdir, earlier, "" if done else failure(code, workdir)

  running: set[subprocess.Popen] = set()
  pool = concurrent.futures.ThreadPoolExecutor(jobs, initializer=pin_thread)
  try:
    for done in concurrent.futures.as_completed([pool.submit(job, w) for w in todo]):
      workdir, earlier, failed = done.result()
      if failed:
        failures.append(failed)
      else:
        keep([workdir])
      bar.update(earlier=earlier)
  except KeyboardInterrupt:
    pool.shutdown(wait=False, cancel_futures=True)
    print("\nending the runs under way, which save; Ctrl-C ends at once", file=sys.stderr)
    for process in tuple(running):
      process.terminate()  # a terminal's Ctrl-C has reached them, too; what `kill` sends has not
    raise
  except BaseException:  # as a file that cannot be kept: hours of other runs would come before it
    pool.shutdown(cancel_futures=True)
    raise
  finally:
    pool.shutdown()
  return failures


def run(command: Sequence[str], workdir: pathlib.Path, running: set[subprocess.Popen]) -> int:
  """Runs a command with its output in the workdir's log; returns its exit status.

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
  return code


def failure(code: int, workdir: pathlib.Path) -> str:
  """What went wrong in a run, in a line."""
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


def share_done(workdir: pathlib.Path) -> float:
  """The share of its steps, 0 to 1, after which an interrupted run resumes."""
  with contextlib.suppress(InputError, OSError):
    checkpoints = [path.name for path in (workdir / "checkpoints").iterdir()]
    saved = max((int(name) for name in checkpoints if name.isdecimal()), default=0)
    return min(1.0, saved / read_config(workdir).steps)
  return 0.0
