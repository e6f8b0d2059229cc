"""Reading an image, the same for prediction, the page, preparation and notebooks.

Whatever Pillow reads, HEIC by an optional package, and more than 8 bits per channel of PNG, TIFF,
PPM and JPEG 2000; upright, in sRGB, without transparency. What had to be decided is told.
"""

import contextlib
import dataclasses
import importlib
import io
import numbers
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from rpn_jax.base import buckets, colors, deep_images, exif, paths, tiff_tags
from rpn_jax.base.colors import Color, Note
from rpn_jax.base.errors import InputError

# Argument of `read`.
ImageSource = str | os.PathLike | BinaryIO | Image.Image | np.ndarray
# 20,000 x 10,000, for images and masks. Larger ones are rejected before decoding, which would fill
# the memory (600 MB at three bytes per pixel; Pillow's own limit only warns).
MAX_PIXELS = 200_000_000
# Ratio of long to short side: images are resized by their short side.
MAX_ASPECT = 100
# Keeps Pillow from warning about allowed images; it raises an error at twice its limit.
Image.MAX_IMAGE_PIXELS = MAX_PIXELS
# What a HEIC file has at byte 8.
_HEIC = (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"hevm", b"hevs", b"mif1", b"msf1")


@dataclasses.dataclass(frozen=True)
class Picture:
  """An image that was read.

  Attributes:
    image: uint8 (H, W, 3), sRGB.
    notes: what had to be decided: kinds, and clauses for people.
    format: of the file, by Pillow's names; "" for arrays.
    mode: of the file, by Pillow's names; "" where it has none of them.
    orientation: the EXIF field; 2 to 8 turn or mirror the stored pixels.
    stored_size: (height, width) of the stored pixels.
    page: of a file with several pages or frames, from 1; 0 of others.
  """

  image: np.ndarray
  notes: tuple[Note, ...] = ()
  format: str = ""
  mode: str = ""
  orientation: int = 1
  stored_size: tuple[int, int] = (0, 0)
  page: int = 0

  @property
  def texts(self) -> list[str]:
    """The clauses of the notes."""
    return [text for _, text in self.notes]


class Told:
  """Prints what was decided about images, each kind of decision once.

  Attributes:
    others: number of images about which something was decided, and nothing printed.
  """

  def __init__(self) -> None:
    self._kinds: set[str] = set()
    self.others = 0

  def __call__(self, name: object, notes: Sequence[Note]) -> None:
    texts = [text for kind, text in notes if kind not in self._kinds]
    self._kinds |= {kind for kind, _ in notes}
    if texts:
      print(f"{name}: {'; '.join(texts)}", flush=True)
    elif notes:
      self.others += 1


def read(image: ImageSource, *, matte: str | Color = "white") -> np.ndarray:
  """An image as uint8 (H, W, 3), as `load` reads it; what had to be decided is printed."""
  picture = load(image, matte=matte)
  Told()(_name_of(image), picture.notes)
  return picture.image


def load(
  image: ImageSource,
  *,
  page: int | None = None,
  matte: str | Color = "white",
  max_pixels: int = MAX_PIXELS,
  profiles: bool = True,
  upright: bool = True,
  name: object = None,
) -> Picture:
  """An image as uint8 RGB, and what had to be decided about it.

  Args:
    image: a path, an open binary file, a PIL image, or an array of NumPy or of what NumPy takes for
      one, as JAX's: (H, W), (H, W, 3) or (H, W, 4), uint8, uint16 or float in 0 … 1.
    page: of a file with several pages or frames, from 1; None takes the one that viewers show, and
      says so.
    matte: the color that transparent pixels lie on: a name, "#rrggbb" or (red, green, blue).
    max_pixels: of width times height.
    profiles: turn colors into sRGB by the file's ICC profile.
    upright: turn the stored pixels as EXIF data says; a TIFF always is.
    name: what errors call the image; None for that of its file.

  Raises:
    InputError: not an image, damaged, too elongated, more than `max_pixels` pixels, no such page,
      or values that are not understood.
  """
  color = colors.parse_matte(matte)
  image = _checked_source(image)
  if isinstance(image, np.ndarray):
    if page not in (None, 1):
      raise InputError(f"page={page}: an array is one image; leave it out")
    values = checked_array(image, max_pixels)
    rgb, notes = colors.values_to_rgb(values, "the image", matte=color)
    # That 1 is white is what floats are expected to mean.
    told = [note for note in notes if values.dtype.kind != "f" or note[0] != "range"]
    return Picture(rgb, tuple(told), stored_size=rgb.shape[:2])
  with opened(image, page, max_pixels, name) as file:
    return converted(file, color, profiles=profiles, upright=upright)


