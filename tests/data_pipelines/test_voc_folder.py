"""VOC-style folders as training data: masks of indices and colors, class files, lists."""

import numpy as np
import pytest
from PIL import Image

from data_pipelines.sources.voc_folder import VocFolder
from rpn_jax.base.errors import InputError
from tests.data_pipelines.raw_annotations import (
  INDEX,
  NO,
  labels_of,
  picture,
  rgb_png,
  same,
  text,
  voc_tree,
)
from tests.data_pipelines.raw_pascal import gray_png

VOC_COLORS = {1: (128, 0, 0), 2: (0, 128, 0), 255: (224, 224, 192)}
OWN_COLORS = {1: (10, 20, 30), 2: (0, 0, 5), 255: (224, 224, 192)}
CVAT = ("# label:color_rgb:parts:actions", "background:0,0,0::", "dog:0,0,5::", "cat:10,20,30::")


def built(tmp_path, background=None, allow_partial=False):
  builder = VocFolder(data_dir=tmp_path)
  builder.background, builder.allow_partial = background, allow_partial
  return builder


@pytest.mark.parametrize(
  ("class_lines", "file", "colors", "masks"),
  [
    (("_background_", "cat", "dog"), "class_names.txt", None, "SegmentationClass"),
    (("__ignore__", "_background_", "cat", "dog"), "labels.txt", None, "SegmentationClassPNG"),
    (("background", "cat", "dog"), "names.txt", VOC_COLORS, "SegmentationClass"),
    (("Background", "cat", "dog"), "names.txt", None, "SegmentationClass"),
    (("cat", "dog"), "classes.txt", None, "SegmentationClass"),
    (("background:::", "cat:::", "dog:::"), "labelmap.txt", None, "SegmentationClass"),
  ],
)
def test_class_files_and_masks(class_lines, file, colors, masks, tmp_path, capsys):
  expected = voc_tree(tmp_path / "raw", class_lines, file, colors, masks)
  (tmp_path / "raw/SegmentationClass").mkdir(exist_ok=True)  # labelme's, of .npy files
  builder = built(tmp_path)
  same(labels_of(builder, tmp_path / "raw"), expected)
  assert builder.classes.names == ("cat", "dog")
  told = "lists no background, so that index 0 has no annotation and index 1 is 'cat'"
  assert (told in capsys.readouterr().out) == (file == "classes.txt")


def test_colors_of_a_label_map(tmp_path):
  """CVAT's order is that of the alphabet or of the task, not of any index."""
  expected = voc_tree(tmp_path / "raw", CVAT, "labelmap.txt", OWN_COLORS)
  swap = np.arange(256)
  swap[:2] = 1, 0
  expected = {s: {n: swap[label] for n, label in x.items()} for s, x in expected.items()}
  builder = built(tmp_path)
  same(labels_of(builder, tmp_path / "raw"), expected)
  assert builder.classes.names == ("dog", "cat")
  # The same colors in a palette, by indices of their own.
  image = Image.fromarray(np.where(INDEX == NO, 7, INDEX).astype(np.uint8), "P")
  palette = np.zeros((8, 3), np.uint8)
  palette[[1, 2, 7]] = (OWN_COLORS[1], OWN_COLORS[2], OWN_COLORS[255])
  image.putpalette(palette.tobytes())
  image.save(tmp_path / "raw/SegmentationClass/a.png")
  same(labels_of(built(tmp_path), tmp_path / "raw"), expected)


def test_a_background(tmp_path):
  for name, lines in (("one", ("background", "cat", "dog")), ("two", ("cat", "dog"))):
    raw = tmp_path / name
    voc_tree(raw, lines, "names.txt")
    builder = built(tmp_path, "background")
    label = labels_of(builder, raw)["val"]["c"]
    assert builder.classes.names == ("background", "cat", "dog")
    np.testing.assert_array_equal(label, INDEX)


def test_lists(tmp_path, capsys):
  raw = tmp_path / "raw"
  voc_tree(raw)
  lists = raw / "ImageSets/Segmentation"
  text(lists / "train.txt", "a.jpg", "sub\\b.png", "")  # as some tools write them
  text(lists / "test.txt", "c")
  (lists / "._train.txt").write_bytes(b"\0\5\x16\7\0\2\xff")  # as macOS puts beside others
  (raw / "JPEGImages/a.jpg").rename(raw / "JPEGImages/a.JPG")
  splits = built(tmp_path).examples(raw)
  assert {s: [e.id for e in x] for s, x in splits.items()} == {
    "train": ["a", "sub/b"],
    "val": ["c"],
  }
  assert "left out, as images for tests: 1, such as" in capsys.readouterr().out
  for path in lists.iterdir():
    path.unlink()
  text(lists / "default.txt", "a", "sub/b", "c")  # CVAT's, of a task without subsets
  by_default = built(tmp_path).examples(raw)
  (lists / "default.txt").unlink()
  by_masks = built(tmp_path).examples(raw)
  for splits in (by_default, by_masks):
    assert {s: len(x) for s, x in splits.items()} == {"train": 2, "val": 1}
  text(lists / "train.txt", "../a")
  with pytest.raises(
    InputError, match=r"train\.txt: expected names of images, got the path '\.\./a'"
  ):
    built(tmp_path).examples(raw)


