"""The programs of docs/extending.md, run as they stand but for the size and length of a run.

In this process, where all is loaded, but for one.
"""

import ast
import importlib
import json
import os
import re
import runpy
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import data_pipelines
import rpn_jax
from configs import shapes
from rpn_jax import Segmenter
from rpn_jax.analysis import sweep
from rpn_jax.models import NETWORKS, tuners
from rpn_jax.tasks import train
from tests import ROOT, tiny

PAGE = (ROOT / "docs/extending.md").read_text()
BLOCKS = re.findall(r"As `(\w+\.py)`.*?```python\n(.*?)```", PAGE, re.DOTALL)
LINES = {
  "my_loop.py": 45, "my_tuner.py": 40, "my_study.py": 32, "my_network.py": 60, "my_method.py": 20,
  "my_set.py": 60,
}  # fmt: skip


@pytest.fixture
def folder(tmp_path, monkeypatch):
  """A folder with the programs, and a tiny CLIP under the name of the shipped one.

  Runs are of two steps and draw nothing; what a program registers is forgotten after the test.
  """
  for name, code in BLOCKS:
    (tmp_path / name).write_text(code.replace('tuner="rpn"', 'tuner="rpn", m2oe="none"'))
  tiny.save(tmp_path / "shapes_clip.safetensors")
  monkeypatch.chdir(tmp_path)
  get_config = shapes.get_config

  def smaller(arg=""):
    config = get_config(arg)
    with config.unlocked():
      config.data.crop = config.data.short_side = config.eval.crop = 32
      config.data.scale, config.eval.stride = (128, 32), 24
      config.steps = config.eval_every = 2
      config.data.train_images, config.data.eval_images = 8, 4
      config.model.tuner = "lpm"
    return config

  monkeypatch.setattr(shapes, "get_config", smaller)
  for name in ("draw_figures", "plot_curves"):
    monkeypatch.setattr(train, name, lambda *_: None)
  tables = (tuners.TUNERS, NETWORKS, data_pipelines.DATA_SETS)
  before = [dict(table) for table in tables]
  yield tmp_path
  for table, kept in zip(tables, before):
    table.clear()
    table.update(kept)


@pytest.fixture
def run(folder, monkeypatch, capsys):
  """A program and its arguments -> what it printed."""

  def run(name, *arguments):
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(folder / name), run_name="__main__")
    return capsys.readouterr().out

  return run


def test_the_page_keeps_its_word():
  assert {name: len(code.splitlines()) < LINES[name] for name, code in BLOCKS} == dict.fromkeys(
    LINES, True
  )


def test_a_loop_of_ones_own(run):
  *losses, shape = run("my_loop.py").splitlines()
  assert len(losses) == 3 and all(float(x) > 0 for x in losses) and shape == "(2, 8, 8, 2)"


def names_that_stay() -> set[tuple[str, str]]:
  """(module, name) of the page's table."""
  rows = re.findall(r"^\| `([\w.]+)` \| (.*`) \|$", PAGE.split("## Names that stay")[1], re.M)
  return {(module, name) for module, names in rows for name in re.findall(r"`(\w+)`", names)}


def test_every_public_name_is_there():
  assert set(rpn_jax._PUBLIC) | {"__version__"} == set(rpn_jax.__all__)
  for name in rpn_jax.__all__:
    assert getattr(rpn_jax, name) is not None
  assert {name for module, name in names_that_stay() if module == "rpn_jax"} == {*rpn_jax._PUBLIC}
  for module, name in names_that_stay():
    assert hasattr(importlib.import_module(module), name), f"{module} has no {name}"


def names_used(code: str) -> set[tuple[str, str]]:
  """(module, name) of what a program takes from the packages of this project."""
  own, aliases, used = ("rpn_jax", "data_pipelines", "configs"), {}, set()
  for node in ast.walk(ast.parse(code)):
    if isinstance(node, ast.Import):
      aliases |= {a.name: a.name for a in node.names if a.name in own}
    elif isinstance(node, ast.ImportFrom) and node.module.split(".")[0] in own:
      for name in (a.name for a in node.names):
        try:
          aliases[name] = importlib.import_module(f"{node.module}.{name}").__name__
        except ModuleNotFoundError:
          used.add((node.module, name))
  attributes = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Attribute)]
  named = [(node.value.id, node.attr) for node in attributes if isinstance(node.value, ast.Name)]
  return used | {(aliases[value], name) for value, name in named if value in aliases}


