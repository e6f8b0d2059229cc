"""A page in the browser: drop an image, type words, see the segmentation.

    python -m rpn_jax demo --model=runs/shapes --model=ViT-B/16

The page is Gradio's (`pip install gradio==6.31.0`), what its buttons do are plain functions.
"""

import argparse
import contextlib
import copy
import functools
import hashlib
import importlib.util
import itertools
import os
import pathlib
import shutil
import tempfile
import threading
import time
from collections.abc import Sequence
from typing import Any

from rpn_jax import devices
from rpn_jax.annotations.options import ANNOTATIONS
from rpn_jax.base import pictures
from rpn_jax.base.errors import InputError
from rpn_jax.base.paths import expand, write_json
from rpn_jax.base.words import parse_names, split_synonyms
from rpn_jax.config.stored import CONFIG
from rpn_jax.drawing.images import save_png
from rpn_jax.drawing.legend import share_text
from rpn_jax.inference.segmentation import Segmentation
from rpn_jax.inference.segmenter import METHODS, SHIPPED, SHIPPED_PROMPTS, Segmenter, note_of

# Limits of what a stranger may ask for.
MAX_MEGABYTES = 20
MAX_PIXELS = 40_000_000
MAX_WORDS = 100
# How long results and their files are kept.
KEPT_SECONDS = 3600
# What can be downloaded besides mask and numbers.
NO_FORM = "none"
OTHER_FORMS = ("scores", *ANNOTATIONS)
SLIDERS = 24  # classes with a slider, the largest first
OWN_METHOD = "default"
SCENE = pathlib.Path(__file__).parent.parent / "assets" / "scene.png"
SCENE_WORDS = (
  "plain orange, striped orange, dotted orange, plain yellow, plain blue, plain purple, sand, water"
)


class Models:
  """The models on offer, each loaded when it is first asked for and then shared by everybody.

  Args:
    names: what `Segmenter.load` takes; the first one is loaded at once, to fail early. Of a run's
      folder both checkpoints are on offer.
  """

  def __init__(self, names: Sequence[str]):
    self._choices = {}
    for name in names:
      self._choices[name] = (name, "last")
      if (expand(name) / CONFIG).exists():
        self._choices[f"{name}, best checkpoint"] = (name, "best")
    self.names = tuple(self._choices)
    self._lock = threading.Lock()
    self._load = functools.lru_cache(8)(Segmenter.load)
    self.get(self.names[0])

  def note(self, name: str) -> str:
    """What must be known of a model's results before they are made, as a sentence for the page."""
    note = note_of(self._choices[name][0]) if name in self.names else ""
    return f"{name}: {note}" if note else ""

  def get(self, name: str, method: str = OWN_METHOD) -> Segmenter:
    """
    Raises:
      InputError: a model that is not on offer, or a damaged one.
    """
    if name not in self.names:
      raise InputError(f"model {name!r} is not on offer here; choose {' or '.join(self.names)}")
    with self._lock:  # two users at once must not load it twice
      model, checkpoint = self._choices[name]
      if method == OWN_METHOD:
        return self._load(model, checkpoint=checkpoint)
      return self._load(model, method=method)  # without the prompts of a checkpoint


def segment(
  models: Models, picture, words: str, background: str, other: float, model: str, method: str
) -> Segmentation:
  """What the button does.

  Raises:
    InputError: what is missing or wrong, in one line for the page.
  """
  if picture is None:
    raise InputError("Drop a picture first.")
  if not (words or "").strip():
    raise InputError('Type the classes to look for, such as "cat | kitten, grass".')
  names, background = parse_names(words), (background or "").strip()
  asked = [*names, *(parse_names(background) if background else ())]
  if (count := sum(len(split_synonyms(name)) for name in asked)) > MAX_WORDS:
    raise InputError(
      f"Expected at most {MAX_WORDS} words, with synonyms and background words, got {count}."
    )
  try:
    image = pictures.load(picture, max_pixels=MAX_PIXELS)
  except InputError as error:  # without the server's folder
    name = pathlib.PurePath(str(picture)).name
    raise InputError(str(error).replace(str(picture), name)) from error
  segmenter = models.get(model, method)
  (result,) = segmenter.stream([image], names, other=other, background=background)
  result.file = pathlib.PurePath(str(picture)).name
  return result


