"""One training step: pure, the same for one device and for many."""

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax

from rpn_jax.models import Network, trained
from rpn_jax.training.losses import Term


@flax.struct.dataclass
class TrainState:
  """What changes in training. The frozen tower is not part of it.

  Attributes:
    step: int32, steps done.
    prompts: the trained collection.
    opt_state: of the optimizer, for `prompts` only.
    skipped: int32, of these steps, the ones not applied: a loss or gradient was NaN or infinite.
    skipped_in_a_row: int32, the last ones of them without another between.
  """

  step: jax.Array
  prompts: dict
  opt_state: optax.OptState
  skipped: jax.Array = flax.struct.field(default_factory=lambda: np.int32(0))
  skipped_in_a_row: jax.Array = flax.struct.field(default_factory=lambda: np.int32(0))


def init_prompts(model: Network, params, text_CxE, key, image_size: int) -> dict:
  """Initial values of what is trained: the `prompts` collection, and what is trained of the towers
  (`trained.join`)."""
  keys = dict(zip(("prompts", "dropout", "gate"), jax.random.split(key, 3)))

  def init(params, text):
    image = jnp.zeros((1, image_size, image_size, 3))
    _, variables = model.apply({"params": params}, image, text, rngs=keys, mutable=["prompts"])
    return variables.get("prompts", {})

  prompts = dict(jax.jit(init)(params, text_CxE))
  # Copies: the training step uses its state up.
  return prompts | jax.tree.map(jnp.copy, trained.split(params, model.trained)[0])


def gradients(
  state: TrainState,
  params: dict,
  text_CxE: jax.Array,
  batch: dict,
  key: jax.Array,
  *,
  model: Network,
  loss_fn,
  relabel=None,
  axis: str | None = None,
) -> tuple[dict, dict[str, Term]]:
  """Gradients of the prompts and the loss terms, summed over devices.

  Args:
    state: before the step.
    params: the frozen tower, read only.
    text_CxE: embeddings of the classes trained on; labels index its rows.
    batch: `image` (B, H, W, 3) float32 normalised, `label` (B, H, W) int32; this device's part.
    key: of the run. Dropout and gate noise of an image depend on it, on the step number and on the
      image's position in the global batch, so that any number of devices draws the same.
    model: the network.
    loss_fn: (logits, label) -> {name: Term}.
    relabel: (logits, label, step) -> label, for self-training; None takes the labels as given.
    axis: name of the mapped device axis; None on a single device.
  """
  rows = batch["image"].shape[0]
  example_offset = 0 if axis is None else jax.lax.axis_index(axis) * rows
  over_devices = lambda x: x if axis is None else jax.lax.psum(x, axis)
  dropout, gate = jax.random.split(jax.random.fold_in(key, state.step))

  def loss(prompts):
    logits = model.apply(
      trained.join(params, prompts),
      batch["image"],
      text_CxE,
      train=True,
      example_offset=example_offset,
      rngs={"dropout": dropout, "gate": gate},
    )
    label = batch["label"]
    if relabel is not None:
      label = relabel(logits, label, state.step)
    terms = loss_fn(logits, label)
    # Devices have different numbers of masks: the mean is over all of them, not a mean of means.
    normalizers = over_devices({name: term.normalizer for name, term in terms.items()})
    terms = {name: Term(term.total, normalizers[name]) for name, term in terms.items()}
    return sum(term.value for term in terms.values()), terms

  (_, terms), grads = jax.value_and_grad(loss, has_aux=True)(state.prompts)
  if axis is not None:
    # One vector, one all-reduce: XLA does not join them on every backend.
    totals = {name: term.total for name, term in terms.items()}
    vector, restore = jax.flatten_util.ravel_pytree((grads, totals))
    grads, totals = restore(over_devices(vector))
    terms = {name: Term(totals[name], term.normalizer) for name, term in terms.items()}
  return grads, terms


def update(
  state: TrainState, grads: dict, terms: dict[str, Term], optimizer: optax.GradientTransformation
) -> tuple[TrainState, dict[str, jax.Array]]:
  """The state after the step, and its loss terms, their sum and the gradients' norm.

  Where one of these is not finite, prompts and optimizer stay as they were, on every device:
  gradients and terms are those summed over all.
  """
  values = {name: term.value for name, term in terms.items()}
  loss, norm = sum(values.values()), optax.tree.norm(grads)
  finite = jnp.isfinite(loss) & jnp.isfinite(norm)
  updates, opt_state = optimizer.update(grads, state.opt_state, state.prompts)
  applied = (optax.apply_updates(state.prompts, updates), opt_state)
  prompts, opt_state = jax.tree.map(
    lambda new, old: jnp.where(finite, new, old), applied, (state.prompts, state.opt_state)
  )
  skipped = state.skipped + jnp.where(finite, 0, 1)
  in_a_row = jnp.where(finite, 0, state.skipped_in_a_row + 1)
  metrics = {"loss": loss, "grad_norm": norm, "skipped": skipped, "skipped_in_a_row": in_a_row}
  return TrainState(state.step + 1, prompts, opt_state, skipped, in_a_row), {**values, **metrics}


def train_step(
  state: TrainState, params, text_CxE, batch, key, *, optimizer, **settings
) -> tuple[TrainState, dict[str, jax.Array]]:
  """One update of the prompts; see `gradients` for the arguments and `update` for the result."""
  grads, terms = gradients(state, params, text_CxE, batch, key, **settings)
  return update(state, grads, terms, optimizer)
