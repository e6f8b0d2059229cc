"""Your own folder: layouts, names, pairs, mask values, and the way to a vocabulary."""

import os
import re
import shutil
import unicodedata

import numpy as np
import pytest
from PIL import Image

from configs import folder as folder_config
from data_pipelines import bad_files, datasets, prepare, records
from data_pipelines.sources.folder import Folder
from rpn_jax.base.errors import InputError
from rpn_jax.weights.clip_file import with_normalization
from tests.data_pipelines import raw_ade_coco
from tests.data_pipelines.raw_pascal import gray_png, jpeg


@pytest.fixture
def raw(tmp_path):
  path = tmp_path / "Meine Bilder (übung)"
  path.mkdir()
  return path


def _check(raw, painted, tmp_path):
  builder = Folder(data_dir=tmp_path)
  splits = builder.examples(raw)
  assert {s: [e.id for e in es] for s, es in splits.items()} == {
    s: sorted(labels) for s, labels in painted.items()
  }
  for split, examples in splits.items():
    for example in examples:
      label = builder.read(example)["label"]
      np.testing.assert_array_equal(label, painted[split][example.id], err_msg=example.id)


def test_masks_of_every_kind(raw, tmp_path):
  _check(raw, raw_ade_coco.folder(raw), tmp_path)


def test_one_split_alone(raw, tmp_path):
  _check(raw, raw_ade_coco.folder(raw, ("val",)), tmp_path)


def test_more_classes_than_eight_bits(raw, tmp_path):
  names = [f"class {i}" for i in range(300)]
  raw_ade_coco.folder(raw, ("train",), names[:4])
  (raw / "names.txt").write_text("\n".join(names), encoding="utf-8")
  for file in (raw / "labels" / "train").iterdir():
    label = np.array(Image.open(file)).astype(np.uint16)
    label[0, :3] = (65535, 299, 255)
    raw_ade_coco.wide_png(file, label)
  builder = Folder(data_dir=tmp_path)
  first = builder.examples(raw)["train"][0]
  assert builder.classes.ignore == 65535
  assert builder.read(first)["label"][0, :3].tolist() == [65535, 299, 255]
  label[0, 0] = 300
  raw_ade_coco.wide_png(first.label, label)
  with pytest.raises(InputError, match=r"expected label values 0…299, 65535, got 300 on 1 pixels"):
    builder.read(first)


def test_flat_layout_is_split_by_name(raw, tmp_path):
  painted = raw_ade_coco.folder(raw, ("",))[""]
  for i in range(10):
    raw_ade_coco.gray_png(raw / "labels" / f"{i}.png", np.zeros((4, 5)))
    jpeg(raw / "images" / f"{i}.jpg", 4, 5)
  splits = Folder(data_dir=tmp_path).examples(raw)
  ids = {split: [e.id for e in examples] for split, examples in splits.items()}
  assert len(ids["val"]) == 2 and len(ids["train"]) == 18
  assert sorted(ids["val"] + ids["train"]) == sorted([*painted, *map(str, range(10))])
  assert ids["val"] == ["9", "pic 6 ä"]  # of these names, for ever


@pytest.mark.parametrize("val", ["validation", "Valid", "VAL"])
def test_other_names_of_the_splits(val, raw, tmp_path):
  painted = raw_ade_coco.folder(raw, ("Training", val))
  _check(raw, {"train": painted["Training"], "val": painted[val]}, tmp_path)


@pytest.mark.parametrize("masks", [True, False])
def test_train_alone_and_images_for_tests(masks, raw, tmp_path, capsys):
  raw_ade_coco.folder(raw, ("train", "test"))
  if not masks:
    shutil.rmtree(raw / "labels/test")
  splits = Folder(data_dir=tmp_path).examples(raw)
  ids = {split: [e.id for e in examples] for split, examples in splits.items()}
  assert ids["val"] == ["pic 6 ä"] and len(ids["train"]) == 9
  out = capsys.readouterr().out
  assert f"left out, as images for tests: 10, such as {raw}/images/test/pic 0 ä.jpg" in out


@pytest.mark.parametrize("splits", [("train", "val"), ("",), ()])
@pytest.mark.parametrize("place", ["more", "more/train", "train/more", "link"])
def test_images_in_other_folders_are_refused(splits, place, raw, tmp_path):
  raw_ade_coco.folder(raw, splits)
  (raw / "images" / place).parent.mkdir(parents=True, exist_ok=True)
  if place == "link":
    jpeg(tmp_path / "elsewhere/x.jpg", 4, 5)
    (raw / "images/link").symlink_to(tmp_path / "elsewhere")
  else:
    jpeg(raw / "images" / place / "x.jpg", 4, 5)
  message = rf"images/{place}: expected images in images/train and .* got some in this folder; move"
  with pytest.raises(InputError, match=message):
    Folder(data_dir=tmp_path).examples(raw)


