"""Files of every kind, whose pixels are known by how they were made."""

import io
import struct
import sys
import zlib

import cv2
import jax
import numpy as np
import pillow_heif
import pytest
from PIL import Image, ImageCms

from rpn_jax.base import colors, pictures, pixels
from rpn_jax.base.errors import InputError
from tests import odd_pictures as odd
from tests.data_pipelines.test_exif import SHOWN
from tests.odd_pictures import stored

RNG = np.random.default_rng(0)
DEEP = RNG.integers(0, 65536, (5, 7, 3)).astype(np.uint16)
DEEP[0, 0], DEEP[0, 1] = 0, 65535
UPPER = (DEEP >> 8).astype(np.uint8)
# As of a camera of 12 bits, in 16: from black, 200, to white, 4008, in steps of which 15 are one.
NARROW = (200 + 3808 * RNG.integers(0, 256, (5, 7, 3)) // 255).astype(np.uint16)
NARROW[0, 0], NARROW[0, 1] = 200, 4008
STRETCHED = np.rint((NARROW - 200.0) / 3808 * 255).astype(np.uint8)


def load(content: bytes, **options) -> pictures.Picture:
  return pictures.load(io.BytesIO(content), **options)


def encoded(values: np.ndarray, kind: str) -> bytes:
  """By OpenCV."""
  ok, data = cv2.imencode(kind, values[..., ::-1] if values.ndim == 3 else values)
  assert ok
  return data.tobytes()


def gray(values: np.ndarray) -> np.ndarray:
  return np.repeat(values[..., None], 3, 2)


# Ordinary images


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "WEBP", "TIFF", "GIF", "PPM", "TGA"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_eight_bits_are_as_pillow_decodes_them(kind, mode):
  content = stored(Image.fromarray(UPPER).convert(mode), kind)
  with Image.open(io.BytesIO(content)) as image:
    want = np.array(image.convert("RGB"))
  picture = load(content)
  np.testing.assert_array_equal(picture.image, want)
  assert picture.image.dtype == np.uint8 and picture.notes == ()


@pytest.mark.parametrize("kind", ["AVIF", "JPEG2000", "HEIF"])
def test_kinds_with_loss(kind):
  pillow_heif.register_heif_opener()
  halves = np.zeros((64, 64, 3), np.uint8)
  halves[:, :32], halves[:, 32:] = (200, 30, 40), (20, 90, 220)
  image = load(stored(Image.fromarray(halves), kind)).image
  for x in (12, 52):
    assert np.abs(image[30, x].astype(int) - halves[30, x]).max() <= 8


def test_heic_names_its_package(monkeypatch):
  pillow_heif.register_heif_opener()
  content = stored(Image.fromarray(UPPER), "HEIF")
  monkeypatch.setitem(sys.modules, "pillow_heif", None)  # as if it were not installed
  with pytest.raises(
    InputError, match=r"expected the package pillow-heif .*pip install pillow-heif=="
  ):
    load(content)


# More than eight bits


@pytest.mark.parametrize(
  ("content", "want"),
  [
    (odd.png16(DEEP), UPPER),
    (encoded(DEEP, ".png"), UPPER),
    (encoded(DEEP, ".tiff"), UPPER),  # LZW
    (odd.tiff(DEEP), UPPER),
    (odd.png16(DEEP[..., :1]), gray(UPPER[..., 0])),
    (stored(Image.fromarray(DEEP[..., 0]), "TIFF"), gray(UPPER[..., 0])),
    (odd.tiff(DEEP[..., :1], meaning=1), gray(UPPER[..., 0])),
    (odd.tiff(DEEP[..., :1], meaning=0), gray(255 - UPPER[..., 0])),  # 0 is white
    (odd.tiff(np.concatenate([DEEP, DEEP[..., :1]], -1), extra=0), UPPER),  # no transparency
    (odd.tiff((DEEP.astype(np.uint32) << 16)[..., :1], meaning=1), gray(UPPER[..., 0])),
    (odd.tiff((DEEP.astype(np.uint64) << 48)[..., :1], meaning=1), gray(UPPER[..., 0])),
  ],
)
def test_values_that_use_their_bits_keep_the_upper_eight(content, want):
  picture = load(content)
  np.testing.assert_array_equal(picture.image, want)
  assert len(picture.texts) == 1 and picture.texts[0].endswith("bits became 8")


@pytest.mark.parametrize(
  ("content", "want"),
  [
    (odd.png16(NARROW), STRETCHED),
    (encoded(NARROW, ".png"), STRETCHED),
    (encoded(NARROW, ".tiff"), STRETCHED),
    (odd.tiff(NARROW), STRETCHED),
    (odd.tiff(NARROW.astype(np.float32)), STRETCHED),
    (odd.tiff(NARROW.astype(np.float64)), STRETCHED),
    (odd.tiff(NARROW.astype(np.int16)), STRETCHED),
    (odd.png16(NARROW[..., :1]), gray(STRETCHED[..., 0])),
    (stored(Image.fromarray(NARROW[..., 0].astype(np.int32)), "TIFF"), gray(STRETCHED[..., 0])),
    (stored(Image.fromarray(NARROW[..., 0].astype(np.float32)), "TIFF"), gray(STRETCHED[..., 0])),
  ],
)
def test_other_values_from_the_least_to_the_greatest(content, want):
  picture = load(content)
  np.testing.assert_array_equal(picture.image, want)
  assert picture.texts[0].startswith("values 200 … 4008 of ")


RAMP = np.linspace(0, 1, 64)
# Smooth, since no library here writes a JPEG 2000 in color without loss; black and white included.
SMOOTH = np.repeat(
  np.stack([RAMP**2, RAMP[::-1] ** 2, RAMP / 3], -1)[:, None] * 65535, 80, 1
).astype(np.uint16)  # fmt: skip


@pytest.mark.parametrize(
  ("content", "want"),
  [
    (odd.ppm(DEEP), UPPER),
    (odd.ppm(DEEP, plain=True), UPPER),
    (odd.ppm(DEEP >> 4, 4095), UPPER),
    (odd.ppm(DEEP >> 4, 4095, plain=True), UPPER),
    (odd.ppm(DEEP[..., 0]), gray(UPPER[..., 0])),
    (odd.ppm(DEEP[..., 0], plain=True), gray(UPPER[..., 0])),
    (odd.ppm(DEEP[..., 0] >> 4, 4095), gray(UPPER[..., 0])),
    (odd.jp2(SMOOTH), SMOOTH >> 8),
    (odd.jp2(SMOOTH)[85:], SMOOTH >> 8),  # the codestream alone
    (odd.jp2(SMOOTH >> 4, 12), SMOOTH >> 8),
    (odd.jp2(SMOOTH >> 7, 9), SMOOTH >> 8),
    (odd.jp2(np.dstack([SMOOTH, np.full((64, 80), 65535)])), SMOOTH >> 8),
    (stored(Image.fromarray(SMOOTH[..., 0]), "JPEG2000"), gray(SMOOTH[..., 0] >> 8)),
  ],
)
def test_ppm_and_jpeg_2000_of_more_than_eight_bits(content, want):
  picture = load(content)
  assert np.abs(picture.image.astype(int) - want).max() <= 1
  assert picture.texts == ["16 bits became 8"] and picture.format in ("PPM", "JPEG2000")
  assert picture.image.min() == 0 and picture.image.max() >= 254


@pytest.mark.parametrize(
  "content",
  [
    odd.ppm(NARROW),
    odd.ppm(NARROW, plain=True),
    odd.ppm(NARROW[..., 0]),
    odd.jp2(SMOOTH // 20 + 200),
    stored(Image.fromarray(NARROW[..., 0]), "JPEG2000"),
  ],
)
def test_ppm_and_jpeg_2000_from_the_least_to_the_greatest(content):
  picture = load(content)
  assert picture.texts[0].startswith("values 200 … ") and "of uint16 became" in picture.texts[0]
  assert picture.image.min() == 0 and picture.image.max() == 255


@pytest.mark.parametrize("content", [odd.ppm(DEEP), odd.jp2(SMOOTH), odd.jp2(SMOOTH >> 8, 8)])
def test_ppm_and_jpeg_2000_of_a_file(content, tmp_path):
  (tmp_path / "image").write_bytes(content)
  picture, want = pictures.load(tmp_path / "image"), load(content)
  np.testing.assert_array_equal(picture.image, want.image)
  assert picture.image.max() >= 254


def test_transparency_of_a_deep_jpeg_2000():
  clear = load(odd.jp2(np.dstack([SMOOTH, np.zeros((64, 80), np.uint16)])), matte="#102030")
  assert (clear.image == [16, 32, 48]).all()


def test_ppm_of_eight_bits_or_fewer_is_as_pillow_reads_it():
  for most, want in ((255, UPPER), (100, np.rint(UPPER % 101 * 2.55))):
    content = b"P6 7 5 %d\n" % most + (UPPER.astype(int) % (most + 1)).astype(np.uint8).tobytes()
    assert np.abs(load(content).image - want).max() <= 1 and load(content).notes == ()


JP2_IN_YCC = odd.jp2(SMOOTH).replace(b"\0\0\0\x10\0\0", b"\0\0\0\x12\0\0", 1)
JPEG_OF_12_BITS = stored(Image.new("RGB", (8, 8)), "JPEG").replace(
  b"\xff\xc0\0\x11\x08", b"\xff\xc1\0\x11\x0c"
)


@pytest.mark.parametrize(
  ("content", "said"),
  [
    (odd.fits(NARROW[..., 0].astype(np.int16)), "8 bits per channel in this format, got a FITS"),
    (odd.fits(NARROW[..., 0].astype(np.float32)), "8 bits per channel in this format, got a FITS"),
    (odd.sgi16(NARROW), "8 bits per channel in this format, got an SGI file of 16 bits"),
    (odd.dds_of_floats(), "8 bits per channel in this format, got a DDS file of floats"),
    (JP2_IN_YCC, "a JPEG2000 in plain RGB"),
    (
      odd.with_bits(stored(Image.new("LA", (64, 64)), "JPEG2000"), 16),
      "a JPEG 2000 of 8 bits, or .* got 2 channels of 16 bits",
    ),
    (JPEG_OF_12_BITS, "a JPEG of 8 bits, got one of 12 bits"),
  ],
)
def test_other_formats_of_more_than_eight_bits_are_refused(content, said):
  with pytest.raises(InputError, match=f"^the image: expected {said}.*; save it as PNG") as error:
    load(content)
  assert "\n" not in str(error.value)


def test_fits_of_eight_bits():
  np.testing.assert_array_equal(load(odd.fits(UPPER[..., 0])).image, gray(UPPER[..., 0]))


@pytest.mark.parametrize(("bits", "told"), [(8, []), (10, [10]), (12, [12])])
def test_photographs_of_more_than_eight_bits(bits, told):
  pillow_heif.register_heif_opener()
  want = (SMOOTH[:, :64] >> 8).astype(np.uint8)
  values = SMOOTH[:, :64] >> (16 - bits)
  values = values.astype(np.uint8) if bits == 8 else values
  options = [cv2.IMWRITE_AVIF_DEPTH, bits, cv2.IMWRITE_AVIF_QUALITY, 100]
  ok, avif = cv2.imencode(".avif", values[..., ::-1], options)
  assert ok
  heif = pillow_heif.from_bytes("RGB" if bits == 8 else f"RGB;{bits}", (64, 64), values.tobytes())
  file = io.BytesIO()
  heif.save(file, quality=-1, chroma=444)
  for content in (avif.tobytes(), file.getvalue()):
    picture = load(content)
    assert np.abs(picture.image.astype(int) - want).max() <= 3
    assert picture.texts == [f"{depth} bits became 8" for depth in told]


def test_floats_from_0_to_1():
  values = np.float32([[[0, 0.5, 1]], [[0.25, 0.25, 0.5]]])
  want = [[[0, 128, 255]], [[64, 64, 128]]]
  np.testing.assert_array_equal(load(odd.tiff(values)).image, want)
  np.testing.assert_array_equal(pictures.load(values).image, want)
  np.testing.assert_array_equal(load(encoded(values, ".tiff")).image, want)


def test_what_is_not_finite():
  values = np.array([[np.nan, np.inf, -np.inf, -3.0, 1.0]], np.float32)
  for content in (stored(Image.fromarray(values), "TIFF"), odd.tiff(values[..., None], meaning=1)):
    picture = load(content)
    np.testing.assert_array_equal(picture.image[0, :, 0], [0, 255, 0, 0, 255])
    assert picture.texts[0] == "3 values are NaN or infinite"
  with pytest.raises(InputError, match="expected values, got only NaN and infinity"):
    load(odd.tiff(values[:, :3, None], meaning=1))


@pytest.mark.parametrize(("value", "want"), [(0, 0), (30000, 117), (65535, 255)])
def test_one_value_everywhere(value, want):
  picture = load(odd.png16(np.full((3, 4, 1), value, np.uint16)))
  assert (picture.image == want).all()
  assert (load(odd.ppm(np.full((3, 4), value))).image == want).all()
  assert (load(odd.tiff(np.full((3, 4, 1), 7.5, np.float32), meaning=1)).image == 0).all()


@pytest.mark.parametrize(
  ("content", "said"),
  [
    (odd.tiff(DEEP, planar=True), "channels of 16 bits stored one after another"),
    (odd.tiff(DEEP.astype(np.float32), planar=True), "channels of 32 bits stored one after"),
    (odd.tiff(DEEP[..., :2], meaning=1, extra=2), "2 channels of 16 bits that are not RGB"),
    (odd.tiff(np.concatenate([DEEP, DEEP], -1)), "6 channels of 16 bits"),
    (odd.tiff((DEEP / 65535).astype(np.float16)), "float values of 16 bits"),
    (odd.tiff(UPPER, compression=50002), "values of 8 bits in compression 50002"),
    (odd.tiff(DEEP, compression=34925), "values of 16 bits in compression 34925"),
  ],
)
def test_what_opencv_or_pillow_would_read_wrongly_is_refused(content, said):
  with pytest.raises(InputError, match=f"^the image: expected a TIFF of 8 bits.* got {said}") as e:
    load(content)
  assert "\n" not in str(e.value)


@pytest.mark.parametrize("kind", [".tiff", ".png"])
def test_a_deep_image_that_ends_early_prints_nothing(kind, capfd):
  with pytest.raises(InputError, match=r"expected a (readable image|whole TIFF)"):
    load(encoded(RNG.integers(0, 65536, (64, 64, 3)).astype(np.uint16), kind)[:9000])
  assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("kind", ["raw", "tiff_lzw", "tiff_deflate", "jpeg", "deep", "big"])
def test_a_tiff_that_was_cut_off_anywhere(kind, capfd, recwarn):
  noise = RNG.integers(0, 256, (40, 40, 3)).astype(np.uint8)
  if kind == "deep":
    content = odd.tiff(257 * noise.astype(np.uint16))
  elif kind == "big":
    content = stored(Image.fromarray(noise), "TIFF", big_tiff=True, compression="tiff_lzw")
  else:
    profile = {"compression": kind} if kind != "raw" else {"icc_profile": odd.cmyk_profile()}
    content = stored(Image.fromarray(noise), "TIFF", **profile)
  assert load(content).image.shape == noise.shape
  for length in (
    5,
    9,
    30,
    100,
    200,
    len(content) // 2,
    *range(len(content) - 150, len(content), 7),
  ):
    said = f"a whole TIFF file, got the first {length:,} bytes of one, which was cut off"
    with pytest.raises(InputError, match=rf"^the image: expected ({said}|.*file is truncated)"):
      load(content[:length])
  assert capfd.readouterr() == ("", "") and not recwarn.list


def test_a_damaged_tag_behind_those_that_an_image_needs():
  content = bytearray(odd.tiff(UPPER))
  at = content.rindex(struct.pack("<HHL", 339, 4, 3))  # the last entry
  content[at : at + 12] = struct.pack("<HHLL", 50000, 4, 900, 1 << 30)
  with pytest.warns(UserWarning, match="Truncated"):
    np.testing.assert_array_equal(load(bytes(content)).image, UPPER)


def test_bytes_are_limited_like_pixels():
  content = odd.tiff(DEEP.astype(np.float64))  # 35 pixels of 24 bytes
  with pytest.raises(InputError, match="at most 33 pixels of 24 bytes, got 7 x 5; make the image"):
    load(content, max_pixels=100)
  assert load(content, max_pixels=105).image.shape == DEEP.shape


def test_strips_change_nothing(monkeypatch):
  whole = load(odd.tiff(NARROW.astype(np.float32))).image
  strips = colors._strips
  monkeypatch.setattr(colors, "_strips", lambda values: strips(values, 40))
  np.testing.assert_array_equal(load(odd.tiff(NARROW.astype(np.float32))).image, whole)


# Pages


PAGES = [np.full((4, 6, 3), color, np.uint8) for color in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]


def several(kind: str) -> bytes:
  images = [Image.fromarray(page) for page in PAGES]
  options = {"WEBP": {"lossless": True}, "MPO": {"quality": 100, "subsampling": 0}}.get(kind, {})
  return stored(images[0], kind, save_all=True, append_images=images[1:], **options)


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "WEBP", "PNG", "MPO", "AVIF", "deep"])
def test_one_page_of_several(kind):
  content = several(kind) if kind != "deep" else odd.tiff(*(257 * p.astype("u2") for p in PAGES))
  first = load(content)
  assert ("page", "page 1 of 3 is taken (--page takes another)") in first.notes
  for number, want in enumerate(PAGES, 1):
    picture = load(content, page=number)
    assert np.abs(picture.image.astype(int) - want).max() <= (8 if kind == "AVIF" else 1)
    assert "page" not in dict(picture.notes)
  for wrong in (0, 4, -1):
    with pytest.raises(InputError, match=f"expected page 1 to 3, got {wrong}; the file has 3"):
      load(content, page=wrong)


