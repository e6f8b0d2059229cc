"""Devices, processes, and the training step over all of them.

`ShardMap` and `Pmap` are thin wrappers of the one pure step: each places the state and the batches
on the devices, runs the step, and brings state and metrics back as plain numpy.
"""

import contextlib
import ctypes
import functools
import glob
import importlib.util
import os
import pathlib
import sys
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from rpn_jax import logging, step
from rpn_jax.errors import InputError

AXIS = "data"
# A process that is silent for so long is taken for dead, and the others end.
HEARTBEAT_SECONDS = 30
PRECISIONS = ("default", "high", "highest")


def lean_cpu() -> None:
  """A fraction of the memory on CPUs; call it before JAX first looks for devices.

  By default XLA schedules operations there as early as they can run and keeps their results, which
  was measured to make nothing faster (docs/benchmarks.md).
  """
  flag, given = "--xla_cpu_enable_concurrency_optimized_scheduler", os.environ.get("XLA_FLAGS", "")
  if flag not in given:
    os.environ["XLA_FLAGS"] = f"{given} {flag}=false".strip()
  if sys.platform == "linux":
    _lean_malloc()


@functools.cache
def _lean_malloc() -> None:
  """Keeps glibc from holding what is free: 0.2 GB after a step was compiled, and in each of eight
  arenas per core what a thread once used."""
  libc, arena_max = ctypes.CDLL(None), -8
  if not hasattr(libc, "mallopt"):
    return
  libc.mallopt(arena_max, max(1, os.cpu_count() // 2))

  def trim(event, seconds, **_):
    if seconds > 1 and event == "/jax/core/compile/backend_compile_duration":
      libc.malloc_trim(0)

  jax.monitoring.register_event_duration_secs_listener(trim)


def compiler_options() -> dict[str, str] | None:
  """For the training step: XLA keeps optimization barriers on CPUs, too, until it has scheduled.

  By default it takes them out before, and then computes again at once what `remat` would have
  computed late, and adds up late what should be added up at once (docs/benchmarks.md).
  """
  if jax.default_backend() != "cpu":
    return None
  return {"xla_disable_hlo_passes": "cse_barrier_expander"}


@contextlib.contextmanager
def session(place: Sequence[str] = (), matmul_precision: str = "default"):
  """What a command runs in: its processes joined, JAX set up, failures of the runtime in one line.

  Args:
    place: see `initialize`.
    matmul_precision: of float32 matrix products: default, high or highest.

  Raises:
    InputError: also when memory is out or another process is gone.
  """
  if matmul_precision not in PRECISIONS:
    raise InputError(
      f"config.matmul_precision must be one of {PRECISIONS}, got {matmul_precision!r}"
    )
  lean_cpu()
  jax.config.update("jax_default_matmul_precision", matmul_precision)
  # Programs compiled by an earlier run are reused.
  jax.config.update("jax_compilation_cache_dir", str(pathlib.Path.home() / ".cache/rpn_jax/xla"))
  # Of a short command, small programs are most of the time too.
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.05)
  initialize(place)
  if jax.process_index():
    logging.silence()  # the first process speaks for all
  with plain_failures():
    yield


@contextlib.contextmanager
def plain_failures():
  """What the runtime raises when memory is out or another process is gone, in one line.

  In the second case this process ends here and now: whatever would be cleaned up waits for the
  other one. Where nothing is raised, JAX ends the process when heartbeats have been missing.
  """
  try:
    yield
  except jax.errors.JaxRuntimeError as error:
    reason = " ".join(str(error).split())[:200]
    if "RESOURCE_EXHAUSTED" in reason:
      raise InputError(
        f"the device is out of memory ({reason}): lower config.data.batch_size or "
        'config.eval.window_batch, or set config.remat="full"'
      ) from error
    if jax.process_count() == 1:
      raise
    print(
      f"error: process {jax.process_index()} of {jax.process_count()} lost another one ({reason}): "
      "start all of them again, the run continues at its last checkpoint",
      file=sys.stderr,
      flush=True,
    )
    os._exit(2)


def initialize(place: Sequence[str] = ()) -> None:
  """Joins the processes of a run; call it before anything else uses JAX.

  Args:
    place: of this process: (address of process 0 as host:port, number of processes, number of this
      one). Without it, Slurm, Open MPI and Cloud TPU tell by themselves; elsewhere the process is
      alone.

  Raises:
    InputError: a place that is none, or processes that do not find each other.
  """
  arguments = {}
  if place:
    try:
      address, count, index = place
      arguments = {"num_processes": int(count), "process_id": int(index)}
      if ":" not in address or not 0 <= int(index) < int(count):
        raise ValueError
      arguments["coordinator_address"] = address
    except ValueError:
      raise InputError(
        "--distributed: expected HOST:PORT,PROCESSES,PROCESS, the address of process 0, how many "
        f"there are and which this is (from 0), got {','.join(place)}"
      ) from None
  elif not _in_cluster(os.environ):
    return
  try:
    jax.distributed.initialize(
      **arguments,
      heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
      shutdown_timeout_seconds=HEARTBEAT_SECONDS,
    )
  except (RuntimeError, ValueError) as error:
    raise InputError(
      f"the processes of this run did not find each other ({' '.join(str(error).split())}): start "
      "all of them, with the same address of process 0"
    ) from error


def _in_cluster(environment: Mapping[str, str]) -> bool:
  """Whether `jax.distributed.initialize` finds out by itself what it needs."""
  for variable in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE"):
    if int(environment.get(variable, 1)) > 1:
      return True
  accelerators = glob.glob("/dev/accel*") + glob.glob("/dev/vfio/[0-9]*")
  return bool(accelerators) and importlib.util.find_spec("libtpu") is not None


def process() -> tuple[int, int]:
  """The number of this process, and how many there are."""
  return jax.process_index(), jax.process_count()


def devices_text() -> str:
  """The devices of all processes, as "cpu" or "8 x NVIDIA H100"."""
  count, kind = jax.device_count(), jax.devices()[0].device_kind
  return kind if count == 1 else f"{count} x {kind}"


def data_mesh(devices=None) -> jax.sharding.Mesh:
  """Devices along one axis, `data`; by default this process's own."""
  return jax.sharding.Mesh(np.array(devices or jax.local_devices()), (AXIS,))


def global_mesh() -> jax.sharding.Mesh:
  """The devices of all processes, one process after the other.

  In this order the rows that a process reads of the global batch are the rows its devices take.
  """
  return data_mesh(sorted(jax.devices(), key=lambda d: (d.process_index, d.id)))


def check_batch_size(batch_size: int, mesh: jax.sharding.Mesh) -> None:
  if batch_size % mesh.size:
    raise InputError(
      f"config.data.batch_size={batch_size} does not divide among {mesh.size} devices: "
      f"make it a multiple of {mesh.size}"
    )


def put_batch(batch, mesh: jax.sharding.Mesh):
  """Host arrays (B, ...) on this process's devices, split along the batch."""
  split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(AXIS))
  return jax.device_put(batch, split)


