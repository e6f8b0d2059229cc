"""Several images, or one in their place."""

import io
import pathlib

import jax
import numpy as np
import pytest
from PIL import Image

from rpn_jax import Segmenter
from rpn_jax.base import pictures
from rpn_jax.base.errors import InputError
from rpn_jax.inference.sources import read_each
from tests.odd_pictures import stored

IMAGE = np.random.default_rng(0).integers(0, 256, (5, 7, 3)).astype(np.uint8)
GRAY_OF_TWELVE_BITS = (IMAGE[..., 0].astype(np.uint16) + 100) * 8


def read(images) -> list:
  return list(read_each(images, None, "white"))


@pytest.fixture(scope="module")
def model():
  return Segmenter.load("shapes_clip")


@pytest.mark.parametrize(
  "image",
  [
    "photo.jpg",
    b"photo.jpg",
    pathlib.Path("photo.jpg"),
    IMAGE,
    IMAGE[..., 0],
    np.dstack([IMAGE, IMAGE[..., :1]]),
    jax.numpy.asarray(IMAGE),
    Image.fromarray(IMAGE),
    io.BytesIO(stored(Image.fromarray(IMAGE), "PNG")),
    pictures.load(IMAGE),
  ],
)
def test_one_image_in_place_of_several(image, model):
  with pytest.raises(InputError, match=r"^expected several .* call the segmenter .* \[image\]$"):
    read(image)
  with pytest.raises(InputError, match="expected several images, got one image"):
    next(model.stream(image, "sand, water"))


def test_arrays_of_several_images():
  batch = np.stack([IMAGE, IMAGE[::-1]])
  for images in (batch, list(batch), iter(batch), jax.numpy.asarray(batch)):
    got = read(images)
    np.testing.assert_array_equal([picture.image for picture, _ in got], batch)
    assert [file for _, file in got] == ["", ""]


@pytest.mark.parametrize("kind", [list, tuple, iter])
def test_which_image_is_wrong(kind, tmp_path):
  (tmp_path / "a.png").write_bytes(b"nothing")
  where = "image 3" if kind is iter else "image 3 of the list"
  for wrong, said in (
    (IMAGE.astype(int), f"{where}: expected an image array"),
    (io.BytesIO(b"nothing"), f"{where}: expected a readable image"),
    (None, f"{where}: expected an image as a path"),
    (tmp_path / "a.png", f"{tmp_path}/a.png: expected a readable"),
  ):
    images = read_each(kind([IMAGE, IMAGE, wrong, IMAGE]), None, "white")
    assert len([next(images), next(images)]) == 2
    with pytest.raises(InputError) as error:
      next(images)
    assert str(error.value).startswith(said)


def test_a_call_tells_which_image_is_wrong(model):
  with pytest.raises(InputError, match=r"^image 2 of the list: expected an image array"):
    model([IMAGE, IMAGE.astype(int)], "sand, water")
  with pytest.raises(InputError, match=r"^expected an image array"):
    model(IMAGE.astype(int), "sand, water")


def test_notes_are_told_by_the_place_of_an_image(capsys):
  read([IMAGE, GRAY_OF_TWELVE_BITS, GRAY_OF_TWELVE_BITS])
  assert capsys.readouterr().out.startswith("image 2 of the list: values ")
  read([GRAY_OF_TWELVE_BITS])
  assert capsys.readouterr().out.startswith("the image: values ")