def new_folder(root: pathlib.Path, visitor: str) -> pathlib.Path:
  """A folder for the files of one result, since calls of one client may run at the same time.

  Removes those older than KEPT_SECONDS: of a program that calls the page nobody says that it left.

  Args:
    root: of these folders, and of nothing else.
    visitor: what the folder's name begins with.
  """
  root.mkdir(exist_ok=True)
  for old in root.iterdir():
    with contextlib.suppress(FileNotFoundError):  # another call removes it, too
      if old.stat().st_mtime < time.time() - KEPT_SECONDS:
        shutil.rmtree(old, ignore_errors=True)
  return pathlib.Path(tempfile.mkdtemp(prefix=f"{visitor}_", dir=root))


def files(result: Segmentation, folder: pathlib.Path, palette: str = "default") -> list[str]:
  """Paths of the mask and the JSON for download."""
  stem = pathlib.PurePath(result.file).stem
  mask = save_png(folder / f"{stem}_labels.png", result.mask(palette))
  write_json(folder / f"{stem}.json", result.summary(palette))
  return [str(mask), str(folder / f"{stem}.json")]


def archive(result: Segmentation, form: str, folder: pathlib.Path) -> str | None:
  """Path of a zip archive with the files of one of OTHER_FORMS; None for NO_FORM."""
  if form == NO_FORM:
    return None
  stem = pathlib.PurePath(result.file).stem
  with tempfile.TemporaryDirectory(dir=folder) as files:
    named = copy.copy(result)
    named.file = pathlib.Path(files, result.file)  # where no file is: the pixels are written
    named.save(files, stem, save=form)
    return shutil.make_archive(str(folder / f"{stem}_{form}"), "zip", files)


def table(result: Segmentation) -> list[list]:
  """Rows of class, share and mean score, as the page lists them."""
  content = result.summary()
  rows = [
    [row["name"], share_text(row["share"]), f"{row['score']:.2f}"] for row in content["classes"]
  ]
  rest = content["other"]["share"]
  return [*rows, ["other", share_text(rest), ""]] if rest else rows


def description(result: Segmentation) -> str:
  """The model, and what had to be decided when the image was read."""
  notes = [note.partition(" (--")[0] for note in result.notes]  # flags are for the command
  return "  \n".join([f"Made by: {result.method}", *(f"Read: {note}" for note in notes)])


CSS = """
.gradio-container { max-width: min(1500px, 100vw) !important; margin: auto; }
.gradio-container .column { min-width: min(320px, 100%) !important; max-width: 100%; }
"""


