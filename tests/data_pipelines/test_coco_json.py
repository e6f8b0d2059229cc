"""COCO's JSON files as training data: every kind of segmentation, and what is refused."""

import json

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from data_pipelines.sources.coco_json import CocoJson
from rpn_jax.base.errors import InputError
from tests.data_pipelines.raw_annotations import (
  NO,
  SHAPE,
  box,
  coco,
  coco_tree,
  corners,
  labels_of,
  of_image,
  painted,
  picture,
  write_json,
)
from tests.data_pipelines.raw_pascal import rle

# pycocotools 2.0.11 has the array interface of NumPy 1.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.fixture
def raw(tmp_path):
  return tmp_path / "raw ü"


def built(tmp_path, background=None, allow_partial=False):
  builder = CocoJson(data_dir=tmp_path)
  builder.background, builder.allow_partial = background, allow_partial
  return builder


def same(found, expected):
  assert {split: list(labels) for split, labels in found.items()} == {
    split: sorted(labels) for split, labels in expected.items()
  }
  for split, labels in expected.items():
    for name, label in labels.items():
      np.testing.assert_array_equal(found[split][name], label, err_msg=name)


def test_every_kind_of_segmentation(raw, tmp_path, capsys):
  expected = coco_tree(raw)
  builder = built(tmp_path)
  same(labels_of(builder, raw), expected)
  assert builder.classes.names == ("cat", "dog", "bird") and builder.classes.ignore == NO
  told = capsys.readouterr().out
  assert "left out: captions_val2017.json" in told
  assert (
    "of 9 annotations: boxes only, so that their pixels have no class: 1; without area: 1" in told
  )


def test_a_background(raw, tmp_path):
  """The unannotated pixels are its, but for those of which only a box tells anything."""
  expected = coco_tree(raw)
  for split in expected.values():
    for name, label in split.items():
      split[name] = np.where(label == NO, 0, label + 1)
  label = expected["train"]["sub/b.jpg"]
  label[18:][label[18:] == 0] = NO
  builder = built(tmp_path, "rest")
  same(labels_of(builder, raw), expected)
  assert builder.classes.names == ("rest", "cat", "dog", "bird")
  # A class that is there already is not added.
  builder = built(tmp_path, "dog")
  assert labels_of(builder, raw)["val"]["a.jpg"][0, 0] == 1
  assert builder.classes.names == ("cat", "dog", "bird")


def test_masks_are_those_of_pycocotools(raw, tmp_path):
  """Polygons of any corners, with islands, as its own reader decodes them."""
  rng = np.random.default_rng(0)
  picture(raw / "images/a.jpg")
  picture(raw / "images/b.jpg")
  parts = [[*(rng.uniform(0, 1, (6, 2)) * SHAPE[::-1]).ravel()] for _ in range(2)]
  path = write_json(raw / "result.json", coco({1: "a.jpg", 2: "b.jpg"}, [of_image(1, 7, parts)]))
  reader = COCO(path)
  mask = reader.annToMask(reader.loadAnns(reader.getAnnIds(1))[0])
  found = {k: v for split in labels_of(built(tmp_path), raw).values() for k, v in split.items()}
  np.testing.assert_array_equal(found["a.jpg"] == 1, mask == 1)
  assert mask.any()


def test_the_smaller_annotation_is_on_top_and_of_equal_ones_the_later(raw, tmp_path):
  for name in "ab":
    picture(raw / f"{name}.jpg")
  order = [((0, 0, 4, 4), 1), ((0, 0, 9, 9), 7), ((2, 0, 6, 4), 7), ((8, 8, 12, 12), 1)]
  annotations = [of_image(1, category, [corners(*b)]) for b, category in order]
  write_json(raw / "x.json", coco({1: "a.jpg", 2: "b.jpg"}, annotations))
  found = {k: v for split in labels_of(built(tmp_path), raw).values() for k, v in split.items()}
  layers = [(box(0, 0, 9, 9), 1), (box(0, 0, 4, 4), 0), (box(2, 0, 6, 4), 1)]
  np.testing.assert_array_equal(found["a.jpg"], painted(*layers, (box(8, 8, 12, 12), 0)))


