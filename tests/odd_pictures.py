"""Image files of kinds that no library of the environment writes, made by hand."""

import io
import struct
import zlib

import cv2
import numpy as np
from PIL import Image

# Columns of the matrices from linear RGB to XYZ (D50) of the ICC profiles, and their gamma.
SRGB = np.array(
  [[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.7141]]
)
ADOBE = np.array(
  [[0.60974, 0.20528, 0.14919], [0.31111, 0.62567, 0.06322], [0.01947, 0.06087, 0.74457]]
)
P3 = np.array(
  [[0.51512, 0.29198, 0.1571], [0.2412, 0.69225, 0.06657], [-0.00105, 0.04189, 0.78407]]
)
D50 = np.array([0.9642, 1.0, 0.8249])


def stored(image: Image.Image, kind: str, **options) -> bytes:
  """A file as Pillow writes it."""
  file = io.BytesIO()
  image.save(file, kind, **options)
  return file.getvalue()


def gray_png(values: np.ndarray, bits: int, transparent: int) -> bytes:
  """A PNG of (H, W) grays of 1, 2, 4, 8 or 16 bits, one of which is transparent."""
  height, width = values.shape
  digits = ["".join(f"{value:0{bits}b}" for value in row) for row in values]
  size = -(-width * bits // 8)
  rows = [int(row.ljust(8 * size, "0"), 2).to_bytes(size, "big") for row in digits]
  header = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
  pixels = zlib.compress(b"".join(b"\0" + row for row in rows))
  return _png(
    (b"IHDR", header), (b"tRNS", struct.pack(">H", transparent)), (b"IDAT", pixels), (b"IEND", b"")
  )


def animated_png16(frames: list[np.ndarray]) -> bytes:
  """An animated PNG of 16 bits and two frames."""
  height, width, _ = frames[0].shape
  control = lambda number: (
    b"fcTL",
    struct.pack(">IIIIIHHBB", number, width, height, 0, 0, 1, 10, 0, 0),
  )
  second = zlib.compress(b"".join(b"\0" + row.astype(">u2").tobytes() for row in frames[1]))
  after = [control(1), (b"fdAT", struct.pack(">I", 2) + second)]
  return png16(frames[0], (b"acTL", struct.pack(">II", 2, 0)), control(0), after=after)


def png16(values: np.ndarray, *chunks: tuple[bytes, bytes], after=()) -> bytes:
  """A PNG of 16 bits: (H, W, C) with C of 1 to 4, and chunks before and after the pixels."""
  height, width, channels = values.shape
  kind = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
  rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
  header = struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0)
  return _png((b"IHDR", header), *chunks, (b"IDAT", zlib.compress(rows)), *after, (b"IEND", b""))


def _png(*chunks: tuple[bytes, bytes]) -> bytes:
  return b"\x89PNG\r\n\x1a\n" + b"".join(
    struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    for name, data in chunks
  )


def ppm(values: np.ndarray, most: int = 65535, *, plain: bool = False) -> bytes:
  """A PGM or PPM of 16 bits, `plain` in decimals; `most` is the value that is white."""
  color = values.ndim == 3
  kind = {(False, False): 5, (False, True): 6, (True, False): 2, (True, True): 3}[plain, color]
  header = f"P{kind}\n# a comment\n{values.shape[1]} {values.shape[0]} {most}\n".encode()
  return header + (" ".join(map(str, values.ravel())).encode() if plain else
                   values.astype(">u2").tobytes())  # fmt: skip


def jp2(values: np.ndarray, bits: int = 16) -> bytes:
  """A JPEG 2000 of (H, W, 3 or 4) values of so many bits, which are kept only if they are smooth.

  No library here writes 12 bits, so they are written as the 16 that have the same wavelets.
  """
  order = [2, 1, 0, 3][: values.shape[2]]
  shifted = values.astype(np.uint16) + (1 << 15) - (1 << (bits - 1))
  ok, data = cv2.imencode(".jp2", shifted.astype(np.uint16)[..., order])
  assert ok
  return with_bits(data.tobytes(), bits)


