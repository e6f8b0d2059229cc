"""Segmentation of a user's images with a trained run: main.py --mode=predict."""

import collections
import errno
import itertools
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence

from rpn_jax.annotations.collection import Collection
from rpn_jax.annotations.options import ANNOTATIONS, DEFAULT_FORMS, check, parse_forms
from rpn_jax.base import overlap, picture_files, pictures
from rpn_jax.base.colors import Color
from rpn_jax.base.console import progress
from rpn_jax.base.errors import InputError
from rpn_jax.base.origins import Origin, check_free
from rpn_jax.base.paths import check_utf8, expand, write_text
from rpn_jax.base.words import parse_names
from rpn_jax.devices import devices_text
from rpn_jax.inference.predictor import open_run
from rpn_jax.inference.segmentation import Segmentation, ends_of
from rpn_jax.inference.segmenter import Segmenter

# More files than these are counted, not listed: those of four images.
LISTED_FILES = 12
# In the folder of the results: a line for every image that could not be read, after one that says
# which images were asked for.
SKIPPED = "skipped"
SKIPPED_HEAD = "# left out by rpn, of "


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
  check(save, annotations or {})
  given = None if classes is None else parse_names(classes)
  directory = expand(workdir) / "predictions"
  found = picture_files.find(image, results=directory)
  predictor, run = open_run(config, workdir)
  if not (names := given or run.stored_classes().get("names")):
    raise InputError(
      f'--mode=predict needs --classes="a, b": {run.workdir} does not say which it was trained on'
    )
  return save_all(
    Segmenter.from_run(predictor, run), found, names, directory, save=save, annotations=annotations,
  )  # fmt: skip


def save_all(
  segmenter: Segmenter,
  found: picture_files.Found,
  names,
  directory,
  *,
  save: str | Sequence[str] = DEFAULT_FORMS,
  annotations: Mapping | None = None,
  palette: str = "default",
  page: int | None = None,
  matte: str | Color = "white",
  **options,
) -> list[pathlib.Path]:
  """Segments image files and saves the results, with a progress display.

  Threads read the next images and write the last results while the network runs; see `overlap`.

  Args:
    segmenter: the model.
    found: the images; results of those in subfolders are in subfolders.
    names: see `parse_names`.
    directory: where to write.
    save: forms, see `Segmentation.save`.
    annotations: arguments of `annotations.options.Options`.
    palette: color palette.
    page: of files with several pages or frames, see `pictures.load`.
    matte: the color that transparent pixels lie on.
    **options: other arguments of `Segmenter.__call__`.

  Returns:
    The files written.

  Raises:
    InputError: some images could not be read, or their results would replace files of others;
      raised after the others have been written. A subfolder has the name of a form, whose folder
      its results would be mixed with.
  """
  forms, names, directory = parse_forms(save), parse_names(names), expand(directory)
  stems = found.stems()
  subfolders = {stem.parts[0] for stem in stems if len(stem.parts) > 1}
  if mixed := sorted(subfolders & {*ANNOTATIONS} & {*forms}):
    raise InputError(
      f"{found.root / mixed[0]}: expected a subfolder of another name, since --save={mixed[0]} "
      f"writes to {directory / mixed[0]}: rename it, or name it itself as the folder of images"
    )
  collection = Collection(directory, names, forms, **(annotations or {}))
  written: list[pathlib.Path] = []
  skipped: list[InputError] = []
  pending: collections.deque[tuple[pathlib.Path, pathlib.Path]] = collections.deque()
  told = pictures.Told()
  largest = 0  # bytes of an image so far

  def expected_bytes(pair: tuple[pathlib.Path, pathlib.Path]) -> int:
    return largest

  def read(pair: tuple[pathlib.Path, pathlib.Path]) -> pictures.Picture | InputError:
    file, stem = pair
    try:
      check_utf8(file)
      picture = pictures.load(file, page=page, matte=matte)
      origin = Origin(file, picture.page)
      collection.check(origin, stem.as_posix())
      check_free(origin, directory, stem.as_posix(), ends_of(forms))
      return picture
    except InputError as error:
      return error

  def images() -> Iterator[pictures.Picture]:
    nonlocal largest
    pairs = list(zip(found.files, stems))
    for pair, picture in zip(pairs, overlap.mapped(read, pairs, expected_bytes)):
      if isinstance(picture, InputError):
        skipped.append(picture)
        bar.update()
        continue
      told(pair[0], picture.notes)
      pending.append(pair)
      largest = max(largest, picture.image.nbytes)
      yield picture

  def results() -> Iterator[tuple[Segmentation, pathlib.Path]]:
    for result in segmenter.stream(images(), names, **options):
      result.file, stem = pending.popleft()
      # Here, not by the threads: the scores of some classes and pixels take gigabytes for each.
      _ = result.labels
      yield result, stem

  def save_one(item: tuple[Segmentation, pathlib.Path]) -> list[pathlib.Path] | InputError:
    result, stem = item
    try:
      return result.save(
        directory, stem.as_posix(), save=forms, palette=palette, collection=collection
      )
    except InputError as error:
      return error
    except OSError as error:
      if error.errno != errno.ENAMETOOLONG:
        raise InputError(
          f"{directory}: expected room and leave to write the results of {result.file}, got "
          f"{error.strerror or error}; {len(written)} files are there: free some disk space, or "
          "name another --out"
        ) from None
      return InputError(
        f"{result.file}: expected a name that leaves room for the ends of its results' names, got "
        f"{len(stem.name)} characters; rename it"
      )

  try:
    with progress(len(found.files), f"segment on {devices_text()}", "image") as bar:
      for paths in overlap.mapped(save_one, results(), lambda item: item[0].nbytes):
        if isinstance(paths, InputError):
          skipped.append(paths)
        else:
          written += paths
        bar.update()
  finally:  # after Ctrl-C, too: of the images done so far
    written += collection.finish()
  if told.others:
    print(f"{told.others} more images like these: each JSON file says how its image was read")
  if written:
    print(f"{segmenter.method}\n{summary(written, directory)}")
  check_skipped(skipped, len(found.files), directory, found.named, found.left_out)
  return written


