"""One line from a picture and words to a segmentation."""

import copy
import io
import json
import os
import pickle
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image

from data_pipelines import shapes
from data_pipelines.recipes import eval_transform
from rpn_jax import Segmenter
from rpn_jax.base import pixels
from rpn_jax.base.errors import InputError
from rpn_jax.base.words import parse_names, without_articles
from rpn_jax.drawing.palette import class_colors
from rpn_jax.inference import process, segmenter, sliding
from rpn_jax.inference.classifier import class_probabilities
from rpn_jax.inference.segmentation import Segmentation
from rpn_jax.tasks import demo, predict
from rpn_jax.weights import clip_file
from tests import tiny

NAMES = ["striped red", "plain blue", "dotted green", "sand", "grass", "water"]


KNOWS = "its CLIP, shapes_clip, knows drawn shapes and no photographs"


@pytest.fixture(scope="module")
def model():
  return Segmenter.load("shapes_clip")


@pytest.fixture(scope="module")
def scene():
  return shapes.draw_scene(np.random.default_rng(3), 96, 128, (3, 4))


@pytest.fixture(scope="module")
def result(model, scene):
  return model(scene[0], NAMES)


def test_says_what_it_is(model, result):
  assert "training-free sclip on shapes_clip, no trained prompts" in repr(model)
  assert model.method in repr(result) and result.summary()["method"] == model.method
  assert "clearclip" in Segmenter.load(method="clearclip").method


def test_the_shipped_prompts_know_the_scene(tmp_path):
  """What a newcomer sees first: the objects of the picture, each where it is."""
  shipped = Segmenter.load()
  assert repr(shipped) == f"Segmenter(RPN, step 3000 of shapes; {KNOWS})"
  result = shipped(demo.SCENE, demo.SCENE_WORDS)
  # (row, column) inside of each.
  places = {
    "water": (10, 90), "sand": (170, 200), "plain yellow": (40, 140), "plain orange": (70, 30),
    "striped orange": (145, 48), "plain blue": (60, 203),
  }  # fmt: skip
  for name, place in places.items():
    assert result.names[result.labels[place]] == name
  # A file of prompts is a model wherever it lies; words are joined as the caller says.
  moved = tmp_path / "prompts"
  moved.write_bytes((clip_file.ASSETS / segmenter.SHIPPED_PROMPTS["shapes"]).read_bytes())
  own = Segmenter.load(moved, synonyms="max", templates="zegclip15")
  assert own.step == 3000 and own.predictor.encoder.synonyms == "max"
  several = Segmenter.load(moved, templates=("a {}", "the {}"))
  assert several.predictor.encoder.sentences == 2
  free = Segmenter.load(moved, method="maskclip").method
  assert free.startswith("training-free maskclip on shapes_clip, no trained prompts")
  other = tmp_path / "clip.safetensors"
  tiny.save(other)
  with pytest.raises(InputError, match=r"method='cat_seg': expected 'rpn', which .*prompts was tr"):
    Segmenter.load(moved, method="cat_seg")
  for model in (moved, other):
    with pytest.raises(InputError, match=r"'training_free' leaves open which: name one, vanilla"):
      Segmenter.load(model, method="training_free")
  with pytest.raises(InputError, match=r"fingerprint|weights \w{16}"):
    Segmenter.load(moved, clip=str(other))


def test_what_the_shipped_clip_knows_is_said_whatever_its_file_is_called(tmp_path):
  """Before a model is loaded, too: of a run by its config.json."""
  copy, other, run = tmp_path / "my_clip.safetensors", tmp_path / "tiny.safetensors", tmp_path / "r"
  copy.write_bytes((clip_file.ASSETS / "shapes_clip.safetensors").read_bytes())
  tiny.save(other)
  assert Segmenter.load(copy).method.endswith(f"on my_clip, no trained prompts; {KNOWS}")
  assert KNOWS not in Segmenter.load(other).method
  assert segmenter.note_of("shapes") == segmenter.note_of("shapes_clip") == KNOWS
  run.mkdir()
  assert segmenter.note_of(run) == segmenter.note_of("ViT-B/16") == segmenter.note_of(other) == ""
  (run / "config.json").write_text(json.dumps({"clip": next(iter(clip_file.NOTES)), "config": {}}))
  assert segmenter.note_of(run) == KNOWS


