"""YOLO's text files as training data: every way of data.yaml, and what is refused."""

import numpy as np
import pytest

from data_pipelines.sources.yolo_seg import YoloSeg
from rpn_jax.base.errors import InputError
from tests.data_pipelines.raw_annotations import (
  SHAPE,
  box,
  corners,
  labels_of,
  painted,
  picture,
  same,
  text,
  yolo_line,
  yolo_tree,
)

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
NAMES = "names:\n  0: cat\n  1: dog"


def built(tmp_path, background=None):
  builder = YoloSeg(data_dir=tmp_path)
  builder.background = background
  return builder


@pytest.mark.parametrize(
  ("yaml", "images"),
  [
    (f"path: .\ntrain: images/train\nval: images/val\n{NAMES}", "images/{split}"),
    # Roboflow's: the paths lead out of the folder that the file is in.
    ("train: ../train/images\nval: ../val/images\nnc: 2\nnames: ['cat', 'dog']", "{split}/images"),
    ("path: ../datasets/mine\ntrain: [train/images]\nvalidation: val/images\nnames: [cat, dog]",
     "{split}/images"),
    ("nc: 2\nnames: [cat, dog]", "images/{split}"),  # supervision's
    (f"path: C:\\data\ntrain: images\\train\nval: images/val/\n{NAMES}", "images/{split}"),
    # Roboflow names a folder of images for tests where there is none, and in Colab whole paths.
    ("train: ../train/images\nval: ../val/images\ntest: ../test/images\nnames: [cat, dog]",
     "{split}/images"),
    ("train: /content/x-1/train/images\nval: C:\\x\\val\\images\\\nnames: [cat, dog]",
     "{split}/images"),
  ],
)  # fmt: skip
def test_ways_of_data_yaml(yaml, images, tmp_path):
  expected = yolo_tree(tmp_path / "raw", yaml, images)
  builder = built(tmp_path)
  same(labels_of(builder, tmp_path / "raw"), expected)
  assert builder.classes.names == ("cat", "dog")


def test_names_in_a_list_of_their_own(tmp_path, capsys):
  """Label Studio's export."""
  raw = tmp_path / "raw"
  expected = yolo_tree(raw, "", "images/{split}")
  (raw / "data.yaml").unlink()
  (raw / "classes.txt").write_text("cat\ndog")
  text(raw / "notes.json", "{}")
  builder = built(tmp_path)
  same(labels_of(builder, raw), expected)
  assert builder.classes.names == ("cat", "dog")
  assert "classes.txt: names no train or val, so that all images" in capsys.readouterr().out


def test_names_that_are_numbers(tmp_path):
  """ultralytics takes str() of what YAML reads; names are kept as they are written."""
  raw = tmp_path / "raw"
  yolo_tree(raw, "train: images/train\nval: images/val\nnames: [7, 007, 12:30, '2.50']")
  builder = built(tmp_path)
  builder.examples(raw)
  assert builder.classes.names == ("7", "007", "12:30", "2.50")


def test_absolute_paths(tmp_path):
  raw = tmp_path / "raw"
  expected = yolo_tree(raw, f"path: {raw}\ntrain: {raw}/images/train\nval: images/val\n{NAMES}")
  same(labels_of(built(tmp_path), raw), expected)


def test_lists_of_images(tmp_path):
  raw = tmp_path / "raw"
  expected = yolo_tree(raw, f"train: train.txt\nval: val.txt\n{NAMES}")
  text(raw / "train.txt", "./images/train/a.jpg", "", "images\\train\\b.jpg")
  text(raw / "val.txt", "/home/x/images/val/a.jpg", f"{raw}/images/val/b.jpg")
  same(labels_of(built(tmp_path), raw), expected)
  text(raw / "train.txt", "data/images/train/a.jpg", "data/images/train/b.jpg")  # datumaro's
  same(labels_of(built(tmp_path), raw), expected)
  text(raw / "val.txt", "./images/val/c.jpg")
  with pytest.raises(
    InputError, match=r"val\.txt: expected the image \./images/val/c\.jpg, got no"
  ):
    built(tmp_path).examples(raw)


def test_a_background_and_no_val(tmp_path):
  raw = tmp_path / "raw"
  expected = yolo_tree(raw, f"train: images\n{NAMES}")
  found = labels_of(built(tmp_path, "rest"), raw)
  assert len(found["val"]) == 1 and len(found["train"]) == 3
  for label in (label for split in found.values() for name, label in split.items() if "a" in name):
    known = expected["train"]["images/train/a.jpg"]
    if label.max():
      np.testing.assert_array_equal(label, np.where(known == 255, 0, known + 1))


def test_images_without_label_files_have_no_objects(tmp_path, capsys):
  raw = tmp_path / "raw"
  yolo_tree(raw, f"train: images/train\nval: images/val\n{NAMES}")
  (raw / "labels/train/b.txt").unlink()
  found = labels_of(built(tmp_path), raw)
  np.testing.assert_array_equal(found["train"]["images/train/b.jpg"], painted())
  assert (
    "images without a label file, and so without objects: 1 of 4, such as"
    in capsys.readouterr().out
  )
  for path in (raw / "labels").rglob("*.txt"):
    path.unlink()
  with pytest.raises(InputError, match=r"labels/train/a\.txt: expected the labels of .* any of 4"):
    built(tmp_path).examples(raw)


