"""The preparation of data sets: whole, interrupted, refused; and what is read of them."""

import errno
import fcntl
import io
import json
import pathlib
import pickle
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from matplotlib.patches import Patch
from PIL import Image

from data_pipelines import pipeline, prepare, preview, records, registry, vocabularies
from rpn_jax.base import paths
from rpn_jax.base.errors import InputError
from tests import ROOT
from tests.data_pipelines import raw_ade_coco
from tests.data_pipelines.raw_pascal import gray_png, jpeg

# Seven training images in shards of two: the fourth shard is short.
TRAIN, VAL, SHARD = 7, 2, 2
_DRAW = preview.draw


@pytest.fixture
def raw(tmp_path):
  folder = tmp_path / "raw data (übung)"
  folder.mkdir()
  return folder


@pytest.fixture
def data(tmp_path, monkeypatch):
  monkeypatch.setattr(prepare, "SHARD_EXAMPLES", SHARD)
  monkeypatch.setattr(prepare.preview, "draw", lambda *args: None)  # takes a second
  return tmp_path / "prepared data (übung)"


def _prepare(raw, data, name="ade150", **options):
  return prepare.prepare(name, raw, data, allow_partial=True, **options)


def _shards(folder):
  """Finished ones, and when they were written."""
  files = folder.glob("*.array_record-*")
  return {p.name: p.stat().st_mtime_ns for p in files if not p.name.startswith(".")}


def _check(data, painted, name="ade150", config=None):
  for split, labels in painted.items():
    source = records.source(name, data, split, config)
    assert [source[i]["id"] for i in range(len(source))] == sorted(labels)
    for example in source:
      np.testing.assert_array_equal(example["label"], labels[example["id"]])
      with Image.open(io.BytesIO(example["image"])) as image:
        assert image.size[::-1] == labels[example["id"]].shape


@pytest.mark.parametrize("name", ["ade150", "coco_stuff"])
def test_prepared_labels(name, raw, data):
  painted = getattr(raw_ade_coco, name)(raw)
  folder = _prepare(raw, data, name)
  assert folder == data / name / "1.0.0" == records.prepared_folder(name, data)
  _check(data, painted, name)
  assert not list(folder.glob(".*")) and not (folder / "progress").exists()


def test_prepared_configs(raw, data):
  painted = raw_ade_coco.ade847(raw)
  folder = _prepare(raw, data, "ade847", config="native")
  assert folder == data / "ade847" / "native" / "1.0.0"
  _check(data, painted, "ade847", "native")
  with pytest.raises(InputError, match=r"expected ade847 prepared in .*short512.*ade847 --manual"):
    records.source("ade847", data, "val")
  with pytest.raises(InputError, match="config of ade847 'nativ' is not known; did you mean 'nat"):
    records.source("ade847", data, "val", "nativ")
  with pytest.raises(InputError, match="ade150 has no configs, got 'native'"):
    records.source("ade150", data, "val", "native")


def test_prepared_folders_lie_beside_each_other(raw, data, tmp_path):
  painted = raw_ade_coco.folder(raw)
  _prepare(raw, data, "folder")
  other = tmp_path / "other" / raw.name
  flat = raw_ade_coco.folder(other, ("",))[""]
  with pytest.raises(InputError, match=r"was prepared from .* --config=NAME"):
    _prepare(other, data, "folder")
  _prepare(other, data, "folder", config="The other!")
  _check(data, painted, "folder", "raw_data_übung")
  source = records.source("folder", data, "train", "the_other")
  assert len(source) == 9
  for example in source:
    assert example["label"].dtype == np.uint16
    np.testing.assert_array_equal(example["label"], flat[example["id"]])
  with pytest.raises(InputError, match=r"got None; prepared in .*: raw_data_übung, the_other"):
    records.source("folder", data, "train")


def test_source(raw, data):
  raw_ade_coco.ade150(raw)
  _prepare(raw, data)
  source = records.source("ade150", data, "train")
  assert len(source) == TRAIN
  for index in (-1, TRAIN):
    with pytest.raises(IndexError):
      source[index]
  again = pickle.loads(pickle.dumps(source))
  assert again[3]["image"] == source[3]["image"] and again[3]["id"] == source[3]["id"]
  checked = pipeline.check_example(source[1])
  assert checked["image"].shape == (*checked["label"].shape, 3)
  assert len(records.source("ade150", data, "train[:3]")) == 3
  with pytest.raises(InputError, match=r"expected one of the splits train, val or .* got 'test'"):
    records.source("ade150", data, "test")


