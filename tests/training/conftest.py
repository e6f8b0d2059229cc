"""Checkpoints to read and to damage."""

import shutil

import pytest

from tests.training.states import opened, state_at


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
  path = tmp_path_factory.mktemp("saved")
  with opened(path) as checkpoints:
    for step in (10, 20, 30):
      assert checkpoints.save(state_at(step), {"step": 10, "hiou": 0.5})
  return path


@pytest.fixture
def workdir(saved, tmp_path):
  """Checkpoints at 10, 20 and 30; the best is that of step 10."""
  return shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