def _checked_source(image: Any) -> ImageSource:
  """What `load` takes, arrays of other libraries as NumPy's; raises an InputError for the rest."""
  if isinstance(image, str | os.PathLike | Image.Image | np.ndarray) or hasattr(image, "read"):
    return image
  if hasattr(image, "__array__"):
    return np.asarray(image)
  remedy = ""
  if isinstance(image, bytes | bytearray | memoryview):
    remedy = "; io.BytesIO makes a file of the content of one"
  elif isinstance(image, Iterable):
    remedy = "; several images are a list of them, or for Segmenter.stream"
  raise InputError(
    "expected an image as a path, an open binary file, a PIL image or an array, got "
    f"{type(image).__name__}{remedy}"
  )


def converted(
  file: "Opened", matte: Color, *, profiles: bool = True, upright: bool = True
) -> Picture:
  """The image of an opened file; see `load`."""
  if file.format == "PNG" and file.values is None:
    colors.load_png(file.pillow)  # the EXIF data may stand behind the pixels, and load them
  orientation, notes = file.orientation, (*file.notes, *exif.notes(file.image))
  if file.values is None:
    image = file.pillow
    image.load()  # which turns a TIFF
    size, tags = image.size[::-1], getattr(image, "tag_v2", {})
    image = exif.upright(image) if upright else image
    rgb, more = colors.to_rgb(image, file.name, matte=matte, profiles=profiles, tags=tags)
  else:
    profile = file.profile if profiles else None
    rgb, more = colors.values_to_rgb(file.values, file.name, matte=matte, profile=profile)
    size = rgb.shape[:2]
    if upright and orientation in exif.TURNS and file.format == "PNG":  # OpenCV turns a TIFF
      rgb = np.ascontiguousarray(exif.TURNS[orientation](rgb))
  return Picture(rgb, (*notes, *more), file.format, file.mode, orientation, size, file.page)


@dataclasses.dataclass
class Opened:
  """A file at one of its pages, not yet converted.

  Attributes:
    name: for errors.
    image: Pillow's; None where Pillow cannot open the file.
    values: of more than 8 bits, where Pillow would lose them; else None.
    profile: ICC profile that belongs to `values`.
    format: by Pillow's names.
    notes: what had to be decided.
    page: see `Picture`.
  """

  name: object
  image: Image.Image | None
  values: np.ndarray | None = None
  profile: bytes | None = None
  format: str = ""
  notes: tuple[Note, ...] = ()
  page: int = 0

  @property
  def pillow(self) -> Image.Image:
    """Pillow's image, where there are no `values`."""
    assert self.image is not None
    return self.image

  @property
  def mode(self) -> str:
    """By Pillow's names; "" if it lacks bits or there is none."""
    return "" if self.image is None or self.values is not None else self.image.mode

  @property
  def orientation(self) -> int:
    """The EXIF field; 1 is upright."""
    return 1 if self.image is None else exif.orientation(self.image)


@contextlib.contextmanager
def opened(
  image: str | os.PathLike | BinaryIO | Image.Image,
  page: int | None = None,
  max_pixels: int = MAX_PIXELS,
  name: object = None,
) -> Iterator[Opened]:
  """Opens an image at a page; whatever is raised meanwhile is told as damage of the file.

  Raises:
    InputError: see `load`.
  """
  name = name or _name_of(image)
  with contextlib.ExitStack() as stack:
    try:
      if isinstance(image, Image.Image):
        notes, shown = _turn_to(image, page, name)
        check_size(name, image.size, max_pixels)
        yield Opened(name, image, format=image.format or "", notes=notes, page=shown)
      else:
        stream = _stream(image) if isinstance(image, (str, os.PathLike)) else image
        if stream is not image:
          stack.enter_context(stream)
        elif not stream.seekable():  # as of a web server
          stream = io.BytesIO(stream.read())
        yield _open(stream, name, page, max_pixels, stack)
    except FileNotFoundError:
      raise InputError(f"{name}: expected an image, no such file") from None
    except InputError:
      raise
    except Exception as error:  # damaged files raise all kinds of errors
      raise InputError(
        f"{name}: expected a readable image, got {damage(error)}; open it in a viewer to see "
        "whether it is damaged"
      ) from error


