"""One training step: a pure function, the same for one device and for many."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from rpn_jax.models import Network
from rpn_jax.models.prompts import count
from rpn_jax.models.trained import join
from rpn_jax.training.losses import Term

if TYPE_CHECKING:  # whoever segments with a run's state does not load it
  import optax

# (logits, label) -> {name: Term}; (logits, label, step) -> label; (state, params, text, batch) ->
# label.
LossFunction = Callable[[jax.Array, jax.Array], dict[str, Term]]
Relabel = Callable[[jax.Array, jax.Array, jax.Array | np.int32], jax.Array]
LabelFunction = Callable[["TrainState", dict, Any, dict], jax.Array]


@flax.struct.dataclass
class TrainState:
  """What changes in training. The frozen towers are not part of it.

  Attributes:
    step: int32, steps done.
    prompts: the trained parameters: the `prompts` collection and the trained part of `params`,
      under its own names (see `models.trained`).
    opt_state: optimizer state of `prompts`.
    skipped: int32, steps that were not applied because a loss or gradient was NaN or infinite.
    consecutive_skips: int32, length of the current series of skipped steps.
  """

  step: jax.Array | np.int32
  prompts: dict
  opt_state: optax.OptState
  skipped: jax.Array | np.int32 = flax.struct.field(default_factory=lambda: np.int32(0))
  consecutive_skips: jax.Array | np.int32 = flax.struct.field(default_factory=lambda: np.int32(0))

  @property
  def trained_parameters(self) -> int:
    """Number of trained parameters."""
    return count(self.prompts)


def gradients(
  state: TrainState,
  params: dict,
  text: jax.Array,
  batch: dict,
  key: jax.Array,
  *,
  model: Network,
  loss_fn: LossFunction,
  relabel: Relabel | None = None,
  labeler: LabelFunction | None = None,
  axis: str | None = None,
) -> tuple[dict, dict[str, Term]]:
  """Gradients of the trained parameters and the loss terms, both summed over devices.

  Args:
    state: the state before the step.
    params: the frozen part of the towers; with a labeler all of them, as before training.
    text: `model.text_input` of the training classes; labels index its rows.
    batch: `image` (B, H, W, 3) float32 normalized, `label` (B, H, W) int32; this device's part.
    key: PRNG key of the run. Dropout and gate noise of an image depend on it, on the step and on
      the image's position in the global batch, not on the number of devices.
    model: the network.
    loss_fn: (logits, label) -> {name: Term}.
    relabel: (logits, label, step) -> label, for self-training; None uses the labels as given.
    labeler: (state, params, text, batch) -> label, in place of those of the batch; None takes them.
    axis: name of the mapped device axis; None on a single device.
  """
  batch_size = batch["image"].shape[0]
  offset = 0 if axis is None else jax.lax.axis_index(axis) * batch_size

  def sum_over_devices(tree: Any) -> Any:
    return tree if axis is None else jax.lax.psum(tree, axis)

  dropout, gate = jax.random.split(jax.random.fold_in(key, state.step))
  given = batch["label"] if labeler is None else labeler(state, params, text, batch)

  def loss(prompts: dict) -> tuple[jax.Array, dict[str, Term]]:
    logits = model.apply(
      join(params, prompts),
      batch["image"],
      text,
      train=True,
      example_offset=offset,
      rngs={"dropout": dropout, "gate": gate},
    )
    label = given if relabel is None else relabel(logits, given, state.step)
    terms = loss_fn(logits, label)
    # Devices have different numbers of masks: divide by the global number, no mean of means.
    normalizers = sum_over_devices({name: term.normalizer for name, term in terms.items()})
    terms = {name: replace(term, normalizer=normalizers[name]) for name, term in terms.items()}
    return sum((term.value for term in terms.values()), jnp.float32(0)), terms

  (_, terms), grads = jax.value_and_grad(loss, has_aux=True)(state.prompts)
  if axis is not None:
    # A single vector needs a single all-reduce: not every backend of XLA combines them.
    totals = {name: term.total for name, term in terms.items()}
    vector, restore = ravel_pytree((grads, totals))
    grads, totals = restore(sum_over_devices(vector))
    terms = {name: replace(term, total=totals[name]) for name, term in terms.items()}
  return grads, terms


def update(
  state: TrainState, grads: dict, terms: dict[str, Term], optimizer: optax.GradientTransformation
) -> tuple[TrainState, dict[str, jax.Array]]:
  """The state after the step and its metrics: loss terms, their sum, gradient norm, skipped steps.

  If the loss or the norm is not finite, the update is skipped: prompts and optimizer state stay as
  they were. All devices agree, since gradients and terms have been summed over them.
  """
  import optax

  values = {name: term.value for name, term in terms.items()}
  loss, norm = sum(values.values()), optax.tree.norm(grads)
  finite = jnp.isfinite(loss) & jnp.isfinite(norm)
  updates, opt_state = optimizer.update(grads, state.opt_state, state.prompts)
  applied = (optax.apply_updates(state.prompts, updates), opt_state)
  prompts, opt_state = jax.tree.map(
    lambda new, old: jnp.where(finite, new, old), applied, (state.prompts, state.opt_state)
  )
  skipped = state.skipped + jnp.where(finite, 0, 1)
  consecutive = jnp.where(finite, 0, state.consecutive_skips + 1)
  metrics = {"loss": loss, "grad_norm": norm, "skipped": skipped, "consecutive_skips": consecutive}
  return TrainState(state.step + 1, prompts, opt_state, skipped, consecutive), {**values, **metrics}


def train_step(
  state: TrainState,
  params: dict,
  text: jax.Array,
  batch: dict,
  key: jax.Array,
  *,
  optimizer: optax.GradientTransformation,
  **settings: Any,
) -> tuple[TrainState, dict[str, jax.Array]]:
  """One update of the prompts; arguments of `gradients`, result of `update`."""
  grads, terms = gradients(state, params, text, batch, key, **settings)
  return update(state, grads, terms, optimizer)