def test_roboflow_writes_the_split_as_a_folder(raw, tmp_path, capsys):
  for split in ("train", "valid", "test"):
    picture(raw / split / "0.jpg")
    content = coco({0: "0.jpg"}, [of_image(0, 1, [corners(0, 0, 9, 9)])])
    write_json(raw / split / "_annotations.coco.json", content)
  splits = built(tmp_path).examples(raw)
  assert {s: [e.image.parent.name for e in es] for s, es in splits.items()} == {
    "train": ["train"], "val": ["valid"],
  }  # fmt: skip
  assert "left out, as images for tests: 1, such as" in capsys.readouterr().out


def panoptic(raw, numbers, segments):
  """Two images, of which the first has a mask; the masks are named like the images."""
  for name in "ab":
    picture(raw / f"{name}.png")
  annotation = {"image_id": 1, "file_name": "a.png"}
  annotation["segments_info"] = [{"id": n, "category_id": c} for n, c in segments.items()]
  content = coco({1: "a.png", 2: "b.png"}, []) | {"annotations": [annotation]}
  write_json(raw / "annotations/panoptic.json", content)
  rgb = np.stack([numbers % 256, numbers // 256 % 256, numbers // 65536], -1).astype(np.uint8)
  (raw / "annotations/panoptic").mkdir(exist_ok=True)
  Image.fromarray(rgb).save(raw / "annotations/panoptic/a.png")


def test_the_panoptic_form(raw, tmp_path):
  """By the page "COCO - Data format": id = R + G * 256 + B * 256^2, 0 is not labeled."""
  numbers = np.zeros(SHAPE, int)
  numbers[box(2, 2, 22, 18)] = 3 + 5 * 256 + 7 * 65536
  numbers[box(5, 5, 10, 10)] = 9
  numbers[box(15, 5, 18, 9)] = 256
  panoptic(raw, numbers, {3 + 5 * 256 + 7 * 65536: 1, 9: 7, 256: 7})
  found = {k: v for split in labels_of(built(tmp_path), raw).values() for k, v in split.items()}
  layers = [(box(2, 2, 22, 18), 0), (box(5, 5, 10, 10), 1), (box(15, 5, 18, 9), 1)]
  np.testing.assert_array_equal(found["a.png"], painted(*layers))
  np.testing.assert_array_equal(found["b.png"], painted())
  panoptic(raw, numbers, {3 + 5 * 256 + 7 * 65536: 1, 9: 7})
  with pytest.raises(InputError, match=r"a\.png: expected the segments in panoptic\.json, got 256"):
    labels_of(built(tmp_path), raw)
  panoptic(raw, numbers, {"x": 1})
  with pytest.raises(InputError, match=r"numbers as ids in segments_info of 'a\.png', got {'id':"):
    built(tmp_path).examples(raw)
  panoptic(raw, numbers, {9: 2})
  with pytest.raises(
    InputError, match="the category_id of annotation 9 among the ids that the file"
  ):
    built(tmp_path).examples(raw)
  panoptic(raw, numbers, {9: 7})
  (raw / "annotations/panoptic/a.png").unlink()
  with pytest.raises(
    InputError, match=r"panoptic/a\.png: expected the label of .*, got no such file"
  ):
    labels_of(built(tmp_path), raw)


@pytest.mark.parametrize(
  "name",
  [
    "sub\\b.jpg",
    "./sub/b.jpg",
    "../x/sub/b.jpg",
    "C:\\data\\sub\\b.jpg",
    "/x/y/b.jpg",
    "sub/b.JPG",
    # Of Label Studio: what was uploaded, and files on its disk.
    "https://host:8080/data/upload/1/b.jpg",
    "/data/local-files/?d=b.jpg",
    "/data/local-files/?d=s%75b/%62.jpg",
  ],
)
def test_names_of_other_systems_and_machines(name, raw, tmp_path):
  for file in ("a.jpg", "sub/b.jpg"):
    picture(raw / "images" / file)
  write_json(raw / "x.json", coco({1: "a.jpg", 2: name}, [of_image(1, 1, [corners(0, 0, 9, 9)])]))
  files = [e.image.name for split in built(tmp_path).examples(raw).values() for e in split]
  assert sorted(files) == ["a.jpg", "b.jpg"]


def test_sizes_are_read_where_the_file_has_none_and_upright(raw, tmp_path):
  tall = SHAPE[::-1]
  content = coco({1: "a.jpg", 2: "b.jpg"}, [of_image(1, 1, rle(np.ones(tall, bool), True))])
  for image in content["images"]:
    del image["height"], image["width"]
    picture(raw / image["file_name"], orientation=6)
  write_json(raw / "x.json", content)
  found = [label for split in labels_of(built(tmp_path), raw).values() for label in split.values()]
  assert [label.shape for label in found] == [tall, tall]


@pytest.mark.parametrize(("height", "width"), [("20", "30"), (20.0, 30), (20, "30")])
def test_sizes_that_are_no_integers(height, width, raw, tmp_path):
  content = changed(lambda c: [i.update(height=height, width=width) for i in c["images"]])
  for name in "ab":
    picture(raw / f"{name}.jpg", shape=(10, 15))  # of half the size
  write_json(raw / "x.json", content)
  with pytest.raises(InputError, match=r"expected a label of its image's size, 15x10 .* got 30x20"):
    labels_of(built(tmp_path), raw)


@pytest.mark.parametrize("side", ["", "20px", 20.5, 0, -20, True, [20], float("nan"), "9" * 5000])
def test_sizes_that_are_no_numbers(side, raw, tmp_path):
  write_json(raw / "x.json", changed(lambda c: c["images"][0].update(width=side)))
  with pytest.raises(
    InputError, match=r"x\.json, a\.jpg: expected height and width in pixels, got 2"
  ):
    built(tmp_path).examples(raw)


def changed(change):
  """A small valid file with a change."""
  content = coco({1: "a.jpg", 2: "b.jpg"}, [of_image(1, 1, [corners(0, 0, 9, 9)])])
  change(content)
  return content


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda c: c.pop("categories"), "with the lists images, annotations, categories, got info"),
    (lambda c: c["images"].append(c["images"][0]), "images of different ids, got 1 twice"),
    (lambda c: c["categories"].append({"id": 1, "name": "x"}), "categories of different ids"),
    (lambda c: c["categories"].clear(), "expected 1 to 65535 classes in the categories, got 0"),
    (lambda c: c["categories"][0].pop("name"), "expected name in every entry of categories, got"),
    (lambda c: c["categories"][0].update(name=" "), "name for every class, got an empty one"),
    (lambda c: c["annotations"][0].update(category_id=2), "the category_id of annotation 0 among"),
    (lambda c: c["annotations"][0].update(image_id="1"), "file lists, got '1'; correct it or"),
    (lambda c: c["annotations"][0].update(segments_info=[]), "expected file_name in every entry"),
    (lambda c: c["annotations"][0].update(segmentation=[], bbox=[0, 0, 3, 3]),
     "got 1 annotations that are boxes only; export the masks"),
    (lambda c: c["annotations"][0].update(segmentation=[[0, 0, 1, 0, 1, 1, 0, 0.5]]),
     "x.json: expected corners of polygons in pixels, got 1 polygons with all corners in 0…1"),
    (lambda c: c["images"][1].update(file_name="c.jpg"), "c.jpg: expected this image of x.json"),
  ],
)  # fmt: skip
def test_what_is_refused(change, message, raw, tmp_path):
  for name in "ab":
    picture(raw / f"{name}.jpg")
  write_json(raw / "x.json", changed(change))
  with pytest.raises(InputError, match=message) as caught:
    built(tmp_path).examples(raw)
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
  ("segmentation", "message"),
  [
    ([[0, 0, 1e9, 0, 5, 5]], "corners far outside"),
    ([[0, 0, 5, 0, 5, 5, 3]], "7 numbers in place of pairs"),
    ([0, 0, 5, 0, 5, 5], "in place of pairs"),
    ([["a", 0, 5, 0, 5, 5]], "could not convert"),
    (rle(box(0, 0, 3, 3, (9, 9)), True), r"a mask on \[9, 9\]"),
    ({"size": [*SHAPE], "counts": [3, 4]}, "run lengths of 7 of 600 pixels"),
    ({"counts": [3, 4]}, "KeyError"),
  ],
)
def test_masks_that_are_refused_when_they_are_read(segmentation, message, raw, tmp_path):
  for name in "ab":
    picture(raw / f"{name}.jpg")
  write_json(raw / "x.json", coco({1: "a.jpg", 2: "b.jpg"}, [of_image(1, 1, segmentation)]))
  with pytest.raises(InputError, match=f"annotation 0 of a.jpg as RLE .*{message}"):
    labels_of(built(tmp_path), raw)


