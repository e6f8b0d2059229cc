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

from flax import traverse_util

from rpn_jax.analysis.runs import FinishedRun, flatten, numbers, read_run
from rpn_jax.base.errors import InputError
from rpn_jax.base.paths import expand, locked, write_text
from rpn_jax.training.loop import LOG, NOT_FINITE

SUFFIX, FORMAT = ".json", "rpn_jax runs 1"
# Digits of the points of a curve.
DIGITS = 6


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
      _, head = _read(path)
    except InputError:
      raise InputError(f"--keep={path}: another file is there; choose a new name") from None
    if head.get("sweep") is not None:
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
  """All of a file; see `read`.

  Raises:
    InputError: see there; or two different runs have one name, as after a merge by hand.
  """
  runs, head = _read(path)
  found: dict[str, FinishedRun] = {}
  for name, run in runs:
    _check_equal(name, found.setdefault(name, run), run, f"another line of {path}")
  return Content(found, set(head.get("diverged", ())), head.get("sweep"))


def _check_equal(name: str, kept: FinishedRun, other: FinishedRun, where: str) -> None:
  if kept.last != other.last:
    raise InputError(
      f"{name}: has a kept hIoU of {kept.last['hiou']} and {other.last['hiou']} in {where}: "
      "delete the line of one, or its folder"
    )


class Results:
  """What is known of a sweep's runs: from their workdirs, or else from a file that outlives them.

  Args:
    root: the folder of the workdirs.
    path: of the file; None keeps nothing.
    settings: of the sweep.
    only_kept: whether workdirs are left alone.

  Attributes:
    settings: see above.

  Raises:
    InputError: the file is damaged, or that of another sweep.
  """

  def __init__(
    self, root: pathlib.Path, path: pathlib.Path | None, settings: Mapping, only_kept: bool = False
  ):
    self._root, self._path, self.settings = root, path, dict(settings)
    self._only_kept = only_kept
    self._kept = self._there()
    self._read: dict[pathlib.Path, FinishedRun] = {}

  def _there(self) -> Content:
    if self._path is None or not self._path.exists():
      return Content({})
    content = read_content(self._path)
    if content.sweep != self.settings:
      raise InputError(
        f"--keep={self._path}: has runs of {content.sweep or 'no sweep'}, asked for: "
        f"{self.settings}; choose another file"
      )
    return content

  def read(self, workdir: pathlib.Path) -> FinishedRun:
    """The run of a workdir, whose files are read once; InputError or OSError if there is none."""
    if workdir not in self._read:
      try:
        if self._only_kept:
          raise InputError(f"{workdir}: is not in the file")
        self._read[workdir] = read_run(workdir)
      except (InputError, OSError):
        if (kept := self._kept.runs.get(self.name(workdir))) is not None:
          return kept
        if self.diverged(workdir):
          raise InputError(f"{workdir}: diverged, its loss was no number") from None
        raise
    return self._read[workdir]

  def runs(self) -> dict[str, FinishedRun]:
    """Those that the file has, by their names in it."""
    return dict(self._kept.runs)

  def name(self, workdir: pathlib.Path) -> str:
    """What the file calls a workdir."""
    return workdir.relative_to(self._root).as_posix()

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
    if not self._only_kept:
      with contextlib.suppress(OSError):
        return NOT_FINITE in (workdir / LOG).read_text(encoding="utf-8", errors="replace")
    return self.name(workdir) in self._kept.diverged

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
      name = self.name(workdir)
      try:
        run = self.read(workdir)
      except (InputError, OSError):
        if self.diverged(workdir):
          self._kept.diverged.add(name)
        continue
      _check_equal(name, self._kept.runs.get(name, run), run, str(workdir))
      self._kept.runs[name] = run
      self._kept.diverged.discard(name)
    head = {"sweep": self.settings, "diverged": sorted(self._kept.diverged)}
    _write(path, sorted(self._kept.runs.items()), head)


def _write(path: pathlib.Path, runs: Sequence[tuple[str, FinishedRun]], head: Mapping) -> None:
  # Sorted, so that a file that is read and written again is the same.
  configs = [dict(sorted(flatten(run.config).items())) for _, run in runs]
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
        # Of few runs, so that the files of the others are as they were.
        **({"evaluated_with": dict(run.evaluated_with)} if run.evaluated_with else {}),
      }
    )
  rows = ",\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
  first = json.dumps({"format": FORMAT, **head, "config": shared}, ensure_ascii=False)
  write_text(path, f'{first[:-1]}, "runs": [\n{rows}\n]}}\n')


def _read(path: pathlib.Path) -> tuple[list[tuple[str, FinishedRun]], dict]:
  """(name, run) of every run, and the rest of the file."""
  where = ""  # what is being read
  try:
    content = json.loads(path.read_text(encoding="utf-8"))
    if content["format"] != FORMAT:
      raise ValueError
    runs = []
    for run in content["runs"]:
      where = f", in the run {run['directory']}"
      runs.append((run["directory"], _run(path, content["config"], run)))
    where = ""
    sweep, diverged = content.get("sweep"), content.get("diverged", [])
    if not (runs or sweep) or not all(isinstance(name, str) for name in diverged):
      raise ValueError
    if sweep is not None and not {"file", "config", "flags"} <= set(sweep):
      raise ValueError
    return runs, {name: content[name] for name in ("sweep", "diverged") if name in content}
  except OSError as error:
    raise InputError(f"{path}: expected runs that `report --keep` wrote, got {error}") from None
  except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
    raise InputError(
      f"{path}: expected runs that `report --keep` or `sweep --keep` wrote ({FORMAT}), got another "
      f"or a damaged file{where}; take an earlier version of it, or write it again"
    ) from None


def _run(path: pathlib.Path, shared: Mapping, run: Mapping) -> FinishedRun:
  """A run of the file at `path`; ValueError and others if it is none."""
  found = FinishedRun(
    path.parent / run["directory"],
    traverse_util.unflatten_dict({**shared, **run["config"]}, sep="."),
    numbers(run["last"]),
    numbers(run["best"]),
    {
      name: [(int(step), float(value)) for step, value in points]
      for name, points in run["history"].items()
    },
    {name: numbers(scores) for name, scores in run["evaluations"].items()},
    run["trained_parameters"],
    str(run.get("clip", "")),
    dict(run.get("evaluated_with", {})),
  )
  if not found.data_set or not isinstance(found.config.get("seed", 0), int):
    raise ValueError
  return found
