"""The training run: batches in, checkpoints, metrics and pictures out."""

import contextlib
import functools
import time

import jax

from rpn_jax import devices
from rpn_jax.base.console import progress
from rpn_jax.base.errors import InputError
from rpn_jax.base.paths import write_json
from rpn_jax.drawing.plots import plot_curves
from rpn_jax.inference.predictor import BEST, Experiment
from rpn_jax.models.prompts import count
from rpn_jax.tasks import evaluate
from rpn_jax.training import optim, preemption, pseudo_labels, sharding
from rpn_jax.training.losses import LOSSES
from rpn_jax.training.metric_log import MetricWriter
from rpn_jax.training.run import held_workdir

# At the end of a run, where there is no later step to try again at: tries, and seconds between.
LAST_TRIES, LAST_PAUSE = 3, 20.0


def train(config, workdir, data) -> dict:
  """Trains the prompts of `config`, or continues the run found in the workdir.

  With several processes all of them call this, with their own part of the data; the first one
  writes the metrics and pictures. SIGTERM saves and ends the process with status 0.

  Args:
    config: locked; see `configs/shapes.py` for the fields.
    workdir: directory of the run.
    data: `names`, `seen`, `unseen`, `train_batches(start_step)`, `train_indices(step)` and
      `eval_examples()`.

  Returns:
    The last and best metrics, as in `metrics.json`.
  """
  experiment = Experiment(config, workdir)
  if not experiment.trainable:
    raise InputError(f"method {config.method!r} has nothing to train: use --mode=eval")
  if config.parallel not in sharding.MODES:
    raise InputError(
      f"config.parallel must be one of {sorted(sharding.MODES)}, got {config.parallel!r}"
    )
  mesh = devices.global_mesh()
  sharding.check_batch_size(config.data.batch_size, mesh)
  with held_workdir(experiment.workdir), preemption.PreemptionGuard() as notice:
    experiment.claim_workdir()
    return run(experiment, data, mesh, notice)


