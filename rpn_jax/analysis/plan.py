"""What a sweep is made of: the tables of a config file, and the runs that they ask for."""

import dataclasses
import hashlib
import json
import os
import pathlib
import re
import runpy
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from absl import flags as absl_flags
from ml_collections import config_dict

from rpn_jax.analysis import rates
from rpn_jax.analysis.kept import Results
from rpn_jax.analysis.runs import FinishedRun, complete, flatten, same
from rpn_jax.base.errors import InputError
from rpn_jax.base.paths import expand, write_json
from rpn_jax.config import FREE
from rpn_jax.config.flags import define_config, parse
from rpn_jax.weights import arrays, clip_file

# Bytes; with the seed below the 255 that file systems have for a name.
LONGEST_NAME = 200
# What --tune-lr chooses for the rows that do not say it, and what its trials set.
RATE = ("optimizer.base_lr", "optimizer.groups")
TUNED = (*RATE, "data.held_out")


def read_tables(path: str) -> dict:
  """What a config file defines, of which TABLES are table -> row -> changes.

  Raises:
    InputError: there is no such file, or it has no TABLES.
  """
  if not os.path.isfile(path):
    raise InputError(f"--config={path}: no such file; expected one with TABLES")
  content = runpy.run_path(path)
  if "TABLES" not in content:
    raise InputError(f"--config={path}: has no TABLES; expected one like configs/ablations.py")
  return content


def directory(root: pathlib.Path, changes: Mapping, seed: int) -> pathlib.Path:
  """The workdir of a row: named after what it changes, so that equal rows share it."""
  words = [f"{field.rpartition('.')[2]}={value}" for field, value in sorted(changes.items())]
  name = re.sub(r"[^\w=+.,-]", "_", ",".join(words)) or "base"
  if len(encoded := name.encode()) > LONGEST_NAME:
    begin = encoded[: LONGEST_NAME - 9].decode(errors="ignore")
    name = f"{begin}_{hashlib.sha256(encoded).hexdigest()[:8]}"
  return root / f"{name}_seed{seed}"


def claim(root: pathlib.Path, settings: Mapping) -> None:
  """Marks the folder as that of one recipe, or checks that it is.

  Raises:
    InputError: its runs have other settings.
  """
  path = root / "settings.json"
  try:
    there = json.loads(path.read_text(encoding="utf-8")) if path.exists() else settings
  except ValueError:
    there = "unreadable"
  if there != settings:
    raise InputError(f"runs in {root} are of {there}, asked for: {settings}; give another --root")
  root.mkdir(parents=True, exist_ok=True)
  write_json(path, settings)


def check_passed_on(flags: Sequence[str], plan: "Plan", tables: Sequence[str]) -> None:
  """Refuses flags for all runs that set what differs between rows, or seeds: the last flag counts,
  so that these would silently be the same run, or a mixture of two presets.
  """
  rows = plan.rows(tables)
  configs = [plan.config(name, ()) for name, _ in rows] if flags else []
  for flag in flags:
    field = re.split(r"[=\[]", flag.removeprefix("--config."))[0]
    if plan.tuned and field in TUNED:
      raise InputError(f"--tune-lr chooses what {flag} sets: leave out one of both")
    of_rows = {repr(config.get(field)) for config in configs}
    if field == "seed" or len(of_rows) > 1 or any(field in changes for _, changes in rows):
      by = "--seeds" if field == "seed" else "a row of the table"
      raise InputError(f"{flag}: is for all runs, and {by} sets that field: leave the flag out")


def is_free(changes: Mapping) -> bool:
  """Whether a row trains nothing, and has no seeds."""
  return changes.get("method") == "training_free"


def is_tuned(changes: Mapping) -> bool:
  """Whether --tune-lr chooses a row's rate: it trains something, and has none of its own."""
  return not is_free(changes) and not any(field in changes for field in RATE)