def test_pages_of_16_bits_in_a_png():
  frames = [257 * page.astype(np.uint16) for page in PAGES[:2]]
  for number, want in enumerate(PAGES[:2], 1):
    picture = load(odd.animated_png16(frames), page=np.int64(number))
    np.testing.assert_array_equal(picture.image, want)


def test_a_stream_that_cannot_go_back():
  class Response(io.BytesIO):
    def seekable(self):
      return False

    def seek(self, *_):
      raise io.UnsupportedOperation

  for content in (odd.png16(DEEP), odd.tiff(DEEP), stored(Image.fromarray(UPPER), "BMP")):
    np.testing.assert_array_equal(pictures.load(Response(content)).image, UPPER)


def test_a_stream_that_was_just_written():
  pillow_heif.register_heif_opener()
  heif = stored(Image.fromarray(UPPER), "HEIF")
  for content in (odd.png16(NARROW), odd.tiff(NARROW), encoded(NARROW, ".tiff"), heif):
    stream = io.BytesIO()
    stream.write(content)
    picture, want = pictures.load(stream), load(content)
    np.testing.assert_array_equal(picture.image, want.image)
    assert picture.notes == want.notes


def test_heic_of_a_stream_that_was_just_written_names_its_package(monkeypatch):
  stream = io.BytesIO()
  pillow_heif.register_heif_opener()
  Image.fromarray(UPPER).save(stream, "HEIF")
  monkeypatch.setitem(sys.modules, "pillow_heif", None)
  with pytest.raises(InputError, match="expected the package pillow-heif"):
    pictures.load(stream)