@pytest.mark.parametrize("name", LINES)
def test_a_program_uses_only_names_that_stay(name):
  used = names_used(dict(BLOCKS)[name])
  assert used and used <= names_that_stay(), used - names_that_stay()


def test_a_tuner_of_ones_own(folder, run):
  said = run("my_tuner.py")
  # Two layers of keys and values, 16 channels each, and the head.
  head = 16 * 8 + 8 + 8 * 8 + 8 + 4 * 8
  assert f"{2 * 2 * 16 + head:,} trained parameters" in said
  assert (folder / "runs/ia3/metrics.json").exists()


def test_a_study_names_configs_that_there_are(folder, monkeypatch):
  monkeypatch.syspath_prepend(folder)
  study = sweep.read_tables("my_study.py")
  rows = study["TABLES"]["compare"]
  assert (
    len(rows) == 12 and set(study["REFERENCES"].values()) <= set(rows) and "ia3" in tuners.TUNERS
  )
  for name in rows:
    config = study["get_config"](f"compare_{name},runlocal")
    assert config.model.tuner == name and tuners.parse(name)
    assert len(study["rate_grid"](config)) == (2 if name == "rpn" else 1)


@pytest.mark.slow
def test_a_study_of_ones_own(folder):
  """By the command, of two rows at two rates; the processes that it starts know the tuner."""
  code = (folder / "my_study.py").read_text()
  code = re.sub(r"TUNERS = \(.*?\n\)", 'TUNERS = ("ia3", "lpm")', code, flags=re.DOTALL)
  (folder / "my_study.py").write_text(code + "\nablations.RATES = (2e-3, 6e-3)\n")
  shutil.copy(ROOT / "main.py", folder)
  command = [
    sys.executable, "-m", "rpn_jax", "sweep", "compare", "--config=my_study.py:runlocal",
    "--tune-lr", "--seeds=2", f"--config.clip={folder}/shapes_clip.safetensors", "--jobs=2",
    *tiny.FLAGS,
  ]  # fmt: skip
  env = {**os.environ, "PYTHONPATH": str(ROOT)}
  done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=900)
  assert done.returncode == 0, done.stderr[-2000:]
  assert "hIoU less LPM alone's [95 %]" in done.stdout and "chosen" in done.stdout
  report = json.loads((folder / "runs/sweep/report/compare/report.json").read_text())
  assert [len(row["runs"]) for row in report["rows"]] == [2, 2]


def test_a_network_of_ones_own(folder, run):
  """Its trained text tower is saved, and read again by what evaluates the run."""
  said = run("my_network.py")
  # Queries, keys and values of the one layer, 8 channels wide, and the bias of the logits.
  assert f"{8 * 3 * 8 + 3 * 8 + 1:,} trained parameters" in said
  metrics = (folder / "runs/text_tuned/metrics.json").read_text()
  model = Segmenter.load("runs/text_tuned")
  assert "text tuned, step 2" in str(model) and '"step": 2' in metrics
  labels = model(np.zeros((40, 50, 3), np.uint8), "sand | beach, sky").labels
  assert labels.shape == (40, 50)


def test_a_method_of_ones_own(folder):
  """In a process of its own, as a person runs it."""
  Image.new("RGB", (60, 40), (200, 30, 30)).save(folder / "photo.png")
  command = [sys.executable, "my_method.py", "photo.png", "a red circle, sand"]
  env = {**os.environ, "PYTHONPATH": str(ROOT)}
  done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300)
  assert done.returncode == 0, done.stderr[-2000:]
  said = done.stdout
  assert "60 x 40" in said and "training-free key_key on shapes_clip" in said


def test_a_data_set_of_ones_own(folder, run):
  rng = np.random.default_rng(0)
  for split, count in (("train", 8), ("val", 2)):
    (folder / "raw" / split).mkdir(parents=True)
    for i in range(count):
      picture = rng.integers(0, 255, (40, 48, 3), np.uint8)
      Image.fromarray(picture).save(folder / f"raw/{split}/{i}.jpg")
      rows = ["".join(rng.choice(list("gsw"), 48)) for _ in range(40)]
      (folder / f"raw/{split}/{i}.txt").write_text("\n".join(rows))
  said = run("my_set.py", "raw")
  assert "training on 3 of 3 classes" in said
  assert "grass" in (folder / "runs/letters/metrics.json").read_text()
