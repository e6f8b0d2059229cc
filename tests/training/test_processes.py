"""Runs of several processes on the loopback device, through main.py itself."""

import contextlib
import ctypes
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time

import flax
import jax
import numpy as np
import pytest

from data_pipelines import datasets
from rpn_jax import config, devices
from rpn_jax.base.errors import InputError
from rpn_jax.tasks import train
from rpn_jax.training.bucket_checkpoints import MARK
from tests import ROOT, tiny
from tests.tasks.test_train import make_config
from tests.tools import bucket_server

# Of the quick test; the slow one is longer, so that a process can die in the middle.
STEPS = 8

# A process that is alone in waiting may need its compilation on top of the heartbeat.
BOUND = 4 * devices.HEARTBEAT_SECONDS


@pytest.fixture(scope="module")
def home(tmp_path_factory):
  path = tmp_path_factory.mktemp("home")
  tiny.save(path / "clip.safetensors")
  return path


def free_port() -> int:
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    return free.getsockname()[1]


# main.py without figures, which are a third of a short run's time.
UNDRAWN = """
import runpy
from rpn_jax.tasks import train
train.draw_figures = train.plot_curves = lambda *_: None
runpy.run_path("main.py", run_name="__main__")
"""


@contextlib.contextmanager
def started(home, workdir, processes: int, devices: int, steps: int, *options):
  """main.py in so many processes of so many simulated devices."""
  environment = {
    **os.environ,
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}",
  }
  port, running = free_port(), []
  for i in range(processes):
    place = [f"--distributed=127.0.0.1:{port},{processes},{i}"] if processes > 1 else []
    command = [
      sys.executable, "-c", UNDRAWN, "--config=configs/shapes.py:runlocal", f"--workdir={workdir}",
      f"--config.clip={home}/clip.safetensors", f"--config.data.data_dir={home}/data",
      f"--config.steps={steps}", "--config.log_every=1", *tiny.FLAGS, *options, *place,
    ]  # fmt: skip
    with open(home / f"{workdir.name}_{i}.log", "w") as log:  # the process keeps its own
      running.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log))
  try:
    yield running
  finally:
    for one in running:
      one.kill()
      one.wait()


def said(home, workdir, i) -> str:
  return (home / f"{workdir.name}_{i}.log").read_text()


def run(home, workdir, processes, devices, steps, *options):
  with started(home, workdir, processes, devices, steps, *options) as running:
    for i, one in enumerate(running):
      assert one.wait(timeout=300) == 0, said(home, workdir, i)[-3000:]
  return workdir


def results(workdir):
  """Losses by step, last scores, and the trained parameters of the newest checkpoint."""
  import orbax.checkpoint as ocp

  lines = [json.loads(x) for x in (workdir / "metrics.jsonl").read_text().splitlines()]
  losses = {x["step"]: x["train/loss"] for x in lines if "train/loss" in x}
  scores = json.loads((workdir / "metrics.json").read_text())["last"]
  with ocp.StandardCheckpointer() as reader:
    tree = reader.restore(workdir / "checkpoints" / str(scores["step"]) / "prompts")
  return losses, scores, flax.traverse_util.flatten_dict(tree, sep="/")


def compare(got, want, steps):
  losses, scores, prompts = got
  assert list(losses) == list(want[0]) == list(range(1, steps + 1))
  np.testing.assert_allclose(list(losses.values()), list(want[0].values()), rtol=1e-5)
  assert prompts.keys() == want[2].keys() and len(prompts) > 10
  for name, value in want[2].items():
    # Rates reach 2e-3 here; Adam makes float error visible where gradients are close to zero.
    np.testing.assert_allclose(prompts[name], value, rtol=0, atol=1e-4, err_msg=name)
  for name, value in want[1].items():
    if isinstance(value, float):
      assert scores[name] == pytest.approx(value, abs=5e-3), name


def test_two_processes_of_two_devices_are_one_alone(home, monkeypatch):
  """By pmap; by shard_map in the test below. One process of many devices: test_sharding.py."""
  # A tuner with noise that is quickly compiled.
  changes = {"steps": STEPS, "eval_every": STEPS, "log_every": 1, "data.eval_images": 2}
  changes["model.tuner"] = "vpt"
  for name in ("draw_figures", "plot_curves"):
    monkeypatch.setattr(train, name, lambda *_: None)
  alone = make_config(home, **changes)
  train.train(alone, home / "alone", datasets.load(alone))
  options = (f"--config.{name}={value}" for name, value in changes.items())
  two = run(home, home / "two", 2, 2, STEPS, *options, "--config.parallel=pmap")
  compare(results(two), results(home / "alone"), STEPS)
  # The first process alone speaks and writes.
  assert "4 x cpu in 2 processes" in said(home, two, 0) and "Scores in %" in said(home, two, 0)
  assert not re.search(r"trained|step|image|%", said(home, two, 1))
  assert len((two / "metrics.jsonl").read_text().splitlines()) == STEPS + 1


