"""The PASCAL builders on miniature raw trees: every label pixel by pixel, and every complaint."""

import io
import json

import numpy as np
import pytest
import scipy.io
import tensorflow_datasets as tfds
from PIL import Image

from data_pipelines import vocabularies
from data_pipelines.sources.context import Context
from data_pipelines.sources.context459 import Context459
from data_pipelines.sources.voc import Voc
from rpn_jax.base.errors import InputError
from tests.data_pipelines import raw_pascal

# pycocotools 2.0.11 has the array interface of NumPy 1.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.fixture
def raw(tmp_path):
  folder = tmp_path / "raw data (übung)"
  folder.mkdir()
  return folder


def _builder(cls, tmp_path):
  return cls(data_dir=tmp_path / "data", file_format="array_record")


def _check(builder, raw, expected):
  """Reads all of a tree; ids, order, labels and image sizes are as expected."""
  splits = builder.examples(raw)
  assert set(splits) == set(expected)
  for split, examples in splits.items():
    assert [e.id for e in examples] == sorted(expected[split])
    for example in examples:
      record = builder.read(example)
      wanted = expected[split][example.id]
      assert record["label"].dtype == (np.uint16 if builder.wide else np.uint8)
      np.testing.assert_array_equal(record["label"], wanted, err_msg=example.id)
      with Image.open(io.BytesIO(record["image"])) as image:
        assert (image.height, image.width) == wanted.shape
        assert image.mode in ("RGB", "L")


def _complaint(call, *words):
  with pytest.raises(InputError) as caught:
    call()
  message = str(caught.value)
  assert "\n" not in message
  for word in words:
    assert str(word) in message
  return message


def _prepare(builder, raw, expected):
  """Through storage and back."""
  config = tfds.download.DownloadConfig(manual_dir=raw)
  builder.download_and_prepare(download_config=config)
  for split, labels in expected.items():
    stored = {e["id"].decode(): e for e in builder.as_data_source(split=split)}
    assert set(stored) == set(labels)
    for name, label in labels.items():
      np.testing.assert_array_equal(stored[name]["label"].reshape(label.shape), label)
      assert stored[name]["image"].shape == (*label.shape, 3)


# VOC


@pytest.mark.parametrize("labels", ["sbd", "converted"])
def test_voc_labels(labels, raw, tmp_path):
  _check(_builder(Voc, tmp_path), raw, raw_pascal.voc(raw, labels))


@pytest.mark.parametrize("folder", ["VOCdevkit/VOCaug/dataset", "VOCaug/dataset", "sbd"])
def test_voc_finds_sbd_in_its_usual_folders(folder, raw, tmp_path):
  expected = raw_pascal.voc(raw, folder=folder)
  assert len(_builder(Voc, tmp_path).examples(raw)["train"]) == len(expected["train"]) == 4


def test_voc_ready_list_comes_before_the_built_one(raw, tmp_path):
  expected = raw_pascal.voc(raw)
  lists = raw / "VOCdevkit/VOC2012/ImageSets/Segmentation"
  raw_pascal.names(lists / "trainaug.txt", ["2008_000010"])
  expected["train"] = {"2008_000010": expected["train"]["2008_000010"]}
  _check(_builder(Voc, tmp_path), raw, expected)


def test_voc_converted_labels_without_a_list(raw, tmp_path, capsys):
  """As in the archive that is called SegmentationClassAug."""
  expected = raw_pascal.voc(raw, "converted")
  lists = raw / "VOCdevkit/VOC2012/ImageSets/Segmentation"
  (lists / "trainaug.txt").unlink()
  (raw / "VOCdevkit/VOC2012/SegmentationClassAug/._2008_000010.png").write_bytes(b"\0\5\x16\7")
  _check(_builder(Voc, tmp_path), raw, expected)
  assert "trainaug.txt: not there, all images of SegmentationClassAug" in capsys.readouterr().out


def test_voc_refuses_validation_images_in_training(raw, tmp_path):
  raw_pascal.voc(raw, "converted")
  ready = raw / "VOCdevkit/VOC2012/ImageSets/Segmentation/trainaug.txt"
  raw_pascal.names(ready, ["2007_000001", "2007_000004"])
  call = lambda: _builder(Voc, tmp_path).examples(raw)
  _complaint(call, ready, "2007_000004")


def test_voc_converted_folder_alone_serves_both_splits(raw, tmp_path):
  raw_pascal.voc(raw, "converted")
  home = raw / "VOCdevkit/VOC2012"
  for path in (home / "SegmentationClass").iterdir():
    path.replace(home / "SegmentationClassAug" / path.name)
  (home / "SegmentationClass").rmdir()
  examples = _builder(Voc, tmp_path).examples(raw)
  labels = [e.label for e in examples["train"] + examples["val"]]
  assert {p.parent.name for p in labels} == {"SegmentationClassAug"}
  assert all(p.exists() for p in labels)


