"""Annotation-free training: another network, or a snapshot of the own one, labels every pixel."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rpn_jax.base.errors import InputError
from rpn_jax.base.words import check_known
from rpn_jax.config import check_whole_patches
from rpn_jax.config.networks import Dense
from rpn_jax.models import NETWORKS, Network
from rpn_jax.models.trained import join
from rpn_jax.models.training_free import METHODS
from rpn_jax.training.pseudo_labels import upsampled
from rpn_jax.training.step import TrainState


class Snapshot(NamedTuple):
  """Trained parameters as they were at some step.

  Attributes:
    updates: int32, how many there were.
    prompts: the parameters after the last update whose number was a multiple of `every`; zeros
      before the first of these.
  """

  updates: jax.Array
  prompts: Any


def with_snapshots(
  optimizer: optax.GradientTransformation, every: int
) -> optax.GradientTransformation:
  """An optimizer whose state has a Snapshot, at its end, of every so many updates; 0: none.

  As a part of that state it is sharded and saved like the moments, and left alone in skipped steps.
  """
  if not every:
    return optimizer

  def init(prompts: Any) -> Snapshot:
    return Snapshot(jnp.int32(0), jax.tree.map(jnp.zeros_like, prompts))

  def update(updates: Any, state: Snapshot, prompts: Any) -> tuple[Any, Snapshot]:
    after, done = optax.apply_updates(prompts, updates), state.updates + 1
    due = done % every == 0
    kept = jax.tree.map(lambda new, old: jnp.where(due, new, old), after, state.prompts)
    return updates, Snapshot(done, kept)

  return optax.chain(optimizer, optax.GradientTransformation(init, update))


@dataclasses.dataclass(frozen=True, eq=False)
class Labeler:
  """The labels of annotation-free training, after MaskCLIP+ (Zhou et al., ECCV 2022).

  A training-free network, the teacher, sees what the network in training sees and gives each pixel
  its best class. With `refresh`, the network in training labels for itself from its first snapshot
  on, without dropout and other noise. Ground truth is not read; padding stays ignored.

  Attributes:
    teacher: of the tower as it was before training.
    text_CxE: its text input, which no text tower in training changes.
    pupil: the network in training.
    refresh: as given to `with_snapshots`, which made the optimizer.
    confidence: pixels whose best class has a lower probability are ignored; 0 is off.
    ignore: label of ignored pixels.
  """

  teacher: Network
  text_CxE: np.ndarray
  pupil: Network
  refresh: int = 0
  confidence: float = 0.0
  ignore: int = 255

  def __call__(self, state: TrainState, params: dict, text: Any, batch: dict) -> jax.Array:
    """Class ids, or `ignore`: (B, H, W) int32.

    Args:
      state: before the step.
      params: the towers as they were before training.
      text: the pupil's text input.
      batch: `image` and `label`, of which only `ignore` is read: the padding.
    """
    image, size = batch["image"], batch["label"].shape[1:]

    def taught() -> jax.Array:
      towers = {name: params[name] for name in self.teacher.towers}
      logits = self.teacher.apply({"params": towers, "prompts": {}}, image, self.text_CxE)
      return self._best(self.teacher, logits, size)

    def own(snapshot: Snapshot) -> jax.Array:
      logits = self.pupil.apply(join(params, snapshot.prompts), image, text)
      return self._best(self.pupil, logits, size)

    if self.refresh:
      snapshot = state.opt_state[-1]
      early = snapshot.updates < self.refresh
      best_BxHxW = jax.lax.cond(early, taught, lambda: own(snapshot))
    else:
      best_BxHxW = taught()
    return jnp.where(batch["label"] == self.ignore, self.ignore, best_BxHxW)

  def _best(self, network: Network, logits_BxhxwxC: jax.Array, size: Sequence[int]) -> jax.Array:
    def read(logits_HxWxC: jax.Array) -> jax.Array:
      best = logits_HxWxC.argmax(-1).astype(jnp.int32)
      if not self.confidence:
        return best
      probability = network.probabilities(network.scores(logits_HxWxC)).max(-1)
      return jnp.where(probability < self.confidence, self.ignore, best)

    return upsampled(read, logits_BxhxwxC, size)


def make_teacher(config: Any, pupil: Network) -> Network:
  """The training-free network that labels the images of an annotation-free run.

  Args:
    config: of the run: `self_training.teacher` is the method, and `dense` has its settings.
    pupil: the network in training, whose architecture, compute type and kernels it shares.

  Raises:
    InputError: an unknown method, one that these weights or settings do not allow, or a crop that
      is not of whole patches, which the pupil may resize.
  """
  method = config.self_training.teacher
  check_known("config.self_training.teacher=", method, METHODS)
  if config.dense.method not in (Dense.method, method):
    raise InputError(
      f"config.dense.method={config.dense.method!r}: the teacher of an annotation-free run is "
      f"config.self_training.teacher={method!r}: set that one, and leave this out"
    )
  network = NETWORKS["training_free"]
  settings = {**config[network.section].to_dict(), "method": method}
  check_whole_patches("config.data.crop", config.data.crop, config.clip, pupil.clip.patch_size)
  try:
    return network.create(pupil.clip, settings, dtype=pupil.dtype, kernels=pupil.kernels)
  except ValueError as error:
    raise InputError(
      f"config.self_training.teacher={method!r} with config.{network.section} and config.clip="
      f"{config.clip}: {error}"
    ) from None


def make_labeler(teacher: Network, config: Any, pupil: Network, encoder: Any, data: Any) -> Labeler:
  """What labels the images of an annotation-free run; `encoder` as for `Network.text_input`."""
  return Labeler(
    teacher,
    encoder.embed([data.names[i] for i in data.trained]),
    pupil,
    config.self_training.refresh,
    config.self_training.confidence,
    data.ignore,
  )
