"""Segmentation of images with a run, or with CLIP weights alone: the command `rpn segment`."""

import argparse

from rpn_jax import devices
from rpn_jax.annotations.options import FLAGS
from rpn_jax.base import console, pixels
from rpn_jax.base.paths import expand
from rpn_jax.base.words import parse_names
from rpn_jax.inference.segmenter import Segmenter
from rpn_jax.tasks.predict import save_all


def segment(args: argparse.Namespace) -> int:
  """Segments the images of the parsed arguments (see `rpn_jax.cli`); returns the exit status."""
  console.set_verbosity(args.quiet)

  def run():
    with devices.runtime():
      names, files = parse_names(args.words), pixels.find(args.image)
      segmenter = Segmenter.load(
        args.model, method=args.method, templates=args.templates, synonyms=args.synonyms,
        checkpoint=args.checkpoint, clip=args.clip,
      )  # fmt: skip
      save_all(
        segmenter, files, names, expand(args.out), other=args.other, background=args.background,
        refine=args.refine, palette=args.palette, save=args.save,
        annotations={name: getattr(args, name) for name in FLAGS},
      )  # fmt: skip

  return console.run_command(run, interrupted="interrupted; the images done so far are kept")