@pytest.mark.slow
def test_a_dead_process_ends_the_others_and_the_run_goes_on(home):
  twice, spread = "--config.eval_every=10", "--config.shard_state=True"
  alone = run(home, home / "whole", 1, 1, 20, twice)
  workdir = home / "dead"
  with started(home, workdir, 2, 2, 20, twice, spread) as (first, second):
    until = time.time() + 300
    while not (workdir / "checkpoints" / "10").is_dir():
      assert first.poll() is None and time.time() < until, said(home, workdir, 0)[-3000:]
      time.sleep(0.01)
    second.kill()
    died = time.time()
    code = first.wait(timeout=BOUND)
  log = said(home, workdir, 0)
  assert code != 0 and time.time() - died < BOUND
  assert "lost another one" in log or "another task died" in log, log[-3000:]
  compare(results(run(home, workdir, 2, 2, 20, twice, spread)), results(alone), 20)
  assert "resuming at step 10 of 20" in said(home, workdir, 0)


IN_A_BUCKET = """
import sys
from rpn_jax import devices
from rpn_jax.base import paths
from rpn_jax.training import run
from rpn_jax.training.bucket_checkpoints import BucketCheckpoints
from tests.training.states import IDENTITY, LIKE, same, state_at

workdir = paths.expand(sys.argv[1])
with devices.runtime(sys.argv[2].split(",")), run.held_workdir(workdir):
  checkpoints = BucketCheckpoints(workdir, IDENTITY)
  assert checkpoints.resume(LIKE) is None
  for step in (10, 20):
    said = checkpoints.save(state_at(step), None), checkpoints.steps()
    print("after", step, *said, file=sys.stderr)
  state, _ = checkpoints.resume(LIKE)
  same(state, 10)
"""


@pytest.mark.slow
def test_two_processes_save_one_checkpoint_to_a_bucket(bucket, store):
  """The second one neither writes nor goes on before the mark is there; a failure is of both."""

  def fault(method, path):
    if "/upload/" in path and f"/10/{MARK}" in path:
      time.sleep(1)  # who does not wait finds no checkpoint
    return 403 if "/upload/" in path and "/20/" in path else None

  store.fault = fault
  place = f"127.0.0.1:{free_port()},2"
  # The second one's door to the same bucket, through which nothing may be written.
  with bucket_server.Server() as door, contextlib.ExitStack() as stack:
    door.store.buckets, door.store.writable = store.buckets, False
    store.requests.clear()
    running = []
    for i, variables in enumerate(({}, bucket_server.environment(door.port))):
      command = [sys.executable, "-c", IN_A_BUCKET, str(bucket), f"{place},{i}"]
      environment = {**os.environ, "JAX_PLATFORMS": "cpu", **variables}
      one = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
      running.append(stack.enter_context(one))
      stack.callback(one.kill)
    said = [one.communicate(timeout=300)[1] for one in running]
    assert [one.returncode for one in running] == [0, 0], said
  for each in said:
    assert "after 10 True [10]\nafter 20 False [10]" in each, said
  assert {method for method, _ in door.store.requests} == {"GET"}
  sent = [path for _, path in store.requests if "/upload/" in path and "/10/" in path]
  assert len(sent) == len(set(sent)) > 10


@pytest.mark.parametrize("place", [("host", "2", "0"), ("host:1", "2", "2"), ("host:1", "2")])
def test_a_place_that_is_none(place):
  with pytest.raises(InputError, match=r"expected HOST:PORT,PROCESSES,PROCESS"):
    devices.initialize(place)


def test_clusters_are_found_by_their_variables(monkeypatch):
  assert not devices._in_cluster({})
  assert not devices._in_cluster({"SLURM_NTASKS": "1"})
  assert devices._in_cluster({"SLURM_NTASKS": "8"})
  assert devices._in_cluster({"OMPI_COMM_WORLD_SIZE": "2"})
  found = []
  monkeypatch.setattr(devices.jax.distributed, "initialize", lambda **given: found.append(given))
  monkeypatch.setenv("SLURM_NTASKS", "2")
  devices.initialize()
  assert found and "coordinator_address" not in found[0]


@pytest.fixture
def joined(monkeypatch):
  """What `jax.distributed.initialize` was called with."""
  found = []
  monkeypatch.setattr(devices.jax.distributed, "initialize", lambda **given: found.append(given))
  return found


def test_a_command_for_one_machine_joins_none(joined, monkeypatch):
  monkeypatch.setenv("SLURM_NTASKS", "2")
  devices.initialize(devices.ALONE)
  for given in ({}, {"coordinator": (), "alone": True}):  # as `rpn segment`, and --mode=predict
    with devices.runtime(**given):
      pass
  assert not joined


ONE_A_NODE, EIGHT_A_NODE = "1(x2)", "8(x2)"


