"""Reader processes of a training run: they end with it, and their batches have room."""

import errno
import multiprocessing
import os
import re
import signal
import threading
from collections.abc import Iterator

import grain
import numpy as np

from rpn_jax.base.errors import InputError

# Where Linux keeps shared memory.
SHARED_MEMORY = "/dev/shm"
# A scheduler's SIGTERM reaches every process of a job; the run needs readers until it has saved.
SIGTERM_SECONDS = 30.0
REMEDY = "give it more room (docker run --shm-size=…), or use fewer config.data.workers; 0: threads"


def free_bytes() -> int | None:
  """Free shared memory, bytes; None where it is no file system, as on macOS."""
  try:
    status = os.statvfs(SHARED_MEMORY)
  except OSError:
    return None
  return status.f_bavail * status.f_frsize


def read_in_processes(
  dataset: grain.IterDataset, workers: int, prefetch: int, batch_bytes: int
) -> Iterator[dict[str, np.ndarray]]:
  """Iterates over a data set of batches that processes prepare.

  Batches come through shared memory, or through pipes if there is not enough of it: a process that
  writes more than there is is killed by SIGBUS.

  Args:
    dataset: of batches.
    workers: processes, at least 1.
    prefetch: batches held ready, at least one per process.
    batch_bytes: size of a batch.
  """
  ready = max(1, prefetch // workers)
  # As measured. Of each process: `ready` batches in its queue and `ready` behind the queue, one on
  # the way to each; and one that is in use.
  needed = (workers * (2 * ready + 2) + 1) * batch_bytes
  free = free_bytes()
  if free is not None and free < needed:
    print(
      f"{SHARED_MEMORY} has {free / 1e6:.0f} MB free and the batches of {workers} reader processes "
      f"can take {needed / 1e6:.0f} MB: passing them through pipes, which is slower; to avoid it, "
      f"{REMEDY}",
      flush=True,
    )
    options = grain.experimental.DatasetOptions(min_shm_size=2**62)
    dataset = grain.experimental.WithOptionsIterDataset(dataset, options)
  dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(workers, ready), _set_up)
  return _Batches(iter(dataset))


def _set_up(index: int, count: int) -> None:
  """Called in a new reader process."""
  del index, count
  # A terminal's Ctrl-C reaches all processes: the first one ends the others when it is done.
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  signal.signal(signal.SIGTERM, lambda *_: _end_later())
  threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_later() -> None:
  timer = threading.Timer(SIGTERM_SECONDS, os._exit, [1])
  timer.daemon = True
  timer.start()


def _end_with_parent() -> None:
  """Ends this process when its parent is gone, in whatever way.

  The tracker of multiprocessing frees the shared memory when the last of the processes is gone.
  """
  parent = multiprocessing.parent_process()
  if parent is not None:
    parent.join()  # a pipe that the system closes
    os._exit(1)


class _Batches(Iterator):
  """An iterator of grain whose failures say what to do."""

  def __init__(self, iterator: grain.DatasetIterator):
    self._iterator = iterator

  def __next__(self) -> dict[str, np.ndarray]:
    try:
      return next(self._iterator)
    except OSError as error:
      if error.errno != errno.ENOSPC:
        raise
      raise InputError(f"{SHARED_MEMORY} is full: {REMEDY}") from error
    except RuntimeError as error:
      ended = re.search(r"terminated unexpectedly with exit code (-?\d+)", str(error))
      if not ended:
        raise
      raise InputError(f"a reader process ended early ({_cause(int(ended[1]))}") from error

  def close(self) -> None:
    """Ends the processes; a second call does nothing."""
    self._iterator.close()


def _cause(exit_code: int) -> str:
  if exit_code == -signal.SIGBUS:
    return f"SIGBUS): {SHARED_MEMORY} is full: {REMEDY}"
  fewer = "use fewer config.data.workers; 0: threads"
  if exit_code == -signal.SIGKILL:
    return f"SIGKILL), perhaps because memory was short: {fewer}"
  name = signal.Signals(-exit_code).name if exit_code < 0 else f"status {exit_code}"
  return f"{name}); its output is above: {fewer}"