def test_images_of_another_size_than_the_file_says(raw, tmp_path):
  for name in "ab":
    picture(raw / f"{name}.jpg", shape=(10, 15))
  write_json(raw / "x.json", changed(lambda c: None))
  with pytest.raises(InputError, match=r"expected a label of its image's size, 15x10 .* got 30x20"):
    labels_of(built(tmp_path), raw)


def test_missing_images_may_be_left_out(raw, tmp_path, capsys):
  coco_tree(raw)
  (raw / "train2017/a.jpg").unlink()
  (raw / "train2017/empty.jpg").unlink()
  message = r"a.jpg: .* got one in a folder of another split; .*; the same for 1 more: empty.jpg$"
  with pytest.raises(InputError, match=message):
    built(tmp_path).examples(raw)
  splits = built(tmp_path, allow_partial=True).examples(raw)
  assert [e.id for e in splits["train"]] == ["sub/b.jpg"]
  assert "left out: a.jpg: expected this image" in capsys.readouterr().out


def test_files_that_are_no_annotations(raw, tmp_path):
  raw.mkdir()
  with pytest.raises(InputError, match=r"expected COCO's annotations as \*.json here or in"):
    built(tmp_path).examples(raw)
  (raw / "x.json").write_text("{")
  with pytest.raises(InputError, match=r"x.json: expected COCO's annotations as JSON, got JSONDec"):
    built(tmp_path).examples(raw)
  (raw / "x.json").write_text(json.dumps([1]))
  with pytest.raises(InputError, match="categories, got list; move"):
    built(tmp_path).examples(raw)