def test_images_of_every_kind(raw, tmp_path):
  pixels = np.random.default_rng(0).integers(0, 256, (8, 6, 3), np.uint8)
  (raw / "images").mkdir()
  for name in ("a.JPG", "b.jpeg", "c.png", "d.webp"):
    Image.fromarray(pixels).save(raw / "images" / name)
    gray_png(raw / "labels" / f"{name[0]}.png", np.zeros((8, 6)))
  (raw / "images" / "readme.md").write_text("x")
  (raw / "names.txt").write_text("x\ny")
  builder = Folder(data_dir=tmp_path)
  examples = [e for split in builder.examples(raw).values() for e in split]
  assert sorted(e.id for e in examples) == list("abcd")
  for example in examples:
    assert builder.read(example)["label"].shape == (8, 6)


@pytest.mark.parametrize(
  "text, complaint",
  [
    ("a\n\nb\n", "got none in line 2"),
    ("a\nb\n a \n", "got 'a' in lines 1 and 3"),
    ("", "got an empty file"),
    ("\n".join(map(str, range(65536))), "at most 65535 names, got 65536"),
  ],
)
def test_bad_names(text, complaint, raw, tmp_path):
  raw_ade_coco.folder(raw)
  (raw / "names.txt").write_text(text, encoding="utf-8")
  with pytest.raises(InputError, match=f"names.txt: expected .*{complaint}"):
    Folder(data_dir=tmp_path).examples(raw)


def test_blank_lines_behind_the_last_name(raw, tmp_path):
  raw_ade_coco.folder(raw)
  with (raw / "names.txt").open("a") as file:
    file.write("\n  \n")
  builder = Folder(data_dir=tmp_path)
  builder.examples(raw)
  assert builder.classes.names == ("sky", "big tree, tree", "Straße", "猫")


def test_names_of_other_bytes(raw, tmp_path):
  raw_ade_coco.folder(raw)
  (raw / "names.txt").write_bytes("Straße".encode("latin-1"))
  with pytest.raises(InputError, match=r"names.txt: expected .* in UTF-8, got another encoding"):
    Folder(data_dir=tmp_path).examples(raw)
  (raw / "names.txt").unlink()
  with pytest.raises(InputError, match=r"names.txt: expected the class names, one per line"):
    Folder(data_dir=tmp_path).examples(raw)


@pytest.mark.parametrize("text, got", [("sky\nhorse", "'horse'"), ("sky\nx", "all of them")])
def test_bad_unseen(text, got, raw, tmp_path):
  raw_ade_coco.folder(raw, names=("sky", "x"))
  (raw / "unseen.txt").write_text(text)
  with pytest.raises(InputError, match=f"unseen.txt: expected some of the names .* got {got}"):
    Folder(data_dir=tmp_path).examples(raw)


def test_missing_partners(raw, tmp_path):
  raw_ade_coco.folder(raw)
  mask, image = raw / "labels/train/pic 4 ä.png", raw / "images/val/pic 5 ä.jpg"
  moved = mask.rename(raw / "m")
  with pytest.raises(InputError, match=r"pic 4 ä.png: expected the mask of .*pic 4 ä.jpg"):
    Folder(data_dir=tmp_path).examples(raw)
  moved.rename(mask)
  image.unlink()
  with pytest.raises(InputError, match=r"pic 5 ä.\*: expected the image of .*pic 5 ä.png"):
    Folder(data_dir=tmp_path).examples(raw)


@pytest.mark.parametrize("name", ["pic 4 ä_mask", "pic 4 ä.jpg", "PIC 4 ä"])
def test_masks_of_nearly_the_name(name, raw, tmp_path):
  raw_ade_coco.folder(raw)
  mask = raw / "labels/train/pic 4 ä.png"
  mask.rename(mask.with_name(f"{name}.png"))
  with pytest.raises(InputError, match=rf"mask of .*ä.jpg, got '{name}', which needs the name"):
    Folder(data_dir=tmp_path).examples(raw)


@pytest.mark.parametrize("splits", [("train", "val"), ("",)])
def test_what_lacks_its_partner_may_be_left_out(splits, raw, tmp_path, capsys):
  raw_ade_coco.folder(raw, splits)
  mask, image = (raw / kind / splits[0] for kind in ("labels", "images"))
  (mask / "pic 4 ä.png").unlink()
  (image / "pic 5 ä.jpg").unlink()
  with pytest.raises(InputError, match=r"partner; --allow_partial takes what is there; the same"):
    prepare.prepare("folder", raw, tmp_path)
  path = prepare.prepare("folder", raw, tmp_path, allow_partial=True)
  assert sum(records.count_examples(path).values()) == 10 * len(splits) - 2
  out = capsys.readouterr().out
  assert re.search(r"left out: .*4 ä\.png: expected the mask of .*the same for 1 more: .*5 ä", out)


