"""A data set of your own: one class that lists its raw files, and one call of `register`."""

import dataclasses
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import data_pipelines
from configs import common
from data_pipelines import DATA_SETS, datasets, prepare, records, registry, vocabularies
from data_pipelines.sources.builder import RawExample, SegmentationBuilder
from data_pipelines.sources.files import list_files
from rpn_jax.base import pixels
from rpn_jax.base.errors import InputError
from tests import ROOT


class Leaves(SegmentationBuilder):
  """Photographs of leaves beside masks: 0 healthy, 1 rust, 2 mildew, 255 not labeled."""

  name = "leaves"
  title = "Leaves with two diseases"
  counts = {"train": 4, "val": 2}  # noqa: RUF012
  obtain = "leaves.zip is on the page 'Leaves'"
  license = "CC BY 4.0"
  raw_size = "1 MB"
  layout = "{train,test}/*.png and {train,test}_masks/*.png"

  def examples(self, manual_dir):
    return {
      split: [
        RawExample(image.stem, image, manual_dir / f"{folder}_masks" / image.name)
        for image in list_files(manual_dir / folder, (".png",), "photographs", self.obtain)
      ]
      for split, folder in (("train", "train"), ("val", "test"))
    }


NAMES = ["healthy leaf", "rust", "mildew"]


@pytest.fixture(autouse=True)
def table():
  """What a test registers is forgotten after it."""
  before = dict(DATA_SETS)
  yield
  DATA_SETS.clear()
  DATA_SETS.update(before)


@pytest.fixture
def raw(tmp_path):
  rng = np.random.default_rng(0)
  for folder, count in (("train", 4), ("test", 2)):
    for kind in (folder, f"{folder}_masks"):
      (tmp_path / "raw" / kind).mkdir(parents=True)
    for i in range(count):
      image = rng.integers(0, 256, (20, 30, 3), np.uint8)
      label = np.repeat(np.resize([0, 1, 2, 255], 20)[:, None], 30, axis=1).astype(np.uint8)
      Image.fromarray(image).save(tmp_path / "raw" / folder / f"{i}.png")
      Image.fromarray(label).save(tmp_path / "raw" / f"{folder}_masks" / f"{i}.png")
  return tmp_path / "raw"


def make_config(data_dir, name="leaves", setting="supervised"):
  config = common.segmentation("paper", name, crop=32, patch=16, deep_tokens=0).unlock()
  config.data.update(data_dir=str(data_dir), setting=setting, batch_size=2, short_side=32)
  config.data.update(scale=(128, 32), mean=pixels.CLIP_MEAN, std=pixels.CLIP_STD)
  return config


def test_from_raw_files_to_batches(raw, tmp_path, capsys):
  data_pipelines.register("leaves", Leaves, NAMES, unseen=["mildew"])
  assert prepare.main(["leaves", f"--manual_dir={raw}", f"--data_dir={tmp_path / 'data'}"]) == 0
  assert "3 of 3 classes found; 25.0% of the pixels" in capsys.readouterr().out
  data = datasets.load(make_config(tmp_path / "data"))
  assert data.names == tuple(NAMES) and data.unseen == ()  # every class is trained on
  assert datasets.load(make_config(tmp_path / "data", setting="zero_shot")).unseen == (2,)
  batch = next(data.train_batches(0))
  assert batch["image"].shape == (2, 32, 32, 3) and batch["image"].dtype == np.float32
  assert set(np.unique(batch["label"])) <= {0, 1, 2, 255}
  example = data.eval_examples()[1]
  assert example["id"] == "1" and example["image"].shape == (32, 48, 3)
  np.testing.assert_array_equal(example["label"][:, 7], np.resize([0, 1, 2, 255], 20))
  seen = datasets.load(make_config(tmp_path / "data", setting="zero_shot"))
  assert seen.trained == (0, 1)
  assert set(np.unique(next(seen.train_batches(0))["label"])) <= {0, 1, 255}
  # The commands know it, too.
  assert prepare.main(["--list", f"--data_dir={tmp_path / 'data'}"]) == 0
  out = capsys.readouterr().out
  assert "leaves: Leaves with two diseases\n" in out and "leaves (3 classes, 1 unseen)" in out


def test_several_sets_share_prepared_files(raw, tmp_path):
  data_pipelines.register("leaves", f"{__name__}:Leaves", NAMES)
  ids = {0: 0, 1: 1, 2: 1}
  classes = vocabularies.of_names("sick", ["healthy leaf", "sick leaf"])
  classes = dataclasses.replace(classes, ids=ids)
  data_pipelines.register("sick", f"{__name__}:Leaves", classes, prepared="leaves")
  prepare.prepare("leaves", raw, tmp_path)
  assert [row.name for row in registry.prepared_sets()["leaves"]] == ["leaves", "sick"]
  label = datasets.load(make_config(tmp_path, "sick")).eval_examples()[0]["label"]
  np.testing.assert_array_equal(label[:, 0], np.resize([0, 1, 1, 255], 20))
  assert len(records.source("leaves", tmp_path, "train")) == 4


def test_data_that_need_no_preparation(tmp_path):
  def examples(data_config, split):
    image, label = np.zeros((8, 9, 3), np.uint8), np.ones((8, 9), np.uint8)
    assert data_config.data_dir == str(tmp_path)
    return [{"image": image, "label": label, "id": f"{split} {i}"} for i in range(3)]

  data_pipelines.register("arrays", classes=["a", "b"], source=examples)
  data = datasets.load(make_config(tmp_path, "arrays"))
  assert [example["id"] for example in data.eval_examples()] == ["val 0", "val 1", "val 2"]
  assert (next(data.train_batches(0))["label"] == 1).any()
  with pytest.raises(InputError, match="arrays is not prepared from raw files"):
    prepare.prepare("arrays", tmp_path, tmp_path)


def test_a_name_can_be_registered_again():
  for names in (["a"], ["a", "b"]):
    data_pipelines.register("mine", Leaves, names)
    assert vocabularies.load("mine").names == tuple(names)


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ({"builder": Leaves, "classes": ["a", "a"]}, "duplicate class name 'a'"),
    ({"builder": Leaves, "classes": ["cat", "dog"], "unseen": ["dgo"]}, "did you mean 'dog'"),
    ({"builder": Leaves, "classes": ["e\u0301", "\u00e9"]}, "duplicate class name"),
    ({"classes": ["a"]}, "either a builder or a source"),
    ({"builder": Leaves, "source": list, "classes": ["a"]}, "either a builder or a source"),
  ],
)
def test_what_is_refused(arguments, message):
  with pytest.raises(InputError, match=message):
    data_pipelines.register("mine", **arguments)
  assert "mine" not in DATA_SETS


def test_the_table_is_light():
  code = (
    "import sys, data_pipelines; from data_pipelines import vocabularies; "
    "vocabularies.load('ade847'); "
    "print(sorted({'numpy', 'cv2', 'grain', 'tensorflow_datasets', 'jax'} & set(sys.modules)))"
  )
  command = [sys.executable, "-c", code]
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
  assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", list(registry.prepared_sets()))
def test_every_row_leads_to_a_builder_of_its_name(name):
  if registry.prepared_sets()[name][0].source is not None:
    assert callable(registry.resolve(registry.prepared_sets()[name][0].source))
    return
  cls = registry.builder_class(name)
  assert cls.name == name
  for attribute in ("title", "counts", "obtain", "license", "raw_size", "layout"):
    assert getattr(cls, attribute, None) is not None, attribute
