"""One run per workdir, and what a dead one leaves."""

import os
import subprocess
import sys

import pytest

from rpn_jax.base import paths
from rpn_jax.base.errors import InputError
from rpn_jax.training import run

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
    pytest.raises(InputError, match="expected a workdir to write to"),
    run.held_workdir(tmp_path / "run"),
  ):
    pass


def test_a_file_system_without_locks(tmp_path, monkeypatch, capsys):
  def refuse(*_):
    raise OSError(95, "Operation not supported")

  monkeypatch.setattr(paths.fcntl, "flock", refuse)
  with run.held_workdir(tmp_path):
    assert "cannot be locked (Operation not supported)" in capsys.readouterr().out


def test_errors_are_one_line_whatever_they_quote():
  for error in (InputError, InputError):
    assert str(error("no file a\nb\x1b[31m é")) == r"no file a\nb\x1b[31m é"
