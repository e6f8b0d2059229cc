"""Annotations of one's own through the command: reports, backgrounds, changes, training."""

import itertools
import json
import pathlib
import re
import shlex

import numpy as np
import pytest
from PIL import Image

from configs import folder as folder_config
from data_pipelines import datasets, prepare, raw_files, records, registry
from data_pipelines.sources.builder import RawExample
from data_pipelines.sources.own_data import one_in_ten, split_of
from rpn_jax.base import pixels
from rpn_jax.base.errors import InputError
from rpn_jax.tasks import model_card
from tests import ROOT
from tests.data_pipelines import raw_annotations as raws
from tests.data_pipelines.raw_annotations import box, corners, labelme, points, shape
from tests.data_pipelines.raw_pascal import gray_png, rle

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
YAML = "train: images/train\nval: images/val\nnames: [cat, dog]"


@pytest.fixture(autouse=True)
def _no_preview(monkeypatch):
  monkeypatch.setattr(prepare.preview, "draw", lambda *args: None)  # takes a second


def labelme_tree(root):
  """The same two classes in a folder of each split."""
  for split in ("train", "val"):
    raws.picture(root / split / "a.jpg")
    shapes = [shape("cat", "polygon", points(2, 2, 22, 18))]
    shapes += [shape("dog", "polygon", points(5, 5, 10, 10))]
    labelme(root / split / "a.json", shapes)


MAKE = {
  "coco_json": raws.coco_tree,
  "labelme": labelme_tree,
  "yolo_seg": lambda root: raws.yolo_tree(root, YAML),
  "voc_folder": raws.voc_tree,
}


def run(name, raw, data_dir, *more):
  return prepare.main([name, f"--manual_dir={raw}", f"--data_dir={data_dir}", "--config=x", *more])


def few_images(root):
  """A folder of two images to train on and one to evaluate on."""
  for name in ("train/a", "train/b", "val/a"):
    raws.picture(root / f"images/{name}.jpg")
    gray_png(root / f"labels/{name}.png", raws.INDEX)
  raws.text(root / "names.txt", "floor", "cat", "dog")
  return root


def opened(name, data_dir, setting="supervised", **changes):
  config = folder_config.get_config(f"runlocal,{setting}").unlock()
  config.data.update(name=name, data_dir=str(data_dir), variant="x", crop=32, short_side=20)
  config.data.update(scale=(128, 32), mean=pixels.CLIP_MEAN, std=pixels.CLIP_STD, batch_size=1)
  config.data.update(changes)
  return datasets.load(config)


def test_model_cards_call_them_by_the_name_they_were_prepared_under():
  own = [name for name, row in registry.DATA_SETS.items() if row.classes is None]
  assert tuple(own) == model_card.OWN_DATA == ("folder", *MAKE)


@pytest.mark.parametrize("name", MAKE)
def test_from_the_command_to_batches(name, tmp_path, capsys):
  raw = tmp_path / "raw"
  MAKE[name](raw)
  (raw / "unseen.txt").write_text("dog\n")
  assert run(name, raw, tmp_path) == 0
  out = capsys.readouterr().out
  assert "pixels without annotation have no class; --background=NAME gives them one" in out
  line = f"--config=configs/folder.py --config.data.name={name} --config.data.variant=x"
  assert out.splitlines()[-1] == f"to train on it: {line}"
  data = opened(name, tmp_path, "zero_shot")
  assert [data.names[i] for i in data.unseen] == ["dog"]
  assert set(np.unique(next(data.train_batches(0))["label"])) <= {*range(len(data.trained)), 255}
  assert {0, 255} <= set(np.unique(next(iter(data.eval_examples()))["label"]))
  assert run(name, raw, tmp_path) == 0
  assert "already prepared: " in capsys.readouterr().out
  summary = json.loads((records.prepared_folder(name, tmp_path, "x") / "summary.json").read_text())
  assert summary["classes_missing"] == ["bird"] * (name == "coco_json")
  assert summary["background"] is None


