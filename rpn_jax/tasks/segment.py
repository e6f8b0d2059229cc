"""Segmentation with a run, or with CLIP weights alone: the command `rpn segment`.

Images and folders of them, films and rasters have each a module: `predict`, `video` and `raster`.
"""

import argparse
import pathlib
from collections.abc import Sequence

from rpn_jax import devices
from rpn_jax.annotations.options import DEFAULT_FORMS, check, parse_forms
from rpn_jax.annotations.options import FLAGS as ANNOTATION_FLAGS
from rpn_jax.base import buckets, colors, console, picture_files
from rpn_jax.base.errors import InputError
from rpn_jax.base.origins import Origin, check_free
from rpn_jax.base.paths import expand
from rpn_jax.base.words import parse_names, read_names
from rpn_jax.inference.segmenter import Segmenter
from rpn_jax.tasks import raster, video
from rpn_jax.tasks.predict import save_all

MATTE = "white"
# How the names of the files end that are written of a raster.
RASTER_ENDS = (".json", "_labels.tif", "_overlay.png")
# Flags of one kind of input, which are not passed over without a word with another.
FLAGS = {
  "images": ("page", "matte"),
  "a film": ("every", "smooth", "film"),
  "a raster": ("bands", "range", "scale"),
}


def segment(args: argparse.Namespace) -> int:
  """Segments the input of the parsed arguments (see `rpn_jax.cli`); returns the exit status."""
  console.set_verbosity(args.quiet)
  annotations = {name: getattr(args, name) for name in ANNOTATION_FLAGS}

  def run():
    check(args.save, annotations)
    with devices.runtime():
      if (args.words is None) == (args.list is None):
        got = "neither" if args.words is None else "both"
        raise InputError(
          f'expected class names, as in "cat | kitten, grass", or --words=FILE_OR_LIST, got {got}'
        )
      names = parse_names(args.words) if args.list is None else read_names(args.list)
      matte = MATTE if args.matte is None else args.matte
      colors.parse_matte(matte)  # before the model is loaded
      path, out = expand(args.image), expand(args.out)
      if out.is_file():
        raise InputError(f"--out={args.out}: expected a folder to write to, got a file")
      kind = _kind(args, path)
      found = picture_files.find(args.image, recursive=args.recursive, results=out)
      if kind == "a raster":
        if not buckets.is_bucket(out):  # which is refused for another reason
          check_free(Origin(path), out, path.stem, RASTER_ENDS)
        source = raster.Raster(path, bands=args.bands, limits=args.range, scale=args.scale)
      elif path.is_dir() and args.raster is None:
        _tell_of_rasters(found.files)
      segmenter = Segmenter.load(
        args.model, method=args.method, templates=args.templates, synonyms=args.synonyms,
        checkpoint=args.checkpoint, clip=args.clip, dtype=args.dtype,
      )  # fmt: skip
      options = {"other": args.other, "background": args.background, "refine": args.refine}
      if kind == "a film":
        loaded = {key: getattr(args, key) for key in ("templates", "synonyms", "checkpoint")}
        video.segment_film(
          segmenter, path, names, args.out, every=1 if args.every is None else args.every,
          smooth=args.smooth or 0.0, kind=args.film or "mp4", palette=args.palette, told=loaded,
          **options,
        )  # fmt: skip
      elif kind == "a raster":
        raster.segment_raster(segmenter, source, names, args.out, palette=args.palette, **options)
      else:
        save_all(
          segmenter, found, names, out, palette=args.palette, page=args.page, matte=matte,
          save=args.save, annotations=annotations, **options,
        )  # fmt: skip

  return console.run_command(run, interrupted="interrupted; the images done so far are kept")


def _tell_of_rasters(files: Sequence[pathlib.Path]) -> None:
  """Says what is lost where files that would be rasters by themselves are images of a folder."""
  if found := [file for file in files if not buckets.is_bucket(file) and raster.is_raster(file)]:
    print(
      f"{len(found)} of {len(files)} images are rasters, such as {found[0]}: they are taken for "
      "ordinary images, without their place on earth; name one by itself for a map of it "
      "(--no-raster drops this line)",
      flush=True,
    )


def _kind(args: argparse.Namespace, path: pathlib.Path) -> str:
  """What the input is.

  Raises:
    InputError: a flag is given that is for another kind.
  """
  kind = "images"
  if args.raster and path.is_dir():
    raise InputError(f"--raster is for one file, got the folder {args.image}: name a file in it")
  if path.suffix.lower() in picture_files.FILM_SUFFIXES and not path.is_dir():
    kind = "a film"
  elif path.is_file() and raster.is_raster(path, args.raster):
    kind = "a raster"
  for owner, flags in FLAGS.items():
    given = [flag for flag in flags if getattr(args, flag) is not None]
    if given and owner != kind:
      remedy = ", or add --raster" if owner == "a raster" else ""
      raise InputError(
        f"--{given[0]} is for {owner}, {args.image} is taken for {kind}: leave it out{remedy}"
      )
  if kind != "images" and parse_forms(args.save) != DEFAULT_FORMS:
    raise InputError(
      f"--save={args.save} is for images, {args.image} is taken for {kind}, whose files are always "
      "the same: leave it out"
    )
  return kind
