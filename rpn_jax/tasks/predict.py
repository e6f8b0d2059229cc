"""Segmentation of a user's images with a trained run: main.py --mode=predict."""

import collections
import pathlib
import re
from collections.abc import Mapping, Sequence

from rpn_jax.annotations.collection import Collection
from rpn_jax.annotations.options import DEFAULT_FORMS, parse_forms
from rpn_jax.base import pixels
from rpn_jax.base.console import progress
from rpn_jax.base.errors import InputError
from rpn_jax.base.paths import expand, write_text
from rpn_jax.base.words import parse_names
from rpn_jax.devices import devices_text
from rpn_jax.inference.predictor import open_run
from rpn_jax.inference.segmenter import Segmenter

# More files than these are counted, not listed: those of four images.
LISTED_FILES = 12
# In the folder of the results: a line for every image that could not be read.
SKIPPED = "skipped.txt"


def predict(
  config,
  workdir,
  image: str | None,
  classes: str | None,
  save: str | Sequence[str] = DEFAULT_FORMS,
  annotations: Mapping | None = None,
) -> list[pathlib.Path]:
  """Segments images and writes the results to `workdir/predictions`.

  Args:
    config: config of the run.
    workdir: directory of the run; its newest checkpoint is used.
    image: a file or a folder.
    classes: names separated by commas, seen in training or not; None: those of the run.
    save, annotations: see `save_all`.

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
  return save_all(
    Segmenter.from_run(predictor, run), files, names, run.workdir / "predictions", save=save,
    annotations=annotations,
  )  # fmt: skip


def save_all(
  segmenter: Segmenter,
  files: Sequence[pathlib.Path],
  names,
  directory,
  *,
  save: str | Sequence[str] = DEFAULT_FORMS,
  annotations: Mapping | None = None,
  palette: str = "default",
  **options,
) -> list[pathlib.Path]:
  """Segments image files and saves the results, with a progress display.

  Args:
    segmenter: the model.
    files: paths of the images.
    names: see `parse_names`.
    directory: where to write.
    save: forms, see `Segmentation.save`.
    annotations: arguments of `annotations.options.Options`.
    palette: color palette.
    **options: other arguments of `Segmenter.__call__`.

  Returns:
    The files written.

  Raises:
    InputError: some images could not be read; raised after the others have been written.
  """
  forms, names = parse_forms(save), parse_names(names)
  collection = Collection(directory, names, forms, **(annotations or {}))
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

  try:
    for result in segmenter.stream(images(), names, **options):
      file = result.file = pending.popleft()
      stem = file.name.replace(".", "_") if repeated else file.stem
      written += result.save(directory, stem, save=forms, palette=palette, collection=collection)
  finally:  # after Ctrl-C, too: of the images done so far
    written += collection.finish()
  if written:
    print(f"{segmenter.method}\n{summary(written, expand(directory))}")
  check_skipped(unreadable, len(files), directory)
  return written


def summary(written: Sequence[pathlib.Path], directory: pathlib.Path) -> str:
  """The files, or of many images how many of each kind are where."""
  if len(written) <= LISTED_FILES:
    return "\n".join(map(str, written))
  kinds: collections.Counter[str] = collections.Counter()
  for file in written:
    folder = file.parent.relative_to(directory).as_posix()
    end = re.search(r"(_overlay|_labels|_scores)?\.\w+$", file.name)
    if end:
      kinds[("" if folder == "." else f"{folder}/") + f"*{end[0]}"] += 1
  return f"{directory}: " + ", ".join(f"{count} x {kind}" for kind, count in kinds.items())


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
