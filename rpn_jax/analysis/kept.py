"""The scores of many runs in one small file, to keep where the runs themselves are not.

    python -m rpn_jax report runs/study/* --keep=study.json     # on the machine that has the runs
    python -m rpn_jax report study.json --out=report            # anywhere: the same tables, figures

The file has what tables and figures are made of: configs (what all runs share once), last and best
scores, the courses of the scores, parameters. Weights and losses are not in it. `sweep --keep`
writes such a file, too, and does not repeat the runs that it finds there.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
from collections.abc import Collection, Mapping, Sequence

from rpn_jax.analysis.runs import FinishedRun, flatten, numbers, read_run
from rpn_jax.base.errors import InputError
from rpn_jax.base.paths import expand, locked, write_text
from rpn_jax.training.loop import NOT_FINITE

SUFFIX, FORMAT = ".json", "rpn_jax runs 1"
# Digits of the points of a curve.
DIGITS = 6
LOG = "log.txt"  # of the process of a sweep's run


@dataclasses.dataclass
class Content:
  """Of a file.

  Attributes:
    runs: their names -> runs.
    diverged: names of runs that were given up since their loss was no number.
    sweep: the settings of the sweep that keeps them, if one does.
  """

  runs: dict[str, FinishedRun]
  diverged: set[str] = dataclasses.field(default_factory=set)
  sweep: Mapping | None = None


def keep(path: str | os.PathLike, runs: Sequence[FinishedRun]) -> pathlib.Path:
  """Writes the file, a run on each line; returns its path.

  Raises:
    InputError: another file, or one that a sweep keeps, is there.
  """
  path = expand(path)
  if path.exists():
    try:
      there = read_content(path)
    except InputError:
      raise InputError(f"--keep={path}: another file is there; choose a new name") from None
    if there.sweep is not None:
      raise InputError(f"--keep={path}: a sweep keeps its runs there; choose a new name")
  path.parent.mkdir(parents=True, exist_ok=True)
  names = [run.directory.name for run in runs]
  _write(path, list(zip(names, runs)), {})
  return path


def read(path: str | os.PathLike) -> list[FinishedRun]:
  """The runs of a file that `keep` or a sweep wrote.

  Raises:
    InputError: there is no such file, or it is another or a damaged one, or it has no runs.
  """
  path = expand(path)
  runs = _read(path)[0]
  if not runs:
    raise InputError(f"{path}: no run has been kept in it yet")
  return [run for _, run in runs]


def read_content(path: pathlib.Path) -> Content:
  """All of a file; see `read`."""
  runs, head = _read(path)
  return Content(dict(runs), set(head.get("diverged", ())), head.get("sweep"))


class Results:
  """What is known of a sweep's runs: from their workdirs, or else from a file that outlives them.

  Args:
    root: the folder of the workdirs.
    path: of the file; None keeps nothing.
    settings: of the sweep.

  Raises:
    InputError: the file is damaged, or that of another sweep.
  """

  def __init__(self, root: pathlib.Path, path: pathlib.Path | None, settings: Mapping):
    self._root, self._path, self._settings = root, path, dict(settings)
    self._kept = self._there()
    self._read: dict[pathlib.Path, FinishedRun] = {}

  def _there(self) -> Content:
    if self._path is None or not self._path.exists():
      return Content({})
    content = read_content(self._path)
    if content.sweep != self._settings:
      raise InputError(
        f"--keep={self._path}: has runs of {content.sweep or 'no sweep'}, asked for: "
        f"{self._settings}; choose another file"
      )
    return content

  def read(self, workdir: pathlib.Path) -> FinishedRun:
    """The run of a workdir, whose files are read once; InputError or OSError if there is none."""
    if workdir not in self._read:
      try:
        self._read[workdir] = read_run(workdir)
      except (InputError, OSError):
        if (run := self._kept.runs.get(self._name(workdir))) is not None:
          return run
        raise
    return self._read[workdir]

  def runs(self) -> list[FinishedRun]:
    """Those that the file has."""
    return list(self._kept.runs.values())

  def is_done(self, workdir: pathlib.Path) -> bool:
    """Whether there is a run that has ended well."""
    with contextlib.suppress(InputError, OSError):
      self.read(workdir)
      return True
    return False

  def ended(self, workdir: pathlib.Path) -> bool:
    """Whether a run has come to an end that counts."""
    return self.is_done(workdir) or self.diverged(workdir)

  def diverged(self, workdir: pathlib.Path) -> bool:
    """Whether a run was given up since its loss was no number: an answer, and not a failure."""
    with contextlib.suppress(OSError):
      log = (workdir / LOG).read_text(encoding="utf-8", errors="replace")
      return NOT_FINITE in log
    return self._name(workdir) in self._kept.diverged

  def keep(self, workdirs: Collection[pathlib.Path]) -> None:
    """Adds to the file what has ended; what others have added meanwhile stays.

    Raises:
      InputError: see the class; or the file cannot be written.
    """
    if self._path is None:
      return
    try:
      self._path.parent.mkdir(parents=True, exist_ok=True)
      with locked(self._path.with_name(f".{self._path.name}.lock"), str(self._path), wait=True):
        self._add(workdirs, self._path)
    except OSError as error:
      raise InputError(
        f"--keep={self._path}: cannot be written ({error.strerror or error}); choose a file in a "
        "folder that can"
      ) from None

  def _add(self, workdirs: Collection[pathlib.Path], path: pathlib.Path) -> None:
    self._kept = self._there()
    for workdir in workdirs:
      name = self._name(workdir)
      try:
        self._kept.runs[name] = self.read(workdir)
        self._kept.diverged.discard(name)
      except (InputError, OSError):
        if self.diverged(workdir) and name not in self._kept.runs:
          self._kept.diverged.add(name)
    head = {"sweep": self._settings, "diverged": sorted(self._kept.diverged)}
    _write(path, sorted(self._kept.runs.items()), head)

  def _name(self, workdir: pathlib.Path) -> str:
    return workdir.relative_to(self._root).as_posix()


def _write(path: pathlib.Path, runs: Sequence[tuple[str, FinishedRun]], head: Mapping) -> None:
  configs = [flatten(run.config) for _, run in runs]
  shared = {
    field: value
    for field, value in (configs[0] if configs else {}).items()
    if all(field in config and config[field] == value for config in configs)
  }
  lines = []
  for (name, run), config in zip(runs, configs):
    history = {
      metric: [[step, round(value, DIGITS)] for step, value in points]
      for metric, points in run.history.items()
      if metric.startswith("eval/")
    }
    lines.append(
      {
        "directory": name,
        "clip": run.clip,
        "config": {field: value for field, value in config.items() if field not in shared},
        "last": run.last,
        "best": run.best,
        "history": history,
        "evaluations": run.evaluations,
        "trained_parameters": run.trained_parameters,
      }
    )
  rows = ",\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
  first = json.dumps({"format": FORMAT, **head, "config": shared}, ensure_ascii=False)
  write_text(path, f'{first[:-1]}, "runs": [\n{rows}\n]}}\n')


def _read(path: pathlib.Path) -> tuple[list[tuple[str, FinishedRun]], dict]:
  """(name, run) of every run, and the rest of the file."""
  try:
    content = json.loads(path.read_text(encoding="utf-8"))
    if content["format"] != FORMAT:
      raise ValueError
    runs = [
      (
        run["directory"],
        FinishedRun(
          path.parent / run["directory"],
          _nested({**content["config"], **run["config"]}),
          numbers(run["last"]),
          numbers(run["best"]),
          {
            name: [(int(step), float(value)) for step, value in points]
            for name, points in run["history"].items()
          },
          {name: numbers(scores) for name, scores in run["evaluations"].items()},
          run["trained_parameters"],
          str(run.get("clip", "")),
        ),
      )
      for run in content["runs"]
    ]
    if not all(run.data_set for _, run in runs) or not (runs or content.get("sweep")):
      raise ValueError
    sweep = content.get("sweep")
    if sweep is not None and not {"file", "config", "flags"} <= set(sweep):
      raise ValueError
    return runs, {name: content[name] for name in ("sweep", "diverged") if name in content}
  except OSError as error:
    raise InputError(f"{path}: expected runs that `report --keep` wrote, got {error}") from None
  except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
    raise InputError(
      f"{path}: expected runs that `report --keep` wrote ({FORMAT}), got another or a damaged "
      "file; write it again"
    ) from None


def _nested(flat: dict) -> dict:
  nested: dict = {}
  for path, value in flat.items():
    *sections, name = path.split(".")
    section = nested
    for key in sections:
      section = section.setdefault(key, {})
    section[name] = value
  return nested
