"""Annotations read by supervision and labelme, in their own environment: make test-consumers."""

import subprocess

import numpy as np
import pytest
from PIL import Image

from rpn_jax.annotations.collection import Collection
from rpn_jax.annotations.images import Labeled
from rpn_jax.annotations.options import Options
from rpn_jax.annotations.polygons import polygon
from rpn_jax.annotations.regions import find_instances
from tests import ROOT
from tests.annotations import scenes
from tests.annotations.scenes import NAMES
from tests.annotations.test_polygons import distance

PYTHON = ROOT / ".venv-consumers/bin/python"
pytestmark = pytest.mark.skipif(
  not PYTHON.exists(), reason="supervision and labelme are not installed: make test-consumers"
)
SCENES = {"nested": scenes.nested(), "noise": scenes.noise(24, 31, 0, len(NAMES))}
FORMS = ("coco", "labelme", "yolo")


@pytest.fixture(scope="module", params=["exact", "default", "polygons"])
def found(request, tmp_path_factory):
  """(options, what the readers found), of the scenes as files."""
  folder = tmp_path_factory.mktemp(request.param)
  options = {
    "exact": {"simplify": 0, "labelme": "masks"},
    "default": {},
    "polygons": {"simplify": 2.0, "coco": "polygons"},
  }[request.param]
  collection = Collection(folder, NAMES, FORMS, **options)
  for name, label in SCENES.items():
    file = folder / f"{name}.png"
    Image.fromarray(scenes.image(label)).save(file)
    collection.add(Labeled(scenes.image(label), label, file), name)
  collection.finish()
  out = folder / "found.npz"
  script = ROOT / "tests/tools/read_annotations.py"
  result = subprocess.run([PYTHON, script, folder, out], capture_output=True, text=True)
  assert result.returncode == 0, result.stderr
  with np.load(out) as archive:
    return Options(**options), dict(archive)


def test_classes(found):
  _, read = found
  assert read["coco/classes"].tolist() == read["yolo/classes"].tolist() == list(NAMES)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", SCENES)
def test_masks(found, form, name):
  """Exact ones are; of polygons the centers of wrong pixels are near the outline.

  These readers also paint the pixels that the outline runs along.
  """
  options, read = found
  label = SCENES[name]
  instances = find_instances(label, options)
  assert read[f"{form}/{name}/names"].tolist() == [NAMES[i.class_id] for i in instances]
  exact = (form == "coco" and options.coco == "rle") or (
    form == "labelme" and options.labelme == "masks"
  )
  farthest = 0.0
  for instance, mask in zip(instances, read[f"{form}/{name}/masks"]):
    (region,) = instance.regions
    wanted = scenes.full_mask(region, label.shape)
    wrong = np.argwhere(mask.astype(bool) != wanted)[:, ::-1] + 0.5
    if len(wrong):
      ring = polygon(region, options.simplify)
      farthest = max(farthest, distance(wrong, ring).max())
  print(f"{form} {name} {options}: {farthest:.2f} pixels")
  assert farthest <= (0 if exact else options.simplify + 1)
