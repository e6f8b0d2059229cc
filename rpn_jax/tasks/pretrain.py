"""Contrastive pre-training of a CLIP model: a config with task="pretrain"."""

import contextlib
import dataclasses
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np

from rpn_jax.base.console import progress
from rpn_jax.base.errors import InputError
from rpn_jax.base.paths import write_json
from rpn_jax.devices import devices_text
from rpn_jax.text.embeddings import class_embeddings
from rpn_jax.text.tokenizer import tokenize
from rpn_jax.training.contrastive import ContrastiveTrainer
from rpn_jax.training.metric_log import MetricWriter
from rpn_jax.training.run import Run, held_workdir
from rpn_jax.training.step import TrainState
from rpn_jax.weights import arrays, clip_file

TEST_BATCH_IMAGES = 96


def pretrain(
  config,
  workdir: pathlib.Path,
  batches: Callable[[int], Iterator[dict]],
  test_images: np.ndarray,
  test_labels: np.ndarray,
  test_names: Sequence[str],
  restart: bool = False,
) -> dict:
  """Trains CLIP from scratch and writes `clip.safetensors` and `metrics.json` to the workdir.

  An interrupted pre-training continues from its last zero-shot test, where its checkpoints are
  written, as if there had been no interruption.

  Args:
    config: has the fields of `configs/shapes_clip.py`.
    workdir: where the files go.
    batches: steps done -> an iterator over `{image: uint8 (B, H, W, 3), caption: B strings}`.
    test_images: (n, H, W, 3) uint8, images of a single object.
    test_labels: (n,) index of the object in `test_names`.
    test_names: class names for zero-shot classification.
    restart: begin at step 0, after moving what is in the workdir aside.

  Returns:
    The content of `metrics.json`.

  Raises:
    InputError: several processes; a caption that is too long; the workdir is in use, or that of
      another pre-training.
  """
  if jax.process_count() > 1:
    raise InputError(
      f"pre-training is for one process, got {jax.process_count()}: leave out --distributed"
    )
  trainer = ContrastiveTrainer(config)
  clip, weights = trainer.clip, workdir / "clip.safetensors"
  trained = dataclasses.replace(clip, mean=tuple(config.mean), std=tuple(config.std))

  def top1(params) -> float:
    text = class_embeddings(clip, params, test_names, (config.template,))
    batches = np.array_split(test_images, max(1, len(test_images) // TEST_BATCH_IMAGES))
    image = np.concatenate([trainer.embed_images(params, batch) for batch in batches])
    return float(((image @ text.T).argmax(-1) == test_labels).mean())

  def save(params) -> None:
    clip_file.save(weights, trained, params, dtype=np.float16)

  with contextlib.ExitStack() as stack:
    stack.enter_context(held_workdir(workdir))
    run = Run(config, workdir, "")  # no CLIP precedes this one, and none is part of its identity
    if restart:
      run.restart()
    checkpoints = stack.enter_context(contextlib.closing(run.checkpoints()))
    state = TrainState(np.int32(0), *trainer.init())
    # The scores in a checkpoint are, unlike those of segmentation, of its own step, not the best.
    state, scores = checkpoints.resume(state) or (state, None)
    accuracy, seconds = (scores["top1"], scores["seconds"]) if scores else (0.0, 0.0)
    start, params, opt_state = int(state.step), state.prompts, state.opt_state
    if start:
      print(f"resuming at step {start} of {config.steps}", flush=True)
    writer = stack.enter_context(MetricWriter(workdir, resume_step=start))
    stream, started = batches(start), time.time() - seconds
    title = f"pre-train on {devices_text()}"
    steps = progress(range(start + 1, config.steps + 1), title, "step", start)
    for step in steps:
      batch = next(stream)
      tokens = tokenize(list(batch["caption"]), clip.context_length)
      if longer := tokens[:, config.caption_tokens :].any(0).sum():
        raise InputError(
          f"config.caption_tokens={config.caption_tokens}: a caption has "
          f"{config.caption_tokens + longer} tokens; set it to {clip.context_length}, all that the "
          "tower reads"
        )
      masked = step <= config.steps - config.unmasked_steps
      params, opt_state, loss = trainer.step(
        params,
        opt_state,
        batch["image"],
        tokens[:, : config.caption_tokens],
        step,
        kept_patches=round(clip.grid**2 * (config.kept_patches if masked else 1.0)),
      )
      if step % config.log_every == 0 or step == config.steps:
        rate = float(trainer.schedule(step))
        writer.write(step, {"loss": float(loss), "learning_rate": rate})
      if step % config.eval_every == 0 or step == config.steps:
        accuracy = top1(params)
        writer.write(step, {"top1": accuracy})
        writer.flush()
        save(params)
        seconds = time.time() - started
        done = TrainState(np.int32(step), *jax.device_get((params, opt_state)))
        checkpoints.save(done, {"step": step, "top1": accuracy, "seconds": seconds})
      steps.set_postfix(loss=f"{float(loss):.3f}", top1=f"{accuracy:.3f}")
    if start == config.steps:  # nothing was left to do but to write what may be gone
      save(params)
    record = {
      "top1": accuracy,
      "images": config.steps * config.batch_size,
      "seconds": round(seconds),
      "config": config.to_dict(),
      "fingerprint": arrays.fingerprint(clip_file.load(weights)[1]),
    }
    write_json(workdir / "metrics.json", record)
  print(
    f"\nPre-trained on {record['images']:,} pairs in {record['seconds']} s: zero-shot top-1 "
    f"{100 * accuracy:.1f} %. The weights are in {weights}."
  )
  return record
