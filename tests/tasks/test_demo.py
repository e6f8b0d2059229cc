"""The page in the browser: what its buttons do, and the page itself in a headless Chromium."""

import gc
import importlib.metadata
import io
import json
import os
import pathlib
import re
import runpy
import shutil
import subprocess
import tempfile
import threading
import time
import types
import urllib.request
import zipfile

import numpy as np
import pytest
from PIL import Image

from rpn_jax import cli
from rpn_jax.base.errors import InputError
from rpn_jax.drawing.palette import class_colors
from rpn_jax.inference import segmenter, views
from rpn_jax.inference.predictor import forward
from rpn_jax.tasks import demo
from tests import ROOT

CHROMIUM = next(
  filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
browser_only = pytest.mark.skipif(
  CHROMIUM is None, reason="no Chromium on this machine: apt-get install chromium"
)
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:gradio")
WORDS = "plain yellow, sand, water"


@pytest.fixture(scope="module", autouse=True)
def collected():
  """Gradio's unclosed event loops end here, not in another module's tests.

  There Python 3.11 fails, with a SystemError, if the warning about one comes while code is parsed.
  """
  yield
  gc.collect()


@pytest.fixture(scope="module")
def models():
  return demo.Models(["shapes_clip"])


def segment(models, picture=demo.SCENE, words=WORDS, background="", other=0.0, **choices):
  choices = {"model": "shapes_clip", "method": demo.OWN_METHOD, **choices}
  return demo.segment(models, picture, words, background, other, **choices)


def unpacked(path):
  """{name: content} of a zip archive."""
  with zipfile.ZipFile(path) as archive:
    return {name: archive.read(name) for name in archive.namelist() if not name.endswith("/")}


def test_a_picture_and_words(models, tmp_path):
  result = segment(models)
  assert result.labels.shape == (192, 256) and result.file == "scene.png"
  rows = demo.table(result)
  assert [row[0] for row in rows] == list(result.shares())
  for palette in ("colorblind", "default"):
    mask, record = demo.files(result, tmp_path, palette)
    with Image.open(mask) as picture:
      colors = np.reshape(picture.getpalette(), (-1, 3)).tolist()
    for row in json.loads(pathlib.Path(record).read_text())["classes"]:
      assert (
        row["color"] == colors[row["id"]] == class_colors(result.names, palette).tolist()[row["id"]]
      )
  with Image.open(mask) as picture:
    np.testing.assert_array_equal(np.asarray(picture), result.labels)
  assert json.loads(pathlib.Path(record).read_text())["names"] == WORDS.split(", ")
  assert demo.archive(result, demo.NO_FORM, tmp_path) is None
  made = {form: unpacked(demo.archive(result, form, tmp_path)) for form in demo.OTHER_FORMS}
  assert {*made["scores"]} == {"scene_scores.npz", "scene_scores.png"}
  assert json.loads(made["labelme"]["labelme/scene.json"])["imageData"]  # no image is beside it
  assert "yolo/images/scene.png" in made["yolo"] and "voc/class_names.txt" in made["voc"]
  left_out = segment(models, words="sand", background="water, grass", other=0.1)
  assert demo.table(left_out)[-1][0] == "other"


def test_results_have_folders_of_their_own_for_an_hour(tmp_path):
  first, second = (demo.new_folder(tmp_path / "results", "program") for _ in range(2))
  assert first != second
  (first / "scene.json").touch()
  hour_ago = time.time() - demo.KEPT_SECONDS - 1
  os.utime(first, (hour_ago, hour_ago))
  third = demo.new_folder(tmp_path / "results", "another")
  assert {*(tmp_path / "results").iterdir()} == {second, third}


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"picture": None}, "Drop a picture first"),
    ({"words": "  "}, "Type the classes"),
    ({"words": "cat, cat"}, "duplicate class name 'cat'"),
    ({"words": ", ".join(map(str, range(101)))}, "at most 100 words, .* got 101"),
    ({"words": "|".join(map(str, range(101)))}, "at most 100 words, with synonyms .* got 101"),
    ({"background": "list:ade150"}, "with synonyms and background words, got 153"),
    ({"model": "/etc"}, "'/etc' is not on offer here; choose shapes_clip"),
    ({"method": "magic"}, "method='magic' is not known"),
    ({"background": "sand"}, "duplicate class name 'sand'"),
  ],
)
def test_what_is_wrong_is_said(models, change, message):
  with pytest.raises(InputError, match=message):
    segment(models, **change)