def run(experiment: Experiment, data, mesh, notice: preemption.PreemptionGuard) -> dict:
  """The training of `train`, in a workdir that is this process's alone."""
  config = experiment.config
  trained = [data.names[i] for i in data.trained]
  text_CxE = experiment.text(trained)
  state = jax.device_get(experiment.initial_state(text_CxE))
  devices = sharding.MODES[config.parallel](
    mesh,
    state,
    experiment.optimizer(state.prompts),
    shard_state=config.shard_state,
    model=experiment.model,
    loss_fn=make_loss(config.loss),
    relabel=make_relabel(config, data),
  )
  first = devices.process()[0] == 0
  examples = data.eval_examples()

  # Closed whatever happens: a save under way is finished before an error or Ctrl-C ends the run.
  with (
    contextlib.closing(experiment.checkpoints()) as checkpoints,
    devices.one_line_runtime_errors(),
  ):
    best = shown = last = None
    if resumed := checkpoints.resume(state):
      state, best = resumed
    start = int(state.step)
    parameters, where = count(state.prompts), devices.devices_text()
    print(
      f"{parameters:,} trained parameters beside {count(experiment.clip):,} frozen; "
      f"{len(trained)} of {len(data.names)} classes trained on {where}"
      + (f" in {jax.process_count()} processes" if jax.process_count() > 1 else "")
      + (f"; continuing at step {start} of {config.steps}" if start else ""),
      flush=True,
    )
    writer = MetricWriter(experiment.workdir, resume_step=start) if first else None

    def evaluation(state, done):
      """Scores of a state that is saved: an interrupted one is continued from what it counted."""
      nonlocal best, shown, last
      partial = evaluate.make_partial(experiment, data, "train", done, len(examples))
      segmenter = experiment.evaluator(state.prompts, data)
      shown = evaluation.evaluate(
        segmenter, examples, data, keep=evaluate.PICTURES, partial=partial
      )
      last = {"step": done, **shown.scores}
      best = last if best is None or rank(last) >= rank(best) else best
      if first:
        writer.write(done, {f"eval/{k}": v for k, v in scalars(last).items()})
        with warn_on_oserror(BEST):
          write_json(experiment.workdir / BEST, {"best": best})

    is_due = lambda done, every: every > 0 and done % every == 0
    to_evaluate = lambda done: is_due(done, config.eval_every) or done == config.steps
    if to_evaluate(start) and (start or not config.steps):  # saved, but perhaps not evaluated
      evaluation(state, start)
    rates = optim.schedules(config.optimizer)
    state = devices.place_state(state)
    constants = (experiment.params, text_CxE, jax.random.key(config.seed + 1))
    params, text_CxE, key = devices.place_constant(constants)
    batches = data.train_batches(start)
    steps = progress(range(start, config.steps), f"train on {where}", "step")
    waiting = []  # metrics of the last steps: fetched late, so that the device never waits

    def look(all_but: int):
      while len(waiting) > all_but:
        done, metrics = waiting.pop(0)
        if done % config.log_every == 0 or done == config.steps:
          log(writer, steps, rates, done, devices.fetch_metrics(metrics))
        row = {"skipped_in_a_row": metrics["skipped_in_a_row"]}
        check_skipped(int(devices.fetch_metrics(row)["skipped_in_a_row"]), done, config, data,
                  checkpoints)  # fmt: skip

    began, retry_at = time.time(), None
    with notice.deferred():
      for step in steps:
        batch = devices.place_batch(next(batches))
        state, metrics = devices.step(state, params, text_CxE, batch, key)
        done = step + 1
        waiting.append((done, metrics))
        look(1)
        stopping = notice.reached(done)
        planned = is_due(done, config.save_every) or to_evaluate(done)
        if not (planned or stopping or done == retry_at):
          continue
        look(0)  # the curves up to here are part of what is continued from
        fetched = devices.fetch_state(state)
        tries = LAST_TRIES if done == config.steps else 1
        saved = save(checkpoints, fetched, best, tries)
        retry_at = None if saved else done + max(1, (config.save_every or config.eval_every) // 10)
        if stopping and not saved:
          raise InputError(
            f"SIGTERM at step {done}, which could not be saved: see to the disk and run the same "
            "command again, it continues at the last checkpoint"
          )
        if stopping:
          print(f"SIGTERM: saved at step {done}", flush=True)
          notice.end()
        if to_evaluate(done):
          with notice.deferred(False):
            evaluation(fetched, done)
    seconds = time.time() - began
    if start < config.steps and not saved:
      raise InputError(
        f"trained to the end, but the last step could not be saved to {checkpoints.directory}: see "
        "to the disk and run the same command again, it continues at the last checkpoint"
      )
  if first:
    report(experiment, writer, shown, last, best, seconds, parameters)
  evaluate.make_partial(experiment, data, "train", 0, 0).path.unlink(missing_ok=True)
  return {"last": last, "best": best}


def save(checkpoints, state, best: dict | None, tries: int) -> bool:
  """Whether one of so many tries succeeded."""
  for left in reversed(range(tries)):
    if checkpoints.save(state, best):
      return True
    if left:
      time.sleep(LAST_PAUSE)
  return False


@contextlib.contextmanager
def warn_on_oserror(what: str):
  """A file that a run can do without for now: a disk that is full is told of, and no more."""
  try:
    yield
  except OSError as error:
    print(f"{what} not written ({error.strerror}): going on", flush=True)


def check_skipped(in_a_row: int, done: int, config, data, checkpoints) -> None:
  """Tells of a step that was not applied; too many in a row end the run."""
  if not in_a_row:
    return
  if in_a_row == 1:
    print(f"step {done}: loss or gradients are NaN or infinite: not applied", flush=True)
  if in_a_row < config.max_skipped:
    return
  since = done - in_a_row
  indices = ", ".join(map(str, data.train_indices(since)))
  newest = checkpoints.steps()
  place = f"{checkpoints.directory}/{newest[0]}" if newest else "none yet"
  raise InputError(
    f"loss or gradients were NaN or infinite in {in_a_row} steps in a row, {since + 1} to {done}, "
    f"and none was applied (config.max_skipped={config.max_skipped}); step {since + 1} had the "
    f"training examples {indices}; last good checkpoint: {place}. Lower config.optimizer.base_lr, "
    "set config.optimizer.clip_norm, or look at these examples"
  )


def make_loss(config):
  """The configured loss as a function of logits and labels."""
  if config.name not in LOSSES:
    raise InputError(f"config.loss.name must be one of {sorted(LOSSES)}, got {config.name!r}")
  options = {"mask_ignored": config.mask_ignored} if config.name == "sigmoid" else {}
  return lambda logits, label: LOSSES[config.name](logits, label, **options)


def make_relabel(config, data):
  """Self-training as a function of logits, labels and step; None in the other settings."""
  if data.unlabelled is None:
    return None
  pixels = config.self_training.pixels
  if pixels not in ("unseen", "unlabelled"):
    raise InputError(
      f'config.self_training.pixels must be "unseen" or "unlabelled", got {pixels!r}'
    )
  return functools.partial(
    pseudo_labels.relabel,
    unseen=data.unseen,
    unlabelled=data.unlabelled,
    ignore=data.ignore,
    start=round(config.self_training.start * config.steps),
    pixels=pixels,
  )


def rank(metrics: dict) -> float:
  """What checkpoints are compared by: hIoU, or the plain mean where no class is unseen."""
  value = metrics["hiou"] if metrics["hiou"] is not None else metrics["miou_gt"]
  return float(value or 0.0)


def scalars(metrics: dict) -> dict:
  return {k: v for k, v in metrics.items() if isinstance(v, float)}


def log(writer, steps, rates: dict, step: int, metrics: dict) -> None:
  """Writes the metrics of one step (in the first process)."""
  # A step that was not applied has not moved the schedule on.
  applied = step - 1 - int(metrics["skipped"])
  learning_rates = {f"{k}/learning_rate": float(rate(applied)) for k, rate in rates.items()}
  metrics = {k: v for k, v in metrics.items() if k != "skipped_in_a_row"}
  if writer:
    writer.write(step, {f"train/{k}": v for k, v in metrics.items()} | learning_rates)
  shown = {"loss": f"{metrics['loss']:.3f}"}
  steps.set_postfix(**shown, **({"skipped": int(s)} if (s := metrics["skipped"]) else {}))


def report(experiment, writer, shown, last, best, seconds, trained: int) -> None:
  """`metrics.json`, the pictures, and the closing lines."""
  workdir, config = experiment.workdir, experiment.config
  evaluate.write_metrics(workdir / "metrics.json", last, best, config, trained)
  evaluate.pictures(workdir, shown, config)
  plot_curves(workdir / "curves.png", writer.history())
  writer.close()
  rows = {f"last, step {last['step']}": last, f"best, step {best['step']}": best}
  print(f"\nTrained to step {config.steps} ({seconds:.0f} s in this call). Scores in %:")
  print(evaluate.score_table(rows))
  print("The best checkpoint was selected on the evaluation classes; report the last.")
