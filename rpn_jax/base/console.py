"""Terminal output: progress, tables, verbosity, exit status, the files of a workdir."""

import codecs
import contextlib
import io
import os
import pathlib
import re
import signal
import sys
import time
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from typing import TextIO

import numpy as np
from absl import logging

from rpn_jax.base import interrupts
from rpn_jax.base.errors import InputError
from rpn_jax.base.paths import expand

# Seconds between the lines that replace the progress bar if stderr is not a terminal.
LINE_SECONDS = 10.0

_silent = False


def silence() -> None:
  """Turns off all output but errors, for --quiet and for all processes but the first."""
  global _silent
  _silent = True
  sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (open until exit)


def set_verbosity(quiet: bool = False, verbose: bool = False) -> None:
  """Sets what a command prints; call it before JAX is imported.

  Args:
    quiet: print only errors.
    verbose: also print the log of Orbax, grain and absl at level INFO, and a line for every program
      that JAX compiles.
  """
  logging.set_verbosity(logging.INFO if verbose else logging.WARNING)
  if verbose:
    os.environ["JAX_LOG_COMPILES"] = "1"  # read when JAX is imported, which commands do later
  if quiet:
    silence()


def use_utf8() -> None:
  """Restarts Python in UTF-8 mode where the locale is ASCII, as LC_ALL=C with PYTHONUTF8=0.

  There neither arguments nor file names nor output could hold a name like "Straße". Call it first:
  what the process has done so far is lost.
  """
  if codecs.lookup(sys.getfilesystemencoding()).name == "ascii":
    os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])


def run_command(
  action: Callable[[], object], *, interrupted: str = "interrupted", verbose: bool = False
) -> int:
  """Runs a command and returns its exit status; errors are printed in one line.

  Args:
    action: the command; an integer it returns is the exit status.
    interrupted: message after Ctrl-C, unless the KeyboardInterrupt has one of its own.
    verbose: raise errors, with their traceback.

  Returns:
    0 on success; 2 after invalid input or a file that could not be read or written; 130 after
    Ctrl-C, of which a second one ends the process at once; 141, without a message, if the reader
    of the output is gone, as with `| head`.
  """
  for stream in (sys.stdout, sys.stderr):
    if isinstance(stream, io.TextIOWrapper):  # a letter that the terminal lacks ends no command
      stream.reconfigure(errors="backslashreplace")
  try:
    with interrupts.handled():
      status = action()
      sys.stdout.flush()  # raises here, not at exit, if the reader is gone
    return status if isinstance(status, int) else 0
  except KeyboardInterrupt as error:
    print(error.args[0] if error.args else interrupted, file=sys.stderr)
    return 128 + signal.SIGINT
  except BrokenPipeError:
    # Flushing the rest of the buffer at exit would raise again.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 128 + signal.SIGPIPE
  except (InputError, OSError) as error:  # OSError: a disk or a path, not a bug
    if verbose:
      raise
    print(f"error: {error}", file=sys.stderr)
    return 2


@contextlib.contextmanager
def silent_stderr() -> Iterator[None]:
  """Keeps libraries from writing to the terminal; callers tell of errors."""
  try:
    terminal = os.dup(2)
  except OSError:  # closed
    yield
    return
  try:
    with open(os.devnull, "wb") as nowhere:
      os.dup2(nowhere.fileno(), 2)
    yield
  finally:
    os.dup2(terminal, 2)
    os.close(terminal)


# Files of a workdir, in the order in which one looks at them.
WORKDIR_FILES = {
  "predictions.png": "image, ground truth and prediction",
  "confusion.png": "which classes are taken for which: rows are true, columns predicted",
  "predictions_*.png": "predictions of one of several sets",
  "confusion_*.png": "confusion of one of several sets",
  "curves.png": "losses and scores over the steps",
  "predictions": "overlays, labels and statistics of your images",
  "eval.md": "scores of every set and class, next to published ones",
  "eval.json": "the same as JSON",
  "classify.json": "probabilities of every image",
  "metrics.json": "last and best scores, the config, versions",
  "best.json": "scores of the best checkpoint so far, which is kept",
  "metrics.jsonl": "the log as JSON lines",
  "events": "the log for TensorBoard",
  "checkpoints": "prompts and optimizer state, the latest two and the best",
  "export": "the model to pass on: prompts, card, picture; rpn share uploads it",
  "prompts.safetensors": "the trained prompts alone, for --config.prompts",
  "config.json": "the whole config; all that Segmenter.load needs besides checkpoints",
}


