"""What this project writes of a segmentation is read again as training data: the same pixels."""

import pathlib
import shutil

import cv2
import numpy as np
import pytest
from PIL import Image

from data_pipelines import prepare, records
from rpn_jax.annotations.collection import Collection
from rpn_jax.annotations.images import Labeled

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
NAMES = ("sky", "großer Baum, tree", "背景: 猫", "never there")
FORMS = {"coco": "coco_json", "labelme": "labelme", "yolo": "yolo_seg", "voc": "voc_folder"}
COUNT = 4  # images


def label_map(seed):
  """Classes 0 to 2 in blobs with holes, islands and touching corners; -1 is no class."""
  rng = np.random.default_rng(seed)
  noise = cv2.GaussianBlur(rng.random((48 + seed, 64)).astype(np.float32), (0, 0), 2)
  label = np.digitize(noise, np.quantile(noise, [0.2, 0.5, 0.8])) - 1
  label[10:12, ::2] = 1  # thin lines and single pixels
  label[20, 5:40] = 2
  return label


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
  folder = tmp_path_factory.mktemp("photos")
  exif = Image.Exif()
  exif[0x0112] = 6
  for i in range(COUNT):
    height, width = label_map(i).shape
    image = np.random.default_rng(i).integers(0, 256, (height, width, 3), np.uint8)
    if i == 1:  # stored on its side, and segmented as it is shown
      Image.fromarray(np.rot90(image)).save(folder / f"{i}.jpg", exif=exif)
    else:
      Image.fromarray(image).save(folder / f"{i}.jpg")
  return folder


@pytest.fixture(autouse=True)
def _no_preview(monkeypatch):
  monkeypatch.setattr(prepare.preview, "draw", lambda *args: None)  # takes a second


def written(root, photos, form, **options):
  """The folder of a form, with the images where people put them."""
  collection = Collection(root, NAMES, [form], **options)
  for i in range(COUNT):
    file = photos / f"{i}.jpg"
    image = np.zeros((*label_map(i).shape, 3), np.uint8)
    collection.add(Labeled(image, label_map(i), file), str(i))
  collection.finish()
  if form == "coco":
    shutil.copytree(photos, root / "coco/photos")
  return root / form


def read(raw, form, data_dir, background=None):
  """Name of the image -> label map in the order of NAMES, -1 for no class."""
  folder = prepare.prepare(FORMS[form], raw, data_dir, config="x", background=background)
  vocabulary = records.stored_vocabulary(FORMS[form], data_dir, "x")
  table = np.full(1 << 16, -1)
  for value, i in vocabulary.ids.items():
    table[value] = NAMES.index(vocabulary.names[i]) if vocabulary.names[i] in NAMES else -2
  found = {}
  for split in records.count_examples(folder):
    for record in records.Records(folder, split):
      found[int(pathlib.PurePath(record["id"]).name[0])] = table[record["label"]]
  assert len(found) == COUNT
  return found


@pytest.mark.parametrize(
  ("form", "options"),
  [
    ("coco", {}),
    ("coco", {"coco": "polygons", "simplify": 0}),
    ("coco", {"instances": "classes"}),
    ("labelme", {"labelme": "masks"}),
    ("labelme", {"simplify": 0}),
    ("yolo", {"simplify": 0}),
    ("voc", {}),
  ],
  ids=str,
)
def test_the_same_pixels_come_back(form, options, photos, tmp_path):
  found = read(written(tmp_path / "out", photos, form, **options), form, tmp_path / "data")
  for i, label in found.items():
    np.testing.assert_array_equal(label, label_map(i))


@pytest.mark.parametrize("form", ["coco", "labelme", "yolo"])
def test_simplified_polygons_come_back_within_their_tolerance(form, photos, tmp_path):
  """What differs is near an edge, of which both sides are simplified."""
  tolerance, options = 1.5, {"coco": "polygons"} if form == "coco" else {}
  raw = written(tmp_path / "out", photos, form, simplify=tolerance, **options)
  found = read(raw, form, tmp_path / "data")
  for i, label in found.items():
    wrong = label != label_map(i)
    assert 0 < wrong.mean() < 0.25
    padded = np.pad(label_map(i), 1, mode="edge")
    inside = np.ones(label.shape, np.uint8)  # no other class among the eight neighbors
    for dy in range(3):
      for dx in range(3):
        inside &= padded[dy : dy + label.shape[0], dx : dx + label.shape[1]] == label_map(i)
    far = cv2.distanceTransform(np.pad(inside, 1, constant_values=1), cv2.DIST_L2, 5)[1:-1, 1:-1]
    assert far[wrong].max() <= 2 * tolerance


def test_pixels_of_no_class_become_the_background(photos, tmp_path):
  raw = written(tmp_path / "out", photos, "coco")
  found = read(raw, "coco", tmp_path / "data", background="rest")
  for i, label in found.items():
    np.testing.assert_array_equal(label, np.where(label_map(i) < 0, -2, label_map(i)))
