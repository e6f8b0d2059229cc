"""A workdir belongs to one run at a time, also one that an earlier version wrote."""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image

from configs import folder, shapes
from data_pipelines import datasets, prepare
from rpn_jax.base import console, paths
from rpn_jax.base.errors import InputError
from rpn_jax.config.stored import read_config
from rpn_jax.inference.segmenter import Segmenter
from rpn_jax.tasks import evaluate, train
from rpn_jax.training import run
from rpn_jax.training.loop import Loop
from rpn_jax.training.metric_log import MetricWriter, read_history
from rpn_jax.training.step import TrainState
from rpn_jax.weights.clip_file import with_normalization
from tests import FIXTURES, ROOT
from tests.data_pipelines import raw_ade_coco

HOLD = """
import pathlib, sys, time
from rpn_jax.training import run
from rpn_jax.training.loop import Loop
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
    assert f"was in use by process {other.pid} on" in capsys.readouterr().out
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


def test_what_gcsfuse_does_not_promise_is_said_once(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(run, "is_gcsfuse", lambda path: path == tmp_path)
  with run.held_workdir(tmp_path):
    pass
  said = capsys.readouterr().out
  assert said.count("\n") == 1 and "another machine is not locked out" in said


@contextlib.contextmanager
def claimed_in(workdir):
  """A run that holds its workdir, with a checkpoint's folder and curves up to step 6."""
  config = shapes.get_config("runlocal")
  with config.unlocked():
    config.steps, config.eval_every, config.save_every = 8, 4, 2
  claimed = run.Run(config, workdir, "0" * 16)
  with run.held_workdir(workdir):
    claimed.claim()
    with MetricWriter(workdir, resume_step=0) as writer:
      for step in range(1, 7):
        writer.write(step, {"train/loss": 1.0})
      (workdir / "checkpoints/4").mkdir(parents=True)
      (workdir / "eval_shapes_train.partial.npz").touch()
      claimed.check_workdir(6)
      yield claimed


@pytest.fixture
def claimed(tmp_path):
  with claimed_in(tmp_path / "run") as claimed:
    yield claimed


def test_curves_without_their_checkpoints_are_not_begun_anew(claimed):
  with pytest.raises(InputError, match=r"up to step 6 and no checkpoint, though .* at step 2: put"):
    claimed.check_new()
  # Up to the first checkpoint there may be none: the run was killed before it, or while saving it.
  MetricWriter(claimed.workdir, resume_step=2).close()
  claimed.check_new()


def test_a_restart_moves_what_was_there(claimed, capsys):
  for name in ("predictions_voc.png", "confusion_voc.png"):
    (claimed.workdir / name).touch()
  assert "\n  confusion_voc.png " in console.describe_workdir(claimed.workdir)
  claimed.restart()
  (folder,) = claimed.workdir.glob("replaced-*")
  moved = ["checkpoints", "config.json", "confusion_voc.png", "eval_shapes_train.partial.npz"]
  moved += ["events", "metrics.jsonl", "predictions_voc.png"]
  assert sorted(p.name for p in folder.iterdir()) == moved
  assert sorted(p.name for p in claimed.workdir.iterdir()) == [".lock", folder.name]
  assert f"to {folder}; nothing reads that folder" in capsys.readouterr().out
  claimed.check_new()
  claimed.restart()  # nothing is left to move
  assert not capsys.readouterr().out


