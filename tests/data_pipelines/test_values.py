"""Masks whose values are not the positions of the names: `--values`, and what suggests it."""

import json
import re
import shlex

import numpy as np
import pytest

from configs import folder as folder_config
from data_pipelines import datasets, prepare, records
from rpn_jax.base import pixels
from rpn_jax.base.errors import InputError
from tests.data_pipelines.raw_pascal import gray_png, jpeg


@pytest.fixture(autouse=True)
def _no_preview(monkeypatch):
  monkeypatch.setattr(prepare.preview, "draw", lambda *args: None)  # takes a second


def make_raw(root, values, names, count=4):
  """Masks in stripes of the given values; returns the folder."""
  for i in range(count):
    jpeg(root / f"images/train/{i}.jpg", 12, 12)
    jpeg(root / f"images/val/{i}.jpg", 12, 12)
    label = np.repeat(np.resize(values, 12)[:, None], 12, axis=1)
    gray_png(root / f"labels/train/{i}.png", label)
    gray_png(root / f"labels/val/{i}.png", label)
  (root / "names.txt").write_text("\n".join(names))
  return root


@pytest.fixture
def binary(tmp_path):
  return make_raw(tmp_path / "my masks", [0, 255], ["background", "road"])


def command(raw, data_dir, *more):
  return ["folder", f"--manual_dir={raw}", f"--data_dir={data_dir}", "--config=mine", *more]


def evaluated(data_dir):
  """The evaluation labels of the set, through the config as a run opens it."""
  config = folder_config.get_config("runlocal").unlock()
  config.data.update(data_dir=str(data_dir), variant="mine", crop=32, short_side=32, batch_size=2)
  config.data.update(scale=(128, 32), mean=pixels.CLIP_MEAN, std=pixels.CLIP_STD)
  data = datasets.load(config)
  batch = next(data.train_batches(0))
  assert set(np.unique(batch["label"])) <= {*range(len(data.names)), 255}
  return data, [example["label"] for example in data.eval_examples()]


def test_binary_masks_are_refused_with_the_command_that_reads_them(binary, tmp_path, capsys):
  data_dir = tmp_path / "data dir"
  assert prepare.main(command(binary, data_dir)) == 2
  error = capsys.readouterr().err
  assert "expected masks of 0 (background) and 1 (road), got only 0 and 255" in error
  assert not (data_dir / "folder/mine/1.0.0").exists()
  said = re.search(r"if it is road, run: (python -m data_pipelines\.prepare .*?) \(if", error)[1]
  python, _, module, *arguments = shlex.split(said)
  assert (python, module) == ("python", "data_pipelines.prepare")
  assert prepare.main(arguments) == 0
  assert "2 of 2 classes found; 0.0% of the pixels" in capsys.readouterr().out
  data, labels = evaluated(data_dir)
  assert data.names == ("background", "road") and data.ignore == 255
  stripes = np.repeat(np.resize([0, 1], 12)[:, None], 12, axis=1)
  for label in labels:
    np.testing.assert_array_equal(label, stripes)


def test_255_may_be_no_class_on_purpose(binary, tmp_path, capsys):
  assert prepare.main(command(binary, tmp_path, "--values=0,1")) == 0
  out = capsys.readouterr().out
  assert "1 of 2 classes found; 50.0% of the pixels" in out and "\nnot found: road\n" in out
  _, labels = evaluated(tmp_path)
  assert {int(x) for label in labels for x in np.unique(label)} == {0, 255}


@pytest.mark.parametrize(
  ("values", "names"),
  [([0, 1], "ab"), ([0, 1, 255], "ab"), ([0, 1, 2], "abc"), ([0, 255], "a"), ([0, 255], "abc")],
)
def test_other_masks_are_taken_as_they_are(values, names, tmp_path):
  make_raw(tmp_path / "raw", values, [*names])
  assert prepare.main(command(tmp_path / "raw", tmp_path)) == 0
  _, labels = evaluated(tmp_path)
  assert {int(x) for label in labels for x in np.unique(label)} == set(values)


