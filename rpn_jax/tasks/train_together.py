"""Runs that differ by seed and learning rates only, trained as one program.

    python -m rpn_jax train_together --config=FILE --workdir=A --config.seed=0 + --config=FILE …

The arguments are those of main.py for each run, with a plus sign between runs. A small network
leaves an accelerator idle most of the time; here it computes a step of all runs at once, and there
is one program to compile. Several devices share the runs. `rpn sweep --together=N` calls it.

Each run trains as it would alone, up to the rounding of sums, on the same batches, and its workdir
has the same files but for the figures. They are written when all have ended: of an interrupted call
nothing is kept. A run whose loss is not finite for config.max_skipped steps in a row has diverged,
which its log.txt says; the others go on.
"""

import argparse
import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from absl import flags

from rpn_jax import devices
from rpn_jax.base.console import progress
from rpn_jax.base.errors import InputError
from rpn_jax.base.paths import expand, write_json, write_text
from rpn_jax.config import check, complete
from rpn_jax.config.flags import define_config, parse
from rpn_jax.inference.evaluation import evaluate
from rpn_jax.inference.predictor import Predictor
from rpn_jax.tasks.evaluate import score_table, split_notes, write_metrics
from rpn_jax.tasks.train import open_trainable
from rpn_jax.training import optim
from rpn_jax.training.identity import identity
from rpn_jax.training.loop import (
  LOG,
  NOT_FINITE,
  evaluation_scalars,
  selection_score,
  training_scalars,
)
from rpn_jax.training.metric_log import METRICS, MetricWriter
from rpn_jax.training.run import BEST, Run, classes_of, held_workdir
from rpn_jax.training.side_by_side import BETWEEN, OWN_FIELDS, SideBySide, states_of
from rpn_jax.training.step import TrainState
from rpn_jax.weights.clip_file import with_normalization

OWN = frozenset(path.rpartition(".")[2] for path in OWN_FIELDS)


@dataclasses.dataclass
class Member:
  """A run among others.

  Attributes:
    run: its workdir and config.
    data: its data set, which runs of the same seed share.
    curves: (step, metrics).
    last, best: scores; {} before the first evaluation.
    best_state: the state that the best scores are of.
    skipped: steps that were not applied.
    diverged: why it was given up, if it was.
  """

  run: Run
  data: Any
  curves: list[tuple[int, dict]] = dataclasses.field(default_factory=list)
  last: dict = dataclasses.field(default_factory=dict)
  best: dict = dataclasses.field(default_factory=dict)
  best_state: TrainState | None = None
  skipped: int = 0
  diverged: str = ""

  @functools.cached_property
  def rates(self) -> dict[str, Callable]:
    """See `optim.schedules`."""
    return optim.schedules(self.run.config.optimizer)


def train_together(
  configs: Sequence[ml_collections.ConfigDict],
  workdirs: Sequence[str],
  load: Callable[[ml_collections.ConfigDict], Any],
) -> dict[str, dict]:
  """Trains runs side by side from their first step to the last.

  Args:
    configs: locked configs; see `rpn_jax.config` for the fields.
    workdirs: new ones, one for each.
    load: config -> its data set, as for `tasks.train.train`.

  Returns:
    Workdir -> last scores, of those that did not diverge.

  Raises:
    InputError: configs that differ by more than OWN, a setting that cannot be trained like this,
      or a workdir that has a run.
  """
  first = configs[0]
  _check(configs)
  predictor, run = open_trainable(first, workdirs[0])
  by_seed: dict[int, Any] = {}
  members = []
  for config, workdir in zip(configs, workdirs, strict=True):
    config = with_normalization(config, predictor.clip)
    if config.seed not in by_seed:
      by_seed[config.seed] = load(config)
    members.append(Member(Run(config, workdir, run.fingerprint), by_seed[config.seed]))
  with contextlib.ExitStack() as stack:
    for member in members:
      stack.enter_context(held_workdir(member.run.workdir))
      if (member.run.workdir / METRICS).exists():
        raise InputError(f"{member.run.workdir} has a run: main.py resumes it; choose a new folder")
      member.run.claim(classes_of(member.data))
    stack.enter_context(devices.one_line_runtime_errors())
    return _train(members, predictor)