def test_masks_of_a_split_without_images(raw, tmp_path):
  raw_ade_coco.folder(raw)
  shutil.rmtree(raw / "images/val")
  with pytest.raises(InputError, match=r"images/val: expected the images of the masks in .*s/val,"):
    Folder(data_dir=tmp_path).examples(raw)


def test_ambiguous_images(raw, tmp_path):
  raw_ade_coco.folder(raw)
  jpeg(raw / "images" / "train" / "pic 4 ä.jpeg", 5, 5)
  with pytest.raises(InputError, match=r"expected one image of this name"):
    Folder(data_dir=tmp_path).examples(raw)
  jpeg(raw / "images" / "stray.jpg", 5, 5)
  with pytest.raises(InputError, match=r"stray.jpg: expected images in images/train and"):
    Folder(data_dir=tmp_path).examples(raw)


def test_names_in_two_forms_of_their_letters(raw, tmp_path):
  """macOS writes é as two characters, others as one."""
  painted = raw_ade_coco.folder(raw)
  for place, form in (("images", "NFD"), ("labels", "NFC")):
    for path in (raw / place / "train").iterdir():
      path.rename(path.with_name(unicodedata.normalize(form, path.name)))
  (raw / "names.txt").write_text("caf\u00e9\nx\ny\nz\n", encoding="utf-8")
  (raw / "unseen.txt").write_text("cafe\u0301\n", encoding="utf-8")
  _check(raw, painted, tmp_path)
  builder = Folder(data_dir=tmp_path)
  builder.examples(raw)
  assert builder.classes.names[0] == "caf\u00e9" and builder.classes.unseen == (0,)
  assert records.config_name(Folder, "cafe\u0301") == "caf\u00e9"


def test_two_files_of_names_that_look_alike(raw, tmp_path):
  raw_ade_coco.folder(raw)
  mask = raw / "labels/train/pic 4 ä.png"
  for twin in (unicodedata.normalize("NFD", mask.name), "pic 4 ä.PNG"):
    os.link(mask, mask.with_name(twin))
    with pytest.raises(InputError, match=r"expected one mask of this name, got .* too"):
      Folder(data_dir=tmp_path).examples(raw)
    mask.with_name(twin).unlink()


@pytest.mark.skipif(os.name == "nt", reason="names are text there")
@pytest.mark.parametrize("split", ["", "train"])
def test_names_that_are_no_utf_8(split, raw, tmp_path):
  raw_ade_coco.folder(raw, (split,))
  for folder in ("images", "labels"):
    file = min((raw / folder / split).iterdir())
    os.rename(file, os.fsencode(file.parent) + b"/b\xe9" + os.fsencode(file.suffix))
  with pytest.raises(InputError, match=r"b\\udce9.jpg: expected a name in UTF-8"):
    prepare.prepare("folder", raw, tmp_path)


def test_what_macos_and_others_leave_in_folders(raw, tmp_path, capsys):
  painted = raw_ade_coco.folder(raw)
  for place in ("images", "images/train", "labels/train"):
    (raw / place / "._pic 4 ä.jpg").write_bytes(b"\0\5\x16\7")
    (raw / place / "._pic 4 ä.png").write_bytes(b"\0\5\x16\7")
  (raw / "images/train/pic 4 ä.webp").mkdir()
  _check(raw, painted, tmp_path)
  out = capsys.readouterr().out
  assert out.count("left out of the images: ") == 3 and "; 1 not a file, such as " in out


def test_a_single_image_is_no_data_set(raw, tmp_path):
  gray_png(raw / "labels" / "a.png", np.zeros((4, 5)))
  jpeg(raw / "images" / "a.jpg", 4, 5)
  (raw / "names.txt").write_text("a")
  with pytest.raises(InputError, match="at least two images"):
    Folder(data_dir=tmp_path).examples(raw)


def test_color_masks_are_refused(raw, tmp_path):
  raw_ade_coco.folder(raw)
  builder = Folder(data_dir=tmp_path)
  first = builder.examples(raw)["train"][0]
  jpeg(first.label.with_suffix(".jpg"), 9, 21)
  Image.open(first.label.with_suffix(".jpg")).save(first.label)
  with pytest.raises(
    InputError, match=r"expected class ids, got 189 colors: .*; store class ids, not colors"
  ):
    builder.read(first)