def test_a_file_with_one_page():
  assert load(odd.png16(DEEP), page=1).image.shape == DEEP.shape
  with pytest.raises(InputError, match="expected page 1 to 1, got 2; the file has one page"):
    load(stored(Image.fromarray(UPPER), "PNG"), page=2)


def test_a_heic_file_shows_its_primary_image():
  pillow_heif.register_heif_opener()
  images = [Image.fromarray(np.repeat(np.repeat(page, 16, 0), 16, 1)) for page in PAGES]
  content = stored(images[0], "HEIF", save_all=True, append_images=images[1:], primary_index=1)
  picture = load(content)
  assert picture.texts == ["page 2 of 3 is taken (--page takes another)"]
  assert picture.image[20, 20].argmax() == 1 and load(content, page=1).image[20, 20].argmax() == 0


# Transparency


def palette_with_hidden_red() -> bytes:
  image = Image.new("P", (2, 1))
  image.putpalette([255, 0, 0, 0, 128, 0])
  image.putpixel((1, 0), 1)
  return stored(image, "PNG", transparency=0)


def rgba() -> Image.Image:
  return Image.fromarray(np.uint8([[[255, 0, 0, 0], [0, 128, 0, 255]]]), "RGBA")


GREEN16 = np.uint16([[[65535, 0, 0, 0], [0, 128 * 257, 0, 65535]]])


