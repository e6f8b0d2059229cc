"""From the values in an image file to what a network is given: opaque sRGB of 8 bits.

A note says what was decided: (its kind, a clause for people). Values of more than 8 bits are scaled
by `to_8_bits`, color profiles are applied, and what is transparent lies on a plain color.
"""

import functools
import io
import numbers
import re
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
from PIL import Image, ImageCms, ImageColor

from rpn_jax.base.errors import InputError

Note = tuple[str, str]
Color = tuple[int, int, int]
WHITE: Color = (255, 255, 255)
# Values of 16 bits that spread over this fraction of the range or more use it. Those of cameras
# with 10, 12 or 14 bits never do.
_USED_FRACTION = 0.25
# A profile that changes no color by more than this, of 255, is taken for sRGB.
_SAME_COLOR = 2


def parse_matte(matte: str | Color) -> Color:
  """The color that transparent pixels lie on: a name, "#rrggbb", or three integers 0 to 255.

  Raises:
    InputError: anything else.
  """
  try:
    red, green, blue = ImageColor.getrgb(matte)[:3] if isinstance(matte, str) else matte
    # Not of floats, in which 1 is white to some; and "rgb(300,0,0)" has a value above 255.
    if all(isinstance(x, numbers.Integral) and 0 <= x <= 255 for x in (red, green, blue)):
      return int(red), int(green), int(blue)
  except (ValueError, TypeError):
    pass
  raise InputError(
    f"matte={matte!r}: expected the name of a color, as white or slategray, #rrggbb, or three "
    "integers 0 to 255"
  )


def to_8_bits(values: np.ndarray, name: object) -> tuple[np.ndarray, list[Note]]:
  """Values of more than 8 bits, scaled to 0 … 255.

  Unsigned integers by their bit depth, of which the upper eight bits remain, if they spread over a
  quarter of it or more; floats in 0 … 1 by 255; everything else so that the least value is black
  and the greatest white, in all channels alike. Of floats NaN is black, -inf black and inf white,
  and none of them counts for the range.

  Args:
    values: of any shape; unsigned or signed integers, or floats.
    name: of the image, for errors.

  Returns:
    uint8 of the same shape, and what was done.

  Raises:
    InputError: no finite value.
  """
  lows, highs, count = [], [], 0
  for part in _strips(values):
    finite = part[np.isfinite(part)] if values.dtype.kind == "f" else part
    count += finite.size
    if finite.size:
      lows.append(finite.min())
      highs.append(finite.max())
  if not count:
    raise InputError(f"{name}: expected values, got only NaN and infinity; export it anew")
  notes: list[Note] = []
  if count < values.size:
    notes.append(("finite", f"{values.size - count:,} values are NaN or infinite"))
  black, white = float(min(lows)), float(max(highs))
  if values.dtype.kind == "u":
    bits = 8 * values.dtype.itemsize
    if black == white or white - black >= _USED_FRACTION * 2.0**bits:
      upper = (values >> np.array(bits - 8, values.dtype)).astype(np.uint8)
      return upper, [*notes, ("depth", f"{bits} bits became 8")]
  if values.dtype.kind == "f" and black >= 0 and white <= 1:
    black, white = 0.0, 1.0
  if values.dtype == np.uint16:  # ten times as fast by a table
    scaled = _stretched(np.arange(65536), black, white)[values]
  else:
    scaled = np.empty(values.shape, np.uint8)
    for part, target in zip(_strips(values), _strips(scaled)):
      target[...] = _stretched(part, black, white)
  done = f"values {black:.6g} … {white:.6g} of {values.dtype} became 0 … 255"
  return scaled, [*notes, ("range", done)]


def _stretched(values: np.ndarray, black: float, white: float) -> np.ndarray:
  shares = values.astype(np.float64)
  shares -= black
  shares *= 255 / (white - black or 1.0)
  if not np.isfinite(shares).all():
    shares = np.nan_to_num(shares, nan=0.0, posinf=255.0, neginf=0.0)
  return np.rint(np.clip(shares, 0, 255, out=shares), out=shares).astype(np.uint8)


