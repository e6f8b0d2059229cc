"""What the three PASCAL sets share: lists of image names, and label maps in MATLAB files."""

import pathlib
import re
import zlib

import numpy as np

from data_pipelines.sources import matlab
from data_pipelines.sources.files import read_lines, require
from rpn_jax.base.errors import InputError


def read_names(path: pathlib.Path, what: str, obtain: str) -> list[str]:
  """The image names of a list file, one per line, sorted and without repetition.

  Raises:
    InputError: no such file, or no text with names.
  """
  require(path, what, obtain)
  try:
    names = {*read_lines(path, f"{what}, one name per line")} - {""}
  except InputError as error:
    raise InputError(f"{error}; {obtain}") from error
  if not names:
    raise InputError(f"{path}: expected {what}, got an empty file; fetch it again: {obtain}")
  if paths := [name for name in names if re.search(r"[/\\\0]", name)]:
    raise InputError(f"{path}: expected names of images, got the path {paths[0][:60]!r}; refused")
  return sorted(names)


def read_matrix(path: pathlib.Path, field: str, obtain: str) -> np.ndarray:
  """The label map of a MATLAB file, uint8 or uint16 [H,W]; `field` is "variable" or "struct.field".

  Raises:
    InputError: a damaged file, or one without such a label map.
    FileNotFoundError: no such file.
  """
  content = path.read_bytes()
  try:
    label = matlab.read(content, field)
  except (ValueError, zlib.error, MemoryError) as error:
    raise InputError(
      f"{path}: expected a MATLAB file with {field}, got {type(error).__name__} "
      f"({' '.join(str(error).split())}); fetch it again: {obtain}"
    ) from error
  if label is None:
    raise InputError(
      f"{path}: expected {field} as a matrix of numbers, got something else; fetch it again: "
      f"{obtain}"
    )
  if label.ndim != 2 or label.dtype not in (np.uint8, np.uint16):
    raise InputError(
      f"{path}: expected {field} as a uint8 or uint16 matrix, got {label.dtype} {label.shape}; "
      f"fetch it again: {obtain}"
    )
  return label