def test_a_result_holds_what_was_asked_for(result, scene):
  assert result.labels.shape == scene[1].shape and result.labels.dtype == np.int32
  assert result.labels.min() >= 0 and result.labels.max() < len(NAMES)
  assert result.scores.shape == (96, 128, len(NAMES))
  np.testing.assert_allclose(result.scores.sum(-1), 1, atol=1e-4)  # a softmax over the words
  # The picture has the network's size here, so both resolutions are one.
  np.testing.assert_array_equal(result.scores.argmax(-1), result.labels)
  np.testing.assert_allclose(result.scores.max(-1), result.confidence, atol=1e-5)
  shares = result.shares()
  assert list(shares.values()) == sorted(shares.values(), reverse=True)
  assert sum(shares.values()) == pytest.approx(1)


def test_grounds_are_found(model, scene):
  """Better than chance on the world that the shipped weights know."""
  grounds = [shapes.CLASSES[i] for i in range(24, 27)]
  image, label = scene
  found = model(image, [*shapes.CLASSES]).labels
  assert (found == label).mean() > 0.35
  assert {shapes.CLASSES[i] for i in np.unique(found)} & set(grounds)


def test_every_kind_of_picture_gives_the_same(model, result, scene, tmp_path):
  path = tmp_path / "my pictures é.png"
  Image.fromarray(scene[0]).save(path)
  for picture in (path, str(path), Image.open(path), scene[0]):
    np.testing.assert_array_equal(model(picture, NAMES).labels, result.labels)
  several = model([path, scene[0]], NAMES)
  assert [r.file for r in several] == [path, ""]
  for one in several:
    np.testing.assert_array_equal(one.labels, result.labels)


def test_results_are_called_like_what_was_opened(model, scene, tmp_path):
  path = tmp_path / "a.png"
  Image.fromarray(scene[0]).save(path)

  class Place:
    def __fspath__(self):
      return str(path)

  in_memory = [io.BytesIO(path.read_bytes()) for _ in range(3)]
  in_memory[1].name = "uploaded.png"
  in_memory[2].name = str(path)  # which may be another image
  with path.open("rb") as opened, open(os.open(path, os.O_RDONLY), "rb") as number:
    results = model([Place(), opened, *in_memory, number], NAMES)
  assert [one.file for one in results] == [str(path), str(path), "", "uploaded.png", "", ""]


def test_inputs_are_those_of_the_evaluation(scene):
  for size in ((128, 96), (333, 77), (40, 200)):
    image = np.asarray(Image.fromarray(scene[0]).resize(size))
    for mean, std in (
      (pixels.CLIP_MEAN, pixels.CLIP_STD),
      ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ):
      want = eval_transform(96, mean=mean, std=std)({"image": image, "id": ""})["image"]
      np.testing.assert_array_equal(pixels.to_network(image, 96, mean, std), want)


def test_names_are_free_text():
  parse = parse_names
  assert parse("a cat | kitten, grass,") == ("a cat, kitten", "grass")
  assert parse("one\ntwo") == ("one", "two")
  assert parse(["a cat", ["grass", "lawn"]]) == ("a cat", "grass, lawn")
  assert without_articles("a cat, The kitten") == "cat, kitten"
  assert [without_articles(x) for x in ("an", "a", "theatre")] == ["an", "a", "theatre"]
  for wrong, message in [
    ("cat,,dog", "2 of 3 is empty"),
    ("a, a", "duplicate"),
    ([], "no class"),
  ]:
    with pytest.raises(InputError, match=message):
      parse(wrong)


def test_synonyms_share_a_class(scene):
  model = Segmenter.load("shapes_clip", synonyms="max")
  best = model(scene[0], [["sand", "water"], "grass"])
  apart = model(scene[0], ["sand", "water", "grass"])
  np.testing.assert_array_equal(best.labels, np.array([0, 0, 1])[apart.labels])
  np.testing.assert_allclose(best.scores[..., 0], apart.scores[..., :2].max(-1), atol=1e-5)
  mean = Segmenter.load("shapes_clip")(scene[0], [["sand", "water"], "grass"])
  assert mean.names == ("sand, water", "grass") and mean.labels.max() <= 1


def test_background_words_and_a_threshold_leave_pixels_out(model, scene, result):
  with_background = model(scene[0], NAMES[:3], background=NAMES[3:])
  np.testing.assert_array_equal(
    with_background.labels, np.where(result.labels < 3, result.labels, -1)
  )
  threshold = float(np.median(result.confidence))
  unsure = model(scene[0], NAMES, other=threshold)
  np.testing.assert_array_equal(unsure.labels < 0, result.confidence < threshold)
  assert unsure.summary()["other"]["share"] == pytest.approx(0.5, abs=0.05)
  assert "other" in repr(unsure)
  with pytest.raises(InputError, match="duplicate"):
    model(scene[0], ["sand"], background=["sand"])


