"""Zero-shot classification of whole images."""

import dataclasses
import io
import json
import pathlib
import zipfile

import jax
import numpy as np
import pytest
from PIL import Image

from configs import training_free
from data_pipelines import shapes
from rpn_jax.base import pixels
from rpn_jax.base.errors import InputError
from rpn_jax.inference.predictor import Predictor
from rpn_jax.models.clip import CLIP
from rpn_jax.tasks import classify
from rpn_jax.text.tokenizer import tokenize
from rpn_jax.weights import clip_file
from tests import FIXTURES


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """24 pictures of one object each, in a folder per class."""
  root = tmp_path_factory.mktemp("pictures")
  images, labels = shapes.single_object_images(24, seed=5)
  for i, (image, label) in enumerate(zip(images, labels)):
    directory = root / shapes.OBJECTS[label].replace(" ", "_")
    directory.mkdir(exist_ok=True)
    Image.fromarray(image).save(directory / f"{i}.png")
  return root


def run(workdir, image, classes=None):
  return classify.classify(training_free.get_config(), workdir, image and str(image), classes)


def test_probabilities_are_those_of_clip(folder, tmp_path):
  """Through `CLIP.__call__`, an image that is not square, and more images than one batch."""
  names = ["striped red", "plain blue", "sand"]
  rng = np.random.default_rng(0)
  for i in range(classify.BATCH_IMAGES + 1):
    noise = rng.integers(0, 255, (9, 12, 3), np.uint8)
    Image.fromarray(noise).resize((120, 90)).save(tmp_path / f"{i:02}.png")
  content = run(tmp_path / "run", tmp_path, "striped red, plain blue, sand")
  assert json.loads((tmp_path / "run/classify.json").read_text()) == content
  assert "top1" not in content and len(content["images"]) == classify.BATCH_IMAGES + 1

  config, params = clip_file.load_clip("shapes_clip.safetensors")
  inputs = np.stack([pixels.for_classification(file, 64) for file in content["images"]])
  tokens = tokenize([f"a photo of a {name}" for name in names], config.context_length)
  logits = jax.jit(CLIP(config).apply)({"params": params}, inputs, tokens)
  got = [[scores[name] for name in names] for scores in content["images"].values()]
  np.testing.assert_allclose(got, jax.nn.softmax(logits), atol=1e-4)
  for scores in content["images"].values():
    assert list(scores.values()) == sorted(scores.values(), reverse=True)


def test_a_folder_of_classes(folder, tmp_path, capsys):
  content = run(tmp_path, folder)
  right = [
    pathlib.Path(file).parent.name.replace("_", " ") == next(iter(scores))
    for file, scores in content["images"].items()
  ]
  assert content["top1"] == np.mean(right) and content["top5"] >= content["top1"] >= 0.8
  assert all(len(scores) == classify.FILE_CLASSES for scores in content["images"].values())
  said = capsys.readouterr().out
  assert f"top1 of 24 images: {100 * np.mean(right):.1f} %" in said
  assert (
    content["note"].endswith("knows drawn shapes and no photographs") and content["note"] in said
  )


def test_a_file_that_cannot_be_read_is_left_out_and_told(folder, tmp_path):
  images = tmp_path / "in"
  images.mkdir()
  for i, file in enumerate((folder / "plain_red").iterdir()):
    (images / f"{i}.png").write_bytes(file.read_bytes())
  (images / "0a.png").write_text("no image")
  with pytest.raises(InputError, match=r"1 of \d+ images were skipped, such as .*0a\.png: "):
    run(tmp_path / "run", images, "plain red, plain blue")
  written = json.loads((tmp_path / "run/classify.json").read_text())["images"]
  assert len(written) == len(list(images.iterdir())) - 1 and "0a" not in "".join(map(str, written))
  assert "0a.png: " in (tmp_path / "run/skipped.txt").read_text()


def test_one_file(folder, tmp_path, capsys):
  file = next((folder / "plain_red").iterdir())
  content = run(tmp_path, file, "plain red, plain blue")
  scores = content["images"][str(file)]
  assert next(iter(scores)) == "plain red" and scores["plain red"] > 0.9
  line = next(line for line in capsys.readouterr().out.splitlines() if file.name in line)
  assert line.split() == [file.name, "plain", "red", f"{100 * scores['plain red']:.1f}"]


def test_what_is_no_image_of_a_class(tmp_path):
  for name in (
    "cafe\u0301/a.png", "cafe\u0301/._a.png", ".ipynb_checkpoints/b.png", "sea/c.png", "loose.png",
    "sea/2024/d.png",
  ):  # fmt: skip
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(b"")
  names, found, labels = classify.find_labeled(str(tmp_path))
  assert names == ("caf\u00e9", "sea")
  assert [file.name for file in found.files] == ["a.png", "c.png"] and labels == [0, 1]
  assert [(path.name, why) for path, why in found.left_out] == [
    ("._a.png", "hidden"), ("loose.png", "beside the folders of the classes"),
    ("2024", "folder below that of a class"),
  ]  # fmt: skip
  (tmp_path / "sea/c.png").unlink()
  with pytest.raises(InputError, match=r"sea: no image in this folder"):
    classify.find_labeled(str(tmp_path))


def test_bad_input(folder, tmp_path):
  file = next((folder / "plain_red").iterdir())
  for image, classes, message in [
    (None, "a, b", "needs --image"),
    (file, None, "needs --classes"),
    (folder / "plain_red", None, "one subfolder per class"),
    (folder, "a, b", "no image in this folder$"),
    (file, "a,,b", "class name 2 of 3 is empty"),
    (folder / "none", "a, b", "no such file"),
  ]:
    with pytest.raises(InputError, match=message):
      run(tmp_path / "w", image, classes)
  assert not (tmp_path / "w").exists()