def test_labels_beside_images_and_the_last_folder_of_images(tmp_path):
  raw = tmp_path / "images" / "raw"  # a folder above has the name, too
  for name in ("a", "b"):
    picture(raw / f"x/{name}.jpg")
    text(raw / f"x/{name}.txt", yolo_line(0, *corners(0, 0, 5, 5)))
    picture(raw / f"images/images/{name}.jpg")
    text(raw / f"images/labels/{name}.txt", yolo_line(0, *corners(0, 0, 5, 5)))
  text(raw / "data.yaml", "train: images", "val: images", "names: [cat]")
  found = labels_of(built(tmp_path), raw)
  for label in found["train"].values():
    np.testing.assert_array_equal(label, painted((box(0, 0, 5, 5), 0)))


def test_images_in_both_splits_are_told(tmp_path, capsys):
  raw = tmp_path / "raw"
  yolo_tree(raw, f"train: images/train\nval: images/train\n{NAMES}")
  built(tmp_path).examples(raw)
  assert "images in train and in val: 2, such as" in capsys.readouterr().out


def test_an_image_on_its_side(tmp_path):
  """ultralytics, too, takes the corners as shares of the image that its EXIF data turns."""
  raw, tall = tmp_path / "raw", SHAPE[::-1]
  for split in ("train", "val"):
    picture(raw / f"images/{split}/a.jpg", orientation=6)
    line = yolo_line(0, *corners(2, 3, 12, 23), shape=tall)
    text(raw / f"labels/{split}/a.txt", line)
  text(raw / "data.yaml", "train: images/train", "val: images/val", "names: [cat]")
  label = painted((box(2, 3, 12, 23, tall), 0), shape=tall)
  np.testing.assert_array_equal(labels_of(built(tmp_path), raw)["val"]["images/val/a.jpg"], label)


def test_corners_at_and_just_beyond_the_edges(tmp_path):
  raw = tmp_path / "raw"
  yolo_tree(raw, f"train: images/train\nval: images/val\n{NAMES}")
  text(raw / "labels/val/a.txt", "0.0 -0.005 0 1.005 0 1 1 0 1")
  label = labels_of(built(tmp_path), raw)["val"]["images/val/a.jpg"]
  np.testing.assert_array_equal(label, np.zeros(SHAPE))


@pytest.mark.parametrize(
  ("line", "message"),
  [
    ("0 0.5 0.5 0.1 0.1", "line 2: expected a class index and at least 3 corners x y, got a box;"),
    ("0 0.1 0.1 0.2 0.2 0.3 0.3 0.4", "at least 3 corners x y, got '0 0.1"),
    ("0 0.1 0.1 0.2", "at least 3 corners x y, got '0 0.1"),
    ("cat 0.1 0.1 0.2 0.2 0.3 0.3", "at least 3 corners x y, got 'cat 0.1"),
    ("0 0.1 0.1 0.2 0.2 nan 0.3", "at least 3 corners x y, got"),
    ("2 0.1 0.1 0.2 0.2 0.3 0.3", "a class index of 0…1, as many as data.yaml has names, got 2"),
    ("-1 0.1 0.1 0.2 0.2 0.3 0.3", "a class index of 0…1, .* got -1"),
    ("0 10 10 20 20 30 30", "expected corners in 0…1, shares of width and height, got 10…30"),
  ],
)
def test_lines_that_are_refused(line, message, tmp_path):
  raw = tmp_path / "raw"
  yolo_tree(raw, f"train: images/train\nval: images/val\n{NAMES}")
  text(raw / "labels/val/a.txt", yolo_line(0, *corners(0, 0, 5, 5)), line)
  with pytest.raises(InputError, match=rf"labels/val/a\.txt, {'.*' + message}") as caught:
    labels_of(built(tmp_path), raw)
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
  ("yaml", "message"),
  [
    ("train: images/train", "expected names, train and val, got no names"),
    ("- a", "got no names"),
    ("names: [a\n  b: {", "expected YAML with names, train and val, got"),
    ("names: {1: a, 2: b}\ntrain: images/train", "every index from 0 to 1, got none for 0"),
    ("names: [a, [b]]\ntrain: images/train", "expected names as a list or as a table of indices"),
    ("names: [yes, no]\ntrain: images/train", "name of class 0 as text, got what .* as True; put"),
    ("names: [a, 2.50]\ntrain: images/train", "name of class 1 as text, got what .* as 2.5; put"),
    ("names: {0: a, 1: ~}\ntrain: images/train", "class 1 as text, .* None; put the name in"),
    ("names: [2020-01-01]\ntrain: images/train", "class 0 as text, got what YAML reads as dateti"),
    ("names: [a, a]\ntrain: images/train", "expected different names, got 'a' twice"),
    ("names: [a]\nnc: 2\ntrain: images/train", "as many names as nc says, got nc 2 and 1 names"),
    ("names: [a, b]\ntest: images", "expected train and val, folders or lists of images, or im"),
    ("names: [a, b]\ntrain: images/no", "list of images at train: images/no, got nothing at"),
    ("names: [a, b]\ntrain: labels/train", "expected the train images, got none"),
  ],
)  # fmt: skip
def test_yaml_that_is_refused(yaml, message, tmp_path):
  raw = tmp_path / "raw"
  yolo_tree(raw, yaml)
  with pytest.raises(InputError, match=message) as caught:
    built(tmp_path).examples(raw)
  assert "\n" not in str(caught.value)


def test_no_or_two_files(tmp_path):
  with pytest.raises(InputError, match=r"expected one YAML file .* as data\.yaml, got none"):
    built(tmp_path).examples(tmp_path)
  yolo_tree(tmp_path, f"train: images/train\nval: images/val\n{NAMES}")
  text(tmp_path / "hyp.yaml", "lr: 1")
  assert built(tmp_path).examples(tmp_path)  # of several that of the usual name
  (tmp_path / "data.yaml").rename(tmp_path / "mine.yaml")
  with pytest.raises(InputError, match=r"got hyp\.yaml and mine\.yaml; name it data\.yaml"):
    built(tmp_path).examples(tmp_path)