def test_one_of_two_files_says_its_split(raw, tmp_path):
  for name, file in (("a", "train.json"), ("b", "more.json")):
    picture(raw / f"{name}.jpg")
    write_json(raw / file, coco({1: f"{name}.jpg"}, [of_image(1, 1, [corners(0, 0, 9, 9)])]))
  with pytest.raises(InputError, match=r"images in train and val or none, got also .*more.json"):
    built(tmp_path).examples(raw)


def test_images_in_folders_named_like_the_files(raw, tmp_path):
  for split in ("train", "val"):
    picture(raw / split / "a.jpg")
    content = coco({1: "a.jpg"}, [of_image(1, 1, [corners(0, 0, 9, 9)])])
    write_json(raw / f"{split}.json", content)
  splits = built(tmp_path).examples(raw)
  assert [raws[0].image.parent.name for raws in splits.values()] == ["train", "val"]


def test_two_images_that_may_be_meant(raw, tmp_path):
  for folder in "xy":
    picture(raw / folder / "a.jpg")
  picture(raw / "b.jpg")
  write_json(raw / "x.json", changed(lambda c: None))
  with pytest.raises(InputError, match=r"expected one file a.jpg, got .*x/a.jpg and .*y/a.jpg;"):
    built(tmp_path).examples(raw)


def test_categories_of_one_name_are_one_class(raw, tmp_path, capsys):
  for name in "ab":
    picture(raw / f"{name}.jpg")
  content = changed(lambda c: c["categories"].append({"id": 9, "name": "cat "}))
  write_json(raw / "x.json", content)
  builder = built(tmp_path)
  builder.examples(raw)
  assert builder.classes.names == ("cat", "dog")
  assert "categories that have the name of another, and are its class: 1" in capsys.readouterr().out
