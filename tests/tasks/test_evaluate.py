"""Evaluation: what is counted, over sets, checkpoints, devices, processes and interruptions."""

import dataclasses
import json
import os
import shutil
import socket
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from configs import shapes as shapes_config
from data_pipelines import shapes
from rpn_jax.base import pixels
from rpn_jax.base.errors import InputError
from rpn_jax.drawing.plots import plot_confusion
from rpn_jax.inference import evaluation, metrics, published
from rpn_jax.inference.predictor import Predictor, open_run
from rpn_jax.models.clip import CLIPConfig
from rpn_jax.tasks import evaluate, model_card
from rpn_jax.training import checkpoint, optim
from rpn_jax.training.step import TrainState
from tests import ROOT, tiny


@dataclasses.dataclass(frozen=True)
class Data:
  """What `evaluate` asks of a data set, with examples in a list."""

  name: str
  names: tuple[str, ...]
  examples: list
  seen: tuple[int, ...] = ()
  unseen: tuple[int, ...] = ()
  penalized: tuple[int, ...] = ()
  trained: tuple[int, ...] = ()
  ignore: int = 255
  scored_as: tuple[int, ...] | None = None

  def eval_examples(self):
    return self.examples


def random_data(name="shapes", count=5, **fields):
  rng = np.random.default_rng(0)
  sizes = [(40, 56), (32, 32), (33, 70), (48, 40), (64, 33)]
  examples = [
    {
      "image": rng.normal(size=(*sizes[i % 5], 3)).astype(np.float32),
      "label": rng.integers(0, 3, (30 + i, 44)),
      "id": f"picture {i}",
    }
    for i in range(count)
  ]
  names = ("red circle", "sand, beach", "water")
  return Data(name, names, examples, **{"seen": (0, 1), "unseen": (2,), **fields})


class Painted:
  """A segmenter that reads the class of every pixel off the first channel of the image."""

  def __init__(self, stop=None):
    self.stop, self.given = stop, 0

  def stream(self, pairs):
    for image, size in pairs:
      if self.given == self.stop:
        raise KeyboardInterrupt
      self.given += 1
      assert image.shape[:2] == size
      yield image[..., 0].astype(np.int32)


def painted(prediction, label, name="one"):
  image = np.repeat(np.asarray(prediction, np.float32)[..., None], 3, -1)
  return {"image": image, "label": np.asarray(label), "id": name}


def make_config(home, arg="runlocal", **changes):
  config = shapes_config.get_config(arg)
  with config.unlocked():
    config.clip = str(home / "clip.safetensors")
    config.data.crop = config.data.short_side = config.eval.crop = 32
    config.eval.stride = 24
    config.model.m2oe_experts = 2  # as many as a token takes; each is programs to compile
    config.update_from_flattened_dict(changes)
  return config


@pytest.fixture(scope="module")
def home(tmp_path_factory):
  """A folder with the weights of a tiny random CLIP."""
  path = tmp_path_factory.mktemp("home")
  tiny.save(path / "clip.safetensors")
  return path


def initial_prompts(predictor):
  text = np.eye(8, dtype=np.float32)
  return predictor.init_prompts(text, jax.random.key(0), crop=32)


@pytest.fixture
def trained(saved, tmp_path):
  """A workdir with checkpoints at steps 4, the best, and 8, whose logits are the negatives."""
  config, workdir = saved
  return config, shutil.copytree(workdir, tmp_path / "run")


@pytest.fixture(scope="module")
def saved(home):
  """What `trained` is a copy of."""
  config = make_config(home)
  predictor, run = open_run(config, home / "run")
  run.claim()
  prompts = initial_prompts(predictor)
  optimizer = optim.make_optimizer(config.optimizer, prompts)
  state = TrainState(jnp.int32(0), prompts, optimizer.init(prompts))
  checkpoints = run.checkpoints()
  for step in (4, 8):
    norm = jax.tree.map(jnp.negative, state.prompts["head"]["patch_norm"])
    prompts = {**state.prompts, "head": {**state.prompts["head"], "patch_norm": norm}}
    state = state.replace(step=jnp.int32(step), prompts=prompts)
    assert checkpoints.save(state, {"step": 4, "hiou": 0.5})
  checkpoints.close()
  return config, home / "run"


# What is counted


