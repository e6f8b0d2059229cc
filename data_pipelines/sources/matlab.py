"""Label maps from MATLAB files of version 5 to 7, the format of SBD and PASCAL Context.

scipy.io.loadmat is not used because some damaged files make it end the process with a segmentation
fault, where one line has to name the file. The format is that of MathWorks' "MAT-File Format":
nested elements, each of a kind, a length and data.
"""

import math
import zlib
from collections.abc import Iterator

import numpy as np

from rpn_jax.base.pictures import MAX_PIXELS

# Decompressed size of a label file: 16 bits for each of the pixels that an image may have.
MAX_MATRIX_BYTES = 2 * MAX_PIXELS

_HEADER_BYTES = 128
_MATRIX, _COMPRESSED = 14, 15  # kinds of elements
# Kind of element -> dtype of its values.
_DTYPES = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8",
            13: "u8"}  # fmt: skip
_STRUCT = 2  # classes of matrices
_CLASSES = {6: "f8", 7: "f4", 8: "i1", 9: "u1", 10: "i2", 11: "u2", 12: "i4", 13: "u4", 14: "i8",
            15: "u8"}  # fmt: skip


def read(content: bytes, field: str) -> np.ndarray:
  """The array `field` ("variable", or "struct.field" of a struct of one element) of a file.

  Raises:
    ValueError: a file of another kind or damaged, or without such an array.
    zlib.error: damaged compressed data.
  """
  mark = content[126:128]
  if mark not in (b"IM", b"MI"):
    raise ValueError("not a MATLAB file of version 5 to 7")
  order = "<" if mark == b"IM" else ">"
  variable, *fields = field.split(".")
  for kind, data in _elements(memoryview(content)[_HEADER_BYTES:], order, padded=False):
    if kind == _COMPRESSED:
      kind, data = next(_elements(memoryview(_decompress(data)), order), (0, b""))
    if kind == _MATRIX:
      name, value = _matrix(data, order, fields)
      if name == variable:
        return value
  raise ValueError(f"no {variable!r} in it")


def _decompress(data: memoryview) -> bytes:
  stream = zlib.decompressobj()
  decompressed = stream.decompress(data, MAX_MATRIX_BYTES + 1)
  if len(decompressed) > MAX_MATRIX_BYTES:
    raise ValueError(f"more than {MAX_MATRIX_BYTES:,} bytes when decompressed")
  if not stream.eof:
    raise ValueError("compressed data ends early")
  return decompressed


def _elements(data: memoryview, order: str, padded: bool = True) -> Iterator[tuple]:
  """(kind, data) of consecutive elements; those of the top level are not padded."""
  at = 0
  while at + 8 <= len(data):
    kind, length = np.frombuffer(data[at : at + 8], f"{order}u4").tolist()
    begin, step = at + 8, length
    if kind >> 16:  # small: length and kind share four bytes, the data takes the other four
      kind, length, begin, step = kind & 0xFFFF, kind >> 16, at + 4, 0
      if length > 4:
        raise ValueError("a small element of more than four bytes")
    if begin + length > len(data):
      raise ValueError("an element that goes beyond the end of the file")
    yield kind, data[begin : begin + length]
    at += 8 + (-(-step // 8) * 8 if padded else step)


def _values(element: tuple, order: str) -> np.ndarray:
  kind, data = element
  if kind not in _DTYPES:
    raise ValueError(f"an element of kind {kind} in place of values")
  return np.frombuffer(data, order + _DTYPES[kind])


def _matrix(data: memoryview, order: str, fields: list[str]) -> tuple[str, np.ndarray | None]:
  """Name of a matrix, and its values or those of the named field; None if it is not numeric."""
  parts = _elements(data, order)
  try:
    flags, sizes, name = next(parts), next(parts), next(parts)
    matrix_class = int(_values(flags, order)[0]) & 0xFF
    shape = tuple(_values(sizes, order).tolist())
    name = bytes(name[1]).decode("ascii")
    if fields:
      return name, _field(parts, order, matrix_class, shape, fields)
    if matrix_class not in _CLASSES:
      return name, None
    stored = _values(next(parts), order)
  except (StopIteration, IndexError):
    raise ValueError("an incomplete matrix") from None
  if len(shape) > 8 or min(shape, default=-1) < 0 or math.prod(shape) != len(stored):
    raise ValueError(f"{len(stored)} values for the shape {shape[:8]}")
  return name, stored.astype(_CLASSES[matrix_class]).reshape(shape, order="F")


def _field(parts: Iterator, order: str, matrix_class: int, shape: tuple, fields: list[str]):
  if matrix_class != _STRUCT or math.prod(shape) != 1:
    return None
  length = int(_values(next(parts), order)[0])
  names = bytes(next(parts)[1])
  if length < 1:
    raise ValueError("field names without a length")
  for i in range(0, len(names), length):
    kind, data = next(parts)
    if names[i : i + length].split(b"\0")[0] == fields[0].encode() and kind == _MATRIX:
      return _matrix(data, order, fields[1:])[1]
  return None