def build(models: Models, root: pathlib.Path):
  """The page as Gradio's Blocks.

  Args:
    models: on offer.
    root: folder for downloads.
  """
  import gradio as gr

  def plainly(function):
    """Errors of input shown on the page in their own words."""

    @functools.wraps(function)
    def wrapped(*args, **kwargs):
      try:
        return function(*args, **kwargs)
      except InputError as error:
        raise gr.Error(str(error), title="This did not work", duration=20) from error

    return wrapped

  results = root / "results"  # beside uploads, see `launch`
  calls = itertools.count()

  def visitor(request: gr.Request) -> str:
    # Hashed: the browser chooses this text, and folders are deleted by it.
    return hashlib.sha256(str(request.session_hash).encode()).hexdigest()[:16]

  def folder(request: gr.Request) -> pathlib.Path:
    return new_folder(results, visitor(request))

  def shown(result, alpha, safe, form, request):
    palette, own = "colorblind" if safe else "default", folder(request)
    downloads = [*files(result, own, palette), packed(result, form, own)]
    return [result.overlay(alpha, palette), table(result), *downloads]

  def packed(result, form, own):
    path = archive(result, form, own)
    return gr.update(value=path, interactive=path is not None)

  @plainly
  def on_segment(
    picture, words, background, other, model, method, alpha, safe, form, request: gr.Request
  ):
    result = segment(models, picture, words, background, other, model, method)
    shares = result.shares()
    order = (*shares, *(name for name in result.names if name not in shares))
    # Numbered, as Gradio draws the sliders anew, at 0, only for a state of another value.
    state = next(calls), order
    return [result, state, description(result), *shown(result, alpha, safe, form, request)]

  @plainly
  def on_look(result, alpha, safe, form, request: gr.Request):
    return [gr.skip()] * 5 if result is None else shown(result, alpha, safe, form, request)

  @plainly
  def on_form(result, form, request: gr.Request):
    return gr.skip() if result is None else packed(result, form, folder(request))

  def on_adjust(change):
    """What a slider does; `change`: (result, value) -> arguments of `Segmentation.adjusted`."""

    @plainly
    def adjusted(result, value, alpha, safe, form, request: gr.Request):
      if result is None:  # none was made, or it is not kept any more
        return [gr.skip()] * 6
      result = result.adjusted(**change(result, value))
      return [result, *shown(result, alpha, safe, form, request)]

    return adjusted

  def on_emphasis(name):
    return on_adjust(lambda result, value: {"emphasis": {**result.emphasis, name: value}})

  def on_leave(request: gr.Request):
    for own in results.glob(f"{visitor(request)}_*"):
      shutil.rmtree(own, ignore_errors=True)

  with gr.Blocks(title="RPN", analytics_enabled=False, delete_cache=(600, KEPT_SECONDS)) as page:
    gr.Markdown("# Your picture, your words\nOpen-vocabulary segmentation with CLIP and RPN.")
    # What is shipped knows the scene: the page then opens with it segmented.
    opening = (str(SCENE), SCENE_WORDS) if models.names[0] in SHIPPED_PROMPTS else (None, None)
    if opening[0]:  # compiled before the first visitor comes
      segment(models, *opening, "", 0.0, models.names[0], OWN_METHOD)
    result = gr.State(None, time_to_live=KEPT_SECONDS)
    names = gr.State((0, ()))
    with gr.Row():
      with gr.Column(min_width=320):
        picture = gr.Image(
          opening[0], label="Picture", sources=["upload", "clipboard"], type="filepath", height=320
        )
        # The upload as it is: Gradio would open it itself and not say what is wrong with it.
        upload = lambda payload: payload.path if payload else None
        picture.preprocess = upload  # type: ignore[method-assign]
        words = gr.Textbox(
          opening[1], label="Words", placeholder="cat | kitten, grass", lines=2,
          info="Classes to look for, with commas between them; | joins synonyms. list:voc20 is "
          "those of a data set.",
        )  # fmt: skip
        button = gr.Button("Segment", variant="primary")
        with gr.Row():
          model = gr.Dropdown(list(models.names), value=models.names[0], label="Model")
          method = gr.Dropdown([OWN_METHOD, *METHODS], value=OWN_METHOD, label="Method")
        about = gr.Markdown(models.note(models.names[0]))
        background = gr.Textbox(
          "", label="Background words", info="They compete too, but their pixels get no class."
        )
        other = gr.Slider(
          0, 1, 0, step=0.01, label="Other below", info="Less certain pixels get no class."
        )
      with gr.Column(min_width=320):
        overlay = gr.Image(
          label="Segmentation", format="png", interactive=False, buttons=["download", "fullscreen"]
        )
        made_by = gr.Markdown()  # of the picture above, whatever model is chosen by now
        with gr.Row():
          alpha = gr.Slider(0, 1, 0.55, step=0.05, label="Opacity")
          safe = gr.Checkbox(label="Colors for color-blind readers")
        with gr.Row():
          mask = gr.DownloadButton("Mask (PNG)")
          record = gr.DownloadButton("Numbers (JSON)")
        form = gr.Dropdown(
          [NO_FORM, *OTHER_FORMS], value=NO_FORM, label="Other forms",
          info="Scores, or annotations for other programs.",
        )  # fmt: skip
        archived = gr.DownloadButton("Archive (ZIP)", interactive=False)
        rows = gr.Dataframe(
          headers=["class", "share", "score"], interactive=False, label="Classes by area"
        )
        with gr.Accordion("More or less of a class", open=False):

          @gr.render(inputs=[names], triggers=[names.change])
          def sliders(state):
            for name in state[1][:SLIDERS]:
              slider = gr.Slider(-1, 1, 0, step=0.05, label=name)
              slider.release(
                on_emphasis(name),
                [result, slider, alpha, safe, form],
                [result, *outcome],
                show_progress="hidden",
              )

    # Below both columns, which are one on a narrow screen: the result stands above it.
    gr.Examples([[str(SCENE), SCENE_WORDS]], [picture, words], label="The shapes data set")
    outcome = [overlay, rows, mask, record, archived]
    inputs = [picture, words, background, other, model, method, alpha, safe, form]
    outputs = [result, names, made_by, *outcome]
    # What programs call (docs/deploy.md); the rest is of a visit to the page.
    gr.on([button.click, words.submit], on_segment, inputs, outputs, api_name="segment")
    private: dict[str, Any] = {"api_visibility": "private"}
    if opening[0]:
      page.load(on_segment, inputs, outputs, **private)
    model.change(models.note, model, about, **private)
    on_other = on_adjust(lambda result, value: {"other": value})
    other.release(on_other, [result, other, alpha, safe, form], [result, *outcome], **private)
    for event in (alpha.release, safe.change):
      event(on_look, [result, alpha, safe, form], outcome, show_progress="hidden", **private)
    form.change(on_form, [result, form], archived, **private)
    page.unload(on_leave)
  return page.queue(max_size=64, default_concurrency_limit=2)