def test_the_commands_of_the_page(tmp_path, monkeypatch, capsys):
  """docs/data.md: one for each form, as written."""
  page = (ROOT / "docs/data.md").read_text()
  found = re.findall(rf"^python -m data_pipelines\.prepare ((?:{'|'.join(MAKE)}) .*)$", page, re.M)
  assert len(found) == len(MAKE)
  monkeypatch.chdir(tmp_path)
  for words in map(shlex.split, found):
    MAKE[words[0]](tmp_path / words[1].removeprefix("--manual_dir="))
    assert prepare.main(words) == 0
    assert (tmp_path / "data" / words[0] / "mine/1.0.0/dataset_info.json").exists()
  assert "pixels without annotation are of the class 'background'" in capsys.readouterr().out


def test_a_background_is_kept(tmp_path, capsys):
  raw = tmp_path / "raw"
  raws.yolo_tree(raw, YAML)
  assert run("yolo_seg", raw, tmp_path, "--background=floor") == 0
  out = capsys.readouterr().out
  assert (
    "pixels without annotation are of the class 'floor'" in out and "to learn nothing" not in out
  )
  assert opened("yolo_seg", tmp_path).names == ("floor", "cat", "dog")
  assert run("yolo_seg", raw, tmp_path, "--background=floor") == 0
  capsys.readouterr()
  for more, got in (([], "none"), (["--background=dog"], "dog")):
    assert run("yolo_seg", raw, tmp_path, *more) == 2
    error = capsys.readouterr().err
    assert f"was prepared with --background=floor, got {got}; use the same" in error
  assert run("yolo_seg", raw, tmp_path, "--rebuild") == 0
  assert opened("yolo_seg", tmp_path).names == ("cat", "dog")


def test_a_set_without_one_of_the_splits(tmp_path):
  """What it lacks, and what to do, in terms of the set; one of train alone can hold images out."""
  for split, other in (("train", "val"), ("val", "train")):
    raw = tmp_path / split / "raw"
    folder = prepare.prepare("folder", few_images(raw), tmp_path / split, config="x")
    path = folder / "dataset_info.json"  # as an earlier version left a folder of train alone
    info = json.loads(path.read_text())
    info["splits"] = [entry for entry in info["splits"] if entry["name"] == split]
    path.write_text(json.dumps(info))
    data = opened("folder", tmp_path / split)
    message = (
      rf"expected images to \w+ on \({other}\), got a set that has only {split}; add some to"
    )
    with pytest.raises(InputError, match=message):
      data.eval_examples() if other == "val" else next(data.train_batches(0))
  assert len(opened("folder", tmp_path / "train", held_out=0.5).eval_examples()) == 1


def test_the_report_tells_of_empty_images_and_of_a_single_class(tmp_path, capsys):
  raw = tmp_path / "raw"
  raws.yolo_tree(raw, YAML.replace("[cat, dog]", "[cat]"))
  for split in ("train", "val"):
    raws.text(raw / f"labels/{split}/a.txt", raws.yolo_line(0, *corners(0, 0, 9, 9)))
  assert run("yolo_seg", raw, tmp_path) == 0
  out = capsys.readouterr().out
  assert "images without a pixel of any class, to learn nothing from: 2" in out
  assert "there is a single class, which a network learns to see everywhere: give" in out


def test_annotations_without_a_pixel_are_told(tmp_path, capsys):
  """Outside of the image, between two centers, run lengths of nothing; each form counts them."""
  raw = tmp_path / "raw/coco_json"
  raws.coco_tree(raw)  # with one outside
  path = raw / "annotations/instances_val2017.json"
  content = json.loads(path.read_text())
  empty = [[[7.6, 2, 8.4, 2, 8.4, 9]], rle(np.zeros(raws.SHAPE, bool), compressed=True)]
  for i, segmentation in enumerate(empty, 10):
    content["annotations"].append({"id": i, **raws.of_image(9, 1, segmentation)})
  raws.write_json(path, content)
  labelme_tree(tmp_path / "raw/labelme")
  outside = [shape("cat", "polygon", points(31, 2, 35, 18)), shape("cat", "circle", [[1, 1]] * 2)]
  labelme(
    tmp_path / "raw/labelme/val/a.json", [*outside, shape("dog", "polygon", points(5, 5, 9, 9))]
  )
  raws.yolo_tree(tmp_path / "raw/yolo_seg", YAML)
  raws.text(tmp_path / "raw/yolo_seg/labels/val/b.txt", raws.yolo_line(0, 7.6, 2, 8.4, 2, 8.4, 9))
  for name, count in (("coco_json", 3), ("labelme", 2), ("yolo_seg", 1)):
    assert run(name, tmp_path / "raw" / name, tmp_path) == 0
    out = capsys.readouterr().out
    assert f"no pixel's center is in, outside of their image or too small: {count}\n" in out
    prepared = records.prepared_folder(name, tmp_path, "x") / "summary.json"
    assert json.loads(prepared.read_text())["annotations_without_a_pixel"] == count