@pytest.mark.parametrize(
  "content",
  [
    palette_with_hidden_red(),
    stored(rgba(), "PNG"),
    stored(rgba(), "WEBP", lossless=True, exact=True),
    stored(rgba(), "TIFF"),
    stored(rgba().convert("P"), "GIF", transparency=rgba().convert("P").getpixel((0, 0))),
    stored(rgba().convert("RGB"), "PNG", transparency=(255, 0, 0)),
    odd.png16(GREEN16),
    odd.png16(GREEN16[..., :3], (b"tRNS", b"\xff\xff\0\0\0\0")),
    odd.tiff(GREEN16, extra=2),
    odd.tiff(GREEN16, extra=1),  # colors times opacity
    odd.tiff((GREEN16 / 65535).astype(np.float32), extra=2),
  ],
)
def test_what_is_transparent_lies_on_the_matte(content):
  np.testing.assert_array_equal(load(content).image, [[[255, 255, 255], [0, 128, 0]]])
  picture = load(content, matte="#102030")
  np.testing.assert_array_equal(picture.image, [[[16, 32, 48], [0, 128, 0]]])
  assert "transparent pixels lie on #102030 (--matte chooses)" in picture.texts


@pytest.mark.parametrize(
  ("image", "want"),
  [
    (Image.fromarray(np.uint8([[[0, 128], [9, 255]]]), "LA"), [127, 9]),
    (Image.fromarray(np.uint8([[[100, 0], [9, 255]]]), "LA").convert("La"), [255, 9]),
    (rgba().convert("RGBa"), [[255, 255, 255], [0, 128, 0]]),
    (rgba().convert("RGB").convert("P").convert("PA"), [[255, 0, 0], [0, 153, 0]]),
  ],
)
def test_other_modes_with_transparency(image, want):
  got = pictures.load(image).image
  want = np.array(want)
  np.testing.assert_array_equal(got[0], want if want.ndim == 2 else gray(want[None])[0])