def _check(configs: Sequence[ml_collections.ConfigDict]) -> None:
  first = configs[0]
  shared = [identity(config, "", OWN) for config in configs]
  groups = [[group[:2] for group in config.optimizer.groups] for config in configs]
  if any(one != shared[0] for one in shared) or any(one != groups[0] for one in groups):
    raise InputError(
      "expected runs that differ by config.seed, config.optimizer.base_lr and the factors of "
      "config.optimizer.groups only: give the others a call of their own"
    )
  if first.data.setting == "annotation_free":
    raise InputError("config.data.setting=annotation_free: its teacher needs a run of its own")
  if jax.process_count() > 1:
    raise InputError("runs are trained together by one process, which uses all of its devices")


def _train(members: Sequence[Member], predictor: Predictor) -> dict[str, dict]:
  config, data = members[0].run.config, members[0].data
  text = predictor.training_text([data.names[i] for i in data.trained])
  states, keys = [], []
  for member in members:
    key = jax.random.key(member.run.config.seed)
    prompts = predictor.init_prompts(text, key, config.data.crop)
    optimizer = optim.make_optimizer(config.optimizer, prompts)
    states.append(jax.device_get(TrainState(jnp.int32(0), prompts, optimizer.init(prompts))))
    keys.append(jax.random.key(member.run.config.seed + 1))
  sets = list({id(member.data): member.data for member in members}.values())
  side_by_side = SideBySide(
    config,
    predictor.network,
    data,
    [optim.peak_rates(member.run.config.optimizer) for member in members],
    [next(i for i, of_set in enumerate(sets) if of_set is member.data) for member in members],
  )
  print(
    f"{len(members)} runs side by side, of {states[0].trained_parameters:,} trained parameters "
    f"each, {predictor.clip_parameters:,} frozen, on {devices.devices_text()}",
    flush=True,
  )
  began = time.time()
  state = side_by_side.place_states(states)
  key = side_by_side.place_keys(keys)
  params, text = side_by_side.place_constant((predictor.frozen, text))
  with contextlib.ExitStack() as stack:
    streams = []
    for of_set in sets:
      streams.append(of_set.train_batches(0))
      stack.callback(getattr(streams[-1], "close", lambda: None))
    metrics = None
    bar = progress(config.steps, f"train on {devices.devices_text()}", "step")
    stack.enter_context(bar)
    for done in range(1, config.steps + 1):
      batches = side_by_side.place_batches([next(stream) for stream in streams])
      before = metrics  # looked at once the devices have the next step to compute
      state, metrics = side_by_side.step(state, params, text, batches, key)
      if before is not None:
        _check_skipped(members, done - 1, before)
      ending = done == config.steps
      if ending:
        _check_skipped(members, done, metrics)
      if done % config.log_every == 0 or ending:
        bar.set_postfix(loss=_log(members, done, jax.device_get(metrics)))
      if ending or (config.eval_every > 0 and done % config.eval_every == 0):
        states = states_of(state, len(members))
        _evaluate(members, states, predictor, done)
      bar.update()
      if all(member.diverged for member in members):
        break
  for member, of_run in zip(members, states):
    _write(member, of_run)
  scores = {str(m.run.workdir): m.last for m in members if not m.diverged}
  print(f"\nTrained to step {config.steps} ({time.time() - began:.0f} s). Last scores in %:")
  named = {expand(workdir).name[-40:]: last for workdir, last in scores.items()}
  print("\n".join([score_table(named), *split_notes(config, data)]) if named else "none")
  for member in members:
    if member.diverged:
      print(f"{member.run.workdir}: {member.diverged}")
    elif member.skipped:
      print(
        f"{member.run.workdir}: loss or gradients were NaN or infinite in {member.skipped} of "
        f"{config.steps} steps, which were not applied"
      )
  return scores