def test_what_is_missing(tmp_path, capsys):
  raw = tmp_path / "raw"
  voc_tree(raw)
  (raw / "SegmentationClass/a.png").unlink()
  (raw / "JPEGImages/sub/b.jpg").unlink()
  message = r"a\.png: expected the mask of .*a\.jpg, .* the same for 1 more: .*sub/b\.\*$"
  with pytest.raises(InputError, match=message):
    built(tmp_path).examples(raw)
  picture(raw / "JPEGImages/sub/b.jpg")
  splits = built(tmp_path, allow_partial=True).examples(raw)
  assert [e.id for e in splits["train"]] == ["sub/b"]
  assert "left out: " in capsys.readouterr().out
  for folder, message in (
    ("JPEGImages", "JPEGImages: expected the images, got no such folder; export them with"),
    ("SegmentationClass", "expected masks as PNG here or in SegmentationClassPNG, got none"),
    ("class_names.txt", "expected the class names in labelmap.txt or class_names.txt or"),
  ):
    (raw / folder).rename(raw / "away")
    with pytest.raises(InputError, match=message):
      built(tmp_path).examples(raw)
    (raw / "away").rename(raw / folder)


@pytest.mark.parametrize(
  ("lines", "message"),
  [
    (("a:0,0,0::", "b"), "the color of every class behind its name, as in 'a:0,0,0::', or of none"),
    (("a:0,0,0::", "b:0,0,0::"), "a different color in every line, got '0,0,0' in lines 1 and 2"),
    (("a:0,0,0::", "b:0,0,256::"), "expected colors of 0…255, got 0,0,256"),
    (("a:0,0,0::", "a:0,0,1::"), "a different name in every line, got 'a' in lines 1 and 2"),
    (("# nothing",), "got an empty file"),
    (("background:0,0,0::",), "expected 1 to 65535 classes in the class file, got 0"),
  ],
)
def test_class_files_that_are_refused(lines, message, tmp_path):
  voc_tree(tmp_path, lines, "labelmap.txt")
  with pytest.raises(InputError, match=message) as caught:
    built(tmp_path).examples(tmp_path)
  assert "\n" not in str(caught.value)


def test_no_class_has_the_index_of_no_class(tmp_path):
  names = [f"class {i}" for i in range(255)]
  voc_tree(tmp_path, names[:-1])
  assert len(built(tmp_path).examples(tmp_path)["train"]) == 2
  voc_tree(tmp_path, names)
  message = "at most 255 names, with the background, since index 255 is no class, got 256; use"
  with pytest.raises(InputError, match=message):
    built(tmp_path).examples(tmp_path)
  voc_tree(tmp_path, [f"{name}:0,1,{i}::" for i, name in enumerate(names)], "labelmap.txt")
  assert len(built(tmp_path).examples(tmp_path)["train"]) == 2


@pytest.mark.parametrize(
  "lines",
  [
    ("cat", "background", "dog"),
    ("__ignore__", "cat", "Background"),
    ("_background_", "background", "cat"),
  ],
)
def test_a_background_that_is_not_first(lines, tmp_path):
  voc_tree(tmp_path, lines, "names.txt")
  message = r"names\.txt: expected the background as name 1, .* got '[bB]ackground' as name 2; move"
  with pytest.raises(InputError, match=message):
    built(tmp_path).examples(tmp_path)


def test_masks_that_are_refused(tmp_path):
  voc_tree(tmp_path)
  mask = tmp_path / "SegmentationClass/c.png"

  def refused(message):
    with pytest.raises(InputError, match=message) as caught:
      labels_of(built(tmp_path), tmp_path)
    assert "\n" not in str(caught.value)

  gray_png(mask, np.where(INDEX == 2, 3, INDEX))
  refused(r"expected indices 0…2 of class_names\.txt, or 255, got 3; write the missing names")
  rgb_png(mask, {**VOC_COLORS, 2: (1, 2, 3)})
  refused(
    r"expected colors of class_names\.txt, got others, such as 1,2,3, 1 in all, on 25 of 600 pixels"
  )
  Image.fromarray(np.arange(1800).reshape(20, 30, 3).astype(np.uint8)).save(mask)
  refused(
    r"got others, such as 0,1,2, 256 in all, on 600 of 600 pixels; .* export the masks without smoo"
  )