def test_edited_annotations_are_told(tmp_path, capsys):
  raw = tmp_path / "raw"
  labelme_tree(raw)
  assert run("labelme", raw, tmp_path) == 0
  labelme(raw / "val/a.json", [shape("bird", "polygon", points(0, 0, 5, 5))])
  assert run("labelme", raw, tmp_path) == 2
  error = capsys.readouterr().err
  assert "the labels of the shapes has 3 names, had 2" in error
  assert "1 file changed, such as val/a.json" in error
  assert run("labelme", raw, tmp_path, "--rebuild") == 0


def colored_folder(root):
  colors = {0: (0, 0, 0), 1: (1, 0, 0), 2: (2, 0, 0), 255: (9, 9, 9)}
  for split in ("train", "val"):
    raws.picture(root / "images" / split / "a.jpg")
    raws.rgb_png(root / "labels" / split / "a.png", colors)
  raws.text(root / "names.txt", "floor:0,0,0", "cat:1,0,0", "dog:2,0,0", "ignored:9,9,9")


def panoptic_tree(root):
  """Two images of two segments each."""
  content = raws.coco({1: "a.jpg", 2: "b.jpg"}, [])
  segments = [{"id": 1, "category_id": 1}, {"id": 2, "category_id": 7}]
  for image, name in ((1, "a"), (2, "b")):
    raws.picture(root / f"{name}.jpg")
    raws.rgb_png(root / f"panoptic/{name}.png", {1: (1, 0, 0), 2: (2, 0, 0)})
    entry = {"image_id": image, "file_name": f"{name}.png", "segments_info": segments}
    content["annotations"].append(entry)
  raws.write_json(root / "panoptic.json", content)


def colored_voc_tree(root):
  lines = ("cat:1,0,0::", "dog:2,0,0::", "background:0,0,0::")
  colors = {1: (1, 0, 0), 2: (2, 0, 0), 255: (224, 224, 192)}
  raws.voc_tree(root, lines, "labelmap.txt", colors)


