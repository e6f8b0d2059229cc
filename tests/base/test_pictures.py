"""Which files a folder's images are, and the pixels of unusual ones."""

import io
import os
import unicodedata

import numpy as np
import pytest
from PIL import Image

from rpn_jax.base import picture_files, pictures
from rpn_jax.base.errors import InputError


@pytest.fixture
def folder(tmp_path):
  """Two images, and all that looks like one."""
  for name in ("b.JPG", "a.png", "._a.png", ".hidden.jpg", "c.bmp", "readme.md"):
    (tmp_path / name).write_bytes(b"")
  (tmp_path / "thumbnails.jpg").mkdir()
  (tmp_path / "thumbnails.jpg/small.jpg").write_bytes(b"")
  (tmp_path / ".cache").mkdir()
  (tmp_path / ".cache/d.jpg").write_bytes(b"")
  os.mkfifo(tmp_path / "pipe.png")  # a reader would wait for ever
  return tmp_path


def test_images_of_a_folder(folder, capsys):
  assert [path.name for path in picture_files.find(str(folder)).files] == ["a.png", "b.JPG"]
  assert capsys.readouterr().out == (
    f"left out of the images: 2 hidden, such as {folder}/._a.png; "
    f"1 of another format, such as {folder}/c.bmp; 2 not a file, such as {folder}/pipe.png\n"
  )


def test_images_of_subfolders(folder):
  found = picture_files.list_images(folder, suffixes=(".jpg",), recursive=True)
  assert [str(path.relative_to(folder)) for path in found] == ["b.JPG", "thumbnails.jpg/small.jpg"]


def test_a_folder_that_cannot_be_read_is_no_empty_one(tmp_path):
  for recursive in (False, True):
    with pytest.raises(FileNotFoundError):
      picture_files.list_images(tmp_path / "gone", recursive=recursive)


def test_a_folder_of_images_says_nothing(tmp_path, capsys):
  (tmp_path / "a.png").write_bytes(b"")
  (tmp_path / "notes.txt").write_bytes(b"")
  assert (
    picture_files.find(str(tmp_path)).files == [tmp_path / "a.png"]
    and capsys.readouterr().out == ""
  )


def test_a_folder_without_images(tmp_path):
  (tmp_path / "x.jpg").mkdir()
  with pytest.raises(InputError, match=r"no image in this folder \(1 not a file\)"):
    picture_files.find(str(tmp_path))


def test_what_a_decoder_says_has_no_address_in_memory():
  png = io.BytesIO()
  Image.effect_noise((64, 64), 50).save(png, "PNG")
  for content, said in [
    (b"no image", "no known image format; open"),
    (png.getvalue()[:2000], r"OSError \("),
  ]:
    with pytest.raises(InputError, match=rf"^the image: expected a readable .*, got .*{said}") as e:
      pictures.read(io.BytesIO(content))
    assert "0x" not in str(e.value)


def test_broken_links_are_named_by_who_reads_them(tmp_path):
  (tmp_path / "loop.jpg").symlink_to("loop.jpg")
  (tmp_path / "gone.jpg").symlink_to("nowhere.jpg")
  gone, loop = picture_files.find(str(tmp_path))
  with pytest.raises(InputError, match=r"gone\.jpg: expected an image, no such file"):
    pictures.read(gone)
  with pytest.raises(InputError, match=r"loop\.jpg: expected .* levels of symbolic links"):
    pictures.read(loop)


@pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC")])
def test_a_name_is_found_in_either_form_of_its_letters(forms, tmp_path):
  there, typed = (unicodedata.normalize(form, "café.png") for form in forms)
  Image.new("RGB", (3, 2)).save(tmp_path / there)
  assert picture_files.find(str(tmp_path / typed)).files == [tmp_path / there]
  assert pictures.read(str(tmp_path / typed)).shape == (2, 3, 3)
  Image.new("RGB", (5, 5)).save(tmp_path / typed)  # another file: now each is itself
  assert picture_files.find(str(tmp_path / typed)).files == [tmp_path / typed]


def stored(image: Image.Image, kind: str) -> io.BytesIO:
  file = io.BytesIO()
  image.save(file, kind)
  return file


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_gray_of_16_bits_keeps_its_upper_eight(kind):
  gray = np.array([[0, 255, 256], [32768, 65279, 65535]], np.uint16)
  image = pictures.read(stored(Image.fromarray(gray), kind))
  np.testing.assert_array_equal(image, np.repeat([[[0], [0], [1]], [[128], [254], [255]]], 3, 2))


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_gray_of_32_bits_is_refused(dtype):
  with pytest.raises(InputError, match=r"expected an image of 8 or 16 bits .* \(32 bits\)"):
    pictures.read(stored(Image.fromarray(np.ones((2, 3), dtype)), "TIFF"))
