"""Images that their EXIF data turns or mirrors: upright, unless the mask has the stored size."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from data_pipelines import finished, pipeline, prepare, records
from data_pipelines.sources import own_data
from data_pipelines.sources.builder import RawExample
from data_pipelines.sources.folder import Folder
from rpn_jax.base.errors import InputError
from tests.data_pipelines import raw_ade_coco

# EXIF orientation -> stored pixels as a viewer shows them (EXIF 2.3, section 4.6.4).
SHOWN = {
  1: lambda x: x,
  2: lambda x: x[:, ::-1],
  3: lambda x: x[::-1, ::-1],
  4: lambda x: x[::-1],
  5: lambda x: x.swapaxes(0, 1),
  6: lambda x: np.rot90(x, -1),
  7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
  8: lambda x: np.rot90(x),
}


def save(path, pixels, orientation=None):
  exif = orientation if isinstance(orientation, bytes) else Image.Exif()
  if isinstance(orientation, int):
    exif[0x0112] = orientation
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.fromarray(pixels).save(path, exif=exif)


def noise(height, width):
  return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


def ids(height, width):
  return np.arange(height * width, dtype=np.uint8).reshape(height, width) % 3


def read(tmp_path, pixels, orientation, label, label_orientation=None):
  """The record of one image and its mask in a folder with three classes."""
  save(tmp_path / "a.png", pixels, orientation)
  save(tmp_path / "mask.png", label, label_orientation)
  (tmp_path / "names.txt").write_text("a\nb\nc")
  builder = Folder(data_dir=tmp_path)
  with pytest.raises(InputError):  # only its class names are needed
    builder.examples(tmp_path)
  record = builder.read(RawExample("a", tmp_path / "a.png", tmp_path / "mask.png"))
  with Image.open(io.BytesIO(record["image"])) as image:
    assert image.getexif().get(0x0112) in (None, 1)
    return np.asarray(image), record["label"], record["exif"]


@pytest.mark.parametrize("orientation", SHOWN)
@pytest.mark.parametrize("size", [(6, 6), (4, 7)])
def test_turned_upright_like_the_mask(orientation, size, tmp_path):
  pixels = noise(*size)
  shown = SHOWN[orientation](pixels)
  label = ids(*shown.shape[:2])
  image, got, exif = read(tmp_path, pixels, orientation, label)
  np.testing.assert_array_equal(image, shown)
  np.testing.assert_array_equal(got, label)
  assert exif == ("upright" if orientation > 1 else "")


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_a_mask_of_the_stored_size_belongs_to_the_stored_pixels(orientation, tmp_path):
  pixels, label = noise(4, 7), ids(4, 7)
  image, got, exif = read(tmp_path, pixels, orientation, label)
  np.testing.assert_array_equal(image, pixels)
  np.testing.assert_array_equal(got, label)
  assert exif == "stored"


@pytest.mark.parametrize("orientation", SHOWN)
def test_a_mask_with_exif_data_is_turned_too(orientation, tmp_path):
  pixels, label = noise(4, 7), ids(4, 7)
  image, got, _ = read(tmp_path, pixels, orientation, label, orientation)
  np.testing.assert_array_equal(image, SHOWN[orientation](pixels))
  np.testing.assert_array_equal(got, SHOWN[orientation](label))


def test_a_mask_of_neither_size(tmp_path):
  with pytest.raises(InputError, match=r"its image's size, 4x7 as in .*a\.png, got 7x5"):
    read(tmp_path, noise(4, 7), 6, ids(5, 7))


@pytest.mark.parametrize("orientation", [0, 9])
def test_values_that_exif_does_not_define_change_nothing(orientation, tmp_path):
  image, _, exif = read(tmp_path, noise(4, 7), orientation, ids(4, 7))
  np.testing.assert_array_equal(image, noise(4, 7))
  assert exif == ""


def test_damaged_data_of_an_image_and_of_a_mask_turn_nothing(tmp_path):
  pixels, label, damaged = noise(4, 7), ids(4, 7), b"Exif\0\0no data"
  image, got, exif = read(tmp_path, pixels, damaged, label, damaged)
  np.testing.assert_array_equal(image, pixels)
  np.testing.assert_array_equal(got, label)
  assert exif == "" and own_data.size_of(tmp_path / "a.png") == (4, 7)
  encoded = {"image": (tmp_path / "a.png").read_bytes(), "id": "a"}
  example = pipeline.check_example({**encoded, "label": (tmp_path / "mask.png").read_bytes()})
  np.testing.assert_array_equal(example["image"], pixels)
  np.testing.assert_array_equal(example["label"], label)


def test_encoded_examples_of_a_source_are_turned_alike():
  file = io.BytesIO()
  exif = Image.Exif()
  exif[0x0112] = 6
  Image.fromarray(noise(4, 7)).save(file, "PNG", exif=exif)
  got = pipeline.check_example({"image": file.getvalue(), "label": ids(7, 4), "id": "a"})
  np.testing.assert_array_equal(got["image"], np.rot90(noise(4, 7), -1))


# What is said of it


@pytest.fixture
def raw(tmp_path):
  """Ten images: five turned with masks of the upright size, two of the stored one, three plain."""
  folder = tmp_path / "raw"
  raw_ade_coco.folder(folder, ("train",), ("a", "b", "c", "d"))
  for i, orientation in enumerate((3, 6, 6, 8, 2, 6, 8)):
    size = (8, 8) if i == 0 else (4, 7)
    pixels = noise(*size)
    (folder / f"images/train/pic {i} ä.jpg").unlink()
    save(folder / f"images/train/pic {i} ä.png", pixels, orientation)
    shape = size if i >= 5 else SHOWN[orientation](pixels).shape[:2]
    save(folder / f"labels/train/pic {i} ä.png", ids(*shape))
  return folder


SAID = (
  "5 images turned upright as their EXIF data says, 2 used as stored because their masks have the "
  "stored size"
)


def test_the_report_and_the_summary_count_them(raw, tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(prepare, "SHARD_EXAMPLES", 3)
  monkeypatch.setattr(prepare.preview, "draw", lambda *args: None)
  stop = records.Shard.write

  def interrupted(shard, *args):
    if "00002-of" in shard.path.name:
      raise KeyboardInterrupt
    stop(shard, *args)

  with monkeypatch.context() as patch:
    patch.setattr(records.Shard, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
      prepare.prepare("folder", raw, tmp_path)
  folder = prepare.prepare("folder", raw, tmp_path)
  assert SAID in capsys.readouterr().out.splitlines()
  summary = json.loads((folder / "summary.json").read_text())
  assert summary["exif"] == {"upright": 5, "stored": 2} and summary["images_of_earlier_runs"] == 6


def test_a_set_without_such_images_says_nothing_of_it(tmp_path, capsys):
  raw_ade_coco.folder(tmp_path / "raw", ("train",))
  folder = prepare.prepare("folder", tmp_path / "raw", tmp_path)
  assert "EXIF" not in capsys.readouterr().out
  assert json.loads((folder / "summary.json").read_text())["exif"] == {"upright": 0, "stored": 0}


def test_shards_of_other_rules_are_not_continued(raw, tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(prepare, "SHARD_EXAMPLES", 3)
  monkeypatch.setattr(prepare.preview, "draw", lambda *args: None)
  with monkeypatch.context() as patch:
    patch.setattr(finished, "READING_RULES", 1)
    patch.setattr(prepare.preview, "draw", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
      prepare.prepare("folder", raw, tmp_path)
  folder = prepare.prepare("folder", raw, tmp_path)
  out = capsys.readouterr().out
  assert "1.0.0.partial was begun with other files, options or rules: starting over" in out
  assert json.loads((folder / "summary.json").read_text())["images_of_earlier_runs"] == 0
  # A finished set of an earlier version is kept, and said to be one.
  assert "by an earlier version" not in out
  summary = json.loads((folder / "summary.json").read_text())
  del summary["reading_rules"]
  (folder / "summary.json").write_text(json.dumps(summary))
  prepare.prepare("folder", raw, tmp_path)
  assert "by an earlier version, which did not turn all images" in capsys.readouterr().out
  (folder / "summary.json").write_text(json.dumps({**summary, "reading_rules": 2}))
  prepare.prepare("folder", raw, tmp_path)
  assert "by an earlier version, which used color profiles, tr" in capsys.readouterr().out
