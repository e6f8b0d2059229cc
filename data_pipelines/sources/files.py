"""Raw files that the builders share: folders, lists of names, label images of class ids."""

import contextlib
import pathlib
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from PIL import Image

from data_pipelines.vocabularies import IGNORE
from rpn_jax.base import exif
from rpn_jax.base.errors import InputError
from rpn_jax.base.picture_files import list_images
from rpn_jax.base.pictures import check_size
from rpn_jax.base.words import read_text

# What label files may be, by Pillow's names. The others lose values, scale them or may do so: a
# JPEG of a mask has classes along the edges of others that nobody drew.
_LOSSLESS = ("PNG", "BMP", "GIF", "TIFF")
COLORS_REMEDY = "store class ids, not colors"
# A mask of more colors shows no classes.
MAX_COLORS = 256
_SHOWN_COLORS = 6
_RARE = 1e-3  # share of the pixels; most colors of smoothed edges have less
_UNLISTED = 65534  # no label of a table of colors
_LOSSY_IN_TIFF = ("jpeg", "tiff_jpeg", "webp")


def require(path: pathlib.Path, what: str, obtain: str) -> pathlib.Path:
  """The path, if it exists.

  Raises:
    InputError: it does not; names it, what it is for and where to get it.
  """
  if not path.exists():
    raise InputError(f"{path}: expected {what}, got no such file or folder; {obtain}")
  return path


def list_files(
  folder: pathlib.Path, suffixes: Sequence[str], what: str, obtain: str
) -> list[pathlib.Path]:
  """The folder's image files with one of the suffixes; see `picture_files.list_images`.

  Raises:
    InputError: no such folder, or none of these files in it.
  """
  require(folder, what, obtain)
  files = list_images(folder, suffixes=suffixes)
  if not files:
    raise InputError(f"{folder}: expected {what}, got no {' or '.join(suffixes)} file; {obtain}")
  return files


def read_lines(path: pathlib.Path, what: str) -> list[str]:
  """The lines of a text file without surrounding blanks; see `words.read_text`.

  Raises:
    InputError: no text in UTF-8, or far too much of it.
  """
  return [line.strip() for line in read_text(path, what).splitlines()]


@contextlib.contextmanager
def open_label(path: pathlib.Path) -> Iterator[Image.Image]:
  """A label image, turned upright as its own EXIF data says; hardly any label has such data.

  Raises:
    InputError: more pixels than allowed, or a format that does not keep values.
  """
  with Image.open(path) as file:
    check_size(path, file.size)
    check_label_format(path, file)
    yield exif.upright(file)


def check_label_format(where: object, file: Image.Image) -> None:
  """Checks that an opened label file, whatever its name, holds the values that were stored.

  Raises:
    InputError: a lossy or unknown format, several images in one file, or two or four bits per
      pixel, which Pillow scales to 0…255.
  """
  kind, compression = file.format, file.info.get("compression")
  if kind not in _LOSSLESS or compression in _LOSSY_IN_TIFF:
    got = f"{kind} with {compression} compression" if kind in _LOSSLESS else kind
    raise InputError(
      f"{where}: expected a label file without loss ({', '.join(_LOSSLESS)}), got {got}, which may "
      "change class ids; save the masks as PNG from where they were drawn: converting this file "
      "keeps its wrong pixels"
    )
  if (count := getattr(file, "n_frames", 1)) > 1:
    raise InputError(
      f"{where}: expected one label image in the file, got {count}; save each image's own as PNG"
    )
  for _, _, _, arguments in file.tile:
    rawmode = arguments if isinstance(arguments, str) else str((arguments or ("",))[0])
    if rawmode.startswith(("L;2", "L;4")):
      raise InputError(
        f"{where}: expected gray values of 1, 8 or 16 bits, got {rawmode[2]} bits, which some "
        "programs read as they are and others scaled to 0…255; save the mask with 8 bits"
      )


