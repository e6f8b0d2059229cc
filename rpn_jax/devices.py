"""Devices and processes: how JAX is set up for a command."""

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

from rpn_jax.base import console
from rpn_jax.base.errors import InputError

AXIS = "data"
# A process that is silent for so long is taken for dead, and the others end.
HEARTBEAT_SECONDS = 30
PRECISIONS = ("default", "high", "highest")


def configure_cpu() -> None:
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
def runtime(place: Sequence[str] = (), matmul_precision: str = "default"):
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
  configure_cpu()
  jax.config.update("jax_default_matmul_precision", matmul_precision)
  # Programs compiled by an earlier run are reused.
  jax.config.update("jax_compilation_cache_dir", str(pathlib.Path.home() / ".cache/rpn_jax/xla"))
  # Of a short command, small programs are most of the time too.
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.05)
  initialize(place)
  if jax.process_index():
    console.silence()  # the first process speaks for all
  with one_line_runtime_errors():
    yield


@contextlib.contextmanager
def one_line_runtime_errors():
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


def put_batch(batch, mesh: jax.sharding.Mesh):
  """Host arrays (B, ...) on this process's devices, split along the batch."""
  split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(AXIS))
  return jax.device_put(batch, split)
