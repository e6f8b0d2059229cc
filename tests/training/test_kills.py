"""The short form of tests/tools/kill_test.py: one run that everything happens to.

Quick tests of its parts: a run that ends in the middle and continues (tasks/test_train.py), signals
(test_preemption.py), saves that fail (test_checkpoint.py), a workdir in use (test_run.py).
"""

import contextlib
import json
import random
import signal
import time

import ml_collections
import pytest

from rpn_jax.training import identity
from rpn_jax.training.checkpoint import Checkpoints
from tests import tiny
from tests.tools import kill_test
from tests.tools.kill_test import Run


@pytest.fixture(scope="module")
def home(tmp_path_factory):
  path = tmp_path_factory.mktemp("home")
  tiny.save(path / "clip.safetensors")
  return path


def read_while_training(run: Run) -> set[int]:
  """Steps of the checkpoints that a reader got, all of them whole."""
  settings = json.loads((run.workdir / "config.json").read_text())
  own = identity.identity(ml_collections.ConfigDict(settings["config"]), settings["clip"])
  steps = set()
  like = None
  with contextlib.closing(Checkpoints(run.workdir, own, read_only=True)) as checkpoints:
    while run.process.poll() is None:
      like = like or prompts_of(checkpoints)
      if like:
        steps.add(checkpoints.read(like)["last"][0])
      time.sleep(0.1)
  return steps


def prompts_of(checkpoints: Checkpoints) -> dict | None:
  """Shapes of the prompts, from the newest checkpoint itself."""
  import orbax.checkpoint as ocp

  for step in checkpoints.steps():
    with contextlib.suppress(Exception), ocp.StandardCheckpointer() as reader:  # deleted meanwhile
      return reader.restore(checkpoints.directory / str(step) / "prompts")
  return None


@pytest.mark.slow
def test_a_run_killed_and_ended_and_continued_is_the_same(home, capsys):
  draw = random.Random(1)
  reference = Run(home, "reference").start()
  assert reference.wait_for(lambda: reference.saved())
  # While it goes on its workdir is its own, and whoever reads gets whole checkpoints.
  second = Run(home, "reference")
  second.log = home / "second.log"
  second.start()
  steps = read_while_training(reference)
  reference.end()
  assert len(steps) > 1 and "damaged" not in capsys.readouterr().out
  assert second.process.wait(timeout=kill_test.PATIENCE) == 2 or "step 40 of 40" in second.said()
  if second.process.returncode == 2:
    assert f"in use by process {reference.process.pid} on " in second.said()

  run = Run(home, "run")
  assert kill_test.reach(run.start("--config.data.workers=1"), "save", draw)
  run.kill()  # its reader process is gone, too
  assert kill_test.reach(run.start(), "training", draw)
  seconds = run.kill(signal.SIGTERM)
  assert run.process.returncode == 0 and seconds < 30, run.said()[-3000:]
  assert max(run.saved()) >= run.trained()
  run.start().end()
  assert kill_test.difference(run.result(), reference.result()) is None
