"""Which input a result says it is of, and what is refused."""

import json

import numpy as np
import pytest
from PIL import Image

from rpn_jax.base import origins
from rpn_jax.base.origins import Occupied, Origin, check_free, origin_of, recorded
from rpn_jax.drawing.images import save_png

ENDS = ("_overlay.png", "_labels.png", ".json")
IMAGE = np.zeros((4, 5, 3), np.uint8)


def touch(path):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(b"x")
  return path


def test_names_hold_where_both_folders_are_moved(tmp_path):
  file = touch(tmp_path / "A" / "ü 1.tif")
  before = Origin(file, page=2).name(tmp_path / "out")
  moved = tmp_path.rename(tmp_path.with_name(f"{tmp_path.name}_moved"))
  assert Origin(moved / "A" / "ü 1.tif", page=2).name(moved / "out") == before
  assert before == "../A/ü 1.tif page 2"
  assert Origin("a/b.png").name(tmp_path) == "b.png"  # which is nowhere


def test_arrays_are_told_apart_by_their_pixels():
  names = {origin_of(image).name(None) for image in (IMAGE, IMAGE + 1, IMAGE.reshape(5, 4, 3))}
  assert len(names) == 3 and origin_of(IMAGE.copy()).name(None) in names
  assert origin_of(IMAGE, "upload.png").name(None).startswith("upload.png sha256 ")


@pytest.mark.parametrize("mode", ["RGB", "P"])
def test_pictures_say_what_they_are_of(tmp_path, mode):
  path = tmp_path / "a_overlay.png"
  pixels = Image.fromarray(np.random.default_rng(0).integers(0, 9, (4, 5), np.uint8)).convert(mode)
  save_png(path, pixels, "../ü.png")
  assert recorded(path, tmp_path) == "../ü.png" and origins.is_result(path)
  with Image.open(path) as file:
    file.load()
    np.testing.assert_array_equal(np.asarray(file), np.asarray(pixels))
  save_png(path, pixels)
  assert recorded(path, tmp_path) is None and not origins.is_result(path)
  # As of earlier versions, where the JSON file says it.
  summary = {"image": str(touch(tmp_path / "a.png")), "method": "", "classes": [], "other": {}}
  (tmp_path / "a.json").write_text(json.dumps(summary))
  assert recorded(path, tmp_path) == recorded(tmp_path / "a_scores.npz", tmp_path) == "a.png"


@pytest.mark.parametrize("end", ENDS)
def test_files_of_others_are_not_free(tmp_path, end):
  file, out = touch(tmp_path / "A/x.png"), tmp_path / "out"
  check_free(Origin(file), out, "x", ENDS)
  touch(out / f"x{end}")
  with pytest.raises(Occupied, match=f"x{end}, which no earlier call has made of it; rename"):
    check_free(Origin(file), out, "x", ENDS)
  check_free(Origin(file), out, "x", [e for e in ENDS if e != end])
  for content in (b"[1]", b"{", b'{"source": 3}', b'{"image": "x.png"}'):
    (out / "x.json").write_bytes(content)
    assert recorded(out / "x.json", out) is None
  if end == ".json":
    (out / "x.json").write_text(json.dumps({"source": "../A/x.png"}))
  else:
    (out / "x.json").unlink()
    save_png(out / f"x{end}", Image.fromarray(IMAGE), "../A/x.png")
  check_free(Origin(file), out, "x", ENDS)
  for other in (Origin(touch(tmp_path / "B/x.png")), Origin(file, 1)):
    with pytest.raises(Occupied, match=rf"{end}, which is of \.\./A/x\.png; rename"):
      check_free(other, out, "x", ENDS)
