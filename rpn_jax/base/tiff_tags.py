"""The tags of TIFF files, and whether a file is whole by them.

Most writers put the tags behind the pixels. Where a file ends early, Pillow and libtiff print
several lines about it, and then take what is left of the tags for another kind of image.
"""

import io
import pathlib
import struct
from collections.abc import Iterator
from typing import BinaryIO

from PIL import TiffImagePlugin

from rpn_jax.base.errors import InputError

# Bytes of a value, by the number of its type.
_SIZES = (0, 1, 1, 2, 4, 8, 1, 1, 2, 4, 8, 4, 8, 4, 0, 0, 8, 8, 8)
# The last tag that the pixels cannot be read without, JPEG's tables; and that of the profile. Of
# others that are damaged Pillow warns, reads none behind them, and has the image.
_LAST, _PROFILE = 347, 34675
# Where the parts of the pixels begin, and their bytes: of strips, of tiles.
_PARTS = ((273, 279), (324, 325))


def check_whole(stream: BinaryIO, name: object) -> None:
  """Checks that a TIFF file has all of what its tags point to.

  Args:
    stream: of the file; is moved.
    name: of the image, for errors.

  Raises:
    InputError: it ends before.
  """
  size = stream.seek(0, io.SEEK_END)
  try:
    for needed in _ends(stream):
      if needed > size:
        break
    else:
      return
  except struct.error:  # of fewer bytes than were asked for
    pass
  raise InputError(
    f"{name}: expected a whole TIFF file, got the first {size:,} bytes of one, which was cut off; "
    "copy or export it anew"
  )


def first_page(path: pathlib.Path) -> TiffImagePlugin.ImageFileDirectory_v2:
  """The tags of a TIFF's first page; all kinds of errors for other files."""
  with path.open("rb") as file:
    check_whole(file, path)
    file.seek(0)
    header = file.read(8)
    header += file.read(8) if header[2:4] in (b"\x2b\0", b"\0\x2b") else b""  # BigTIFF
    tags = TiffImagePlugin.ImageFileDirectory_v2(header)
    file.seek(tags.next)
    tags.load(file)
  return tags


def _ends(stream: BinaryIO) -> Iterator[int]:
  """Where each of the parts ends that a TIFF consists of."""
  stream.seek(0)
  begin = stream.read(16)
  order, big = "<" if begin[:2] == b"II" else ">", begin[2:4] in (b"+\0", b"\0+")
  word, count_of_entries, entry = ("Q", "Q", "HHQ8s") if big else ("L", "H", "HHL4s")
  word, count_of_entries, entry = order + word, order + count_of_entries, order + entry
  (offset,) = struct.unpack_from(word, begin, 8 if big else 4)
  seen: set[int] = set()
  while offset and offset not in seen:
    seen.add(offset)
    yield offset
    stream.seek(offset)
    (count,) = struct.unpack(count_of_entries, stream.read(struct.calcsize(count_of_entries)))
    entries = stream.read(count * struct.calcsize(entry))
    (offset,) = struct.unpack(word, stream.read(struct.calcsize(word)))
    values: dict[int, tuple[int, ...]] = {}
    for tag, kind, number, field in struct.iter_unpack(entry, entries):
      if (tag > _LAST and tag != _PROFILE) or kind >= len(_SIZES):
        continue
      length = number * _SIZES[kind]
      place = struct.unpack(word, field)[0] if length > len(field) else None
      if place is not None:
        yield place + length
      letter = {3: "H", 4: "L", 16: "Q"}.get(kind)
      if letter and tag in (259, 273, 279, 324, 325):
        if place is not None:
          stream.seek(place)
          field = stream.read(length)
        values[tag] = struct.unpack_from(f"{order}{number}{letter}", field)
    # Uncompressed pixels are told to end early by Pillow; some writers get their bytes wrong.
    if values.get(259, (1,)) != (1,):
      for starts, lengths in _PARTS:
        yield from map(sum, zip(values.get(starts, ()), values.get(lengths, ())))