def test_gray_with_a_transparent_value():
  for content in (
    stored(Image.fromarray(np.uint8([[5, 200]])), "PNG", transparency=5),
    odd.png16(np.uint16([[[5], [51400]]]), (b"tRNS", b"\0\5")),
  ):
    np.testing.assert_array_equal(load(content).image[0], [[255] * 3, [200] * 3])
  one_bit = stored(Image.fromarray(np.array([[False, True]])), "PNG", transparency=0)
  np.testing.assert_array_equal(load(one_bit, matte="red").image[0], [[255, 0, 0], [255] * 3])


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_a_transparent_gray_of_any_depth(bits, tmp_path):
  most = 2**bits - 1
  grays = np.array([[0, 1, most // 2, most]])
  for clear in grays[0]:
    content = odd.gray_png(grays, bits, clear)
    (tmp_path / "gray.png").write_bytes(content)
    want = gray(np.round(grays * 255 / most) if bits < 16 else grays >> 8)
    want[grays == clear] = (16, 32, 48)
    np.testing.assert_array_equal(load(content, matte="#102030").image, want)
    with Image.open(tmp_path / "gray.png") as image:
      for _ in range(2):
        np.testing.assert_array_equal(pictures.load(image, matte="#102030").image, want)


def test_opaque_images_say_nothing_of_transparency():
  image = Image.fromarray(UPPER)
  image.putalpha(255)
  picture = load(stored(image, "PNG"))
  np.testing.assert_array_equal(picture.image, UPPER)
  assert picture.notes == ()


@pytest.mark.parametrize(
  "matte",
  [
    "no color",
    "#12",
    (1, 2),
    (1, 2, 300),
    None,
    (1.0, 1.0, 1.0),
    "rgb(300,0,0)",
    (-1, 0, 0),
    "rgb",
  ],
)
def test_a_matte_that_is_no_color(matte):
  with pytest.raises(InputError, match=r"^matte=.*: expected the name of a color"):
    pictures.load(UPPER, matte=matte)


# Color


COLORS = np.uint8([[[255, 255, 255], [0, 0, 0], [128, 128, 128], [200, 100, 50], [30, 140, 60]]])


@pytest.mark.parametrize(("matrix", "gamma"), [(odd.ADOBE, 2.19921875), (odd.P3, 2.2)])
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "deep"])
def test_profiles_of_rgb(kind, matrix, gamma):
  profile = odd.rgb_profile(matrix, gamma)
  want = np.stack([odd.as_srgb(color, matrix, gamma) for color in COLORS[0]])
  if kind == "deep":
    iccp = b"x\0\0" + zlib.compress(profile)
    content = odd.png16(257 * COLORS.astype(np.uint16), (b"iCCP", iccp))
  else:
    content = stored(Image.fromarray(COLORS), kind, icc_profile=profile)
  picture = load(content)
  assert np.abs(picture.image[0] - want).max() <= 2 and np.abs(COLORS[0] - want).max() > 10
  assert "a test profile became sRGB" in picture.texts
  np.testing.assert_array_equal(load(content, profiles=False).image, COLORS)


@pytest.mark.parametrize("mode", ["L", "LA", "P"])
def test_a_profile_of_gray(mode):
  levels = Image.fromarray(np.arange(0, 256, 5, dtype=np.uint8)[None]).convert(mode)
  picture = load(stored(levels, "PNG", icc_profile=odd.gray_profile(1.8)))
  if mode == "P":  # whose colors are RGB
    assert picture.texts == ["its color profile cannot be used and is left out"]
  else:
    want = odd.encoded((np.arange(0, 256, 5) / 255) ** 1.8)
    assert np.abs(picture.image[0] - want[:, None]).max() <= 2


def test_a_profile_of_srgb_changes_no_value():
  profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
  picture = load(stored(Image.fromarray(UPPER), "PNG", icc_profile=profile))
  np.testing.assert_array_equal(picture.image, UPPER)
  assert picture.notes == ()


def test_profiles_of_cmyk():
  inks = np.uint8(
    [[[255 * (i >> shift & 1) for shift in (3, 2, 1, 0)] for i in (0, 8, 4, 2, 1, 12)]]
  )
  want = [odd.lab_as_srgb(odd.cmyk_lab(*(ink // 255))) for ink in inks[0]]
  image = Image.frombytes("CMYK", (6, 1), inks.tobytes())
  picture = load(stored(image, "TIFF", icc_profile=odd.cmyk_profile()))
  assert np.abs(picture.image[0] - np.array(want)).max() <= 3
  assert picture.texts == ["a test profile became sRGB"]
  plain = load(stored(image, "TIFF"))
  np.testing.assert_array_equal(plain.image[0, :4], 255 - inks[0, :4, :3])
  assert plain.texts == ["CMYK without a profile, whose colors are an estimate"]
  jpeg = load(stored(image.resize((96, 16), 0), "JPEG", quality=100, subsampling=0,
                     icc_profile=odd.cmyk_profile()))  # fmt: skip
  assert np.abs(jpeg.image[8, 8::16] - np.array(want)).max() <= 8


def test_lab():
  stored_lab = bytes([255, 0, 0, 0, 0, 0, 136, 80, 67])  # white, black, red
  content = stored(Image.frombytes("LAB", (3, 1), stored_lab), "TIFF")
  image = load(content).image[0].astype(int)
  want = [[255, 255, 255], [0, 0, 0], odd.lab_as_srgb((136 / 2.55, 80, 67))]
  assert np.abs(image - want).max() <= 4


@pytest.mark.parametrize("profile", [b"no profile", odd.cmyk_profile()])
def test_a_profile_that_cannot_be_used(profile):
  picture = load(stored(Image.fromarray(UPPER), "PNG", icc_profile=profile))
  np.testing.assert_array_equal(picture.image, UPPER)
  assert picture.texts == ["its color profile cannot be used and is left out"]


# EXIF


@pytest.mark.parametrize("orientation", SHOWN)
@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "AVIF", "HEIF", "png16", "tiff16"])
def test_turned_upright_once(kind, orientation):
  blocks = np.uint8([[250, 20, 130], [90, 200, 60]])
  values = gray(np.repeat(np.repeat(blocks, 32, 0), 32, 1))
  exif = Image.Exif()
  exif[0x0112] = orientation
  if kind == "png16":
    content = odd.png16(257 * values.astype(np.uint16), (b"eXIf", exif.tobytes()[6:]))
  elif kind == "tiff16":
    content = odd.tiff(257 * values.astype(np.uint16), orientation=orientation)
  elif kind == "HEIF":  # a transformation in the file itself, as phones write it
    heif = pillow_heif.from_pillow(Image.fromarray(values))
    heif.info["exif"] = exif.tobytes()
    file = io.BytesIO()
    heif.save(file, quality=95)
    content = file.getvalue()
  else:
    lossless = {"WEBP": {"lossless": True}, "AVIF": {"quality": 95}}.get(kind, {})
    content = stored(Image.fromarray(values), kind, exif=exif, **lossless)
  image = load(content).image
  want = SHOWN[orientation](values)
  assert image.shape == want.shape
  assert np.abs(image[16::32, 16::32].astype(int) - want[16::32, 16::32]).max() <= 4


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "JPEG"])
@pytest.mark.parametrize("told", [{}, {"dpi": (72, 72)}])  # else Pillow looks for it in EXIF data
def test_damaged_exif_data_turn_nothing(kind, told):
  image = Image.fromarray(UPPER)
  content = stored(image, kind, exif=b"Exif\0\0no data", **told)
  picture, right = load(content), load(stored(image, kind))
  np.testing.assert_array_equal(picture.image, right.image)
  assert picture.texts == ["its EXIF data cannot be read and are left out"] and not right.notes
  said = []
  pixels.for_classification(io.BytesIO(content), 8, told=lambda name, notes: said.extend(notes))
  assert (*said,) == picture.notes


# Arrays


def test_arrays():
  np.testing.assert_array_equal(pictures.read(UPPER), UPPER)
  np.testing.assert_array_equal(pictures.read(UPPER[..., 0]), gray(UPPER[..., 0]))
  np.testing.assert_array_equal(pictures.read(DEEP), UPPER)
  np.testing.assert_array_equal(pictures.read(UPPER / 255), UPPER)
  hidden = np.dstack([UPPER, np.zeros((5, 7), np.uint8)])
  for matte in ((1, 2, 3), [1, 2, 3], np.uint8([1, 2, 3]), "rgb(1,2,3)"):
    np.testing.assert_array_equal(pictures.read(hidden, matte=matte)[0, 0], [1, 2, 3])


@pytest.mark.parametrize(
  ("array", "how"),
  [
    (UPPER[None], r"take image\[0\]"),
    (UPPER[..., :1], r"take image\[..., 0\]"),
    (np.moveaxis(UPPER, -1, 0), r"np.moveaxis\(image, 0, -1\)"),
    (UPPER[..., :2], "gray, RGB or RGBA"),
    (UPPER[:0], "at least one pixel"),
    (UPPER[..., 0] > 3, "black and white"),
    (UPPER.astype(int), r"image.astype\(np.uint8\)"),
    (UPPER.astype(float), "its values are 0 to 255: image / 255"),
    (UPPER - 1.0, "its values are -1 to 254"),
    (np.full((2, 2), np.nan), "NaN"),
    (np.zeros((2, 201), np.uint8), "at most 100 times as long as wide"),
  ],
)
def test_other_arrays_are_refused_with_a_remedy(array, how):
  with pytest.raises(InputError, match=how) as error:
    pictures.read(array)
  assert "\n" not in str(error.value)
  with pytest.raises(InputError):
    pixels.for_classification(array, 8)


# What is said


@pytest.mark.parametrize(
  ("image", "said"),
  [
    (b"\x89PNG", "got bytes; io.BytesIO makes a file of the content"),
    (bytearray(3), "got bytearray; io.BytesIO"),
    ((x for x in [UPPER]), "got generator; several images are a list of them"),
    ([UPPER], "got list; several images"),
    (None, "got NoneType"),
    (3, "got int"),
  ],
)
def test_what_is_no_image_at_all(image, said):
  with pytest.raises(InputError) as error:
    pictures.load(image)
  assert str(error.value).startswith("expected an image as a path, ") and said in str(error.value)
  assert "\n" not in str(error.value)


def test_arrays_of_other_libraries():
  np.testing.assert_array_equal(pictures.load(jax.numpy.asarray(UPPER)).image, UPPER)
  floats = jax.numpy.asarray(UPPER, jax.numpy.float32) / 255
  np.testing.assert_array_equal(pictures.load(floats).image, UPPER)
  with pytest.raises(InputError, match=r"uint8, uint16 or float in 0 to 1, got .* int32"):
    pictures.load(jax.numpy.asarray(UPPER, jax.numpy.int32))
  for kind in (jax.numpy.bfloat16, jax.numpy.float8_e4m3fn):
    floats = jax.numpy.asarray(UPPER / 255, kind)
    with pytest.raises(InputError, match=r"float in 0 to 1, got .*; image.astype\(np.float32\)$"):
      pictures.load(floats)
    assert pictures.load(np.asarray(floats).astype(np.float32)).image.max() == 255


def test_each_kind_of_decision_is_told_once(capsys):
  told = pictures.Told()
  told("a.tif", load(odd.png16(NARROW)).notes)
  told("b.tif", load(odd.png16(NARROW + 5)).notes)
  told("c.gif", load(several("GIF")).notes)
  assert told.others == 1
  assert capsys.readouterr().out == (
    "a.tif: values 200 … 4008 of uint16 became 0 … 255\nc.gif: page 1 of 3 is taken (--page "
    "takes another)\n"
  )


def test_what_a_decoder_says_has_no_address_in_memory():
  png = stored(Image.effect_noise((64, 64), 50), "PNG")
  for content, said in [
    (b"no image", "no known image format; open"),
    (png[:2000], r"OSError \("),
  ]:
    with pytest.raises(InputError, match=rf"^the image: expected a readable .*, got .*{said}") as e:
      load(content)
    assert "0x" not in str(e.value)


def test_drawings_that_are_programs_are_not_run():
  content = stored(Image.new("RGB", (4, 4)), "EPS")
  with pytest.raises(InputError, match=r"expected an image of pixels, got a drawing \(EPS\)"):
    load(content)


# Classification


def test_classification_takes_what_openai_s_code_does_not():
  """More than eight bits; what it takes is in tests/tasks/test_classify.py."""
  want = pixels.for_classification(UPPER, 5)
  for content in (odd.png16(DEEP), odd.tiff(DEEP)):
    np.testing.assert_array_equal(pixels.for_classification(io.BytesIO(content), 5), want)
  lab = stored(Image.frombytes("LAB", (3, 3), bytes([136, 80, 67] * 9)), "TIFF")
  image = pixels.for_classification(io.BytesIO(lab), 3) * pixels.CLIP_STD + pixels.CLIP_MEAN
  np.testing.assert_allclose(255 * image[0, 0], odd.lab_as_srgb((136 / 2.55, 80, 67)), atol=4)
