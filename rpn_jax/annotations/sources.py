"""Which image the files of a data set are of, so that those of another one are never replaced."""

import json
import pathlib
import shutil

from PIL import Image

from rpn_jax.annotations.images import PLAIN_SUFFIXES, Labeled
from rpn_jax.base.errors import InputError
from rpn_jax.base.origins import Origin, check_same, exists, is_same
from rpn_jax.base.paths import replacing, write_json
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

  def check(self, origin: Origin, stem: str) -> None:
    """Checks that no file of another image would be replaced.

    Args:
      origin: of the image.
      stem: of the names of its files.

    Raises:
      Occupied: there are files of that stem which were not made of this image.
    """
    known = self._read(stem)
    mine = known.get("source") == origin.name(self._folder)
    there = [self._image(stem, suffix) for suffix in PLAIN_SUFFIXES]
    there = [path for path in there if not (mine and path.name in known["copies"])]
    if not mine:
      there.append(self._folder / self._label.format(stem))
    for path in there:
      if exists(path) and not is_same(path, origin.file):
        check_same(path, None if mine else known.get("source"), origin, self._folder)

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
    own = is_same(path, labeled.file)
    if own and plain is None:
      raise InputError(
        f"{path}: expected an image that other programs see as it was segmented (docs/masks.md), "
        "since it is in the data set itself and would be replaced; write to another folder"
      )
    old = self._read(stem).get("copies", [])
    copies = [] if own else [path.name]
    # Before the copy: whoever comes after a process that was killed knows whose it is.
    written = self._write(labeled.origin, stem, sorted({*old, *copies}))
    if plain is None:
      save_png(path, Image.fromarray(labeled.image))
    elif not own:
      path.parent.mkdir(parents=True, exist_ok=True)
      with replacing(path) as temporary:
        shutil.copyfile(plain, temporary)
    if stale := [name for name in old if name != path.name]:
      for name in stale:
        if not is_same(path.with_name(name), labeled.file):
          path.with_name(name).unlink(missing_ok=True)
      self._write(labeled.origin, stem, copies)
    return [path, written]

  def _image(self, stem: str, suffix: str) -> pathlib.Path:
    return self._folder / self._images / f"{stem}{suffix}"

  def _record(self, stem: str) -> pathlib.Path:
    return self._folder / "sources" / f"{stem}.json"

  def _read(self, stem: str) -> dict:
    """What is known of a stem; nothing if a file of that name says something else."""
    try:
      known = json.loads(self._record(stem).read_text(encoding="utf-8"))
    except (OSError, ValueError):
      return {}
    return known if isinstance(known, dict) and {"source", "copies"} <= {*known} else {}

  def _write(self, origin: Origin, stem: str, copies: list[str]) -> pathlib.Path:
    path = self._record(stem)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"source": origin.name(self._folder), "copies": copies})
    return path
