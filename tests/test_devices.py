"""How JAX is set up for a command: where compiled programs are kept."""

import os
import re
import subprocess
import sys
import types

import pytest

from rpn_jax import devices
from rpn_jax.base import paths
from rpn_jax.base.errors import InputError
from tests import ROOT

RUNTIME = """
import sys
from rpn_jax import devices
from rpn_jax.base import console
def action():
  with devices.runtime():
    import jax.numpy as jnp
    print(jnp.arange(2).dtype)
sys.exit(console.run_command(action))
"""
CODE = """
import jax
from rpn_jax import devices
devices.configure_compilation_cache()
print(jax.config.jax_compilation_cache_dir)
"""


def cache_dir(**environment) -> tuple[str, str]:
  """Where a new process keeps programs, and what it says."""
  kept = {k: os.environ[k] for k in ("PATH", "XLA_FLAGS") if k in os.environ}
  done = subprocess.run(
    [sys.executable, "-c", CODE], cwd=ROOT, env={**kept, **environment}, capture_output=True,
    text=True, check=True,
  )  # fmt: skip
  return done.stdout.strip(), done.stderr


def test_the_folder_names_compiler_and_processor(tmp_path):
  folder, said = cache_dir(HOME=str(tmp_path))
  assert re.fullmatch(rf"{tmp_path}/\.cache/rpn_jax/xla-[\d.]+-[0-9a-f]{{8}}", folder) and not said
  folder, _ = cache_dir(HOME=str(tmp_path), XDG_CACHE_HOME=str(tmp_path / "other"))
  assert folder.startswith(f"{tmp_path}/other/rpn_jax/xla-")


def test_a_folder_that_the_user_chose_is_kept(tmp_path):
  chosen = str(tmp_path / "mine")
  assert cache_dir(HOME=str(tmp_path), JAX_COMPILATION_CACHE_DIR=chosen) == (chosen, "")


@pytest.mark.usefixtures("store")
def test_a_folder_in_a_bucket_is_looked_at_first():
  config = devices.jax.config
  before = config.jax_compilation_cache_dir
  config.update("jax_compilation_cache_dir", "gs://nobucket/xla")
  try:
    with pytest.raises(InputError, match="gs://nobucket: expected a bucket, there is no such"):
      devices.configure_compilation_cache()
  finally:
    config.update("jax_compilation_cache_dir", before)


def test_without_a_place_nothing_is_kept_and_that_is_said_once(tmp_path):
  (tmp_path / ".cache").write_text("a file where the folder should be")
  folder, said = cache_dir(HOME=str(tmp_path))
  assert folder == "None" and said.count("nothing is cached for later runs") == 1


def test_a_container_without_a_home(monkeypatch):
  def no_home():
    raise RuntimeError("Could not determine home directory.")

  monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
  monkeypatch.setattr(paths.pathlib.Path, "home", no_home)
  paths.cache_dir.cache_clear()
  try:
    assert paths.cache_dir() is None
  finally:
    paths.cache_dir.cache_clear()


@pytest.mark.parametrize("flags", ["flags : sse avx", "Features : fp asimd"])
def test_other_processors_have_other_folders(flags, monkeypatch):
  own = devices.machine_id()
  monkeypatch.setattr(
    devices, "open", lambda *_, **__: _Lines(["processor : 0", flags]), raising=False
  )
  devices.machine_id.cache_clear()
  try:
    assert devices.machine_id() != own
  finally:
    devices.machine_id.cache_clear()


class _Lines(list):
  def __enter__(self):
    return self

  def __exit__(self, *_):
    pass


@pytest.mark.parametrize(
  ("settings", "status", "output", "error"),
  [
    ({"JAX_ENABLE_X64": "1"}, 0, "are turned off: rpn_jax computes in 32 bits\nint32", ""),
    ({"JAX_PLATFORMS": "cuda"}, 2, "", "error: JAX_PLATFORMS=cuda: expected devices that JAX can"),
    ({"JAX_PLATFORMS": "gpus"}, 2, "", "not in the list of known backends"),
  ],
)
def test_settings_of_jax_that_commands_cannot_use(tmp_path, settings, status, output, error):
  environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), **settings}
  command = [sys.executable, "-c", RUNTIME]
  done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
  assert done.returncode == status and output in done.stdout and error in done.stderr
  assert done.stderr.count("\n") <= 1


@pytest.mark.parametrize(
  "platform, capability, dtype",
  [
    ("tpu", None, "bfloat16"),
    ("gpu", "7.5", "float32"),
    ("gpu", "8.0", "bfloat16"),
    ("gpu", "9.0", "bfloat16"),
    ("gpu", "12.0", "bfloat16"),
    ("gpu", "gfx942", "float32"),
  ],
)
def test_the_fast_type_of_a_device(platform, capability, dtype):
  device = types.SimpleNamespace(platform=platform)
  if capability:
    device.compute_capability = capability
  assert devices.fast_type(device, 1000) == dtype


@pytest.mark.parametrize(
  "features, dtype",
  [
    (("avx2", "avx512f"), "float32"),
    (("avx512_bf16", "avx512f"), "bfloat16"),
    (("amx_bf16",), "bfloat16"),
    (("amx_tile", "bf16"), "float32"),  # the latter is ARM's, on which nothing was measured
  ],
)
def test_the_fast_type_of_a_cpu(features, dtype, monkeypatch):
  monkeypatch.setattr(devices, "processor_features", lambda: features)
  cpu = types.SimpleNamespace(platform="cpu")
  assert devices.fast_type(cpu, 100_000_000) == dtype
  assert devices.fast_type(cpu, 4_000_000) == "float32"  # too small for that to pay


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss has other units")
def test_memory_does_not_grow_from_step_to_step():
  """As it did where glibc kept a step's memory, in which the next one's did not fit."""
  code = """
import resource
import jax, jax.numpy as jnp
from rpn_jax import devices

devices.configure_cpu()
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
step = jax.jit(lambda x: jnp.sort(jnp.sin(x[:, None] * x), axis=0).sum(0))  # 64 MB on the way
x, kept, peaks = jnp.ones(4096), [], []
for _ in range(12):
  x = step(x)
  kept.append([bytearray(100 + 50 * i) for i in range(40)])
  x.block_until_ready()
  peaks.append(peak())
print(peaks[1], peaks[-1])
"""
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
  early, late = map(float, done.stdout.split())
  assert late < early + 32