def test_names_for_the_background_are_one_class():
  # "cat" and "dog"; "sky" and "wall" are both the background. 65535 is ignored, 255 would be not.
  data = Data(
    "two", ("cat", "dog", "sky", "wall"),
    [
      painted([[0, 1, 2, 3]], [[0, 0, 2, 2]]),
      painted([[3, 1], [0, 2]], [[0, 1], [65535, 1]]),
    ],
    seen=(0, 2, 3), unseen=(1,), ignore=65535, scored_as=(0, 1, 2, 2),
  )  # fmt: skip
  result = evaluation.evaluate(Painted(), data.examples, data, keep=1)
  assert result.names == ("cat", "dog", "background")
  np.testing.assert_array_equal(result.confusion_CxC, [[1, 1, 1], [0, 1, 1], [0, 0, 2]])
  # cat 1/3, dog 1/3, background 2/4
  ious = {"cat": 1 / 3, "dog": 1 / 3, "background": 1 / 2}
  assert result.scores["per_class"] == pytest.approx(ious)
  assert result.scores["miou_seen"] == pytest.approx((1 / 3 + 1 / 2) / 2)
  assert result.scores["miou_unseen"] == pytest.approx(1 / 3) and result.untrained == (1,)
  (kept,) = result.kept
  np.testing.assert_array_equal(kept["prediction"], [[0, 1, 2, 2]])


def test_a_label_of_another_vocabulary_is_refused():
  data = Data("small", ("cat", "dog"), [painted([[0]], [[7]], "img 3")])
  with pytest.raises(InputError, match=r"small, example img 3: .* 0\.\.1 or 255, got 7"):
    evaluation.evaluate(Painted(), data.examples, data)


def test_every_synonym_competes_for_its_class(home, tmp_path):
  data = random_data(penalized=(1,))
  predictor = Predictor.from_config(make_config(home, synonyms="max"))
  maximum = predictor.with_prompts(initial_prompts(predictor)).for_data(data)
  np.testing.assert_array_equal(maximum.class_of_row, [0, 1, 1, 2])
  np.testing.assert_allclose(maximum.penalty_C, [0, 0.1, 0.1, 0])
  scores = maximum.scores(data.examples[0]["image"])
  assert scores.shape == (40, 56, 4)
  merged = np.stack([scores[..., 0], scores[..., 1:3].max(-1), scores[..., 3]], -1)
  got = maximum(data.examples[0]["image"])
  np.testing.assert_array_equal(got, merged.argmax(-1))
  free = Predictor.from_config(make_config(home, "runlocal,training_free"))
  assert not free.for_data(data).penalty_C.any()


# The evaluation of a run


def test_one_set(trained):
  config, workdir = trained
  data = random_data()
  results = evaluate.evaluate_run(config, workdir, [data])
  assert set(results) == {"shapes"} and set(results["shapes"]) == {"last", "best"}
  last, best = results["shapes"]["last"], results["shapes"]["best"]
  assert (last["step"], best["step"]) == (8, 4)
  # Each is what its checkpoint gives by itself.
  predictor, run = open_run(config, workdir)
  restored = predictor.read_prompts(run)
  assert restored["last"][0] == 8
  for scores, (_, prompts) in zip((last, best), restored.values()):
    window = predictor.with_prompts(prompts).for_data(data)
    alone = evaluation.evaluate(window, data.examples, data).scores
    assert scores == {"step": scores["step"], **alone}
  assert last["per_class"] != best["per_class"]
  content = json.loads((workdir / "eval.json").read_text())
  assert set(content) == {"last", "best", "config", "versions"}
  assert content["last"] == last
  assert content["best"] == {**best, "selected_on": "the evaluation classes"}
  assert not list(workdir.glob("*.partial*"))
  report = (workdir / "eval.md").read_text()
  assert "sand, beach" in report and "rpn, best*, step 4" in report
  assert (workdir / "predictions.png").exists() and (workdir / "confusion.png").exists()


