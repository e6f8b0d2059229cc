"""Devices and processes: how a command sets up JAX."""

import contextlib
import ctypes
import functools
import glob
import hashlib
import importlib.metadata
import importlib.util
import itertools
import os
import platform
import re
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from rpn_jax.base import console
from rpn_jax.base.buckets import is_bucket
from rpn_jax.base.errors import InputError
from rpn_jax.base.paths import cache_dir, expand

AXIS = "data"
# A process without a heartbeat for this long is considered dead, and the others exit.
HEARTBEAT_SECONDS = 30
# After this long a process says what it waits for.
SILENT_SECONDS = 30
# Cloud TPU VMs let their workers connect to this port; the default of JAX since 0.8.1 is 8482.
TPU_PORT = 8476
# No copy of a data set takes longer.
MAX_WAIT_SECONDS = 86400
# How Linux names the units of x86 processors that multiply bfloat16.
BFLOAT16_UNITS = {"avx512_bf16", "amx_bf16"}
# CLIPs of fewer parameters than this are too small for these units to pay.
LARGE = 10_000_000
# In place of a coordinator: join no other process.
ALONE = ("none",)


def configure_cpu() -> None:
  """Cuts the memory that JAX uses on CPUs; call it before JAX initializes its devices.

  By default XLA schedules operations on CPUs as early as possible and keeps their results, which
  was measured to be no faster (docs/benchmarks.md).
  """
  flag, given = "--xla_cpu_enable_concurrency_optimized_scheduler", os.environ.get("XLA_FLAGS", "")
  if flag not in given:
    os.environ["XLA_FLAGS"] = f"{given} {flag}=false".strip()
  _trim_malloc()