def launch(models: Models, root: pathlib.Path, *, host="127.0.0.1", port=None, block=True):
  """Serves the page and returns (server, its address).

  Uploads are kept below `root`, or in GRADIO_TEMP_DIR if the user has set it.
  """
  # Gradio's own choice, /tmp/gradio, belongs to whoever used it first on this machine.
  os.environ.setdefault("GRADIO_TEMP_DIR", str(root / "gradio"))
  import gradio as gr

  # Fonts of the reader's machine: the page asks no other server for anything.
  theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])
  page = build(models, root)
  _, address, _ = page.launch(
    server_name=host, server_port=port, share=False, inbrowser=False, quiet=True, show_error=True,
    max_file_size=f"{MAX_MEGABYTES}mb", theme=theme, css=CSS, footer_links=[], ssr_mode=False,
    prevent_thread_lock=True,
  )  # fmt: skip
  print(f"Open {address} in a browser; Ctrl-C ends it.", flush=True)
  if block:
    page.block_thread()
  return page, address


def main(arguments: list[str]) -> int:
  parser = argparse.ArgumentParser(prog="rpn demo", description=__doc__.splitlines()[0])
  parser.add_argument(
    "--model", action="append",
    help="what --model of `rpn segment` takes; may be repeated (default: shapes, shapes_clip)",
  )  # fmt: skip
  parser.add_argument(
    "--host", default="127.0.0.1",
    help="address to listen at (%(default)s, this machine only); others let strangers in",
  )  # fmt: skip
  parser.add_argument("--port", type=int, help="the first free one from 7860 on, if not given")
  args = parser.parse_args(arguments)
  if importlib.util.find_spec("gradio") is None:
    raise InputError("the page needs Gradio: pip install gradio==6.31.0")
  with (
    contextlib.suppress(KeyboardInterrupt),
    devices.runtime(),
    tempfile.TemporaryDirectory(prefix="rpn_demo_") as root,
  ):
    models = Models(args.model or [*SHIPPED_PROMPTS, *SHIPPED])
    launch(models, pathlib.Path(root), host=args.host, port=args.port)
  return 0