def test_voc_validation_never_reads_the_mat_files(raw, tmp_path):
  raw_pascal.voc(raw)
  missing = raw / "VOCdevkit/VOC2012/SegmentationClass/2007_000003.png"
  missing.unlink()
  builder = _builder(Voc, tmp_path)
  _complaint(lambda: builder.read(builder.examples(raw)["val"][0]), missing, builder.obtain)


def test_voc_images(raw, tmp_path):
  """Plain files are stored as they are; CMYK and turned ones as lossless RGB."""
  raw_pascal.voc(raw)
  builder = _builder(Voc, tmp_path)
  records = {e.id: (e, builder.read(e)) for e in builder.examples(raw)["train"]}
  for name in ("2007_000001", "2007_000002"):
    example, record = records[name]
    assert record["image"] == example.image.read_bytes()
  for name, turn in (("2008_000010", 0), ("2008_000011", 3)):  # EXIF 6: turn right to view
    example, record = records[name]
    shown = np.array(Image.open(io.BytesIO(record["image"])))
    stored = np.array(Image.open(example.image).convert("RGB"))
    np.testing.assert_array_equal(shown, np.rot90(stored, turn))


@pytest.mark.parametrize(
  "missing",
  [
    "JPEGImages",
    "SegmentationClass",
    "ImageSets/Segmentation/val.txt",
    "ImageSets/Segmentation/train.txt",
    "../../benchmark_RELEASE/dataset/val.txt",
  ],
)
def test_voc_missing_files(missing, raw, tmp_path):
  raw_pascal.voc(raw)
  path = (raw / "VOCdevkit/VOC2012" / missing).resolve()
  path.rename(path.with_name("elsewhere"))
  builder = _builder(Voc, tmp_path)
  _complaint(lambda: builder.examples(raw), path, builder.obtain)


def test_voc_without_any_labels_of_sbd(raw, tmp_path):
  raw_pascal.voc(raw)
  (raw / "benchmark_RELEASE").rename(raw / "elsewhere")
  builder = _builder(Voc, tmp_path)
  words = ("SegmentationClassAug", "benchmark_RELEASE/dataset", builder.obtain)
  _complaint(lambda: builder.examples(raw), *words)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x80", b"\n \n"])
def test_voc_bad_list(content, raw, tmp_path):
  raw_pascal.voc(raw)
  path = raw / "VOCdevkit/VOC2012/ImageSets/Segmentation/val.txt"
  path.write_bytes(content)
  builder = _builder(Voc, tmp_path)
  _complaint(lambda: builder.examples(raw), path, builder.obtain)


def test_voc_missing_mat_and_image(raw, tmp_path):
  raw_pascal.voc(raw)
  builder = _builder(Voc, tmp_path)
  first, second = builder.examples(raw)["train"][2:]
  first.label.unlink()
  _complaint(lambda: builder.read(first), first.label, builder.obtain)
  second.image.unlink()
  _complaint(lambda: builder.read(second), second.image)


def test_voc_label_of_no_class(raw, tmp_path):
  raw_pascal.voc(raw)
  path = raw / "benchmark_RELEASE/dataset/cls/2008_000010.mat"
  raw_pascal.sbd_mat(path, np.full((23, 11), 21))
  builder = _builder(Voc, tmp_path)
  _complaint(lambda: builder.read(builder.examples(raw)["train"][2]), path, "0…20, 255", "21")


def test_voc_prepared(raw, tmp_path):
  _prepare(_builder(Voc, tmp_path), raw, raw_pascal.voc(raw))


# Context


@pytest.mark.parametrize("labels", ["json", "png"])
def test_context_labels(labels, raw, tmp_path):
  _check(_builder(Context, tmp_path), raw, raw_pascal.context(raw, labels))


def test_categories_of_the_miniature_context():
  vocabulary = vocabularies.load("context60")
  for raw_id, rank in raw_pascal.RANK.items():
    assert vocabulary.ids[raw_id] == rank
  for name in ("SKY", "GRASS", "DOG"):
    assert vocabulary.names[vocabulary.ids[getattr(raw_pascal, name)]] == name.lower()


