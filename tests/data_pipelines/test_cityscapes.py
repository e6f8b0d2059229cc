"""Cityscapes on a miniature raw tree, and the trees that people have by mistake."""

import shutil

import numpy as np
import pytest
from PIL import Image

from data_pipelines import prepare, records, vocabularies
from data_pipelines.sources.cityscapes import Cityscapes
from rpn_jax.base.errors import InputError
from tests.data_pipelines import raw_ade_coco

AACHEN = "aachen_000000_000019"


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
  """The raw tree, not to be changed, and what is painted there."""
  folder = tmp_path_factory.mktemp("cityscapes")
  return folder, raw_ade_coco.cityscapes(folder)


@pytest.fixture
def raw(tree, tmp_path):
  """A copy."""
  return shutil.copytree(tree[0], tmp_path / "raw (übung)")


@pytest.fixture
def builder(tmp_path):
  return Cityscapes(data_dir=tmp_path)


def _label(raw, kind="labelIds"):
  return raw / "gtFine" / "train" / "aachen" / f"{AACHEN}_gtFine_{kind}.png"


def _to_train_ids(raw):
  """Leaves label images of train ids only, as some conversions do."""
  ids = vocabularies.load("cityscapes").ids
  for path in raw.glob("gtFine/*/*/*_labelIds.png"):
    label = np.array(Image.open(path))
    train_ids = np.vectorize(lambda value: ids.get(value, 255))(label)
    raw_ade_coco.gray_png(path.with_name(path.name.replace("Ids", "TrainIds")), train_ids)
    path.unlink()


def test_labels_and_images_are_as_stored(tree, tmp_path, capsys):
  raw, painted = tree
  prepare.prepare("cityscapes", raw, tmp_path, allow_partial=True)
  told = capsys.readouterr().out
  assert f"left out of Cityscapes: test in {raw}/leftImg8bit; only train and val have" in told
  for split, labels in painted.items():
    stored = {record["id"]: record for record in records.source("cityscapes", tmp_path, split)}
    assert list(stored) == sorted(labels)
    for name, label in labels.items():
      np.testing.assert_array_equal(stored[name]["label"], label)
      assert stored[name]["image"] == next(raw.rglob(f"{name}_leftImg8bit.png")).read_bytes()
  with pytest.raises(InputError, match=r"expected 2,975 train images of Cityscapes, got 3; .*gtF"):
    prepare.prepare("cityscapes", raw, tmp_path / "other")


def test_train_ids_become_ids(tree, raw, builder):
  _to_train_ids(raw)
  classes = vocabularies.load("cityscapes")
  for split, examples in builder.examples(raw).items():
    for example in examples:
      assert example.label.name.endswith("_gtFine_labelTrainIds.png")
      painted = tree[1][split][example.id]
      kept = np.isin(painted, [raw for raw, new in classes.ids.items() if new < 19])
      want = np.where(kept, painted, 255)
      np.testing.assert_array_equal(builder.read(example)["label"], want)


def test_a_split_alone(raw, builder):
  shutil.rmtree(raw / "leftImg8bit" / "train")
  assert list(builder.examples(raw)) == ["val"]


def test_the_id_table_is_complete():
  recorded = vocabularies._read("cityscapes_id_to_train")
  ids = [*map(int, recorded["map"]), *map(int, recorded["without_train_id"])]
  assert sorted(ids) == list(range(34))
  assert list(recorded["map"].values()) == list(range(19))


@pytest.mark.parametrize(
  ("source", "target", "given", "words"),
  [
    ("leftImg8bit", "", "", r"leftImg8bit: expected the images in train and val, got no .*_train"),
    ("gtFine", "", "", r"gtFine: expected the fine labels .* after registering"),
    ("gtFine", "leftImg8bit/gtFine", "", r"there is .*leftImg8bit/gtFine: move it here"),
    ("gtFine", "gtFine_trainvaltest/gtFine", "", r"there is .*trainvaltest/gtFine: move it here"),
    ("", "", "leftImg8bit", r"leftImg8bit/leftImg8bit: .* the folder above, --manual_dir=.*raw "),
  ],
)
def test_folders_elsewhere(source, target, given, words, raw, builder):
  if source:
    (raw / source).rename(raw / "aside")
  if target:
    (raw / target).parent.mkdir(exist_ok=True)
    (raw / "aside").rename(raw / target)
  with pytest.raises(InputError, match=words) as caught:
    builder.examples(raw / given)
  assert "\n" not in str(caught.value)


def test_gt_fine_in_itself(raw, builder):
  """As an archive unpacked into a folder of its name leaves it."""
  (raw / "gtFine").rename(raw / "aside")
  (raw / "gtFine").mkdir()
  (raw / "aside").rename(raw / "gtFine" / "gtFine")
  with pytest.raises(InputError, match=r"there is .*gtFine/gtFine: move it here"):
    builder.examples(raw)


def test_images_without_labels(raw, builder):
  _label(raw).unlink()
  with pytest.raises(InputError, match=rf"got only {AACHEN}_gtFine_color.png, .*polygons.json; "):
    builder.examples(raw)
  shutil.rmtree(raw / "gtFine" / "train" / "aachen")
  with pytest.raises(InputError, match=r"_labelIds.png: expected the label of .* got no such file"):
    builder.examples(raw)
  shutil.rmtree(raw / "leftImg8bit" / "train" / "aachen")
  shutil.rmtree(raw / "leftImg8bit" / "train" / "zürich")
  with pytest.raises(InputError, match=r"train: expected \*_leftImg8bit.png files .* got none"):
    builder.examples(raw)


@pytest.mark.parametrize(
  ("kind", "words"),
  [
    ("color", "expected class ids, got 5 colors: .*; store class ids, not colors; gtFine_"),
    (
      "instanceIds",
      r"expected label values 0…33, 255, got 26000, 33000 on .*instance ids; gtFine_",
    ),
  ],
)
def test_other_files_of_gt_fine_as_labels(kind, words, raw, builder):
  shutil.copy(_label(raw, kind), _label(raw))
  with pytest.raises(InputError, match=words):
    builder.read(builder.examples(raw)["train"][0])


def test_values_of_labels(raw, builder):
  example = builder.examples(raw)["train"][0]
  label = np.array(Image.open(example.label))
  label[0, 0] = 255  # a license plate, -1 as a byte
  raw_ade_coco.gray_png(example.label, label)
  np.testing.assert_array_equal(builder.read(example)["label"], label)
  label[0, 0] = 34
  raw_ade_coco.gray_png(example.label, label)
  with pytest.raises(InputError, match=r"0…33, 255, got 34 on 1 pixels; .*trainvaltest.zip again"):
    builder.read(example)
  label[:] = 18
  label[0, 0] = 255
  raw_ade_coco.gray_png(example.label, label)
  with pytest.raises(InputError, match=r"got only 0…18 and 255, which are train ids; call the"):
    builder.read(example)


def test_values_of_train_ids(raw, builder):
  _to_train_ids(raw)
  example = builder.examples(raw)["train"][0]
  label = np.array(Image.open(example.label))
  label[0, 0] = 33
  raw_ade_coco.gray_png(example.label, label)
  with pytest.raises(InputError, match=r"expected train ids 0…18, 255, got 33 on 1 pixels; fetch"):
    builder.read(example)
  raw_ade_coco.wide_png(example.label, label.astype(np.uint16) * 1000)
  with pytest.raises(InputError, match=r"got \d+, .* pixels; these are instance ids; gtF"):
    builder.read(example)
