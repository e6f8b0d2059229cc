"""Metrics of a run on disk: lines of JSON and TensorBoard events."""

import contextlib
import json
import logging
import math
import os
import pathlib
import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from rpn_jax.base.errors import InputError
from rpn_jax.base.paths import write_text

RESERVED = ("step", "time")


class MetricWriter:
  """Metrics of a run, as TensorBoard events and as `metrics.jsonl`.

  The JSON file has an object per line, {"step": int, "time": seconds since 1970, name: value, ...},
  and is only appended to while a run goes on. It is what `history` reads, so curves survive a
  resume. Values that are not finite are stored as the strings "nan", "inf" and "-inf", which keeps
  every line standard JSON.

  Args:
    workdir: made if it is missing; gets `events/` and `metrics.jsonl`.
    resume_step: the step at which a run continues, 0 for a new one: entries of later steps, which
      the run will write again, are dropped. None keeps all.

  Raises:
    InputError: a line of `metrics.jsonl` other than the last is no metric entry. A last line that
      was cut off, as by a killed run, is dropped.
  """

  def __init__(self, workdir: str | os.PathLike, resume_step: int | None = None):
    workdir = pathlib.Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    self._path = workdir / "metrics.jsonl"
    entries = _read_entries(self._path)
    if resume_step is not None:
      entries = [entry for entry in entries if entry["step"] <= resume_step]
    kept = "".join(json.dumps(entry) + "\n" for entry in entries)
    if self._path.exists() and self._path.read_text(errors="replace") != kept:
      write_text(self._path, kept)
    # Stays open across calls: `close` ends it. Unbuffered: what a full disk refuses is known.
    self._file = open(self._path, "ab", buffering=0)  # noqa: SIM115
    self._unwritten = b""
    self._events = _Events(workdir / "events", None if resume_step is None else resume_step + 1)
    self._failing = False

  def write(self, step: int, values: Mapping[str, float | None]) -> None:
    """Records numbers (scalars of any kind) at a step; None is left out.

    Raises:
      ValueError: a value that is no single number, or a metric called "step" or "time".
    """
    numbers = {}
    for name, value in values.items():
      if value is None:
        continue
      if name in RESERVED:
        raise ValueError(f"a metric must not be called {name!r}: the file uses that name itself")
      if np.size(value) != 1:
        raise ValueError(f"metric {name}: expected one number, got shape {np.shape(value)}")
      numbers[name] = float(np.asarray(value, np.float64).reshape(()))
    entry: dict[str, float | str] = {"step": int(step), "time": round(time.time(), 3)}
    entry |= {k: v if math.isfinite(v) else str(v) for k, v in numbers.items()}
    self._unwritten += (json.dumps(entry) + "\n").encode()
    with self._telling():
      self._flush()
    with self._telling():
      self._events.scalars(int(step), numbers)

  def _flush(self) -> None:
    # One write of whole lines: a killed run loses at most the line it was writing.
    while self._unwritten:
      self._unwritten = self._unwritten[self._file.write(self._unwritten) :]

  @contextlib.contextmanager
  def _telling(self) -> Iterator[None]:
    """A full disk does not end a run: lines wait in memory, and one is printed about it."""
    try:
      yield
    except OSError as error:
      if not self._failing:
        print(f"metrics not written to {self._path.parent} ({error.strerror}): trying again with "
              "the next", flush=True)  # fmt: skip
      self._failing = True
    else:
      self._failing = self._failing and bool(self._unwritten)

  def image(self, step: int, name: str, array: np.ndarray) -> None:
    """Adds a picture to the events: (H, W, 3) or (H, W), uint8 or floats in [0, 1].

    Raises:
      ValueError: another shape.
    """
    array = np.asarray(array)
    if array.ndim == 2:
      array = np.repeat(array[..., None], 3, axis=2)
    if array.ndim != 3 or array.shape[2] != 3:
      raise ValueError(f"image {name}: expected (H, W, 3) or (H, W), got {array.shape}")
    if array.dtype != np.uint8:
      array = (np.clip(array.astype(np.float32), 0, 1) * 255 + 0.5).astype(np.uint8)
    with self._telling():
      self._events.image(int(step), name, array)

  def history(self) -> dict[str, list[tuple[int, float]]]:
    """Name -> [(step, value)] by step; of two values at one step the later written counts."""
    return read_history(self._path)

  def close(self) -> None:
    """Ends both files; a second call does nothing."""
    if not self._file.closed:
      with self._telling():
        self._flush()
    self._file.close()
    with self._telling():
      self._events.close()

  def __enter__(self) -> "MetricWriter":
    return self

  def __exit__(self, *_: object) -> None:
    self.close()


class _Events:
  """TensorBoard events, written at once and in the caller's thread.

  tensorboardX's own writer has a thread that ends at the first full disk, after which every call
  waits for it.

  Args:
    directory: of the files; made with the first event.
    purge_step: TensorBoard hides what earlier files have from this step on; None: nothing.
  """

  def __init__(self, directory: pathlib.Path, purge_step: int | None):
    self._directory, self._purge_step = directory, purge_step
    self._writer: Any = None  # of tensorboardX
    self._files = 0

  def scalars(self, step: int, values: Mapping[str, float]) -> None:
    from tensorboardX import summary

    self._write(step, [summary.scalar(name, value) for name, value in values.items()])

  def image(self, step: int, name: str, array: np.ndarray) -> None:
    from tensorboardX import summary

    self._write(step, [summary.image(name, array, dataformats="HWC")])

  def _write(self, step: int, summaries: list) -> None:
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    try:
      events = [Event(step=step, wall_time=time.time(), summary=each) for each in summaries]
      if self._writer is None:
        self._open()
        if self._purge_step is not None and self._files == 1:
          start = SessionLog(status=SessionLog.START)
          events.insert(0, Event(step=self._purge_step, session_log=start))
      for event in events:
        self._writer.write_event(event)
      self._writer.flush()
    except OSError:
      self._writer = None  # half an event would hide what follows: the next goes to a new file
      raise

  def _open(self) -> None:
    # Imported late: tensorboardX loads protobuf, which commands that only predict do not need.
    from tensorboardX.event_file_writer import EventsWriter

    # A NaN is recorded as one; the run itself has told of it.
    logging.getLogger("tensorboardX.x2num").setLevel(logging.ERROR)
    self._directory.mkdir(parents=True, exist_ok=True)
    suffix = f".{os.getpid()}.{self._files}"
    self._writer = EventsWriter(str(self._directory / "events"), suffix)
    self._files += 1

  def close(self) -> None:
    if self._writer:
      self._writer.close()
      self._writer = None


def read_history(path: str | os.PathLike) -> dict[str, list[tuple[int, float]]]:
  """Name -> [(step, value)] of a `metrics.jsonl`, as `MetricWriter.history`; {} if it is missing.

  Raises:
    InputError: a line other than the last is no metric entry.
  """
  series: dict[str, dict[int, float]] = {}
  for entry in _read_entries(pathlib.Path(path)):
    for name, value in entry.items():
      if name not in RESERVED:
        series.setdefault(name, {})[entry["step"]] = float(value)
  return {name: sorted(points.items()) for name, points in series.items()}


def _read_entries(path: pathlib.Path) -> list[dict]:
  """The objects of a metrics file, without a last line that was cut off."""
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
