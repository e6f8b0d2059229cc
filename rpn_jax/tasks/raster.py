"""Rasters into the classes you name: GeoTIFF in strips, written back with the same georeference.

rasterio, which has GDAL in it, is an optional dependency.
"""

from __future__ import annotations

import contextlib
import math
import pathlib
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from rpn_jax.base import exif, pictures, tiff_tags
from rpn_jax.base.console import progress
from rpn_jax.base.errors import InputError
from rpn_jax.base.origins import FIELD, Origin
from rpn_jax.base.paths import expand_local, replacing, write_json, write_text
from rpn_jax.devices import devices_text
from rpn_jax.drawing.images import MAX_OVERLAY_SIDE, no_class_id, overlay_with_legend, save_png
from rpn_jax.drawing.palette import HATCH, class_colors
from rpn_jax.inference import strips
from rpn_jax.inference.segmenter import Segmenter

if TYPE_CHECKING:
  import rasterio

SUFFIXES = (".tif", ".tiff")
# Tags of TIFF by which a file has a place on earth: scale, tie points, matrix, keys.
GEO_TAGS = (33550, 33922, 34264, 34735)
WIDTH_TAG, HEIGHT_TAG, ORIENTATION_TAG = 256, 257, 274
# Values of an overview that become black and white, where there are more than 8 bits.
PERCENTILES = (2, 98)
# What GDAL may keep of decoded tiles, bytes: a row of them, which overlapping windows read again.
CACHE_BYTES = 256 << 20
# Side of the tiles of written files, pixels; it divides the sides of blocks.
TILE = 256
MAX_SCALE = 4


def is_raster(path: pathlib.Path, asked: bool | None = None) -> bool:
  """Whether a file is segmented in strips, as a raster.

  A TIFF that says where on earth it is, or that is too large to be one image; or as asked for. Only
  the beginning of the file is read, without rasterio.
  """
  if asked is not None or path.suffix.lower() not in SUFFIXES:
    return bool(asked)
  try:
    tags = tiff_tags.first_page(path)
    if any(tag in tags for tag in GEO_TAGS):
      return True
    return int(tags[WIDTH_TAG]) * int(tags[HEIGHT_TAG]) > pictures.MAX_PIXELS
  except Exception:  # who reads it as an image says what is wrong with it
    return False


def _orientation(path: pathlib.Path) -> int:
  """What a file says of how its rows are shown, which GDAL passes over; 1 is as they are stored."""
  with contextlib.suppress(Exception):
    return int(tiff_tags.first_page(path).get(ORIENTATION_TAG, 1))
  with contextlib.suppress(Exception), warnings.catch_warnings():
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # nothing is decoded
    with Image.open(path) as file:
      return exif.orientation(file)
  return 1  # who opens it as a raster says what is wrong with it


def _rasterio(path: pathlib.Path) -> Any:
  try:
    import rasterio
  except ImportError:
    raise InputError(
      f"{path}: expected the package rasterio, which reads rasters in strips, and it is not "
      "installed: pip install rasterio==1.4.4; --no-raster takes the file for an ordinary image"
    ) from None
  return rasterio


