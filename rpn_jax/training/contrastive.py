"""Contrastive training of a CLIP model on image-caption pairs (Radford et al., 2021)."""

import functools
from typing import Any, cast

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from rpn_jax.models import kernels
from rpn_jax.models.clip import CLIP, CLIPConfig, l2_normalize

# CLIP clips its logit scale at 100 so that training stays stable.
MAX_LOGIT_SCALE = float(np.log(100.0))


def contrastive_loss(
  image_BxE: jax.Array, text_BxE: jax.Array, tokens_BxT: jax.Array, logit_scale: jax.Array
) -> jax.Array:
  """Symmetric cross-entropy of images against captions.

  Small data sets repeat captions within a batch. Equal captions share the target evenly, since none
  of them is wrong.
  """
  logits = jnp.exp(logit_scale) * l2_normalize(image_BxE) @ l2_normalize(text_BxE).T
  same = (tokens_BxT[:, None] == tokens_BxT[None]).all(-1).astype(jnp.float32)
  target = same / same.sum(-1, keepdims=True)
  per_image = optax.softmax_cross_entropy(logits, target).mean()
  per_text = optax.softmax_cross_entropy(logits.T, target).mean()
  return (per_image + per_text) / 2


class ContrastiveTrainer:
  """Model, optimizer and jitted steps of contrastive pre-training.

  Args:
    config: the fields of `configs/shapes_clip.py`.

  Attributes:
    clip: the CLIP architecture.
    schedule: step -> learning rate.
  """

  def __init__(self, config: ml_collections.ConfigDict):
    self.clip = CLIPConfig(**config.clip)
    self._seed, self._side = config.seed, self.clip.image_size
    self._mean, self._std = np.float32(config.mean), np.float32(config.std)
    platform = jax.local_devices()[0].platform
    self._model = CLIP(self.clip, kernels=kernels.for_platform(platform))
    self._key = jax.random.key(config.seed + 1)
    self.schedule = optax.warmup_cosine_decay_schedule(
      0.0, config.learning_rate, config.warmup_steps, config.steps
    )
    is_matrix = lambda params: jax.tree.map(lambda x: x.ndim > 1, params)
    self._optimizer = optax.chain(
      optax.clip_by_global_norm(1.0),
      optax.adamw(self.schedule, b2=0.98, weight_decay=config.weight_decay, mask=is_matrix),
    )

  def init(self) -> tuple[dict, optax.OptState]:
    """Initial parameters and optimizer state."""
    image = jnp.zeros((1, self._side, self._side, 3))
    tokens = jnp.zeros((1, self.clip.context_length), jnp.int32)
    params = jax.jit(self._model.init)(jax.random.key(self._seed), image, tokens)["params"]
    return params, jax.jit(self._optimizer.init)(params)

  @functools.partial(
    jax.jit, static_argnums=0, donate_argnums=(1, 2), static_argnames="kept_patches"
  )
  def step(
    self,
    params: dict,
    opt_state: optax.OptState,
    image: jax.Array,
    tokens: jax.Array,
    step: int,
    kept_patches: int,
  ) -> tuple[dict, optax.OptState, jax.Array]:
    """One update: new parameters, new optimizer state, the loss.

    Args:
      params, opt_state: donated.
      image: (B, side, side, 3) uint8.
      tokens: (B, T) int32.
      step: seeds the choice of patches.
      kept_patches: number of random patches that the tower sees of each image (FLIP, Li et al.,
        2023).
    """
    kept = None
    if kept_patches < self.clip.grid**2:
      key = jax.random.fold_in(self._key, step)
      noise = jax.random.uniform(key, (len(image), self.clip.grid**2))
      kept = jnp.argsort(noise, axis=-1)[:, :kept_patches]

    def loss_fn(params: dict) -> jax.Array:
      apply = functools.partial(self._model.apply, {"params": params})
      image_BxE: Any = apply(self._normalized(image), kept, method="encode_image")
      text_BxE: Any = apply(tokens, method="encode_text")
      return contrastive_loss(image_BxE, text_BxE, tokens, params["logit_scale"])

    loss, grads = jax.value_and_grad(loss_fn)(params)
    updates, opt_state = self._optimizer.update(grads, opt_state, params)
    params = optax.apply_updates(params, updates)
    params["logit_scale"] = jnp.minimum(params["logit_scale"], MAX_LOGIT_SCALE)
    return params, opt_state, loss

  @functools.partial(jax.jit, static_argnums=0)
  def embed_images(self, params: dict, image: jax.Array) -> jax.Array:
    """Unit-length embeddings (B, E) of uint8 images."""
    embedding = self._model.apply(
      {"params": params}, self._normalized(image), method="encode_image"
    )
    return l2_normalize(cast(jax.Array, embedding))

  def _normalized(self, image: jax.Array) -> jax.Array:
    return (image.astype(jnp.float32) / 255 - self._mean) / self._std