def _stream(path: str | os.PathLike) -> BinaryIO:
  found = paths.expand(path)
  return io.BytesIO(buckets.read(found)) if buckets.is_bucket(found) else open(found, "rb")


def _name_of(image: ImageSource) -> object:
  if isinstance(image, (str, os.PathLike)):
    return image
  # Open files may have no name.
  return "the image" if isinstance(image, (Image.Image, np.ndarray)) else (
    getattr(image, "name", None) or "the image"
  )  # fmt: skip


def _open(
  stream: BinaryIO, name: object, page: int | None, max_pixels: int, stack: contextlib.ExitStack
) -> Opened:
  stream.seek(0)  # of a stream that was just written, the end is its place
  begin = stream.read(1 << 14)
  is_tiff = begin[:4] in deep_images.TIFF_STARTS
  if begin[4:8] == b"ftyp" and begin[8:12] in _HEIC:
    _prepare_for_heic(name)
  if is_tiff:
    tiff_tags.check_whole(stream, name)
  stream.seek(0)
  try:
    file = stack.enter_context(Image.open(stream))
  except UnidentifiedImageError:
    if begin.startswith(b"\xff\xd8\xff"):
      raise InputError(
        f"{name}: expected a JPEG of 8 bits, got one of 12 bits, without loss, or damaged; save it "
        "as PNG"
      ) from None
    if not is_tiff:
      raise
    file = None
  if file is None:
    return _deep_tiff(stream, name, None, page, max_pixels)
  if file.format == "EPS":  # a program, which Ghostscript would run
    raise InputError(f"{name}: expected an image of pixels, got a drawing (EPS); save it as PNG")
  notes, shown = _turn_to(file, page, name)
  check_size(name, file.size, max_pixels)
  if is_tiff and file.mode not in ("I", "F") and not file.mode.startswith("I;16"):
    tags = getattr(file, "tag_v2", {})
    if max(tags.get(258, (1,))) > 8 and not (file.mode == "CMYK" and tags.get(284, 1) == 1):
      return _deep_tiff(stream, name, file, file.tell() + 1, max_pixels, notes)
  deep_images.check_is_read(file, begin, name)
  if file.format in ("PPM", "JPEG2000"):
    bits, most = deep_images.stored_bits(file, stream, name)
    if bits > 8 and file.mode in ("RGB", "RGBA"):
      stream.seek(0)
      values = deep_images.read_like(file, stream.read(), most, name)
      return Opened(name, file, values, format=file.format)
  animated = getattr(file, "n_frames", 1) > 1  # of which OpenCV gives the first frame
  if deep_images.is_deep_png(begin) and not file.mode.startswith("I") and not animated:
    file.load()  # tells of damage, of which OpenCV prints a line
    stream.seek(0)
    values = deep_images.read_png(stream.read())
    if values.shape[:2] != file.size[::-1]:
      raise ValueError(f"values of {values.shape}")
    return Opened(name, file, values, file.info.get("icc_profile"), "PNG", notes)
  if (bits := deep_images.bits_told(file, begin)) > 8:
    notes = (*notes, ("depth", f"{bits} bits became 8"))
  return Opened(name, file, format=file.format or "", notes=notes, page=shown)


def _deep_tiff(
  stream: BinaryIO,
  name: object,
  file: Image.Image | None,
  page: int | None,
  max_pixels: int,
  notes: tuple[Note, ...] | None = None,
) -> Opened:
  """A TIFF of more than 8 bits per channel, which Pillow may not have opened."""
  stream.seek(0)
  data = stream.read()
  tiff = deep_images.Tiff(data, (page or 1) - 1)
  if notes is None:
    notes = _page_note(tiff.pages, page, 1, name)
  check_size(name, tiff.size, max_pixels)
  tiff.check(name, max_pixels)
  shown = (page or 1) if tiff.pages > 1 else 0
  return Opened(name, file, tiff.read(), tiff.profile, "TIFF", notes, shown)


