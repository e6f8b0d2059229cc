"""What a run leaves to read: metrics on disk, one progress display, tables for the terminal.

Named like the standard module, which `import logging` still finds: imports here are absolute.
"""

import contextlib
import json
import logging
import math
import os
import pathlib
import re
import sys
import time
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from rpn_jax.errors import InputError

# Seconds between the lines that stand in for a progress bar where stderr is a file.
LINE_EVERY = 10.0
RESERVED = ("step", "time")

_silent = False


def silence() -> None:
  """Ends all print and progress of this process, such as one whose fellow reports; not errors."""
  global _silent
  _silent = True
  sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (as long as the process)


def set_loudness(quiet: bool = False, verbose: bool = False) -> None:
  """What a command prints: nothing but errors, the usual, or also what the libraries say.

  Verbose are the log of Orbax, grain and absl at level INFO, and a line for every program that JAX
  compiles.
  """
  from absl import logging as absl_logging

  absl_logging.set_verbosity(absl_logging.INFO if verbose else absl_logging.WARNING)
  if verbose:
    import jax

    jax.config.update("jax_log_compiles", True)
  if quiet:
    silence()


# What a workdir may hold, in the order in which one looks at it.
CONTENTS = {
  "predictions.png": "image, truth and prediction",
  "confusion.png": "what is taken for what",
  "curves.png": "losses and scores over the steps",
  "predictions": "overlays, labels and numbers of your pictures",
  "eval.md": "scores of every set and class, beside published ones",
  "eval.json": "the same as numbers",
  "classify.json": "probabilities of every picture",
  "metrics.json": "last and best scores, the config, versions",
  "best.json": "the best scores so far",
  "metrics.jsonl": "the log, a line of JSON per entry",
  "events": "the log for TensorBoard",
  "checkpoints": "prompts and optimizer state, the latest two and the best",
  "prompts.safetensors": "the trained prompts alone, for --config.prompts",
  "config.json": "every setting; with checkpoints all that Segmenter.load needs",
}


def contents(workdir) -> str:
  """Lines that say what is in a workdir and what it is."""
  workdir = pathlib.Path(workdir)
  there = {name: text for name, text in CONTENTS.items() if (workdir / name).exists()}
  width = max(map(len, there), default=0)
  return "\n".join([f"In {workdir}:", *(f"  {n:{width}}  {text}" for n, text in there.items())])


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

  def __init__(self, workdir, resume_step: int | None = None):
    workdir = pathlib.Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    self._path = workdir / "metrics.jsonl"
    entries = _read_entries(self._path)
    if resume_step is not None:
      entries = [entry for entry in entries if entry["step"] <= resume_step]
    kept = "".join(json.dumps(entry) + "\n" for entry in entries)
    if self._path.exists() and self._path.read_text(errors="replace") != kept:
      temporary = self._path.with_name(self._path.name + ".tmp")
      temporary.write_text(kept)
      os.replace(temporary, self._path)
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
    entry = {"step": int(step), "time": round(time.time(), 3)}
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
  def _telling(self):
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

  def __exit__(self, *_) -> None:
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
    self._writer = None
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


def read_history(path) -> dict[str, list[tuple[int, float]]]:
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


def write_json(path: pathlib.Path, content: dict) -> None:
  """Writes JSON beside `path` and renames, so that no reader sees half a file."""
  temporary = path.with_name(path.name + ".tmp")
  temporary.write_text(json.dumps(content, indent=1) + "\n")
  os.replace(temporary, path)