def workdir_files(workdir: pathlib.Path) -> dict[str, str]:
  """Name -> what it is, of every known file in a workdir."""
  found: dict[str, str] = {}
  for name, text in WORKDIR_FILES.items():
    files = sorted(workdir.glob(name)) if "*" in name else [workdir / name]
    found |= {path.name: text for path in files if path.exists()}
  return found


def describe_workdir(workdir: str | os.PathLike) -> str:
  """A line for every known file in a workdir."""
  workdir = expand(workdir)
  found = workdir_files(workdir)
  width = max(map(len, found), default=0)
  return "\n".join([f"In {workdir}:", *(f"  {n:{width}}  {text}" for n, text in found.items())])


class Progress:
  """Progress of a loop, created by `progress`: iterate over it, or call `update`.

  On a terminal it is a tqdm bar. Elsewhere it prints a line about every ten seconds, so that the
  log of a long job shows that it is alive and the log of a short one stays clean.
  """

  def __init__(
    self, iterable: Iterable | None, total: int | None, desc: str, unit: str, initial: int = 0
  ):
    # Looked up here, since tests and notebooks replace it.
    self._stream = sys.stderr
    self._iterable, self._total, self._desc, self._unit = iterable, total, desc, unit
    self._bar = None
    self._postfix = ""
    self._initial = self._done = initial
    self._line_done: float = initial
    self._line_at, self._rate = time.monotonic(), 0.0
    isatty = getattr(self._stream, "isatty", None)
    if isatty is not None and isatty() and not _silent:
      from tqdm import tqdm

      # The terminals of some job runners report a size of 0 by 0, for which tqdm draws nothing.
      width = {"dynamic_ncols": True} if _has_columns(self._stream) else {"ncols": 80, "nrows": 24}
      self._bar = tqdm(
        total=total, initial=initial, desc=desc, unit=f" {unit}", file=self._stream, **width
      )

  def __iter__(self) -> Iterator:
    if self._iterable is None:
      raise TypeError("progress of a total has nothing to iterate over: call update()")
    try:
      for item in self._iterable:
        yield item
        self.update()
    finally:
      self.close()

  def update(self, count: int = 1, earlier: float = 0.0) -> None:
    """Counts `count` more units as done, `earlier` of them, as 0.9, by an earlier run."""
    self._done += count
    self._line_done += earlier
    if self._bar is not None:
      self._bar.initial += earlier  # tqdm's rates leave out what is before these
      self._bar.last_print_n += earlier
      self._bar.update(count)
      return
    now = time.monotonic()
    if now - self._line_at >= LINE_SECONDS and not _silent:
      self._line(now)

  def set_postfix(self, **values: object) -> None:
    """Sets what is shown after the rate, such as `loss="0.123"`."""
    self._postfix = ", ".join(f"{name}={_cell(value)}" for name, value in values.items())
    if self._bar is not None:
      # Drawn with the next update, as drawing here as well would double the work; but the first of
      # all, which may be long in coming.
      self._bar.set_postfix_str(self._postfix, refresh=self._done == self._initial)

  def close(self) -> None:
    """Closes the bar; a second call does nothing."""
    if self._bar is not None:
      self._bar.close()

  def __enter__(self) -> "Progress":
    return self

  def __exit__(self, *_: object) -> None:
    self.close()

  def _line(self, now: float) -> None:
    # The higher rate of the last two intervals: the overall rate would include compilation for
    # hours, and a single interval may contain little but compilation or an evaluation.
    recent = (self._done - self._line_done) / (now - self._line_at)
    rate, self._rate = max(recent, self._rate), recent
    count = f"{self._done}" if self._total is None else f"{self._done}/{self._total}"
    parts = [f"{self._desc}: {count} {self._unit}"]
    if self._done - self._initial > 1:  # the first may have been compiled meanwhile
      parts.append(f"{rate:.3g} {self._unit}/s")
      if self._total is not None and rate > 0:
        parts.append(f"{_duration((self._total - self._done) / rate)} left")
    if self._postfix:
      parts.append(self._postfix)
    print(", ".join(parts), file=self._stream, flush=True)
    self._line_at, self._line_done = now, self._done


