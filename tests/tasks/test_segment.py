"""`rpn segment` with pictures and words as people have them."""

import copy
import dataclasses
import io
import json
import shlex

import numpy as np
import pytest
from PIL import Image

from rpn_jax import cli
from rpn_jax.base import pictures
from rpn_jax.base.errors import InputError
from rpn_jax.inference.segmenter import BACKGROUNDS, Segmenter
from rpn_jax.tasks import demo, segment
from rpn_jax.text.templates import SYNONYMS
from tests import ROOT
from tests import odd_pictures as odd
from tests.odd_pictures import stored

SCENE = np.asarray(Image.open(demo.SCENE).convert("RGB").resize((64, 48)))
DEEP = 257 * SCENE.astype(np.uint16)
WORDS = "plain orange，sand；water"
NAMES = ["plain orange", "sand", "water"]


@pytest.fixture(scope="module")
def model():
  return Segmenter.load("shapes_clip")


@pytest.fixture
def folder(tmp_path, monkeypatch):
  """A folder of odd images, with two of one name, which is where commands are run."""
  monkeypatch.chdir(tmp_path)
  scene = Image.fromarray(SCENE)
  (tmp_path / "names.txt").write_text("sand")
  files = {
    "plain.png": stored(scene, "PNG"),
    "plain.webp": stored(scene, "WEBP", lossless=True),
    "deep.png": odd.png16(DEEP),
    "sub/plain.png": stored(scene.rotate(180), "PNG"),
    "narrow.tif": odd.tiff(SCENE.astype(np.uint16) * 8),
    "pages.gif": stored(scene, "GIF", save_all=True, append_images=[scene.rotate(180)]),
    "broken.jpg": stored(scene, "JPEG")[:900],
    "planar.tif": odd.tiff(DEEP, planar=True),
    "raw.nef": b"",
    "._plain.png": b"",
  }
  for name, content in files.items():
    path = tmp_path / "photos" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
  return tmp_path / "photos"


def run(*arguments: str) -> int:
  return cli.main(["segment", *arguments, "--model=shapes_clip"])


def test_a_folder_of_everything(folder, capsys):
  (folder / "results").mkdir()  # of another time, and no image of this one
  (folder / "results/old_overlay.png").write_bytes(b"")
  assert run("photos", WORDS, "--recursive", "--out=photos/results") == 2
  out, err = capsys.readouterr()
  results = folder / "results"
  assert err.count("error: ") == 1 and "error: 2 of 8 images were skipped, such as " in err
  made = {str(path.relative_to(results)) for path in results.rglob("*.json")}
  assert made == {
    "plain_png.json", "plain_webp.json", "deep.json", "sub/plain.json", "narrow.json", "pages.json",
  }  # fmt: skip
  _, *skipped = (results / "skipped.txt").read_text().splitlines()
  reasons = [line.replace("photos/", "", 1).split(": ", 1) for line in skipped]
  assert [name for name, _ in reasons] == ["broken.jpg", "planar.tif", "._plain.png", "raw.nef"]
  assert "readable image" in reasons[0][1] and "one after another" in reasons[1][1]
  assert [why for _, why in reasons[2:]] == ["left out, hidden", "left out, of another format"]
  assert "left out of the images: 1 hidden, 1 of another format; photos/results/skipped.txt" in out
  assert "photos/deep.png: 16 bits became 8\n" in out
  read = {path.stem: json.loads(path.read_text())["read"] for path in results.glob("*.json")}
  assert read["plain_png"] == [] and read["deep"] == ["16 bits became 8"]
  assert read["narrow"] == [
    f"values {8 * int(SCENE.min())} … {8 * int(SCENE.max())} of uint16 became 0 … 255"
  ]
  assert read["pages"] == ["page 1 of 2 is taken (--page takes another)"]
  labels = {
    name: np.asarray(Image.open(results / f"{name}_labels.png"))
    for name in ("plain_png", "plain_webp", "deep", "sub/plain")
  }
  for name in ("plain_webp", "deep"):  # the same pixels, so the same labels
    np.testing.assert_array_equal(labels[name], labels["plain_png"])
  assert (labels["sub/plain"] != labels["plain_png"]).any()


def test_pages_and_transparency(folder, model):
  pages = [model(folder / "pages.gif", NAMES, page=page) for page in (1, 2)]
  assert (pages[0].image != pages[1].image).any() and pages[0].notes == ()
  cut = np.dstack([SCENE, np.zeros(SCENE.shape[:2], np.uint8)])
  result = model(cut, NAMES, matte="#204060")
  assert (result.image == [0x20, 0x40, 0x60]).all()
  assert result.adjusted(other=0.5).notes == result.notes != ()
  with pytest.raises(InputError, match="expected page 1 to 2, got 3"):
    model(folder / "pages.gif", NAMES, page=3)


