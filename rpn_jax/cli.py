"""The console command `rpn`, also `python -m rpn_jax`. Training stays with main.py.

Nothing heavy is imported before the command is known, nor, for `segment`, before its arguments are.
"""

import argparse
import gc
import importlib
import os
import pathlib
import shlex
import sys
from collections.abc import Sequence

from rpn_jax import __version__
from rpn_jax.annotations import options
from rpn_jax.base import console, interrupts, picture_files, vocabularies
from rpn_jax.base.errors import InputError
from rpn_jax.base.words import check_known, parse_names, split_synonyms
from rpn_jax.drawing.palette import PALETTES

# Command -> module with a `main(arguments) -> exit status`, and what it does.
COMMANDS = {
  "segment": ("rpn_jax.tasks.segment", "images into the classes you name"),
  "demo": ("rpn_jax.tasks.demo", "a page in the browser: an image, words, the segmentation"),
  "export": ("rpn_jax.tasks.export_model", "a model as ONNX, StableHLO or safetensors"),
  "share": ("rpn_jax.tasks.share", "an exported model to the Hugging Face hub"),
  "weights": ("rpn_jax.tasks.weights", "public CLIP weights by name: list, get, remove"),
  "convert": ("rpn_jax.tasks.convert", "CLIP's weights into the form that this package reads"),
  "convert_vit": ("rpn_jax.tasks.convert_vit", "a plain ViT or MAE beside CLIP's text tower"),
  "report": ("rpn_jax.analysis.report", "many runs side by side: a table, curves"),
  "costs": ("rpn_jax.analysis.costs", "parameters, operations, memory and speed of a config"),
  "compile": ("rpn_jax.analysis.compile", "what a run would take on TPUs, by their compiler"),
  "attention": ("rpn_jax.analysis.attention", "relationship maps of a trained run, drawn"),
  "distance": ("rpn_jax.analysis.distance", "how far the heads of a trained run look, drawn"),
  "locality": ("rpn_jax.analysis.locality", "how local a frozen tower's patches are"),
  "prepare": ("data_pipelines.prepare", "raw files of a data set into checked records"),
  "sweep": ("rpn_jax.analysis.sweep", "a table of ablations, run by run"),
  "train_together": (
    "rpn_jax.tasks.train_together",
    "runs of other seeds and rates, as one program",
  ),
  "study": ("rpn_jax.analysis.study", "tables and figures of a sweep's kept runs"),
  "reproduce": ("rpn_jax.reproduce", "a row of a published table, from an empty machine"),
}
# Training and data sets are in the project's folder, not in the installed package.
IN_CLONE = ("locality", "prepare", "sweep", "train_together", "study", "reproduce")


def main(arguments: list[str] | None = None) -> int:
  """Runs a command; returns its exit status, see `console.run_command`."""
  if arguments is None:
    console.use_utf8()
    interrupts.end_at_once()
    # To import and to trace makes many objects and little garbage: a tenth of a short command.
    gc.set_threshold(100_000)
    arguments = sys.argv[1:]
  return console.run_command(lambda: _run(arguments))


def _run(arguments: list[str]) -> int:
  command, *rest = arguments or ["--help"]
  if command.startswith("-"):
    _parser().parse_args([command])
  check_known("command ", command, COMMANDS)
  if command in IN_CLONE:
    _find_clone(arguments)
  if command == "segment":
    return _segment(rest)
  module = importlib.import_module(COMMANDS[command][0])
  if command == "export":
    return module.main(rest, lambda config: _training_data(config, arguments))
  if command == "locality":
    return module.main(rest, _scenes)
  if command == "train_together":
    return module.main(rest, _training_set)
  return module.main(rest)


def _find_clone(arguments: list[str]) -> None:
  """Lets what stands beside rpn_jax in a clone be imported."""
  root = pathlib.Path(__file__).parent.parent
  if not (root / "main.py").exists():
    raise InputError(
      "preparing data sets and training need a clone of the project; in its folder run `make`, "
      f"then: .venv/bin/python -m rpn_jax {shlex.join(arguments)}"
    )
  sys.path.append(str(root))  # an installed clone finds rpn_jax, but not what stands beside it


def _training_data(config, arguments: list[str]) -> tuple:
  """The training set of a run, without its records, and its license; as in main.py."""
  _find_clone(arguments)
  from data_pipelines import datasets, registry

  return datasets.load(config, names_only=True), registry.license_of(config.data.name)


def _training_set(config, process: tuple[int, int]):
  """That of a config, of a clone."""
  from data_pipelines import datasets

  return datasets.load(config, process)


def _scenes(data_dir: str) -> dict:
  """Those of the shapes data set, of a clone."""
  from data_pipelines import datasets

  return datasets.scenes(data_dir)


