"""The training loop: batches in; checkpoints, metrics and evaluations out."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from rpn_jax import devices
from rpn_jax.base.console import Progress, progress
from rpn_jax.base.errors import InputError
from rpn_jax.base.paths import write_json
from rpn_jax.training import optim
from rpn_jax.training.checkpoint import Checkpoints
from rpn_jax.training.metric_log import MetricWriter
from rpn_jax.training.preemption import PreemptionGuard
from rpn_jax.training.run import BEST, Run
from rpn_jax.training.sharding import Pmap, ShardMap
from rpn_jax.training.step import TrainState

# A failed save is retried at a later step; after the last step, by waiting.
FINAL_SAVE_TRIES, FINAL_SAVE_PAUSE_SECONDS = 3, 20.0
# What a sweep's run prints goes there, into its workdir.
LOG = "log.txt"
# How the error begins that ends a run after too many skipped steps, for whoever reads its log.
NOT_FINITE = "loss or gradients were NaN or infinite"
RERUN = "mend the cause, said above, and rerun the command; it resumes from the last checkpoint"


class Loop:
  """Trains a state up to the last step of its run's config.

  Args:
    run: the run; files go to its workdir.
    stepper: the training step over all devices.
    data: has `train_batches(start_step)` and `train_indices(step)`.
    checkpoints: checkpoints of the run.
    guard: reports SIGTERM and Ctrl-C.
    evaluate: (prompts as numpy, step) -> scores; called by every process.
    writer: metric writer in the first process, None in the others.
    best: the best scores so far if the run is resumed.

  Attributes:
    last: scores of the latest evaluation, with their `step`; {} before the first one.
    best: the best scores so far.
  """

  def __init__(
    self,
    run: Run,
    stepper: ShardMap | Pmap,
    data: Any,
    *,
    checkpoints: Checkpoints,
    guard: PreemptionGuard,
    evaluate: Callable[[dict, int], dict],
    writer: MetricWriter | None,
    best: dict | None,
  ):
    self.run, self.config, self.stepper, self.data = run, run.config, stepper, data
    self.checkpoints, self.guard, self.writer = checkpoints, guard, writer
    self._evaluate = evaluate
    self.best = best or {}
    self.last: dict = {}
    self._rates = optim.schedules(run.config.optimizer)
    # Metrics of the latest steps, fetched one step late so that the device never waits.
    self._pending: list[tuple[int, dict]] = []

  def fit(
    self, state: TrainState, params: dict, text: jax.Array | np.ndarray, key: jax.Array
  ) -> None:
    """Trains from a state to the last step.

    Args:
      state: a new state or one from a checkpoint, as numpy, in every process.
      params: the part of the towers that the step takes, see `step.gradients`.
      text: `text_input` of the training classes.
      key: PRNG key of dropout and gate noise.

    Raises:
      InputError: too many steps in a row were skipped, or the last one could not be saved.
    """
    start, steps = int(state.step), self.config.steps
    if self._evaluation_due(start) and (start or not steps):  # may be saved but not evaluated
      self.evaluate(state)
    state = self.stepper.place_state(state)
    params, text, key = self.stepper.place_constant((params, text, key))
    batches = self.data.train_batches(start)
    # Reader processes end with the steps, not with the process.
    close = getattr(batches, "close", lambda: None)
    bar = progress(range(start, steps), f"train on {devices.devices_text()}", "step", start)
    saved, retry_at = True, None
    with self.guard.deferred(), contextlib.ExitStack() as stack:
      stack.callback(close)
      for step in bar:
        batch = self.stepper.place_batch(next(batches))
        state, metrics = self.stepper.step(state, params, text, batch, key)
        done = step + 1
        self._pending.append((done, metrics))
        self._flush_metrics(bar, keep=1)
        stopping = self.guard.reached(done - start)
        evaluating = self._evaluation_due(done)
        saving = evaluating or stopping or done == retry_at
        if not saving and not _is_due(done, self.config.save_every):
          continue
        self._flush_metrics(bar, keep=0)  # so that a resumed run has the curves up to here
        if self.writer:
          self.writer.flush()
        fetched = self.stepper.fetch_state(state)
        saved = self._save(fetched)
        retry_steps = max(1, (self.config.save_every or self.config.eval_every) // 10)
        retry_at = None if saved else done + retry_steps
        if stopping:
          self._stop(done, saved)
        if evaluating:
          with self.guard.deferred(False):
            self.evaluate(fetched)
    if not saved:
      raise InputError(
        f"trained to the end, but the last step could not be saved to {self.checkpoints.directory}:"
        f" {RERUN}"
      )

  def evaluate(self, state: TrainState) -> None:
    """Evaluates a state that has been saved, so that an interrupted evaluation can be resumed."""
    step = int(state.step)
    self.last = scores = {"step": step, **self._evaluate(state.prompts, step)}
    if not self.best or selection_score(scores) >= selection_score(self.best):
      self.best = scores
    self.run.check_workdir(step)
    if self.writer:
      self.writer.write(step, evaluation_scalars(scores))
      with warn_on_oserror(BEST):
        write_json(self.run.workdir / BEST, {"best": self.best})

  def _evaluation_due(self, step: int) -> bool:
    return _is_due(step, self.config.eval_every) or step == self.config.steps

  def _stop(self, step: int, saved: bool) -> None:
    """Ends the process after SIGTERM or Ctrl-C."""
    if not saved:
      raise InputError(f"{self.guard.name} at step {step}, which could not be saved: {RERUN}")
    print(f"{self.guard.name}: saved at step {step}", flush=True)
    self.guard.end()

  def _save(self, state: TrainState) -> bool:
    """Whether the state was saved; tried several times after the last step."""
    self.run.check_workdir(int(state.step))
    tries = FINAL_SAVE_TRIES if state.step == self.config.steps else 1
    for tries_left in reversed(range(tries)):
      if self.checkpoints.save(state, self.best or None):
        return True
      if tries_left:
        time.sleep(FINAL_SAVE_PAUSE_SECONDS)
    return False

  def _flush_metrics(self, bar: Progress, *, keep: int) -> None:
    """Fetches and logs the pending metrics of all steps but the latest `keep`."""
    while len(self._pending) > keep:
      done, metrics = self._pending.pop(0)
      if done % self.config.log_every == 0 or done == self.config.steps:
        self._log(bar, done, self.stepper.fetch_metrics(metrics))
      skips = {"skips": metrics["consecutive_skips"]}
      self._check_skipped(int(self.stepper.fetch_metrics(skips)["skips"]), done)

  def _log(self, bar: Progress, step: int, metrics: dict) -> None:
    if self.writer:
      self.writer.write(step, training_scalars(step, metrics, self._rates))
    skipped = {"skipped": int(metrics["skipped"])} if metrics["skipped"] else {}
    bar.set_postfix(loss=f"{metrics['loss']:.3f}", **skipped)

  def _check_skipped(self, consecutive: int, done: int) -> None:
    """Reports a skipped step; too many in a row end the run."""
    if not consecutive:
      return
    if consecutive == 1:
      print(f"step {done}: loss or gradients are NaN or infinite: not applied", flush=True)
    if consecutive < self.config.max_skipped:
      return
    start = done - consecutive
    indices = ", ".join(map(str, self.data.train_indices(start)))
    steps = self.checkpoints.steps()
    last_good = f"{self.checkpoints.directory}/{steps[0]}" if steps else "none yet"
    raise InputError(
      f"{NOT_FINITE} in {consecutive} steps in a row, {start + 1} to "
      f"{done}, and none was applied (config.max_skipped={self.config.max_skipped}); step "
      f"{start + 1} had the training examples {indices}; last good checkpoint: {last_good}. Lower "
      "config.optimizer.base_lr, set config.optimizer.clip_norm, or look at these examples"
    )


def _is_due(step: int, every: int) -> bool:
  return every > 0 and step % every == 0


def training_scalars(
  step: int, metrics: Mapping[str, float], rates: Mapping[str, Callable]
) -> dict[str, float]:
  """What the curves have of a step: its metrics, and its learning rates by `optim.schedules`."""
  # Skipped steps do not advance the schedule, and the first one may be among them.
  applied = max(0, step - 1 - int(metrics["skipped"]))
  scalars = {f"train/{k}": v for k, v in metrics.items() if k != "consecutive_skips"}
  return scalars | {f"{k}/learning_rate": float(rate(applied)) for k, rate in rates.items()}


def evaluation_scalars(scores: Mapping[str, Any]) -> dict[str, float]:
  """What the curves have of an evaluation."""
  return {f"eval/{k}": v for k, v in scores.items() if isinstance(v, float)}


def selection_score(scores: dict) -> float:
  """The score that selects the best checkpoint: hIoU, or mIoU if no class is unseen."""
  value = scores["hiou"] if scores["hiou"] is not None else scores["miou_gt"]
  return float(value or 0.0)


@contextlib.contextmanager
def warn_on_oserror(what: str) -> Iterator[None]:
  """Prints a line if writing an optional file fails, as on a full disk."""
  try:
    yield
  except OSError as error:
    print(f"{what} not written ({error.strerror}): continuing", flush=True)
