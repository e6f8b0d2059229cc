"""ADE20K-150, ADE20K-847 and COCO-Stuff on miniature raw trees: every label pixel by pixel."""

import io
import shutil

import numpy as np
import pytest
from PIL import Image

from data_pipelines import vocabularies
from data_pipelines.sources.ade150 import Ade150
from data_pipelines.sources.ade847 import NATIVE, Ade847
from data_pipelines.sources.coco_stuff import CocoStuff
from rpn_jax.base.errors import InputError
from tests.data_pipelines import raw_ade_coco


@pytest.fixture
def raw(tmp_path):
  folder = tmp_path / "raw data (übung)"
  folder.mkdir()
  return folder


@pytest.fixture(scope="module")
def ade847(tmp_path_factory):
  """The raw tree, not to be changed, and what is painted there."""
  folder = tmp_path_factory.mktemp("ade847 (übung)")
  return folder, raw_ade_coco.ade847(folder)


def _read_all(builder, raw):
  """Split -> id -> record."""
  return {
    split: {example.id: builder.read(example) for example in examples}
    for split, examples in builder.examples(raw).items()
  }


def _pixels(data):
  with Image.open(io.BytesIO(data)) as image:
    return np.asarray(image.convert("RGB"))


@pytest.mark.parametrize("cls, paint", [(Ade150, "ade150"), (CocoStuff, "coco_stuff")])
def test_labels_are_as_painted(cls, paint, raw, tmp_path):
  painted = getattr(raw_ade_coco, paint)(raw)
  records = _read_all(cls(data_dir=tmp_path), raw)
  assert {s: list(r) for s, r in records.items()} == {s: sorted(p) for s, p in painted.items()}
  for split, labels in painted.items():
    for name, label in labels.items():
      stored = records[split][name]
      assert stored["label"].dtype == np.uint8
      np.testing.assert_array_equal(stored["label"], label, err_msg=name)
      assert _pixels(stored["image"]).shape == (*label.shape, 3)


def test_coco_values_without_a_class(raw, tmp_path):
  """Slots 11 and 90 carry no class but belong; 182 does not."""
  raw_ade_coco.coco_stuff(raw)
  ids = vocabularies.load("coco_stuff171").ids
  assert 11 not in ids and ids[0] == 0 and ids[181] == 170
  builder = CocoStuff(data_dir=tmp_path)
  example = builder.examples(raw)["val"][0]
  label = np.array(Image.open(example.label))
  label[3, 4] = 182
  raw_ade_coco.gray_png(example.label, label)
  with pytest.raises(InputError, match=r"expected label values 0…181, 255, got 182 on 1 pixels"):
    builder.read(example)


def test_coco_of_one_split(raw, tmp_path):
  raw_ade_coco.coco_stuff(raw)
  (raw / "images" / "train2017").rename(raw / "elsewhere")
  assert list(CocoStuff(data_dir=tmp_path).examples(raw)) == ["val"]
  (raw / "images" / "val2017").rename(raw / "elsewhere too")
  with pytest.raises(InputError, match="train2017: expected the train images"):
    CocoStuff(data_dir=tmp_path).examples(raw)
  (raw / "images").rename(raw / "moved")
  with pytest.raises(InputError, match=r"images: expected .*COCO - Common Objects"):
    CocoStuff(data_dir=tmp_path).examples(raw)


def test_ade847_native_keeps_sizes_and_files(ade847, tmp_path):
  raw, painted = ade847
  builder = Ade847(data_dir=tmp_path, config=NATIVE)
  records = _read_all(builder, raw)
  assert {s: list(r) for s, r in records.items()} == {s: sorted(p) for s, p in painted.items()}
  for split, labels in painted.items():
    for name, label in labels.items():
      assert records[split][name]["label"].dtype == np.uint16
      np.testing.assert_array_equal(records[split][name]["label"], label, err_msg=name)
      assert _pixels(records[split][name]["image"]).shape == (*label.shape, 3)
  file = next(raw.rglob("ADE_train_00000003.jpg"))
  assert records["train"]["ADE_train_00000003"]["image"] == file.read_bytes()


def test_ade847_reduces_larger_images_only(ade847, tmp_path):
  raw, painted = ade847
  builder = Ade847(data_dir=tmp_path)
  assert builder.builder_config.name == "short512"
  records = _read_all(builder, raw)
  sizes = {n: r["label"].shape for split in records.values() for n, r in split.items()}
  assert sizes == {
    "ADE_train_00000001": (31, 600),
    "ADE_train_00000002": (40, 25),
    "ADE_train_00000003": (512, 768),
    "ADE_val_00000001": (512, 700),
    "ADE_val_00000002": (774, 512),
  }
  for split, name in (("train", "ADE_train_00000003"), ("val", "ADE_val_00000002")):
    label = painted[split][name]
    height, width = sizes[name]
    rows = np.floor(np.arange(height) * (label.shape[0] / height)).astype(int)
    columns = np.floor(np.arange(width) * (label.shape[1] / width)).astype(int)
    record = records[split][name]
    np.testing.assert_array_equal(record["label"], label[rows][:, columns])
    original = _pixels(next(raw.rglob(f"{name}.jpg")).read_bytes())
    expected = _bilinear(original, height, width)
    assert np.abs(_pixels(record["image"]) - expected).max() <= 1
  for split, name in (("train", "ADE_train_00000001"), ("val", "ADE_val_00000001")):
    np.testing.assert_array_equal(records[split][name]["label"], painted[split][name])


def _bilinear(image, height, width):
  """Pixel centers aligned, no antialiasing, edges repeated."""
  result = image.astype(float)
  for axis, size in ((0, height), (1, width)):
    old = image.shape[axis]
    at = ((np.arange(size) + 0.5) * old / size - 0.5).clip(0, old - 1)
    low = np.floor(at).astype(int).clip(0, old - 2)
    share = (at - low).reshape([-1, 1, 1] if axis == 0 else [1, -1, 1])
    lower, upper = (np.take(result, low + k, axis) for k in (0, 1))
    result = lower + share * (upper - lower)
  return result


def test_ade847_ids_name_classes(ade847, tmp_path):
  """Wall is object 2978 and class 0 in the published table."""
  vocabulary = vocabularies.load("ade847")
  assert vocabulary.names[vocabulary.ids[2978]].startswith("wall")
  label = Ade847(data_dir=tmp_path).examples(ade847[0])["val"][0].read_label()
  assert set(np.unique(label)) == {0, 255, 256, 2978, 3156}


def test_ade847_complaints(ade847, raw, tmp_path):
  builder = Ade847(data_dir=tmp_path)
  with pytest.raises(InputError, match=r"training: expected the training images.*registering"):
    builder.examples(raw)
  shutil.copytree(ade847[0], raw, dirs_exist_ok=True)
  first = builder.examples(raw)["val"][0]
  raw_ade_coco.gray_png(first.label, np.zeros((512, 700)))
  with pytest.raises(InputError, match=r"_seg.png: expected object ids .* got mode L"):
    builder.read(first)
  first.label.unlink()
  with pytest.raises(InputError, match=r"ADE_val_00000001_seg.png: expected the label of"):
    builder.read(first)
  for file in raw.rglob("ADE_val_*.jpg"):
    file.unlink()
  with pytest.raises(InputError, match=r"validation: expected .jpg files"):
    builder.examples(raw)
