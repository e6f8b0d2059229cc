"""Metrics of a run on disk: JSON lines and TensorBoard events."""

import contextlib
import json
import logging
import math
import os
import pathlib
import socket
import time
from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np

from rpn_jax.base.buckets import GrowingObject, is_bucket
from rpn_jax.base.errors import InputError
from rpn_jax.base.paths import expand, write_text

METRICS = "metrics.jsonl"
RESERVED = ("step", "time")
# A file in a bucket is written as a whole, and at most once a second.
METRICS_SECONDS, EVENTS_SECONDS = 5, 60


class MetricWriter:
  """Metrics of a run, as TensorBoard events and as `metrics.jsonl`.

  The JSON file has an object per line, {"step": int, "time": seconds since 1970, name: value, ...},
  and is append-only during a run. `history` reads it, so curves survive a resume. Non-finite values
  are stored as the strings "nan", "inf" and "-inf", which keeps every line standard JSON.

  Args:
    workdir: created if missing; gets `events/` and `metrics.jsonl`.
    resume_step: the step at which the run resumes, 0 for a new run: entries of later steps, which
      it will write again, are dropped. None keeps all.

  Raises:
    InputError: a line of `metrics.jsonl` other than the last is not a metric entry. A truncated
      last line, as left by a killed run, is dropped.
  """

  def __init__(self, workdir: str | os.PathLike, resume_step: int | None = None):
    workdir = expand(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    self._path = workdir / METRICS
    entries = _read_entries(self._path)
    if resume_step is not None:
      entries = [entry for entry in entries if entry["step"] <= resume_step]
    kept = "".join(json.dumps(entry) + "\n" for entry in entries)
    if self._path.exists() and self._path.read_text(encoding="utf-8", errors="replace") != kept:
      write_text(self._path, kept)
    if is_bucket(self._path):
      self._file: Any = GrowingObject(self._path, kept.encode(), METRICS_SECONDS)
    else:
      # Unbuffered, so that `write` returns how much a full disk has taken. Closed by `close`.
      self._file = open(self._path, "ab", buffering=0)  # noqa: SIM115
    self._unwritten = b""
    self._events = _Events(workdir / "events", None if resume_step is None else resume_step + 1)
    self._failing = False

  def write(self, step: int, values: Mapping[str, float | None]) -> None:
    """Records scalars (of any numeric type) at a step; None is left out.

    Raises:
      ValueError: a value that is not a scalar, or a metric named "step" or "time".
    """
    scalars = {}
    for name, value in values.items():
      if value is None:
        continue
      if name in RESERVED:
        raise ValueError(f"metric name {name!r} is reserved for the file's own entries")
      if np.size(value) != 1:
        raise ValueError(f"metric {name}: expected one number, got shape {np.shape(value)}")
      scalars[name] = float(np.asarray(value, np.float64).reshape(()))
    entry: dict[str, float | str] = {"step": int(step), "time": round(time.time(), 3)}
    entry |= {k: v if math.isfinite(v) else str(v) for k, v in scalars.items()}
    self._unwritten += (json.dumps(entry) + "\n").encode()
    with self._warn_on_oserror():
      self._flush()
    with self._warn_on_oserror():
      self._events.write(int(step), scalars)

  def flush(self) -> None:
    """Brings to the disk, or to the bucket, what was written so far."""
    with self._warn_on_oserror():
      self._flush()
      if is_bucket(self._path):
        self._file.flush()
      else:
        os.fsync(self._file.fileno())
    with self._warn_on_oserror():
      self._events.flush()

  def _flush(self) -> None:
    # Whole lines at a time: a killed run loses at most the line it was writing.
    while self._unwritten:
      self._unwritten = self._unwritten[self._file.write(self._unwritten) :]

  @contextlib.contextmanager
  def _warn_on_oserror(self) -> Iterator[None]:
    """Keeps a full disk from ending the run: entries stay in memory, and one warning is printed."""
    try:
      yield
    except OSError as error:
      if not self._failing:
        print(f"metrics not written to {self._path.parent} ({error.strerror}): trying again with "
              "the next", flush=True)  # fmt: skip
      self._failing = True
    else:
      self._failing = self._failing and bool(self._unwritten)

  def history(self) -> dict[str, list[tuple[int, float]]]:
    """Name -> [(step, value)], sorted by step; see `read_history`."""
    return read_history(self._path)

  def close(self) -> None:
    """Closes both files; a second call does nothing."""
    if not self._file.closed:
      with self._warn_on_oserror():
        self._flush()
    with self._warn_on_oserror():
      self._file.close()
    with self._warn_on_oserror():
      self._events.close()

  def __enter__(self) -> "MetricWriter":
    return self

  def __exit__(self, *_: object) -> None:
    self.close()


class _Events:
  """TensorBoard events, written immediately, in the caller's thread.

  The thread of tensorboardX's own writer dies when the disk is full, and later calls then block.

  Args:
    directory: where the files go; created with the first event.
    purge_step: TensorBoard hides events of earlier files from this step on; None hides none.
  """

  def __init__(self, directory: pathlib.Path, purge_step: int | None):
    self._directory, self._purge_step = directory, purge_step
    self._writer: Any = None  # a RecordWriter of tensorboardX
    self._files = 0

  def write(self, step: int, scalars: Mapping[str, float]) -> None:
    from tensorboardX import summary
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    summaries = [summary.scalar(name, value) for name, value in scalars.items()]
    try:
      events = [Event(step=step, wall_time=time.time(), summary=each) for each in summaries]
      if self._writer is None:
        self._open()
        events.insert(0, Event(wall_time=time.time(), file_version="brain.Event:2"))
        if self._purge_step is not None and self._files == 1:
          start = SessionLog(status=SessionLog.START)
          events.insert(1, Event(step=self._purge_step, session_log=start))
      for event in events:
        self._writer.write(event.SerializeToString())
      if not is_bucket(self._directory):
        self._writer.flush()
    except OSError:
      with contextlib.suppress(OSError):  # what is buffered fails again
        self.close()
      self._writer = None  # a truncated event would hide later ones, so these go to a new file
      raise

  def _open(self) -> None:
    # Imported here since tensorboardX loads protobuf, which prediction does not need.
    from tensorboardX.record_writer import RecordWriter, register_writer_factory

    grown = lambda path: GrowingObject(expand(path), b"", EVENTS_SECONDS)
    register_writer_factory("gs", SimpleNamespace(open=grown))

    # It warns of every NaN; the training loop reports those itself.
    logging.getLogger("tensorboardX.x2num").setLevel(logging.ERROR)
    self._directory.mkdir(parents=True, exist_ok=True)
    name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}"
    self._writer = RecordWriter(str(self._directory / f"{name}.{os.getpid()}.{self._files}"))
    self._files += 1

  def flush(self) -> None:
    if self._writer:
      self._writer.flush()

  def close(self) -> None:
    if self._writer:
      self._writer.close()
      self._writer = None