@pytest.mark.parametrize(
  ("arguments", "said"),
  [
    (["photos/plain.png"], "or --words=FILE_OR_LIST, got neither"),
    (["photos/plain.png", "sand", "--words=voc20"], "or --words=FILE_OR_LIST, got both"),
    (["photos/plain.png", "--words=names.csv"], "--words=names.csv: expected a text file"),
    (["photos/plain.png", "sand", "--matte=nothing"], "matte='nothing': expected the name of"),
    (["photos/pages.gif", "sand", "--page=9"], "expected page 1 to 2, got 9"),
    (["photos/sub", "Sand, a sand"], "'Sand' and 'a sand' are the same words to CLIP"),
    (
      ["photos/plain.png", "photos/deep.png"],
      "got the file photos/deep.png as a name; for several",
    ),
    (
      ["photos/plain.png", "photos/a.tif", "b.png"],
      "got the file photos/a.tif as a name; for seve",
    ),
    (
      ["photos/plain.png", "sand | b.JPG"],
      "got the file b.JPG as a name; for several images name",
    ),
    (["photos/plain.png", "names.txt"], "got the file names.txt as a name; for several images"),
    (["photos/plain.png", "film.mp4", "sand"], "got the file film.mp4 as a name; for several"),
    (["photos/plain.png", "sand, photos/raw.nef"], "got the file photos/raw.nef as a name; for"),
    (
      ["photos/plain.png", "sand,", "big water"],
      "more: big water; quote the names, as in 'sand, b",
    ),
    (["photos/plain.png", "sand | | water"], "'sand |  | water', has an empty synonym"),
    (["--", "-none.png", "sand"], "got more: --model=shapes_clip; options stand before --"),
    (["", "sand"], "expected a path, got an empty one"),
    (["photos/plain.png", "sand", "--out="], "expected a path, got an empty one"),
    (["photos/raw.nef", "sand"], "photos/raw.nef: expected a readable image"),
    (["photos", "sand", "--out=photos"], "--out=photos: expected another folder than that of"),
    (["photos", "sand", "--out=photos/raw.nef"], "expected a folder to write to, got a file"),
    (["photos", "sand", "--raster"], "--raster is for one file, got the folder photos"),
    (["photos/plain.png", "sand", "--recursive"], "expected a folder for --recursive, got a file"),
    (["photos/plain.png", "sand", "--checkpoint=best"], "checkpoint='best' is for a training run"),
    (
      ["photos/plain.png", "sand", "--raster", "--matte=red"],
      "--matte is for images, photos/plain",
    ),
  ],
)
def test_what_is_wrong_is_told_in_a_line(folder, arguments, said, capsys):
  assert run(*arguments) == 2
  err = capsys.readouterr().err.splitlines()
  assert said in err[-1] and err[-1].startswith("error: ")
  assert not (folder.parent / "predictions").exists() and not (folder / "results").exists()


@pytest.fixture
def asked(model, monkeypatch):
  """Names and background words that a network is asked for, which then is not run."""
  got = []

  class Asked(Exception):
    pass

  def stop(names, background, refine):
    got.append((names, background))
    raise Asked

  monkeypatch.setattr(model, "_window", stop)

  def ask(call):
    with pytest.raises(Asked):
      call()
    return got.pop()

  return ask


def test_words_of_a_file_and_of_a_data_set(folder, model, asked, monkeypatch):
  monkeypatch.setattr(segment.Segmenter, "load", lambda *args, **kwargs: model)
  (folder.parent / "names.txt").write_bytes("# mine\r\nsand\r\nwater | sea\r\n".encode("utf-16"))
  for words, count, first in (("names.txt", 2, "sand"), ("cityscapes", 19, "road")):
    names, _ = asked(lambda words=words: run("photos/plain.png", f"--words={words}"))
    assert len(names) == count and names[0] == first


def test_words_of_a_data_set_in_python(model, asked):
  names, _ = asked(lambda: model(SCENE, "list:cityscapes, pond"))
  assert names[:2] == ("road", "sidewalk") and names[-1] == "pond" and len(names) == 20


def test_background_words_that_clip_takes_for_a_name_are_left_out(model, asked):
  names, background = asked(lambda: model(SCENE, ["The Sky", "sand"], background="stuff"))
  assert names == ("The Sky", "sand")
  assert set(BACKGROUNDS["stuff"]) - set(background) == {"sky"}


@pytest.mark.parametrize("typed", ["stuff", "Stuff ", ["stuff"], np.array(["stuff"])])
def test_stuff_in_any_form_stands_for_its_words(asked, model, typed):
  assert asked(lambda: model(SCENE, "sand", background=typed))[1] == BACKGROUNDS["stuff"]


