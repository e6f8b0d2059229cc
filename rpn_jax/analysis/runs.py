"""Finished runs, read from their workdirs and grouped into rows over seeds."""

import contextlib
import dataclasses
import functools
import json
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
from flax import traverse_util

from rpn_jax.base.errors import InputError
from rpn_jax.base.fields import with_tuples
from rpn_jax.base.paths import expand
from rpn_jax.config import EVALUATION, FREE, defaults
from rpn_jax.config.stored import clip_of, scored_set
from rpn_jax.training.metric_log import read_history

METRICS = ("pAcc", "miou_gt", "miou_union", "miou_seen", "miou_unseen", "hiou")
# A value in a row's name; longer ones are cut there, not in report.json.
VALUE_LETTERS = 40


@dataclasses.dataclass(frozen=True)
class FinishedRun:
  """What the files of a workdir say.

  Attributes:
    directory: the workdir.
    config: nested fields, as in `metrics.json`.
    last, best: metrics, with the step.
    history: name -> [(step, value)], empty for a run without training.
    evaluations: data set -> metrics, of `--mode=eval` after the training or without any.
    trained_parameters: how many; None where the files do not say.
    clip: fingerprint of CLIP's weights; "" where nothing was trained.
    evaluated_with: field -> value of the config of `evaluations`, where it is not the run's own.
  """

  directory: pathlib.Path
  config: Mapping
  last: Mapping
  best: Mapping
  history: Mapping[str, Sequence[tuple[int, float]]]
  evaluations: Mapping[str, Mapping]
  trained_parameters: int | None = None
  clip: str = ""
  evaluated_with: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  @property
  def data_set(self) -> str:
    """What it was trained and evaluated on, with the name of a folder."""
    data = self.config["data"]
    return " ".join(filter(None, (data["name"], data.get("variant", ""))))

  @property
  def network(self) -> str:
    """What stands for it in a table: the training-free method, the tuner of RPN, or the network."""
    method = self.config.get("method", "")
    section, field = {"training_free": ("dense", "method"), "rpn": ("model", "tuner")}.get(
      method, ("", "")
    )
    return self.config.get(section, {}).get(field) or method