@dataclasses.dataclass
class Plan:
  """Which runs a sweep makes, by what commands.

  Attributes:
    path, words: of --config=path:words.
    content: what that file defines.
    root: of the workdirs.
    passed_on: --config.… flags for all runs.
    results: what is known of them.
    tuned: whether rates are chosen.
    chosen: changes of a row, as text -> the fields of its rate; without --tune-lr there are none.
  """

  path: str
  words: str
  content: Mapping
  root: pathlib.Path
  passed_on: Sequence[str]
  results: Results
  tuned: bool = False
  chosen: dict[str, Mapping] = dataclasses.field(default_factory=dict)

  def __post_init__(self) -> None:
    called: dict[str, str] = {}
    for name, changes in self.rows(list(self.content["TABLES"])):
      for place in (f"row {name}", f"workdir {directory(self.root, changes, 0)}"):
        if called.setdefault(place, key(changes)) != key(changes):
          raise InputError(
            f"--config={self.path}: {place} stands for two rows, {called[place]} and "
            f"{key(changes)}, of which one would be taken for the other: change a name or a value"
          )

  def workdir(self, changes: Mapping, seed: int) -> pathlib.Path | None:
    """See `directory`; None if a rate is to be chosen and none was."""
    if not self.tuned or not is_tuned(changes):
      return directory(self.root, changes, seed)
    if (fields := self.chosen.get(key(changes))) is None:
      return None
    return directory(self.root, {**changes, **fields}, seed)

  def workdirs(self, changes: Mapping, seeds: int) -> dict[int, pathlib.Path | None]:
    """Seed -> `workdir`, of as many seeds as a row has."""
    return {s: self.workdir(changes, s) for s in range(1 if is_free(changes) else seeds)}

  def command(
    self, name: str, workdir: pathlib.Path, seed: int, free: bool, flags: Sequence[str] = ()
  ) -> list[str]:
    """main.py for the row called TABLE_ROW; of equal flags the later ones count."""
    return [
      sys.executable, "main.py", f"--workdir={workdir}", f"--mode={'eval' if free else 'train'}",
      f"--config={self.path}:{self.arguments(name)}", f"--config.seed={seed}", *self.passed_on,
      *flags,
    ]  # fmt: skip

  def arguments(self, name: str) -> str:
    """Of the config file's `get_config`, for the row called TABLE_ROW."""
    return ",".join(filter(None, [name, self.words]))

  def runs(self, tables: Sequence[str], seeds: int) -> dict[pathlib.Path, list[str]]:
    """Workdir -> command; all of the first seed come first. Rows without a rate are left out."""
    found = {}
    for seed in range(seeds):
      for name, changes in self.rows(tables):
        workdir, free = self.workdir(changes, seed), is_free(changes)
        if workdir is None or workdir in found or (free and seed):
          continue
        fields = {} if free else self.chosen.get(key(changes), {})
        found[workdir] = self.command(name, workdir, seed, free, _flags(fields))
    return found

  def diverged(self, rows: Mapping[str, Mapping], seeds: int) -> dict[str, list[int]]:
    """Label -> seeds whose training was given up, of rows, label -> changes, with any."""
    found = {
      label: [
        seed
        for seed, workdir in self.workdirs(changes, seeds).items()
        if workdir and self.results.diverged(workdir)
      ]
      for label, changes in rows.items()
    }
    return {label: given_up for label, given_up in found.items() if given_up}

  def rows(self, tables: Sequence[str]) -> list[tuple[str, Mapping]]:
    """(TABLE_ROW, changes) of every row."""
    known = self.content["TABLES"]
    return [(f"{table}_{row}", known[table][row]) for table in tables for row in known[table]]

  def trials(self, tables: Sequence[str]) -> dict[str, list[rates.Trial]]:
    """TABLE_ROW -> its runs at the rates of the grid, of rows with the same changes one."""
    if "rate_grid" not in self.content:
      raise InputError(
        f"--tune-lr: {self.path} has no function rate_grid, see configs/ablations.py"
      )
    found, there = {}, set()
    for name, changes in self.rows(tables):
      if not is_tuned(changes) or key(changes) in there:
        continue
      there.add(key(changes))
      grid = self.content["rate_grid"](self._parsed(name, self.passed_on))
      place = lambda fields, changes=changes: directory(
        self.root / "rates", {**changes, **fields}, rates.SEED
      )
      found[name] = rates.trials(name, grid, place, self.results)
    return found

  def trial_runs(
    self, trials: Mapping[str, Sequence[rates.Trial]], flags: Sequence[str]
  ) -> dict[pathlib.Path, list[str]]:
    """Workdir -> command, of all trials, with flags for all of them."""
    return {
      t.workdir: self.command(name, t.workdir, rates.SEED, False, [*_flags(t.fields), *flags])
      for name, of_row in trials.items()
      for t in of_row
    }

  def choose(self, trials: Mapping[str, Sequence[rates.Trial]]) -> None:
    """Takes the best rate of every row all of whose trials have ended."""
    rows = dict(self.rows(list(self.content["TABLES"])))
    for name, of_row in trials.items():
      if best := rates.choose(of_row):
        self.chosen[key(rows[name])] = best.fields

  def rate(self, changes: Mapping) -> Mapping:
    """The fields of a row's rate: those that it sets, or that were chosen for it; {} if neither."""
    own = {field: value for field, value in changes.items() if field in RATE}
    return own or self.chosen.get(key(changes), {})

  def check_run(self, name: str, fields: Mapping, run: FinishedRun) -> None:
    """That a run is of the row called TABLE_ROW with other values of some fields.

    Raises:
      InputError: its config is another.
    """
    _check_config(run, {**self.config(name, self.passed_on), **fields})

  def _parsed(self, name: str, flags: Sequence[str]) -> Any:
    """What main.py makes of the row called TABLE_ROW and flags."""
    if not flags:
      return self.content["get_config"](self.arguments(name))
    values = absl_flags.FlagValues()
    argv = ["main.py", f"--config={self.path}:{self.arguments(name)}", *flags]
    define_config(values, argv)
    parse(values, argv)
    return values.config

  def config(self, name: str, flags: Sequence[str]) -> dict[str, Any]:
    """The config of the row called TABLE_ROW with flags, flat."""
    found = self._parsed(name, flags) if "get_config" in self.content else None
    return flatten(found.to_dict()) if isinstance(found, config_dict.ConfigDict) else {}

  def check_runs(
    self, tables: Sequence[str], trials: Mapping[str, Sequence[rates.Trial]], seeds: int,
    tuning: tuple[str, ...],
  ) -> None:  # fmt: skip
    """That the runs that are there are those that the rows ask for: their names do not tell all.

    Args:
      tables, trials, seeds: of the sweep.
      tuning: flags of the trials.

    Raises:
      InputError: another config, or towers of different weights under one name.
    """
    towers: dict[str, FinishedRun] = {}
    for name, changes in self.rows(tables):
      asked = {trial.workdir: (trial.fields, tuning) for trial in trials.get(name, ())}
      chosen = {} if is_free(changes) else self.chosen.get(key(changes), {})
      for seed, workdir in self.workdirs(changes, seeds).items():
        if workdir:
          asked[workdir] = ({**chosen, "seed": seed}, ())
      there = {w: of_run for w, of_run in asked.items() if self.results.is_done(w)}
      configs = {
        flags: self.config(name, [*self.passed_on, *flags])
        for flags in {flags for _, flags in there.values()}
      }
      for workdir, (fields, flags) in there.items():
        run, config = self.results.read(workdir), {**configs[flags], **fields}
        _check_config(run, config)
        first = towers.setdefault(str(config.get("clip")), run)
        if "" not in (run.clip, first.clip) and run.clip != first.clip:
          raise InputError(
            f"{first.directory} is around weights with fingerprint {first.clip}, {run.directory} "
            f"around {run.clip}, both called {config['clip']}: delete one's folder and its line "
            "in --keep"
          )

  def alone(
    self, tables: Sequence[str], trials: Mapping[str, Sequence[rates.Trial]], seeds: int
  ) -> set[pathlib.Path]:
    """Workdirs of the runs that `train_together` does not take: a teacher labels their images."""
    found: set[pathlib.Path] = set()
    for name, changes in self.rows(tables):
      if self.config(name, self.passed_on).get("data.setting") == "annotation_free":
        found |= {trial.workdir for trial in trials.get(name, ())}
        found |= set(filter(None, self.workdirs(changes, seeds).values()))
    return found

  def weights(self) -> dict[pathlib.Path, list[str]]:
    """Workdir -> command of the pre-training of CLIP weights: the config file's WEIGHTS, a file
    clip.safetensors in that workdir -> the config that makes it."""
    return {
      (workdir := expand(path).parent): [
        sys.executable, "main.py", f"--workdir={workdir}", f"--config={config}",
      ]
      for path, config in self.content.get("WEIGHTS", {}).items()
    }  # fmt: skip

  def around(
    self, tables: Sequence[str], trials: Mapping[str, Sequence[rates.Trial]], seeds: int
  ) -> dict[pathlib.Path, list[pathlib.Path | None]]:
    """Workdir of weights -> workdirs of the runs around them, None for those without a rate yet."""
    found: dict[pathlib.Path, list[pathlib.Path | None]] = {}
    for name, changes in self.rows(tables):
      if changes.get("clip") in self.content.get("WEIGHTS", {}):
        runs = found.setdefault(expand(changes["clip"]).parent, [])
        runs += [trial.workdir for trial in trials.get(name, ())]
        runs += self.workdirs(changes, seeds).values()
    return found


