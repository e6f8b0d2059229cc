"""Images of a set have the pixels that prediction reads, but for profiles in published sets."""

import io

import numpy as np
import pytest
from PIL import Image

from data_pipelines import pipeline
from data_pipelines.sources.builder import RawExample
from data_pipelines.sources.folder import Folder
from rpn_jax.base import pictures
from rpn_jax.base.errors import InputError
from tests import odd_pictures as odd
from tests.odd_pictures import stored

COLORS = np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8)
IMAGE = Image.fromarray(COLORS)
ADOBE = odd.rgb_profile(odd.ADOBE, 2.19921875)
NARROW = 9 * COLORS.astype(np.uint16) + 300
CUT = Image.fromarray(np.dstack([COLORS, COLORS[..., :1]]))


class Published(Folder):
  """As a folder, but for whose images they are."""

  own_classes = False


def read(kind, tmp_path, content: bytes):
  (tmp_path / "a.img").write_bytes(content)
  Image.fromarray(np.zeros((6, 8), np.uint8)).save(tmp_path / "mask.png")
  (tmp_path / "names.txt").write_text("a\nb")
  builder = kind(data_dir=tmp_path)
  with pytest.raises(InputError):  # only its class names are needed
    builder.examples(tmp_path)
  record = builder.read(RawExample("a", tmp_path / "a.img", tmp_path / "mask.png"))
  return record, pipeline.check_example(record)["image"]


@pytest.mark.parametrize(
  "content",
  [
    odd.png16(NARROW),
    odd.tiff(NARROW),
    odd.tiff(COLORS.astype(np.float32)),
    stored(CUT, "PNG"),
    stored(CUT.convert("RGB"), "PNG", transparency=tuple(COLORS[0, 0].tolist())),
    stored(IMAGE, "JPEG", icc_profile=ADOBE),
    stored(IMAGE.convert("CMYK"), "JPEG", icc_profile=odd.cmyk_profile()),
    stored(IMAGE, "GIF", save_all=True, append_images=[IMAGE.rotate(180)]),
  ],
)
def test_a_folder_is_read_as_for_prediction(content, tmp_path, capsys):
  record, image = read(Folder, tmp_path, content)
  picture = pictures.load(io.BytesIO(content))
  np.testing.assert_array_equal(image, picture.image)
  assert record["image"] != content and picture.notes
  assert capsys.readouterr().out == f"{tmp_path}/a.img: {'; '.join(picture.texts)}\n"


@pytest.mark.parametrize("kind", [Folder, Published])
def test_ordinary_files_are_kept(kind, tmp_path, capsys):
  for content in (stored(IMAGE, "JPEG"), stored(IMAGE.convert("L"), "JPEG"), stored(IMAGE, "PNG")):
    record, image = read(kind, tmp_path, content)
    assert record["image"] == content
    np.testing.assert_array_equal(image, Image.open(io.BytesIO(content)).convert("RGB"))
  assert capsys.readouterr().out == ""


def test_published_sets_keep_their_stored_values(tmp_path):
  content = stored(IMAGE, "JPEG", icc_profile=ADOBE)
  record, image = read(Published, tmp_path, content)
  assert record["image"] == content
  np.testing.assert_array_equal(image, Image.open(io.BytesIO(content)))
  assert (pictures.load(io.BytesIO(content)).image != image).any()
