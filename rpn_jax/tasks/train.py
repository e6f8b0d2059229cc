"""Training: brings config, network and data together; ends with scores and figures."""

import contextlib
import time

import jax
import jax.numpy as jnp

from rpn_jax import devices
from rpn_jax.base.errors import InputError
from rpn_jax.config import notes_on_schedule
from rpn_jax.drawing.plots import plot_curves
from rpn_jax.inference.evaluation import Evaluation, evaluate
from rpn_jax.inference.predictor import Predictor, open_run
from rpn_jax.tasks.evaluate import (
  FIGURE_EXAMPLES,
  draw_figures,
  make_partial,
  score_table,
  split_notes,
  write_metrics,
)
from rpn_jax.training import annotation_free, optim, sharding
from rpn_jax.training.loop import Loop
from rpn_jax.training.metric_log import MetricWriter
from rpn_jax.training.preemption import PreemptionGuard
from rpn_jax.training.run import Run, classes_of, held_workdir
from rpn_jax.training.step import TrainState


def train(config, workdir, data, *, restart: bool = False) -> dict:
  """Trains the network of `config`, or resumes the run found in the workdir.

  All processes of a run call this with their own part of the data; the first one writes metrics and
  figures. On SIGTERM the run is saved and the process exits with status 0; on Ctrl-C it is saved
  and `KeyboardInterrupt` is raised.

  Args:
    config: locked; see `rpn_jax.config` for the fields.
    workdir: directory of the run.
    data: has `names`, `seen`, `unseen`, `train_batches(start_step)`, `train_indices(step)` and
      `eval_examples()`.
    restart: move aside what is in the workdir and begin at step 0.

  Returns:
    The last and best scores, as in `metrics.json`.

  Raises:
    InputError: JAX computes in 64 bits, the method has nothing to train, the config does not fit
      weights or devices, or a run was in the workdir whose checkpoints are missing.
  """
  predictor, run = open_trainable(config, workdir)
  devices.wait_for_all("their copies of weights and data")
  teacher = None
  if config.data.setting == "annotation_free":
    teacher = annotation_free.make_teacher(config, predictor.network)
  mesh = devices.global_mesh()
  sharding.check_batch_size(config.data.batch_size, mesh)
  with held_workdir(run.workdir), PreemptionGuard() as guard:
    if restart:
      run.restart()
    run.claim(classes_of(data))
    return _train(run, predictor, teacher, data, mesh, guard)


def open_trainable(config, workdir) -> tuple[Predictor, Run]:
  """`open_run` of a network with something to train; says what is odd about its schedule.

  Raises:
    InputError: the method has nothing to train, or see `open_run`.
  """
  predictor, run = open_run(config, workdir)
  if not predictor.network.trainable:
    raise InputError(f"method {config.method!r} has nothing to train: use --mode=eval")
  for note in notes_on_schedule(config):
    print(note, flush=True)
  return predictor, run


def _train(run: Run, predictor: Predictor, teacher, data, mesh, guard: PreemptionGuard) -> dict:
  """`train`, once the workdir is locked."""
  config, network = run.config, predictor.network
  trained = [data.names[i] for i in data.trained]
  text = predictor.training_text(trained)
  key = jax.random.key(config.seed)
  prompts = predictor.init_prompts(text, key, config.data.crop)
  labeler = None
  if teacher:
    labeler = annotation_free.make_labeler(teacher, config, network, predictor.encoder, data)
  optimizer = optim.make_optimizer(config.optimizer, prompts)
  if labeler:
    optimizer = annotation_free.with_snapshots(optimizer, labeler.refresh)
  state = jax.device_get(TrainState(jnp.int32(0), prompts, optimizer.init(prompts)))
  stepper = sharding.make_stepper(config, mesh, state, optimizer, network, data, labeler)
  examples = data.eval_examples()
  latest: Evaluation | None = None

  def evaluate_prompts(prompts, step: int) -> dict:
    nonlocal latest
    latest = evaluate(
      predictor.with_prompts(prompts).for_data(data),
      examples,
      data,
      keep=FIGURE_EXAMPLES,
      partial=make_partial(run, data, "train", step, len(examples)),
    )
    return latest.scores

  # Always closed, so that a save in progress is finished even after an error or Ctrl-C.
  with contextlib.ExitStack() as stack:
    checkpoints = stack.enter_context(contextlib.closing(run.checkpoints()))
    stack.enter_context(devices.one_line_runtime_errors())
    best = None
    if resumed := checkpoints.resume(state):
      state, best = resumed
    else:
      run.check_new()
    start = int(state.step)
    print(
      f"{state.trained_parameters:,} trained parameters, {predictor.clip_parameters:,} frozen; "
      f"{config.data.setting}: training on {len(trained)} of {len(data.names)} classes"
      + (f" by the labels of {labeler.teacher.title}" if labeler else "")
      + f", on {devices.devices_text()}"
      + (f" in {jax.process_count()} processes" if jax.process_count() > 1 else "")
      + (f"; {predictor.note}" if predictor.note else "")
      + (f"; resuming at step {start} of {config.steps}" if start else ""),
      flush=True,
    )
    writer = None
    if not jax.process_index():
      writer = stack.enter_context(MetricWriter(run.workdir, resume_step=start))
    loop = Loop(
      run,
      stepper,
      data,
      checkpoints=checkpoints,
      guard=guard,
      evaluate=evaluate_prompts,
      writer=writer,
      best=best,
    )
    began = time.time()
    params = predictor.params if labeler else predictor.frozen
    loop.fit(state, params, text, jax.random.key(config.seed + 1))
  if writer and latest:
    report(run, loop, writer, latest, time.time() - began, state.trained_parameters, data)
  devices.wait_for_all("the report")  # who left would have JAX end the others half a minute later
  make_partial(run, data, "train", 0, 0).path.unlink(missing_ok=True)
  return {"last": loop.last, "best": loop.best}


def report(
  run: Run, loop: Loop, writer: MetricWriter, latest: Evaluation, seconds: float, parameters: int,
  data,
) -> None:  # fmt: skip
  """Writes `metrics.json` and the figures, and prints the scores."""
  workdir, last, best = run.workdir, loop.last, loop.best
  write_metrics(workdir / "metrics.json", last, best, run.config, parameters)
  draw_figures(workdir, latest, run.config)
  plot_curves(workdir / "curves.png", writer.history())
  rows = {f"last, step {last['step']}": last, f"best, step {best['step']}": best}
  print(f"\nTrained to step {run.config.steps} ({seconds:.0f} s in this call). Scores in %:")
  print("\n".join([score_table(rows), *split_notes(run.config, data)]))
  print("The best checkpoint was selected on the evaluation classes; report the last.")
