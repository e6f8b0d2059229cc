"""Segmentation of images with a run, or with CLIP weights alone: the command `rpn segment`."""

import argparse

from rpn_jax import devices
from rpn_jax.base import colors, console, picture_files
from rpn_jax.base.errors import InputError
from rpn_jax.base.paths import expand
from rpn_jax.base.words import parse_names, read_names
from rpn_jax.inference.segmenter import Segmenter
from rpn_jax.tasks.predict import save_all


def segment(args: argparse.Namespace) -> int:
  """Segments the images of the parsed arguments (see `rpn_jax.cli`); returns the exit status."""
  console.set_verbosity(args.quiet)

  def run():
    with devices.runtime():
      if (args.words is None) == (args.list is None):
        got = "neither" if args.words is None else "both"
        raise InputError(
          f'expected class names, as in "cat | kitten, grass", or --words=FILE_OR_LIST, got {got}'
        )
      names = parse_names(args.words) if args.list is None else read_names(args.list)
      colors.parse_matte(args.matte)  # before the model is loaded
      out = expand(args.out)
      found = picture_files.find(args.image, recursive=args.recursive, results=out)
      segmenter = Segmenter.load(
        args.model, method=args.method, templates=args.templates, synonyms=args.synonyms,
        checkpoint=args.checkpoint, clip=args.clip,
      )  # fmt: skip
      save_all(
        segmenter, found, names, out, other=args.other, background=args.background,
        refine=args.refine, palette=args.palette, page=args.page, matte=args.matte,
      )  # fmt: skip

  return console.run_command(run, interrupted="interrupted; the images done so far are kept")
