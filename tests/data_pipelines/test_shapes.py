"""The drawn scenes: reproducible, fully labeled, truthful in their captions, exact on disk."""

import itertools
import pickle
import re
import subprocess
import sys

import numpy as np
import pytest

from data_pipelines import shapes
from data_pipelines.shapes import builder, world
from rpn_jax.base.errors import InputError

SEEN = shapes.VOCABULARY.seen
TINY = shapes.ShapesConfig(num_train=26, num_val=24, seed=3)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
  root = tmp_path_factory.mktemp("data")
  shapes.prepare(root, TINY)
  return root


def _words_named(caption):
  """Ids of the classes whose names occur in a caption."""
  return {i for i, name in enumerate(shapes.CLASSES) if re.search(rf"\b{name}\b", caption)}


# ---------------------------------------------------------------- classes


def test_classes_are_all_combinations_then_grounds():
  assert len(set(shapes.CLASSES)) == 27
  pairs = {tuple(name.split()) for name in shapes.OBJECTS}
  assert pairs == set(itertools.product(shapes.PATTERNS, shapes.COLORS))
  assert shapes.CLASSES[24:] == ("grass", "sand", "water")


def test_unseen_are_new_combinations_of_seen_words():
  assert sorted(SEEN + shapes.UNSEEN) == list(range(27))
  unseen = [shapes.OBJECTS[i].split() for i in shapes.UNSEEN]
  assert sorted(color for _, color in unseen) == sorted(shapes.COLORS)
  patterns = [pattern for pattern, _ in unseen]
  assert all(1 <= patterns.count(pattern) <= 2 for pattern in shapes.PATTERNS)
  seen_words = {word for i in SEEN for word in shapes.CLASSES[i].split()}
  assert seen_words == {*shapes.COLORS, *shapes.PATTERNS, *shapes.GROUNDS}


# ---------------------------------------------------------------- scenes


def test_scene_is_a_function_of_its_generator():
  one, two, other = (shapes.draw_scene(np.random.default_rng(s), 48, 64, (1, 3)) for s in (5, 5, 6))
  for a, b in zip(one, two):
    np.testing.assert_array_equal(a, b)
  assert not np.array_equal(one[0], other[0])


def test_scene_shapes_and_labels():
  rng = np.random.default_rng(0)
  met = np.zeros(27, int)
  for _ in range(60):
    image, label = shapes.draw_scene(rng, 40, 56, (2, 3))
    assert image.shape == (40, 56, 3) and image.dtype == np.uint8
    assert label.shape == (40, 56) and label.dtype == np.uint8
    assert 1 <= np.sum(np.unique(label) < 24) <= 3
    met += np.bincount(label.ravel(), minlength=27) > 0
  assert met.shape == (27,) and met.all()  # no label out of range, no class forgotten


def test_scene_without_objects_shows_only_grounds():
  _, label = shapes.draw_scene(np.random.default_rng(1), 32, 32, (0, 0))
  assert label.min() >= 24


def test_objects_stay_mostly_visible():
  # Each object's own area is what the label map shows of it when drawn as the last one.
  rng = np.random.default_rng(2)
  for _ in range(20):
    _, label = world.compose(rng, 64, 64, [0, 5, 10], [24], (30, 30))
    counts = np.bincount(label.ravel(), minlength=27)[[0, 5, 10]]
    # The smallest outline of diameter 30 is a triangle of some 290 pixels; up to a sixth of
    # it may lie outside the scene and a third be hidden. A left-out object shows nothing.
    assert counts[0] > 0 and all(count == 0 or count > 120 for count in counts)


@pytest.mark.parametrize("color", range(6))
def test_plain_object_shows_its_color_where_the_label_says(color):
  rng = np.random.default_rng(color)
  for ground in (24, 25, 26):
    image, label = world.compose(rng, 64, 64, [4 * color], [ground], (36, 36))
    mean = image[label == 4 * color].mean(axis=0)
    distances = np.linalg.norm(world._RGB - mean, axis=1)
    assert distances.argmin() == color and distances.min() < 40
    # The ground is far from every color.
    mean = image[label == ground].mean(axis=0)
    assert np.linalg.norm(world._RGB - mean, axis=1).min() > 60