def with_bits(jp2: bytes, bits: int) -> bytes:
  """A JPEG 2000 that says to have so many bits per channel."""
  content = bytearray(jp2)
  content[content.find(b"ihdr") + 14] = bits - 1
  sizes = content.find(b"\xff\x4f\xff\x51") + 42
  for i in range(content[sizes - 1]):
    content[sizes + 3 * i] = bits - 1
  return bytes(content)


def sgi16(values: np.ndarray) -> bytes:
  """An uncompressed SGI file of 16 bits."""
  height, width, channels = values.shape
  header = struct.pack(">HBBHHHH", 474, 0, 2, 3, width, height, channels).ljust(512, b"\0")
  return header + np.moveaxis(values[::-1], -1, 0).astype(">u2").tobytes()


def fits(values: np.ndarray) -> bytes:
  """A FITS file of integers or floats."""
  bits = 8 * values.itemsize * (-1 if values.dtype.kind == "f" else 1)
  cards = {"SIMPLE": "T", "BITPIX": bits, "NAXIS": 2, "NAXIS1": values.shape[1],
           "NAXIS2": values.shape[0]}  # fmt: skip
  header = "".join(f"{name:8}= {value!s:>20}".ljust(80) for name, value in cards.items()) + "END"
  pixels = values[::-1].astype(values.dtype.newbyteorder(">")).tobytes()
  return header.ljust(2880).encode() + pixels + b"\0" * (-len(pixels) % 2880)


def dds_of_floats() -> bytes:
  """A DDS file of 4 x 4 pixels in BC6H."""
  header = struct.pack("<7I44x", 124, 0x1007, 4, 4, 16, 0, 1)
  kind = struct.pack("<2I4s5I5I", 32, 4, b"DX10", 0, 0, 0, 0, 0, 0x1000, 0, 0, 0, 0)
  return b"DDS " + header + kind + struct.pack("<5I", 95, 3, 0, 1, 0) + bytes(16)


def tiff(*pages: np.ndarray, meaning: int = 2, planar: bool = False, **tags: int) -> bytes:
  """An uncompressed TIFF of (H, W, C) pages of one type.

  Args:
    *pages: the values.
    meaning: photometric interpretation: 0 white is zero, 1 black is zero, 2 RGB.
    planar: channels one after another.
    **tags: `orientation`, `extra` (meaning of the last channel), `compression`.
  """
  data, links = b"II*\0\0\0\0\0", [4]
  for values in pages:
    height, width, channels = values.shape
    kind = {"u": 1, "i": 2, "f": 3}[values.dtype.kind]
    strips = [values[..., i] for i in range(channels)] if planar else [values]
    offsets = []
    for strip in strips:
      offsets.append(len(data))
      data += strip.astype(values.dtype.newbyteorder("<")).tobytes() + b"\0" * (strip.nbytes % 2)
    size = values.nbytes // len(strips)
    entries = {
      256: [width], 257: [height], 258: [8 * values.itemsize] * channels,
      259: [tags.get("compression", 1)], 262: [meaning], 273: offsets,
      274: [tags.get("orientation", 1)], 277: [channels], 278: [height],
      279: [size] * len(strips), 284: [2 if planar else 1], 339: [kind] * channels,
    }  # fmt: skip
    if "extra" in tags:
      entries[338] = [tags["extra"]]
    far, listed = b"", b""
    start = len(data) + 2 + 12 * len(entries) + 4
    for tag, numbers in sorted(entries.items()):
      packed = struct.pack(f"<{len(numbers)}I", *numbers)
      if len(numbers) > 1:
        far, packed = far + packed, struct.pack("<I", start + len(far))
      listed += struct.pack("<HHI", tag, 4, len(numbers)) + packed
    data = data[: links[-1]] + struct.pack("<I", len(data)) + data[links[-1] + 4 :]
    data += struct.pack("<H", len(entries)) + listed
    links.append(len(data))
    data += b"\0\0\0\0" + far
  return data


