"""The training step over all devices.

`ShardMap` and `Pmap` are thin wrappers around the same pure step: they place state and batches on
the devices, run the step, and fetch state and metrics as plain numpy.
"""

import functools
from typing import Any

import jax
import numpy as np
import optax

from rpn_jax.base.errors import InputError
from rpn_jax.devices import AXIS, compiler_options, data_mesh
from rpn_jax.models import Network
from rpn_jax.training import losses, pseudo_labels, step
from rpn_jax.training.losses import Term
from rpn_jax.training.step import TrainState


def check_batch_size(batch_size: int, mesh: jax.sharding.Mesh) -> None:
  """Raises an InputError unless the global batch divides among the devices of a mesh."""
  if batch_size % mesh.size:
    raise InputError(
      f"config.data.batch_size={batch_size} does not divide among {mesh.size} devices: "
      f"make it a multiple of {mesh.size}"
    )


class ShardMap:
  """The step as `jit` of a `shard_map` over a mesh.

  Args:
    mesh: devices along one axis, `data`.
    state: the state to train, or its shapes.
    optimizer: optimizer of the state.
    shard_state: shard prompts and optimizer state over the devices between steps, each array along
      its first divisible axis; otherwise they are replicated.
    **settings: keyword arguments of `step.gradients`.
  """

  def __init__(
    self,
    mesh: jax.sharding.Mesh,
    state: TrainState,
    optimizer: optax.GradientTransformation,
    *,
    shard_state: bool = False,
    **settings: Any,
  ):
    spec, named = jax.sharding.PartitionSpec, jax.sharding.NamedSharding
    replicated, split = spec(), spec(AXIS)
    self.replicated, self.split = named(mesh, replicated), named(mesh, split)

    # Without replication tracking, the only sums over devices are the explicit ones in the step.
    @functools.partial(
      jax.shard_map,
      mesh=mesh,
      in_specs=(replicated, replicated, replicated, split, replicated),
      out_specs=replicated,
      check_vma=False,
    )
    def gradients(
      state: TrainState, params: dict, text: jax.Array, batch: dict, key: jax.Array
    ) -> tuple[dict, dict[str, Term]]:
      return step.gradients(state, params, text, batch, key, axis=AXIS, **settings)

    def train_step(
      state: TrainState, params: dict, text: jax.Array, batch: dict, key: jax.Array
    ) -> tuple[TrainState, dict[str, jax.Array]]:
      grads, terms = gradients(state, params, text, batch, key)
      return step.update(state, grads, terms, optimizer)

    def sharding(x: jax.Array) -> jax.sharding.NamedSharding:
      axes = [i for i, size in enumerate(x.shape) if size and size % mesh.size == 0]
      return named(mesh, spec(*[None] * axes[0], AXIS)) if shard_state and axes else self.replicated

    self.state_sharding = jax.tree.map(sharding, state)
    self.step = jax.jit(
      train_step,
      in_shardings=(
        self.state_sharding,
        self.replicated,
        self.replicated,
        self.split,
        self.replicated,
      ),
      out_shardings=(self.state_sharding, self.replicated),
      donate_argnums=0,
      compiler_options=compiler_options(mesh),
    )
    self._gather = jax.jit(lambda tree: tree, out_shardings=self.replicated)

  def shapes(self, state: TrainState, *constants: Any, batch: dict, key: Any) -> tuple:
    """The shapes that `step` takes.

    Args:
      state: the state, or its shapes.
      *constants: params and text.
      batch: shapes of the global batch.
      key: PRNG key.
    """
    return (state, *constants, batch, key)

  def place_state(self, state: TrainState) -> TrainState:
    """Puts the state, of which every process has all, on the devices."""
    return jax.tree.map(_put, state, self.state_sharding)

  def place_constant(self, tree: Any) -> Any:
    """Replicates what every device needs: tower, text, key."""
    return jax.tree.map(lambda x: _put(x, self.replicated), tree)

  def place_batch(self, batch: dict) -> dict:
    """Puts this process's examples on its devices, as its part of the global batch."""
    return jax.tree.map(
      functools.partial(jax.make_array_from_process_local_data, self.split), batch
    )

  def fetch_state(self, state: TrainState) -> TrainState:
    """The whole state as numpy, in every process."""
    return jax.device_get(self._gather(state))

  def fetch_metrics(self, metrics: dict) -> dict[str, float]:
    """The metrics as floats; waits for the step that computed them."""
    return {name: float(value) for name, value in metrics.items()}