class Raster:
  """A file that GDAL reads, as rows of RGB at some resolution.

  Attributes:
    path: of the file.
    dataset: of rasterio.
    bands: numbers of the bands for red, green and blue, from 1.
    limits: (3, 2) values that become 0 and 255; None where the values are bytes.
    scale: factor of the resolution.
    size: (height, width) at which it is segmented.
    transform: from pixels of that size to the coordinates of the raster, affine.
    overview: uint8 RGB of `overview_size`, with a long side of MAX_OVERLAY_SIDE at most.

  Args:
    path: see above.
    bands: "4,3,2", or one band for all three; None: the file's red, green and blue, else the first
      three, else the first.
    limits: "0,3000": what becomes black and white; None: PERCENTILES of the overview, of each band.
    scale: factor of the resolution; None is 1.

  Raises:
    InputError: rasterio is missing, no such file, one that viewers turn or mirror, or an argument
      that does not fit.
  """

  def __init__(
    self,
    path: pathlib.Path,
    *,
    bands: str | None = None,
    limits: str | None = None,
    scale: float | None = None,
  ):
    self.path = expand_local(path, "a raster")
    self._package = _rasterio(self.path)
    if not self.path.is_file():
      raise InputError(f"{path}: expected a raster, no such file")
    if 2 <= (orientation := _orientation(self.path)) <= 8:
      raise InputError(
        f"{path}: expected a raster that is shown as it is stored, got orientation {orientation}, "
        "by which viewers turn or mirror it: --no-raster segments it upright, as an image; if its "
        f"place on earth counts, remove that field: exiftool -n -Orientation=1 {self.path.name}"
      )
    with self._one_line():
      self.dataset = self._open(self.path)
    if not self.dataset.count:
      parts = self.dataset.subdatasets
      raise InputError(
        f"{path}: expected a raster with bands of its own, got a file of {len(parts)} others: make "
        f"a raster of one, gdal_translate NAME one.tif: {', '.join(parts)}"
      )
    self.scale = 1.0 if scale is None else scale
    if not 0 < self.scale <= MAX_SCALE:
      raise InputError(f"--scale: expected a factor above 0, up to {MAX_SCALE}, got {scale}")
    height, width = (max(1, round(side * self.scale)) for side in self.dataset.shape)
    self.size = height, width
    t, x, y = self.dataset.transform, self.dataset.width / width, self.dataset.height / height
    self.transform = type(t)(t.a * x, t.b * y, t.c, t.d * x, t.e * y, t.f)
    self.bands = self._chosen(bands)
    # By GDAL's names, which NumPy does not know all.
    self._kinds = {self.dataset.dtypes[band - 1] for band in self.bands}
    if not all(kind.startswith(("uint", "int", "float")) for kind in self._kinds):
      kinds = ", ".join(sorted(self._kinds))
      raise InputError(f"{path}: expected bands of integers or real numbers, got {kinds}")
    if any(self.dataset.colorinterp[band - 1].name == "palette" for band in self.bands):
      raise InputError(
        f"{path}: expected bands of colors, got a palette, as of a map of classes; make colors of "
        "it: gdal_translate -expand rgb"
      )
    step = max(1.0, max(self.size) / MAX_OVERLAY_SIDE)
    self.overview_size = math.ceil(height / step), math.ceil(width / step)
    values, valid = self._read_overview(step)
    self.limits, self._rule = self._limits(limits, values, valid)
    self.overview = self._rgb(values, valid)

  def describe(self) -> str:
    """A line about bands and values."""
    height, width = self.dataset.shape
    if len(set(self.bands)) == 1:
      colors = f"band {self.bands[0]} as gray"
    else:
      colors = f"bands {', '.join(map(str, self.bands))} as red, green and blue"
    text = f"{self.path}: {width:,} x {height:,} pixels, {colors}"
    if self.limits is None:
      return f"{text}, bytes as they are"
    ranges = [f"{low:g} to {high:g}" for low, high in self.limits]
    ranges = ranges[:1] if len(set(ranges)) == 1 else ranges
    return f"{text}; black to white, for the whole raster: {', '.join(ranges)} ({self._rule})"

  def rows(self, top: int, count: int) -> np.ndarray:
    """Some rows, (count, width, 3) uint8; black where there are no data."""
    size = count, self.size[1]
    return self._rgb(*self._read(top, 0, size, size))

  def valid(self, top: int, left: int, size: tuple[int, int]) -> np.ndarray:
    """Where a block of (height, width) has data, bool."""
    return self._read(top, left, size, size)[1]

  def _open(self, *arguments: Any, **options: Any) -> Any:
    with warnings.catch_warnings():
      # No news to who asks for it.
      warnings.simplefilter("ignore", self._package.errors.NotGeoreferencedWarning)
      return self._package.open(*arguments, **options)

  @contextlib.contextmanager
  def _one_line(self) -> Iterator[None]:
    try:
      with self._package.Env(GDAL_CACHEMAX=CACHE_BYTES):
        yield
    except self._package.errors.RasterioError as error:
      told = " ".join(str(error.__cause__ or error).split())
      raise InputError(
        f"{self.path}: expected a raster that GDAL reads, got {told}; open it in QGIS to see "
        "whether it is damaged"
      ) from error

  @contextlib.contextmanager
  def new_labels(
    self, path: pathlib.Path, names: Sequence[str], palette: str
  ) -> Iterator[rasterio.io.DatasetWriter]:
    """A file for class ids in place of the raster, to be written block by block."""
    height, width = self.size
    largest = no_class_id(len(names))
    profile: dict[str, Any] = {
      "driver": "GTiff", "height": height, "width": width, "count": 1, "nodata": largest,
      "dtype": "uint8" if largest == 255 else "uint16", "compress": "deflate", "tiled": True,
      "blockxsize": TILE, "blockysize": TILE, "bigtiff": "if_safer",
    }  # fmt: skip
    if self.dataset.crs or not self.dataset.transform.is_identity:
      profile |= {"crs": self.dataset.crs, "transform": self.transform}
    try:
      with self._open(path, "w", **profile) as file:
        if largest == 255:
          colors = {i: (*map(int, c), 255) for i, c in enumerate(class_colors(names, palette))}
          file.write_colormap(1, colors | {largest: (*HATCH[0], 0)})
        file.update_tags(1, **{f"class_{i}": name for i, name in enumerate(names)})
        yield file
    except self._package.errors.RasterioError as error:
      told = " ".join(str(error.__cause__ or error).split())
      raise InputError(f"{path.parent}: the labels could not be written: {told}") from error

  def reduced_labels(self, path: pathlib.Path) -> np.ndarray:
    """Written class ids at the size of the overview."""
    with self._one_line(), self._open(path) as file:
      return file.read(1, out_shape=self.overview_size)

  def write(self, file: rasterio.io.DatasetWriter, top: int, left: int, ids: np.ndarray) -> None:
    """Writes the class ids of a block."""
    window = self._package.windows.Window(left, top, ids.shape[1], ids.shape[0])
    file.write(ids.astype(file.dtypes[0]), 1, window=window)

  def _chosen(self, bands: str | None) -> list[int]:
    count = self.dataset.count
    if bands is None:
      named = [color.name for color in self.dataset.colorinterp]
      if all(color in named for color in ("red", "green", "blue")):
        return [named.index(color) + 1 for color in ("red", "green", "blue")]
      return [1, 2, 3] if count >= 3 else [1, 1, 1]
    words = bands.split(",")
    if not all(word.strip().isdecimal() for word in words) or len(words) not in (1, 3):
      raise InputError(f"--bands: expected three numbers, as 4,3,2, or one, got {bands!r}")
    chosen = [int(word) for word in words] * (3 if len(words) == 1 else 1)
    if not all(1 <= band <= count for band in chosen):
      raise InputError(f"--bands={bands}: expected bands of 1 to {count}, which {self.path} has")
    return chosen

  def _limits(
    self, limits: str | None, values: np.ndarray, valid: np.ndarray
  ) -> tuple[np.ndarray | None, str]:
    """Values that become 0 and 255, (3, 2), and by which rule."""
    if limits is not None:
      try:
        low, high = map(float, limits.split(","))
      except ValueError:
        raise InputError(f"--range: expected two numbers, as 0,3000, got {limits!r}") from None
      if not -math.inf < low < high < math.inf:
        raise InputError(f"--range: expected a lower and a higher number, got {limits}")
      return np.array([[low, high]] * 3, np.float32), "--range"
    if self._kinds == {"uint8"}:
      return None, ""
    rule = f"percentiles {PERCENTILES[0]} and {PERCENTILES[1]} of an overview"
    if not valid.any():
      return np.array([[0, 1]] * 3, np.float32), rule
    found = np.percentile(values[:, valid], PERCENTILES, axis=1).T.astype(np.float32)
    flat = found[:, 0] == found[:, 1]
    found[flat, 1] += np.maximum(1, np.abs(found[flat, 0]))
    return found, rule

  def _read_overview(self, step: float) -> tuple[np.ndarray, np.ndarray]:
    """What `_read` gives of the whole raster at the size of the overview.

    In strips: of all rows at once GDAL would decode every tile once for each band.
    """
    (rows, columns), count = self.overview_size, max(1, int(strips.BLOCK_ROWS / step))
    parts = []
    for top in range(0, rows, count):
      height = min(count, rows - top)
      part = height * self.size[0] / rows, self.size[1]
      begin = top * self.size[0] / rows
      parts.append(self._read(begin, 0, part, (height, columns), "nearest"))
    values, valid = zip(*parts)
    return np.concatenate(values, 1), np.concatenate(valid)

  def _valid(self, values: np.ndarray, window: rasterio.windows.Window) -> np.ndarray:
    """Where there are data, by nodata, a mask or alpha; 0 in one band only is none."""
    flags = self._package.enums.MaskFlags
    kinds = [self.dataset.mask_flag_enums[band - 1] for band in self.bands]
    if all(flags.all_valid in kind for kind in kinds):
      return np.ones(values.shape[1:], bool)
    if all(kind == [flags.nodata] for kind in kinds):  # read already
      nodata = [self.dataset.nodatavals[band - 1] for band in self.bands]
      return np.any([band != value for band, value in zip(values, nodata)], 0)
    masks = self.dataset.read_masks(self.bands, window=window, out_shape=values.shape)
    return (masks > 0).any(0)

  def _read(
    self, top: float, left: float, part: tuple[float, float], size: tuple[int, int], way: str = ""
  ) -> tuple[np.ndarray, np.ndarray]:
    """Values (3, *size) of a part of the scaled raster, and where there are data."""
    y, x = (whole / scaled for whole, scaled in zip(self.dataset.shape, self.size))
    window = self._package.windows.Window(left * x, top * y, part[1] * x, part[0] * y)
    way = way or ("nearest" if self.scale == 1 else "average" if self.scale < 1 else "bilinear")
    resampling = self._package.enums.Resampling[way]
    given = {"window": window, "resampling": resampling}
    with self._one_line():
      if len(self._kinds) == 1:
        values = self.dataset.read(self.bands, out_shape=(3, *size), **given)
      else:  # rasterio reads bands of several types only one by one
        values = np.stack([self.dataset.read(x, out_shape=size, **given) for x in self.bands])
      valid = self._valid(values, window)
    return values, valid & np.isfinite(values).all(0)

  def _rgb(self, values_3xHxW: np.ndarray, valid_HxW: np.ndarray) -> np.ndarray:
    rgb = np.empty((*valid_HxW.shape, 3), np.uint8)
    for i, values in enumerate(values_3xHxW):
      if self.limits is not None:
        low, high = self.limits[i]
        values = np.where(valid_HxW, values, low).astype(np.float32)
        values = np.clip((values - low) * (255 / (high - low)), 0, 255) + 0.5
      rgb[..., i] = values
    rgb[~valid_HxW] = 0
    return rgb