def read_index_image(
  path: pathlib.Path, colors: "Colors | None" = None, remedy: str = COLORS_REMEDY
) -> np.ndarray:
  """An image whose pixels are ids, uint8 or uint16 [H,W]; of a palette image its indices.

  Args:
    path: of the file.
    colors: of the set's palettes, to compare this one's with.
    remedy: what to do about a color image.

  Raises:
    InputError: a color image, with the colors in it, transparent pixels, ids that are no integers
      of 16 bits, or a palette of grays that are other ids.
  """
  with open_label(path) as file:
    if file.mode not in ("L", "P", "1", "I;16", "I;16B", "I", "F"):
      return _grays(path, file, remedy)
    label_HxW = np.array(file)
    if file.mode == "P":
      palette_Cx3 = np.reshape(file.getpalette() or [], (-1, 3))
      used = np.flatnonzero(np.bincount(label_HxW.ravel(), minlength=256)[: len(palette_Cx3)])
      _check_gray_palette(path, palette_Cx3, used)
      if colors is not None:
        colors.compare(path, {i: tuple(palette_Cx3[i].tolist()) for i in used.tolist()})
  if label_HxW.dtype in (np.int32, np.float32):
    low, high = label_HxW.min(initial=0), label_HxW.max(initial=0)
    if not (low >= 0 and high <= 65535):  # not a number is neither
      raise InputError(f"{path}: expected ids 0…65535, got {low}…{high}; save class ids")
    if broken := np.flatnonzero(label_HxW % 1).size:
      raise InputError(
        f"{path}: expected class ids, got numbers that are no integers on {broken:,} pixels, "
        f"{low:g}…{high:g}; save class ids, not scores or scaled values"
      )
  return label_HxW.astype(np.uint8 if label_HxW.dtype in (np.uint8, bool) else np.uint16)


def _check_gray_palette(path: pathlib.Path, palette_Cx3: np.ndarray, used: np.ndarray) -> None:
  """Refuses a palette of grays other than their indices, since either may be the ids.

  Programs that make a gray image smaller number its grays anew, and so does Pillow in a GIF.
  """
  other = used[palette_Cx3[used, 0] != used]
  if len(other) and (palette_Cx3 == palette_Cx3[:, :1]).all():
    raise InputError(
      f"{path}: expected class ids, got a palette of grays whose index {other[0]} is gray "
      f"{palette_Cx3[other[0], 0]}, and either may be the id; save the mask as a gray PNG of ids"
    )


def _grays(path: pathlib.Path, file: Image.Image, remedy: str) -> np.ndarray:
  """uint8 [H,W] of an image of several channels that all have the same values."""
  rgb_HxWx3 = _opaque(path, file)
  if (rgb_HxWx3 == rgb_HxWx3[..., :1]).all():
    return rgb_HxWx3[..., 0].copy()
  codes, counts = np.unique(_codes(rgb_HxWx3), return_counts=True)
  rare = int((counts < _RARE * counts.sum()).sum())
  if len(codes) > MAX_COLORS or rare > 4 * (len(codes) - rare):
    raise InputError(
      f"{path}: expected class ids, got {len(codes):,} colors: a mask with smoothed edges, one "
      "that was once a JPEG, or a photograph; export the masks anew as PNG, without smoothing"
    )
  order = np.argsort(-counts, kind="stable")[:_SHOWN_COLORS]
  shares = [f"{_rgb(codes[i])} ({counts[i] / counts.sum():.1%})" for i in order]
  more = ", …" * (len(codes) > _SHOWN_COLORS)
  raise InputError(
    f"{path}: expected class ids, got {len(codes)} colors: {', '.join(shares)}{more}; {remedy}"
  )