def is_made(workdir: pathlib.Path) -> bool:
  """Whether the pre-training of a workdir has ended: its record is written last."""
  return (workdir / "metrics.json").exists() and (workdir / "clip.safetensors").exists()


def check_weights(
  results: Results, around: Mapping[pathlib.Path, Iterable[pathlib.Path | None]]
) -> None:
  """That finished runs are around the weights that are there: made again, as on another machine,
  these are others.

  Args:
    results: of the sweep.
    around: see `Plan.around`.

  Raises:
    InputError: they are not.
  """
  for made, runs in around.items():
    if not is_made(made):
      continue
    path = made / "clip.safetensors"
    found = arrays.fingerprint(clip_file.load(path)[1])
    for run in runs:
      if run is None or not results.is_done(run):
        continue
      if (clip := results.read(run).clip) not in ("", found):
        raise InputError(
          f"{path}: has fingerprint {found}, and a finished run, {run.name}, is around {clip}: "
          "bring the file that it was made with, or delete its folder and its line in --keep"
        )


def _check_config(run: FinishedRun, asked: Mapping[str, Any]) -> None:
  """That a run has the config that a row asks for, but for fields that change no result, and what
  the row leaves to the weights."""
  there = complete(run.config)
  for field, value in asked.items():
    free = field.rpartition(".")[2] in FREE or value is None or field not in there
    if not free and not same(there[field], value):
      raise InputError(
        f"{run.directory}: config.{field} is {there[field]!r} there, and its row asks for "
        f"{value!r}: delete the run's folder and its line in --keep, or undo the change of the row"
      )


def key(changes: Mapping) -> str:
  """A text that is the same for equal changes."""
  return json.dumps(dict(changes), sort_keys=True, default=str)


def _flags(fields: Mapping) -> list[str]:
  return [f"--config.{field}={value}" for field, value in fields.items()]
