"""Segmentation of a user's images with a trained run: main.py --mode=predict."""

import collections
import pathlib
from collections.abc import Sequence

from rpn_jax.base import pixels
from rpn_jax.base.console import progress
from rpn_jax.base.errors import InputError
from rpn_jax.base.words import parse_names
from rpn_jax.devices import devices_text
from rpn_jax.inference.predictor import open_run
from rpn_jax.inference.segmenter import Segmenter


def predict(config, workdir, image: str | None, classes: str | None) -> list[pathlib.Path]:
  """Writes overlay, labels and JSON of every image to `workdir/predictions`.

  Args:
    config: config of the run.
    workdir: directory of the run; its newest checkpoint is used.
    image: a file or a folder.
    classes: names separated by commas, seen in training or not.

  Returns:
    The files written.
  """
  if not (image and classes):
    raise InputError('--mode=predict needs --image=FILE_OR_FOLDER and --classes="a, b"')
  names, files = parse_names(classes), pixels.find(image)
  predictor, run = open_run(config, workdir)
  return save_all(Segmenter.from_run(predictor, run), files, names, run.workdir / "predictions")


def save_all(
  segmenter: Segmenter,
  files: Sequence[pathlib.Path],
  names,
  directory,
  *,
  palette: str = "default",
  **options,
) -> list[pathlib.Path]:
  """Segments image files and saves the results, with a progress display.

  Args:
    segmenter: the model.
    files: paths of the images.
    names: see `parse_names`.
    directory: where to write.
    palette: color palette.
    **options: other arguments of `Segmenter.__call__`.

  Returns:
    The files written.

  Raises:
    InputError: some images could not be read; raised after the others have been written.
  """
  # Files that differ only in their suffix must not overwrite each other's results.
  repeated = len({f.stem for f in files}) < len(files)
  written, unreadable = [], []
  pending: collections.deque[pathlib.Path] = collections.deque()

  def images():
    for file in progress(files, f"segment on {devices_text()}", "image"):
      try:
        image = pixels.read(file)
      except InputError as error:
        unreadable.append(error)
        continue
      pending.append(file)
      yield image

  for result in segmenter.stream(images(), names, **options):
    file = result.file = pending.popleft()
    stem = file.name.replace(".", "_") if repeated else file.stem
    written += result.save(directory, stem, palette=palette)
  if unreadable and not written:
    raise unreadable[0]
  print(f"{segmenter.method}\n" + "\n".join(map(str, written)))
  if unreadable:
    raise InputError(
      f"{len(unreadable)} of {len(files)} images were skipped, such as {unreadable[0]}"
    )
  return written