def is_colored(path: pathlib.Path) -> bool:
  """Whether the pixels of a label file are colors that are not all gray, and no indices."""
  with open_label(path) as file:
    if "RGB" not in file.mode:
      return False
    rgb_HxWx3 = _opaque(path, file)
  return not (rgb_HxWx3 == rgb_HxWx3[..., :1]).all()


def _opaque(path: pathlib.Path, file: Image.Image) -> np.ndarray:
  """uint8 [H,W,3] of an image of any mode whose alpha channel, if there is one, hides nothing."""
  if file.mode in ("LA", "PA", "RGBA", "La", "RGBa"):
    hidden = int((np.array(file.getchannel(len(file.getbands()) - 1)) < 255).sum())
    if hidden:
      raise InputError(
        f"{path}: expected a mask without transparency, got {hidden:,} transparent pixels, whose "
        "values may mean anything; save the mask without an alpha channel, with all of its values"
      )
  elif file.mode not in ("1", "L", "P", "RGB"):
    raise InputError(
      f"{path}: expected a label image of one channel (gray or palette) or of RGB colors, got mode "
      f"{file.mode}; save it as PNG"
    )
  return np.array(file.convert("RGB"))


def read_colors(path: pathlib.Path) -> np.ndarray:
  """The colors of a label image, red · 2¹⁶ + green · 2⁸ + blue, int32 [H,W].

  Raises:
    InputError: a format that loses values, or transparent pixels.
  """
  with open_label(path) as file:
    return _codes(_opaque(path, file))


def _codes(rgb_HxWx3: np.ndarray) -> np.ndarray:
  """A number for every color, int32 [H,W]."""
  red, green, blue = np.moveaxis(rgb_HxWx3.astype(np.int32), -1, 0)
  return red << 16 | green << 8 | blue


def _rgb(code: int) -> str:
  return f"{code >> 16},{code >> 8 & 255},{code & 255}"


class ColorTable:
  """Masks whose pixels have the colors of their classes.

  Args:
    labels: color (red, green, blue) -> label.
    where: the file that has the colors, for messages.
  """

  def __init__(self, labels: Mapping[tuple[int, int, int], int], where: pathlib.Path):
    self._where = where
    self._labels = np.full(1 << 24, _UNLISTED, np.uint16)
    for (red, green, blue), label in labels.items():
      self._labels[red << 16 | green << 8 | blue] = label

  def read(self, path: pathlib.Path) -> np.ndarray:
    """The labels of an image of colors, gray or palette, uint16 [H,W].

    Raises:
      InputError: colors that are not in the table, or transparent pixels.
    """
    codes = read_colors(path)
    label_HxW = self._labels[codes]
    unlisted, counts = np.unique(codes[label_HxW == _UNLISTED], return_counts=True)
    if len(unlisted):
      raise InputError(
        f"{path}: expected colors of {self._where.name}, got others, such as "
        f"{_rgb(unlisted[counts.argmax()])}, {len(unlisted):,} in all, on {counts.sum():,} of "
        f"{codes.size:,} pixels; write their classes there, or, if they are along edges, export "
        "the masks without smoothing"
      )
    return label_HxW


class Colors:
  """The colors of the label values in a set's palettes, which should be the same in every file.

  Where they differ, the masks may have been reduced to palettes one by one, and a value then stands
  for another class in every file. That is said once, not refused: colors alone decide nothing.
  """

  def __init__(self):
    self._first: dict[int, tuple[tuple[int, ...], pathlib.Path]] = {}
    self._told = False

  def compare(self, path: pathlib.Path, colors: dict[int, tuple[int, ...]]) -> None:
    """Compares the colors of the values in a file with those of the files before."""
    for value, color in colors.items():
      known, file = self._first.setdefault(value, (color, path))
      if color != known and value != IGNORE and not self._told:
        self._told = True
        print(
          f"label {value} has the color {known} in {file} and {color} in {path}: if the palettes "
          "were made one by one, the ids mean nothing; compare the masks in preview.png",
          flush=True,
        )