def segment_raster(
  segmenter: Segmenter,
  raster: Raster,
  names: Sequence[str],
  directory: str | pathlib.Path,
  *,
  palette: str = "default",
  **options: Any,
) -> list[pathlib.Path]:
  """Writes `<stem>_labels.tif`, `<stem>_overlay.png`, `<stem>.json`, in place of earlier ones.

  The labels have the georeference of the raster, a palette and the names; pixels without data and
  of no class are nodata. Memory depends on the width of the raster, not on its height.

  Args:
    segmenter: the model, whose protocol lays plain windows over an image.
    raster: what is segmented.
    names: C class names.
    directory: where to write, not in a bucket.
    palette: color palette.
    **options: other arguments of `Segmenter.blocks`.

  Returns:
    The paths, in this order.

  Raises:
    InputError: a part of the raster cannot be read; the protocol needs the whole image.
  """
  directory = expand_local(directory, "--out of a raster")
  directory.mkdir(parents=True, exist_ok=True)
  stem = raster.path.stem
  label_file = directory / f"{stem}_labels.tif"
  if label_file.exists() and label_file.samefile(raster.path):
    raise InputError(f"{raster.path}: its labels would replace it; use another --out")
  print(raster.describe(), flush=True)
  counts, sums = np.zeros(len(names) + 1, np.int64), np.zeros(len(names) + 1)
  no_class, missing = no_class_id(len(names)), 0
  with replacing(label_file) as temporary, _told_when_interrupted():
    with raster.new_labels(temporary, names, palette) as file:
      parts = segmenter.blocks(raster.size, raster.rows, names, **options)
      with progress(
        strips.block_count(raster.size), f"segment on {devices_text()}", "block"
      ) as bar:
        for top, left, labels, confidence in parts:
          valid = raster.valid(top, left, labels.shape)
          ids = labels[valid] + 1  # 0: no class
          counts += np.bincount(ids, minlength=len(counts))
          sums += np.bincount(ids, confidence[valid], len(counts))
          missing += int(valid.size - valid.sum())
          raster.write(file, top, left, np.where(valid & (labels >= 0), labels, no_class))
          bar.update()
    reduced = raster.reduced_labels(temporary)
  write_text(label_file.with_name(f"{label_file.name}.aux.xml"), category_names(names))
  overlay = overlay_with_legend(
    raster.overview, reduced, names, palette=palette, areas=(counts[1:], int(counts[0]))
  )
  source = Origin(raster.path).name(directory)
  picture = save_png(directory / f"{stem}_overlay.png", overlay, source)
  summary = _summary(segmenter, raster, names, options, palette, counts, sums, missing)
  write_json(summary_file := directory / f"{stem}.json", {**summary, FIELD: source})
  written = [label_file, picture, summary_file]
  print("\n".join([segmenter.method, *map(str, written)]))
  return written


