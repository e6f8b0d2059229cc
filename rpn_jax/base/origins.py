"""Which input a result is of, so that nothing replaces the results of another one, or other files.

PNG files say it in a text chunk, JSON files in a field; other files are of what the JSON file of
their name is of.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import struct
import zlib
from collections.abc import Sequence

import numpy as np

from rpn_jax.base import buckets
from rpn_jax.base.errors import InputError
from rpn_jax.base.paths import exact, name_key, relative_path

# Field of JSON files, and keyword of PNG's text.
FIELD, PNG_KEYWORD = "source", "rpn_jax source"
# Ends of the names of pictures that are results.
PICTURE_ENDS = ("_overlay.png", "_labels.png", "_scores.png")
# What JSON files of earlier versions call their input.
_EARLIER = ("image", "film", "raster")


class Occupied(InputError):
  """A file that was not made of the same input would be replaced."""


@dataclasses.dataclass(frozen=True)
class Origin:
  """The input of a result.

  Attributes:
    file: its path, a name alone, or "".
    page: of a file with several pages, from 1; 0 of others.
    digest: of the pixels, where there is no file.
  """

  file: str | os.PathLike = ""
  page: int = 0
  digest: str = ""

  def name(self, folder: pathlib.Path) -> str:
    """What it is called in files of a folder: its place from there, or a name and the digest."""
    path = exact(self.file) if str(self.file) else None
    if path is None:
      place = ""
    elif buckets.is_bucket(path) or not path.is_file():
      place = str(path) if buckets.is_bucket(path) else path.name
    else:
      local = not buckets.is_bucket(folder)
      place = name_key(relative_path(path, folder)) if local else str(path.absolute())
    page = f"page {self.page}" if self.page else ""
    named = " ".join(filter(None, (place, page, self.digest)))
    return named.encode("utf-8", "backslashreplace").decode()  # of names that are no text


def origin_of(image: np.ndarray, file: str | os.PathLike = "", page: int = 0) -> Origin:
  """The origin of what is made of an image, of which there may be a file."""
  path = exact(file) if str(file) else None
  if path is not None and (buckets.is_bucket(path) or path.is_file()):
    return Origin(file, page)
  digest = hashlib.sha256(f"{image.shape} {image.dtype}".encode() + image.tobytes())
  return Origin(file, page, f"sha256 {digest.hexdigest()[:16]}")


def check_free(origin: Origin, folder: pathlib.Path, stem: str, ends: Sequence[str]) -> None:
  """Checks that files which are to be written would replace none but those of the same input.

  Args:
    origin: of the files.
    folder: of all results.
    stem: of their names.
    ends: of their names, such as "_overlay.png".

  Raises:
    Occupied: there is a file of another input, or of none that is known.
  """
  for end in ends:
    path = folder / f"{stem}{end}"
    if exists(path) and not is_same(path, origin.file):
      check_same(path, recorded(path, folder), origin, folder)


def check_same(path: pathlib.Path, of: str | None, origin: Origin, folder: pathlib.Path) -> None:
  """Raises Occupied unless a file, which `of` names the input of, is of this origin."""
  if of != origin.name(folder):
    told = "no earlier call has made of it" if of is None else f"is of {of}"
    raise Occupied(
      f"{origin.file or 'an image without a file'}: expected names that are free in {folder}, got "
      f"{path}, which {told}; rename one of them, or write to another folder"
    )


def recorded(path: pathlib.Path, folder: pathlib.Path) -> str | None:
  """What the input of a result is called in a folder; None if the file is no known result."""
  if path.suffix == ".json":
    return _of_json(path, folder)
  # An archive of scores has a picture beside it.
  if (said := _of_png(path.with_suffix(".png"))) is not None:
    return said
  stem = path.name.removesuffix(path.suffix)
  for end in PICTURE_ENDS:
    stem = stem.removesuffix(end.removesuffix(".png"))
  return _of_json(path.with_name(f"{stem}.json"), folder)


def _of_json(path: pathlib.Path, folder: pathlib.Path) -> str | None:
  try:
    content = json.loads(path.read_text(encoding="utf-8"))
  except (OSError, ValueError):
    return None
  if not isinstance(content, dict):
    return None
  if isinstance(content.get(FIELD), str):
    return content[FIELD]
  ours = {"method", "classes", "other"} <= content.keys()
  named = next((content[key] for key in _EARLIER if isinstance(content.get(key), str)), None)
  return Origin(named).name(folder) if ours and named else None


def _of_png(path: pathlib.Path) -> str | None:
  from PIL import Image

  try:
    with path.open("rb") as stream, Image.open(stream) as file:
      return file.info.get(PNG_KEYWORD)
  except (OSError, ValueError, SyntaxError):
    return None


def is_result(path: pathlib.Path) -> bool:
  """Whether a picture in a folder is a result of an earlier call, and not an image of one's own."""
  return path.name.endswith(PICTURE_ENDS) and recorded(path, path.parent) is not None


def is_results_folder(path: pathlib.Path) -> bool:
  """Whether a folder is a data set, or has the labels of a film's frames, by an earlier call."""
  data_set = path.name in ("yolo", "voc") and (path / "sources").is_dir()
  return data_set or (path.name.endswith("_labels") and (path / "options.json").is_file())


def png_with(png: bytes, source: str) -> bytes:
  """A PNG file with a text chunk that names its input, before the first chunk of pixels."""
  body = b"iTXt" + PNG_KEYWORD.encode() + b"\0\0\0\0\0" + source.encode()
  chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
  header = 8 + 25  # the signature and IHDR, which comes first
  return png[:header] + chunk + png[header:]


def exists(path: pathlib.Path) -> bool:
  """Unlike a path's method, os.path takes a name that is too long for one of no file."""
  return path.exists() if buckets.is_bucket(path) else os.path.exists(path)


def is_same(path: pathlib.Path, file: str | os.PathLike) -> bool:
  """Whether a path is the file of an image."""
  if not str(file) or buckets.is_bucket(path) or buckets.is_bucket(file):
    return str(path) == str(file)
  return os.path.exists(path) and os.path.exists(exact(file)) and path.samefile(exact(file))
