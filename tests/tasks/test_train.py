"""The whole way on a miniature: train, resume, evaluate, predict, and what is refused."""

import dataclasses
import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from huggingface_hub import ModelCard
from PIL import Image

from configs import shapes as shapes_config
from data_pipelines import datasets, shapes
from rpn_jax import Segmenter
from rpn_jax.base.errors import InputError
from rpn_jax.devices import data_mesh
from rpn_jax.inference.predictor import Predictor
from rpn_jax.tasks import evaluate, export, predict, train
from rpn_jax.training import checkpoint, loop, losses, optim
from rpn_jax.training.loop import NOT_FINITE
from rpn_jax.training.metric_log import read_history
from rpn_jax.training.preemption import PreemptionGuard
from rpn_jax.training.sharding import ShardMap
from rpn_jax.training.step import TrainState
from rpn_jax.weights import exported, prompts_file
from rpn_jax.weights.clip_file import with_normalization
from tests import tiny
from tests.training.test_checkpoint import small_files


@pytest.fixture(scope="module")
def home(tmp_path_factory):
  """A folder with the weights of a tiny random CLIP."""
  path = tmp_path_factory.mktemp("home")
  tiny.save(path / "clip.safetensors")
  return path


def make_config(home, arg="runlocal", **changes):
  config = shapes_config.get_config(arg)
  with config.unlocked():
    config.clip = str(home / "clip.safetensors")
    config.data.data_dir = str(home / "data")
    config.data.crop = config.data.short_side = config.eval.crop = 32
    config.data.scale, config.eval.stride = (128, 32), 24
    config.model.m2oe_experts = 2  # as many as a token takes; each is programs to compile
    config.data.eval_images = 2  # of many sizes, and each size has a program
    config.update_from_flattened_dict(changes)
  return with_normalization(config)


def small_config(home, arg="runlocal", **changes):
  """Of the head alone, evaluated once: for what the loop does, whatever the network is."""
  small = {"model.tuner": "lpm", "eval_every": 8}
  return make_config(home, arg, **{**small, **changes})


@pytest.fixture(scope="module")
def finished(home):
  """A run of eight steps, evaluated at four and eight."""
  config = make_config(home, **{"optimizer.warmup_steps": 50})  # so that classes stay even
  workdir = home / "run"
  return config, workdir, train.train(config, workdir, datasets.load(config))


@pytest.fixture(autouse=True)
def undrawn(monkeypatch):
  """Figures are a third of a short run's time: those of `finished` are enough."""
  for module, name in ((train, "draw_figures"), (train, "plot_curves"), (evaluate, "draw_figures")):
    monkeypatch.setattr(module, name, lambda *_: None)


def test_a_run_leaves_its_files(finished):
  _, workdir, result = finished
  content = json.loads((workdir / "metrics.json").read_text())
  assert set(content) == {"last", "best", "config", "trained_parameters", "versions"}
  wanted = {"step", "pAcc", "miou_gt", "miou_union", "miou_seen", "miou_unseen", "hiou",
            "per_class"}  # fmt: skip
  assert wanted <= set(content["last"]) and wanted <= set(content["best"])
  assert content["last"]["step"] == 8 and content["last"] == result["last"]
  assert content["best"]["selected_on"] == "the evaluation classes"
  assert len(content["last"]["per_class"]) == 27
  assert content["config"]["steps"] == 8 and content["versions"]["jax"] == jax.__version__
  for name in ("predictions.png", "curves.png"):
    with Image.open(workdir / name) as picture:
      assert min(picture.size) > 100
  assert any((workdir / "events").iterdir())
  assert (workdir / "checkpoints" / "8").is_dir()


class Killed(Exception):
  pass


