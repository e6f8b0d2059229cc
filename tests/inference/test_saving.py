"""What `save` writes for one image and for many; labels and scores are given, no network runs."""

import json
import types

import numpy as np
import pytest
from PIL import Image

from rpn_jax.base import picture_files
from rpn_jax.base.errors import InputError
from rpn_jax.inference.segmentation import Segmentation, save_results
from rpn_jax.tasks import predict
from tests.annotations import scenes
from tests.annotations.scenes import NAMES


def result(file="", label=None, names=NAMES) -> Segmentation:
  label = scenes.nested() if label is None else label
  nothing = types.SimpleNamespace(scores=types.SimpleNamespace(nbytes=0))
  made = Segmentation(scenes.image(label), names, "by hand", nothing, file=file)
  scores = np.random.default_rng(0).random((10, 12, len(names)), np.float32)
  made.__dict__ |= {"_best": (label, np.full(label.shape, 0.5, np.float32)), "scores": scores}
  return made


def test_the_forms_of_one_image(tmp_path):
  written = result("photos/a.jpg").save(tmp_path, save="scores,coco", min_area=5)
  assert [path.relative_to(tmp_path).as_posix() for path in written] == [
    "a_scores.npz", "a_scores.png", "coco/a.json",
  ]  # fmt: skip
  areas = [each["area"] for each in json.loads(written[2].read_text())["annotations"]]
  assert min(areas) >= 5 and len(areas) == sum(a >= 5 for a in areas)
  assert sorted(tmp_path.rglob("*")) == sorted([*written, tmp_path / "coco"])
  assert [p.name for p in result().save(tmp_path, "x")] == [
    "x_overlay.png", "x_labels.png", "x.json",
  ]  # fmt: skip
  for options, message in [
    ({"save": "overlay,yoloo"}, "save='yoloo' is not known; did you mean 'yolo'"),
    ({"min_area": 5}, "min_area=5 has no effect on overlay, labels, json"),
  ]:
    with pytest.raises(InputError, match=message):
      result().save(tmp_path / "refused", **options)
  assert not (tmp_path / "refused").exists()


def test_scores_come_back(tmp_path):
  segmented = result()
  path, picture = segmented.save(tmp_path, "a", save=["scores"])
  with np.load(path) as archive:  # without pickled objects
    assert archive["scores"].dtype == np.float16
    np.testing.assert_allclose(archive["scores"], segmented.scores, atol=0.00025)
    assert archive["names"].tolist() == list(NAMES) and archive["size"].tolist() == [40, 50]
  with Image.open(picture) as grid:
    assert grid.width > 1000


def test_many_results_share_a_file(tmp_path):
  files = [tmp_path / f"{name}.png" for name in "ba"]
  for file in files:
    Image.fromarray(scenes.image(scenes.nested())).save(file)
  written = save_results(map(result, files), tmp_path / "out", save=["labels", "coco", "yolo"])
  assert [path.name for path in written if path.suffix == ".json"] == [
    "b.json", "a.json", "annotations.json",
  ]  # fmt: skip
  assert {*(tmp_path / "out/yolo/sources").iterdir()} < {*written}
  images = json.loads((tmp_path / "out/coco/annotations.json").read_text())["images"]
  assert [image["file_name"] for image in images] == ["a.png", "b.png"]
  arrays = save_results([result(), result()], tmp_path / "arrays")
  assert [path.name for path in arrays if path.suffix == ".json"] == [
    "picture_0.json", "picture_1.json",
  ]  # fmt: skip
  for others, message in [
    ([result("a.png"), result("x/a.png")], "x/a.png: expected images with different names, got a "),
    ([result("\xfc.png"), result("u\u0308.png")], "expected images with different names, got u"),
    ([result("a"), result("b", names=NAMES[::-1])], "b: expected a result with the names of the"),
  ]:
    with pytest.raises(InputError, match=message):
      save_results(others, tmp_path / "twice", save="coco")
    # What was done before is kept.
    kept = json.loads((tmp_path / "twice/coco/annotations.json").read_text())
    assert len(kept["images"]) == 1