def _readable(path: pathlib.Path) -> str:
  """A path as text; what is not UTF-8 in its name becomes a code."""
  return str(path).encode("utf-8", "backslashreplace").decode("utf-8")


def _first_line(path: pathlib.Path) -> str:
  return path.read_bytes().partition(b"\n")[0].decode("utf-8", "replace") if path.is_file() else ""


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


def check_skipped(
  unreadable: Sequence[InputError],
  total: int,
  directory,
  named: pathlib.Path,
  left_out: Sequence[tuple[pathlib.Path, str]] = (),
) -> None:
  """Tells which of many images were skipped; `skipped.txt` in the folder has the reason of each.

  A list of the same images by an earlier call is replaced, or removed where none is left out;
  beside other files of that name it is called `skipped_2.txt`, and so on.

  Args:
    unreadable: why files could not be read.
    total: number of files that were tried.
    directory: of the results.
    named: the folder of images, or the file, that was asked for.
    left_out: files that look like images and were not tried, with the reason.

  Raises:
    InputError: some could not be read.
  """
  directory, head = expand(directory), SKIPPED_HEAD + _readable(named.absolute())
  earlier = [path for path in directory.glob(f"{SKIPPED}*.txt") if _first_line(path) == head]
  if not left_out and (total == 1 or not unreadable):
    for path in earlier:
      path.unlink()
    if unreadable:
      raise unreadable[0]
    return
  names = itertools.chain([SKIPPED], (f"{SKIPPED}_{i}" for i in itertools.count(2)))
  free = (path for name in names if not (path := directory / f"{name}.txt").exists())
  path = next(iter(earlier), None) or next(free)
  path.parent.mkdir(parents=True, exist_ok=True)
  lines = [
    head,
    *map(str, unreadable),
    *(f"{_readable(file)}: left out, {why}" for file, why in left_out),
  ]
  write_text(path, "".join(f"{line}\n" for line in lines))
  if left_out:
    print(f"left out of the images: {picture_files.summary(left_out)}; {path} lists them")
  if unreadable:
    raise InputError(
      f"{len(unreadable)} of {total} images were skipped, such as {unreadable[0]}; {path} lists all"
    )