def test_bad_pictures_are_refused_without_the_servers_paths(models, tmp_path, monkeypatch):
  (tmp_path / "notes.jpg").write_text("not a picture")
  Image.new("RGB", (40, 30)).save(tmp_path / "large.png")
  monkeypatch.setattr(demo, "MAX_PIXELS", 1000)
  for name, message in [
    ("notes.jpg", "notes.jpg: expected a readable image"),
    ("large.png", "large.png: expected at most 1,000 pixels, got 40 x 30"),
  ]:
    with pytest.raises(InputError, match=message) as error:
      segment(models, picture=str(tmp_path / name))
    assert str(tmp_path) not in str(error.value)


def test_users_share_one_model_and_its_programs(models, monkeypatch):
  segment(models).shares()
  programs = lambda: tuple(cached.cache_info().misses for cached in (forward, views.tile_program))
  before, results = programs(), {}
  monkeypatch.setattr(segmenter.Segmenter, "load", None)

  def user(name):
    results[name] = segment(models, words=f"{name}, sand, water").shares()

  threads = [threading.Thread(target=user, args=(f"user {i}",)) for i in range(4)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert len(results) == 4 and programs() == before


def test_both_checkpoints_of_a_run_are_on_offer(tmp_path, monkeypatch):
  loaded = []
  monkeypatch.setattr(segmenter.Segmenter, "load", lambda name, **choices: loaded.append(choices))
  (tmp_path / "config.json").write_text("{}")  # a run, not what one exported
  models = demo.Models(["shapes_clip", str(tmp_path)])
  assert models.names == ("shapes_clip", str(tmp_path), f"{tmp_path}, best checkpoint")
  models.get(models.names[2])
  assert [choices["checkpoint"] for choices in loaded] == ["last", "best"]
  models.get(models.names[2], "sclip")  # which uses the prompts of neither
  assert loaded[-1] == {"method": "sclip"}


@pytest.mark.slow
def test_what_a_model_knows_is_said_before_the_button_is_pressed(models, address):
  note = "shapes_clip: its CLIP, shapes_clip, knows drawn shapes and no photographs"
  assert models.note("shapes_clip") == note and models.note("unknown") == ""
  with urllib.request.urlopen(f"{address}config") as answer:
    assert note in answer.read().decode()


def test_sliders_of_classes_begin_anew_and_need_a_result(models, tmp_path):
  import gradio as gr

  page = demo.build(models, tmp_path)
  request = types.SimpleNamespace(session_hash="visitor")
  (press,) = (block.fn for block in page.fns.values() if block.api_name == "segment")
  given = (str(demo.SCENE), WORDS, "", 0.0, "shapes_clip", demo.OWN_METHOD, 0.5, False, "none")
  (_, first, *_), (result, second, *_) = (press(*given, request) for _ in range(2))
  # Gradio draws them for a state of another value; it calls the function of `gr.render`.
  assert first != second and first[1] == second[1] == (*result.shares(),)
  with gr.Blocks() as drawn:
    page.renderables[0].fn(second)
  moved = [block.fn for block in drawn.fns.values()]
  assert len(moved) == len(result.names)
  assert moved[0](None, 1.0, 0.5, False, "none", request) == [gr.skip()] * 6
  for move, name in zip(moved, second[1]):
    result, *_ = move(result, 0.5, 0.5, False, "none", request)
    assert result.emphasis[name] == 0.5


def test_listens_on_this_machine_only_unless_told(capsys, monkeypatch):
  with pytest.raises(SystemExit):
    demo.main(["--help"])
  assert "127.0.0.1" in capsys.readouterr().out
  assert cli.main(["demo", "--model", "nowhere"]) == 2
  monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None)
  assert cli.main(["demo"]) == 2
  errors = capsys.readouterr().err.splitlines()
  assert "model='nowhere': expected the workdir" in errors[0]
  assert errors[1].startswith("error: the page needs Gradio: pip install")