def _check_skipped(members: Sequence[Member], done: int, metrics: dict) -> None:
  """Gives up the runs that skipped too many steps in a row."""
  for member, consecutive in zip(members, jax.device_get(metrics["consecutive_skips"])):
    if consecutive >= member.run.config.max_skipped and not member.diverged:
      member.diverged = (
        f"{NOT_FINITE} in {consecutive} steps in a row, up to step {done}, and none was applied "
        f"(config.max_skipped={member.run.config.max_skipped})"
      )


def _log(members: Sequence[Member], done: int, metrics: dict) -> str:
  """Adds to the curves; returns the smallest and the largest loss."""
  for i, member in enumerate(members):
    if member.diverged:
      continue
    own = {name: float(values[i]) for name, values in metrics.items()}
    member.skipped = int(own["skipped"])
    member.curves.append((done, training_scalars(done, own, member.rates)))
  losses = [float(loss) for loss in metrics["loss"] if np.isfinite(loss)]
  return f"{min(losses):.3f} to {max(losses):.3f}" if losses else "nan"


def _evaluate(
  members: Sequence[Member], states: Sequence[TrainState], predictor: Predictor, done: int
) -> None:
  examples: dict[int, Any] = {}
  for member, state in zip(members, states):
    if member.diverged:
      continue
    data = member.data
    if id(data) not in examples:
      examples[id(data)] = list(data.eval_examples())
    window = predictor.with_prompts(state.prompts).for_data(data)
    member.last = {"step": done, **evaluate(window, examples[id(data)], data).scores}
    member.curves.append((done, evaluation_scalars(member.last)))
    if not member.best or selection_score(member.last) >= selection_score(member.best):
      member.best, member.best_state = member.last, state


def _write(member: Member, state: TrainState) -> None:
  """Checkpoints first, metrics.json last, so that no half of a run is taken for all of it."""
  run = member.run
  if member.diverged:
    write_text(run.workdir / LOG, member.diverged + "\n")
    return
  with contextlib.closing(run.checkpoints()) as checkpoints:
    if member.best_state is not None and int(member.best_state.step) < int(state.step):
      checkpoints.save(member.best_state, member.best)
    if not checkpoints.save(state, member.best):
      raise InputError(f"{run.workdir}: trained to the end, but the last step could not be saved")
  with MetricWriter(run.workdir) as writer:
    for step, values in member.curves:
      writer.write(step, values)
  write_json(run.workdir / BEST, {"best": member.best})
  write_metrics(
    run.workdir / "metrics.json", member.last, member.best, run.config, state.trained_parameters
  )


def main(
  arguments: list[str], load: Callable[[ml_collections.ConfigDict, tuple[int, int]], Any]
) -> int:
  """Runs the command; `load` opens the data set of a config."""
  parser = argparse.ArgumentParser(prog="rpn train_together", description=__doc__)
  parser.formatter_class = argparse.RawDescriptionHelpFormatter
  parser.usage = "rpn train_together MAIN_PY_ARGUMENTS + MAIN_PY_ARGUMENTS …"
  _, given = parser.parse_known_args(arguments)
  runs: list[list[str]] = [[]]
  for argument in given:
    if argument == BETWEEN:
      runs.append([])
    else:
      runs[-1].append(argument)
  configs, workdirs = [], []
  for of_run in runs:
    values = flags.FlagValues()
    argv = ["train_together", *of_run]
    define_config(values, argv)
    flags.DEFINE_string("workdir", None, "Of the run", values)
    if len(rest := parse(values, argv)) > 1:
      raise InputError(f"unexpected argument {rest[1]!r}: every setting is a --flag=value")
    check(values.config)
    complete(values.config)
    configs.append(values.config)
    workdirs.append(values.workdir)
  with devices.runtime(matmul_precision=configs[0].matmul_precision, alone=True):
    train_together(configs, workdirs, lambda config: load(config, devices.process()))
  return 0
