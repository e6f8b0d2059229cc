"""The programs of docs/extending.md, run as they stand but for the length of a run."""

import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from tests import ROOT, tiny

BLOCKS = re.findall(
  r"As `(\w+\.py)`.*?```python\n(.*?)```", (ROOT / "docs/extending.md").read_text(), re.DOTALL
)
LINES = {"my_loop.py": 40, "my_tuner.py": 40, "my_set.py": 60}


@pytest.fixture
def folder(tmp_path):
  """A folder with the programs, and a tiny CLIP under the name of the shipped one."""
  for name, code in BLOCKS:
    (tmp_path / name).write_text(code)
  tiny.save(tmp_path / "shapes_clip.safetensors")
  return tmp_path


def run(folder, *command):
  # As beside main.py, without writing there; a config for the tiny CLIP in place of the real one.
  (folder / "configs").mkdir()
  shutil.copy(ROOT / "configs/common.py", folder / "configs")
  shapes = (ROOT / "configs/shapes.py").read_text()
  shapes = shapes.replace("SIDE = 96", "SIDE = 32").replace("CROP = 64", "CROP = 32")
  (folder / "configs/shapes.py").write_text(shapes.replace("stride = 48", "stride = 24"))
  env = {**os.environ, "PYTHONPATH": f"{folder}:{ROOT}"}
  done = subprocess.run(
    [sys.executable, *command], cwd=folder, env=env, capture_output=True, text=True, timeout=300
  )
  assert done.returncode == 0, done.stderr[-2000:]
  return done.stdout


def test_the_page_keeps_its_word():
  assert {name: len(code.splitlines()) < LINES[name] for name, code in BLOCKS} == {
    "my_loop.py": True, "my_tuner.py": True, "my_set.py": True,
  }  # fmt: skip


def test_a_loop_of_ones_own(folder):
  *losses, shape = run(folder, "my_loop.py").splitlines()
  assert len(losses) == 3 and all(float(x) > 0 for x in losses) and shape == "(2, 8, 8, 2)"


def test_every_public_name_is_there():
  import rpn_jax

  assert set(rpn_jax._PUBLIC) | {"__version__"} == set(rpn_jax.__all__)
  for name in rpn_jax.__all__:
    assert getattr(rpn_jax, name) is not None


def test_a_tuner_of_ones_own(folder):
  said = run(folder, "my_tuner.py")
  # Two layers of keys and values, 16 channels each, and the head.
  head = 16 * 8 + 8 + 8 * 8 + 8 + 4 * 8
  assert f"{2 * 2 * 16 + head:,} trained parameters" in said
  assert (folder / "runs/ia3/metrics.json").exists()


def test_a_data_set_of_ones_own(folder):
  rng = np.random.default_rng(0)
  for split, count in (("train", 8), ("val", 2)):
    (folder / "raw" / split).mkdir(parents=True)
    for i in range(count):
      picture = rng.integers(0, 255, (40, 48, 3), np.uint8)
      Image.fromarray(picture).save(folder / f"raw/{split}/{i}.jpg")
      rows = ["".join(rng.choice(list("gsw"), 48)) for _ in range(40)]
      (folder / f"raw/{split}/{i}.txt").write_text("\n".join(rows))
  said = run(folder, "my_set.py", "raw")
  assert "3 of 3 classes trained on" in said
  assert "grass" in (folder / "runs/letters/metrics.json").read_text()