@pytest.fixture(scope="module")
def address(models, tmp_path_factory):
  """Of a page on a machine where another user has Gradio's own folder for uploads."""
  temporary = tmp_path_factory.mktemp("tmp")
  root = temporary / "rpn_demo"
  root.mkdir()
  (temporary / "gradio").write_text("in the way")
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(tempfile, "tempdir", str(temporary))
    patch.setenv("GRADIO_TEMP_DIR", "")
    patch.delenv("GRADIO_TEMP_DIR")
    page, address = demo.launch(models, root, block=False)
    yield address
    page.close()


def test_uploads_have_a_folder_of_their_own(address, tmp_path_factory):
  assert address.startswith("http://127.0.0.1:")
  assert list(tmp_path_factory.getbasetemp().glob("tmp*/rpn_demo/gradio/*/scene.png"))


def example(marker, language):
  page = (ROOT / "docs/deploy.md").read_text()
  return re.search(rf"<!-- {marker} -->\n\n```{language}\n(.*?)^```", page, re.M | re.S)[1]


# Sockets of the client's, which are closed when they are collected.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_program_calls_the_page(address, models, tmp_path, monkeypatch):
  """The lines of docs/deploy.md, with the address of this page."""
  shutil.copy(demo.SCENE, tmp_path / "photo.jpg")
  monkeypatch.chdir(tmp_path)
  names = {}
  exec(example("client", "python").replace("http://127.0.0.1:7860/", address), names)
  wanted = segment(models, words="sand, water")
  with Image.open(names["mask"]) as mask:
    np.testing.assert_array_equal(np.asarray(mask), wanted.labels)
  assert names["made_by"] == f"Made by: {wanted.method}"
  assert json.loads(pathlib.Path(names["record"]).read_text())["names"] == ["sand", "water"]
  with Image.open(names["overlay"]) as overlay:
    assert overlay.format == "PNG"
  assert [row[0] for row in names["rows"]["data"]] == list(wanted.shares())
  client = names["client"]
  both = [
    client.submit(
      picture=names["handle_file"]("photo.jpg"), words=words, api_name="/segment"
    ) for words in ("sand, water", "water, sand")
  ]  # fmt: skip
  for job, right in zip(both, (wanted.labels, segment(models, words="water, sand").labels)):
    with Image.open(job.result()[3]) as mask:
      np.testing.assert_array_equal(np.asarray(mask), right)
  assert list(client.view_api(print_info=False, return_format="dict")["named_endpoints"]) == [
    "/segment"
  ]
  with pytest.raises(Exception, match="duplicate class name 'sand'"):
    picture = names["handle_file"]("photo.jpg")
    client.predict(picture=picture, words="sand, sand", api_name="/segment")


def test_the_page_by_curl(address, tmp_path, tmp_path_factory):
  shutil.copy(demo.SCENE, tmp_path / "photo.jpg")
  lines = example("curl", "sh").replace("http://127.0.0.1:7860/", address)
  lines = lines.replace('"shapes"', '"shapes_clip"')
  done = subprocess.run(["bash", "-c", lines], cwd=tmp_path, capture_output=True, text=True)
  event, data = done.stdout.split("data: ", 1)
  assert "event: complete" in event
  *_, overlay, _, mask, _, _ = json.loads(data.splitlines()[0])
  with urllib.request.urlopen(mask["url"]) as answer, Image.open(io.BytesIO(answer.read())) as got:
    assert got.size == (256, 192) and set(np.unique(got)) <= {0, 1}
  assert overlay["url"].endswith(".png")
  # Each call without a page is a visitor who never leaves: its folder goes with a later one.
  results, *_ = tmp_path_factory.getbasetemp().glob("tmp*/rpn_demo/results")
  hour_ago = time.time() - demo.KEPT_SECONDS - 1
  for folder in results.iterdir():
    os.utime(folder, (hour_ago, hour_ago))
  subprocess.run(["bash", "-c", lines], cwd=tmp_path, capture_output=True, check=True)
  assert len([*results.iterdir()]) == 1


