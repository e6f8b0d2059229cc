"""Images whose channels have more than 8 bits, which Pillow cuts off or cannot open.

Those are PNG, TIFF, PPM and JPEG 2000, of which OpenCV keeps all bits. It also returns wrong values
without an error, for a TIFF whose channels are stored one after another, or with opaque gray; so
the tags are looked at first. What it makes of a file that Pillow reads is compared with that.
"""

import contextlib
import io
import struct
import threading
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

import cv2
import numpy as np
from PIL import Image, ImageFile, TiffImagePlugin

from rpn_jax.base import colors
from rpn_jax.base.errors import InputError

TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
# By their numbers in a TIFF: uncompressed, LZW, deflate (two), PackBits.
_COMPRESSIONS = (1, 5, 8, 32946, 32773)
_REMEDY = "save it as PNG or TIFF"
_one_at_a_time = threading.Lock()
_KINDS = {1: "unsigned", 2: "signed", 3: "float"}


def is_deep_png(data: bytes) -> bool:
  """Whether it is a PNG of 16 bits per channel."""
  return data[:8] == b"\x89PNG\r\n\x1a\n" and data[12:16] == b"IHDR" and data[24:25] == b"\x10"


def read_png(data: bytes) -> np.ndarray:
  """The values of a PNG of 16 bits as it is stored: (H, W), or (H, W, 3 or 4) in RGB, uint16."""
  return _decoded(data, 0)


def check_is_read(file: Image.Image, begin: bytes, name: object) -> None:
  """Checks that a file is none of those that come out of Pillow with other values, or fewer bits.

  Args:
    file: as Pillow opened it.
    begin: its first bytes.
    name: of the image, for errors.

  Raises:
    InputError: values of more than 8 bits that Pillow reads wrongly or cuts off.
  """
  wrong = ""
  if file.format == "FITS" and file.mode != "L":  # in which Pillow exchanges their bytes
    wrong = "a FITS file of more than 8 bits"
  elif file.format == "SGI" and begin[3:4] == b"\2":
    wrong = "an SGI file of 16 bits"
  elif file.format == "DDS" and str(getattr(file, "pixel_format", "")).startswith("BC6H"):
    wrong = "a DDS file of floats"
  if wrong:
    raise InputError(f"{name}: expected 8 bits per channel in this format, got {wrong}; {_REMEDY}")


def bits_told(file: Image.Image, begin: bytes) -> int:
  """Bits per channel of a photograph in HEIC or AVIF, whose decoder makes them 8.

  Args:
    file: as Pillow opened it.
    begin: its first kilobytes.
  """
  if file.format == "AVIF":  # the box of AV1's configuration: high_bitdepth, twelve_bit
    flags = begin[begin.find(b"av1C\x81") + 6] if b"av1C\x81" in begin[:-6] else 0
    return 12 if flags & 0x20 else 10 if flags & 0x40 else 8
  return file.info.get("bit_depth", 8) if file.format == "HEIF" else 8


def stored_bits(file: ImageFile.ImageFile, stream: BinaryIO, name: object) -> tuple[int, int]:
  """Bits per channel of a PPM in color or a JPEG 2000, and the value that is white.

  Args:
    file: as Pillow opened it, not loaded.
    stream: of the file; is moved.
    name: of the image, for errors.

  Raises:
    InputError: a JPEG 2000 of more than 8 bits that is neither gray, RGB nor RGBA.
  """
  if file.format == "PPM":
    arguments = file.tile[0].args
    most = arguments[1] if file.mode == "RGB" and isinstance(arguments, tuple) else 255
    return (16 if most > 255 else 8), most
  stream.seek(0)
  data = stream.read()
  at = data.find(b"\xff\x4f\xff\x51")  # beginning of the codestream, and of its sizes
  if at < 0:
    raise ValueError("no codestream")
  (count,) = struct.unpack_from(">H", data, at + 40)
  bits = max(1 + (kind & 127) for kind in data[at + 42 : at + 42 + 3 * count : 3])
  allowed = ("I;16",) if count == 1 else ("RGB", "RGBA")
  if bits > 8 and (bits > 16 or file.mode not in allowed):
    raise InputError(
      f"{name}: expected a JPEG 2000 of 8 bits, or of up to 16 in gray, RGB or RGBA, got {count} "
      f"channels of {bits} bits ({file.mode}); {_REMEDY}"
    )
  return bits, 2**bits - 1


def read_like(file: Image.Image, data: bytes, most: int, name: object) -> np.ndarray:
  """Values of more than 8 bits in RGB or RGBA, of which Pillow has the upper 8.

  Args:
    file: as Pillow opened it.
    data: the file.
    most: the value that is white.
    name: of the image, for errors.

  Returns:
    uint16 (H, W, 3 or 4), 65535 where it is white.

  Raises:
    InputError: OpenCV makes something else of the file than Pillow.
  """
  upper = np.asarray(file)  # which tells of damage
  # A PPM in decimals may end with one; OpenCV waits for the blank behind it.
  values = _decoded(data + b"\n", 0)
  if values.dtype == np.uint16 and most < 65535:
    values = np.rint(values * (65535 / most)).clip(0, 65535).astype(np.uint16)
  same = values.dtype == np.uint16 and values.shape == upper.shape
  # Pillow rounds, and lets 256 become 0 in a JPEG 2000.
  if not same or np.abs(((values >> 8).astype(np.uint8) - upper).view(np.int8)).max() > 1:
    raise InputError(
      f"{name}: expected a {file.format} in plain RGB, got channels of more than 8 bits whose "
      f"colors are not understood; {_REMEDY}"
    )
  return values


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


def _directories(data: bytes) -> Iterator[Mapping[int, Any]]:
  """The tags of every page of a TIFF."""
  order = "<" if data[:2] == b"II" else ">"
  big = data[2:4] in (b"+\0", b"\0+")
  (offset,) = struct.unpack_from(order + ("Q" if big else "L"), data, 8 if big else 4)
  seen: set[int] = set()
  while offset and offset not in seen and offset < len(data) and len(seen) < 10_000:
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