class Progress:
  """Progress of a loop, made by `progress`: iterate over it, or call `update`.

  On a terminal it is a tqdm bar. Elsewhere it is silent but for one line about every ten seconds,
  so that the log of a long job shows that it lives and that of a short one stays clean.
  """

  def __init__(self, iterable: Iterable | None, total: int | None, desc: str, unit: str):
    # Looked up at each call, since tests and notebooks replace it.
    self._stream = sys.stderr
    self._iterable, self._total, self._desc, self._unit = iterable, total, desc, unit
    self._bar = None
    self._postfix = ""
    self._done = self._lined_done = 0
    self._lined_at, self._rate = time.monotonic(), 0.0
    isatty = getattr(self._stream, "isatty", None)
    if isatty is not None and isatty() and not _silent:
      from tqdm import tqdm

      # Some job runners' terminals report a size of 0 by 0, where tqdm would draw nothing.
      width = {"dynamic_ncols": True} if _has_columns(self._stream) else {"ncols": 80, "nrows": 24}
      self._bar = tqdm(total=total, desc=desc, unit=f" {unit}", file=self._stream, **width)

  def __iter__(self) -> Iterator:
    if self._iterable is None:
      raise TypeError("progress of a total has nothing to iterate over: call update()")
    try:
      for item in self._iterable:
        yield item
        self.update()
    finally:
      self.close()

  def update(self, count: int = 1) -> None:
    """Counts `count` more units as done."""
    self._done += count
    if self._bar is not None:
      self._bar.update(count)
      return
    now = time.monotonic()
    if now - self._lined_at >= LINE_EVERY and not _silent:
      self._line(now)

  def set_postfix(self, **values) -> None:
    """What to show behind the rate, such as `loss="0.123"`."""
    self._postfix = ", ".join(f"{name}={_cell(value)}" for name, value in values.items())
    if self._bar is not None:
      # Drawn with the next update: drawing here too would double the terminal's work.
      self._bar.set_postfix_str(self._postfix, refresh=False)

  def close(self) -> None:
    """Ends the bar; a second call does nothing."""
    if self._bar is not None:
      self._bar.close()

  def __enter__(self) -> "Progress":
    return self

  def __exit__(self, *_) -> None:
    self.close()

  def _line(self, now: float) -> None:
    # The rate since the last line: that of the whole run would include compilation for hours. The
    # first unit may be hardly anything else, and an evaluation may lie between two lines.
    since = (self._done - self._lined_done) / (now - self._lined_at)
    rate, self._rate = max(since, self._rate), since
    count = f"{self._done}" if self._total is None else f"{self._done}/{self._total}"
    parts = [f"{self._desc}: {count} {self._unit}"]
    if self._done > 1:
      parts.append(f"{rate:.3g} {self._unit}/s")
      if self._total is not None and rate > 0:
        parts.append(f"{_duration((self._total - self._done) / rate)} left")
    if self._postfix:
      parts.append(self._postfix)
    print(", ".join(parts), file=self._stream, flush=True)
    self._lined_at, self._lined_done = now, self._done


def progress(iterable_or_total: Iterable | int, desc: str, unit: str) -> Progress:
  """The progress display of every long loop: done, rate, time left, and a postfix.

  Args:
    iterable_or_total: what to iterate over, or how many units `update` will report.
    desc: what goes on, such as "train".
    unit: what is counted, singular, such as "step".
  """
  if isinstance(iterable_or_total, int):
    return Progress(None, iterable_or_total, desc, unit)
  try:
    total = len(iterable_or_total)
  except TypeError:
    total = None
  return Progress(iterable_or_total, total, desc, unit)


def _has_columns(stream) -> bool:
  try:
    return os.get_terminal_size(stream.fileno()).columns > 0
  except (OSError, ValueError, AttributeError):
    return False


def _duration(seconds: float) -> str:
  """1:02:03, or 2:03 below an hour."""
  minutes, seconds = divmod(round(max(0.0, seconds)), 60)
  hours, minutes = divmod(minutes, 60)
  return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _cell(value) -> str:
  if value is None:
    return "-"
  if isinstance(value, (float, np.floating)):
    return f"{value:.4g}"
  return " ".join(str(value).split())


def _columns_of(text: str) -> int:
  """Terminal columns a text takes: Chinese and the like take two a letter, accents none."""
  wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
  return len(text) + wide - sum(unicodedata.combining(c) > 0 for c in text)


# 84.6, -3, 1e-05, 12 %, 84.6 ± 0.3, 3,353,856, 2x, 0.55 s
NUMBER = re.compile(r"[-+<~]?\d[\d.,]*(e[-+]?\d+)?( ?± ?[\d.]+)?( ?[%a-zA-Z/]{1,4})?|-|nan|inf|")


def table(rows: Sequence[Sequence], headers: Sequence, *, markdown: bool = False) -> str:
  """An aligned table, numbers to the right.

  Args:
    rows: cells of any kind; floats get four digits, None becomes "-".
    headers: one per column.
    markdown: a Markdown table instead of one ruled with dashes.

  Returns:
    Lines without a newline at the end.

  Raises:
    ValueError: a row with another number of cells than there are headers.
  """
  heads = [_cell(head) for head in headers]
  body = [[_cell(value) for value in row] for row in rows]
  for i, row in enumerate(body):
    if len(row) != len(heads):
      raise ValueError(f"row {i}: expected {len(heads)} cells, one per header, got {len(row)}")
  right = [bool(body) and all(NUMBER.fullmatch(row[k]) for row in body) for k in range(len(heads))]
  if markdown:
    heads, *body = [[c.replace("|", "\\|") for c in row] for row in (heads, *body)]
  # Three, the shortest rule that every Markdown reader takes for one.
  widths = [
    max(3 if markdown else 1, *(_columns_of(row[k]) for row in (heads, *body)))
    for k in range(len(heads))
  ]

  def aligned(row):
    return [
      " " * (w - _columns_of(c)) + c if r else c + " " * (w - _columns_of(c))
      for c, w, r in zip(row, widths, right)
    ]

  if markdown:
    rule = ["-" * (w - 1) + ":" if r else "-" * w for w, r in zip(widths, right)]
    lines = [aligned(heads), rule, *map(aligned, body)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
  lines = [aligned(heads), ["-" * w for w in widths], *map(aligned, body)]
  return "\n".join("  ".join(line).rstrip() for line in lines)
