"""The console command `rpn`, in a clone also `python -m rpn_jax`. Training stays with main.py.

Nothing heavy is imported before the arguments are understood.
"""

import argparse
import importlib
import sys

from rpn_jax import __version__

# Command -> module with a `main(arguments)` that parses them, and what it does.
MODULES = {
  "convert": ("rpn_jax.tasks.convert", "CLIP's weights into the form that this package reads"),
  "convert_vit": ("rpn_jax.tasks.convert_vit", "a plain ViT or MAE beside CLIP's text tower"),
  "demo": ("rpn_jax.tasks.demo", "a page in the browser: a picture, words, the segmentation"),
  "report": ("rpn_jax.analysis.report", "many runs side by side: a table, curves"),
  "sweep": ("rpn_jax.analysis.sweep", "a table of ablations, run by run; needs the clone"),
  "costs": ("rpn_jax.analysis.costs", "parameters, operations, memory and speed of a config"),
  "attention": ("rpn_jax.analysis.costs", "relationship maps of a trained run, drawn"),
  "distance": ("rpn_jax.analysis.costs", "how far the heads of a trained run look, drawn"),
}


def segment(arguments: list[str]) -> int:
  parser = argparse.ArgumentParser(
    prog="rpn segment",
    description="Segments pictures into the classes you name; writes an overlay with a legend, "
    "an index PNG and a JSON file per picture.",
  )
  parser.add_argument("image", help="a jpg, png or webp file, or a folder of them")
  parser.add_argument("words", help='class names, e.g. "cat | kitten, grass": | joins synonyms')
  parser.add_argument(
    "--model",
    default="shapes_clip",
    help="workdir of a training run, file of CLIP weights, or shapes_clip (%(default)s), the tiny "
    "CLIP of the embedded world",
  )
  parser.add_argument(
    "--method", help="rpn, vanilla, maskclip, sclip, clearclip; else what the model has"
  )
  parser.add_argument("--checkpoint", default="last", choices=("last", "best"), help="of a run")
  parser.add_argument("--out", default="predictions", help="folder to write to (%(default)s)")
  parser.add_argument(
    "--other",
    type=float,
    default=0.0,
    help="pixels whose best score, 0 to 1, is lower get no class",
  )
  parser.add_argument("--background", default="", help="words whose pixels get no class")
  parser.add_argument("--templates", help="sentences around a name, e.g. single or imagenet80")
  parser.add_argument("--synonyms", help="how synonyms are joined: first, mean, max or joined")
  parser.add_argument("--palette", default="default", choices=("default", "colorblind"))
  parser.add_argument("--quiet", action="store_true", help="print nothing but errors")
  args = parser.parse_args(arguments)

  from rpn_jax import devices
  from rpn_jax.base import console, pixels
  from rpn_jax.base.errors import InputError
  from rpn_jax.base.words import parse_names
  from rpn_jax.inference.segmenter import Segmenter
  from rpn_jax.tasks.predict import save_all

  console.set_verbosity(args.quiet)
  try:
    with devices.runtime():
      names, files = parse_names(args.words), pixels.find(args.image)
      choices = {"method": args.method, "templates": args.templates, "synonyms": args.synonyms}
      choices["checkpoint"] = args.checkpoint
      segmenter = Segmenter.load(args.model, **choices)
      options = {"other": args.other, "background": args.background, "palette": args.palette}
      save_all(segmenter, files, names, args.out, **options)
  except KeyboardInterrupt:
    print("interrupted; the pictures done so far are kept", file=sys.stderr)
    return 130
  except (InputError, OSError) as error:  # OSError: a disk or a path, not the code
    print(f"error: {error}", file=sys.stderr)
    return 2
  return 0


def main(arguments: list[str] | None = None) -> int:
  arguments = sys.argv[1:] if arguments is None else arguments
  parser = argparse.ArgumentParser(
    prog="rpn",
    description="Open-vocabulary semantic segmentation by relationship prompts.",
    epilog="rpn COMMAND --help tells more. Training: python main.py --help, in a clone.",
  )
  parser.add_argument("--version", action="version", version=f"rpn-jax {__version__}")
  commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
  commands.add_parser("segment", add_help=False, help="pictures into the classes you name")
  for name, (_, text) in MODULES.items():
    commands.add_parser(name, add_help=False, help=text)
  command = parser.parse_known_args(arguments[:1])[0].command
  if command == "segment":
    return segment(arguments[1:])
  module = importlib.import_module(MODULES[command][0])
  keep = command in ("attention", "distance")  # which are told apart by their module
  return module.main(arguments[0 if keep else 1 :])