# ---------------------------------------------------------------- captions


def test_captioned_item_is_a_function_of_seed_and_index():
  source = shapes.CaptionedShapes(seed=4)
  first, again = source[123], shapes.CaptionedShapes(seed=4, length=200)[123]
  np.testing.assert_array_equal(first["image"], again["image"])
  assert first["caption"] == again["caption"]
  assert set(first) == {"image", "caption"}
  assert first["image"].shape == (64, 64, 3) and first["image"].dtype == np.uint8
  other = shapes.CaptionedShapes(seed=5)[123]
  assert not np.array_equal(first["image"], other["image"])


def test_captioned_source_has_ends():
  source = shapes.CaptionedShapes(length=3)
  assert len(list(source)) == len(source) == 3
  with pytest.raises(IndexError, match="item -1 of a source of 3"):
    source[-1]


def test_captions_name_exactly_what_is_visible():
  source = shapes.CaptionedShapes(seed=0)
  kinds = {"all": 0, "objects": 0, "grounds": 0}
  for i in range(150):
    _, label, caption = source._draw(i)
    visible = set(shapes.visible_classes(label))
    objects = {c for c in visible if c < 24}
    named = _words_named(caption)
    if named == visible:
      kinds["all"] += 1
    elif named == objects:
      kinds["objects"] += 1
    else:
      assert named == visible - objects, (caption, visible)
      kinds["grounds"] += 1
  assert kinds["all"] > 90 and kinds["objects"] > 10 and kinds["grounds"] > 0, kinds


def test_captioned_items_vary_in_number_of_objects():
  source = shapes.CaptionedShapes(seed=1)
  counts = [np.sum(np.unique(source._draw(i)[1]) < 24) for i in range(120)]
  share = np.bincount(counts, minlength=4) / len(counts)
  assert 0 < share[0] < 0.15 and 0.4 < share[1] < 0.65 and share[2] > 0.1 and share[3] > 0.05


def test_crowded_captions_name_every_object():
  source = shapes.CaptionedShapes(seed=0, kind="crowded", size=96)
  counts, without_ground = np.zeros(9, int), 0
  for i in range(150):
    image, label, caption = source._draw(i)
    assert image.shape == (96, 96, 3)
    shown, named = set(np.unique(label).tolist()), _words_named(caption)
    objects = {c for c in shown if c < 24}
    assert objects <= named <= shown, (caption, shown)
    counts[len(objects)] += 1
    without_ground += named == objects
  assert counts[:3].sum() == 0 and counts[3:].min() > 10, counts
  assert 10 < without_ground < 60


def test_single_object_images_are_balanced():
  images, class_ids = shapes.single_object_images(48, seed=2)
  assert images.shape == (48, 64, 64, 3) and images.dtype == np.uint8
  assert class_ids.dtype == np.int32
  assert np.bincount(class_ids).tolist() == [2] * 24
  again, _ = shapes.single_object_images(48, seed=2)
  np.testing.assert_array_equal(images, again)
  crowded, class_ids = shapes.single_object_images(24, seed=2, kind="crowded", size=96)
  assert crowded.shape == (24, 96, 96, 3) and sorted(class_ids.tolist()) == list(range(24))


# ---------------------------------------------------------------- on disk


@pytest.mark.parametrize("split, count", [("train", 26), ("val", 24)])
def test_round_trip(data_dir, split, count):
  source = shapes.source(data_dir, split, TINY)
  assert len(source) == count
  met = set()
  for item in source:
    image, label = builder._scene(TINY, split, int(item["id"].split("_")[1]))
    np.testing.assert_array_equal(item["label"], label)
    assert item["label"].dtype == item["image"].dtype == np.uint8
    assert item["image"].shape == image.shape and min(label.shape) == 96
    # JPEG of quality 95 without color subsampling: a few gray levels on average.
    assert np.abs(item["image"].astype(int) - image).mean() < 4
    met.update(np.unique(label).tolist())
  assert met == set(range(27))
  assert len({item["id"] for item in source}) == count


