"""Which files of a folder are images, and where the results of each belong."""

import os
import pathlib
import unicodedata

import pytest
from PIL import Image

from rpn_jax.base import paths, picture_files, pictures
from rpn_jax.base.errors import InputError
from rpn_jax.base.picture_files import Found
from rpn_jax.drawing import images


@pytest.fixture
def folder(tmp_path):
  """Three images, and all that looks like one."""
  for name in ("b.JPG", "a.png", "d.heic", "._a.png", ".hidden.jpg", "c.NEF", "e.MP4", "f.md"):
    (tmp_path / name).write_bytes(b"")
  (tmp_path / "thumbnails.jpg").mkdir()
  (tmp_path / "thumbnails.jpg/small.jpg").write_bytes(b"")
  (tmp_path / ".cache").mkdir()
  (tmp_path / ".cache/d.jpg").write_bytes(b"")
  os.mkfifo(tmp_path / "pipe.png")  # a reader would wait for ever
  return tmp_path


def test_images_of_a_folder(folder, capsys):
  found = picture_files.find(str(folder))
  assert [path.name for path in found.files] == ["a.png", "b.JPG", "d.heic"]
  assert [(path.name, why) for path, why in found.left_out] == [
    ("._a.png", "hidden"), (".hidden.jpg", "hidden"), ("c.NEF", "of another format"),
    ("e.MP4", "of a film"),
    ("pipe.png", "not a file"), ("thumbnails.jpg", "not a file"),
  ]  # fmt: skip
  assert picture_files.summary(found.left_out) == (
    "2 hidden, 1 of another format, 1 of a film, 2 not a file"
  )
  assert capsys.readouterr().out == ""  # said where they are listed


def test_a_line_about_what_a_data_set_leaves_out(folder, capsys):
  picture_files.list_images(folder, suffixes=(".jpg",))
  assert capsys.readouterr().out == (
    f"left out of the images: 1 hidden, such as {folder}/.hidden.jpg; "
    f"4 of another format, such as {folder}/a.png; 1 of a film, such as {folder}/e.MP4; "
    f"1 not a file, such as {folder}/thumbnails.jpg\n"
  )


def test_images_of_subfolders_but_not_those_of_the_results(folder):
  found = picture_files.list_images(folder, suffixes=(".jpg",), recursive=True)
  assert [str(path.relative_to(folder)) for path in found] == ["b.JPG", "thumbnails.jpg/small.jpg"]
  (folder / "out/deep").mkdir(parents=True)
  (folder / "out/deep/x_overlay.png").write_bytes(b"")
  with_results = picture_files.find(str(folder), recursive=True)
  assert folder / "out/deep/x_overlay.png" in with_results.files
  without = picture_files.find(str(folder), recursive=True, results=folder / "out")
  assert folder / "out/deep/x_overlay.png" not in without.files and len(without.files) == 4