def test_emphasis_moves_one_class_without_the_network(model, result, monkeypatch):
  monkeypatch.setattr(sliding.SlidingWindow, "_start", None)
  name = NAMES[3]
  share = [
    result.adjusted(emphasis={name: value}).shares().get(name, 0.0) for value in (-1, 0, 0.3, 1)
  ]
  assert share == sorted(share) and share[0] < share[1] < share[3]
  out = [(result.adjusted(other=value).labels < 0).mean() for value in (0, 0.5, 0.99)]
  assert out == sorted(out) and out[0] == 0 < out[2]
  with pytest.raises(InputError, match="emphasis on 'zebra': expected one of striped red"):
    result.adjusted(emphasis={"zebra": 1})


def test_emphasis_on_a_name_in_another_form_of_its_letters():
  names, image = parse_names("cafe\u0301, sea"), np.zeros((2, 2, 3), np.uint8)
  segmented = Segmentation(image, names, "", None, emphasis={"cafe\u0301": 0.5})
  assert segmented.emphasis == {"caf\u00e9": 0.5}


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"emphasis": {"sand": float("nan")}}, r"an emphasis on 'sand' in \[-1, 1\], got nan"),
    ({"emphasis": {"sand": 50}}, r"an emphasis on 'sand' in \[-1, 1\], got 50"),
    ({"emphasis": {"sand": "0.5"}}, r"an emphasis on 'sand' in \[-1, 1\], got '0.5'"),
    ({"emphasis": {"sand": None}}, "got None"),
    ({"emphasis": {3: 0.5}}, "emphasis on 3: expected one of striped red"),
    ({"emphasis": ["sand"]}, "an emphasis by name, as in {'striped red': 0.5}, got list"),
    ({"other": "0.5"}, r"an `other` threshold in \[0, 1\], got '0.5'"),
    ({"other": float("nan")}, r"an `other` threshold in \[0, 1\], got nan"),
    ({"other": [0.5]}, r"an `other` threshold in \[0, 1\], got \[0.5\]"),
  ],
)
def test_thresholds_and_emphasis_out_of_range(model, scene, result, options, message):
  for call in (lambda: model(scene[0], NAMES, **options), lambda: result.adjusted(**options)):
    with pytest.raises(InputError, match=message):
      call()


def test_numbers_of_any_library_are_saved(result, tmp_path):
  adjusted = result.adjusted(other=np.float32(0.5), emphasis={"sand": jax.numpy.float32(0.5)})
  adjusted.save(tmp_path, "x", save="json")
  content = json.loads((tmp_path / "x.json").read_text())
  assert content["emphasis"] == {"sand": 0.5} and content["other"]["threshold"] == 0.5


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
@pytest.mark.parametrize("name", ["shapes", "shapes_clip"])
def test_results_and_models_are_copied_and_pickled(scene, name, copied):
  model = Segmenter.load(name)
  result = model(scene[0], NAMES, refine="pamr", other=0.2)
  again = copied(model)
  assert again.method == model.method and again.predictor.network == model.predictor.network
  assert again.predictor is not model.predictor
  for same in (copied(result), again(scene[0], NAMES, refine="pamr", other=0.2)):
    np.testing.assert_array_equal(same.labels, result.labels)
    assert same.summary() == result.summary()
    assert same.adjusted(emphasis={"sand": 1}).shares() != result.shares()


def test_saved_files_agree(model, scene, tmp_path):
  Image.fromarray(scene[0]).save(tmp_path / "photo.png")
  result = model(tmp_path / "photo.png", NAMES, other=0.2)
  paths = result.save(tmp_path / "out")
  assert [p.name for p in paths] == ["photo_overlay.png", "photo_labels.png", "photo.json"]
  with Image.open(paths[1]) as mask:
    labels = np.asarray(mask).astype(int)
  np.testing.assert_array_equal(np.where(labels == 255, -1, labels), result.labels)
  content = json.loads(paths[2].read_text())
  shares = sum(row["share"] for row in content["classes"]) + content["other"]["share"]
  assert shares == pytest.approx(1, abs=1e-4)
  assert content["names"] == NAMES and (content["width"], content["height"]) == (128, 96)
  row = content["classes"][0]
  assert row["color"] == class_colors(NAMES)[row["id"]].tolist()
  assert result._repr_png_().startswith(b"\x89PNG")
  colors = np.asarray(result.overlay(alpha=1.0, palette="colorblind")).reshape(-1, 3)
  assert (colors == class_colors(NAMES, "colorblind")[row["id"]]).all(1).any()
  result.save(tmp_path / "out", save="json", palette="colorblind")
  for row in json.loads(paths[2].read_text())["classes"]:
    assert row["color"] == class_colors(NAMES, "colorblind")[row["id"]].tolist()


