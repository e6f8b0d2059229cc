"""The training run: batches in, checkpoints, metrics and pictures out."""

import contextlib
import functools
import time

import jax

from rpn_jax import evaluate, optim, parallel, self_training, visualize
from rpn_jax.errors import InputError
from rpn_jax.experiment import RANKING, Experiment
from rpn_jax.logging import MetricWriter, progress
from rpn_jax.losses import LOSSES
from rpn_jax.models.prompts import count


def train(config, workdir, data) -> dict:
  """Trains the prompts of `config`, or continues the run found in the workdir.

  With several processes all of them call this, with their own part of the data; the first one
  writes the metrics and pictures.

  Args:
    config: locked; see `configs/shapes.py` for the fields.
    workdir: directory of the run.
    data: `names`, `seen`, `unseen`, `train_batches(start_step)` and `eval_examples()`.

  Returns:
    The last and best metrics, as in `metrics.json`.
  """
  experiment = Experiment(config, workdir)
  if not experiment.trainable:
    raise InputError(f"method {config.method!r} has nothing to train: use --mode=eval")
  if config.parallel not in parallel.MODES:
    raise InputError(
      f"config.parallel must be one of {sorted(parallel.MODES)}, got {config.parallel!r}"
    )
  mesh = parallel.global_mesh()
  parallel.check_batch_size(config.data.batch_size, mesh)
  experiment.claim_workdir()

  trained = [data.names[i] for i in data.trained]
  text_CxE = experiment.text(trained)
  state = jax.device_get(experiment.initial_state(text_CxE))
  devices = parallel.MODES[config.parallel](
    mesh,
    state,
    experiment.optimizer(state.prompts),
    shard_state=config.shard_state,
    model=experiment.model,
    loss_fn=loss_of(config.loss),
    relabel=relabel_of(config, data),
  )
  first = parallel.process()[0] == 0

  def evaluation(state):
    segmenter = experiment.evaluator(state.prompts, data)
    result = evaluate.evaluate(segmenter, data.eval_examples(), data, keep=evaluate.PICTURES)
    return {"step": int(state.step), **result.scores}, result

  # Closed whatever happens: a save under way is finished before an error or Ctrl-C ends the run.
  with contextlib.closing(experiment.checkpoints()) as checkpoints, parallel.plain_failures():
    start = checkpoints.latest_step() or 0
    best = shown = None
    if start:
      best = checkpoints.meta(start)["best"]
      state = checkpoints.restore(start, state)
    print(
      f"{count(state.prompts):,} trained parameters beside {count(experiment.clip):,} frozen; "
      f"{len(trained)} of {len(data.names)} classes trained on {mesh.size} x "
      f"{mesh.devices[0].device_kind}"
      + (f" in {jax.process_count()} processes" if jax.process_count() > 1 else "")
      + (f"; continuing at step {start} of {config.steps}" if start else ""),
      flush=True,
    )
    writer = MetricWriter(experiment.workdir, resume_step=start) if first else None
    rates = optim.schedules(config.optimizer)
    state = devices.place_state(state)
    constants = (experiment.params, text_CxE, jax.random.key(config.seed + 1))
    params, text_CxE, key = devices.place_constant(constants)
    batches = data.train_batches(start)
    steps = progress(range(start, config.steps), "train", "step")
    pending = None  # metrics of an earlier step: fetched late, so that the device never waits
    began = time.time()
    for step in steps:
      batch = devices.place_batch(next(batches))
      state, metrics = devices.step(state, params, text_CxE, batch, key)
      done = step + 1
      if pending:
        log(writer, steps, rates, pending[0], devices.fetch_metrics(pending[1]))
      pending = (done, metrics) if done % config.log_every == 0 or done == config.steps else None
      if done % config.eval_every == 0 or done == config.steps:
        fetched = devices.fetch_state(state)
        last, shown = evaluation(fetched)
        if first:
          writer.write(done, {f"eval/{k}": v for k, v in scalars(last).items()})
        best = last if best is None or rank(last) >= rank(best) else best
        checkpoints.save(fetched, {RANKING: rank(last)}, {"best": best})
    if pending:
      log(writer, steps, rates, pending[0], devices.fetch_metrics(pending[1]))
    seconds = time.time() - began
  if shown is None:  # the run had already ended
    last, shown = evaluation(devices.fetch_state(state))
  if first:
    report(experiment, writer, shown, last, best, seconds)
  return {"last": last, "best": best}


def loss_of(config):
  """The configured loss as a function of logits and labels."""
  if config.name not in LOSSES:
    raise InputError(f"config.loss.name must be one of {sorted(LOSSES)}, got {config.name!r}")
  options = {"mask_ignored": config.mask_ignored} if config.name == "sigmoid" else {}
  return lambda logits, label: LOSSES[config.name](logits, label, **options)


def relabel_of(config, data):
  """Self-training as a function of logits, labels and step; None in the other settings."""
  if data.unlabelled is None:
    return None
  pixels = config.self_training.pixels
  if pixels not in ("unseen", "unlabelled"):
    raise InputError(
      f'config.self_training.pixels must be "unseen" or "unlabelled", got {pixels!r}'
    )
  return functools.partial(
    self_training.relabel,
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
  """Writes the metrics of one step (in the first process); an infinite loss ends the run."""
  learning_rates = {f"{k}/learning_rate": float(rate(step - 1)) for k, rate in rates.items()}
  if writer:
    writer.write(step, {f"train/{k}": v for k, v in metrics.items()} | learning_rates)
  steps.set_postfix(loss=f"{metrics['loss']:.3f}")
  if not metrics["loss"] < float("inf"):
    raise InputError(
      f"the loss is {metrics['loss']} at step {step}: lower config.optimizer.base_lr, or look at "
      "the labels; the newest checkpoint is from before"
    )


def report(experiment, writer, shown, last, best, seconds) -> None:
  """`metrics.json`, the pictures, and the closing lines."""
  workdir, config = experiment.workdir, experiment.config
  evaluate.write_metrics(workdir / "metrics.json", last, best, config)
  evaluate.pictures(workdir, shown, config)
  visualize.curves(workdir / "curves.png", writer.history())
  writer.close()
  rows = {f"last, step {last['step']}": last, f"best, step {best['step']}": best}
  print(f"\nTrained to step {config.steps} ({seconds:.0f} s in this call). Scores in %:")
  print(evaluate.score_table(rows))
  print("The best checkpoint was selected on the evaluation classes; report the last.")
  print(
    f"Look at {workdir}/predictions.png and {workdir}/curves.png. "
    f"Every number is in {workdir}/metrics.json."
  )