def test_a_killed_run_continues_exactly(home, finished, monkeypatch):
  config, _, result = finished
  data = datasets.load(config)

  def batches_until_killed(start):
    for i, batch in enumerate(data.train_batches(start)):
      if start + i == 6:
        raise Killed
      yield batch

  workdir = home / "killed"
  killed = dataclasses.replace(data, train_batches=batches_until_killed)
  with pytest.raises(Killed):
    train.train(config, workdir, killed)
  assert sorted(p.name for p in (workdir / "checkpoints").iterdir()) == ["4"]
  told: list[int] = []
  reached = PreemptionGuard.reached
  monkeypatch.setattr(
    PreemptionGuard, "reached", lambda self, step: told.append(step) or reached(self, step)
  )
  again = train.train(config, workdir, data)
  assert again == result
  assert told == [1, 2, 3, 4]  # of this call: a notice before its first step is of step 1
  prompts = [tiny.restored(config, w)["last"][1] for w in (workdir, home / "run")]
  jax.tree.map(np.testing.assert_array_equal, *prompts)


def with_nan(data, steps):
  """The data with one pixel of one image NaN in the batches of these steps (from 1)."""

  def batches(start):
    for i, batch in enumerate(data.train_batches(start), start + 1):
      if i in steps:
        batch["image"][1, 0, 0, 0] = np.nan
      yield batch

  return dataclasses.replace(data, train_batches=batches)


def test_a_step_gone_wrong_is_left_out_and_counted(home, capsys):
  config = small_config(home, max_skipped=2, log_every=1)
  workdir = home / "nan"
  data = with_nan(datasets.load(config), {1, 3, 6})
  train.train(config, workdir, data)
  history = read_history(workdir / "metrics.jsonl")
  assert [v for _, v in history["train/skipped"]] == [1, 1, 2, 2, 2, 3, 3, 3]
  assert np.isnan(history["train/loss"][2][1]) and np.isfinite(history["train/loss"][3][1])
  out = capsys.readouterr().out
  assert "step 3: loss or gradients are NaN or infinite: not applied" in out
  # A step that was not applied does not move the schedule on either.
  rates = [v for _, v in history["h/learning_rate"]]
  assert rates[1] == rates[0] > 0
  assert rates[2] == rates[1] and rates[5] == rates[4] and len(set(rates)) == 5


def test_too_many_in_a_row_end_the_run(home):
  config = small_config(home, max_skipped=3, save_every=2)
  workdir = home / "nans"
  data = datasets.load(config)
  indices = ", ".join(map(str, data.train_indices(4)))
  with pytest.raises(InputError, match=(
    rf"^{NOT_FINITE} in 3 steps in a row, 5 to 7, .* step 5 had the training examples {indices}; "
    r"last good checkpoint: \S+checkpoints/6\. Lower"
  )):  # fmt: skip
    train.train(config, workdir, with_nan(data, {5, 6, 7}))
  # The count goes on where it was: of the checkpoint at step 6, two of the three.
  with pytest.raises(InputError, match=r"in 3 steps in a row, 5 to 7"):
    train.train(config, workdir, with_nan(data, {7}))
  # Nothing but steps was lost: with good data the run ends well.
  assert train.train(config, workdir, data)["last"]["step"] == 8


@pytest.mark.slow
def test_a_full_disk_does_not_end_a_run(home, monkeypatch, capsys):
  """All saves but the last one fail, and the curves are kept back."""
  config = small_config(home, save_every=1, log_every=1)
  workdir = home / "full"
  save = checkpoint.Checkpoints.save
  tries = []

  def full(self, state, best):
    tries.append(int(state.step))
    with small_files(10 if state.step < 8 or len(tries) < 10 else None):
      return save(self, state, best)

  monkeypatch.setattr(checkpoint.Checkpoints, "save", full)
  monkeypatch.setattr(loop, "FINAL_SAVE_PAUSE_SECONDS", 0.0)
  result = train.train(config, workdir, datasets.load(config))
  assert tries == [*range(1, 8), 8, 8, 8] and result["last"]["step"] == 8
  assert capsys.readouterr().out.count("no checkpoint written") == 9
  assert tiny.restored(config, workdir)["last"][0] == 8