@contextlib.contextmanager
def _told_when_interrupted() -> Iterator[None]:
  try:
    yield
  except KeyboardInterrupt:
    raise KeyboardInterrupt("interrupted; no labels of the raster are kept") from None


def category_names(names: Sequence[str]) -> str:
  """GDAL's auxiliary file of a raster of class ids, from which QGIS takes their names."""
  root = ET.Element("PAMDataset")
  categories = ET.SubElement(ET.SubElement(root, "PAMRasterBand", band="1"), "CategoryNames")
  for name in names:
    ET.SubElement(categories, "Category").text = name
  ET.indent(root, " ")
  return ET.tostring(root, encoding="unicode") + "\n"


def _summary(
  segmenter: Segmenter, raster: Raster, names: Sequence[str], options: dict, palette: str,
  counts: np.ndarray, sums: np.ndarray, missing: int,
) -> dict:  # fmt: skip
  """Shares are of the pixels with data."""
  height, width = raster.size
  total = max(1, int(counts.sum()))
  colors = class_colors(names, palette).tolist()
  order = np.argsort(-counts[1:], kind="stable").tolist()
  return {
    "raster": str(raster.path),
    "width": width,
    "height": height,
    "crs": raster.dataset.crs.to_string() if raster.dataset.crs else None,
    "transform": list(raster.transform)[:6],
    "bands": raster.bands,
    "range": None if raster.limits is None else raster.limits.tolist(),
    "scale": raster.scale,
    "method": segmenter.method,
    "names": list(names),
    "classes": [
      {
        "name": names[i],
        "id": i,
        "share": round(int(counts[i + 1]) / total, 6),
        "pixels": int(counts[i + 1]),
        "score": round(float(sums[i + 1] / counts[i + 1]), 4),
        "color": colors[i],
      }
      for i in order
      if counts[i + 1]
    ],
    "other": {
      "threshold": options.get("other", 0.0),
      "id": no_class_id(len(names)),
      "share": round(int(counts[0]) / total, 6),
    },
    "without_data": round(missing / (height * width), 6),
  }
