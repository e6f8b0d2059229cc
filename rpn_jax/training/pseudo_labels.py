"""Pseudo-labels: of unseen classes (transductive), or of every pixel (annotation-free)."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rpn_jax.base.errors import InputError
from rpn_jax.base.words import check_known
from rpn_jax.config.networks import Dense
from rpn_jax.models import NETWORKS, Network
from rpn_jax.models.resizing import interpolation_matrix
from rpn_jax.models.trained import join
from rpn_jax.models.training_free import METHODS
from rpn_jax.training.step import TrainState


def upsampled(
  read: Callable[[jax.Array], jax.Array], logits_BxhxwxC: jax.Array, size: Sequence[int]
) -> jax.Array:
  """What `read` makes of the logits (H, W, C) of every image, resized bilinearly: (B, H, W).

  No gradient passes.
  """
  rows, columns = (interpolation_matrix(*n) for n in zip(logits_BxhxwxC.shape[1:3], size))
  highest = jax.lax.Precision.HIGHEST

  def one(logits_hxwxC: jax.Array) -> jax.Array:
    wide = jnp.einsum("Hh,hwc,Ww->HWc", rows, logits_hxwxC, columns, precision=highest)
    return read(wide)

  # One image at a time: the upsampled logits of a batch would be the largest array of the step.
  return jax.lax.map(one, jax.lax.stop_gradient(logits_BxhxwxC).astype(jnp.float32))


def pseudo_labels(
  logits_BxhxwxC: jax.Array,
  label_BxHxW: jax.Array,
  unseen: Sequence[int] | np.ndarray,
  *,
  unlabelled: int = -1,
) -> jax.Array:
  """Labels whose unlabeled pixels are set to the model's best unseen class.

  That is the argmax over unseen classes of the detached sigmoid scores of the same forward pass,
  without a confidence threshold. Other pixels, including ignored ones, are unchanged.

  Args:
    logits_BxhxwxC: logits of all classes on the patch grid.
    label_BxHxW: class ids, or `unlabelled` for the pixels to fill.
    unseen: ids of the unseen classes.
    unlabelled: label of the pixels to fill.
  """
  unseen_U = jnp.asarray(unseen)
  # The sigmoid is monotonic: logits and scores have the same argmax.
  logits_BxhxwxU = logits_BxhxwxC[..., unseen_U]
  best_BxHxW = upsampled(lambda x: x.argmax(-1), logits_BxhxwxU, label_BxHxW.shape[1:])
  return jnp.where(label_BxHxW == unlabelled, unseen_U[best_BxHxW], label_BxHxW)


def make_relabel(config: Any, data: Any) -> Callable | None:
  """Self-training as a function of logits, labels and step; None in the other settings."""
  if config.data.setting != "transductive":
    return None
  return functools.partial(
    relabel,
    unseen=data.unseen,
    unlabelled=data.unlabelled,
    ignore=data.ignore,
    start=round(config.self_training.start * config.steps),
  )


def relabel(
  logits_BxhxwxC: jax.Array,
  label_BxHxW: jax.Array,
  step: jax.Array | np.int32,
  *,
  unseen: Sequence[int] | np.ndarray,
  unlabelled: int,
  ignore: int,
  start: int,
) -> jax.Array:
  """The labels of one training step in the transductive setting.

  Before step `start` the unlabeled pixels are ignored, from then on they get pseudo-labels.

  Args:
    logits_BxhxwxC: logits of the step's own forward pass.
    label_BxHxW: class ids; `unlabelled` for pixels to fill, which are those of unseen classes and,
      by config.self_training.pixels, those without ground truth; `ignore` for others, as padding.
    step: steps done.
    unseen: ids of the unseen classes.
    unlabelled: label of the pixels to fill.
    ignore: label of ignored pixels.
    start: first step with pseudo-labels.
  """
  masked = jnp.where(label_BxHxW == unlabelled, ignore, label_BxHxW)
  filled = pseudo_labels(logits_BxhxwxC, label_BxHxW, unseen, unlabelled=unlabelled)
  return jnp.where(step < start, masked, filled)


# Annotation-free


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
    InputError: an unknown method, or one that these weights or settings do not allow.
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