def _profile(kind: bytes, space: bytes, connection: bytes, tags: dict[bytes, bytes]) -> bytes:
  name = b"a test profile\0"
  described = b"desc\0\0\0\0" + struct.pack(">I", len(name)) + name + b"\0" * 78
  white = b"XYZ \0\0\0\0" + _fixed(D50)
  tags = {b"desc": described, b"wtpt": white, b"cprt": b"text\0\0\0\0none\0", **tags}
  offset, table, body = 128 + 4 + 12 * len(tags), b"", b""
  for tag, content in tags.items():
    table += tag + struct.pack(">II", offset + len(body), len(content))
    body += content + b"\0" * (-len(content) % 4)
  header = struct.pack(">I4sI4s4s4s", 0, b"\0" * 4, 0x02400000, kind, space, connection)
  header += struct.pack(">6H4s", 2026, 11, 26, 0, 0, 0, b"acsp") + b"\0" * 28 + _fixed(D50)
  header = header.ljust(128, b"\0") + struct.pack(">I", len(tags))
  whole = header + table + body
  return struct.pack(">I", len(whole)) + whole[4:]


def _fixed(values) -> bytes:
  return struct.pack(f">{len(values)}i", *(round(65536 * value) for value in values))


def rgb_profile(matrix: np.ndarray, gamma: float) -> bytes:
  """An ICC profile of a matrix to XYZ (D50) and a gamma."""
  curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(256 * gamma))
  tags = {b"%cXYZ" % c: b"XYZ \0\0\0\0" + _fixed(matrix[:, i]) for i, c in enumerate(b"rgb")}
  return _profile(b"mntr", b"RGB ", b"XYZ ", tags | {b"%cTRC" % c: curve for c in b"rgb"})


def gray_profile(gamma: float) -> bytes:
  """An ICC profile of gray with a gamma."""
  curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(256 * gamma))
  return _profile(b"mntr", b"GRAY", b"XYZ ", {b"kTRC": curve})


def as_srgb(color, matrix: np.ndarray, gamma: float) -> np.ndarray:
  """What a color of that profile is in sRGB, 0 … 255."""
  xyz = matrix @ (np.array(color) / 255) ** gamma
  return encoded(np.linalg.solve(SRGB, xyz))


def encoded(linear: np.ndarray) -> np.ndarray:
  """Linear RGB in sRGB's curve (IEC 61966-2-1), 0 … 255."""
  linear = np.clip(linear, 0, 1)
  return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


# Lab of full inks; where several are full, their sum, and black where there is black.
INKS = {"c": (55, -37, -50), "m": (48, 74, -3), "y": (89, -5, 93)}


def cmyk_lab(c: int, m: int, y: int, k: int) -> tuple[float, float, float]:
  """Lab of inks that are 0 or 1, in the profile below."""
  if k:
    return 0.0, 0.0, 0.0
  on = [INKS[ink] for ink, used in zip("cmy", (c, m, y)) if used]
  lightness = max(0.0, 100.0 - sum(100 - lab[0] for lab in on))
  mean = [sum(lab[i] for lab in on) / max(1, len(on)) for i in (1, 2)]
  return lightness, mean[0], mean[1]


def cmyk_profile() -> bytes:
  """An ICC profile of a printer with these inks: a table of 2 x 2 x 2 x 2 colors in Lab."""
  ramp = bytes(range(256))
  table = b""
  for i in range(16):
    lightness, a, b = cmyk_lab(*(i >> 3 & 1, i >> 2 & 1, i >> 1 & 1, i & 1))
    table += bytes([round(2.55 * lightness), round(a + 128), round(b + 128)])
  identity = _fixed(np.eye(3).ravel())
  lut = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + identity + 4 * ramp + table + 3 * ramp
  return _profile(b"prtr", b"CMYK", b"Lab ", {b"A2B0": lut})


def lab_as_srgb(lab) -> np.ndarray:
  """CIE Lab (D50) in sRGB, 0 … 255."""
  fy = (lab[0] + 16) / 116
  f = np.array([fy + lab[1] / 500, fy, fy - lab[2] / 200])
  xyz = D50 * np.where(f > 6 / 29, f**3, 3 * (6 / 29) ** 2 * (f - 4 / 29))
  return encoded(np.linalg.solve(SRGB, xyz))