def _strips(values: np.ndarray, size: int = 1 << 22) -> Iterator[np.ndarray]:
  """The rows of an image, some at a time: floats of a whole one would take gigabytes."""
  rows = max(1, size // max(1, values[0].size))
  return (values[i : i + rows] for i in range(0, len(values), rows))


def to_rgb(
  image: Image.Image,
  name: object,
  *,
  matte: Color = WHITE,
  profiles: bool = True,
  tags: Mapping[int, Any] = MappingProxyType({}),
) -> tuple[np.ndarray, list[Note]]:
  """An image of any of Pillow's modes as uint8 (H, W, 3), and what was done.

  Args:
    image: of a file that is still open, or loaded.
    name: of the image, for errors.
    matte: what transparent pixels lie on.
    profiles: whether an embedded ICC profile counts.
    tags: of a TIFF, which tell what its gray values mean.

  Raises:
    InputError: see `to_8_bits`.
  """
  profile = image.info.get("icc_profile") if profiles else None
  if image.mode in ("I", "F") or image.mode.startswith("I;16"):
    values, transparent = _stored_values(image, tags), image.info.get("transparency")
    if isinstance(transparent, int):
      full = np.iinfo(values.dtype).max
      values = np.stack([values, (full * (values != transparent)).astype(values.dtype)], -1)
    return values_to_rgb(values, name, matte=matte, profile=profile)
  return _on_matte(*_split(image), profile, matte)


def values_to_rgb(
  values: np.ndarray, name: object, *, matte: Color = WHITE, profile: bytes | None = None
) -> tuple[np.ndarray, list[Note]]:
  """Values of an image as uint8 (H, W, 3), and what was done.

  Args:
    values: (H, W), or (H, W, C) with C of 1 to 4: gray, gray with opacity, RGB, or RGB with
      opacity. uint8, or see `to_8_bits`.
    name: of the image, for errors.
    matte: what transparent pixels lie on.
    profile: an ICC profile.

  Raises:
    InputError: see `to_8_bits`.
  """
  values = values[..., None] if values.ndim == 2 else values
  colors, alpha = values, None
  notes: list[Note] = []
  if values.shape[2] in (2, 4):
    full = 1.0 if values.dtype.kind == "f" else float(np.iinfo(values.dtype).max)
    opacity = np.clip(np.nan_to_num(values[..., -1] * np.float32(255 / full)), 0, 255)
    colors, alpha = values[..., :-1], Image.fromarray(np.rint(opacity).astype(np.uint8))
  if values.dtype != np.uint8:
    colors, notes = to_8_bits(colors, name)
  image = Image.fromarray(colors[..., 0] if colors.shape[2] == 1 else colors)
  rgb, more = _on_matte(image, alpha, profile, matte)
  return rgb, [*notes, *more]


def _on_matte(
  image: Image.Image, alpha: Image.Image | None, profile: bytes | None, matte: Color
) -> tuple[np.ndarray, list[Note]]:
  rgb, notes = _to_srgb(image, profile)
  if alpha is None or alpha.getextrema() == (255, 255):
    return np.array(rgb), notes
  rgb.putalpha(alpha)
  lying = Image.alpha_composite(Image.new("RGBA", rgb.size, matte), rgb)
  told = f"transparent pixels lie on #{bytes(matte).hex()} (--matte chooses)"
  return np.array(lying.convert("RGB")), [*notes, ("matte", told)]


def _stored_values(image: Image.Image, tags: Mapping[int, Any]) -> np.ndarray:
  """The gray values that a file means: Pillow hands on the bits of a TIFF, a PGM in 32 of them."""
  values = np.array(image)
  values = values.astype(values.dtype.newbyteorder("="))
  if image.mode == "I" and 32 in tags.get(258, ()) and 1 in tags.get(339, (1,)):
    values = values.view(np.uint32)
  if image.format == "PPM" and image.mode == "I":
    values = values.astype(np.uint16)
  return inverted(values) if tags.get(262) == 0 else values


def inverted(values: np.ndarray) -> np.ndarray:
  """Values of a file whose 0 is white."""
  return np.iinfo(values.dtype).max - values if values.dtype.kind == "u" else -values


def _split(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
  """The image without its transparency, and how opaque it is, None for everywhere."""
  if not image.has_transparency_data:
    return image, None
  image = image.convert("LA") if image.mode == "La" else image
  rgba = image.convert("RGBA")
  opaque = image.getchannel(0) if image.mode in ("L", "LA") else rgba.convert("RGB")
  return opaque, rgba.getchannel("A")


def load_png(image: Image.Image) -> None:
  """Loads the pixels. Grays of 2 or 4 bits become 0 … 255, the transparent one among them.

  Pillow leaves the latter as it was, and forgets how many bits there were.
  """
  tiles = getattr(image, "tile", [])  # none, if it was loaded before
  step = {"L;2": 85, "L;4": 17}.get(str(tiles[0].args), 1) if tiles else 1
  image.load()
  if step > 1 and "transparency" in image.info:
    image.info["transparency"] *= step


def _to_srgb(image: Image.Image, profile: bytes | None) -> tuple[Image.Image, list[Note]]:
  """The colors of an opaque image as sRGB, by its profile if it has one that fits."""
  mode = image.mode if image.mode in ("L", "CMYK", "LAB") else "RGB"
  if mode == "LAB":
    return _turned(image, _lab_transform()), [("lab", "Lab became sRGB")]
  image = image.convert(mode) if image.mode != mode else image
  notes: list[Note] = []
  if profile:
    try:
      transform, title = _transform(profile, mode)
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
      notes.append(("profile", "its color profile cannot be used and is left out"))
    else:
      if transform is None:
        return image.convert("RGB"), []
      return _turned(image, transform), [("profile", f"{title} became sRGB")]
  if mode == "CMYK":
    notes.append(("cmyk", "CMYK without a profile, whose colors are an estimate"))
  return image.convert("RGB"), notes


@functools.lru_cache(16)
def _transform(profile: bytes, mode: str) -> tuple[ImageCms.ImageCmsTransform | None, str]:
  """What turns colors of a profile into sRGB, None if nothing does; and the profile's name."""
  source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
  space = {"RGB": "RGB", "L": "GRAY", "CMYK": "CMYK"}[mode]
  if source.profile.xcolor_space.strip() != space:
    raise ValueError(f"a profile of {source.profile.xcolor_space}")
  transform = ImageCms.buildTransform(
    source, ImageCms.createProfile("sRGB"), mode, "RGB",
    renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
    flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
  )  # fmt: skip
  if mode != "CMYK":
    levels = np.arange(0, 256, 17, dtype=np.uint8)
    colors = np.stack(np.meshgrid(*[levels] * (3 if mode == "RGB" else 1)), -1)
    grid = Image.fromarray(colors.reshape(1, -1, 3) if mode == "RGB" else colors.reshape(1, -1))
    turned = np.asarray(_turned(grid, transform), int)
    if np.abs(turned - np.asarray(grid.convert("RGB"))).max() <= _SAME_COLOR:
      return None, ""
  title = " ".join(re.sub(r"[^\w .()-]", " ", ImageCms.getProfileDescription(source)).split())
  return transform, title[:40] or "a color profile"


def _turned(image: Image.Image, transform: ImageCms.ImageCmsTransform) -> Image.Image:
  turned = ImageCms.applyTransform(image, transform)
  assert turned is not None  # as in place
  return turned


@functools.cache
def _lab_transform() -> ImageCms.ImageCmsTransform:
  lab, srgb = (ImageCms.createProfile(space) for space in ("LAB", "sRGB"))
  return ImageCms.buildTransform(lab, srgb, "LAB", "RGB")
