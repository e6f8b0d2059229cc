"""Raw files that the builders share: folders, lists of names, label images of class ids."""

import contextlib
import pathlib
from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image, ImageOps

from rpn_jax.base.errors import InputError
from rpn_jax.base.pixels import check_size

MAX_TEXT_BYTES = 16 << 20


def require(path: pathlib.Path, what: str, obtain: str) -> pathlib.Path:
  """The path, if it exists.

  Raises:
    InputError: it does not; names it, what it is for and where to get it.
  """
  if not path.exists():
    raise InputError(f"{path}: expected {what}, got no such file or folder; {obtain}")
  return path


def list_files(
  folder: pathlib.Path, suffixes: Sequence[str], what: str, obtain: str
) -> list[pathlib.Path]:
  """The folder's files with one of the (lower-case) suffixes, sorted by name.

  Raises:
    InputError: no such folder, or none of these files in it.
  """
  require(folder, what, obtain)
  files = sorted(p for p in folder.iterdir() if p.suffix.lower() in suffixes)
  if not files:
    raise InputError(f"{folder}: expected {what}, got no {' or '.join(suffixes)} file; {obtain}")
  return files


def read_lines(path: pathlib.Path, what: str) -> list[str]:
  """The lines of a text file without surrounding blanks; a mark of the byte order is dropped.

  Raises:
    InputError: no text in UTF-8, or far too much of it.
  """
  try:
    if path.stat().st_size > MAX_TEXT_BYTES:
      raise InputError(f"{path}: expected {what}, got more than {MAX_TEXT_BYTES >> 20} MiB of text")
    return [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
  except (OSError, UnicodeDecodeError) as error:
    got = error.strerror if isinstance(error, OSError) else "another encoding"
    raise InputError(
      f"{path}: expected {what} as text in UTF-8, got {got}; save it again"
    ) from error


@contextlib.contextmanager
def open_label(path: pathlib.Path) -> Iterator[Image.Image]:
  """A label image, turned upright as its own EXIF data says; hardly any label has such data.

  Raises:
    InputError: more pixels than allowed.
  """
  with Image.open(path) as file:
    check_size(path, file.size)
    ImageOps.exif_transpose(file, in_place=True)
    yield file


def read_index_image(path: pathlib.Path) -> np.ndarray:
  """An image whose pixels are ids, uint8 or uint16 [H,W]; of a palette image its indices.

  Raises:
    InputError: a color image, or ids beyond 16 bits.
  """
  with open_label(path) as file:
    if file.mode not in ("L", "P", "1", "I;16", "I;16B", "I"):
      raise InputError(
        f"{path}: expected a label image of one channel (gray or palette), got mode "
        f"{file.mode}; store class ids, not colors"
      )
    label_HxW = np.array(file)
  if label_HxW.dtype == np.int32:
    low, high = label_HxW.min(initial=0), label_HxW.max(initial=0)
    if low < 0 or high > 65535:
      raise InputError(f"{path}: expected ids 0…65535, got {low}…{high}")
  return label_HxW.astype(np.uint8 if label_HxW.dtype in (np.uint8, bool) else np.uint16)