def test_a_finished_run_is_only_evaluated_again(finished):
  config, workdir, result = finished
  data = datasets.load(config)
  idle = dataclasses.replace(data, train_batches=lambda start: iter(()))
  assert train.train(config, workdir, idle)["last"] == result["last"]


def test_eval_mode_gives_the_scores_of_training(finished):
  config, workdir, result = finished
  before = (workdir / "metrics.json").read_text()
  scores = evaluate.evaluate_run(config, workdir, datasets.load_evaluations(config))
  assert scores["shapes"]["last"] == result["last"]
  assert (workdir / "metrics.json").read_text() == before
  assert json.loads((workdir / "eval.json").read_text())["last"] == result["last"]


def test_a_run_is_evaluated_on_two_worlds_by_their_own_names(home, finished):
  config, workdir, _ = finished
  config = config.copy_and_resolve_references()
  with config.unlocked():
    config.eval.sets = ("shapes", "crowds")
  shapes_data, crowds = datasets.load_evaluations(config)
  assert (len(shapes_data.names), len(crowds.names)) == (27, 9)
  results = evaluate.evaluate_run(config, workdir, [shapes_data, crowds])
  assert list(results) == ["shapes", "crowds"]
  assert list(results["crowds"]["last"]["per_class"]) == list(crowds.names)
  assert results["shapes"]["last"]["step"] == 8
  # Of a run that was trained on all classes, none is.
  supervised = make_config(home, "runlocal,open_vocab")
  assert not any(data.penalized for data in datasets.load_evaluations(supervised))


def test_how_a_run_is_evaluated_may_change(finished):
  config, workdir, result = finished
  data = datasets.load(config)
  other = config.copy_and_resolve_references()
  with other.unlocked():
    other.eval.flip, other.eval.stride = True, 32
  scores = evaluate.evaluate_run(other, workdir, [data])["shapes"]["last"]
  assert scores["step"] == 8 and scores["pAcc"] != result["last"]["pAcc"]


def test_training_free(home):
  config = make_config(home, "runlocal,training_free")
  workdir = home / "free"
  result = evaluate.evaluate_run(config, workdir, datasets.load_evaluations(config))["shapes"][
    "last"
  ]
  assert json.loads((workdir / "metrics.json").read_text())["last"] == result
  with pytest.raises(InputError, match="nothing to train"):
    train.train(config, home / "free2", datasets.load(config))


def test_supervised_trains_on_every_class(home):
  data = datasets.load(make_config(home, "runlocal,supervised"))
  assert len(data.trained) == 27 and data.unseen and not data.penalized


def test_zero_shot_labels_never_show_an_unseen_class(home):
  data = datasets.load(make_config(home))
  labels = np.concatenate([next(data.train_batches(k))["label"] for k in range(4)])
  assert labels.max() == 255 and set(np.unique(labels)) - {255} <= set(range(len(data.trained)))


def test_the_loss_ignores_the_label_that_the_data_set_ignores(home):
  """Sets of more than 255 classes have 65535 for it."""
  config = small_config(home, **{"loss.name": "softmax", "steps": 1, "log_every": 1})
  data, histories = datasets.load(config), []
  wide = lambda batch: batch | {"label": np.where(batch["label"] == 255, 65535, batch["label"])}
  batches = lambda start: map(wide, data.train_batches(start))
  assert (next(data.train_batches(0))["label"] == 255).any()
  for given in (data, dataclasses.replace(data, ignore=65535, train_batches=batches)):
    train.train(config, home / f"ignore{given.ignore}", given)
    history = read_history(home / f"ignore{given.ignore}/metrics.jsonl")
    histories.append(np.array(history["train/loss"]))
  assert np.isfinite(histories[0]).all()
  np.testing.assert_array_equal(*histories)


