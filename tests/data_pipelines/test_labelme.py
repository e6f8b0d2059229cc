"""labelme's folders as training data: shapes of every kind and version, and what is refused."""

import base64
import json

import numpy as np
import pytest

from data_pipelines.sources.labelme import Labelme
from rpn_jax.base.errors import InputError
from tests.data_pipelines.raw_annotations import (
  NO,
  SHAPE,
  box,
  labelme,
  labels_of,
  painted,
  picture,
  png_text,
  points,
  shape,
)

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
BIG, SMALL = (2, 2, 22, 18), (5, 5, 10, 10)


def built(tmp_path, background=None):
  builder = Labelme(data_dir=tmp_path)
  builder.background = background
  return builder


def label_of(tmp_path, shapes, background=None, **more):
  """The label of one image with some shapes, beside another with classes a and b."""
  raw = tmp_path / "raw"
  picture(raw / "a.jpg")
  picture(raw / "b.jpg")
  both = [shape(name, "polygon", points(0, 0, 3, 3)) for name in "ab"]
  labelme(raw / "b.json", both, "b.jpg")
  labelme(raw / "a.json", shapes, **more)
  splits = labels_of(built(tmp_path, background), raw)
  return {name: label for split in splits.values() for name, label in split.items()}["a"]


def disk(x, y, radius):
  rows, columns = np.mgrid[: SHAPE[0], : SHAPE[1]] + 0.5
  return (rows - y) ** 2 + (columns - x) ** 2 <= radius**2


def test_shapes_of_every_kind(tmp_path, capsys):
  stored = np.zeros((4, 5), np.uint8)
  stored[1:3] = 255
  placed = np.zeros(SHAPE, bool)
  placed[17:19, 24:29] = True
  cut = np.zeros(SHAPE, bool)
  cut[0, 0:3] = True
  shapes = [
    shape("a", "rectangle", [[22, 18], [2, 2]]),  # dragged from the lower right
    shape("b", "polygon", points(*SMALL)),
    shape("b", "circle", [[15, 10], [18, 10]], group_id=3, flags={"sure": True}),
    shape("b", "mask", [[24, 16], [28, 19]], mask=png_text(stored)),
    shape("a", "mask", [[-2, -2], [2, 1]], mask=png_text(stored)),
    shape("b", "oriented_rectangle", [[24, 2], [27, 2], [27, 5], [24, 5]]),
    # X-AnyLabeling's
    shape("b", "rotation", [[24, 7], [27, 7], [27, 9], [24, 9]], direction=0.0),
    shape("b", "rectangle", [[24, 11], [27, 11], [27, 13], [24, 13]], difficult=False),
  ]
  expected = painted(
    (box(*BIG), 0), (disk(15, 10, 3), 1), (box(*SMALL), 1), (placed, 1), (cut, 0),
    (box(24, 2, 27, 5), 1), (box(24, 7, 27, 9), 1), (box(24, 11, 27, 13), 1),
  )  # fmt: skip
  np.testing.assert_array_equal(label_of(tmp_path, shapes), expected)
  assert "have no area" not in capsys.readouterr().out


def test_lines_and_points_are_drawn_wide(tmp_path, capsys):
  shapes = [
    shape("a", "line", [[5, 5], [25, 5]]),
    shape("a", "linestrip", [[5, 5], [25, 5], [25, 8]]),
    shape("b", "point", [[15, 15]]),
  ]
  label = label_of(tmp_path, shapes)
  assert np.sum(label[:, 10] == 0) == 10 and label[5, 2] == NO
  np.testing.assert_array_equal(label == 1, disk(15, 15, 5) & (label != 0))
  assert (
    "lines and points, which have no area, are drawn 10 pixels wide, as labelme does: 3"
    in capsys.readouterr().out
  )


def test_older_versions(tmp_path):
  """3.x has no kinds and no sizes, and colors; 4 and 5 have no descriptions or masks."""
  raw = tmp_path / "raw"
  picture(raw / "a.jpg")
  picture(raw / "b.jpg")
  old = {"label": "a", "line_color": None, "fill_color": None, "points": points(*BIG)}
  path = labelme(raw / "a.json", [old], version="3.16.2", lineColor=[0, 255, 0, 128])
  content = json.loads(path.read_text())
  del content["imageHeight"], content["imageWidth"]
  path.write_text(json.dumps(content))
  newer = {"label": "b", "points": points(*SMALL), "shape_type": "polygon", "group_id": None}
  labelme(raw / "b.json", [newer | {"flags": {}}], "b.jpg", version="4.5.6", imageHeight=None)
  found = {k: v for s in labels_of(built(tmp_path), raw).values() for k, v in s.items()}
  np.testing.assert_array_equal(found["a"], painted((box(*BIG), 0)))
  np.testing.assert_array_equal(found["b"], painted((box(*SMALL), 1)))


@pytest.mark.parametrize(("height", "width"), [("20", "30"), (20.0, 30)])
def test_sizes_that_are_no_integers(height, width, tmp_path):
  raw = tmp_path / "raw"
  for name in "ab":
    picture(raw / f"{name}.jpg", shape=(10, 15))  # of half the size
    shapes = [shape("a", "polygon", points(*SMALL))]
    labelme(raw / f"{name}.json", shapes, f"{name}.jpg", imageHeight=height, imageWidth=width)
  with pytest.raises(InputError, match=r"expected a label of its image's size, 15x10 .* got 30x20"):
    labels_of(built(tmp_path), raw)


@pytest.mark.parametrize("side", ["", 30.5, 0, True])
def test_sizes_that_are_no_numbers(side, tmp_path):
  with pytest.raises(InputError, match=r"a\.json: expected height and width in pixels, got 20 and"):
    label_of(tmp_path, [shape("a", "polygon", points(*SMALL))], imageWidth=side)


