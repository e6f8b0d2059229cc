"""Which image the files of a data set are of, so that those of another one are never replaced."""

import json
import os
import pathlib
import shutil

from PIL import Image

from rpn_jax.annotations.images import PLAIN_SUFFIXES, Labeled, relative_path
from rpn_jax.base import buckets
from rpn_jax.base.errors import InputError
from rpn_jax.base.paths import exact, name_key, replacing, write_json
from rpn_jax.drawing.images import save_png


class Sources:
  """The images of a data set, with a file `sources/<stem>.json` on where each is from.

  It names the `source`, from the folder of the data set, and the `copies` of it that were written.

  Args:
    folder: of the data set.
    images: its subfolder of images.
    label: its path of a label file, with {} for the stem.
  """

  def __init__(self, folder: pathlib.Path, images: str, label: str):
    self._folder, self._images, self._label = folder, images, label

  def check(self, file: str | os.PathLike, stem: str) -> None:
    """Checks that no file of another image would be replaced.

    Args:
      file: path of the image, or "".
      stem: of the names of its files.

    Raises:
      InputError: there are files of that stem which were not made of this image.
    """
    known = self._read(stem)
    mine = known.get("source") == self._source(file)
    there = [self._image(stem, suffix) for suffix in PLAIN_SUFFIXES]
    there = [path for path in there if not (mine and path.name in known["copies"])]
    if not mine:
      there.append(self._folder / self._label.format(stem))
    for path in there:
      if _exists(path) and not _is_same(path, file):
        of = "no earlier call has made of it"
        if known and not mine:
          of = f"is of {known['source'] or 'an image without a file'}"
        raise InputError(
          f"{file or stem}: expected a name that is free in {self._folder}, got {path}, which "
          f"{of}; rename one of them, or write to another folder"
        )

  def add(self, labeled: Labeled, stem: str) -> list[pathlib.Path]:
    """Copies the image's file, or writes a PNG of what was segmented; `check` comes before.

    Of the same image, copies of other formats by earlier calls are removed: both would belong to
    one file of labels, which is that of the newer one.

    Returns:
      The copy, and the file on where it is from.

    Raises:
      InputError: the PNG would replace the image itself.
    """
    plain = labeled.plain_file(upright=True)
    path = self._image(stem, plain.suffix.lower() if plain else ".png")
    own = _is_same(path, labeled.file)
    if own and plain is None:
      raise InputError(
        f"{path}: expected an image that other programs see as it was segmented (docs/masks.md), "
        "since it is in the data set itself and would be replaced; write to another folder"
      )
    old = self._read(stem).get("copies", [])
    copies = [] if own else [path.name]
    # Before the copy: whoever comes after a process that was killed knows whose it is.
    written = self._write(labeled.file, stem, sorted({*old, *copies}))
    if plain is None:
      save_png(path, Image.fromarray(labeled.image))
    elif not own:
      path.parent.mkdir(parents=True, exist_ok=True)
      with replacing(path) as temporary:
        shutil.copyfile(plain, temporary)
    if stale := [name for name in old if name != path.name]:
      for name in stale:
        if not _is_same(path.with_name(name), labeled.file):
          path.with_name(name).unlink(missing_ok=True)
      self._write(labeled.file, stem, copies)
    return [path, written]

  def _image(self, stem: str, suffix: str) -> pathlib.Path:
    return self._folder / self._images / f"{stem}{suffix}"

  def _source(self, file: str | os.PathLike) -> str:
    """What a file is called here: its place, or its name where no file is."""
    if not str(file):
      return ""
    path = exact(file)
    if buckets.is_bucket(path) or not path.is_file():
      return str(path) if buckets.is_bucket(path) else path.name
    if buckets.is_bucket(self._folder):
      return str(path.absolute())
    return name_key(relative_path(path, self._folder))

  def _record(self, stem: str) -> pathlib.Path:
    return self._folder / "sources" / f"{stem}.json"

  def _read(self, stem: str) -> dict:
    """What is known of a stem; nothing if a file of that name says something else."""
    try:
      known = json.loads(self._record(stem).read_text(encoding="utf-8"))
    except (OSError, ValueError):
      return {}
    return known if isinstance(known, dict) and {"source", "copies"} <= {*known} else {}

  def _write(self, file: str | os.PathLike, stem: str, copies: list[str]) -> pathlib.Path:
    path = self._record(stem)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"source": self._source(file), "copies": copies})
    return path


def _exists(path: pathlib.Path) -> bool:
  # Unlike a path's method, os.path takes a name that is too long for one of no file.
  return path.exists() if buckets.is_bucket(path) else os.path.exists(path)


def _is_same(path: pathlib.Path, file: str | os.PathLike) -> bool:
  """Whether a path is the file of an image."""
  if not str(file) or buckets.is_bucket(path) or buckets.is_bucket(file):
    return str(path) == str(file)
  return os.path.exists(path) and os.path.exists(exact(file)) and path.samefile(exact(file))