def _put(x: Any, sharding: jax.sharding.NamedSharding) -> jax.Array:
  if sharding.is_fully_addressable:
    return jax.device_put(x, sharding)
  if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
    return jax.random.wrap_key_data(_put(jax.random.key_data(x), sharding))
  # device_put would compare the values between processes.
  x = np.asarray(x)
  return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])


class Pmap:
  """The step as `pmap` over all devices; the state has a leading device axis.

  Arguments and methods are those of `ShardMap`, but the state cannot be sharded.
  """

  def __init__(
    self,
    mesh: jax.sharding.Mesh,
    state: TrainState,
    optimizer: optax.GradientTransformation,
    *,
    shard_state: bool = False,
    **settings: Any,
  ):
    del state, shard_state  # which `config.check` refuses
    self.devices = list(mesh.devices.flat)
    self.local = [d for d in self.devices if d.process_index == jax.process_index()]
    # The same axis name as in the step: with another one, JAX would compile the step again when
    # its outputs come back as inputs.
    self.split = jax.sharding.NamedSharding(data_mesh(self.local), jax.sharding.PartitionSpec(AXIS))
    self.step = jax.pmap(
      functools.partial(step.train_step, optimizer=optimizer, axis=AXIS, **settings),
      axis_name=AXIS,
      devices=self.devices,
      donate_argnums=0,
    )

  def shapes(self, state: TrainState, *constants: Any, batch: dict, key: Any) -> tuple:
    count, total = len(self.local), len(self.devices)
    each = lambda x: jax.ShapeDtypeStruct((count, *x.shape), x.dtype)
    part = lambda x: jax.ShapeDtypeStruct((count, x.shape[0] // total, *x.shape[1:]), x.dtype)
    state, *constants, key = jax.tree.map(each, (state, *constants, key))
    return (state, *constants, jax.tree.map(part, batch), key)

  def place_state(self, state: TrainState) -> TrainState:
    return jax.tree.map(self._replicate, state)

  def place_constant(self, tree: Any) -> Any:
    return jax.tree.map(self._replicate, tree)

  def _replicate(self, x: Any) -> jax.Array:
    if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
      return jax.random.wrap_key_data(self._replicate(jax.random.key_data(x)))
    x = np.asarray(x)[None]
    shape = (len(self.local), *x.shape[1:])
    return jax.make_array_from_callback(shape, self.split, lambda _: x)

  def place_batch(self, batch: dict) -> dict:
    return jax.tree.map(lambda x: x.reshape(len(self.local), -1, *x.shape[1:]), batch)

  def fetch_state(self, state: Any) -> Any:
    # All devices hold the same values.
    return jax.tree.map(lambda x: np.asarray(x.addressable_data(0))[0], state)

  def fetch_metrics(self, metrics: dict) -> dict[str, float]:
    return {name: float(value) for name, value in self.fetch_state(metrics).items()}


MODES: dict[str, type[ShardMap] | type[Pmap]] = {"shard_map": ShardMap, "pmap": Pmap}


def make_stepper(
  config: Any,
  mesh: jax.sharding.Mesh,
  state: TrainState,
  optimizer: optax.GradientTransformation,
  network: Network,
  data: Any,
  labeler: step.LabelFunction | None,
) -> ShardMap | Pmap:
  """The training step that a config asks for; `data` as for `pseudo_labels.make_relabel`."""
  return MODES[config.parallel](
    mesh,
    state,
    optimizer,
    shard_state=config.shard_state,
    model=network,
    loss_fn=losses.make_loss(config.loss, data.ignore),
    relabel=pseudo_labels.make_relabel(config, data),
    labeler=labeler,
  )
