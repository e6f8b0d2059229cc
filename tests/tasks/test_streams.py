"""The commands of docs/streams.md, on files made here."""

import contextlib
import re
import shlex

import cv2
import numpy as np
import pytest
from PIL import Image

from data_pipelines import shapes
from rpn_jax import cli
from rpn_jax.drawing.film import quiet_opencv
from tests import ROOT

rasterio = pytest.importorskip("rasterio")
PAGE = (ROOT / "docs/streams.md").read_text()
BLOCKS = re.findall(r"^```sh\n(.*?)^```", PAGE, re.M | re.S)
COMMANDS = [line for line in "".join(BLOCKS).splitlines() if line.startswith("rpn ")]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
  root = tmp_path_factory.mktemp("streams")
  scene, _ = shapes.draw_scene(np.random.default_rng(0), 64, 96, (3, 4))
  (root / "photos").mkdir()
  for i in range(3):
    Image.fromarray(np.roll(scene, 9 * i, 1)).save(root / f"photos/{i}.jpg")
  with quiet_opencv():
    film = cv2.VideoWriter(str(root / "walk.mp4"), cv2.VideoWriter.fourcc(*"mp4v"), 10, (96, 64))
  for i in range(5):
    film.write(np.ascontiguousarray(np.roll(scene, 5 * i, 1)[..., ::-1]))
  film.release()
  bands = np.concatenate([scene[..., ::-1], scene[..., :1]], -1).astype(np.uint16) * 9
  transform = rasterio.Affine(10, 0, 500_000, 0, -10, 5_400_000)
  with rasterio.open(
    root / "field.tif", "w", driver="GTiff", count=4, height=64, width=96, dtype="uint16",
    crs="EPSG:32633", transform=transform,
  ) as file:  # fmt: skip
    file.write(np.moveaxis(bands, -1, 0))
  return root


def test_the_page_has_commands_of_each_kind():
  assert {command.split()[2] for command in COMMANDS} == {"photos", "walk.mp4", "field.tif"}


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_of_the_page(place, command, capsys):
  words = shlex.split(command)
  out = next(word for word in words if word.startswith("--out=")).removeprefix("--out=")
  with contextlib.chdir(place):
    assert cli.main(words[1:]) == 0
  written = {file.name for file in (place / out).iterdir()}
  for name in re.findall(r"^\| `(\w+\.\w+)` ", PAGE, re.M):
    if name.startswith(words[2].partition(".")[0] + "_"):
      name = name.replace(".mp4", ".webm") if "--film=webm" in words else name
      assert name in written
  assert f"{out}/" in capsys.readouterr().out
