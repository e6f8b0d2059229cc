"""One training step: pure, the same for one device and for many."""

import functools

import flax
import jax
import jax.numpy as jnp
import optax

from rpn_jax.losses import Term
from rpn_jax.models.rpn import RPN


@flax.struct.dataclass
class TrainState:
  """What changes in training. The frozen tower is not part of it.

  Attributes:
    step: int32, steps done.
    prompts: the trained collection.
    opt_state: of the optimizer, for `prompts` only.
  """

  step: jax.Array
  prompts: dict
  opt_state: optax.OptState


def init_prompts(model: RPN, params, text_CxE, key, image_size: int) -> dict:
  """Initial values of the `prompts` collection."""
  keys = dict(zip(("prompts", "dropout", "gate"), jax.random.split(key, 3)))

  def init(params, text):
    image = jnp.zeros((1, image_size, image_size, 3))
    _, variables = model.apply({"params": params}, image, text, rngs=keys, mutable=["prompts"])
    return variables["prompts"]

  return jax.jit(init)(params, text_CxE)


def train_step(
  state: TrainState,
  params: dict,
  text_CxE: jax.Array,
  batch: dict,
  key: jax.Array,
  *,
  model: RPN,
  optimizer: optax.GradientTransformation,
  loss_fn,
  relabel=None,
) -> tuple[TrainState, dict[str, Term | jax.Array]]:
  """One update of the prompts.

  Args:
    state: before the step.
    params: the frozen tower, read only.
    text_CxE: embeddings of the classes trained on; labels index its rows.
    batch: `image` (B, H, W, 3) float32 normalised, `label` (B, H, W) int32.
    key: of the run; dropout and gate noise of a step depend on it and on the step number.
    model: the network.
    optimizer: of `state.opt_state`.
    loss_fn: (logits, label) -> {name: Term}.
    relabel: (logits, label, step) -> label, for self-training; None takes the labels as given.

  Returns:
    The state after the step, and the loss terms with `loss` (their sum) and `grad_norm`.
  """
  dropout, gate = jax.random.split(jax.random.fold_in(key, state.step))

  def loss(prompts):
    variables = {"params": params, "prompts": prompts}
    rngs = {"dropout": dropout, "gate": gate}
    logits = model.apply(variables, batch["image"], text_CxE, train=True, rngs=rngs)
    label = batch["label"]
    if relabel is not None:
      label = relabel(logits, label, state.step)
    terms = loss_fn(logits, label)
    return sum(term.value for term in terms.values()), terms

  (total, terms), grads = jax.value_and_grad(loss, has_aux=True)(state.prompts)
  updates, opt_state = optimizer.update(grads, state.opt_state, state.prompts)
  state = TrainState(state.step + 1, optax.apply_updates(state.prompts, updates), opt_state)
  return state, {**terms, "loss": total, "grad_norm": optax.tree.norm(grads)}


def compile_train_step(mesh: jax.sharding.Mesh, **static):
  """`train_step` jitted over a mesh: the batch split along `data`, everything else replicated.

  The state is donated; keep no reference to the one passed in.
  """
  spec = jax.sharding.PartitionSpec
  whole = jax.sharding.NamedSharding(mesh, spec())
  split = jax.sharding.NamedSharding(mesh, spec("data"))
  return jax.jit(
    functools.partial(train_step, **static),
    in_shardings=(whole, whole, whole, split, whole),
    out_shardings=(whole, whole),
    donate_argnums=0,
  )