@functools.cache
def _trim_malloc() -> None:
  """Keeps glibc from holding on to freed memory (docs/benchmarks.md).

  That would be 0.2 GB after compiling a step, and the peak of every thread, in eight arenas per
  core.
  """
  arena_max = -8
  libc = ctypes.CDLL(None) if sys.platform == "linux" else None
  if libc is None or not hasattr(libc, "mallopt"):
    return
  libc.mallopt(arena_max, max(1, (os.cpu_count() or 1) // 2))

  def trim(event: str, duration_secs: float, **_: str | int) -> None:
    if duration_secs > 1 and event == "/jax/core/compile/backend_compile_duration":
      libc.malloc_trim(0)

  jax.monitoring.register_event_duration_secs_listener(trim)


def configure_compilation_cache() -> None:
  """Turns on JAX's persistent compilation cache, in a folder of its own unless the user chose one.

  Programs for CPUs are specific to processor and compiler: with a home folder shared by several
  machines, a common cache would load programs that crash.
  """
  chosen = jax.config.values["jax_compilation_cache_dir"]
  if chosen is None and (folder := cache_dir()):
    jax.config.update("jax_compilation_cache_dir", str(folder / f"xla-{machine_id()}"))
  elif chosen and is_bucket(chosen):
    expand(chosen)  # what is wrong with it is said now, in a line, and not with every program
  # Small programs, too: in short commands they add up to most of the time.
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.05)


def processor_features() -> tuple[str, ...]:
  """What the processor has, such as "avx2", sorted; its name on other systems than Linux."""
  features = platform.processor()
  with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
    features = next((line for line in file if line.startswith(("flags", "Features"))), features)
  return tuple(sorted(features.split()))


@functools.cache
def machine_id() -> str:
  """The version of jaxlib and a hash of the processor's features, such as "0.10.2-1f3a5b7c"."""
  words = " ".join([platform.system(), platform.machine(), *processor_features()])
  version = importlib.metadata.version("jaxlib")
  return f"{version}-{hashlib.sha256(words.encode()).hexdigest()[:8]}"


def compiler_options(mesh: jax.sharding.Mesh) -> dict[str, str] | None:
  """Compiler options of the training step for the devices of a mesh.

  On CPUs XLA removes optimization barriers before scheduling by default. It then recomputes early
  what `remat` should recompute late, and accumulates late what should be accumulated at once
  (docs/benchmarks.md). Without the pass below, barriers are kept until after scheduling.
  """
  if platform_of(mesh) != "cpu":
    return None
  return {"xla_disable_hlo_passes": "cse_barrier_expander"}


def platform_of(mesh: jax.sharding.Mesh) -> str:
  """The kind of devices in a mesh: "cpu", "gpu" or "tpu"."""
  return mesh.devices.flat[0].platform


def fast_type(device: jax.Device, parameters: int) -> str:
  """The compute type for inference on a device: "bfloat16" where its products are faster.

  They are on TPUs, on NVIDIA's GPUs from Ampere on (compute capability 8.0), and on CPUs that have
  units for them, where a tiny network gains nothing and takes longer to compile
  (docs/benchmarks.md).

  Args:
    device: where it runs.
    parameters: number of parameters of the whole CLIP.
  """
  if device.platform == "cpu":
    units = BFLOAT16_UNITS & set(processor_features())
    return "bfloat16" if units and parameters >= LARGE else "float32"
  if device.platform == "tpu":
    return "bfloat16"
  capability = str(getattr(device, "compute_capability", ""))
  ampere = device.platform == "gpu" and re.match(r"[89]\.|\d\d", capability)
  return "bfloat16" if ampere else "float32"


@contextlib.contextmanager
def runtime(
  coordinator: Sequence[str] = ALONE, matmul_precision: str = "default", alone: bool = False
) -> Iterator[None]:
  """The context a command runs in: processes connected, JAX set up, runtime errors in one line.

  Args:
    coordinator: see `initialize`.
    matmul_precision: precision of float32 matrix products: default, high or highest.
    alone: join others only where a coordinator is given.

  Raises:
    InputError: the processes do not find each other, or JAX finds no device of the kind that
      JAX_PLATFORMS asks for; later, when memory runs out.
  """
  if jax.config.values["jax_enable_x64"]:
    print("64-bit types are on (JAX_ENABLE_X64) and are turned off: rpn_jax computes in 32 bits")
    jax.config.update("jax_enable_x64", False)
  configure_cpu()
  jax.config.update("jax_default_matmul_precision", matmul_precision)
  own_cache = jax.config.values["jax_compilation_cache_dir"] is None
  configure_compilation_cache()
  if alone and not coordinator:
    coordinator = ALONE
  with say_if_late(_waiting_for(coordinator)):
    initialize(coordinator)
    check_platform()
  if tuple(coordinator) != ALONE and jax.process_count() == 1:
    _hear_sigterm()
  if own_cache and jax.process_count() > 1 and jax.default_backend() == "gpu":
    # Only the first process writes it, and XLA divides the choice of kernels among all: those
    # without the first one's folder would wait for its part, which it does not choose again.
    jax.config.update("jax_enable_compilation_cache", False)
  if jax.process_index():
    console.silence()  # the first process speaks for all
  with one_line_runtime_errors():
    if jax.process_count() > 1:
      # While all are here: CPUs have half a minute to meet for the first time, and compiling, which
      # only the first process finds done in the cache, may set them further apart than that.
      with say_if_late(_waiting_for(coordinator)):
        multihost_utils.sync_global_devices("connected")
    yield


@contextlib.contextmanager
def one_line_runtime_errors() -> Iterator[None]:
  """Reports runtime errors in one line when memory runs out or another process is lost.

  In the second case this process exits at once, since any cleanup would wait for the lost one. If
  no error is raised, JAX ends the process when heartbeats are missing.

  Raises:
    InputError: memory has run out.
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
      "start all of them again; the run resumes from its last checkpoint",
      file=sys.stderr,
      flush=True,
    )
    os._exit(2)


def initialize(coordinator: Sequence[str] = ()) -> None:
  """Connects the processes of a run; call it before anything else uses JAX.

  Args:
    coordinator: (address of process 0 as host:port, number of processes, index of this one).
      `ALONE` joins none. If it is empty, Slurm, Open MPI and Cloud TPU are detected; otherwise
      there is a single process. Where JAX is in use already, as in a notebook, nothing is joined.

  Raises:
    InputError: malformed coordinator, or processes that do not find each other.
  """
  arguments: dict[str, Any] = {}
  if tuple(coordinator) == ALONE or jax.distributed.is_initialized():
    return
  if coordinator:
    try:
      address, count, index = coordinator
      arguments = {"num_processes": int(count), "process_id": int(index)}
      if ":" not in address or not 0 <= int(index) < int(count):
        raise ValueError
      arguments["coordinator_address"] = address
    except ValueError:
      raise InputError(
        "--distributed: expected HOST:PORT,PROCESSES,PROCESS, the address of process 0, the number "
        "of processes and the index of this one (from 0), or none, got "
        f"{','.join(coordinator)}"
      ) from None
  elif not _in_cluster(os.environ):
    return
  elif _has_tpus():
    os.environ.setdefault("JAX_COORDINATOR_PORT", str(TPU_PORT))
  if _has_all_devices(os.environ):
    arguments["local_device_ids"] = ()  # else JAX takes one, by the process's number on its node
  try:
    jax.distributed.initialize(
      **arguments,
      heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
      shutdown_timeout_seconds=HEARTBEAT_SECONDS,
    )
  except (RuntimeError, ValueError) as error:
    if not coordinator and "before" in str(error) and jax.process_count() == 1:
      return  # this host's devices are in use, and there are no others
    raise InputError(
      f"the processes of this run did not find each other ({' '.join(str(error).split())}): start "
      "all of them, with the same address of process 0, or one alone with --distributed=none"
    ) from error


def _hear_sigterm() -> None:
  """Undoes JAX's handler, which notes a SIGTERM for several processes; none would end for it."""
  if threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM) or signal.SIG_DFL)