@pytest.mark.parametrize(
  "variables, own",
  [
    ({"SLURM_STEP_TASKS_PER_NODE": ONE_A_NODE}, True),
    ({"SLURM_STEP_TASKS_PER_NODE": "1"}, True),
    ({"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, True),
    ({"SLURM_STEP_TASKS_PER_NODE": EIGHT_A_NODE, "CUDA_VISIBLE_DEVICES": "3"}, True),
    ({"SLURM_STEP_TASKS_PER_NODE": EIGHT_A_NODE}, False),
    ({"SLURM_STEP_TASKS_PER_NODE": EIGHT_A_NODE, "CUDA_VISIBLE_DEVICES": "0,1"}, False),
    ({"SLURM_STEP_TASKS_PER_NODE": "11(x2)"}, False),
    ({"OMPI_COMM_WORLD_LOCAL_SIZE": "4"}, False),
    ({"SLURM_STEP_TASKS_PER_NODE": ONE_A_NODE, "JAX_LOCAL_DEVICE_IDS": "2,3"}, False),
  ],
)
def test_a_process_that_is_alone_on_its_node_has_all_of_its_gpus(
  joined, monkeypatch, variables, own
):
  """Of which JAX would take the first."""
  for name, value in {"SLURM_NTASKS": "2", **variables}.items():
    monkeypatch.setenv(name, value)
  devices.initialize()
  assert [found.get("local_device_ids") for found in joined] == [() if own else None]


@pytest.mark.parametrize("chosen", [None, "somewhere"])
def test_several_gpu_processes_share_a_chosen_cache_or_none(monkeypatch, tmp_path, chosen):
  names = ("jax_enable_compilation_cache", "jax_compilation_cache_dir")
  before = {name: jax.config.values[name] for name in names}
  folder = chosen and str(tmp_path / chosen)
  try:
    jax.config.update("jax_compilation_cache_dir", folder)
    for name, value in (("process_count", 2), ("default_backend", "gpu")):
      monkeypatch.setattr(devices.jax, name, lambda value=value: value)
    monkeypatch.setattr(devices.multihost_utils, "sync_global_devices", lambda name: None)
    with devices.runtime():
      assert jax.config.values["jax_enable_compilation_cache"] == bool(chosen)
  finally:
    for name, value in before.items():
      jax.config.update(name, value)


def test_sigterm_ends_a_process_that_is_alone(monkeypatch):
  """Though JAX, which listens for it on behalf of several, has it noted and nothing done."""
  libc = ctypes.CDLL(None)
  libc.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
  ignored = ctypes.c_void_p(1)
  monkeypatch.setattr(
    devices.jax.distributed, "initialize", lambda **_: libc.signal(signal.SIGTERM, ignored)
  )
  monkeypatch.setattr(devices, "_has_tpus", lambda: True)
  monkeypatch.setenv("JAX_COORDINATOR_PORT", "1234")
  received: list[int] = []
  before = signal.signal(signal.SIGTERM, lambda number, _: received.append(number))
  try:
    with devices.runtime(()):
      os.kill(os.getpid(), signal.SIGTERM)
  finally:
    signal.signal(signal.SIGTERM, before)
  assert received == [signal.SIGTERM]


def test_on_a_tpu_the_port_is_one_that_is_open(joined, monkeypatch):
  monkeypatch.setattr(devices, "_has_tpus", lambda: True)
  monkeypatch.setenv("JAX_COORDINATOR_PORT", "1234")
  devices.initialize()
  assert joined and os.environ["JAX_COORDINATOR_PORT"] == "1234"
  monkeypatch.delenv("JAX_COORDINATOR_PORT")
  devices.initialize()
  assert os.environ.pop("JAX_COORDINATOR_PORT") == "8476"


def test_jax_that_is_in_use_already(monkeypatch):
  """As in a notebook on a TPU: JAX itself refuses, rightly only where there are other hosts."""
  devices.jax.devices()
  monkeypatch.setattr(devices, "_has_tpus", lambda: True)
  monkeypatch.setenv("JAX_COORDINATOR_PORT", "1234")
  devices.initialize()
  monkeypatch.setattr(devices.jax, "process_count", lambda: 2)
  with pytest.raises(InputError, match=r"did not find each other \(.* before any JAX"):
    devices.initialize()


def test_who_waits_says_for_what(monkeypatch, capsys):
  monkeypatch.setattr(devices, "SILENT_SECONDS", 0.01)
  with devices.say_if_late(devices._waiting_for(("host:1", "2", "1"))):
    time.sleep(0.2)
  said = capsys.readouterr().err
  assert said.count("\n") == 1 and "; process 0 is expected at host:1: start the" in said
  monkeypatch.setattr(devices, "SILENT_SECONDS", 60)
  with devices.say_if_late("late"):
    pass
  assert not capsys.readouterr().err


def test_an_unknown_precision():
  settings = config.defaults()
  settings.matmul_precision = "bfloat17"
  with pytest.raises(InputError, match=r"config\.matmul_precision='bfloat17' is not known"):
    config.check(settings)
