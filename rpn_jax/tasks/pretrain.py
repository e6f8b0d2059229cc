"""Contrastive pre-training of a CLIP model: a config with task="pretrain"."""

import dataclasses
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from rpn_jax.base.console import progress
from rpn_jax.base.errors import InputError
from rpn_jax.base.paths import write_json
from rpn_jax.devices import devices_text
from rpn_jax.text.embeddings import class_embeddings
from rpn_jax.text.tokenizer import tokenize
from rpn_jax.training.contrastive import ContrastiveTrainer
from rpn_jax.training.metric_log import MetricWriter
from rpn_jax.weights import arrays, clip_file

TEST_BATCH_IMAGES = 96


def pretrain(
  config,
  workdir: pathlib.Path,
  batches: Callable[[], Iterator[dict]],
  test_images: np.ndarray,
  test_labels: np.ndarray,
  test_names: Sequence[str],
) -> dict:
  """Trains CLIP from scratch and writes `clip.safetensors` and `metrics.json` to the workdir.

  Args:
    config: has the fields of `configs/shapes_clip.py`.
    workdir: where the files go.
    batches: returns an iterator over `{image: uint8 (B, H, W, 3), caption: B strings}`.
    test_images: (n, H, W, 3) uint8, images of a single object.
    test_labels: (n,) index of the object in `test_names`.
    test_names: class names for zero-shot classification.

  Returns:
    The content of `metrics.json`.
  """
  trainer = ContrastiveTrainer(config)
  clip, weights = trainer.clip, workdir / "clip.safetensors"
  params, opt_state = trainer.init()

  def top1(params) -> float:
    text = class_embeddings(clip, params, test_names, (config.template,))
    batches = np.array_split(test_images, max(1, len(test_images) // TEST_BATCH_IMAGES))
    image = np.concatenate([trainer.embed_images(params, batch) for batch in batches])
    return float(((image @ text.T).argmax(-1) == test_labels).mean())

  stream = batches()
  started = time.time()
  accuracy = 0.0
  steps = progress(range(1, config.steps + 1), f"pre-train on {devices_text()}", "step")
  with MetricWriter(workdir, resume_step=0) as writer:
    for step in steps:
      batch = next(stream)
      tokens = tokenize(list(batch["caption"]), clip.context_length)
      if tokens[:, config.caption_tokens :].any():
        raise InputError(f"a caption is longer than config.caption_tokens={config.caption_tokens}")
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
        trained = dataclasses.replace(clip, mean=tuple(config.mean), std=tuple(config.std))
        clip_file.save(weights, trained, params, dtype=np.float16)
      steps.set_postfix(loss=f"{float(loss):.3f}", top1=f"{accuracy:.3f}")
  record = {
    "top1": accuracy,
    "images": config.steps * config.batch_size,
    "seconds": round(time.time() - started),
    "config": config.to_dict(),
    "fingerprint": arrays.fingerprint(clip_file.load(weights)[1]),
  }
  write_json(workdir / "metrics.json", record)
  print(
    f"\nPre-trained on {record['images']:,} pairs in {record['seconds']} s: zero-shot top-1 "
    f"{100 * accuracy:.1f} %. The weights are in {weights}."
  )
  return record
