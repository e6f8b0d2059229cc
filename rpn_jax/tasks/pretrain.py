"""Contrastive pre-training of a CLIP model on image-caption pairs (Radford et al., 2021)."""

import functools
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rpn_jax.base.console import progress
from rpn_jax.base.errors import InputError
from rpn_jax.base.paths import write_json
from rpn_jax.devices import devices_text
from rpn_jax.models import kernels
from rpn_jax.models.clip import CLIP, CLIPConfig, l2_normalize
from rpn_jax.text.embeddings import class_embeddings
from rpn_jax.text.tokenizer import tokenize
from rpn_jax.training.metric_log import MetricWriter
from rpn_jax.weights import arrays, clip_file

# CLIP clips its logit scale at 100 so that training stays stable.
MAX_LOGIT_SCALE = float(np.log(100.0))


def contrastive_loss(image_BxE, text_BxE, tokens_BxT, logit_scale):
  """Symmetric cross-entropy of images against captions.

  A small world repeats captions within a batch; equal captions share the target evenly, since
  none of them is a wrong answer.
  """
  logits = jnp.exp(logit_scale) * l2_normalize(image_BxE) @ l2_normalize(text_BxE).T
  same = (tokens_BxT[:, None] == tokens_BxT[None]).all(-1).astype(jnp.float32)
  target = same / same.sum(-1, keepdims=True)
  per_image = optax.softmax_cross_entropy(logits, target).mean()
  per_text = optax.softmax_cross_entropy(logits.T, target).mean()
  return (per_image + per_text) / 2


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
    config: the fields of `configs/shapes_clip.py`.
    workdir: where everything goes.
    batches: makes an iterator of `{image: uint8 (B, H, W, 3), caption: B strings}`.
    test_images: (n, H, W, 3) uint8 images of one object each.
    test_labels: (n,) index of that object in `test_names`.
    test_names: class names for zero-shot classification.

  Returns:
    The content of `metrics.json`.
  """
  clip_config = CLIPConfig(**config.clip)
  model = CLIP(clip_config, kernels=kernels.for_platform(jax.local_devices()[0].platform))
  mean, std = np.float32(config.mean), np.float32(config.std)

  def prepare(image):
    return (image.astype(jnp.float32) / 255 - mean) / std

  side = clip_config.image_size
  params = jax.jit(model.init)(
    jax.random.key(config.seed),
    jnp.zeros((1, side, side, 3)),
    jnp.zeros((1, clip_config.context_length), jnp.int32),
  )["params"]
  schedule = optax.warmup_cosine_decay_schedule(
    0.0, config.learning_rate, config.warmup_steps, config.steps
  )
  decayed = jax.tree.map(lambda x: x.ndim > 1, params)
  optimizer = optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.adamw(schedule, b2=0.98, weight_decay=config.weight_decay, mask=decayed),
  )

  key = jax.random.key(config.seed + 1)

  @functools.partial(jax.jit, donate_argnums=(0, 1), static_argnames="keep")
  def train_step(params, opt_state, image, tokens, step, keep):
    kept = None
    if keep < clip_config.grid**2:
      noise = jax.random.uniform(jax.random.fold_in(key, step), (len(image), clip_config.grid**2))
      kept = jnp.argsort(noise, axis=-1)[:, :keep]

    def loss_fn(params):
      image_BxE = model.apply({"params": params}, prepare(image), kept, method="encode_image")
      text_BxE = model.apply({"params": params}, tokens, method="encode_text")
      return contrastive_loss(image_BxE, text_BxE, tokens, params["logit_scale"])

    loss, grads = jax.value_and_grad(loss_fn)(params)
    updates, opt_state = optimizer.update(grads, opt_state, params)
    params = optax.apply_updates(params, updates)
    params["logit_scale"] = jnp.minimum(params["logit_scale"], MAX_LOGIT_SCALE)
    return params, opt_state, loss

  @jax.jit
  def embed_images(params, image):
    return l2_normalize(model.apply({"params": params}, prepare(image), method="encode_image"))

  def top1(params) -> float:
    text = class_embeddings(clip_config, params, test_names, (config.template,))
    image = np.concatenate(
      [embed_images(params, part) for part in np.array_split(test_images, len(test_images) // 96)]
    )
    return float(((image @ text.T).argmax(-1) == test_labels).mean())

  writer = MetricWriter(workdir, resume_step=0)
  opt_state = jax.jit(optimizer.init)(params)
  stream = batches()
  started = time.time()
  accuracy = 0.0
  steps = progress(range(1, config.steps + 1), f"pre-train on {devices_text()}", "step")
  for step in steps:
    batch = next(stream)
    tokens = tokenize(list(batch["caption"]), clip_config.context_length)
    if tokens[:, config.caption_tokens :].any():
      raise InputError(f"a caption is longer than config.caption_tokens={config.caption_tokens}")
    masked = step <= config.steps - config.unmasked_steps
    params, opt_state, loss = train_step(
      params,
      opt_state,
      batch["image"],
      tokens[:, : config.caption_tokens],
      step,
      keep=round(clip_config.grid**2 * (config.kept_patches if masked else 1.0)),
    )
    if step % config.log_every == 0 or step == config.steps:
      writer.write(step, {"loss": float(loss), "learning_rate": float(schedule(step))})
    if step % config.eval_every == 0 or step == config.steps:
      accuracy = top1(params)
      writer.write(step, {"top1": accuracy})
      clip_file.save(workdir / "clip.safetensors", clip_config, params, dtype=np.float16)
    steps.set_postfix(loss=f"{float(loss):.3f}", top1=f"{accuracy:.3f}")
  writer.close()
  record = {
    "top1": accuracy,
    "images": config.steps * config.batch_size,
    "seconds": round(time.time() - started),
    "config": config.to_dict(),
    "fingerprint": arrays.fingerprint(clip_file.load(workdir / "clip.safetensors")[1]),
  }
  write_json(workdir / "metrics.json", record)
  print(
    f"\nPre-trained on {record['images']:,} pairs in {record['seconds']} s: zero-shot top-1 "
    f"{100 * accuracy:.1f} %. The weights are in {workdir}/clip.safetensors."
  )
  return record
