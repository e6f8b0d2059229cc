"""What the three PASCAL sets share: lists of image names and label maps in MATLAB files."""

import pathlib
import re
import zlib

import numpy as np
import scipy.io  # comes with JAX

from data_pipelines.builder import need
from data_pipelines.errors import DataError
from data_pipelines.limits import MAX_MATRIX_BYTES, MAX_TEXT_BYTES


def read_names(path: pathlib.Path, what: str, obtain: str) -> list[str]:
  """The image names of a list file, one per line, sorted and without repetition.

  Raises:
    DataError: no such file, or no text with names.
  """
  need(path, what, obtain)
  try:
    if path.stat().st_size > MAX_TEXT_BYTES:
      raise OSError("too long")
    names = {line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()} - {""}
  except (OSError, UnicodeDecodeError) as error:
    raise DataError(
      f"{path}: expected {what}, one name a line, got {type(error).__name__}; fetch it again: "
      f"{obtain}"
    ) from error
  if not names:
    raise DataError(f"{path}: expected {what}, got an empty file; fetch it again: {obtain}")
  if paths := [name for name in names if re.search(r"[/\\\0]", name)]:
    raise DataError(f"{path}: expected names of images, got the path {paths[0][:60]!r}; refused")
  return sorted(names)


def _check_unfolded(file) -> None:
  """Refuses a MATLAB 5 file whose compressed variables unfold to more than a label map has.

  Such a variable is a tag (kind 15, length in bytes) and a zlib stream behind a header of 128.
  """
  file.seek(128)
  total = 0
  while len(tag := file.read(8)) == 8:
    kind, length = np.frombuffer(tag, "<u4").tolist()
    if kind != 15:
      file.seek(length, 1)
      continue
    stream, left = zlib.decompressobj(), length
    while left > 0 and (data := file.read(min(left, 1 << 16))):
      left -= len(data)
      while data:
        total += len(stream.decompress(data, 1 << 20))
        data = stream.unconsumed_tail
        if total > MAX_MATRIX_BYTES:
          raise ValueError(f"more than {MAX_MATRIX_BYTES:,} bytes when unfolded")
  file.seek(0)


def read_matrix(path: pathlib.Path, field: str, obtain: str) -> np.ndarray:
  """The label map of a MATLAB file, uint8 or uint16 [H,W]; `field` is "variable" or "struct.field".

  Raises:
    DataError: a damaged file, or one without such a label map.
    FileNotFoundError: no such file.
  """
  variable, *rest = field.split(".")
  with path.open("rb") as file:
    try:
      _check_unfolded(file)
      label = scipy.io.loadmat(file, variable_names=[variable])[variable]
      for key in rest:
        label = label[key][0, 0]
    except Exception as error:  # damage surfaces as any of a dozen kinds, zlib's own among them
      raise DataError(
        f"{path}: expected a MATLAB file with {field}, got {type(error).__name__} "
        f"({' '.join(str(error).split())}); fetch it again: {obtain}"
      ) from error
  if label.ndim != 2 or label.dtype not in (np.uint8, np.uint16):
    raise DataError(
      f"{path}: expected {field} as a uint8 or uint16 matrix, got {label.dtype} {label.shape}; "
      f"fetch it again: {obtain}"
    )
  return label