@pytest.mark.parametrize(
  ("name", "make", "file", "one", "two"),
  [
    ("folder", colored_folder, "names.txt", "1,0,0", "2,0,0"),
    ("voc_folder", colored_voc_tree, "labelmap.txt", "1,0,0", "2,0,0"),
    ("coco_json", panoptic_tree, "panoptic.json", '"category_id": 1', '"category_id": 7'),
    (
      "yolo_seg",
      lambda root: raws.yolo_tree(root, YAML),
      "data.yaml",
      "[cat, dog]",
      "[ignored, cat, dog]",
    ),
  ],
  ids=["folder", "voc_folder", "coco_json", "yolo_seg"],
)
def test_edits_of_which_class_a_label_is_are_noticed(
  name, make, file, one, two, tmp_path, monkeypatch, capsys
):
  """By an interrupted set, whose shards have the old classes, and by a finished one."""
  raw = tmp_path / "raw"
  make(raw)

  def swap():
    text = (raw / file).read_text()
    text = text.replace(one, "#").replace(two, one).replace("#", two)
    (raw / file).write_text(text)

  with monkeypatch.context() as patch:
    patch.setattr(prepare.preview, "draw", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    assert run(name, raw, tmp_path) == 130
  swap()
  assert run(name, raw, tmp_path) == 0
  assert "other files, options or rules: starting over" in capsys.readouterr().out
  swap()
  assert run(name, raw, tmp_path) == 2
  assert f"1 file changed, such as {file}" in capsys.readouterr().err
  record = next(tmp_path.rglob(raw_files.FILE))
  content = json.loads(record.read_text())
  del content["files"][raw_files.CLASSES]  # as earlier versions, which did not say
  record.write_text(json.dumps(content))
  assert run(name, raw, tmp_path) == 0


def test_options_that_a_set_does_not_take(tmp_path, capsys):
  for name, option, why in (
    ("labelme", "--values=0,255", "labelme has label values of its own; leave --values out"),
    ("folder", "--background=x", "folder says itself which pixels are background; leave"),
    ("voc", "--background=x", "voc says itself which pixels are background; leave --background"),
  ):
    assert run(name, tmp_path, tmp_path, option) == 2
    assert why in capsys.readouterr().err
  labelme_tree(tmp_path / "raw")
  assert run("labelme", tmp_path / "raw", tmp_path, "--background= ") == 2
  assert "--background: expected the name of a class, got none" in capsys.readouterr().err


def test_masks_without_any_class(tmp_path, capsys):
  """Binary masks of 0 and 255, of which VOC's 255 is no class and 0 the background."""
  raw = tmp_path / "raw"
  raws.voc_tree(raw, ("background", "road"))
  for path in (raw / "SegmentationClass").rglob("*.png"):
    Image.fromarray(np.where(box(2, 2, 9, 9), 255, 0).astype(np.uint8)).save(path)
  assert run("voc_folder", raw, tmp_path) == 2
  error = capsys.readouterr().err
  assert "expected pixels of road, got none in any image; check" in error
  assert not (tmp_path / "voc_folder/x/1.0.0").exists()


def test_unseen_names_that_are_no_classes(tmp_path):
  labelme_tree(tmp_path / "raw")
  (tmp_path / "raw/unseen.txt").write_text("horse")
  with pytest.raises(InputError, match=r"in the labels of the shapes, got 'horse', which is not"):
    prepare.prepare("labelme", tmp_path / "raw", tmp_path)


def test_masks_of_colors_in_a_folder(tmp_path, capsys):
  """names.txt or CVAT's labelmap.txt has the colors; without them the colors are shown."""
  raw, colors = tmp_path / "raw", {0: (0, 0, 0), 1: (128, 0, 0), 2: (0, 128, 0), 255: (9, 9, 9)}
  for split in ("train", "val"):
    raws.picture(raw / "images" / split / "a.jpg")
    raws.rgb_png(raw / "labels" / split / "a.png", colors)
  raws.text(raw / "names.txt", "floor", "cat", "dog")
  assert run("folder", raw, tmp_path) == 2
  error = capsys.readouterr().err
  assert "got 4 colors: 128,0,0 (49.2%), 0,0,0 (43.3%), 0,128,0 (4.2%), 9,9,9 (3.3%);" in error
  assert "behind its name in names.txt, as in road:128,64,128" in error
  named = [f"{n}:{','.join(map(str, c))}" for n, c in zip(("floor", "cat", "dog"), colors.values())]
  raws.text(raw / "names.txt", *named)
  assert run("folder", raw, tmp_path) == 2
  error = capsys.readouterr().err
  assert (
    "expected colors of names.txt, got others, such as 9,9,9, 1 in all, on 20 of 600 pixels"
    in error
  )
  raws.text(raw / "names.txt", *named, "ignored: 9, 9, 9")
  assert run("folder", raw, tmp_path) == 0
  data = opened("folder", tmp_path)
  assert data.names == ("floor", "cat", "dog")
  np.testing.assert_array_equal(next(iter(data.eval_examples()))["label"], raws.INDEX)
  assert run("folder", raw, tmp_path, "--values=0,1,2", "--rebuild") == 2
  assert "expected colors or --values, got both" in capsys.readouterr().err
  (raw / "names.txt").unlink()
  raws.text(raw / "labelmap.txt", "# CVAT", *(f"{line}::" for line in [*named, "ignored:9,9,9"]))
  assert run("folder", raw, tmp_path, "--rebuild") == 0


def test_a_color_that_does_not_occur_and_a_single_class(tmp_path, capsys):
  """Two names, and masks of the first one and of no class: no binary masks."""
  raw, colors = tmp_path / "raw", {0: (0, 0, 0), 1: (0, 0, 0), 2: (0, 0, 0), 255: (9, 9, 9)}
  for split in ("train", "val"):
    raws.picture(raw / "images" / split / "a.jpg")
    raws.rgb_png(raw / "labels" / split / "a.png", colors)
  raws.text(raw / "names.txt", "floor:0,0,0", "road:1,0,0", "ignored:9,9,9")
  assert run("folder", raw, tmp_path) == 0
  out = capsys.readouterr().out
  assert "\nnot found: road\n" in out and "single class" not in out
  raws.text(raw / "names.txt", "floor:0,0,0", "ignored:9,9,9")
  assert run("folder", raw, tmp_path, "--rebuild") == 0
  assert "there is a single class, which a network learns to see ev" in capsys.readouterr().out


def test_smoothed_and_lossy_masks_in_a_folder(tmp_path, capsys):
  raw = tmp_path / "raw"
  smooth = Image.fromarray(np.where(box(2, 2, 9, 9), 255, 0).astype(np.uint8)).resize((30, 20), 2)
  for split in ("train", "val"):
    raws.picture(raw / "images" / split / "a.jpg")
    (raw / "labels" / split).mkdir(parents=True)
    smooth.resize((15, 10), 2).resize((30, 20), 2).save(raw / "labels" / split / "a.png")
  raws.text(raw / "names.txt", "floor", "road")
  assert run("folder", raw, tmp_path) == 2
  error = capsys.readouterr().err
  assert "values of 2 classes are those of smoothed edges, of a mask that was once a JPEG" in error
  for path in (raw / "labels").rglob("*.png"):
    Image.open(path).save(path.with_suffix(".jpg"))
    path.unlink()
  assert run("folder", raw, tmp_path) == 2
  error = capsys.readouterr().err
  assert "a.jpg: expected a label file without loss (PNG, BMP, GIF, TIFF), got JPEG" in error


def test_float_and_wide_masks_in_a_folder(tmp_path):
  raw = tmp_path / "raw"
  for split, kind in (("train", np.float32), ("val", np.uint16)):
    raws.picture(raw / "images" / split / "a.jpg")
    (raw / "labels" / split).mkdir(parents=True)
    Image.fromarray(raws.INDEX.astype(kind)).save(raw / "labels" / split / "a.tif")
  raws.text(raw / "names.txt", "floor", "cat", "dog")
  folder = prepare.prepare("folder", raw, tmp_path, config="x")
  for split in ("train", "val"):
    np.testing.assert_array_equal(records.Records(folder, split)[0]["label"], raws.INDEX)


def val_of(names):
  examples = [RawExample(name, pathlib.Path(name), pathlib.Path(name)) for name in names]
  splits = one_in_ten(examples, "raw")
  assert sorted(r.id for raws in splits.values() for r in raws) == sorted(names)
  assert splits["train"] and splits["val"]
  return {raw.id for raw in splits["val"]}


def test_images_that_are_added_bring_none_to_val_that_was_trained_on():
  names = [f"IMG_{i}" for i in range(1000)]
  for low, high in itertools.pairwise((2, 3, 5, 9, 15, 30, 60, 300, 1000)):
    assert not val_of(names[:high]) & ({*names[:low]} - val_of(names[:low]))
  assert 80 < len(val_of(names)) < 120
  below = sorted(val_of(names))[:2]
  assert len(val_of(below)) == 1  # though both are below a tenth


@pytest.mark.parametrize(
  ("path", "split"),
  [
    ("train/a", "train"), ("instances_val2017", "val"), ("valid/_annotations.coco", "val"),
    ("trainval", None), ("Training set/x", "train"), ("my-test/x", "test"), ("a/b", None),
    ("train/val", "val"),
  ],
)  # fmt: skip
def test_words_that_tell_a_split(path, split):
  assert split_of(pathlib.PurePath(path)) == split
