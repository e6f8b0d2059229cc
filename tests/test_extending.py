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
LINES = {
  "my_loop.py": 45, "my_tuner.py": 40, "my_network.py": 60, "my_method.py": 20, "my_set.py": 60,
}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
  """A folder with the programs, and a tiny CLIP under the name of the shipped one."""
  for name, code in BLOCKS:
    (tmp_path / name).write_text(code)
  tiny.save(tmp_path / "shapes_clip.safetensors")
  return tmp_path


def run(folder, *command):
  # As beside main.py, without writing there; a config for the tiny CLIP in place of the real one.
  (folder / "configs").mkdir(exist_ok=True)
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
  assert {name: len(code.splitlines()) < LINES[name] for name, code in BLOCKS} == dict.fromkeys(
    LINES, True
  )


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


def test_a_network_of_ones_own(folder):
  """Its trained text tower is saved, and read again by what evaluates the run."""
  said = run(folder, "my_network.py")
  # Queries, keys and values of the one layer, 8 channels wide, and the bias of the logits.
  assert f"{8 * 3 * 8 + 3 * 8 + 1:,} trained parameters" in said
  metrics = (folder / "runs/text_tuned/metrics.json").read_text()
  code = (
    "import my_network, numpy as np; from rpn_jax import Segmenter;"
    "model = Segmenter.load('runs/text_tuned');"
    "print(model, model(np.zeros((40, 50, 3), np.uint8), 'sand | beach, sky').labels.shape)"
  )
  assert "TextTuned, step 8" in (said := run(folder, "-c", code)) and "(40, 50)" in said
  assert '"step": 8' in metrics


def test_a_method_of_ones_own(folder):
  Image.new("RGB", (60, 40), (200, 30, 30)).save(folder / "photo.png")
  said = run(folder, "my_method.py", "photo.png", "a red circle, sand")
  assert "60 x 40" in said and "training-free key_key on shapes_clip" in said


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
  assert "training on 3 of 3 classes" in said
  assert "grass" in (folder / "runs/letters/metrics.json").read_text()