def test_crowds_have_other_scenes_and_names(tmp_path):
  config = shapes.ShapesConfig(world="crowds", num_train=1, num_val=24)
  assert config.name == "crowds_train1_val24_seed0"
  shapes.prepare(tmp_path, config)
  crowds = [item["label"] for item in shapes.source(tmp_path, "val", config)]
  first = shapes.ShapesConfig(num_val=24)
  scenes = [builder._scene(first, "val", i)[1] for i in range(24)]
  kinds = [np.mean([len(np.unique(x)) for x in labels]) for labels in (crowds, scenes)]
  assert kinds[0] > kinds[1] + 2
  for drawn, name in enumerate(shapes.CLASSES):
    assert name.endswith(shapes.COLOR_CLASSES[shapes.COLOR_OF_CLASS[drawn]])
  assert sorted(shapes.COLOR_OF_CLASS) == list(range(27))
  assert set(shapes.COLOR_OF_CLASS.values()) == set(range(9))


def test_source_travels_to_worker_processes(data_dir):
  source = shapes.source(data_dir, "val", TINY)
  copy = pickle.loads(pickle.dumps(source))
  assert copy[5]["id"] == source[5]["id"]


def test_prepare_is_idempotent_and_quiet(data_dir, capfd):
  folder = shapes.prepare(data_dir, TINY)
  before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
  assert shapes.prepare(data_dir, TINY) == folder
  assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
  assert capfd.readouterr() == ("", "")


def test_prepare_replaces_a_half_written_folder(tmp_path, capfd):
  config = shapes.ShapesConfig(num_train=2, num_val=1)
  folder = shapes.prepare(tmp_path, config)
  for damage in (  # each a state that a killed or cleaned-up run may leave behind
    lambda: next(folder.glob("*train*")).unlink(),
    lambda: (folder / "dataset_info.json").unlink(),
    lambda: (folder / "dataset_info.json").write_text("{"),
  ):
    damage()
    with pytest.raises(InputError, match="expected prepared scenes"):
      shapes.source(tmp_path, "train", config)
    assert shapes.prepare(tmp_path, config) == folder
    assert len(shapes.source(tmp_path, "train", config)) == 2
  assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("config", [shapes.ShapesConfig(), TINY])
def test_builder_writes_where_source_reads(tmp_path, config):
  made = builder._builder(tmp_path, config)
  assert made.builder_config.num_train == config.num_train
  assert str(builder._folder(tmp_path, config)) == made.data_dir


def test_errors_name_the_remedy(data_dir, tmp_path):
  with pytest.raises(InputError, match=r"run data_pipelines\.shapes\.prepare first"):
    shapes.source(tmp_path, "train", TINY)
  with pytest.raises(InputError, match="got 'test'"):
    shapes.source(data_dir, "test", TINY)
  (tmp_path / "file").write_text("")
  with pytest.raises(InputError, match="expected a folder to write scenes to"):
    shapes.prepare(tmp_path / "file", TINY)


def test_needs_neither_jax_nor_tensorflow():
  code = (
    "import sys; import data_pipelines.shapes; "
    "print(sorted({'jax', 'flax', 'tensorflow'} & set(sys.modules)))"
  )
  out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
  assert out.stdout.strip() == "[]"


def test_a_run_that_loses_the_race_uses_the_winner_s_scenes(tmp_path, monkeypatch):
  config = shapes.ShapesConfig(num_train=24, num_val=24)
  complete = builder._is_complete
  # The other run finishes between our check and our writing.
  looks = iter([False])
  monkeypatch.setattr(
    builder, "_is_complete", lambda *a: next(looks, None) is not False and complete(*a)
  )

  class Loser:
    def download_and_prepare(self):
      make(tmp_path, config).download_and_prepare()
      raise FileExistsError("Destination already exists.")

  make = builder._builder
  monkeypatch.setattr(builder, "_builder", lambda *a: Loser())
  assert shapes.prepare(tmp_path, config).is_dir()
  assert len(shapes.source(tmp_path, "val", config)) == 24