def test_wrong_values_suggest_the_option(tmp_path, capsys):
  raw = make_raw(tmp_path / "raw", [0, 128, 255], ["sky", "sea", "sand"])
  assert prepare.main(command(raw, tmp_path)) == 2
  error = capsys.readouterr().err
  assert "expected label values 0…2, 255, got 128 on 48 pixels" in error
  assert "add --values=0,128,255: the mask value of every name" in error
  assert prepare.main(command(raw, tmp_path, "--values=0,128,255")) == 0
  _, labels = evaluated(tmp_path)
  np.testing.assert_array_equal(labels[0][:, 0], np.resize([0, 1, 2], 12))
  # Only some of the classes occur in the mask: the option is named without guessing its values.
  more = make_raw(tmp_path / "more", [0, 128], ["sky", "sea", "sand"])
  assert prepare.main(command(more, tmp_path / "more data")) == 2
  assert "add --values=VALUE,VALUE,…: the mask" in capsys.readouterr().err


@pytest.mark.parametrize("values", ["0", "0,0", "0,1,2", "0,65536", "-1,0"])
def test_values_that_do_not_fit_the_names(values, binary, tmp_path, capsys):
  assert prepare.main(command(binary, tmp_path, f"--values={values}")) == 2
  error = capsys.readouterr().err
  assert f"--values={values}: expected a different number in 0…65535 for each of the 2" in error


def test_values_that_are_no_numbers(binary, tmp_path, capsys):
  with pytest.raises(SystemExit) as caught:
    prepare.main(command(binary, tmp_path, "--values=a,b"))
  assert caught.value.code == 2 and "--values" in capsys.readouterr().err


def test_a_finished_set_keeps_its_values(binary, tmp_path, capsys):
  folder = prepare.prepare("folder", binary, tmp_path, config="mine", values=[0, 255])
  assert json.loads((folder / "names.json").read_text())["values"] == [0, 255]
  assert prepare.main(command(binary, tmp_path, "--values=0,255")) == 0
  assert prepare.main(["folder", f"--data_dir={tmp_path}", "--config=mine"]) == 0
  capsys.readouterr()
  for more in (["--values=255,0"], []):
    assert prepare.main(command(binary, tmp_path, *more)) == 2
    error = capsys.readouterr().err
    assert "was prepared with --values=0,255, got " in error and "--config=NAME" in error


def test_shards_of_other_values_are_not_continued(binary, tmp_path, monkeypatch, capsys):
  with pytest.raises(InputError, match="--values=0,255"):
    prepare.prepare("folder", binary, tmp_path, config="mine")
  prepare.prepare("folder", binary, tmp_path, config="mine", values=[255, 0])
  assert "starting over" in capsys.readouterr().out
  assert records.stored_vocabulary("folder", tmp_path, "mine").ids == {255: 0, 0: 1}


def test_names_of_version_0_2_are_read(binary, tmp_path):
  folder = prepare.prepare("folder", binary, tmp_path, config="mine", values=[0, 255])
  (folder / "names.json").write_text('{"names": ["background", "road"], "unseen": ["road"]}')
  vocabulary = records.stored_vocabulary("folder", tmp_path, "mine")
  assert vocabulary.ids == {0: 0, 1: 1} and vocabulary.unseen == (1,)


def test_published_sets_have_their_own_values(tmp_path):
  with pytest.raises(InputError, match="voc has label values of its own"):
    prepare.prepare("voc", tmp_path, tmp_path, values=[0, 1])


def test_classes_that_never_occur_are_named(tmp_path, capsys):
  names = [f"class {i}" for i in range(15)]
  make_raw(tmp_path / "raw", [0, 3], names)
  assert prepare.main(command(tmp_path / "raw", tmp_path)) == 0
  lines = capsys.readouterr().out.splitlines()
  missing = [n for i, n in enumerate(names) if i not in (0, 3)]
  assert f"not found: {'; '.join(missing[:10])} and 3 more (all in summary.json)" in lines
