"""The notebooks run from top to bottom, unattended, and are kept without outputs."""

import ast
import os
import re
import shutil

import nbformat
import pytest
from nbclient import NotebookClient
from PIL import Image

from tests import ROOT, tiny
from tests.tools.hub_server import serve

NOTEBOOKS = sorted((ROOT / "colab").glob("*.ipynb"))
SECONDS = 900  # a cell
# Of peft.ipynb, for a short run of CAT-Seg in it: (text, its replacement).
SHORT_CAT_SEG = (
  ('("rpn", "adapter", "lpm")', '("rpn", "cat_seg")'),
  ("STEPS = 300", "STEPS = 2"),
  ("eval_images = 24", "eval_images = 2"),
)


def source(path) -> str:
  cells = nbformat.read(path, as_version=4).cells
  return "\n".join(cell.source for cell in cells if cell.cell_type == "code")


def run(path, tmp_path, *changes, cells=lambda source: True):
  """Executes a notebook in a copy of the project's folder, so that nothing is left behind.

  Of its code, only the cells whose source `cells` wants.
  """
  for name in ("rpn_jax", "data_pipelines", "configs", "docs"):
    os.symlink(ROOT / name, tmp_path / name)
  shutil.copytree(ROOT / "colab", tmp_path / "colab")
  notebook = nbformat.read(path, as_version=4)
  for old, new in changes:
    assert old in source(path)
    for cell in notebook.cells:
      cell.source = cell.source.replace(old, new)
  notebook.cells = [c for c in notebook.cells if c.cell_type != "code" or cells(c.source)]
  client = NotebookClient(
    notebook, timeout=SECONDS, resources={"metadata": {"path": str(tmp_path / "colab")}}
  )
  client.execute()
  return notebook


def outputs(notebook, kind) -> list:
  found = [o for c in notebook.cells if c.cell_type == "code" for o in c.outputs]
  return [o["data"][kind] for o in found if kind in o.get("data", {})]


def printed(notebook) -> str:
  cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
  return "".join(o["text"] for c in cells for o in c.outputs if o.output_type == "stream")


def test_there_are_three():
  assert [path.stem for path in NOTEBOOKS] == ["demo", "peft", "train"]


def test_what_is_compared_is_what_the_pages_say():
  path = ROOT / "colab/peft.ipynb"
  titles = {"rpn": "relationship prompts", "adapter": "adapters", "lpm": "the head alone"}
  tuners = ast.literal_eval(re.search(r"TUNERS = (\(.*?\))", source(path))[1])
  opening = nbformat.read(path, as_version=4).cells[0].source.replace("\n", " ")
  (row,) = (x for x in (ROOT / "colab/README.md").read_text().splitlines() if "(peft.ipynb)" in x)
  for tuner in tuners:
    assert titles[tuner] in row and titles[tuner] in opening


def test_what_the_slow_tests_change_is_there():
  assert all(old in source(ROOT / "colab/peft.ipynb") for old, _ in SHORT_CAT_SEG)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_kept_without_outputs(path):
  for cell in nbformat.read(path, as_version=4).cells:
    if cell.cell_type == "code":
      assert not cell.outputs and cell.execution_count is None, "clear all outputs before a commit"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_calls_public_functions_only(path):
  tree = ast.parse(source(path))
  names = [node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
  names += [a.name for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) for a in n.names]
  assert not [name for name in names if name.startswith("_")]


@pytest.mark.slow
def test_demo(tmp_path):
  notebook = run(ROOT / "colab/demo.ipynb", tmp_path)
  assert len(outputs(notebook, "image/png")) == 7  # four results and three figures
  assert {p.name for p in (tmp_path / "runs/notebook").iterdir()} == {
    "scene_overlay.png", "scene_labels.png", "scene.json"
  }  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("network", [True, False], ids=["network", "no network"])
def test_a_photograph_with_a_network_and_without(network, tmp_path, monkeypatch):
  """The reader's picture, by weights that a hub on the loopback interface has, or the scene."""
  tiny.save(tmp_path / "clip.safetensors")
  clip = {"model.safetensors": (tmp_path / "clip.safetensors").read_bytes(), "config.json": b"{}"}
  (tmp_path / "run").mkdir()
  Image.new("RGB", (64, 48), "green").save(tmp_path / "lawn.jpg")
  kept = ("import", "MODEL =", "PICTURE =", "PHOTO =")
  with serve({"you/clip": clip}) as hub:
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0" if network else "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    notebook = run(
      ROOT / "colab/demo.ipynb",
      tmp_path / "run",
      ('PHOTO = ""', f"PHOTO = {str(tmp_path / 'lawn.jpg')!r}"),
      ('Segmenter.load("ViT-B/16")', 'Segmenter.load("hf://you/clip")'),
      cells=lambda source: any(word in source for word in kept) and "plt" not in source,
    )
  assert ("stands in for" in printed(notebook)) is not network
  (*_, shown) = outputs(notebook, "text/plain")
  assert shown.startswith("Segmentation(64 x 48" if network else "Segmentation(256 x 192")


def test_train_quickly(tmp_path):
  """Around a CLIP of random weights, whose programs are compiled in seconds."""
  tiny.save(tmp_path / "clip.safetensors")
  Image.new("RGB", (64, 48), "green").save(tmp_path / "lawn.jpg")
  notebook = run(
    ROOT / "colab/train.ipynb",
    tmp_path,
    ('PHOTO = ""', f"PHOTO = {str(tmp_path / 'lawn.jpg')!r}"),
    ("config.steps = 60", "config.steps = 4"),
    ("config.eval_every = 30", "config.eval_every = 4"),
    ("range(60)", "range(12)"),
    (
      "config = config.lock()",
      f"""config.clip = {str(tmp_path / "clip.safetensors")!r}
config.data.crop = config.eval.crop = config.data.short_side = 32
config.eval.stride, config.data.scale, config.data.batch_size = 24, (128, 32), 2
config.model.tuner = "lpm"
config = config.lock()""",
    ),
  )
  assert "after 4 steps" in printed(notebook) and "lpm, step 4 of" in printed(notebook)
  assert len(outputs(notebook, "image/png")) == 4
  (*_, shown) = outputs(notebook, "text/plain")
  assert shown.startswith("Segmentation(64 x 48")


@pytest.mark.slow
def test_train(tmp_path):
  notebook = run(ROOT / "colab/train.ipynb", tmp_path)
  assert "after 60 steps" in printed(notebook)


@pytest.mark.slow
def test_peft(tmp_path):
  notebook = run(ROOT / "colab/peft.ipynb", tmp_path)
  assert len(outputs(notebook, "image/png")) == 3
  assert "lpm" in printed(notebook)


@pytest.mark.slow
def test_both_take_cat_seg(tmp_path):
  """Trained by one notebook, switched to by the one variable of the other."""
  for name in ("trained", "shown"):
    (tmp_path / name).mkdir()
  notebook = run(ROOT / "colab/peft.ipynb", tmp_path / "trained", *SHORT_CAT_SEG)
  assert len(outputs(notebook, "image/png")) == 3 and "cat_seg" in printed(notebook)
  folder = tmp_path / "trained/runs/notebook/peft/cat_seg"
  model = ('MODEL = "shapes"', f'MODEL = "{folder}"')
  notebook = run(ROOT / "colab/demo.ipynb", tmp_path / "shown", model)
  assert len(outputs(notebook, "image/png")) == 7  # as with the shipped prompts
  assert f"CAT-Seg, step 2 of {folder}" in outputs(notebook, "text/plain")[0]