class ShardMap:
  """The step as `jit` of a `shard_map` over a mesh.

  Args:
    mesh: one axis, `data`.
    state: what the state will look like, arrays or shapes.
    optimizer: of the state.
    shard_state: spread prompts and optimizer state over the devices between steps, each array
      along its first axis that divides; otherwise every device holds all of them.
    **settings: of `step.gradients`.
  """

  def __init__(self, mesh, state, optimizer, *, shard_state: bool = False, **settings):
    spec, named = jax.sharding.PartitionSpec, jax.sharding.NamedSharding
    whole, split = spec(), spec(AXIS)
    self.whole, self.split = named(mesh, whole), named(mesh, split)
    # Without replication tracking the sums over devices are just the ones the step writes down.
    gradients = jax.shard_map(
      functools.partial(step.gradients, axis=AXIS, **settings),
      mesh=mesh,
      in_specs=(whole, whole, whole, split, whole),
      out_specs=whole,
      check_vma=False,
    )

    def train_step(state, params, text_CxE, batch, key):
      grads, terms = gradients(state, params, text_CxE, batch, key)
      return step.update(state, grads, terms, optimizer)

    def placed(x):
      axes = [i for i, size in enumerate(x.shape) if size and size % mesh.size == 0]
      return named(mesh, spec(*[None] * axes[0], AXIS)) if shard_state and axes else self.whole

    self.state_sharding = jax.tree.map(placed, state)
    self.step = jax.jit(
      train_step,
      in_shardings=(self.state_sharding, self.whole, self.whole, self.split, self.whole),
      out_shardings=(self.state_sharding, self.whole),
      donate_argnums=0,
      compiler_options=compiler_options(),
    )
    self._gather = jax.jit(lambda tree: tree, out_shardings=self.whole)

  def place_state(self, state):
    """The state, which every process has in full, on the devices."""
    return jax.tree.map(_put, state, self.state_sharding)

  def place_constant(self, tree):
    """What every device needs in full: tower, text, key."""
    return jax.tree.map(lambda x: _put(x, self.whole), tree)

  def place_batch(self, batch: dict) -> dict:
    """This process's rows of a batch as its part of the global one."""
    return jax.tree.map(
      functools.partial(jax.make_array_from_process_local_data, self.split), batch
    )

  def fetch_state(self, state):
    """The whole state as numpy, in every process."""
    return jax.device_get(self._gather(state))

  def fetch_metrics(self, metrics: dict) -> dict[str, float]:
    """Waits for the step that made them."""
    return {name: float(value) for name, value in metrics.items()}