def test_transductive_labels_hide_which_unseen_class(home):
  data = datasets.load(make_config(home, "runlocal,transductive"))
  labels = np.concatenate([next(data.train_batches(k))["label"] for k in range(4)])
  assert data.unlabelled == 254 and not data.penalized
  assert set(np.unique(labels)) - {254, 255} <= set(data.seen) and (labels == 254).any()


def test_a_transductive_run_learns_from_pseudo_labels(home):
  """They begin half-way: the last four of eight steps differ from a run that never has them."""
  histories = []
  for i, start in enumerate((0.5, 1.0)):
    changes = {"self_training.start": start, "log_every": 1}
    config = small_config(home, "runlocal,transductive", **changes)
    train.train(config, home / f"transductive{i}", datasets.load(config))
    histories.append(read_history(home / f"transductive{i}/metrics.jsonl")["train/loss"])
  with_labels, without = np.array(histories)[..., 1]
  np.testing.assert_array_equal(with_labels[:4], without[:4])
  assert (with_labels[4:] != without[4:]).all()
  config = small_config(home, "runlocal,transductive", **{"self_training.pixels": "all"})
  with pytest.raises(InputError, match="pixels='all' is not known; did you mean"):
    train.train(config, home / "transductive2", datasets.load(config))


@pytest.mark.parametrize("preset", ["paper", pytest.param("released", marks=pytest.mark.slow)])
def test_the_tower_is_bitwise_unchanged(home, preset):
  # Experts are most of what is compiled, and beside the tower.
  changes = {"model.h_grid": (4, 4)} if preset == "released" else {"model.m2oe": "none"}
  config = make_config(home, f"runlocal,{preset}", **changes)
  predictor = Predictor.from_config(config)
  before = jax.tree.map(np.array, predictor.params)
  data = datasets.load(config)
  text = predictor.encoder.embed([data.names[i] for i in data.trained])
  prompts = jax.device_get(predictor.init_prompts(text, jax.random.key(0), config.data.crop))
  optimizer = optim.make_optimizer(config.optimizer, prompts)
  state = TrainState(jnp.int32(0), jax.tree.map(jnp.array, prompts), optimizer.init(prompts))
  devices = ShardMap(
    data_mesh(),
    state,
    optimizer,
    model=predictor.network,
    loss_fn=losses.sigmoid_loss,
  )
  batch = devices.place_batch(next(data.train_batches(0)))
  constants = devices.place_constant((predictor.params, text, jax.random.key(0)))
  for _ in range(5):
    state, metrics = devices.step(state, *constants[:2], batch, constants[2])
    assert np.isfinite(metrics["loss"])
  assert int(state.step) == 5
  jax.tree.map(np.testing.assert_array_equal, before, constants[0])
  changed = jax.tree.map(lambda a, b: bool((a != b).any()), prompts, dict(state.prompts))
  assert changed["head"]["patch_proj"]["kernel"] and changed["h"]


def test_another_run_in_the_workdir_is_refused(home, finished):
  _, workdir, _ = finished
  config = make_config(home, seed=7)
  with pytest.raises(InputError, match=r"different config .*config\.seed: 0 -> 7.*--workdir"):
    train.train(config, workdir, datasets.load(config))


def test_other_class_names_in_the_data_set_are_refused(finished):
  config, workdir, _ = finished  # as after names.txt, or a prepared names.json, was edited
  data = datasets.load(config)
  data = dataclasses.replace(data, names=("plain pink", *data.names[1:]))
  for act in (train.train, lambda c, w, d: evaluate.evaluate_run(c, w, [d])):
    with pytest.raises(InputError, match=r"run was trained on .*names\.1: plain red -> plain pink"):
      act(config, workdir, data)


def test_evaluating_an_empty_workdir_is_refused(home):
  config = make_config(home)
  with pytest.raises(InputError, match=r"no checkpoints .* train first"):
    evaluate.evaluate_run(config, home / "nothing", datasets.load_evaluations(config))