def test_several_sets(trained, capsys):
  config, workdir = trained
  sets = [random_data("ade150"), random_data("voc20", count=2, seen=(0, 1, 2), unseen=())]
  results = evaluate.evaluate_run(config, workdir, sets)
  assert list(results) == ["ade150", "voc20"]
  assert results["voc20"]["last"]["hiou"] is None
  content = json.loads((workdir / "eval.json").read_text())
  assert set(content) == {"sets", "config", "versions"}
  assert content["sets"]["voc20"]["last"] == results["voc20"]["last"]
  assert content["sets"]["voc20"]["best"]["selected_on"] == "the evaluation classes of shapes"
  for name in ("ade150", "voc20"):
    assert (workdir / f"predictions_{name}.png").exists()
    assert (workdir / f"confusion_{name}.png").exists()
  shown = capsys.readouterr().out
  for row in ("ade150  rpn, last, step 8", "voc20   rpn, best*, step 4", "report the last"):
    assert row in shown


def test_scores_of_held_out_images_are_called_so():
  config = shapes_config.get_config("runlocal").unlock()
  config.data.name, config.data.held_out = "voc20", 0.25
  predictor = types.SimpleNamespace(
    network=types.SimpleNamespace(title="rpn", trainable=True), clip=CLIPConfig()
  )
  scores = {"voc20": {"last": {"step": 8, **dict.fromkeys(evaluate.COLUMNS, 0.5)}}}
  rows, notes = evaluate.summary(predictor, config, scores)
  assert len(rows) == 1  # without published ones, of other images
  assert any("held_out=0.25: scored on that share of the training images" in n for n in notes)
  protocol = model_card.protocol_text(config.to_dict(), "voc20")
  assert "on the 25% of the training images that were held out, of trained classes" in protocol
  assert "lowered" not in protocol and "first 24" not in protocol
  config.data.held_out = 0.0
  assert len(evaluate.summary(predictor, config, scores)[0]) > 1
  config.data.unseen = ("cat", "bus")
  rows, notes = evaluate.summary(predictor, config, scores)
  assert len(rows) == 1 and any("Another split than that of voc20" in n for n in notes)
  assert "its own split, with cat, bus unseen" in model_card.protocol_text(
    config.to_dict(), "voc20"
  )
  assert "lowered" in model_card.protocol_text(config.to_dict(), "voc20")


def test_published_rows():
  base = CLIPConfig()
  rows = published.rows("open_vocabulary", "ade847", base)
  assert rows["RPN ViT-B/16, published"] == {"miou": 11.4} and len(rows) == 4
  large = CLIPConfig(vision_width=1024, patch_size=14)
  assert published.rows("open_vocabulary", "voc20", large)["CAT-Seg ViT-L/14, published"] == {
    "miou": 97.0
  }
  (row,) = published.rows("zero_shot", "voc20", base).values()
  assert row == {"pAcc": 95.8, "miou_seen": 93.1, "miou_unseen": 84.6, "hiou": 88.6}
  assert evaluate.published_cells(row) == ["95.8", "-", "-", "93.1", "84.6", "88.6"]
  assert evaluate.published_cells({"miou": 11.4}) == ["-", "11.4", "11.4", "-", "-", "-"]
  # The three ways to score PASCAL with its background are never mixed.
  assert published.rows("open_vocabulary", "voc21", base) == {}
  assert published.rows("zero_shot", "voc20", tiny.TINY) == {}


def test_the_best_and_the_worst_classes_are_named():
  ious = {f"class {i}": i / 20 for i in range(20)} | {"absent": None}
  line = evaluate.extremes("voc", ious)
  assert line.startswith("voc, IoU %, best: class 19 95.0; class 18 90.0;")
  assert line.endswith(". Worst: class 0 0.0; class 1 5.0; class 2 10.0; class 3 15.0")
  assert evaluate.extremes("voc", {"a": 0.5, "b": 1.0}) == "voc, IoU %: b 100.0; a 50.0"


def test_a_checkpoint_of_another_run_is_closed_again(trained, monkeypatch):
  config, workdir = trained
  closed = []
  close = checkpoint.Checkpoints.close
  monkeypatch.setattr(checkpoint.Checkpoints, "close", lambda self: (closed.append(1), close(self)))
  predictor, run = open_run(config, workdir)
  run.identity = {**run.identity, "clip": "another"}
  with pytest.raises(InputError, match="created with a different config"):
    predictor.read_prompts(run)
  assert closed


# Interruptions