def test_stuff_among_other_background_words(asked, model):
  _, background = asked(lambda: model(SCENE, "sea", background="red, stuff, a wall, Stuff"))
  rest = tuple(word for word in BACKGROUNDS["stuff"] if word not in ("sea", "wall"))
  assert background == ("red", *rest, "a wall")


def test_with_max_a_word_belongs_to_one_class_or_to_the_background():
  model = Segmenter.load("shapes_clip", synonyms="max")
  for names, background in (("sand | water, water", ""), ("sand | water", "Water, grass")):
    with pytest.raises(InputError, match=r"'sand, water' and '[wW]ater' share 'water'"):
      model(SCENE, names, background=background)


@pytest.mark.parametrize("mode", SYNONYMS)
def test_each_synonym_is_left_out_of_listed_background_words(asked, model, monkeypatch, mode):
  predictor = copy.copy(model.predictor)
  predictor.encoder = dataclasses.replace(predictor.encoder, synonyms=mode)
  monkeypatch.setattr(model, "predictor", predictor)
  _, background = asked(lambda: model(SCENE, "sky | cloud, sand", background="stuff"))
  assert set(BACKGROUNDS["stuff"]) - set(background) == {"sky", "cloud"}


@pytest.mark.parametrize("typed", ["", (), [], np.array([], str), None])
def test_no_background_words(asked, model, typed):
  assert asked(lambda: model(SCENE, "sand", background=typed))[1] == ()


def test_words_that_only_look_like_files(folder, asked, model, monkeypatch):
  monkeypatch.setattr(segment.Segmenter, "load", lambda *args, **kwargs: model)
  (folder.parent / "sand").write_bytes(b"")  # a file of that name is no reason to refuse the word
  for typed in ("sand, photos", "st. bernard dog, no. 5", "either/or"):
    names, _ = asked(lambda typed=typed: run("photos/plain.png", typed))
    assert names == tuple(typed.split(", "))


def test_names_that_begin_with_a_dash(folder, asked, model, monkeypatch, capsys):
  monkeypatch.setattr(segment.Segmenter, "load", lambda *args, **kwargs: model)
  (folder.parent / "-a.png").write_bytes((folder / "plain.png").read_bytes())
  names, _ = asked(lambda: cli.main(["segment", "--other=0.5", "--", "-a.png", "-sand, water"]))
  assert names == ("-sand", "water")
  names, _ = asked(lambda: cli.main(["segment", "--words=cityscapes", "--", "-a.png"]))
  assert names[0] == "road"
  assert cli.main(["segment", "--", "-b.png", "sand"]) == 2
  assert "-b.png: expected an image or a folder of images, no such" in capsys.readouterr().err


def test_an_unknown_flag_is_told(folder, capsys):
  with pytest.raises(SystemExit):
    run("photos/plain.png", "sand", "--bakground=grass")
  assert "unrecognized arguments: --bakground=grass" in capsys.readouterr().err


def test_the_page_reads_the_same(model):
  file = io.BytesIO(odd.png16(np.dstack([DEEP, 0 * DEEP[..., 0]])))
  file.name = "deep.png"
  offered = type("Offered", (), {"get": lambda self, name, method: model})()
  result = demo.segment(offered, file, WORDS, "", 0.0, "shapes", "default")
  assert result.names == tuple(NAMES)
  assert demo.description(result) == (
    f"Made by: {model.method}  \nRead: 16 bits became 8  \nRead: transparent pixels lie on #ffffff"
  )


def test_images_that_were_read_before(model):
  (result,) = model.stream([pictures.load(DEEP)], NAMES)
  np.testing.assert_array_equal(result.labels, model(SCENE, NAMES).labels)
  assert result.notes == ("16 bits became 8",)


def test_commands_of_the_page(folder, model, monkeypatch):
  """docs/pictures.md: up to the network."""
  monkeypatch.setattr(segment.Segmenter, "load", lambda *args, **kwargs: model)
  calls = []
  monkeypatch.setattr(segment, "save_all", lambda *args, **options: calls.append((args, options)))
  root = folder.parent
  (root / "names.txt").write_text("cat | kitten\ngrass\n")
  for name in ("photo.jpg", "logo.png", "scan.tif"):
    (root / name).write_bytes(b"")
  text = (ROOT / "docs/pictures.md").read_text()
  commands = [
    shlex.split(line) for line in text.partition("```sh\n")[2].split("```")[0].splitlines()
  ]
  for words in commands:
    assert words[:2] == ["rpn", "segment"] and cli.main(words[1:]) == 0
  assert [len(args[2]) for args, _ in calls] == [2, 2, 2, 150, 2, 1]
  assert [len(args[1].files) for args, _ in calls] == [1, 8, 1, 1, 1, 1]
  assert [options["page"] for _, options in calls][4] == 2
  assert [options["matte"] for _, options in calls][4:] == ["white", "#202020"]