def test_the_space_serves_the_page(monkeypatch, tmp_path):
  """Its app.py as it stands, on a free port."""
  monkeypatch.setenv("MODELS", "shapes_clip")
  launched = []
  monkeypatch.setattr(demo, "launch", lambda models, root, **options: launched.append(options))
  runpy.run_path(str(ROOT / "docs/deploy/space/app.py"), run_name="__main__")
  assert launched == [{"host": "0.0.0.0", "port": 7860}]
  front = (ROOT / "docs/deploy/space/README.md").read_text().split("---")[1]
  assert (
    f"sdk_version: {importlib.metadata.version('gradio')}" in front and "app_file: app.py" in front
  )


def test_the_containers_lines():
  """Not built, for want of Docker: its instructions are known, its files are there."""
  text = (ROOT / "docs/deploy/Dockerfile").read_text().replace("\\\n", " ")
  lines = [line.split(maxsplit=1) for line in text.splitlines() if line[:1] not in ("#", "")]
  assert {word for word, _ in lines} <= {
    "FROM", "WORKDIR", "COPY", "RUN", "USER", "ENV", "EXPOSE", "CMD",
  }  # fmt: skip
  for source in (word for kind, rest in lines if kind == "COPY" for word in rest.split()[:-1]):
    assert (ROOT / source).exists()
  ((_, command),) = (line for line in lines if line[0] == "CMD")
  name, *arguments = json.loads(command)
  assert (name, arguments[0]) == ("rpn", "demo")
  with pytest.raises(SystemExit, match="0"):
    demo.main([*arguments[1:], "--help"])
  pins = subprocess.run(
    ["bash", "-c", text.split("RUN ")[1].split(" > pins.txt")[0]], cwd=ROOT, capture_output=True,
    text=True, check=True,
  ).stdout  # fmt: skip
  assert "jax==" in pins and "grain" not in pins and "pycocotools" not in pins


@pytest.fixture(scope="module")
def browser():
  from playwright.sync_api import sync_playwright

  with sync_playwright() as playwright:
    # Root, as in a container, has no sandbox.
    chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
    yield chromium
    chromium.close()


@pytest.fixture
def page(browser, address):
  context = browser.new_context(viewport={"width": 1400, "height": 900}, accept_downloads=True)
  page = context.new_page()
  page.asked = set()
  page.on("request", lambda request: page.asked.add(request.url))
  visit(page, address)
  page.wait_for_selector("text=Your picture, your words")
  yield page
  context.close()


def visit(page, address):
  """Opens the page; again if the server failed, as Python 3.11 does if two threads parse at once.

  That is "AST constructor recursion depth mismatch", python/cpython#106905.
  """
  page.set_default_timeout(60_000)  # the first load, beside another worker
  if page.goto(address).status == 500:
    page.goto(address)


def press(page, picture, words=WORDS):
  page.set_input_files("input[type=file]", picture)
  page.get_by_label("Words").first.fill(words)
  page.get_by_role("button", name="Segment", exact=True).click()


def source(page):
  """Address of the shown result."""
  image = page.locator(".image-frame img, .image-container img").last
  image.wait_for()
  return image.get_attribute("src")


def overlay(page):
  content = page.request.get(source(page)).body()
  return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


def downloaded(page, name):
  with page.expect_download() as download:
    page.get_by_role("button", name=name).click()
  return pathlib.Path(download.value.path())


def after(page, change):
  """Does `change` and waits for another result."""
  before = source(page)
  change()
  page.wait_for_function(
    "before => [...document.querySelectorAll('img')].every(image => image.src != before)",
    arg=before,
  )


def area_of_sand(page):
  """Pixels, in the archive of COCO's annotations."""
  content = json.loads(unpacked(downloaded(page, "Archive (ZIP)"))["coco/scene.json"])
  sand = WORDS.split(", ").index("sand") + 1
  return sum(each["area"] for each in content["annotations"] if each["category_id"] == sand)


