"""Images whose channels have more than 8 bits, which Pillow cuts off or cannot open: PNG and TIFF.

OpenCV keeps all bits. It also returns wrong values without an error, for a TIFF whose channels are
stored one after another, or with opaque gray; so the tags are looked at first.
"""

import contextlib
import io
import struct
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import cv2
import numpy as np
from PIL import TiffImagePlugin

from rpn_jax.base import colors
from rpn_jax.base.errors import InputError

TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
# By their numbers in a TIFF: uncompressed, LZW, deflate (two), PackBits.
_COMPRESSIONS = (1, 5, 8, 32946, 32773)
_one_at_a_time = threading.Lock()
_KINDS = {1: "unsigned", 2: "signed", 3: "float"}


def is_deep_png(data: bytes) -> bool:
  """Whether it is a PNG of 16 bits per channel."""
  return data[:8] == b"\x89PNG\r\n\x1a\n" and data[12:16] == b"IHDR" and data[24:25] == b"\x10"


def read_png(data: bytes) -> np.ndarray:
  """The values of a PNG of 16 bits as it is stored: (H, W), or (H, W, 3 or 4) in RGB, uint16."""
  return _decoded(data, 0)


class Tiff:
  """The tags of one page of a TIFF, which tell what OpenCV would make of it.

  Args:
    data: the file.
    page: from 0.

  Attributes:
    pages: number of pages in the file.
    size: (width, height).

  Raises:
    ValueError: a damaged file.
  """

  def __init__(self, data: bytes, page: int = 0):
    self._data, self._page = data, page
    tags = list(_directories(data))
    if not tags:
      raise ValueError("no page in the TIFF file")
    self.pages = len(tags)
    tags_of_page = tags[min(page, len(tags) - 1)]
    self.size = (int(tags_of_page[256]), int(tags_of_page[257]))
    self._bits = set(tags_of_page.get(258, (1,)))
    self._samples = tags_of_page.get(277, 1)
    self._kinds = set(tags_of_page.get(339, (1,)))
    self._planar = tags_of_page.get(284, 1) == 2
    self._meaning = tags_of_page.get(262)
    self._compression = tags_of_page.get(259, 1)
    self._extra = tags_of_page.get(338, ())
    self.profile = tags_of_page.get(34675)

  @property
  def deep(self) -> bool:
    """Whether a channel has more than 8 bits."""
    return max(self._bits) > 8

  def check(self, name: object, max_pixels: int) -> None:
    """
    Raises:
      InputError: an image that OpenCV reads not at all, or wrongly, or one of more bytes than
        `max_pixels` have in 16 bits with opacity.
    """
    kinds = " and ".join(sorted(_KINDS.get(kind, "other") for kind in self._kinds))
    bits = " and ".join(map(str, sorted(self._bits)))
    wrong = ""
    if self._compression not in _COMPRESSIONS:
      wrong = f"values of {bits} bits in compression {self._compression}"
    elif self._samples not in (1, 3, 4) or (self._samples != 1) != (self._meaning == 2):
      wrong = f"{self._samples} channels of {bits} bits that are not RGB"
    elif self._planar and self._samples > 1:
      wrong = f"channels of {bits} bits stored one after another"
    elif len(self._bits) > 1 or len(self._kinds) > 1 or not self._kinds <= set(_KINDS):
      wrong = f"values of {bits} bits ({kinds})"
    elif max(self._bits) not in ((32, 64) if 3 in self._kinds else (16, 32, 64)):
      wrong = f"{kinds} values of {bits} bits"
    size = self._samples * max(self._bits) // 8
    if not wrong and self.size[0] * self.size[1] * size > 8 * max_pixels:
      raise InputError(
        f"{name}: expected at most {8 * max_pixels // size:,} pixels of {size} bytes, got "
        f"{self.size[0]} x {self.size[1]}; make the image smaller"
      )
    if wrong:
      raise InputError(
        f"{name}: expected a TIFF of 8 bits, or of more in gray or RGB with its channels side by "
        f"side, uncompressed, LZW or deflate, got {wrong}; save it so, or as PNG"
      )

  def read(self) -> np.ndarray:
    """The values, upright: (H, W), or (H, W, 3 or 4) in RGB; what is transparent has 0 as fourth.

    Raises:
      ValueError: a damaged file.
    """
    values = _decoded(self._data, self._page)
    if values.shape[:2] not in (self.size, self.size[::-1]) or values.dtype == np.uint8:
      raise ValueError(f"values of {values.shape} {values.dtype}")
    if self._meaning == 0:
      values = colors.inverted(values)
    if self._samples == 4 and self._extra[:1] not in ((1,), (2,)):
      return values[..., :3]  # a fourth channel that means something else
    if self._samples == 4 and self._extra[0] == 1:  # colors are stored times their opacity
      full = 1.0 if values.dtype.kind == "f" else np.iinfo(values.dtype).max
      opacity = values[..., 3:].astype(np.float64) / full
      plain = values[..., :3] / np.where(opacity > 0, opacity, 1)
      values = np.concatenate([np.clip(plain, 0, full).astype(values.dtype), values[..., 3:]], -1)
    return values


def _directories(data: bytes, most: int = 10_000) -> Iterator[Mapping[int, Any]]:
  """The tags of every page of a TIFF."""
  order = "<" if data[:2] == b"II" else ">"
  big = data[2:4] in (b"+\0", b"\0+")
  (offset,) = struct.unpack_from(order + ("Q" if big else "L"), data, 8 if big else 4)
  seen: set[int] = set()
  while offset and offset not in seen and offset < len(data) and len(seen) < most:
    seen.add(offset)
    directory = TiffImagePlugin.ImageFileDirectory_v2(data[: 16 if big else 8])
    file = io.BytesIO(data)
    file.seek(offset)
    directory.load(file)
    yield directory
    offset = directory.next


def _decoded(data: bytes, page: int) -> np.ndarray:
  """All bits of a page, in RGB.

  Raises:
    ValueError: a damaged file.
  """
  encoded = np.frombuffer(data, np.uint8)
  with _quiet():
    if page:
      _, found = cv2.imdecodemulti(encoded, cv2.IMREAD_UNCHANGED, None, (page, page + 1))
      image = found[0] if found else None
    else:
      image = cv2.imdecode(encoded, cv2.IMREAD_UNCHANGED)
  if image is None:
    raise ValueError("a damaged file")
  if image.ndim == 3:
    image = image[..., ::-1] if image.shape[2] == 3 else image[..., [2, 1, 0, 3]]
  return image


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """OpenCV prints several lines about a damaged file, which is told in one."""
  logs = cv2.utils.logging
  with _one_at_a_time:  # else two threads would restore each other's level
    level = logs.setLogLevel(logs.LOG_LEVEL_SILENT)
    try:
      yield
    finally:
      logs.setLogLevel(level)