def test_summary_and_preview(raw, data, capsys, monkeypatch):
  monkeypatch.setattr(prepare.preview, "draw", _DRAW)
  painted = raw_ade_coco.ade150(raw)
  folder = _prepare(raw, data)
  summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
  labels = np.concatenate([x.ravel() for split in painted.values() for x in split.values()])
  assert summary["images"] == {"train": TRAIN, "val": VAL}
  assert summary["shards"] == {"train": 4, "val": 1}
  assert summary["bytes"] == sum(p.stat().st_size for p in folder.glob("*.array_record-*"))
  assert summary["classes"] == 150 and summary["classes_found"] == len(np.unique(labels)) - 1
  assert len(summary["classes_missing"]) == 150 - summary["classes_found"]
  assert "wall" not in summary["classes_missing"]  # class 0, painted as 1
  assert summary["unlabelled_pixels"] == pytest.approx((labels == 0).mean(), abs=1e-6)
  out = capsys.readouterr().out
  assert f"{summary['classes_found']} of 150 classes found" in out and str(folder) in out
  with Image.open(folder / "preview.png") as image:
    assert image.size == (1500, 1240)
    assert len(image.convert("RGB").getcolors(image.width * image.height)) > 1000


def test_the_preview_has_the_first_synonym_whole(tmp_path, monkeypatch):
  shown = []
  monkeypatch.setattr(
    preview, "Patch", lambda label, **_: shown.append(label) or Patch(label=label)
  )
  label = np.uint8([[0, 0, 0, 1], [0, 0, 1, 2]])
  names = ["crt screen (lcd, tv)", "sea, ocean", "1,5 mm"]
  image = io.BytesIO()
  Image.new("RGB", (4, 2)).save(image, "PNG")
  example = {"image": image.getvalue(), "label": label, "id": "a"}
  _DRAW([example], vocabularies.of_names("x", names), tmp_path / "a.png")
  assert shown == ["crt screen (lcd, tv)", "sea", "1,5 mm"]


def test_a_finished_set_is_left_alone(raw, data, capsys, monkeypatch):
  raw_ade_coco.ade150(raw)
  folder = _prepare(raw, data)
  before = {p: p.stat().st_mtime_ns for p in data.rglob("*")}

  def no_writing(*args, **kwargs):
    raise PermissionError(errno.EACCES, "read-only")

  monkeypatch.setattr(pathlib.Path, "mkdir", no_writing)
  capsys.readouterr()
  assert _prepare(raw, data) == folder
  out = capsys.readouterr().out
  assert f"already prepared: {TRAIN} train, {VAL} val in {folder}" in out
  assert "published: 20,210 train, 2,000 val" in out
  assert {p: p.stat().st_mtime_ns for p in data.rglob("*")} == before


def test_damaged_sets_are_named(raw, data):
  raw_ade_coco.ade150(raw)
  folder = _prepare(raw, data)
  shard = min(folder.glob("*train.array_record*"))
  shard.rename(folder / "elsewhere")
  with pytest.raises(InputError, match=f"without .*{shard.name}; delete the folder"):
    records.source("ade150", data, "train")
  (folder / "dataset_info.json").write_text("{")
  with pytest.raises(InputError, match=r"dataset_info.json; delete the folder"):
    records.source("ade150", data, "train")


# Interruptions


def _fail_at(monkeypatch, name, error):
  """The example of this name raises; returns the names of all that were read."""
  read, seen = prepare._read, []

  def failing(builder, example):
    seen.append(example.id)
    if example.id == name:
      raise error
    return read(builder, example)

  monkeypatch.setattr(prepare, "_read", failing)
  return seen


@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError()])
def test_resume(error, raw, data, monkeypatch):
  painted = raw_ade_coco.ade150(raw)
  with monkeypatch.context() as patch:
    _fail_at(patch, "ADE_train_00000006", error)
    with pytest.raises(type(error)):
      _prepare(raw, data)
  assert not (data / "ade150" / "1.0.0").exists()
  kept = _shards(data / "ade150" / "1.0.0.partial")
  assert sorted(kept) == [f"ade150-train.array_record-0000{i}-of-00004" for i in (0, 1)]

  seen = _fail_at(monkeypatch, None, None)
  folder = _prepare(raw, data)
  assert sorted(seen) == [
    *(f"ADE_train_{i:08d}" for i in (5, 6, 7)),
    *(f"ADE_val_{i:08d}" for i in (1, 2)),
  ]
  assert kept.items() <= _shards(folder).items()
  _check(data, painted)
  summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
  assert summary["images_of_earlier_runs"] == 4
  labels = np.concatenate([x.ravel() for split in painted.values() for x in split.values()])
  assert summary["unlabelled_pixels"] == pytest.approx((labels == 0).mean(), abs=1e-6)
  # Neither the interruption nor the sizes of shards are part of what the set is known by.
  monkeypatch.setattr(prepare, "SHARD_EXAMPLES", 500)
  whole = records.contents(_prepare(raw, data / "whole"))
  found = records.contents(folder)
  assert {s: x["sha256"] for s, x in whole.items()} == {s: x["sha256"] for s, x in found.items()}
  assert [found[split]["images"] for split in ("train", "val")] == [7, 2]
  assert found["train"]["sha256"] != found["val"]["sha256"]