def test_background_and_ignored_shapes(tmp_path):
  shapes = [
    shape("a", "polygon", points(*BIG)),
    shape("_background_", "polygon", points(*SMALL)),  # a hole
    shape("__ignore__", "polygon", points(15, 5, 18, 8)),
  ]
  ring = painted((box(*BIG), 0), (box(*SMALL), NO), (box(15, 5, 18, 8), NO))
  np.testing.assert_array_equal(label_of(tmp_path, shapes), ring)
  filled = painted((box(*BIG), 1), (box(*SMALL), 0), (box(15, 5, 18, 8), NO), rest=0)
  np.testing.assert_array_equal(label_of(tmp_path, shapes, "rest"), filled)


def test_images_in_the_files(tmp_path):
  raw = tmp_path / "raw"
  for name in "ab":
    file = picture(tmp_path / f"{name}.jpg")
    data = base64.b64encode(file.read_bytes()).decode()
    shapes = [shape("cat", "polygon", points(*BIG))]
    labelme(raw / f"{name}.json", shapes, r"..\gone.jpg", imageData=data, imageWidth=None)
  builder = built(tmp_path)
  examples = [e for split in builder.examples(raw).values() for e in split]
  for example in examples:
    record = builder.read(example)
    assert record["image"] == (tmp_path / f"{example.id}.jpg").read_bytes()
    np.testing.assert_array_equal(record["label"], painted((box(*BIG), 0)))
  labelme(raw / "a.json", shapes, imageData="no base64!")
  with pytest.raises(InputError, match=r"a\.json: expected (an|a readable) image"):
    labels_of(built(tmp_path), raw)


def test_images_elsewhere(tmp_path, capsys):
  raw = tmp_path / "raw"
  picture(raw / "pictures/a.jpg")
  picture(raw / "pictures/b.jpg")
  picture(tmp_path / "beside/c.jpg")
  picture(raw / "json/train/d.jpg")
  picture(raw / "idle.jpg")
  shapes = [shape("cat", "polygon", points(*BIG))]
  labelme(raw / "json/train/a.json", shapes, "..\\..\\pictures\\a.jpg")
  labelme(raw / "json/train/b.json", shapes, "D:\\work\\b.jpg")
  labelme(raw / "json/train/c.json", shapes, "../../../beside/c.jpg")
  labelme(raw / "json/val/d.json", shapes, "../train/d.jpg")
  (raw / "json/other.json").write_text('{"a": 1}')
  splits = labels_of(built(tmp_path), raw)
  assert {s: [*found] for s, found in splits.items()} == {
    "train": [f"json/train/{name}" for name in "abc"],
    "val": ["json/val/d"],
  }
  told = capsys.readouterr().out
  assert "left out, as JSON files without shapes: 1, such as" in told and "other.json" in told
  assert "left out, as images without a JSON file: 1, such as" in told and "idle.jpg" in told


@pytest.mark.parametrize(
  ("made", "message"),
  [
    (
      shape("a", "points", [[1, 1]]),
      "kinds polygon, .*, got the label 'a' and the kind 'points' in entry 0",
    ),
    (shape(7, "polygon", points(*BIG)), "got the label 7 and the kind 'polygon'"),
    (shape(" ", "polygon", points(*BIG)), "got the label ' ' and"),
    ("polygon", "got the label None and the kind None in entry 0"),
    (shape("a", "polygon", [[1, 1], [2, 2]]), "as entry 0 of shapes, got ValueError .2 points of"),
    (shape("a", "circle", [[1, 1]]), "1 points of a circle"),
    (shape("a", "polygon", [[1, 1], [2, 2], [1e7, 3]]), "corners far outside"),
    (shape("a", "polygon", [[1, 1], [2, 2], [3]]), "as entry 0 of shapes, got ValueError"),
    (shape("a", "mask", points(*BIG)[:2], mask="zzz"), "as entry 0 of shapes, got"),
    (shape("a", "mask", points(*BIG)[:2]), "as entry 0 of shapes, got TypeError"),
  ],
)
def test_what_is_refused(made, message, tmp_path):
  with pytest.raises(InputError, match=rf"a\.json: expected .*{message}") as caught:
    label_of(tmp_path, [made])
  assert "\n" not in str(caught.value)


def test_a_list_of_labels(tmp_path):
  """labelme's own file has the two special names first, in its converters' order."""
  raw = tmp_path / "raw"
  for name in "ab":
    picture(raw / f"{name}.jpg")
    labelme(raw / f"{name}.json", [shape("cat", "polygon", points(*BIG))], f"{name}.jpg")
  (raw / "labels.txt").write_text("__ignore__\n_background_\ndog\ncat\n")
  builder = built(tmp_path)
  (label, _) = (x for split in labels_of(builder, raw).values() for x in split.values())
  assert builder.classes.names == ("dog", "cat")
  np.testing.assert_array_equal(label, painted((box(*BIG), 1)))
  labelme(raw / "a.json", [shape("cta", "polygon", points(*BIG))])
  with pytest.raises(InputError, match=r"a\.json: .* labels\.txt, got 'cta'; did you mean 'cat'\?"):
    builder.examples(raw)


def test_missing_images_and_files(tmp_path):
  raw = tmp_path / "raw"
  labelme(raw / "a.json", [shape("cat", "polygon", points(*BIG))])
  with pytest.raises(InputError, match=r"a\.json: expected its image 'a\.jpg', got no such file"):
    built(tmp_path).examples(raw)
  (raw / "a.json").write_text("{}")
  with pytest.raises(InputError, match=r"expected labelme's JSON files \(with shapes\), got none"):
    built(tmp_path).examples(raw)