def test_predict_any_image_and_words(home, finished, tmp_path):
  config, workdir, _ = finished
  rng = np.random.default_rng(0)
  tall = Image.fromarray(rng.integers(0, 256, (90, 50, 3), np.uint8))
  exif = tall.getexif()
  exif[0x0112] = 6  # stored on its side: shown 90 wide, 50 high
  folder = tmp_path / "my pictures é"
  folder.mkdir()
  tall.save(folder / "side.jpg", exif=exif)
  tall.convert("RGBA").save(folder / "tall.png")
  tall.convert("L").resize((333, 40)).save(folder / "wide.webp")
  (folder / "notes.txt").write_text("not a picture")
  written = predict.predict(config, workdir, str(folder), "red circle, sand , a zebra")
  assert len(written) == 9
  sizes = {"side": (90, 50), "tall": (50, 90), "wide": (333, 40)}
  for stem, size in sizes.items():
    with Image.open(workdir / "predictions" / f"{stem}_labels.png") as labels:
      assert labels.size == size and np.asarray(labels).max() < 3
    assert (workdir / "predictions" / f"{stem}_overlay.png").exists()


def test_predict_with_the_words_of_the_run(finished, tmp_path):
  config, workdir, _ = finished
  Image.new("RGB", (40, 40)).save(tmp_path / "own words.png")
  _, _, record = predict.predict(config, workdir, str(tmp_path), None)
  assert json.loads(record.read_text())["names"] == list(shapes.CLASSES)
  with pytest.raises(InputError, match=r'--classes="a, b": .*none does not say which it was tr'):
    predict.predict(config.copy_and_resolve_references(), tmp_path / "none", str(tmp_path), None)
  # As from a variable of a shell that is unset.
  with pytest.raises(InputError, match="no class names"):
    predict.predict(config, workdir, str(tmp_path), "")


@pytest.fixture(scope="module")
def passed_on(finished):
  """The folder that the run exports."""
  config, workdir, _ = finished
  return export.export(config, workdir, datasets.load(config), "MIT, they say")


def test_an_export_is_a_folder_to_pass_on(finished, passed_on):
  config, workdir, _ = finished
  assert passed_on == workdir / "export"
  assert {path.name for path in passed_on.iterdir()} == set(exported.FILES)
  content = prompts_file.load(passed_on / exported.PROMPTS)
  local = prompts_file.load(workdir / exported.PROMPTS)
  jax.tree.map(np.testing.assert_array_equal, content.prompts, local.prompts)
  assert local.config == json.loads(json.dumps(config.to_dict()))
  assert content.config["clip"] == "clip.safetensors" and not exported.holds_paths(content.config)
  assert str(workdir.parent) not in (passed_on / exported.CARD).read_text()
  with Image.open(passed_on / exported.PICTURE) as picture:
    assert min(picture.size) > 500
  # By its folder, where its CLIP is named.
  with pytest.raises(InputError, match=r"needs the CLIP weights clip.safetensors .*--clip=FILE"):
    Segmenter.load(passed_on)
  loaded = Segmenter.load(passed_on, clip=config.clip)
  assert loaded.method == f"RPN, step 8 of {passed_on}"


def test_the_card_has_last_and_best_apart(finished, passed_on):
  _, _, result = finished
  card = ModelCard((passed_on / exported.CARD).read_text())
  measured = card.data.eval_results[0]  # those of later evaluations follow
  assert measured.metric_value == round(100 * result["last"]["miou_gt"], 2)
  assert "zero-shot, scores of seen classes lowered by 0.1" in measured.metric_name
  lines = [re.split(r"\s*\|\s*", line)[1:-1] for line in card.content.splitlines()]
  rows = {row[1].rstrip("\\*"): row for row in reversed(lines) if row[:1] == ["shapes"]}
  for which, scores in result.items():
    assert rows[which][2] == str(scores["step"])
    assert rows[which][4:6] == [f"{100 * scores[name]:.1f}" for name in ("pAcc", "miou_gt")]
  for text in (
    "1. zero-shot, scores of seen classes lowered by 0.1, short side 32, windows of 32 every 24",
    "Trained on 21 classes: plain red; ", "not trained on (6): striped red; ",
    "- Data, shapes: MIT, they say.", "](segmentation.png)",
  ):  # fmt: skip
    assert text in card.content