def read_history(path: str | os.PathLike) -> dict[str, list[tuple[int, float]]]:
  """Name -> [(step, value)] of a `metrics.jsonl`, sorted by step; {} if the file is missing.

  Of two values at the same step, the one written later is returned.

  Raises:
    InputError: a line other than the last is not a metric entry.
  """
  series: dict[str, dict[int, float]] = {}
  for entry in _read_entries(expand(path)):
    for name, value in entry.items():
      if name not in RESERVED:
        series.setdefault(name, {})[entry["step"]] = float(value)
  return {name: sorted(points.items()) for name, points in series.items()}


def _read_entries(path: pathlib.Path) -> list[dict]:
  """The entries of a metrics file, without a truncated last line."""
  if not path.exists():
    return []
  lines = path.read_bytes().decode(errors="replace").split("\n")
  while lines and not lines[-1].strip():
    lines.pop()
  entries = []
  for i, line in enumerate(lines):
    try:
      entry = json.loads(line)
      for name, value in entry.items():
        _ = int(value) if name == "step" else float(value)
      _ = entry["step"]
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
      if i + 1 == len(lines):
        break
      raise InputError(
        f"{path} line {i + 1}: expected a JSON object with a step and numbers, "
        f"got {line[:60]!r}; delete that line"
      ) from None
    entries.append(entry)
  return entries