def check_platform() -> None:
  """Lets JAX look for its devices.

  Raises:
    InputError: there is none of the kind that was asked for.
  """
  try:
    jax.devices()
  except (RuntimeError, AssertionError) as error:  # the latter where the plugin is not installed
    asked = jax.config.values["jax_platforms"]
    reason = " ".join(str(error).split()).removesuffix(".") or "its plugin is not installed"
    raise InputError(
      f"JAX_PLATFORMS={asked}: expected devices that JAX can use here, got none ({reason}): unset "
      'it to take what there is, or install JAX for them, as pip install "jax[cuda13]"'
    ) from error


def _in_cluster(environment: Mapping[str, str]) -> bool:
  """Whether `jax.distributed.initialize` can detect its arguments."""
  for variable in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE"):
    if int(environment.get(variable, 1)) > 1:
      return True
  return _has_tpus()


def _has_all_devices(environment: Mapping[str, str]) -> bool:
  """Whether all devices that a process sees are its own.

  It is the only one on its node, or Slurm has shown it one GPU; a choice for JAX is left alone.
  """
  if "JAX_LOCAL_DEVICE_IDS" in environment:
    return False
  here = environment.get("OMPI_COMM_WORLD_LOCAL_SIZE") or environment.get(
    "SLURM_STEP_TASKS_PER_NODE", ""
  )
  gpus = environment.get("CUDA_VISIBLE_DEVICES", "").split(",")
  return bool(re.fullmatch(r"1(\(x\d+\))?", here)) or bool(here and gpus[0] and len(gpus) == 1)


def _has_tpus() -> bool:
  accelerators = glob.glob("/dev/accel*") + glob.glob("/dev/vfio/[0-9]*")
  return bool(accelerators) and importlib.util.find_spec("libtpu") is not None


def _waiting_for(coordinator: Sequence[str]) -> str:
  """What a process waits for that neither starts nor ends."""
  if tuple(coordinator) == ALONE:
    return (
      "waiting for the devices: another process may use them; on one worker of a TPU pod they wait "
      "for all workers (docs/tpu.md)"
    )
  others = f"; process 0 is expected at {coordinator[0]}" if coordinator else ""
  return (
    f"waiting for the other processes of this run{others}: start the same command on all machines, "
    "as with gcloud's --worker=all; --distributed=none runs on this machine alone"
  )


@contextlib.contextmanager
def say_if_late(text: str) -> Iterator[None]:
  """Prints a line if the block takes longer than `SILENT_SECONDS`."""
  timer = threading.Timer(SILENT_SECONDS, print, [text], {"file": sys.stderr, "flush": True})
  timer.daemon = True
  timer.start()
  try:
    yield
  finally:
    timer.cancel()


_meetings = itertools.count()


def wait_for_all(what: str, seconds: int = MAX_WAIT_SECONDS) -> None:
  """Waits until every process is here, where one may take longer than a collective waits on CPUs.

  Args:
    what: what they wait for.
    seconds: how long to wait at most.
  """
  if jax.process_count() == 1:
    return
  import orbax.checkpoint as ocp

  with say_if_late(f"waiting for the other processes: {what}"):
    # With processes it is the coordination service's, without any device.
    everyone = set(range(jax.process_count()))
    name = f"{what} ({next(_meetings)})"  # never the same twice
    ocp.multihost.sync_global_processes(name, timeout=seconds, processes=everyone)


def process() -> tuple[int, int]:
  """The index of this process, and how many there are."""
  return jax.process_index(), jax.process_count()


def devices_text() -> str:
  """The devices of all processes, as "cpu" or "8 x NVIDIA H100"."""
  count, kind = jax.device_count(), jax.devices()[0].device_kind
  return kind if count == 1 else f"{count} x {kind}"


def data_mesh(devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
  """Devices along one axis, `data`; by default those of this process."""
  return jax.sharding.Mesh(np.array(devices or jax.local_devices()), (AXIS,))


def global_mesh() -> jax.sharding.Mesh:
  """The devices of all processes, ordered by process.

  In this order, the part of the global batch that a process reads is the part on its devices.
  """
  return data_mesh(sorted(jax.devices(), key=lambda d: (d.process_index, d.id)))


def put_batch(batch: Any, mesh: jax.sharding.Mesh) -> Any:
  """Puts host arrays (B, ...) on this process's devices, split along the batch."""
  split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(AXIS))
  return jax.device_put(batch, split)