def test_all_bad_files_are_told_at_once(raw, tmp_path, capsys, monkeypatch):
  raw_ade_coco.folder(raw)
  files = sorted((raw / "labels").rglob("*.png"))
  good = {file: file.read_bytes() for file in files[:3]}
  for file in good:
    file.write_bytes(b"no image")
  with pytest.raises(InputError, match=r"^3 files cannot be used, for the reasons above"):
    prepare.prepare("folder", raw, tmp_path)
  told = capsys.readouterr().err
  assert all(told.count(f"{file}: ") == 1 for file in good)
  assert told.count("got no known image format; replace it") == 3
  monkeypatch.setattr(bad_files, "MAX_LISTED", 2)
  with pytest.raises(InputError, match=r"^at least 2 files"):
    prepare.prepare("folder", raw, tmp_path)
  for file, content in good.items():
    file.write_bytes(content)
  path = prepare.prepare("folder", raw, tmp_path)
  assert sum(records.count_examples(path).values()) == len(files)


def test_all_files_without_a_partner_are_told(raw, tmp_path):
  raw_ade_coco.folder(raw)
  masks = sorted((raw / "labels" / "train").iterdir())
  for file in masks[:2]:
    file.unlink()
  stems = [file.stem for file in masks[:2]]
  message = rf"{stems[0]}\.png: expected the mask of .*; the same for 1 more: .*{stems[1]}\.png$"
  with pytest.raises(InputError, match=message):
    prepare.prepare("folder", raw, tmp_path)


def test_vocabulary_after_preparation(raw, tmp_path):
  raw_ade_coco.folder(raw)
  (raw / "unseen.txt").write_text("猫\nsky\n", encoding="utf-8")
  with pytest.raises(InputError, match=r"prepare folder --config='meine_bilder_übung'"):
    records.stored_vocabulary("folder", tmp_path, "meine_bilder_übung")
  path = prepare.prepare("folder", raw, tmp_path)
  assert path == tmp_path / "folder" / "meine_bilder_übung" / "1.0.0"
  for name in ("meine_bilder_übung", raw.name):
    vocabulary = records.stored_vocabulary("folder", tmp_path, name)
    assert vocabulary.names == ("sky", "big tree, tree", "Straße", "猫")
    assert vocabulary.unseen == (0, 3) and vocabulary.seen == (1, 2)
    assert vocabulary.ids == {i: i for i in range(4)} and vocabulary.ignore == 255
  (path / "names.json").write_text("{}")
  with pytest.raises(InputError, match=r"names.json: expected the names of a prepared folder"):
    records.stored_vocabulary("folder", tmp_path, raw.name)


def test_a_split_of_ones_own_counts_only_where_classes_are_left_out(raw, tmp_path, capsys):
  raw_ade_coco.folder(raw)
  (raw / "unseen.txt").write_text("sky\n", encoding="utf-8")
  prepare.prepare("folder", raw, tmp_path, config="mine")
  said, found = {}, {}
  for setting in datasets.SETTINGS:
    config = folder_config.get_config(f"backbone=shapes,{setting}").unlock()
    config.data.variant, config.data.data_dir = "mine", str(tmp_path)
    config = with_normalization(config)
    capsys.readouterr()
    data = datasets.load(config)
    said[setting], found[setting] = capsys.readouterr().out, (data.trained, data.seen, data.unseen)
    config = config.copy_and_resolve_references().unlock()
    config.eval.sets = ("folder",)  # every class prompted; what was trained on is the same
    (again,) = datasets.load_evaluations(config)
    assert (again.seen, again.unseen) == found[setting][1:]
  everything = (0, 1, 2, 3)
  assert found == {
    "zero_shot": ((1, 2, 3), (1, 2, 3), (0,)),
    "transductive": (everything, (1, 2, 3), (0,)),
    "supervised": (everything, everything, ()),
    "annotation_free": (everything, everything, ()),
  }
  assert not said["zero_shot"] and not said["transductive"]
  assert said["supervised"] == (
    "folder: setting=supervised trains on every class, also on those named as unseen (sky); "
    "setting=zero_shot leaves these out\n"
  )


def test_pseudo_labels_need_a_label_that_no_class_has(raw, tmp_path):
  raw_ade_coco.folder(raw)
  names = "\n".join(f"class {i}" for i in range(255))
  (raw / "names.txt").write_text(names, encoding="utf-8")
  (raw / "unseen.txt").write_text("class 3\n", encoding="utf-8")
  prepare.prepare("folder", raw, tmp_path, config="mine")
  for setting in ("zero_shot", "transductive", "annotation_free"):
    config = folder_config.get_config(f"backbone=shapes,{setting}").unlock()
    config.data.variant, config.data.data_dir = "mine", str(tmp_path)
    config = with_normalization(config)
    if setting == "zero_shot":
      assert datasets.load(config).ignore == 255
      continue
    with pytest.raises(InputError, match="with exactly 255 classes no label is left"):
      datasets.load(config)
