"""Segmentation of a user's images with a trained run: main.py --mode=predict."""

import collections
import pathlib
import re
from collections.abc import Iterator, Sequence

import numpy as np

from rpn_jax.base import overlap, pixels
from rpn_jax.base.console import progress
from rpn_jax.base.errors import InputError
from rpn_jax.base.paths import expand, write_text
from rpn_jax.base.words import parse_names
from rpn_jax.devices import devices_text
from rpn_jax.inference.predictor import open_run
from rpn_jax.inference.segmentation import Segmentation
from rpn_jax.inference.segmenter import Segmenter

# More files than these are counted, not listed: those of four images.
LISTED_FILES = 12
# In the folder of the results: a line for every image that could not be read.
SKIPPED = "skipped.txt"


def predict(config, workdir, image: str | None, classes: str | None) -> list[pathlib.Path]:
  """Writes overlay, labels and JSON of every image to `workdir/predictions`.

  Args:
    config: config of the run.
    workdir: directory of the run; its newest checkpoint is used.
    image: a file or a folder.
    classes: names separated by commas, seen in training or not; None: those of the run.

  Returns:
    The files written.
  """
  if not image:
    raise InputError("--mode=predict needs --image=FILE_OR_FOLDER")
  given, files = None if classes is None else parse_names(classes), pixels.find(image)
  predictor, run = open_run(config, workdir)
  if not (names := given or run.stored_classes().get("names")):
    raise InputError(
      f'--mode=predict needs --classes="a, b": {run.workdir} does not say which it was trained on'
    )
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

  Threads read the next images and write the last results while the network runs; see `overlap`.

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
  written: list[pathlib.Path] = []
  unreadable: list[InputError] = []
  pending: collections.deque[pathlib.Path] = collections.deque()
  largest = 0  # bytes of an image so far

  def expected_bytes(file: pathlib.Path) -> int:
    return largest

  def read(file: pathlib.Path) -> np.ndarray | InputError:
    try:
      return pixels.read(file)
    except InputError as error:
      return error

  def images() -> Iterator[np.ndarray]:
    nonlocal largest
    for file, image in zip(files, overlap.mapped(read, files, expected_bytes)):
      if isinstance(image, InputError):
        unreadable.append(image)
        bar.update()
        continue
      pending.append(file)
      largest = max(largest, image.nbytes)
      yield image

  def results() -> Iterator[tuple[Segmentation, str]]:
    for result in segmenter.stream(images(), names, **options):
      file = result.file = pending.popleft()
      # Here, not by the threads: the scores of some classes and pixels take gigabytes for each.
      _ = result.labels
      yield result, file.name.replace(".", "_") if repeated else file.stem

  def save(item: tuple[Segmentation, str]) -> list[pathlib.Path]:
    result, stem = item
    return result.save(directory, stem, palette=palette)

  with progress(len(files), f"segment on {devices_text()}", "image") as bar:
    for paths in overlap.mapped(save, results(), lambda item: item[0].nbytes):
      written += paths
      bar.update()
  if written:
    print(f"{segmenter.method}\n{summary(written, expand(directory))}")
  check_skipped(unreadable, len(files), directory)
  return written


def summary(written: Sequence[pathlib.Path], directory: pathlib.Path) -> str:
  """The files, or of many images how many of each kind are where."""
  if len(written) <= LISTED_FILES:
    return "\n".join(map(str, written))
  ends = (re.search(r"(_overlay|_labels)?\.\w+$", file.name) for file in written)
  kinds = collections.Counter(end[0] for end in ends if end)
  return f"{directory}: " + ", ".join(f"{count} x *{kind}" for kind, count in kinds.items())


def check_skipped(unreadable: Sequence[InputError], total: int, directory) -> None:
  """Tells which of many images were skipped; SKIPPED in the folder has the reason of each.

  Raises:
    InputError: there are some.
  """
  path = expand(directory) / SKIPPED
  if total == 1 or not unreadable:
    path.unlink(missing_ok=True)  # of an earlier call
    if unreadable:
      raise unreadable[0]
    return
  path.parent.mkdir(parents=True, exist_ok=True)
  write_text(path, "".join(f"{error}\n" for error in unreadable))
  raise InputError(
    f"{len(unreadable)} of {total} images were skipped, such as {unreadable[0]}; {path} lists all"
  )