class _Segmenter:
  """Stands in for a network; interrupted after so many images."""

  method = "by hand"

  def __init__(self, images=99):
    self.images = images

  def stream(self, images, names, **options):
    for i, image in enumerate(images):
      if i == self.images:
        raise KeyboardInterrupt
      made = result(label=scenes.noise(*image.image.shape[:2], i), names=names)
      made.page = image.page
      yield made


def test_a_folder_with_an_unreadable_image_and_an_interruption(tmp_path, capsys):
  files = [tmp_path / f"{i}.png" for i in range(5)]
  for file in files:
    Image.new("RGB", (9, 8)).save(file)
  files[1].write_text("no image")
  found = picture_files.find(str(tmp_path))
  out = tmp_path / "out"
  images = lambda: json.loads((out / "coco/annotations.json").read_text())["images"]
  names = "cat | kitten, dog, grass"
  with pytest.raises(InputError, match="1 of 5 images were skipped"):
    predict.save_all(
      _Segmenter(), found, names, out, save="overlay,coco,yolo,voc", annotations={"min_area": 2}
    )
  assert [image["file_name"] for image in images()] == ["0.png", "2.png", "3.png", "4.png"]
  said = capsys.readouterr().out
  for kind in ("4 x *_overlay.png", "1 x coco/*.json", "4 x yolo/labels/*.txt", "1 x yolo/*.yaml"):
    assert kind in said
  with pytest.raises(KeyboardInterrupt):
    predict.save_all(_Segmenter(2), found, names, tmp_path / "cut", save="labels,coco")
  out = tmp_path / "cut"
  # Of two images that were segmented those that were written: the file is of them, and whole.
  done = [path.name.replace("_labels", "") for path in sorted(out.glob("*_labels.png"))]
  assert [image["file_name"] for image in images()] == done and "0.png" in done


def test_images_of_another_folder_with_names_that_are_taken(tmp_path):
  for name in ("A/1.png", "B/1.jpg", "B/2.png"):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    Image.new("RGB", (9, 8), "red").save(tmp_path / name)
  segmenter, out = _Segmenter(), tmp_path / "out"

  def save(folder):
    found = picture_files.find(str(tmp_path / folder))
    predict.save_all(segmenter, found, "cat, dog, grass", out, save="json,yolo,voc")

  save("A")
  before = {path: path.read_bytes() for path in out.rglob("1.*")}
  segmenter.images = 1  # the network runs for one of two images
  with pytest.raises(InputError, match=r"1 of 2 images were skipped, such as .*B/1\.jpg: expected"):
    save("B")
  assert {path: path.read_bytes() for path in out.rglob("1.*")} == before
  assert len([*out.rglob("2.*")]) == 7 and "1.json" in {path.name for path in before}
  save("A")  # again


def test_names_that_are_long_for_the_disk(tmp_path):
  names = ["雨" * 76, "雨" * 82, "a"]  # of 228 and 246 bytes, where 255 are the most
  (tmp_path / "in").mkdir()
  for name in names:
    Image.new("RGB", (9, 8)).save(tmp_path / "in" / f"{name}.png")
  found, out = picture_files.find(str(tmp_path / "in")), tmp_path / "out"
  with pytest.raises(
    InputError, match=r"1 of 3 .* room for the ends .*, got 82 characters; rename"
  ):
    predict.save_all(_Segmenter(), found, "cat, dog, grass", out, save="overlay,json,coco,yolo")
  for name in names[::2]:
    assert (out / f"{name}_overlay.png").exists() and (out / f"yolo/images/{name}.png").exists()


