"""Sets that are prepared already, and raw files that were edited since."""

import os

import numpy as np
import pytest
from PIL import Image

from data_pipelines import finished, prepare, raw_files, records
from data_pipelines.sources import own_data
from rpn_jax.base.errors import InputError
from tests.data_pipelines import raw_ade_coco
from tests.data_pipelines.raw_pascal import gray_png, jpeg


@pytest.fixture
def raw(tmp_path, monkeypatch):
  """A folder of one's own that is prepared as "mine"."""
  monkeypatch.setattr(prepare.preview, "draw", lambda *args: None)  # takes a second
  raw_ade_coco.folder(tmp_path / "raw")
  prepare.prepare("folder", tmp_path / "raw", tmp_path, config="mine")
  return tmp_path / "raw"


def again(raw, **options):
  return prepare.prepare("folder", raw, raw.parent, config="mine", **options)


def rename_class(raw):
  text = (raw / "names.txt").read_text(encoding="utf-8")
  (raw / "names.txt").write_text(text.replace("sky", "heaven"), encoding="utf-8")


def add_class(raw):
  lines = (raw / "names.txt").read_text(encoding="utf-8").splitlines()
  (raw / "names.txt").write_text("\n".join([*lines, "snow"]), encoding="utf-8")


def name_unseen(raw):
  (raw / "unseen.txt").write_text("sky\n", encoding="utf-8")


def redraw(raw):
  path = raw / "labels/train/pic 3 ä.png"
  size, at = path.stat().st_size, path.stat().st_atime_ns
  label = np.array(Image.open(path))
  gray_png(path, label[::-1])
  os.utime(path, ns=(at, path.stat().st_mtime_ns + 1_000_000))
  assert abs(path.stat().st_size - size) < 50


def add_images(raw):
  for name in "abc":
    jpeg(raw / f"images/val/{name}.jpg", 5, 6)
    gray_png(raw / f"labels/val/{name}.png", np.zeros((5, 6)))


def remove_an_image(raw):
  (raw / "images/val/pic 9 ä.jpg").unlink()
  (raw / "labels/val/pic 9 ä.png").unlink()


def move(raw):
  for kind, suffix in (("images", "jpg"), ("labels", "png")):
    name = f"pic 2 ä.{suffix}"
    (raw / kind / "train" / name).rename(raw / kind / "val" / f"moved.{suffix}")


EDITS = {
  rename_class: "line 1 of names.txt is 'heaven', was 'sky'",
  add_class: "names.txt has 5 names, had 4",
  name_unseen: "unseen are sky, were none",
  redraw: "1 file changed, such as labels/train/pic 3 ä.png",
  add_images: "6 files added, such as images/val/a.jpg",
  remove_an_image: "2 files removed, such as images/val/pic 9 ä.jpg",
  move: "2 files added, such as images/val/moved.jpg; 2 files removed, such as images/train/pic 2",
}


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.__name__)
def test_edits_are_noticed(edit, raw):
  edit(raw)
  with pytest.raises(InputError) as error:
    again(raw)
  message = str(error.value)
  assert EDITS[edit] in message and "--rebuild" in message and "\n" not in message


def test_a_rebuilt_set_is_of_the_new_files(raw, capsys):
  rename_class(raw)
  redraw(raw)
  remove_an_image(raw)
  folder = again(raw, rebuild=True)
  assert records.stored_vocabulary("folder", raw.parent, "mine").names[0] == "heaven"
  assert records.count_examples(folder) == {"train": 10, "val": 9}
  label = next(x["label"] for x in records.source("folder", raw.parent, "train", "mine")
               if x["id"] == "pic 3 ä")  # fmt: skip
  np.testing.assert_array_equal(label, np.array(Image.open(raw / "labels/train/pic 3 ä.png")))
  assert {p.name for p in folder.parent.iterdir() if p.is_dir()} == {"1.0.0"}
  capsys.readouterr()
  again(raw)
  assert capsys.readouterr().out.startswith("already prepared: 10 train, 9 val in ")


def test_a_rebuild_that_ends_early_leaves_the_old_set(raw, monkeypatch):
  redraw(raw)

  def interrupted(*args):
    raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr(prepare, "_read", interrupted)
    with pytest.raises(KeyboardInterrupt):
      again(raw, rebuild=True)
  assert len(records.source("folder", raw.parent, "train", "mine")) == 10
  again(raw, rebuild=True)


def test_shards_of_files_that_were_edited_since_are_not_continued(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(prepare.preview, "draw", lambda *args: None)
  raw = tmp_path / "raw"
  raw_ade_coco.folder(raw)
  with monkeypatch.context() as patch:
    patch.setattr(prepare.preview, "draw", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
      again(raw)
  redraw(raw)
  again(raw)
  assert "was begun with other files, options or rules: starting over" in capsys.readouterr().out


@pytest.mark.parametrize("content", [None, "[", '{"files": {"train": {"a": 1}}}'])
def test_sets_of_earlier_versions_are_compared_by_number(content, raw, capsys):
  """They, and damaged ones, do not say of which files they were made."""
  file = raw.parent / "folder/mine/1.0.0" / raw_files.FILE
  file.unlink()
  if content:
    file.write_text(content)
  again(raw)
  assert "already prepared" in capsys.readouterr().out
  add_images(raw)
  with pytest.raises(InputError, match=r"val has 13 images, had 10; read it anew"):
    again(raw)


@pytest.mark.parametrize("by_number", [False, True])
def test_another_choice_of_val_by_an_earlier_version_is_no_change(
  by_number, tmp_path, monkeypatch, capsys
):
  """Where no images are for val: it is told, not taken for an edit of the folder."""
  monkeypatch.setattr(prepare.preview, "draw", lambda *args: None)
  raw = tmp_path / "raw"
  raw_ade_coco.folder(raw, ("",))
  with monkeypatch.context() as patch:
    patch.setattr(own_data, "_TENTH", bytes([64]))  # a quarter
    patch.setattr(finished, "READING_RULES", 3)
    folder = again(raw)
  assert records.count_examples(folder)["val"] == 4
  if by_number:
    (folder / raw_files.FILE).unlink()
  capsys.readouterr()
  again(raw)
  assert "which where no images were for val chose others for it, or" in capsys.readouterr().out
  again(raw, rebuild=True)
  assert records.count_examples(folder)["val"] == 1
  capsys.readouterr()
  again(raw)
  assert "by an earlier version" not in capsys.readouterr().out


def test_a_list_of_names_that_is_saved_again_is_no_change(raw):
  (raw / "names.txt").touch()
  again(raw)


def test_raw_files_that_are_gone(raw, capsys):
  raw.rename(raw.parent / "elsewhere")
  again(raw)
  assert "not compared with its raw files, which are no longer there" in capsys.readouterr().out
