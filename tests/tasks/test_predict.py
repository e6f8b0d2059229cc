"""A folder of images: read and written by threads beside the network."""

import contextlib
import signal
import threading

import numpy as np
import pytest
from PIL import Image

from data_pipelines import shapes
from rpn_jax import Segmenter
from rpn_jax.base import interrupts, picture_files, pictures
from rpn_jax.base.errors import InputError
from rpn_jax.inference.segmentation import Segmentation
from rpn_jax.tasks import predict

NAMES = ("plain red", "striped blue", "grass", "sand", "water")
COUNT = 12


@pytest.fixture(scope="module")
def model():
  return Segmenter.load("shapes_clip", templates="single")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
  folder = tmp_path_factory.mktemp("folder")
  for i in range(COUNT):
    image, _ = shapes.draw_scene(np.random.default_rng(i), 40 + 8 * (i % 3), 64, (2, 3))
    Image.fromarray(image).save(folder / f"{i:02}.png")
  return picture_files.find(str(folder))


def saved(folder):
  """Number -> labels of an image; all files are read, so none is cut."""
  found = {}
  for path in sorted(folder.iterdir()):
    if path.suffix == ".png":
      with Image.open(path) as file:
        pixels_of = np.asarray(file)
      if path.stem.endswith("_labels"):
        found[int(path.stem[:2])] = pixels_of
  return found


def test_results_are_those_of_one_image_after_another(model, files, tmp_path, capsys):
  written = predict.save_all(model, files, NAMES, tmp_path)
  kinds = ("_overlay.png", "_labels.png", ".json")
  assert [file.name for file in written] == [f"{i:02}{k}" for i in range(COUNT) for k in kinds]
  assert f"{COUNT} x *_labels.png" in capsys.readouterr().out
  labels = saved(tmp_path)
  for i, file in enumerate(files.files):
    np.testing.assert_array_equal(labels[i], model(file, NAMES).labels)


def test_what_cannot_be_read_is_told_in_order_after_the_rest(model, files, tmp_path):
  (tmp_path / "in").mkdir()
  for file in files.files:
    (tmp_path / "in" / file.name).symlink_to(file)
  broken = [tmp_path / "in" / name for name in ("02x3.png", "06x7.png")]  # between the others
  for file in broken:
    file.write_bytes(b"no image")
  found = picture_files.find(str(tmp_path / "in"))
  with pytest.raises(InputError, match=r"2 of 14 images were skipped, such as .*x3\.png"):
    predict.save_all(model, found, NAMES, tmp_path / "out")
  assert len(saved(tmp_path / "out")) == COUNT
  head, *told = (tmp_path / "out/skipped.txt").read_text().splitlines()
  assert head == f"# left out by rpn, of {tmp_path}/in"
  assert [str(path) in line for path, line in zip(broken, told, strict=True)] == [True, True]


def test_lists_of_other_images_and_notes_of_the_user_stay(tmp_path):
  out, error = tmp_path / "out", [InputError("a.png: damaged")]

  def listed(folder, unreadable, total=3):
    with contextlib.suppress(InputError):
      predict.check_skipped(unreadable, total, out, tmp_path / folder)
    return {path.name: path.read_text().split("\n")[0] for path in out.iterdir()}

  a, b = (f"# left out by rpn, of {tmp_path}/{name}" for name in "ab")
  assert listed("a", error) == {"skipped.txt": a}
  assert listed("a/one.png", [], total=1) == listed("a/one.png", error, total=1) == listed("b", [])
  assert listed("b", error) == {"skipped.txt": a, "skipped_2.txt": b} == listed("a", error)
  assert listed("b", []) == {"skipped.txt": a} and listed("a", []) == {}
  (out / "skipped.txt").write_text("my own notes")
  assert listed("a", []) == {"skipped.txt": "my own notes"}
  assert listed("a", error) == {"skipped.txt": "my own notes", "skipped_2.txt": a}


def test_names_that_results_cannot_have(model, files, tmp_path):
  found = picture_files.Found(
    tmp_path, [tmp_path / "\udcff.png"], [(tmp_path / "\udcfe", "hidden")]
  )
  with pytest.raises(InputError, match=r"1 of 1 images .*dcff.png: expected a file name in UTF-8"):
    predict.save_all(model, found, NAMES, tmp_path / "out")
  told = (tmp_path / "out/skipped.txt").read_text(encoding="utf-8").splitlines()
  assert len(told) == 3 and told[2].endswith("dcfe: left out, hidden")
  root = files.root.parent
  inside = picture_files.Found(root, [root / "labelme" / "x.png"], [])
  with pytest.raises(
    InputError, match=r"labelme: expected a subfolder of another name, since --save"
  ):
    predict.save_all(model, inside, NAMES, tmp_path, save="json,labelme")


def fail_at(monkeypatch, stem, action):
  save = Segmentation.save

  def failing(self, directory, name=None, **options):
    if name == stem:
      action()
    return save(self, directory, name, **options)

  monkeypatch.setattr(Segmentation, "save", failing)


def test_a_full_disk_ends_the_command_and_what_was_done_is_whole(
  model, files, tmp_path, monkeypatch
):
  def full():
    raise OSError(28, "No space left on device")

  fail_at(monkeypatch, "05", full)
  before = threading.active_count()
  with pytest.raises(InputError, match=r"results of .*05\.png, got No space left .*: free"):
    predict.save_all(model, files, NAMES, tmp_path)
  done = saved(tmp_path)
  assert set(range(5)) <= set(done) and 5 not in done
  assert not list(tmp_path.glob(".*")) and threading.active_count() <= before
  assert len(list(tmp_path.iterdir())) == 3 * len(done)  # all three files of each


def test_ctrl_c_leaves_whole_files(model, files, tmp_path, monkeypatch):
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  try:
    fail_at(monkeypatch, "04", lambda: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt), interrupts.handled():
      predict.save_all(model, files, NAMES, tmp_path)
  finally:
    signal.signal(signal.SIGINT, before)
  done = saved(tmp_path)
  assert not list(tmp_path.glob(".*")) and len(list(tmp_path.iterdir())) == 3 * len(done)
  assert 1 <= len(done) < COUNT


def test_large_images_are_not_read_far_ahead(model, files, tmp_path, monkeypatch):
  monkeypatch.setattr(predict.overlap, "MAX_BYTES", 1)  # each is larger
  under_way, most = 0, 0
  load, save = pictures.load, Segmentation.save

  def counted_load(image, **options):
    nonlocal under_way, most
    under_way += 1
    most = max(most, under_way)
    return load(image, **options)

  def counted_save(self, *given, **options):
    nonlocal under_way
    written = save(self, *given, **options)
    under_way -= 1
    return written

  monkeypatch.setattr(pictures, "load", counted_load)
  monkeypatch.setattr(Segmentation, "save", counted_save)
  predict.save_all(model, files, NAMES, tmp_path)
  # Those whose windows share a call of the network, and one before and after it.
  assert most <= 8