def test_an_older_checkpoint_has_no_scores_and_a_set_elsewhere_no_picture(finished, home, capsys):
  config, workdir, _ = finished
  copy = home / "copy"
  shutil.copytree(workdir, copy)
  card = copy / "export" / exported.CARD
  card.parent.mkdir(exist_ok=True)
  card.write_text("my words")
  (copy / "eval.json").unlink(missing_ok=True)
  metrics = json.loads((copy / "metrics.json").read_text())
  metrics["last"]["step"] = 4
  (copy / "metrics.json").write_text(json.dumps(metrics))
  data = dataclasses.replace(datasets.load(config), eval_examples=unreadable)
  export.export(config, copy, data)
  assert (copy / "replaced-README.md").read_text() == "my words"
  said = capsys.readouterr().out
  assert "has scores of step 4, not 8: the card leaves them out" in said
  assert "drawn scene of the package, not shapes: it is not prepared" in said
  assert "None were stored for step 8" in card.read_text()
  assert "A scene drawn by a program, which is not of shapes" in card.read_text()
  assert (copy / "export" / exported.PICTURE).exists()


def unreadable():
  raise InputError("it is not prepared")


def test_exported_prompts_need_only_clip(home, finished, passed_on, tmp_path):
  config, workdir, result = finished
  names = datasets.load(config).names
  path = workdir / exported.PROMPTS
  content = prompts_file.load(path)
  assert (content.step, content.names) == (8, names)
  jax.tree.map(
    np.testing.assert_array_equal,
    content.prompts,
    tiny.restored(config, workdir)["last"][1],
  )
  moved = tmp_path / "mine.safetensors"
  moved.write_bytes(path.read_bytes())
  other = config.copy_and_resolve_references()
  other.prompts = str(moved)
  Image.new("RGB", (40, 40), (200, 30, 30)).save(tmp_path / "x.png")
  labels = []
  for settings, place in ((config, workdir), (other, tmp_path / "elsewhere")):
    predict.predict(settings, place, str(tmp_path / "x.png"), "red circle, sand")
    with Image.open(place / "predictions/x_labels.png") as file:
      labels.append(np.asarray(file))
  np.testing.assert_array_equal(*labels)
  scores = evaluate.evaluate_run(other, tmp_path / "eval", datasets.load_evaluations(other))
  assert scores["shapes"]["last"] == result["last"]

  # What does not fit is refused with both values.
  tiny.save(tmp_path / "clip.safetensors", seed=1)
  for changes, message in (
    ({"clip": str(tmp_path / "clip.safetensors")}, r"weights \w{16}, config.clip has \w{16}"),
    ({"model.m2oe_reduced": 4}, r"model\.m2oe_reduced: 3 -> 4"),
    ({"templates": "zegclip15"}, r"templates: single -> zegclip15"),
    ({"prompts": str(tmp_path / "x.png")}, "neither or is damaged"),
    ({"prompts": config.clip}, "of another kind"),
    ({"prompts": str(tmp_path / "none")}, "does not exist"),
  ):
    wrong = other.copy_and_resolve_references()
    wrong.update_from_flattened_dict(changes)
    with pytest.raises(InputError, match=message):
      tiny.restored(wrong, tmp_path / "w")


