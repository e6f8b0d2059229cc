"""Several runs as one program: a step of each of them at once.

A network as small as those of a study leaves an accelerator idle most of the time, and every run
compiles the same programs again. Runs that differ by seed and learning rates only have the same
step, so `jax.vmap` makes one of all of them: their states have a leading axis of runs, which is
split over the devices, and nothing is exchanged between runs.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from rpn_jax.devices import AXIS, compiler_options, data_mesh
from rpn_jax.models import Network
from rpn_jax.training import losses, optim, pseudo_labels, step
from rpn_jax.training.step import TrainState

# Of the config, what runs side by side may have of their own.
OWN_FIELDS = ("seed", "optimizer.base_lr", "optimizer.groups")
BETWEEN = "+"  # the arguments of two runs, on the command line


class SideBySide:
  """The step of K runs.

  Args:
    config: that the runs share, but for what is given here.
    network: theirs.
    data: as for `pseudo_labels.make_relabel`.
    peaks: of each run its `optim.peak_rates`.
    batch_of: of each run the position, in what `place_batches` takes, of the batches it trains on.
  """

  def __init__(
    self,
    config: Any,
    network: Network,
    data: Any,
    peaks: Sequence[Mapping[str, float]],
    batch_of: Sequence[int],
  ):
    count = math.gcd(len(peaks), jax.local_device_count())
    mesh, spec = data_mesh(jax.local_devices()[:count]), jax.sharding.PartitionSpec
    self._split = jax.sharding.NamedSharding(mesh, spec(AXIS))
    self._replicated = jax.sharding.NamedSharding(mesh, spec())
    self._of_runs = jax.device_put(
      (
        {name: np.array([run[name] for run in peaks], np.float32) for name in peaks[0]},
        np.array(batch_of, np.int32),
      ),
      self._split,
    )
    settings = {
      "model": network,
      "loss_fn": losses.make_loss(config.loss, data.ignore),
      "relabel": pseudo_labels.make_relabel(config, data),
    }

    def of_one(
      of_run: tuple, state: TrainState, params: dict, text: jax.Array, batches: dict, key: jax.Array
    ) -> tuple[TrainState, dict[str, jax.Array]]:
      run_peaks, position = of_run
      optimizer = optim.make_optimizer(config.optimizer, state.prompts, run_peaks)
      batch = jax.tree.map(lambda x: x[position], batches)
      return step.train_step(state, params, text, batch, key, optimizer=optimizer, **settings)

    every = jax.vmap(of_one, in_axes=(0, 0, None, None, None, 0))
    runs, shared = spec(AXIS), spec()
    self._step = jax.jit(
      jax.shard_map(
        every,
        mesh=mesh,
        in_specs=(runs, runs, shared, shared, shared, runs),
        out_specs=runs,
        check_vma=False,
      ),
      donate_argnums=1,
      compiler_options=compiler_options(mesh),
    )

  def place_states(self, states: Sequence[TrainState]) -> TrainState:
    """Puts the states of the runs, as numpy, on the devices as one."""
    return jax.device_put(jax.tree.map(lambda *x: np.stack(x), *states), self._split)

  def place_keys(self, keys: Sequence[jax.Array]) -> jax.Array:
    """Puts the PRNG key of each run on the devices."""
    return jax.device_put(jax.numpy.stack(keys), self._split)

  def place_constant(self, tree: Any) -> Any:
    """Replicates what all runs share: tower, text."""
    return jax.device_put(tree, self._replicated)

  def place_batches(self, batches: Sequence[dict]) -> dict:
    """Puts the batches of a step on the devices; several runs may use the same one."""
    return self.place_constant(jax.tree.map(lambda *x: np.stack(x), *batches))

  def step(
    self, states: TrainState, params: dict, text: jax.Array, batches: dict, keys: jax.Array
  ) -> tuple[TrainState, dict[str, jax.Array]]:
    """The states after a step, and the metrics of `step.update`, each with an axis of runs."""
    return self._step(self._of_runs, states, params, text, batches, keys)

  def lower(self, *arguments: Any) -> jax.stages.Lowered:
    """The step before it is compiled; arguments of `step`."""
    return self._step.lower(self._of_runs, *arguments)


def states_of(states: TrainState, count: int) -> list[TrainState]:
  """The states of the runs as numpy; waits for the step that computed them."""
  fetched = jax.device_get(states)
  return [jax.tree.map(lambda x, i=i: x[i], fetched) for i in range(count)]
