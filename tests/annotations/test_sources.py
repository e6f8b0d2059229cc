"""Data sets that grow: files of another image, or of the user, are neither replaced nor removed."""

import json

import numpy as np
import pytest
from PIL import Image

from rpn_jax.annotations.collection import Collection
from rpn_jax.annotations.images import Labeled
from rpn_jax.base.errors import InputError
from tests.annotations import scenes
from tests.annotations.scenes import NAMES

IMAGES = {"yolo": "images", "voc": "JPEGImages"}
LABELS = {"yolo": "labels/{}.txt", "voc": "SegmentationClass/{}.png"}
FORMS = pytest.mark.parametrize("form", IMAGES)


def photo(file, seed=0, mode="RGB", **options):
  """Noise and its image, which is written to a file."""
  label = scenes.noise(8, 9, seed)
  image = Image.fromarray(scenes.image(label))
  file.parent.mkdir(parents=True, exist_ok=True)
  image.convert(mode).save(file, **options)
  return Labeled(np.asarray(image), label, file)


def add(out, form, labeled, stem):
  Collection(out, NAMES, [form]).add(labeled, stem)


def content(folder):
  return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@FORMS
def test_the_same_image_again_replaces_its_own_files(tmp_path, form):
  images, file = tmp_path / "out" / form / IMAGES[form], tmp_path / "A/a.1.jpg"
  add(tmp_path / "out", form, photo(file), "a.1")
  before = content(tmp_path / "out")
  add(tmp_path / "out", form, photo(file), "a.1")
  assert content(tmp_path / "out") == before and [*images.iterdir()] == [images / "a.1.jpg"]
  exif = Image.Exif()
  exif[0x0112] = 3  # edited: a PNG of what was segmented takes the place of the copy
  edited = photo(file, 1, exif=exif)
  for moved in (tmp_path, tmp_path.rename(tmp_path.with_name(f"{tmp_path.name}_moved"))):
    labeled = Labeled(edited.image, edited.labels, moved / "A/a.1.jpg")
    add(moved / "out", form, labeled, "a.1")
    images = moved / "out" / form / IMAGES[form]
    assert [*images.iterdir()] == [images / "a.1.png"]
  (images / "a.1.bmp").write_bytes(b"of the user")
  before = content(moved)
  with pytest.raises(InputError, match=r"a\.1\.bmp, which no earlier call has made of it; rename"):
    add(moved / "out", form, labeled, "a.1")
  assert content(moved) == before


@FORMS
def test_another_image_of_the_same_name_is_refused(tmp_path, form):
  out = tmp_path / "out"
  add(out, form, photo(tmp_path / "A/IMG_1.jpg"), "IMG_1")
  before = content(out)
  for other in ("B/IMG_1.png", "B/IMG_1.jpg", "A/IMG_1.png"):
    with pytest.raises(InputError, match=r"are free .*IMG_1\.jpg, which is of \S+A/IMG_1\.jpg; "):
      add(out, form, photo(tmp_path / other, 1), "IMG_1")
    assert content(out) == before
  for path in before:  # moved to a split of the user's
    if path.parts[1] != "sources":
      (out / path).unlink()
  add(out, form, photo(tmp_path / "B/IMG_1.png", 1), "IMG_1")


@FORMS
@pytest.mark.parametrize("mine", ["image", "label", "image itself"])
def test_files_of_the_user_stay(tmp_path, form, mine):
  images = tmp_path / form / IMAGES[form]
  labeled, message = photo(images / "x.tif"), r"x\.tif: .* which no earlier call has made of it"
  if mine == "image":
    photo(images / "x.jpg", 1)
  elif mine == "label":
    path = tmp_path / form / LABELS[form].format("x")
    path.parent.mkdir()
    path.write_bytes(b"0 0 0 1 0 1 1")
  else:  # of which others would see what is under its transparency
    labeled = photo(images / "x.png", 1, "RGBA")
    with Image.open(images / "x.png") as file:
      cut = file.copy()
    cut.putalpha(128)
    cut.save(images / "x.png")
    message = r"x\.png: expected an image that other programs see .*; write to another folder"
  before = content(images), content(tmp_path / form)
  with pytest.raises(InputError, match=message):
    add(tmp_path, form, labeled, "x")
  after = content(tmp_path / form)
  assert content(images) == before[0] and before[1].items() <= after.items()


@FORMS
def test_an_image_of_the_data_set_itself_gets_a_label(tmp_path, form):
  images = tmp_path / form / IMAGES[form]
  labeled = photo(images / "x.png")
  before = content(images)
  for _ in range(2):
    add(tmp_path, form, labeled, "x")
  assert content(images) == before
  assert (tmp_path / form / LABELS[form].format("x")).is_file()
  record = json.loads((tmp_path / form / "sources/x.json").read_text(encoding="utf-8"))
  assert record == {"source": f"{IMAGES[form]}/x.png", "copies": []}
  (tmp_path / form / "sources/x.json").write_text("[]")  # damaged: nothing is known
  with pytest.raises(InputError, match="which no earlier call has made of it"):
    add(tmp_path, form, labeled, "x")


@FORMS
def test_a_data_set_in_a_bucket(tmp_path, bucket, form):
  for _ in range(2):
    add(bucket, form, photo(tmp_path / "A/x.jpg"), "x")
  assert sorted(path.name for path in (bucket / form / IMAGES[form]).iterdir()) == ["x.jpg"]
  with pytest.raises(InputError, match=r"x\.jpg, which is of /\S+/A/x\.jpg; rename"):
    add(bucket, form, photo(tmp_path / "B/x.png", 1), "x")