def test_a_run_is_loaded_by_its_folder(finished):
  _, workdir, _ = finished
  image = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
  model = Segmenter.load(workdir)
  assert model.method == f"RPN, step 8 of {workdir}" and model.step == 8
  result = model(image, "red circle, sand , a zebra")
  assert result.labels.shape == (40, 60) and 0 <= result.scores.min() <= result.scores.max() <= 1
  both = model([image, image[:, ::-1]], ["sand", "a zebra"], background=["sky"])
  assert [r.labels.min() >= -1 for r in both] == [True, True]
  best = json.loads((workdir / "metrics.json").read_text())["best"]["step"]
  assert Segmenter.load(workdir, checkpoint="best").step == best
  with pytest.raises(InputError, match='"last" or "best", got \'newest\''):
    Segmenter.load(workdir, checkpoint="newest")
  with pytest.raises(InputError, match="'best' is for trained prompts, maskclip uses none"):
    Segmenter.load(workdir, method="maskclip", checkpoint="best")
  free = Segmenter.load(workdir, method="maskclip")
  assert free.method == "training-free maskclip on clip, no trained prompts"
  assert free(image, "sand").labels.max() == 0


def test_a_run_without_its_whole_config_is_refused(finished, tmp_path):
  _, workdir, _ = finished
  content = json.loads((workdir / "config.json").read_text())
  del content["config"]["eval"]
  (tmp_path / "config.json").write_text(json.dumps(content))
  with pytest.raises(InputError, match=r"config.json: expected the whole config"):
    Segmenter.load(tmp_path)


@pytest.mark.parametrize(
  "classes, message",
  [
    ("cat, dog, cat", "duplicate class name"),
    ("cat,,dog", "2 of 3 is empty"),
    (" ", "no class names"),
  ],
)
def test_bad_class_lists(home, finished, tmp_path, classes, message):
  config, workdir, _ = finished
  Image.new("RGB", (40, 40)).save(tmp_path / "x.png")
  with pytest.raises(InputError, match=message):
    predict.predict(config, workdir, str(tmp_path), classes)


def test_bad_images(home, finished, tmp_path):
  config, workdir, _ = finished
  broken = tmp_path / "broken.jpg"
  broken.write_bytes(b"\xff\xd8\xff not a jpeg")
  before = set((workdir / "predictions").glob("*")) if (workdir / "predictions").exists() else set()
  with pytest.raises(InputError, match=r"broken\.jpg: expected a JPEG of 8 bits, .* or damaged"):
    predict.predict(config, workdir, str(broken), "cat")
  assert set((workdir / "predictions").glob("*")) == before
  with pytest.raises(InputError, match="no such file"):
    predict.predict(config, workdir, str(tmp_path / "none.jpg"), "cat")
  (tmp_path / "empty").mkdir()
  with pytest.raises(InputError, match=r"in this folder"):
    predict.predict(config, workdir, str(tmp_path / "empty"), "cat")


def test_weights_of_the_wrong_kind(home, tmp_path):
  wrong = tmp_path / "photo.safetensors"
  Image.new("RGB", (8, 8)).save(wrong, "JPEG")
  with pytest.raises(InputError, match="photo"):
    Predictor.from_config(make_config(home, clip=str(wrong)))
  assert not (tmp_path / "w").exists()


def test_a_crop_that_is_no_multiple_of_the_patch(home, tmp_path):
  config = make_config(home, **{"eval.crop": 36})
  with pytest.raises(InputError, match=r"config\.eval\.crop=36: .* patch size .* 8"):
    Predictor.from_config(config)


def test_unknown_names_are_refused_with_the_nearest(home):
  with pytest.raises(InputError, match="did you mean 'shapes'"):
    datasets.load(make_config(home, **{"data.name": "shape"}))
  with pytest.raises(InputError, match=r"sigmoid.*softmax"):
    Predictor.from_config(make_config(home, **{"loss.name": "sigmoids"}))


def test_softmax_loss_trains(home):
  config = make_config(home, **{"loss.name": "softmax"})
  logits = np.zeros((1, 4, 4, 3), np.float32)
  terms = losses.make_loss(config.loss, 255)(logits, np.zeros((1, 8, 8), np.int32))
  np.testing.assert_allclose(terms["loss_ce"].value, np.log(3), rtol=1e-6)
  scores = Predictor.from_config(config).network.scores(logits)
  np.testing.assert_allclose(scores, 1 / 3, rtol=1e-6)
