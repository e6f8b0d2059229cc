"""The scores of many runs in one small file, to keep where the runs themselves are not.

    python -m rpn_jax report runs/study/* --keep=study.json     # on the machine that has the runs
    python -m rpn_jax report study.json --out=report            # anywhere: the same tables, figures

The file has what tables and figures are made of: configs (what all runs share once), last and best
scores, the courses of the scores, parameters. Weights and losses are not in it.
"""

import json
import os
import pathlib
from collections.abc import Sequence

from rpn_jax.analysis.runs import FinishedRun, flatten, numbers
from rpn_jax.base.errors import InputError
from rpn_jax.base.paths import expand, write_text

SUFFIX, FORMAT = ".json", "rpn_jax runs 1"
# Digits of the points of a curve.
DIGITS = 6


def keep(path: str | os.PathLike, runs: Sequence[FinishedRun]) -> pathlib.Path:
  """Writes the file, a run on each line; returns its path.

  Raises:
    InputError: another file is there.
  """
  path = expand(path)
  if path.exists():
    try:
      read(path)
    except InputError:
      raise InputError(f"--keep={path}: another file is there; choose a new name") from None
  configs = [flatten(run.config) for run in runs]
  shared = {
    field: value
    for field, value in configs[0].items()
    if all(field in config and config[field] == value for config in configs)
  }
  lines = []
  for run, config in zip(runs, configs):
    history = {
      name: [[step, round(value, DIGITS)] for step, value in points]
      for name, points in run.history.items()
      if name.startswith("eval/")
    }
    lines.append(
      {
        "directory": run.directory.name,
        "config": {field: value for field, value in config.items() if field not in shared},
        "last": run.last,
        "best": run.best,
        "history": history,
        "evaluations": run.evaluations,
        "trained_parameters": run.trained_parameters,
      }
    )
  path.parent.mkdir(parents=True, exist_ok=True)
  rows = ",\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
  head = json.dumps({"format": FORMAT, "config": shared}, ensure_ascii=False)
  write_text(path, f'{head[:-1]}, "runs": [\n{rows}\n]}}\n')
  return path


def read(path: str | os.PathLike) -> list[FinishedRun]:
  """The runs of a file that `keep` wrote.

  Raises:
    InputError: there is no such file, or it is another or a damaged one.
  """
  path = expand(path)
  try:
    content = json.loads(path.read_text(encoding="utf-8"))
    if content["format"] != FORMAT:
      raise ValueError
    runs = [
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
      )
      for run in content["runs"]
    ]
    if not runs or not all(run.data_set for run in runs):
      raise ValueError
    return runs
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