def test_an_interrupted_evaluation_continues(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(evaluation.Pace, "is_due", lambda _: True)
  rng = np.random.default_rng(0)
  examples = [painted(*rng.integers(0, 3, (2, 9, 8)), f"{i}") for i in range(8)]
  data = Data("set", ("a", "b", "c"), examples)
  whole = evaluation.evaluate(Painted(), examples, data, keep=2)

  path = tmp_path / "x.npz"
  start = lambda stop, step=8: evaluation.evaluate(
    Painted(stop),
    examples,
    data,
    keep=2,
    partial=evaluation.PartialEvaluation(path, {"step": step}),
  )
  with pytest.raises(KeyboardInterrupt):
    start(stop=5)
  assert not list(tmp_path.glob("*.tmp"))
  done, confusion = evaluation.PartialEvaluation(path, {"step": 8}).load(3, 8)
  assert done == 5
  np.testing.assert_array_equal(
    confusion,
    sum(metrics.confusion_matrix(e["label"], e["image"][..., 0], 3) for e in examples[:5]),
  )
  # Two that are shown again and the three that are left: a sixth would be the interruption.
  again = start(stop=5)
  assert again.scores == whole.scores
  np.testing.assert_array_equal(again.confusion_CxC, whole.confusion_CxC)
  assert [e["id"] for e in again.kept] == [e["id"] for e in whole.kept] == ["0", "1"]
  assert "set: resuming after image 5 of 8" in capsys.readouterr().out
  # Of another checkpoint nothing is taken, nor from half a file.
  with pytest.raises(KeyboardInterrupt):
    start(stop=5, step=9)
  path.write_bytes(path.read_bytes()[:100])
  assert evaluation.PartialEvaluation(path, {"step": 9}).load(3, 8) is None


def test_the_sets_before_an_interruption_are_not_repeated(trained, monkeypatch, capsys):
  config, workdir = trained
  monkeypatch.setattr(evaluate, "draw_figures", lambda *_: None)
  sets = [random_data("ade150", count=2), random_data("voc20", count=2)]
  want = evaluate.evaluate_run(config, workdir, sets)
  for_data = Predictor.for_data

  def failing(self, data):
    if data.name == "voc20":
      raise KeyboardInterrupt
    return for_data(self, data)

  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(Predictor, "for_data", failing)
    evaluate.evaluate_run(config, workdir, sets)
  assert {p.name for p in workdir.glob("*.partial*")} == {
    "eval_ade150_last.partial.npz", "eval_ade150_best.partial.npz",
  }  # fmt: skip
  capsys.readouterr()
  assert evaluate.evaluate_run(config, workdir, sets) == want
  assert capsys.readouterr().out.count("all 2 images were counted before the interruption") == 2
  assert not list(workdir.glob("*.partial*"))


# Devices and processes

SCRIPT = """
import sys
import jax, numpy as np
sys.path.insert(0, {root!r})
process, processes, address, out, clip = sys.argv[1:]
if int(processes) > 1:
  jax.distributed.initialize(address, int(processes), int(process))
from tests.tasks import test_evaluate
np.save(out, test_evaluate.confusion_of_scenes(clip))
"""


def confusion_of_scenes(clip):
  """What a CLIP finds in drawn scenes, mirrored and at two scales."""
  config = shapes_config.get_config("training_free,runlocal")
  with config.unlocked():
    config.clip = clip
    config.eval.update(scales=(1.0, 0.7), flip=True, window_batch=3)
  predictor = Predictor.from_config(config)
  rng = np.random.default_rng(0)
  examples = []
  for i, (height, width) in enumerate([(64, 96), (64, 64), (80, 70)]):
    image, label = shapes.draw_scene(rng, height, width, (2, 3))
    image = (np.float32(image) / 255 - pixels.CLIP_MEAN) / pixels.CLIP_STD
    examples.append({"image": np.float32(image), "label": label, "id": f"{i}"})
  data = Data("shapes", shapes.CLASSES, examples, shapes.VOCABULARY.seen, shapes.UNSEEN)
  segmenter = predictor.for_data(data)
  assert segmenter.layout.flip and segmenter.layout.scales == (1.0, 0.7)
  assert segmenter.window_batch % jax.local_device_count() == 0
  return evaluation.evaluate(segmenter, examples, data).confusion_CxC


@pytest.mark.parametrize("processes, devices", [pytest.param(1, 8, marks=pytest.mark.slow), (2, 2)])
def test_devices_and_processes_share_the_work(home, tmp_path, processes, devices):
  root, clip = str(ROOT), str(home / "clip.safetensors")
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    address = f"127.0.0.1:{free.getsockname()[1]}"
  environment = os.environ | {
    "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}",
    "JAX_PLATFORMS": "cpu",
    "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3",
  }  # fmt: skip
  files = [tmp_path / f"{i}.npy" for i in range(processes)]
  running = [
    subprocess.Popen(
      [sys.executable, "-c", SCRIPT.format(root=root), str(i), str(processes), address,
       str(file), clip],
      env=environment, stderr=subprocess.PIPE, text=True,
    )
    for i, file in enumerate(files)
  ]  # fmt: skip
  for process in running:
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
  want = confusion_of_scenes(clip)
  assert np.count_nonzero(want.sum(0)) > 4
  for file in files:
    np.testing.assert_array_equal(np.load(file), want)


def test_billions_of_pixels_keep_their_digits(monkeypatch):
  counts = np.array([[2**40 + 3, 7], [0, 2**33 - 1]])
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  gathered = lambda x: np.asarray(jnp.stack([x, x]))  # JAX arrays, as the real one makes
  monkeypatch.setattr(evaluation.multihost_utils, "process_allgather", gathered)
  np.testing.assert_array_equal(evaluation.sum_over_processes(counts), 2 * counts)


def test_window_covering_the_image_is_the_plain_forward(home, tmp_path):
  predictor = Predictor.from_config(make_config(home, **{"eval.window_batch": 1}))
  data = random_data()
  image = data.examples[1]["image"]
  segmenter = predictor.with_prompts(initial_prompts(predictor)).for_data(data)
  (logits,) = segmenter.logits_fn(image[None])
  want = jax.nn.sigmoid(jax.image.resize(logits, (32, 32, 3), "bilinear", antialias=False))
  np.testing.assert_allclose(segmenter.scores(image), want, atol=1e-5)


# The picture


@pytest.mark.parametrize("classes", [1, 3, pytest.param(40, marks=pytest.mark.slow), 41, 847])
def test_confusion_picture(tmp_path, classes):
  names = [f"a class with a rather long name {i}, synonym" for i in range(classes)]

  def dark_blue(confusion):
    path = plot_confusion(tmp_path / "confusion.png", confusion, names, unseen=[0])
    with Image.open(path) as picture:
      assert min(picture.size) > 250 and max(picture.size) < 2500
      return (np.abs(np.asarray(picture.convert("RGB")) - np.int32([8, 48, 107])).max(-1) < 3).sum()

  empty = dark_blue(np.zeros((classes, classes), np.int64))
  right = dark_blue(np.eye(classes, dtype=np.int64)) - empty
  confused = dark_blue(np.roll(np.eye(classes, dtype=np.int64), 1, 1)) - empty
  if classes <= 40:
    # Cells of at least 20 x 20 pixels but for the numbers in them, wherever they are.
    assert right > 300 * classes and abs(right - confused) < 0.1 * right
  else:
    assert right == 0


def test_columns_that_no_row_has_are_left_out():
  scores = dict.fromkeys(evaluate.COLUMNS) | {"pAcc": 0.5, "miou_gt": 0.25}
  lines = evaluate.score_table({"last": scores}).splitlines()
  assert lines[0].split() == ["%", "pAcc", "miou_gt"] and lines[2].split() == [
    "last",
    "50.0",
    "25.0",
  ]
  assert lines[3] == (
    "pAcc: pixels that are right; miou_gt: mean IoU of the classes in the ground truth."
  )
  both = evaluate.score_table({"last": scores, "best": {**scores, "hiou": 0.1}}).splitlines()
  assert both[0].split()[-1] == "hiou" and both[2].split()[-1] == "-"


def test_seen_and_unseen_of_a_run_that_trained_on_both_are_explained():
  said = {}
  for setting in ("zero_shot", "transductive", "supervised", "annotation_free"):
    data = types.SimpleNamespace(name="shapes", unseen=(1,))
    said[setting] = evaluate.split_notes(shapes_config.get_config(setting), data)
  assert said.pop("zero_shot") == said.pop("transductive") == []
  for setting, (note,) in said.items():
    assert note.startswith(f"In the setting {setting} every class was trained on: seen and unseen")