def _segment(arguments: list[str]) -> int:
  parser = argparse.ArgumentParser(
    prog="rpn segment",
    description="Segments images into the classes you name; writes an overlay with a legend, an "
    "index PNG and a JSON file per image, or what --save names.",
  )
  add = parser.add_argument
  add("image", help="an image or a folder of them (docs/pictures.md); a film; a raster")
  add("words", nargs="?", help='class names, e.g. "cat | kitten, grass": | joins synonyms')
  add(
    "--words", dest="list", metavar="FILE_OR_LIST",
    help="in place of class names: a text file of them, or those of a data set: "
    + ", ".join(vocabularies.NAMES),
  )  # fmt: skip
  add("--recursive", action="store_true", help="also the images in subfolders")
  add("--page", type=int, help="of files with several pages or frames, from 1 (the one shown)")
  add("--matte", help="color behind transparent pixels, by name or as #rrggbb (white)")
  add(
    "--model", default="shapes",
    help="workdir of a training run, folder or file that it exported, file of CLIP weights, or a "
    "name: hf://owner/name, a model that somebody shared, and ViT-B/16 and others of `rpn "
    "weights`, fetched once; shapes (the default), prompts for the drawn shapes data set; "
    "shapes_clip, the tiny CLIP around them",
  )  # fmt: skip
  add(
    "--method",
    help="sclip, maskclip, … (docs/method.md); else what the model was trained as, and for CLIP "
    "weights the best for their tower",
  )
  add("--clip", help="CLIP weights of a trained model, if they are not found where it says")
  add("--checkpoint", default="last", choices=("last", "best"), help="of a run")
  add("--out", default="predictions", help="folder to write to (%(default)s)")
  add(
    "--other",
    type=float,
    default=0.0,
    help="pixels with a best score below it, 0 to 1, get no class",
  )
  add(
    "--background", default="",
    help="words whose pixels get no class; stuff: 26 words for what surrounds things",
  )  # fmt: skip
  add("--refine", help="pamr: follow the edges of the image; none; else as the model's protocol")
  add("--templates", help="sentences around a name, e.g. single or imagenet80")
  add("--synonyms", help="how synonyms are joined: first, mean, max or joined")
  add(
    "--dtype", default="auto", choices=("auto", "float32", "bfloat16"),
    help="compute type; auto: bfloat16 where it is the faster one, else float32",
  )  # fmt: skip
  add("--palette", default="default", choices=tuple(PALETTES), help="(%(default)s)")
  add(
    "--save",
    default=",".join(options.DEFAULT_FORMS),
    help=f"forms of the results, of {', '.join(options.FORMS)} (%(default)s; docs/masks.md)",
  )
  for name, (default, text) in options.FLAGS.items():
    add(f"--{name}", type=type(default), default=default, help=f"{text} (%(default)s)")
  film = parser.add_argument_group("films")
  film.add_argument("--every", type=int, help="take each N-th frame (1)")
  film.add_argument(
    "--smooth", type=float, help="weight of the past in a moving average, 0 (off) to below 1"
  )
  film.add_argument("--film", choices=("mp4", "webm"), help="kind of the overlay film (mp4)")
  raster = parser.add_argument_group("rasters: GeoTIFF and other large TIFF files")
  raster.add_argument(
    "--raster",
    action=argparse.BooleanOptionalAction,
    help="segment an image in strips, at its own resolution; else where it has a place on earth or "
    "is too large to be one image",
  )
  raster.add_argument("--bands", help="of red, green and blue, counted from 1, as 4,3,2")
  raster.add_argument("--range", help="values that become black and white, as 0,3000")
  raster.add_argument("--scale", type=float, help="segment it at this factor of its resolution (1)")
  add("--quiet", action="store_true", help="print nothing but errors")
  args = _parse_segment(parser, arguments)

  from rpn_jax.tasks.segment import segment  # loads JAX

  return segment(args)


def _parse_segment(parser: argparse.ArgumentParser, arguments: list[str]) -> argparse.Namespace:
  """The arguments of `rpn segment`; words may stand behind an option.

  Raises:
    InputError: several images, or class names in several arguments.
  """
  if "--" in arguments:  # which argparse loses where positions and options are mixed
    at = arguments.index("--")
    arguments = arguments[:at] + [f"\0{argument}" for argument in arguments[at + 1 :]]
  args, others = parser.parse_known_intermixed_args(arguments)
  if [other for other in others if other.startswith("-")]:
    parser.error(f"unrecognized arguments: {' '.join(others)}")
  args.image, args.words, *others = (
    argument and argument.removeprefix("\0") for argument in (args.image, args.words, *others)
  )
  _check_no_files([*(parse_names(args.words) if args.words else ()), *others])
  if others:
    remedy = f"quote the names, as in {shlex.quote(' '.join([args.words, *others]))}"
    if flags := [other for other in others if other.startswith("-")]:
      others, remedy = flags, "options stand before --"
    raise InputError(
      f"expected an image or a folder, and class names, got more: {others[0]}; {remedy}"
    )
  return args


def _check_no_files(names: Sequence[str]) -> None:
  """Raises an InputError if a class name is a file, as of several images in place of a folder."""
  for word in (word for name in names for word in split_synonyms(name)):
    suffix = os.path.splitext(word)[1].lower()
    is_file = (suffix or os.sep in word) and os.path.isfile(word)
    if is_file or suffix in picture_files.SUFFIXES + picture_files.FILM_SUFFIXES:
      raise InputError(
        f"expected one image or a folder, and class names, got the file {word} as a name; for "
        "several images name a folder of them, for a file of names use --words=FILE"
      )


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog="rpn",
    description="Open-vocabulary semantic segmentation by relationship prompts.",
    epilog="rpn COMMAND --help tells more. Training: python main.py --help, in a clone.",
  )
  parser.add_argument("--version", action="version", version=f"rpn-jax {__version__}")
  commands = parser.add_subparsers(metavar="COMMAND")
  for name, (_, text) in COMMANDS.items():
    needs = "; in a clone" if name in IN_CLONE else ""
    commands.add_parser(name, add_help=False, help=f"{text}{needs}")
  return parser
