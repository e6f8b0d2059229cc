"""The training run: batches in, checkpoints, metrics and pictures out."""

import contextlib
import functools
import time

import jax

from rpn_jax import evaluate, optim, self_training, visualize
from rpn_jax.errors import InputError
from rpn_jax.experiment import RANKING, Experiment
from rpn_jax.logging import MetricWriter, progress
from rpn_jax.losses import LOSSES
from rpn_jax.models.prompts import count
from rpn_jax.parallel import check_batch_size, data_mesh, put_batch
from rpn_jax.step import TrainState, compile_train_step


def train(config, workdir, data) -> dict:
  """Trains the prompts of `config`, or continues the run found in the workdir.

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
  mesh = data_mesh()
  check_batch_size(config.data.batch_size, mesh)
  experiment.claim_workdir()

  trained = [data.names[i] for i in data.trained]
  text_CxE = experiment.text(trained)
  state = experiment.initial_state(text_CxE)
  optimizer = experiment.optimizer(state.prompts)
  whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  state, params, text_CxE = jax.device_put((state, experiment.params, text_CxE), whole)
  step_fn = compile_train_step(
    mesh,
    model=experiment.model,
    optimizer=optimizer,
    loss_fn=loss_of(config.loss),
    relabel=relabel_of(config, data),
  )

  def evaluation(state: TrainState):
    segmenter = experiment.evaluator(state.prompts, data)
    result = evaluate.evaluate(segmenter, data.eval_examples(), data, keep=evaluate.PICTURES)
    return {"step": int(state.step), **result.scores}, result

  # Closed whatever happens: a save under way is finished before an error or Ctrl-C ends the run.
  with contextlib.closing(experiment.checkpoints()) as checkpoints:
    start = checkpoints.latest_step() or 0
    best = shown = None
    if start:
      best = checkpoints.meta(start)["best"]
      state = checkpoints.restore(start, state)
    print(
      f"{count(state.prompts):,} trained parameters beside {count(experiment.clip):,} frozen; "
      f"{len(trained)} of {len(data.names)} classes trained on {mesh.size} x "
      f"{mesh.devices[0].device_kind}"
      + (f"; continuing at step {start} of {config.steps}" if start else ""),
      flush=True,
    )
    writer = MetricWriter(experiment.workdir, resume_step=start)
    rates = optim.schedules(config.optimizer)
    key = jax.random.key(config.seed + 1)
    batches = data.train_batches(start)
    steps = progress(range(start, config.steps), "train", "step")
    pending = None  # metrics of an earlier step: fetched late, so that the device never waits
    began = time.time()
    for step in steps:
      state, metrics = step_fn(state, params, text_CxE, put_batch(next(batches), mesh), key)
      done = step + 1
      if pending:
        log(writer, steps, rates, *pending)
      pending = (done, metrics) if done % config.log_every == 0 or done == config.steps else None
      if done % config.eval_every == 0 or done == config.steps:
        last, shown = evaluation(state)
        writer.write(done, {f"eval/{k}": v for k, v in scalars(last).items()})
        best = last if best is None or rank(last) >= rank(best) else best
        checkpoints.save(state, {RANKING: rank(last)}, {"best": best})
    if pending:
      log(writer, steps, rates, *pending)
    seconds = time.time() - began
  if shown is None:  # the run had already ended
    last, shown = evaluation(state)
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
  """Writes the metrics of one step; a loss that is not finite ends the run."""
  values = {k: float(getattr(v, "value", v)) for k, v in metrics.items()}
  learning_rates = {f"{k}/learning_rate": float(rate(step - 1)) for k, rate in rates.items()}
  writer.write(step, {f"train/{k}": v for k, v in values.items()} | learning_rates)
  steps.set_postfix(loss=f"{values['loss']:.3f}")
  if not values["loss"] < float("inf"):
    raise InputError(
      f"the loss is {values['loss']} at step {step}: lower config.optimizer.base_lr, or look at "
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