def progress(iterable_or_total: Iterable | int, desc: str, unit: str, initial: int = 0) -> Progress:
  """The progress display of every long loop: units done, rate, time left, and a postfix.

  Args:
    iterable_or_total: what to iterate over, or the total number of units, which `update` reports.
    desc: what is being done, such as "train".
    unit: what is counted, in the singular, such as "step".
    initial: units done by an earlier run; they do not count towards the rate. They are part of a
      total, and come before what is iterated over.
  """
  if isinstance(iterable_or_total, int):
    return Progress(None, iterable_or_total, desc, unit, initial)
  total = initial + len(iterable_or_total) if isinstance(iterable_or_total, Sized) else None
  return Progress(iterable_or_total, total, desc, unit, initial)


def _has_columns(stream: TextIO) -> bool:
  try:
    return os.get_terminal_size(stream.fileno()).columns > 0
  except (OSError, ValueError, AttributeError):
    return False


def _duration(seconds: float) -> str:
  """Formats as 1:02:03, or 2:03 below an hour."""
  minutes, seconds = divmod(round(max(0.0, seconds)), 60)
  hours, minutes = divmod(minutes, 60)
  return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _cell(value: object) -> str:
  if value is None:
    return "-"
  if isinstance(value, (float, np.floating)):
    return f"{value:.4g}"
  return " ".join(str(value).split())


def _columns_of(text: str) -> int:
  """Width of a text in terminal columns: East Asian characters take two, combining ones none."""
  wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
  return len(text) + wide - sum(unicodedata.combining(c) > 0 for c in text)


# Cells that are right-aligned: 84.6, -3, 1e-05, 12 %, 84.6 ± 0.3, 1.6 [-0.4, 3.6], 3,353,856, 2x
NUMBER = re.compile(
  r"[-+<~]?\d[\d.,]*(e[-+]?\d+)?( ?± ?[\d.]+| \[[-\d., ]+\])?( ?[%a-zA-Z/]{1,4})?|-|nan|inf|"
)


def percent(value: float | None) -> str:
  """A cell with a fraction in percent."""
  return "-" if value is None else f"{100 * value:.1f}"


def table(rows: Sequence[Sequence], headers: Sequence, *, markdown: bool = False) -> str:
  """An aligned table with numbers to the right.

  Args:
    rows: cells of any type; floats are shown with four digits, None as "-".
    headers: one per column.
    markdown: return a Markdown table instead of plain text.

  Returns:
    The table, without a newline at the end.

  Raises:
    ValueError: a row does not have one cell per header.
  """
  heads = [_cell(head) for head in headers]
  body = [[_cell(value) for value in row] for row in rows]
  for i, row in enumerate(body):
    if len(row) != len(heads):
      raise ValueError(f"row {i}: expected {len(heads)} cells, one per header, got {len(row)}")
  right = [bool(body) and all(NUMBER.fullmatch(row[k]) for row in body) for k in range(len(heads))]
  if markdown:
    heads, *body = [[c.replace("|", "\\|") for c in row] for row in (heads, *body)]
  # Some Markdown parsers need at least three dashes.
  widths = [
    max(3 if markdown else 1, *(_columns_of(row[k]) for row in (heads, *body)))
    for k in range(len(heads))
  ]

  def aligned(row: Sequence[str]) -> list[str]:
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