@pytest.fixture
def compiled():
  """The names of the programs that are compiled, or read from JAX's cache of them."""
  names = []

  def note(event, duration, fun_name="", **_):
    if event == "/jax/core/compile/backend_compile_duration":
      names.append(fun_name)

  jax.monitoring.register_event_duration_secs_listener(note)
  yield names
  jax.monitoring.unregister_event_duration_listener(note)


def test_many_pictures_and_words_share_programs(scene, compiled):
  model = Segmenter.load(method="maskclip")
  rng = np.random.default_rng(0)

  def run(width, height, names, **options):
    image = rng.integers(0, 255, (height, width, 3), np.uint8)
    return model(image, names, **options).labels

  run(128, 96, NAMES[:4])
  before = len(compiled)
  run(128, 96, ["other words", "of the same", "number", "here"])  # another person's words
  run(120, 96, ["w1", "w2", "w3", "w4"])  # other sizes
  run(134, 100, ["w1", "w2"], background=["w3", "w4"])
  run(133, 97, NAMES[:4], other=0.5, emphasis={NAMES[0]: 0.5})
  assert compiled[before:] == []
  many = [f"word {i}" for i in range(11)]
  run(128, 96, many[:1])  # up to eight words are one program, and so are nine to twelve
  assert compiled[before:] == []
  run(128, 96, many[:9])
  grown = compiled[before:]
  assert 1 <= len(grown) <= 4, grown
  run(128, 96, many)
  assert compiled[before:] == grown


def test_fillers_change_nothing(scene):
  model = Segmenter.load(method="clearclip")
  plain = model(scene[0], NAMES[:5])
  monkey = pytest.MonkeyPatch()
  with monkey.context() as patch:
    patch.setattr(segmenter, "MIN_ROWS", 0)
    patch.setattr(segmenter, "round_up", lambda size: size)
    exact = model(scene[0], NAMES[:5])
  assert (plain.class_scores.fillers, exact.class_scores.fillers) == (3, 0)
  np.testing.assert_array_equal(plain.labels, exact.labels)
  np.testing.assert_allclose(plain.scores, exact.scores, atol=1e-5)


@pytest.mark.parametrize(
  ("model", "options", "message"),
  [
    ("a/b-c", {}, "nothing is there: did you mean 'hf://a/b-c'"),
    ("none", {}, "model='none': expected the workdir of a run, a file of prompts or CLIP weights"),
    ("shapes_clip", {"method": "rpn"}, "needs a training run or its prompts"),
    ("shapes_clip", {"method": "scilp"}, "did you mean 'sclip'"),
    ("shapes_clip", {"checkpoint": "best"}, "'best' is for a training run, shapes_clip is CLIP it"),
    ("{tmp}", {}, "expected the workdir of a run, with a config.json"),
    ("{tmp}/photo.jpg", {}, "photo.jpg"),
    ("shapes_clip", {"templates": "imagenet8"}, "did you mean 'imagenet80'"),
  ],
)
def test_what_is_no_model_is_refused(tmp_path, model, options, message):
  Image.new("RGB", (8, 8)).save(tmp_path / "photo.jpg")
  with pytest.raises(InputError, match=message):
    Segmenter.load(model.format(tmp=tmp_path), **options)(np.zeros((9, 9, 3), np.uint8), "a")


def test_a_file_needs_no_extension(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "NAME").write_bytes(
    (clip_file.ASSETS / segmenter.SHIPPED["shapes_clip"][0]).read_bytes()
  )
  method = Segmenter.load("NAME").method
  assert method == f"training-free sclip on NAME, no trained prompts; {KNOWS}"