def test_classes_of_a_run(claimed):
  """Those of another order are others; a run of an earlier version does not tell its own."""
  classes = {"names": ["sky", "a tree", "sand"], "trained": ["sky", "sand"]}
  claimed.claim(classes)
  claimed.check_classes({"names": ["else"]})  # that of the fixture was claimed without
  assert not claimed.stored_classes()  # and has checkpoints, of whichever classes
  (claimed.workdir / "checkpoints/4").rmdir()
  (claimed.workdir / "checkpoints").rmdir()
  for _ in range(2):  # by an evaluation, or by another process, before any training
    claimed.claim()
    assert not claimed.stored_classes()
  claimed.claim(classes)
  claimed.claim(classes)
  claimed.check_classes({"names": ["sky", "a tree", "sand"]})
  renamed = {"names": ["sky", "oak", "sand"], "trained": ["sky", "sand"]}
  with pytest.raises(InputError, match=r"\(workdir -> data set\): names\.2: a tree -> oak\. Use"):
    claimed.claim(renamed)
  with pytest.raises(InputError, match=r"trained\.2: sand -> None"):
    claimed.claim({**classes, "trained": ["sky"]})


def test_one_process_writes_the_config_of_a_run(tmp_path, monkeypatch):
  begun = run.Run(shapes.get_config("runlocal"), tmp_path, "0" * 16)
  for index, files in ((1, []), (0, ["config.json"])):
    monkeypatch.setattr(jax, "process_index", lambda index=index: index)
    begun.claim({"names": ["sky"], "trained": ["sky"]})
    assert [path.name for path in tmp_path.iterdir()] == files


@pytest.fixture
def folder_run(tmp_path, monkeypatch):
  """What prepares a folder of ten images in each split anew, for `classes_of`; and a new run."""
  monkeypatch.setattr(prepare.preview, "draw", lambda *args: None)  # takes a second
  raw_ade_coco.folder(tmp_path / "raw")
  config = folder.get_config("backbone=shapes").unlock()
  config.data.update(data_dir=str(tmp_path), variant="mine")
  config = with_normalization(config).lock()

  def rebuild():
    prepare.prepare("folder", tmp_path / "raw", tmp_path, config="mine", rebuild=True)
    return run.classes_of(datasets.load(config))

  return rebuild, run.Run(config, tmp_path / "run", "0" * 16)


def exchange_classes(raw):
  """In a single mask."""
  path = raw / "labels/val/pic 3 ä.png"
  table = np.array([1, 0, *range(2, 256)], np.uint8)
  Image.fromarray(table[np.array(Image.open(path))]).save(path)


def add_image(raw):
  for path in ("images/train/pic 3 ä.jpg", "labels/train/pic 3 ä.png"):
    shutil.copy(raw / path, (raw / path).with_stem("new"))


def move_image(raw):
  for path in ("images/train/pic 3 ä.jpg", "labels/train/pic 3 ä.png"):
    (raw / path).rename(raw / path.replace("train/pic", "val/from"))


REBUILT = {
  exchange_classes: "val: other images or labels",
  add_image: "train: 10 -> 11 images",
  move_image: "train: 10 -> 9 images; val: 10 -> 11 images",
}


@pytest.mark.parametrize("change", REBUILT, ids=lambda change: change.__name__)
def test_a_data_set_that_was_prepared_anew(change, folder_run, tmp_path, capsys):
  rebuild, begun = folder_run
  with run.held_workdir(begun.workdir):
    begun.claim(rebuild())
    (begun.workdir / "checkpoints/4").mkdir(parents=True)
    same = rebuild()  # of the same files
    begun.claim(same)
    capsys.readouterr()
    begun.check_classes(same)
    assert not capsys.readouterr().out
    change(tmp_path / "raw")
    other = rebuild()
    says = f"on other images than the data set has now (workdir -> data set): {REBUILT[change]}"
    with pytest.raises(InputError, match=re.escape(f"{says}. Use a new --workdir (--restart")):
      begun.claim(other)
    capsys.readouterr()
    begun.check_classes(other)  # of an evaluation
    out = capsys.readouterr().out
    assert f"{says}; scores do not" in out and out.count("\n") == 1
    # Before anything was trained, the set may have been put right.
    (begun.workdir / "checkpoints/4").rmdir()
    (begun.workdir / "checkpoints").rmdir()
    begun.claim(other)
    (begun.workdir / "checkpoints").mkdir()
    begun.claim(other)