@browser_only
def test_upload_type_and_see_the_colored_result(page, address):
  press(page, demo.SCENE)
  page.wait_for_selector("text=Made by: training-free sclip")
  first = overlay(page)
  colors = class_colors(WORDS.split(", "))
  assert any((first == color).all(-1).any() for color in colors)  # the swatches of the legend
  with Image.open(downloaded(page, "Mask (PNG)")) as mask:
    assert mask.size == (256, 192) and set(np.unique(mask)) <= {0, 1, 2}
  before = json.loads(downloaded(page, "Numbers (JSON)").read_text())
  assert before["names"] == WORDS.split(", ") and before["emphasis"] == {}
  share = lambda content: {row["name"]: row["share"] for row in content["classes"]}["sand"]

  page.get_by_label("Other forms").first.click()
  page.get_by_role("option", name="coco").click()
  assert area_of_sand(page) == round(192 * 256 * share(before))

  page.get_by_text("More or less of a class").click()
  slider = page.get_by_label("number input for sand")
  slider.fill("1")
  after(page, slider.blur)
  now = json.loads(downloaded(page, "Numbers (JSON)").read_text())
  assert now["emphasis"] == {"sand": 1} and share(now) > share(before)
  assert area_of_sand(page) == round(192 * 256 * share(now))  # the archive follows

  after(page, page.get_by_role("button", name="Segment", exact=True).click)
  assert json.loads(downloaded(page, "Numbers (JSON)").read_text())["emphasis"] == {}
  page.wait_for_function(
    "() => document.querySelector('[aria-label=\"number input for sand\"]')?.value == 0"
  )

  opacity = page.get_by_label("number input for Opacity")
  opacity.fill("0")
  after(page, opacity.blur)
  bare = overlay(page)
  assert bare.shape == overlay(page).shape and (bare != first).any()
  # Nothing was asked of any other server.
  hosts = {url.split("/")[2] for url in page.asked if url.startswith("http")}
  assert hosts == {address.split("/")[2]}


@pytest.mark.slow
@browser_only
@pytest.mark.parametrize("width", [1400, 390])
def test_nothing_is_wider_than_the_window(page, width):
  page.set_viewport_size({"width": width, "height": 844})
  press(page, demo.SCENE)
  page.wait_for_selector("text=Made by")
  overlay(page)
  assert page.evaluate("document.documentElement.scrollWidth") <= width
  assert not page.locator("text=undefined").count()


@browser_only
def test_a_wrong_file_gives_a_readable_message(page, tmp_path):
  (tmp_path / "notes.jpg").write_text("not a picture")
  press(page, tmp_path / "notes.jpg")
  page.wait_for_selector("text=notes.jpg: expected a readable image")
  (tmp_path / "notes.txt").write_text("not a picture")
  page.set_input_files("input[type=file]", tmp_path / "notes.txt")
  page.wait_for_selector("text=Invalid file type: notes.txt")


@browser_only
def test_an_oversized_upload_is_refused(page, tmp_path):
  (tmp_path / "huge.png").write_bytes(b"\x89PNG" + bytes((demo.MAX_MEGABYTES + 1) * 2**20))
  page.set_input_files("input[type=file]", tmp_path / "huge.png")
  page.wait_for_selector("text=/exceed the maximum allowed size of 20/")


@browser_only
def test_it_opens_with_the_scene_segmented(browser):
  root = pathlib.Path(tempfile.mkdtemp())  # Gradio serves what is below the folder of such files
  models = demo.Models(["shapes", "shapes_clip"])
  server, address = demo.launch(models, root, block=False)
  try:
    page = browser.new_page(viewport={"width": 390, "height": 844})
    visit(page, address)
    page.wait_for_selector("text=Made by: RPN, step 3000 of shapes; its CLIP, shapes_clip, knows")
    top = lambda place: place.bounding_box()["y"]
    result = page.locator(".image-frame img, .image-container img").last
    examples = page.get_by_text("The shapes data set", exact=True)
    assert top(page.get_by_label("Words").first) < top(result) < top(examples)
    page.get_by_label("Model").first.click()
    page.get_by_role("option", name="shapes_clip").click()
    page.wait_for_selector(f"text={models.note('shapes_clip')}")
    assert page.locator("text=Made by: RPN, step 3000 of shapes").is_visible()  # as the result was
    page.close()
  finally:
    server.close()
    shutil.rmtree(root)