def test_what_is_no_picture_is_refused(model, tmp_path):
  (tmp_path / "x.jpg").write_text("not a picture")
  for picture, message in [
    (tmp_path / "x.jpg", "expected a readable image"),
    ("nowhere.jpg", "nowhere.jpg: expected an image, no such file"),
    (np.zeros((4, 4, 3), np.int64), r"of uint8, uint16 or float in 0 to 1, got \(4, 4, 3\) int64"),
    (np.zeros((0, 4, 3), np.uint8), "got"),
  ]:
    with pytest.raises(InputError, match=message):
      model(picture, NAMES)


def test_what_was_read_before_a_broken_image_comes_first(model, scene):
  """Images are read ahead, and windows of several share a batch."""
  done = []
  with pytest.raises(InputError, match=r"nowhere\.jpg: expected an image, no such file"):
    for result in model.stream([*scene[:1] * 3, "nowhere.jpg", scene[0]], NAMES):
      done.append(result)
  assert len(done) == 3


def test_a_forked_process_is_told_what_to_do(model, scene, monkeypatch):
  """Without the refusal it would wait forever for threads that a fork does not copy."""
  result = model(scene[0], NAMES)
  there = os.getpid()
  monkeypatch.setattr(os, "getpid", lambda: there + 1)  # as in a child
  message = f"process {there + 1} was forked from {there}, .*get_context"
  for call in (
    lambda: model(scene[0], ["other", "words"]),
    lambda: result.labels,
    lambda: result.scores,
    lambda: class_probabilities(model.predictor, NAMES),
    Segmenter.load,
  ):
    with pytest.raises(InputError, match=message):
      call()


def test_types_of_64_bits_are_told_what_to_do(model, scene):
  with jax.enable_x64(True), pytest.raises(InputError, match=r"32-bit types.*enable_x64\(False\)"):
    model(scene[0], NAMES)


def test_a_process_may_load_what_its_parent_has_not(monkeypatch):
  monkeypatch.setattr(process, "_owner", None)
  monkeypatch.setattr(os, "getpid", lambda: 12345)
  process.check_process()
  process.check_process()


def test_importing_the_package_is_quick():
  code = "import sys, rpn_jax; print('jax' in sys.modules, 'numpy' in sys.modules)"
  out = subprocess.check_output([sys.executable, "-c", code], text=True)
  assert out.split() == ["False", "False"]
  with pytest.raises(AttributeError, match="no attribute 'Segmentor'"):
    import rpn_jax

    _ = rpn_jax.Segmentor


def test_the_files_of_many_images_are_counted(tmp_path):
  kinds = ("_overlay.png", "_labels.png", ".json")
  files = [tmp_path / f"a_labels.b{i}{kind}" for i in range(5) for kind in kinds]
  assert predict.summary(files[:12], tmp_path) == "\n".join(map(str, files[:12]))
  expected = f"{tmp_path}: 5 x *_overlay.png, 5 x *_labels.png, 5 x *.json"
  assert predict.summary(files, tmp_path) == expected


def test_synonyms_are_shown_as_one_class():
  label = np.zeros((2, 4), np.int32)
  label[:, 3] = 1
  names = parse_names("sand | beach, water")
  shown = Segmentation(np.zeros((2, 4, 3), np.uint8), names, "m", None)
  shown.__dict__["_best"] = label, np.ones((2, 4))
  assert repr(shown) == "Segmentation(4 x 2: sand | beach 75.0 %, water 25.0 %; m)"


def test_the_type_is_the_fast_one_of_the_device_unless_it_is_given(monkeypatch, tmp_path):
  tiny.save(tmp_path / "clip.safetensors")
  load = lambda **given: Segmenter.load(tmp_path / "clip.safetensors", **given)
  monkeypatch.setattr(segmenter.devices, "processor_features", lambda: ("avx2",))
  assert load().predictor.network.dtype == np.float32  # on a CPU without units for bfloat16
  monkeypatch.setattr(segmenter.devices, "fast_type", lambda device, parameters: "bfloat16")
  halves, exact = load(), load(dtype="float32")
  assert halves.predictor.network.dtype == "bfloat16"
  assert exact.predictor.network.dtype == np.float32
  image = np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8)
  scores = [model(image, "sand, a red circle, grass").scores for model in (halves, exact)]
  assert 0 < np.abs(scores[0] - scores[1]).max() < 0.05
  # A run's own type is that of its training and its scores, not that of what reads it.
  assert Segmenter.load("shapes").predictor.network.dtype == "bfloat16"
  with pytest.raises(InputError, match=r"dtype='float16' is not known"):
    load(dtype="float16")