def test_what_is_wrong_is_said_before_the_network_runs(tmp_path):
  nothing = _Segmenter(0)
  many = [f"class {i}" for i in range(300)]
  for arguments, message in [
    ({"save": "coko"}, "save='coko' is not known; did you mean 'coco'"),
    ({"save": "voc", "names": many}, "save=voc: expected at most 254 classes"),
    ({"annotations": {"simplify": 2.0}}, "simplify=2.0 has no effect on overlay, labels, json"),
  ]:
    found = picture_files.Found(tmp_path, [tmp_path / "a.png"], [])
    given = {"found": found, "names": "cat", "directory": tmp_path, **arguments}
    with pytest.raises(InputError, match=message):
      predict.save_all(nothing, **given)


FORMS = ("overlay", "labels", "json", "scores", "coco", "labelme", "yolo", "voc")


def contents(folder):
  return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("form", FORMS)
def test_results_of_another_image_stay(tmp_path, form):
  """By its stem the next image of that name is refused, and the same one replaces its own."""
  for name in ("A/x.png", "B/x.png"):
    (tmp_path / name).parent.mkdir()
    Image.new("RGB", (50, 40), "red").save(tmp_path / name)
  out, mine = tmp_path / "out", result(tmp_path / "A/x.png")
  mine.save(out, save=form)
  before = contents(out)
  with pytest.raises(InputError, match=r"B/x\.png: expected names .*A/x\.png; rename"):
    result(tmp_path / "B/x.png").save(out, save=form)
  assert contents(out) == before
  result(tmp_path / "A/x.png", np.zeros((40, 50), np.int32)).save(out, save=form)
  assert contents(out).keys() == before.keys()
  assert form == "scores" or contents(out) != before  # which are the same for all labels here


@pytest.mark.parametrize("form", FORMS)
def test_images_without_a_file_get_names_that_are_free(tmp_path, form):
  first, second = result(), result(label=scenes.nested()[:-1])
  for one in (first, second, first):
    one.save(tmp_path, save=form)
  found = {path.name for path in contents(tmp_path)}
  assert any(name.startswith("picture_2") for name in found)
  assert not any(name.startswith("picture_3") for name in found)
  save_results([first], tmp_path / "many", save=form)
  before = contents(tmp_path / "many")
  save_results([second], tmp_path / "many", save=form)
  shared = {"annotations.json"}
  after = contents(tmp_path / "many")
  assert all(after[path] == data for path, data in before.items() if path.name not in shared)
  assert form == "coco" or len(after) > len(before)


def test_shapes_that_somebody_has_edited_stay(tmp_path):
  Image.new("RGB", (50, 40)).save(tmp_path / "x.png")
  mine = result(tmp_path / "x.png")
  (path,) = mine.save(tmp_path / "out", save="labelme")
  (again,) = mine.save(tmp_path / "out", save="labelme")
  content = json.loads(again.read_text())
  content["shapes"].pop()
  path.write_text(json.dumps(content))
  with pytest.raises(InputError, match=r"labelme/x\.json, which no earlier call has made of it"):
    mine.save(tmp_path / "out", save="labelme")
  (tmp_path / "out/coco").mkdir()
  (tmp_path / "out/coco/annotations.json").write_text('{"images": []}')
  with pytest.raises(InputError, match=r"annotations\.json: expected no file but that"):
    save_results([mine], tmp_path / "out", save="coco")


def test_pages_of_a_file_are_told_apart(tmp_path):
  pages = [Image.new("L", (50, 40), color) for color in (0, 200)]
  pages[0].save(tmp_path / "scan.tif", save_all=True, append_images=pages[1:])
  found, out = picture_files.find(str(tmp_path / "scan.tif")), tmp_path / "out"
  save = lambda page: predict.save_all(_Segmenter(), found, "cat, dog, grass", out, page=page)
  save(2)
  assert json.loads((out / "scan.json").read_text())["page"] == 2
  with pytest.raises(InputError, match=r"is of \S*scan\.tif page 2; rename"):
    save(1)
  save(2)