def _turn_to(file: Image.Image, page: int | None, name: object) -> tuple[tuple[Note, ...], int]:
  """Goes to a page, from 1; without one says which of several it is. Also gives `Picture.page`."""
  pages = getattr(file, "n_frames", 1)
  notes = _page_note(pages, page, file.tell() + 1, name)
  if page is not None and page != file.tell() + 1:
    file.seek(page - 1)
  return notes, file.tell() + 1 if pages > 1 else 0


def _page_note(pages: int, page: int | None, shown: int, name: object) -> tuple[Note, ...]:
  if page is None:
    return (
      (("page", f"page {shown} of {pages} is taken (--page takes another)"),) if pages > 1 else ()
    )
  if not isinstance(page, numbers.Integral) or not 1 <= page <= pages:
    has = "one page" if pages == 1 else f"{pages} pages"
    raise InputError(f"{name}: expected page 1 to {pages}, got {page}; the file has {has}")
  return ()


def _prepare_for_heic(name: object) -> None:
  """Lets Pillow open HEIC.

  Raises:
    InputError: the package for it is missing.
  """
  try:
    importlib.import_module("pillow_heif").register_heif_opener()
  except ImportError:
    raise InputError(
      f"{name}: expected the package pillow-heif for HEIC images: pip install pillow-heif==1.8.1, "
      "or save the image as JPEG"
    ) from None


def damage(error: Exception) -> str:
  """What a decoder has said of a file, in one line and without an address in memory."""
  if isinstance(error, UnidentifiedImageError):
    return "no known image format"
  return f"{type(error).__name__} ({' '.join(str(error).split())})"


def check_size(where: object, size: tuple[int, int], max_pixels: int = MAX_PIXELS) -> None:
  """Checks the (width, height) of an image before it is decoded.

  Raises:
    InputError: no pixels, too many, or too elongated.
  """
  width, height = size
  if not 0 < width * height <= max_pixels:
    raise InputError(
      f"{where}: expected at most {max_pixels:,} pixels, got {width} x {height}; "
      "make the image smaller"
    )
  if max(size) > MAX_ASPECT * min(size):
    raise InputError(
      f"{where}: expected an image at most {MAX_ASPECT} times as long as wide, got "
      f"{width} x {height}; crop it"
    )


def checked_array(image: np.ndarray, max_pixels: int = MAX_PIXELS) -> np.ndarray:
  """The array, if it is an image.

  Raises:
    InputError: another shape or type, or floats outside of 0 … 1.
  """
  remedy = ""
  if image.ndim == 4 and len(image) == 1:
    remedy = "take image[0]"
  elif image.ndim == 3 and image.shape[2] == 1:
    remedy = "take image[..., 0]"
  elif image.ndim == 3 and image.shape[2] not in (3, 4) and image.shape[0] in (1, 3, 4):
    remedy = "channels come last: np.moveaxis(image, 0, -1)"
  elif image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] not in (3, 4)):
    remedy = "give one image of gray, RGB or RGBA"
  elif not image.size:
    remedy = "give at least one pixel"
  elif image.dtype == bool:
    remedy = "np.uint8(255) * image makes it black and white"
  elif image.dtype.kind != "f" and "float" in image.dtype.name:  # bfloat16, of another library
    remedy = "image.astype(np.float32)"
  elif image.dtype not in (np.uint8, np.uint16) and image.dtype.kind != "f":
    remedy = "image.astype(np.uint8), if its values are 0 to 255"
  elif image.dtype.kind == "f" and not np.isfinite(image).all():
    remedy = "it has NaN or infinite values: np.nan_to_num(image)"
  elif image.dtype.kind == "f" and not (image.min() >= 0 and image.max() <= 1):
    remedy = (
      f"its values are {image.min():.6g} to {image.max():.6g}: image / 255 or "
      "(image - image.min()) / np.ptp(image)"
    )
  if remedy:
    raise InputError(
      "expected an image array (H, W), (H, W, 3) or (H, W, 4) of uint8, uint16 or float in 0 to 1, "
      f"got {image.shape} {image.dtype}; {remedy}"
    )
  check_size("the image", image.shape[1::-1], max_pixels)
  return image