def test_resume_after_everything_but_the_name(raw, data, monkeypatch):
  painted = raw_ade_coco.ade150(raw)

  def cut(folder, _):
    if str(folder).endswith(".partial"):
      raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr(prepare.os, "rename", cut)
    with pytest.raises(KeyboardInterrupt):
      _prepare(raw, data)
  seen = _fail_at(monkeypatch, None, None)
  _prepare(raw, data)
  assert not seen
  _check(data, painted)


def test_damaged_and_foreign_shards_are_made_anew(raw, data, monkeypatch):
  painted = raw_ade_coco.ade150(raw)
  with monkeypatch.context() as patch:
    _fail_at(patch, "ADE_val_00000001", KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
      _prepare(raw, data)
  first = min((data / "ade150" / "1.0.0.partial").glob("*.array_record-*"))
  first.write_bytes(first.read_bytes()[:100])
  with monkeypatch.context() as patch:
    seen = _fail_at(patch, "ADE_val_00000001", KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
      _prepare(raw, data)
    assert sorted(seen)[:2] == ["ADE_train_00000001", "ADE_train_00000002"]
    assert "ADE_train_00000003" not in seen
  # An image more: the shards are of other examples now.
  more = raw_ade_coco.ade150(raw, train=TRAIN + 1)
  assert len(more["train"]) == len(painted["train"]) + 1
  seen = _fail_at(monkeypatch, None, None)
  _prepare(raw, data)
  assert len(seen) == TRAIN + 1 + VAL
  _check(data, more)


_KILLED = """
import sys, time
from data_pipelines import prepare
prepare.SHARD_EXAMPLES = 2
read = prepare._read
def slow(builder, example):
  if example.id == "ADE_train_00000006":
    time.sleep(60)
  return read(builder, example)
prepare._read = slow
prepare.prepare("ade150", sys.argv[1], sys.argv[2], allow_partial=True)
"""


def test_resume_after_a_kill(raw, data):
  painted = raw_ade_coco.ade150(raw)
  partial = data / "ade150" / "1.0.0.partial"
  process = subprocess.Popen([sys.executable, "-c", _KILLED, raw, data], cwd=ROOT)
  try:
    until = time.time() + 60
    while len(_shards(partial)) < 2 or not list(partial.glob(".*train*.tmp")):
      assert process.poll() is None and time.time() < until
      time.sleep(0.02)
    with pytest.raises(InputError, match=f"1.0.0 is in use by process {process.pid} on "):
      _prepare(raw, data)
  finally:
    process.send_signal(signal.SIGKILL)
    process.wait()
  kept = _shards(partial)
  assert len(kept) == 2
  folder = _prepare(raw, data)
  assert kept.items() <= _shards(folder).items()
  assert not list(folder.glob(".*")), "the part that was cut off is still there"
  _check(data, painted)


def test_a_set_finished_while_waiting_is_taken(raw, data, monkeypatch, capsys):
  raw_ade_coco.ade150(raw)
  locked = paths.locked
  calls = []

  def late(path, resource):
    if not calls:  # another process is first
      calls.append(path)
      _prepare(raw, data)
    return locked(path, resource)

  monkeypatch.setattr(prepare.paths, "locked", late)
  _prepare(raw, data)
  assert "already prepared" in capsys.readouterr().out


def test_lock_is_free_again(raw, data):
  raw_ade_coco.ade150(raw)
  lock = data / "ade150" / ".1.0.0.lock"
  lock.parent.mkdir(parents=True)
  with lock.open("w") as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    with pytest.raises(InputError, match="is in use by another process: wait"):
      _prepare(raw, data)
  _prepare(raw, data)


# What cannot be prepared


def _truncate(raw):
  path = raw / "ADEChallengeData2016/images/training/ADE_train_00000006.jpg"
  path.write_bytes(path.read_bytes()[:-200])


def _resize(raw):
  gray_png(
    raw / "ADEChallengeData2016/annotations/training/ADE_train_00000006.png", np.ones((5, 6))
  )


def _value(raw):
  path = raw / "ADEChallengeData2016/annotations/training/ADE_train_00000006.png"
  label = np.array(Image.open(path))
  label[0, 0] = 151
  gray_png(path, label)


def _unlink(raw):
  (raw / "ADEChallengeData2016/annotations/training/ADE_train_00000006.png").unlink()


@pytest.mark.parametrize(
  "spoil, complaint",
  [
    (_truncate, "expected a readable image"),
    (_resize, "expected a label of its image's size, 13x21"),
    (_value, "got 151 on 1 pixels"),
    (_unlink, "got no such file"),
  ],
)
def test_bad_examples(spoil, complaint, raw, data, capsys):
  painted = raw_ade_coco.ade150(raw)
  spoil(raw)
  command = ["ade150", f"--manual_dir={raw}", f"--data_dir={data}", "--allow_partial"]
  assert prepare.main(command) == 2
  error = capsys.readouterr().err.splitlines()
  assert len(error) == 1 and complaint in error[0] and "ADE_train_00000006" in error[0]
  before = _shards(data / "ade150" / "1.0.0.partial")
  raw_ade_coco.ade150(raw)
  assert prepare.main(command) == 0
  after = _shards(data / "ade150" / "1.0.0")
  assert len(before.items() & after.items()) == len(after) - 1  # only that file's shard is anew
  _check(data, painted)


def test_counts(raw, data, monkeypatch, capsys):
  raw_ade_coco.ade150(raw)
  seen = _fail_at(monkeypatch, None, None)
  command = ["ade150", f"--manual_dir={raw}", f"--data_dir={data}"]
  assert prepare.main(command) == 2
  error = capsys.readouterr().err
  assert "expected 20,210 train images" in error and "got 7;" in error
  assert "--allow_partial" in error and not seen
  monkeypatch.setattr(registry.builder_class("ade150"), "counts", {"train": 7, "val": 2})
  assert prepare.main(command) == 0
  capsys.readouterr()
  assert prepare.main(command) == 0
  assert "published" not in capsys.readouterr().out


def test_missing_raw_files(raw, data, capsys):
  for option in ([], [f"--manual_dir={raw / 'none'}"]):
    for name in ("ade150", "folder"):
      assert prepare.main([name, *option, f"--data_dir={data}"]) == 2
      assert "in --manual_dir, got no" in capsys.readouterr().err
  assert prepare.main(["ade150", f"--manual_dir={raw}", f"--data_dir={data}"]) == 2
  assert "ADEChallengeData2016/images/training" in capsys.readouterr().err


def test_unknown_names(data):
  with pytest.raises(InputError, match="'ade15' is not known; did you mean 'ade150'"):
    prepare.prepare("ade15", None, data)
  with pytest.raises(InputError, match=r"data_pipelines\.shapes"):
    records.source("shapes", data, "val")


def test_examples_of_one_name(raw, data):
  home = raw / "ADE20K_2021_17_01" / "images" / "ADE"
  for file in ("training/a/ADE_1", "training/b/ADE_1", "training/b/ADE_2", "validation/a/ADE_3"):
    jpeg(home / f"{file}.jpg", 4, 5)
  with pytest.raises(InputError, match="got ADE_1 more than once"):
    _prepare(raw, data, "ade847")


def test_data_dir_that_cannot_be_written(raw, data, tmp_path, monkeypatch):
  raw_ade_coco.ade150(raw)
  (tmp_path / "file").write_text("in the way")
  with pytest.raises(InputError, match=r"expected to write here, got .*Not a directory"):
    _prepare(raw, tmp_path / "file")

  def read_only(*args, **kwargs):
    raise OSError(errno.EROFS, "Read-only file system")

  monkeypatch.setattr(pathlib.Path, "mkdir", read_only)
  with pytest.raises(InputError, match=r"expected to write here, got .*Read-only file system"):
    _prepare(raw, data)


def test_where_folders_cannot_be_renamed_no_image_is_read(raw, data, monkeypatch):
  raw_ade_coco.ade150(raw, TRAIN, VAL)

  def refuse(old, new):  # gcsfuse's answer, unless it was told to copy
    raise OSError(errno.EMFILE, "Too many open files", str(old), None, str(new))

  monkeypatch.setattr(prepare.os, "rename", refuse)
  monkeypatch.setattr(prepare, "_write", None)
  with pytest.raises(InputError, match="expected a disk, where folders can be renamed"):
    _prepare(raw, data)


def test_full_disk(raw, data, monkeypatch):
  painted = raw_ade_coco.ade150(raw)
  real = records.array_record_module.ArrayRecordWriter

  class Full:
    """array_record tells of a full disk when a file is closed, by a RuntimeError."""

    def __init__(self, path, options):
      self._writer = real(path, options)
      self._full = "train.array_record-00001" in path

    def write(self, record):
      self._writer.write(record)

    def close(self):
      self._writer.close()
      if self._full:
        raise RuntimeError("write() failed: No space left on device; writing x")

  with monkeypatch.context() as patch:
    patch.setattr(records.array_record_module, "ArrayRecordWriter", Full)
    with pytest.raises(InputError, match=r"00001-of-00004: expected to write .*No space left") as e:
      _prepare(raw, data)
  assert "finished shards are kept" in str(e.value) and "\n" not in str(e.value)
  partial = data / "ade150" / "1.0.0.partial"
  kept = _shards(partial)
  assert list(kept) == ["ade150-train.array_record-00000-of-00004"]
  assert kept.items() <= _shards(_prepare(raw, data)).items()
  _check(data, painted)


# The command


def test_list(raw, data, capsys):
  raw_ade_coco.ade150(raw)
  folder = _prepare(raw, data)
  capsys.readouterr()
  assert prepare.main(["--list", f"--data_dir={data}"]) == 0
  sets = {part.split(":")[0]: part for part in capsys.readouterr().out.split("\n\n")}
  assert list(sets) == [*registry.prepared_sets()]
  assert f"prepared  {TRAIN} train, {VAL} val in {folder}" in sets["ade150"]
  for word in ("COCO-Stuff 164k", "118,287 train, 5,000 val", "20 GB", "CC BY", "prepared  no"):
    assert word in sets["coco_stuff"]
  assert "on the page 'ADE20K dataset'" in sets["ade847"]
  assert "voc20 (20 classes, 5 unseen), voc20b (21 classes, evaluation only), voc21" in sets["voc"]
  assert "shapes (27 classes, 6 unseen), crowds (9 classes)" in sets["shapes"]


def test_interrupted_command(raw, data, monkeypatch, capsys):
  raw_ade_coco.ade150(raw)
  _fail_at(monkeypatch, "ADE_train_00000001", KeyboardInterrupt())
  command = ["ade150", f"--manual_dir={raw}", f"--data_dir={data}", "--allow_partial"]
  assert prepare.main(command) == 130
  assert "the same command continues" in capsys.readouterr().err


def test_list_into_a_reader_that_leaves(data):
  command = f"{sys.executable} -m data_pipelines.prepare --list --data_dir='{data}'"
  done = subprocess.run(
    ["bash", "-c", f"{command} | head -1; echo ${{PIPESTATUS[0]}}"],
    cwd=ROOT, capture_output=True, text=True,
  )  # fmt: skip
  first, status = done.stdout.splitlines()
  assert first == "voc: PASCAL VOC 2012 + SBD" and status in ("0", "141") and done.stderr == ""


def test_a_tilde_is_the_home_folder(raw, tmp_path, monkeypatch, data, capsys):
  """The shell leaves it as it is behind `=`."""
  painted = raw_ade_coco.ade150(raw)
  monkeypatch.setenv("HOME", str(tmp_path))
  monkeypatch.chdir(tmp_path)
  place = f"~/{data.name}"
  assert (
    prepare.main(["ade150", f"--manual_dir=~/{raw.name}", f"--data_dir={place}", "--allow_partial"])
    == 0
  )
  _check(data, painted)
  _check(place, painted)
  capsys.readouterr()
  assert prepare.main(["--list", f"--data_dir={place}"]) == 0
  assert f"{TRAIN} train, {VAL} val in {data}" in capsys.readouterr().out
  assert prepare.prepare("ade150", f"~/{raw.name}", place) == data / "ade150/1.0.0"
  assert not (tmp_path / "~").exists()
  with pytest.raises(InputError, match="write the whole path"):
    prepare.prepare("ade150", raw, "~nobody_of_this_name/data")


def test_progress_shows_what_is_kept(raw, data, monkeypatch):
  raw_ade_coco.ade150(raw)
  with monkeypatch.context() as patch:
    _fail_at(patch, "ADE_train_00000006", KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
      _prepare(raw, data)
  started = []
  progress = prepare.progress
  monkeypatch.setattr(
    prepare,
    "progress",
    lambda total, *args, initial: (
      started.append((total, initial)) or progress(total, *args, initial=initial)
    ),
  )
  _prepare(raw, data)
  assert started == [(TRAIN + VAL, 4)]


def test_command_without_a_name(capsys):
  with pytest.raises(SystemExit) as caught:
    prepare.main([])
  assert caught.value.code == 2 and "expected a data set: voc, " in capsys.readouterr().err