@dataclasses.dataclass(frozen=True)
class Row:
  """Runs that differ only in their seed, under one name.

  Attributes:
    label: the name.
    runs: at least one.
    extra_columns: title -> text, further columns of the table, the same titles in all rows.
  """

  label: str
  runs: tuple[FinishedRun, ...]
  extra_columns: Mapping[str, str] = dataclasses.field(default_factory=dict)

  def values(self, checkpoint: str, metric: str) -> list[float]:
    """The metric of every run, at its "last" or "best" checkpoint; [] where one has none."""
    return _unless_missing(getattr(run, checkpoint).get(metric) for run in self.runs)

  def evaluated(self, name: str, metric: str) -> list[float]:
    """The metric of every run on a data set evaluated afterwards; [] where one was not."""
    return _unless_missing(run.evaluations.get(name, {}).get(metric) for run in self.runs)

  def curve(self, metric: str) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Steps, means and deviations of an evaluated metric; None if there is no common step.

    Only steps that all runs have are averaged, since a mean over fewer seeds would jump.
    """
    points = [
      {s: v for s, v in run.history.get(f"eval/{metric}", ()) if np.isfinite(v)}
      for run in self.runs
    ]
    steps = sorted(set.intersection(*map(set, points)))
    if not steps:
      return None
    values = np.array([[p[s] for s in steps] for p in points], np.float64)
    deviation = values.std(0, ddof=1) if len(values) > 1 else np.zeros(len(steps))
    return np.array(steps), values.mean(0), deviation


def _unless_missing(values: Iterable[float | None]) -> list[float]:
  found = []
  for value in values:
    if value is None:
      return []
    found.append(value)
  return found


def read_run(directory) -> FinishedRun:
  """The run in a workdir.

  Raises:
    InputError: there is none, it has not ended, or a file of it is damaged.
  """
  directory = expand(directory)
  scores, path = directory / "metrics.json", directory / "eval.json"
  if not scores.exists():
    if not _is_free(path):
      raise InputError(_why_missing(directory))
    scores = path  # of several sets
  config, last, best, trained = _read_scores(scores)
  total, free = config.get("steps", 0), config.get("method") == "training_free"
  if not free and last["step"] < total:
    raise InputError(
      f"{directory}: not finished, step {last['step']} of {total}; repeat its command"
    )
  history = read_history(directory / "metrics.jsonl")
  # Without training the scores are those of --mode=eval, in the one file that it writes.
  evaluations = {scored_set(config, scores.name): last} if free else {}
  others: dict[str, Any] = {}
  if path.exists():
    evaluations, evaluated = _read_evaluations(path, config)
    if file := evaluated.get("prompts"):
      raise InputError(f"{path}: of the prompts {file}, not of this run's; repeat --mode=eval")
    own = {**_defaults(), **flatten(config)}
    others = {
      name: value
      for name, value in (complete(evaluated) if evaluated else {}).items()
      if EVALUATION.intersection(name.split(".")) and not same(value, own.get(name))
    }
    for evaluated in evaluations.values():
      if evaluated["step"] != last["step"]:
        raise InputError(
          f"{path}: of step {evaluated['step']}, and the run ended at {last['step']}; "
          "repeat --mode=eval"
        )
  clip = clip_of(directory)
  return FinishedRun(directory, config, last, best, history, evaluations, trained, clip, others)


def _read_scores(path: pathlib.Path) -> tuple[dict, dict, dict, int | None]:
  """Config, last and best metrics and size of a file that `evaluate` wrote.

  Of several data sets the scores are those of the config's own, or of the first.
  """
  with _complaint(path):
    content = json.loads(path.read_text(encoding="utf-8"))
    config = dict(content["config"])
    if not config["data"]["name"]:
      raise ValueError
    trained = content.get("trained_parameters")
    if sets := content.get("sets"):
      content = sets.get(config["data"]["name"]) or next(iter(sets.values()))
    return config, numbers(content["last"]), numbers(content["best"]), trained


def _is_free(path: pathlib.Path) -> bool:
  """Whether it holds the scores of a training-free method."""
  try:
    return json.loads(path.read_text(encoding="utf-8"))["config"]["method"] == "training_free"
  except (OSError, ValueError, KeyError, TypeError, RecursionError):
    return False


def _read_evaluations(path: pathlib.Path, run: Mapping) -> tuple[dict[str, dict], dict]:
  """Data set -> metrics of the last checkpoint, of one set or of `config.eval.sets`; the config.

  Args:
    path: of eval.json.
    run: config of the run, in place of that of an evaluation which did not store its own.
  """
  with _complaint(path):
    content = json.loads(path.read_text(encoding="utf-8"))
    config = content.get("config", {})
    sets = content.get("sets") or {scored_set(config or run, path.name): content}
    return {n: numbers(result["last"]) for n, result in sets.items()}, config


def numbers(scores: Mapping) -> dict:
  """The step and METRICS of stored scores; a ValueError or TypeError if they are none."""
  scores = {m: scores.get(m) for m in ("step", *METRICS)}
  if not isinstance(scores["step"], int):
    raise ValueError
  if not np.isfinite([v for v in scores.values() if v is not None]).all():
    raise ValueError
  return scores


@contextlib.contextmanager
def _complaint(path: pathlib.Path):
  try:
    yield
  except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
    raise InputError(
      f"{path}: expected config, last and best scores of a segmentation run; "
      "it is damaged or of another task"
    ) from None


def _why_missing(directory: pathlib.Path) -> str:
  if not directory.is_dir():
    return f"{directory}: no such folder"
  config, history = directory / "config.json", directory / "metrics.jsonl"
  if config.exists() or history.exists():
    steps = [s for points in read_history(history).values() for s, _ in points]
    try:
      total = json.loads(config.read_text(encoding="utf-8"))["config"]["steps"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
      total = "?"
    return f"{directory}: not finished, step {max(steps, default=0)} of {total}; repeat its command"
  inside = sum((child / "metrics.json").exists() for child in directory.iterdir())
  hint = f"; {inside} folders in it have one: give {directory}/*" if inside else ""
  return f"{directory}: no metrics.json{hint}"


def flatten(config: Mapping) -> dict:
  """{"model.head": "paper", …} of nested fields."""
  return traverse_util.flatten_dict(config, sep=".")


def complete(config: Mapping) -> dict:
  """`flatten`, with the defaults of fields that an earlier version did not store."""
  flat = flatten(config)
  sections = {name.rpartition(".")[0] for name in flat}
  return {name: x for name, x in _defaults().items() if name.rpartition(".")[0] in sections} | flat


@functools.cache
def _defaults() -> dict:
  return flatten(defaults().to_dict())


def same(a: Any, b: Any) -> bool:
  """Whether two values of a field are equal, as JSON has them."""
  return with_tuples(a) == with_tuples(b)


def differing(configs: Sequence[Mapping]) -> dict[str, list[str]]:
  """Field -> its value in each config, as text, for the fields in which they differ.

  The seed and fields that do not change a result (`config.FREE`) are left out.
  """
  flat = [complete(config) for config in configs]
  fields = list(dict.fromkeys(name for config in flat for name in config))
  texts = {
    name: [_text(config[name]) if name in config else "absent" for config in flat]
    for name in fields
    if name != "seed" and name.rpartition(".")[2] not in FREE
  }
  return {name: values for name, values in texts.items() if len(set(values)) > 1}


def _text(value) -> str:
  return value if isinstance(value, str) else repr(with_tuples(value))


def group_runs(
  runs: Sequence[FinishedRun], labels: Sequence[str] = ()
) -> tuple[list[Row], list[str]]:
  """Runs as rows, in order, and why some are left out.

  Args:
    runs: at least one.
    labels: names for the rows, in their order; without, they are named after their workdirs and,
      among rows of the same data set and network, after what differs: the fewest fields found that
      tell these apart.

  Raises:
    InputError: another number of labels than there are rows, or one given twice.
  """
  fields = differing([{**run.config, "evaluated": run.evaluated_with} for run in runs])
  groups: dict[tuple, dict] = {}
  left_out = []
  for i, run in enumerate(runs):
    seeds = groups.setdefault(tuple(values[i] for values in fields.values()), {})
    first = seeds.setdefault(run.config.get("seed"), run)
    if first is not run:
      left_out.append(f"{run.directory}: config and seed of {first.directory}, which is counted")
  members = [tuple(seeds.values()) for seeds in groups.values()]
  if labels:
    if len(labels) != len(members) or len(set(labels)) != len(labels):
      shown = "; ".join(f"{i}: {m[0].directory}" for i, m in enumerate(members, 1))
      raise InputError(
        f"--labels: expected {len(members)} different names, got {len(labels)}; the rows begin "
        f"with {shown}"
      )
  else:
    labels = _labels(members, list(fields), list(groups))
  return [Row(label, runs) for label, runs in zip(labels, members)], left_out


def _labels(
  members: Sequence[Sequence[FinishedRun]], fields: list[str], keys: list[tuple]
) -> list[str]:
  """A name for every row: that of its workdir, and what tells it from the rows of its kind."""
  kinds: dict[tuple[str, str], list[int]] = {}
  for i, (first, *_) in enumerate(members):
    kinds.setdefault((first.data_set, first.network), []).append(i)
  names = [_workdir_name(runs) for runs in members]
  for of_kind in kinds.values():
    for i, told in zip(of_kind, _distinctions(fields, [keys[i] for i in of_kind])):
      names[i] += f" ({told})" if told else ""
  return [
    name if names.count(name) == 1 else f"{name}, {runs[0].directory}"
    for name, runs in zip(names, members)
  ]


def _workdir_name(runs: Sequence[FinishedRun]) -> str:
  """The name of a row's workdir, without the seed if there are several."""
  name = runs[0].directory.resolve().name
  return name if len(runs) == 1 else re.sub(r"[_. -]*(seed)?[_. -]*\d+$", "", name) or name


def _distinctions(fields: list[str], keys: list[tuple]) -> list[str]:
  """For every row its values of a few fields in which all rows differ.

  Values that more than half of the rows share go without saying.
  """
  pairs = list(combinations(range(len(keys)), 2))
  chosen = []
  while pairs:
    told = [sum(keys[a][k] != keys[b][k] for a, b in pairs) for k in range(len(fields))]
    # Of two fields that tell as much the one that takes less room.
    letters = [len(name) + max(len(key[k]) for key in keys) for k, name in enumerate(fields)]
    best = max(range(len(fields)), key=lambda k: (told[k], -letters[k]))
    chosen.append(best)
    pairs = [(a, b) for a, b in pairs if keys[a][best] == keys[b][best]]
  usual = {k: [key[k] for key in keys] for k in sorted(chosen)}
  return [
    ", ".join(
      f"{fields[k]}={_cut(key[k])}" for k in usual if 2 * usual[k].count(key[k]) <= len(keys)
    )
    for key in keys
  ]


def _cut(text: str) -> str:
  return text if len(text) <= VALUE_LETTERS else text[: VALUE_LETTERS - 1] + "…"