def _put(x, sharding):
  if sharding.is_fully_addressable:
    return jax.device_put(x, sharding)
  if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
    return jax.random.wrap_key_data(_put(jax.random.key_data(x), sharding))
  # device_put would send the values around to compare them between processes.
  x = np.asarray(x)
  return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])


class Pmap:
  """The step as `pmap` over all devices; the state carries a leading device axis.

  Takes what `ShardMap` takes, except that the state is never spread.
  """

  def __init__(self, mesh, state, optimizer, *, shard_state: bool = False, **settings):
    del state
    if shard_state:
      raise InputError(
        'config.shard_state=True needs config.parallel="shard_map": under pmap every device '
        "holds the whole state"
      )
    self.local = [d for d in mesh.devices.flat if d.process_index == jax.process_index()]
    # Under the step's own axis name: for inputs placed under another one JAX would compile it
    # again when its outputs come back as inputs.
    self.split = jax.sharding.NamedSharding(
      data_mesh(self.local), jax.sharding.PartitionSpec(AXIS)
    )
    self.step = jax.pmap(
      functools.partial(step.train_step, optimizer=optimizer, axis=AXIS, **settings),
      axis_name=AXIS,
      devices=list(mesh.devices.flat),
      donate_argnums=0,
    )

  def place_state(self, state):
    return jax.tree.map(self._on_each, state)

  place_constant = place_state

  def _on_each(self, x):
    if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
      return jax.random.wrap_key_data(self._on_each(jax.random.key_data(x)))
    row = np.asarray(x)[None]
    shape = (len(self.local), *row.shape[1:])
    return jax.make_array_from_callback(shape, self.split, lambda _: row)

  def place_batch(self, batch: dict) -> dict:
    return jax.tree.map(lambda x: x.reshape(len(self.local), -1, *x.shape[1:]), batch)

  def fetch_state(self, state):
    # Every device has the same: the first one's is taken.
    return jax.tree.map(lambda x: np.asarray(x.addressable_data(0))[0], state)

  def fetch_metrics(self, metrics: dict) -> dict[str, float]:
    return {name: float(value) for name, value in self.fetch_state(metrics).items()}


MODES = {"shard_map": ShardMap, "pmap": Pmap}