def test_context_label_images_give_every_class_its_raw_id(raw, tmp_path):
  raw_pascal.context(raw, "png")
  path = raw / "VOCdevkit/VOC2010/SegmentationClassContext/2008_000002.png"
  raw_pascal.gray_png(path, np.arange(1000).reshape(25, 40) % 60)
  builder = _builder(Context, tmp_path)
  label = builder.read(builder.examples(raw)["val"][0])["label"].ravel()
  # mmsegmentation's converter numbers the raw ids, 0 among them, in ascending order.
  raws = sorted({0, *(r for r, new in vocabularies.load("context59").ids.items() if new < 59)})
  assert len(raws) == 60
  assert label.tolist() == [raws[i % 60] for i in range(1000)]


def test_context_json_comes_before_label_images(raw, tmp_path):
  expected = raw_pascal.context(raw)
  raw_pascal.palette_png(
    raw / "VOCdevkit/VOC2010/SegmentationClassContext/2008_000002.png", np.zeros((25, 40))
  )
  _check(_builder(Context, tmp_path), raw, expected)


@pytest.mark.parametrize("value", [60, 255])
def test_context_label_image_out_of_range(value, raw, tmp_path):
  raw_pascal.context(raw, "png")
  path = raw / "VOCdevkit/VOC2010/SegmentationClassContext/2008_000002.png"
  raw_pascal.gray_png(path, np.full((25, 40), value))
  builder = _builder(Context, tmp_path)
  _complaint(lambda: builder.read(builder.examples(raw)["val"][0]), path, value, "59")


@pytest.mark.parametrize(
  ("labels", "missing"),
  [
    ("json", "JPEGImages"),
    ("json", "trainval_merged.json"),
    ("png", "ImageSets/SegmentationContext/train.txt"),
    ("png", "ImageSets/SegmentationContext/val.txt"),
  ],
)
def test_context_missing_files(labels, missing, raw, tmp_path):
  raw_pascal.context(raw, labels)
  path = raw / "VOCdevkit/VOC2010" / missing
  path.rename(path.with_name("elsewhere"))
  builder = _builder(Context, tmp_path)
  _complaint(lambda: builder.examples(raw), path, builder.obtain)


def test_context_missing_label_image(raw, tmp_path):
  raw_pascal.context(raw, "png")
  builder = _builder(Context, tmp_path)
  example = builder.examples(raw)["val"][0]
  example.label.unlink()
  _complaint(lambda: builder.read(example), example.label, builder.obtain)


@pytest.mark.parametrize(
  "content",
  ["", "{", "[1]", "{}", '{"images": [], "annos_segmentation": [{"image_id": 3}]}', "\udc80"],
)
def test_context_bad_json(content, raw, tmp_path):
  raw_pascal.context(raw)
  path = raw / "VOCdevkit/VOC2010/trainval_merged.json"
  path.write_bytes(content.encode("utf-8", "surrogateescape"))
  builder = _builder(Context, tmp_path)
  _complaint(lambda: builder.examples(raw), path, builder.obtain)


@pytest.mark.parametrize(
  "change",
  [
    {"segmentation": {"size": [40, 25], "counts": [0, 1000]}},
    {"segmentation": {"size": [40, 25], "counts": raw_pascal.packed([0, 1000])}},
    {"segmentation": {"size": [25, 40], "counts": [0, 5000]}},
    {"segmentation": {"size": [25, 40], "counts": [0, 999]}},
    {"segmentation": {"size": [25, 40], "counts": [-1, 1001]}},
    {"segmentation": {"size": [25, 40], "counts": raw_pascal.packed([0, 999])}},
    {"segmentation": {"size": [25, 40], "counts": raw_pascal.packed([0, 1000])[:-1]}},
    {"segmentation": {"size": [25, 40], "counts": ""}},
    {"segmentation": [[0, 0, 9, 0, 9, 9, 0]]},
    {"segmentation": None},
    {"category_id": -1},
    {"category_id": 3.5},
    {"category_id": "sky"},
  ],
)
def test_context_bad_mask(change, raw, tmp_path):
  raw_pascal.context(raw)
  path = raw / "VOCdevkit/VOC2010/trainval_merged.json"
  data = json.loads(path.read_text())
  data["annos_segmentation"][0].update(change)
  path.write_text(json.dumps(data))
  builder = _builder(Context, tmp_path)
  _complaint(lambda: builder.read(builder.examples(raw)["val"][0]), path, "2008_000002")


def test_context_polygons_without_area_are_left_out_and_counted(raw, tmp_path, capsys):
  expected = raw_pascal.context(raw)
  path = raw / "VOCdevkit/VOC2010/trainval_merged.json"
  data = json.loads(path.read_text())
  for name, segmentation in (
    ("2008_000002", []),
    ("2008_000003", [[], [1, 1], [1, 1, 9, 9]]),
    ("2008_000003", [[], [0, 0, 2, 0, 2, 1, 0, 1]]),
  ):
    data["annos_segmentation"].append(
      {"image_id": int(name.replace("_", "")), "category_id": 7, "segmentation": segmentation}
    )
  path.write_text(json.dumps(data))
  expected["train"]["2008_000003"][0, :2] = 7
  _check(_builder(Context, tmp_path), raw, expected)
  assert capsys.readouterr().out == (
    f"{path}: left out polygons of fewer than three points, which have no area: 5 in 2 images, "
    "such as 2008_000002\n"
  )