def test_linked_folders_are_left_out_and_named(tmp_path, capsys):
  images, elsewhere = tmp_path / "images", tmp_path / "elsewhere"
  for path in (images / "top.png", images / "sub/x.png", elsewhere / "y.png"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")
  for name, target in {"sub/link": elsewhere, "up": "..", ".hidden": elsewhere}.items():
    (images / name).symlink_to(target)
  (images / "out").symlink_to(tmp_path / "results")
  (tmp_path / "results").mkdir()
  found = picture_files.find(str(images), recursive=True, results=tmp_path / "results")
  assert found.files == [images / "sub/x.png", images / "top.png"]
  assert found.left_out == [
    (images / "up", "linked folder"),
    (images / "sub/link", "linked folder"),
  ]
  picture_files.list_images(images / "sub", recursive=True)
  assert capsys.readouterr().out == (
    f"left out of the images: 1 linked folder, such as {images}/sub/link\n"
  )
  assert picture_files.find(str(images / "sub/link")).files == [images / "sub/link/y.png"]
  (images / "sub/x.png").unlink()
  with pytest.raises(InputError, match=r"no image in this folder or below \(1 linked folder\)"):
    picture_files.find(str(images / "sub"), recursive=True)


def test_results_among_the_images_would_be_images_the_next_time(folder):
  (folder / "link").symlink_to(folder)
  with pytest.raises(
    InputError, match=r"--out=.*/link: expected another folder than .*predictions"
  ):
    picture_files.find(str(folder), results=folder / "link")
  picture_files.find(str(folder / "a.png"), results=folder)  # one image is no folder of them


def test_a_pipe_is_neither_an_image_nor_a_folder(folder):
  for recursive in (None, True):
    with pytest.raises(InputError, match=r"pipe\.png: expected an image or a folder .* a pipe or"):
      picture_files.find(str(folder / "pipe.png"), recursive=recursive)


def test_a_folder_that_cannot_be_read_is_no_empty_one(tmp_path):
  for recursive in (False, True):
    with pytest.raises(FileNotFoundError):
      picture_files.list_images(tmp_path / "gone", recursive=recursive)


def test_a_folder_of_images_leaves_nothing_out(tmp_path):
  (tmp_path / "a.png").write_bytes(b"")
  (tmp_path / "notes.txt").write_bytes(b"")
  found = picture_files.find(str(tmp_path))
  assert found.files == [tmp_path / "a.png"] and found.left_out == []


def test_a_folder_without_images(tmp_path):
  (tmp_path / "x.jpg").mkdir()
  with pytest.raises(InputError, match=r"no image in this folder \(1 not a file\)$"):
    picture_files.find(str(tmp_path))
  with pytest.raises(InputError, match=r"; --recursive looks into its subfolders$"):
    picture_files.find(str(tmp_path), recursive=False)
  with pytest.raises(InputError, match=r"no image in this folder or below$"):
    picture_files.find(str(tmp_path), recursive=True)


def test_results_do_not_overwrite_each_other():
  names = [
    "a/x.jpg", "b/x.jpg", "x.jpg", "x.png", "X.webp", "a.b.jpg", "y.jpg",
    "z.b.gif", "z_b.gif", "z.b.png", "z_b.png",
  ]  # fmt: skip
  stems = Found(pathlib.Path("r"), [pathlib.Path("r", name) for name in names], []).stems()
  assert [str(stem) for stem in stems] == [
    "a/x", "b/x", "x_jpg", "x_png", "X_webp", "a.b", "y", "z_b_gif", "z_b_gif_2", "z_b_png",
    "z_b_png_2",
  ]  # fmt: skip
  assert len({str(stem).casefold() for stem in stems}) == len(stems)


def test_broken_links_are_named_by_who_reads_them(tmp_path):
  (tmp_path / "loop.jpg").symlink_to("loop.jpg")
  (tmp_path / "gone.jpg").symlink_to("nowhere.jpg")
  gone, loop = picture_files.find(str(tmp_path)).files
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


@pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC")])
def test_results_of_names_that_look_the_same_do_not_meet(forms, tmp_path):
  first, second = (unicodedata.normalize(form, "café") for form in forms)
  names = [f"{first}.png", f"{second}.png"]
  stems = Found(tmp_path, [tmp_path / name for name in names], []).stems()
  assert len({unicodedata.normalize("NFC", str(stem)) for stem in stems}) == 2  # macOS, too
  for text in (first, second):  # nor where each file is named by itself
    paths.write_text(tmp_path / f"{text}.json", text)
    images.save_png(tmp_path / f"{text}.png", Image.new("RGB", (3, 2)))
  written = {path.name: path for path in tmp_path.iterdir()}
  assert {*written} == {
    f"{text}{suffix}" for text in (first, second) for suffix in (".json", ".png")
  }
  assert written[f"{first}.json"].read_text(encoding="utf-8") == first


def test_files_that_are_images_but_not_by_their_names(tmp_path):
  Image.new("RGB", (9, 8)).save(tmp_path / "a.png")
  for name, kind in {"h": "PNG", "g.jpg_large": "JPEG", "x.scan": "TIFF"}.items():
    Image.new("RGB", (9, 8)).save(tmp_path / name, kind)
  (tmp_path / "notes").write_text("no image")
  found = picture_files.find(str(tmp_path))
  assert [path.name for path in found.files] == ["a.png"]
  assert {(path.name, why) for path, why in found.left_out} == {
    (name, "without the suffix of an image") for name in ("h", "g.jpg_large", "x.scan")
  }


def test_folders_that_are_not_looked_into(tmp_path):
  for name in ("a.png", "more/b.png", "out/c.png", "notes/d.txt", ".hidden/e.png"):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(b"")
  found = picture_files.find(str(tmp_path), recursive=False, results=tmp_path / "out")
  assert found.left_out == [(tmp_path / "more", "subfolder of images (--recursive)")]
  assert not picture_files.find(str(tmp_path)).left_out


@pytest.mark.parametrize("recursive", [False, True])
def test_results_of_earlier_calls_are_no_images(tmp_path, recursive):
  out = tmp_path / "first" if recursive else tmp_path
  (out / "yolo/sources").mkdir(parents=True)
  picture = Image.new("RGB", (9, 8))
  for name in ("a.png", "mine_labels.png"):
    picture.save(tmp_path / name)
  (out / "yolo/images").mkdir()
  picture.save(out / "yolo/images/a.png")
  results = [out / "a_overlay.png", out / "a_labels.png"]
  for path in results:
    images.save_png(path, picture, "a.png")
  found = picture_files.find(str(tmp_path), recursive=recursive)
  assert found.files == [tmp_path / "a.png", tmp_path / "mine_labels.png"]
  assert sorted(found.left_out) == [
    (path, "written by an earlier call") for path in sorted(results)
  ]
