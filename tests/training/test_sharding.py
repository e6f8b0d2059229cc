"""One step on 1, 2 and 8 simulated devices, in both modes, and what it costs in collectives."""

import functools
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from tests import ROOT

# pmap, too: the quick test of test_processes.py. Without annotations: taught.
QUICK = ("shard_map_8", "sharded_8")
SLOW = (
  "shard_map_1", "shard_map_2", "pmap_1", "pmap_2", "pmap_8", "taught_sharded_8", "taught_pmap_2",
)  # fmt: skip
CASES = [*QUICK, *(pytest.param(case, marks=pytest.mark.slow) for case in SLOW)]


@pytest.fixture(scope="module")
def computed(tmp_path_factory):
  """A function that computes cases in one process with eight simulated devices, once."""
  return functools.cache(lambda cases: compute(tmp_path_factory.mktemp("parallel"), cases))


@pytest.fixture
def results(computed):
  """Of the quick cases."""
  return computed(QUICK)


def compute(out, cases):
  """What parallel_worker.py did, and the prompts after it."""
  environment = {
    **os.environ,
    "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8",
    "JAX_PLATFORMS": "cpu",
  }
  done = subprocess.run(
    [sys.executable, ROOT / "tests/training/parallel_worker.py", out, *cases],
    env=environment,
    cwd=ROOT,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr[-3000:]
  return json.loads((out / "facts.json").read_text()), dict(np.load(out / "prompts.npz"))


@pytest.mark.parametrize("case", CASES)
def test_the_update_of_one_device(computed, case):
  """After three steps, dropout, gate noise and devices without any mask included."""
  facts, prompts = computed(QUICK if case in QUICK else SLOW)
  plain = "taught_plain" if case.startswith("taught") else "plain"
  want = {k.split("|")[1]: v for k, v in prompts.items() if k.startswith(f"{plain}|")}
  got = {k.split("|")[1]: v for k, v in prompts.items() if k.startswith(f"{case}|")}
  assert want.keys() == got.keys() and len(want) > 10
  for name, value in want.items():
    # Adam divides by the root of the second moment: where gradients are close to zero it makes
    # float error visible. The rate is 2e-4, so 1e-6 is half a percent of one step.
    np.testing.assert_allclose(got[name], value, rtol=0, atol=1e-6, err_msg=name)
  np.testing.assert_allclose(facts[case]["loss"], facts[plain]["loss"], rtol=1e-5)
  np.testing.assert_allclose(facts[case]["grad_norm"], facts[plain]["grad_norm"], rtol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_a_nan_on_one_device_is_applied_on_none(computed, case):
  facts, _ = computed(QUICK if case in QUICK else SLOW)
  first, second, good = facts["poisoned"][case]
  assert first["unchanged"] and second["unchanged"] and not good["unchanged"]
  assert first["finite"] and second["finite"] and good["finite"]
  assert [x["skipped"] for x in (first, second, good)] == [[1, 1], [2, 2], [2, 0]]
  assert [x["step"] for x in (first, second, good)] == [4, 5, 6]


@pytest.mark.parametrize(("run", "alone"), [(0, "plain"), (1, "other_key"), (2, "plain")])
def test_runs_side_by_side_train_as_alone(results, run, alone):
  facts, prompts = results
  for name, value in prompts.items():
    if name.startswith(f"{alone}|"):
      got = prompts[name.replace(alone, f"side_{run}")]
      np.testing.assert_allclose(got, value, rtol=0, atol=1e-6, err_msg=name)
  np.testing.assert_allclose(facts[f"side_{run}"]["loss"], facts[alone]["loss"], rtol=1e-5)


def test_runs_side_by_side_have_their_own_rates_and_exchange_nothing(results):
  facts, prompts = results
  moved = {
    run: sum(np.abs(value - prompts[name.replace(run, "initial")]).sum()
             for name, value in prompts.items() if name.startswith(f"{run}|"))
    for run in ("side_2", "side_3")
  }  # fmt: skip
  assert moved["side_3"] == pytest.approx(moved["side_2"] / 10, rel=0.1)
  assert facts["side_by_side"] == []


def test_the_noise_is_really_there(results):
  facts, _ = results
  assert abs(facts["plain"]["loss"][0] - facts["other_key"]["loss"][0]) > 1e-4


def test_the_step_is_compiled_once(results):
  facts, _ = results
  assert facts["compiled_later"] == [0] * len(QUICK)


def test_one_all_reduce_of_the_prompts_and_nothing_of_the_tower(results):
  facts, _ = results
  collectives = facts["collectives"]
  assert {kind for kind, _ in collectives} == {"all-reduce"}
  large = [size for _, size in collectives if size > 16]
  # The gradients of all prompts and the two loss sums in one vector.
  assert large == [facts["prompts"] + 2]
  assert facts["prompts"] < facts["tower"]


def test_spread_state_is_spread(results):
  facts, _ = results
  assert facts["sharded_bytes"] < 0.4 * facts["replicated_bytes"]
