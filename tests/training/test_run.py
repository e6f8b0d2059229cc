"""A workdir belongs to one run at a time, also one that an earlier version wrote."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

from data_pipelines import datasets
from rpn_jax.base import paths
from rpn_jax.base.errors import InputError
from rpn_jax.inference.segmenter import Segmenter
from rpn_jax.tasks import evaluate, train
from rpn_jax.training import run
from rpn_jax.training.metric_log import read_history
from tests import FIXTURES, ROOT

HOLD = """
import pathlib, sys, time
from rpn_jax.training import run
with run.held_workdir(pathlib.Path(sys.argv[1])):
  print("held", flush=True)
  time.sleep(60)
"""


def test_the_second_run_is_refused_and_a_dead_one_forgotten(tmp_path, capsys):
  command = [sys.executable, "-c", HOLD, tmp_path / "run"]
  with subprocess.Popen(command, stdout=subprocess.PIPE) as other:
    other.stdout.readline()
    with (
      pytest.raises(InputError, match=rf"in use by process {other.pid} on \S+: wait"),
      run.held_workdir(tmp_path / "run"),
    ):
      pass
    other.kill()
  with run.held_workdir(tmp_path / "run"):
    assert f"left by process {other.pid} on" in capsys.readouterr().out
    assert f"process {os.getpid()} " in (tmp_path / "run/.lock").read_text()
  with run.held_workdir(tmp_path / "run"):
    pass
  assert not capsys.readouterr().out  # it was given back


def test_a_workdir_that_cannot_be(tmp_path):
  (tmp_path / "run/.lock").mkdir(parents=True)
  with (
    pytest.raises(InputError, match="expected a writable workdir"),
    run.held_workdir(tmp_path / "run"),
  ):
    pass


def test_a_file_system_without_locks(tmp_path, monkeypatch, capsys):
  def refuse(*_):
    raise OSError(95, "Operation not supported")

  monkeypatch.setattr(paths.fcntl, "flock", refuse)
  with run.held_workdir(tmp_path):
    assert "cannot be locked (Operation not supported)" in capsys.readouterr().out


# Written by version 0.2.0: checkpoints/4 of a run of eight steps, and the metrics of its end.
OLD = FIXTURES / "run_0_2_0"


@pytest.fixture
def old(tmp_path, monkeypatch):
  """A copy of that workdir, and its config; the path of its weights is relative to the clone."""
  monkeypatch.chdir(ROOT)
  workdir = tmp_path / "old"
  shutil.copytree(OLD / "workdir", workdir)
  config = run.read_config(workdir)
  config.data.data_dir = str(tmp_path / "data")
  return config.lock(), workdir


def test_a_run_of_0_2_0_is_resumed(old, capsys):
  """As it went on then: losses, scores and rates of step 8, and the metrics before it."""
  config, workdir = old
  result = train.train(config, workdir, datasets.load(config))
  assert "resuming at step 4 of 8" in capsys.readouterr().out
  got, want = (read_history(path) for path in (workdir / "metrics.jsonl", OLD / "expected.jsonl"))
  assert got.keys() == want.keys()
  for name, points in want.items():
    assert [step for step, _ in got[name]] == [step for step, _ in points]
    np.testing.assert_allclose(
      [v for _, v in got[name]], [v for _, v in points], rtol=2e-3, atol=1e-6, err_msg=name
    )
  assert result["last"]["step"] == 8


def test_a_run_of_0_2_0_is_evaluated_and_loaded(old):
  config, workdir = old
  scores = evaluate.evaluate_run(config, workdir, datasets.load_evaluations(config))
  last = scores["shapes"]["last"]
  then = {
    k.removeprefix("eval/"): v
    for line in (workdir / "metrics.jsonl").read_text().splitlines()
    for k, v in json.loads(line).items()
    if k.startswith("eval/")
  }
  assert last["step"] == 4
  for name, value in then.items():
    np.testing.assert_allclose(last[name], value, rtol=1e-3, atol=1e-6, err_msg=name)
  model = Segmenter.load(workdir)
  assert model.step == 4 and model(np.zeros((40, 40, 3), np.uint8), "sand").labels.shape == (40, 40)


def test_a_run_of_0_2_0_with_other_settings_is_refused(old):
  config, workdir = old
  with config.unlocked():
    config.seed = 7
  message = r"created with a different config \(workdir -> requested\): config\.seed: 0 -> 7"
  with pytest.raises(InputError, match=message):
    train.train(config, workdir, datasets.load(config))