def test_runs_and_data_sets_that_do_not_tell_their_images(folder_run, tmp_path, capsys):
  """Runs of earlier versions stay usable, sets of earlier versions are compared by size."""
  rebuild, begun = folder_run
  classes = rebuild()
  summary = tmp_path / "folder/mine/1.0.0/summary.json"
  summary.unlink()
  earlier = run.classes_of(datasets.load(begun.config))
  assert earlier["contents"]["val"]["images"] == 10 and "sha256" not in earlier["contents"]["val"]
  with run.held_workdir(begun.workdir):
    begun.claim({**classes, "contents": earlier["contents"]})
    (begun.workdir / "checkpoints").mkdir()
    begun.claim(classes)
    add_image(tmp_path / "raw")
    other = rebuild()
    with pytest.raises(InputError, match="train: 10 -> 11 images"):
      begun.claim(other)
    path = begun.workdir / "config.json"
    content = json.loads(path.read_text())
    del content["classes"]["contents"]
    path.write_text(json.dumps(content))
    begun.claim(other)
    begun.check_classes(other)
    assert "other images" not in capsys.readouterr().out


def test_sets_that_are_drawn_are_known_by_the_config(claimed):
  """So nothing is drawn to tell what they hold."""
  config = with_normalization(claimed.config.copy_and_resolve_references().unlock())
  config.data.data_dir = str(claimed.workdir.parent / "none")
  assert run.classes_of(datasets.load(config))["contents"] == {}
  assert not (claimed.workdir.parent / "none").exists()


def remove(workdir):
  shutil.rmtree(workdir)


def rename(workdir):
  workdir.rename(workdir.with_name("elsewhere"))


def rename_and_start_another(workdir):
  rename(workdir)
  workdir.mkdir()
  for name in (".lock", "config.json", "metrics.jsonl"):
    (workdir / name).write_text("process 1 on another")


def empty(workdir):
  for name in ("config.json", "metrics.jsonl"):
    (workdir / name).unlink()


@pytest.mark.parametrize(
  ("change", "gone"),
  [
    (remove, r"\.lock, config\.json, metrics\.jsonl"),
    (rename, r"\.lock, config\.json, metrics\.jsonl"),
    (rename_and_start_another, r"\.lock"),
    (empty, r"config\.json, metrics\.jsonl"),
  ],
)
def test_a_workdir_that_goes_away_during_the_run_is_noticed(claimed, change, gone):
  change(claimed.workdir)
  with pytest.raises(InputError, match=rf"\({gone} of this run is gone\): stopped at step 6"):
    claimed.check_workdir(6)


def test_a_loop_checks_its_workdir_when_it_saves_and_after_evaluations(claimed):
  scores = {"hiou": 0.5, "miou_gt": 0.5}
  loop = Loop(claimed, None, None, checkpoints=None, guard=None, evaluate=lambda *_: dict(scores),
              writer=None, best=None)  # fmt: skip
  state = TrainState(np.int32(6), {}, ())
  loop.evaluate(state)
  rename(claimed.workdir)
  for action in (loop._save, loop.evaluate):
    with pytest.raises(InputError, match="removed, renamed or emptied"):
      action(state)


# Written by version 0.2.0: checkpoints/4 of a run of eight steps, and the metrics of its end.
OLD = FIXTURES / "run_0_2_0"


@pytest.fixture
def old(tmp_path, monkeypatch):
  """A copy of that workdir, and its config; the path of its weights is relative to the clone."""
  monkeypatch.chdir(ROOT)
  workdir = tmp_path / "old"
  shutil.copytree(OLD / "workdir", workdir)
  config = read_config(workdir)
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


def test_a_run_of_64_bits_is_refused_before_it_touches_anything(old):
  config, workdir = old
  with (
    jax.enable_x64(True),
    pytest.raises(InputError, match="JAX_ENABLE_X64 is set: unset it"),
  ):
    train.train(config, workdir, None)
  assert (workdir / "checkpoints/4").is_dir()
