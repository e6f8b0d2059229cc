"""Segmentation of images with a run, or with CLIP weights alone: the command `rpn segment`."""

import argparse

from rpn_jax import devices
from rpn_jax.base import console, pixels
from rpn_jax.base.paths import expand
from rpn_jax.base.words import parse_names
from rpn_jax.drawing.palette import PALETTES
from rpn_jax.inference.segmenter import Segmenter
from rpn_jax.tasks.predict import save_all


def main(arguments: list[str]) -> int:
  parser = argparse.ArgumentParser(
    prog="rpn segment",
    description="Segments images into the classes you name; writes an overlay with a legend, an "
    "index PNG and a JSON file per image.",
  )
  add = parser.add_argument
  add("image", help="a jpg, png or webp file, or a folder of them")
  add("words", help='class names, e.g. "cat | kitten, grass": | joins synonyms')
  add(
    "--model", default="shapes_clip",
    help="workdir of a training run, file of CLIP weights, or shapes_clip (%(default)s), the tiny "
    "CLIP of the shapes data set",
  )  # fmt: skip
  add("--method", help="rpn, vanilla, maskclip, sclip, clearclip; else what the model has")
  add("--checkpoint", default="last", choices=("last", "best"), help="of a run")
  add("--out", default="predictions", help="folder to write to (%(default)s)")
  add(
    "--other",
    type=float,
    default=0.0,
    help="pixels with a best score below it, 0 to 1, get no class",
  )
  add("--background", default="", help="words whose pixels get no class")
  add("--templates", help="sentences around a name, e.g. single or imagenet80")
  add("--synonyms", help="how synonyms are joined: first, mean, max or joined")
  add("--palette", default="default", choices=tuple(PALETTES), help="(%(default)s)")
  add("--quiet", action="store_true", help="print nothing but errors")
  args = parser.parse_args(arguments)
  console.set_verbosity(args.quiet)

  def run():
    with devices.runtime():
      names, files = parse_names(args.words), pixels.find(args.image)
      segmenter = Segmenter.load(
        args.model, method=args.method, templates=args.templates, synonyms=args.synonyms,
        checkpoint=args.checkpoint,
      )  # fmt: skip
      save_all(
        segmenter, files, names, expand(args.out), other=args.other, background=args.background,
        palette=args.palette,
      )  # fmt: skip

  return console.run_command(run, interrupted="interrupted; the images done so far are kept")