def square(image, side):
  return np.asarray(pixels.square(Image.fromarray(image), side))


def test_square_is_the_middle():
  columns = np.broadcast_to(np.arange(60, dtype=np.uint8)[None, :, None], (20, 60, 3))
  # The side stays: nothing is resized, and (60 - 20) / 2 = 20 columns are cut on the left.
  np.testing.assert_array_equal(square(columns, 20), columns[:, 20:40])
  np.testing.assert_array_equal(
    square(columns.transpose(1, 0, 2), 20), columns[:, 20:40].transpose(1, 0, 2)
  )


def test_resize_has_antialias():
  """Rows of one pixel become grey; picking every fourth row would leave them black or white."""
  stripes = np.zeros((64, 96, 3), np.uint8)
  stripes[::2] = 255
  small = square(stripes, 16)
  assert small.shape == (16, 16, 3) and np.abs(small[2:-2].astype(int) - 128).max() < 8


def test_long_side_is_cut_off():
  """30 x 47 to a short side of 16: 25 columns (25.07), of which 4 (4.5, to even) are cut."""
  image = np.random.default_rng(0).integers(0, 255, (30, 47, 3), np.uint8)
  whole = np.asarray(Image.fromarray(image).resize((25, 16), Image.Resampling.BICUBIC))
  np.testing.assert_array_equal(square(image, 16), whole[:, 4:20])


def test_normalised_as_clip(tmp_path):
  Image.new("RGB", (40, 30), (255, 0, 0)).save(tmp_path / "red.png")
  image = pixels.for_classification(tmp_path / "red.png", 16)
  want = [(1 - 0.48145466) / 0.26862954, -0.4578275 / 0.26130258, -0.40821073 / 0.27577711]
  np.testing.assert_allclose(image, np.broadcast_to(want, (16, 16, 3)), rtol=1e-5)


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1", "RGBA", "LA", "CMYK"])
def test_modes_are_resized_before_they_are_converted(mode):
  """The values that OpenAI's own preprocessing gives; see `tests/tools/make_clip_files.py`."""
  with zipfile.ZipFile(FIXTURES / "clip_files.zip") as archive:
    recorded = np.load(io.BytesIO(archive.read("images.npz")))
  image = Image.frombytes(mode, (40, 30), recorded[mode].tobytes())
  if mode == "P":
    image.putpalette(recorded["palette"].tobytes())
  got = pixels.for_classification(image, 16)
  values = 255 * (got * pixels.CLIP_STD + pixels.CLIP_MEAN)
  np.testing.assert_array_equal(np.round(values), recorded[f"{mode}_right"])


def test_squashed_images_and_other_statistics():
  image = np.random.default_rng(0).integers(0, 255, (30, 60, 3), np.uint8)
  got = pixels.for_classification(image, 16, (0.5,) * 3, (0.25,) * 3, squash=True)
  small = np.asarray(Image.fromarray(image).resize((16, 16), Image.Resampling.BICUBIC))
  np.testing.assert_allclose(got, (small / 255 - 0.5) / 0.25, atol=1e-5)


def test_the_statistics_of_the_weights(folder, tmp_path):
  """Classification follows them."""
  config, params = clip_file.load_clip("shapes_clip.safetensors")
  half = dataclasses.replace(config, mean=(0.5,) * 3, std=(0.25,) * 3, squash=True)
  clip_file.save(tmp_path / "half.safetensors", half, params)
  settings = training_free.get_config()
  settings.clip = str(tmp_path / "half.safetensors")
  file = next((folder / "plain_red").iterdir())
  arguments = (settings, tmp_path / "w", str(file), "plain red, plain blue")
  scores = classify.classify(*arguments)["images"][str(file)]
  image = pixels.for_classification(file, 64, half.mean, half.std, squash=True)
  tokens = tokenize([f"a photo of a {name}" for name in scores], config.context_length)
  want = jax.nn.softmax(jax.jit(CLIP(config).apply)({"params": params}, image[None], tokens))
  np.testing.assert_allclose(list(scores.values()), want[0], atol=1e-4)
  assert Predictor.from_weights(settings.clip).protocol.mean == (0.5, 0.5, 0.5)


def test_what_was_decided_and_left_out_is_said(tmp_path, capsys):
  (tmp_path / "in").mkdir()
  deep = np.linspace(0, 4095, 48 * 64).reshape(48, 64).astype(np.uint16)
  Image.fromarray(deep).save(tmp_path / "in/deep.png")
  pages = [Image.new("L", (64, 48), color) for color in (0, 200)]
  pages[0].save(tmp_path / "in/scan.tif", save_all=True, append_images=pages[1:])
  Image.new("RGB", (64, 48)).save(tmp_path / "in/plain.png")
  (tmp_path / "in/raw.cr2").write_bytes(b"")
  content = run(tmp_path / "run", tmp_path / "in", "sand, water")
  read = {pathlib.Path(file).name: texts for file, texts in content["read"].items()}
  assert read.keys() == {"deep.png", "scan.tif"} and "page 1 of 2" in read["scan.tif"][0]
  said = capsys.readouterr().out
  assert "page 1 of 2" in said and "0 … 4095" in said
  assert "left out of the images: 1 of another format" in said
  assert "raw.cr2: left out, of another format" in (tmp_path / "run/skipped.txt").read_text()