def test_context_json_of_another_size(raw, tmp_path):
  raw_pascal.context(raw)
  builder = _builder(Context, tmp_path)
  example = builder.examples(raw)["val"][0]
  raw_pascal.jpeg(example.image, 25, 41)
  _complaint(lambda: builder.read(example), example.image, "41x25", "40x25")


def test_context_prepared(raw, tmp_path):
  _prepare(_builder(Context, tmp_path), raw, raw_pascal.context(raw))


# Context 459


@pytest.mark.parametrize("train", [False, True])
def test_context459_labels(train, raw, tmp_path):
  _check(_builder(Context459, tmp_path), raw, raw_pascal.context459(raw, train))


def test_context459_list_of_the_benchmark_comes_first(raw, tmp_path):
  raw_pascal.context459(raw, train=True)
  raw_pascal.names(raw / "VOCdevkit/VOC2010/pascalcontext_val.txt", ["2008_000002"])
  assert [e.id for e in _builder(Context459, tmp_path).examples(raw)["val"]] == ["2008_000002"]


@pytest.mark.parametrize("missing", ["JPEGImages", "trainval", "pascalcontext_val.txt"])
def test_context459_missing_files(missing, raw, tmp_path):
  raw_pascal.context459(raw)
  path = raw / "VOCdevkit/VOC2010" / missing
  path.rename(path.with_name("elsewhere"))
  builder = _builder(Context459, tmp_path)
  _complaint(lambda: builder.examples(raw), path, builder.obtain)


def _damaged(kind, good):
  """The bytes of a MATLAB file that SciPy answers with different kinds of errors."""
  cut = {"header": 60, "head": 130, "body": len(good) - 30}
  if kind in cut:
    return good[: cut[kind]]
  if kind == "bits":
    return good[:170] + bytes(b ^ 255 for b in good[170:180]) + good[180:]
  return {
    "empty": b"",
    "zeros": bytes(600),
    "page": b"<html>" + b"x" * 400,
    "newer": b"MATLAB 7.3 MAT-file".ljust(124) + b"\x00\x02IM" + bytes(300),
  }[kind]


@pytest.mark.parametrize(
  "kind", ["header", "head", "body", "bits", "empty", "zeros", "page", "newer"]
)
def test_context459_damaged_mat(kind, raw, tmp_path):
  raw_pascal.context459(raw)
  path = raw / "VOCdevkit/VOC2010/trainval/2008_000002.mat"
  path.write_bytes(_damaged(kind, path.read_bytes()))
  builder = _builder(Context459, tmp_path)
  read = lambda: builder.read(builder.examples(raw)["val"][0])
  _complaint(read, path, "LabelMap", builder.obtain)


@pytest.mark.parametrize(
  "content",
  [
    {"Other": np.zeros((21, 34), np.uint16)},
    {"LabelMap": np.zeros((21, 34), np.float64)},
    {"LabelMap": np.zeros((21, 34), np.int16)},
    {"LabelMap": np.zeros((21, 34, 3), np.uint16)},
    {"LabelMap": {"LabelMap": np.zeros((21, 34), np.uint16)}},
  ],
)
def test_context459_mat_of_something_else(content, raw, tmp_path):
  raw_pascal.context459(raw)
  path = raw / "VOCdevkit/VOC2010/trainval/2008_000002.mat"
  scipy.io.savemat(path, content)
  builder = _builder(Context459, tmp_path)
  read = lambda: builder.read(builder.examples(raw)["val"][0])
  _complaint(read, path, "LabelMap", builder.obtain)


def test_context459_label_of_no_category(raw, tmp_path):
  raw_pascal.context459(raw)
  path = raw / "VOCdevkit/VOC2010/trainval/2008_000002.mat"
  raw_pascal.context_mat(path, np.full((21, 34), 460))
  builder = _builder(Context459, tmp_path)
  _complaint(lambda: builder.read(builder.examples(raw)["val"][0]), path, "0…459", "460")


def test_context459_prepared(raw, tmp_path):
  _prepare(_builder(Context459, tmp_path), raw, raw_pascal.context459(raw))


def test_published_counts():
  assert Voc.counts == {"train": 10582, "val": 1449}
  assert Context.counts == {"train": 4996, "val": 5104}
  assert Context459.counts == {"val": 5104}
