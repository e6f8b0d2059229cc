"""Rasters made by rasterio, segmented in strips and read back by it."""

import dataclasses
import json
import sys
import xml.etree.ElementTree as ET

import numpy as np
import pytest
import scipy.io
from PIL import Image

from data_pipelines import shapes
from rpn_jax import Segmenter, cli
from rpn_jax.base.errors import InputError
from rpn_jax.drawing.palette import class_colors
from rpn_jax.inference import strips
from rpn_jax.tasks import raster

rasterio = pytest.importorskip("rasterio")
shutil = pytest.importorskip("rasterio.shutil")

NAMES = ("plain red", "striped blue", "grass", "sand", "water")
CRS, TRANSFORM = "EPSG:32633", rasterio.Affine(10, 0, 500_000, 0, -10, 5_400_000)
HEIGHT, WIDTH = 200, 330


@pytest.fixture(scope="module")
def model():
  return Segmenter.load("shapes_clip", templates="single")


@pytest.fixture(scope="module")
def scene():
  return shapes.draw_scene(np.random.default_rng(5), HEIGHT, WIDTH, (8, 12))[0]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
  monkeypatch.setattr(strips, "BLOCK_ROWS", 64)
  monkeypatch.setattr(strips, "BLOCK_COLUMNS", 128)


def write(path, values_HxWxC, geo=True, **profile):
  values = np.moveaxis(np.atleast_3d(values_HxWxC), -1, 0)
  place = {"crs": CRS, "transform": TRANSFORM} if geo else {}
  with rasterio.open(
    path, "w", driver="GTiff", count=len(values), height=values.shape[1], width=values.shape[2],
    dtype=values.dtype, **place, **profile,
  ) as file:  # fmt: skip
    file.write(values)
  return path


def whole(model, image, **options):
  """The labels of the image at its own resolution, all of it in memory."""
  predictor = model.predictor
  before = predictor.protocol
  predictor.protocol = dataclasses.replace(before, short_side=min(image.shape[:2]))
  try:
    return model(image, NAMES, **options).labels
  finally:
    predictor.protocol = before


@pytest.mark.parametrize(
  "rows, columns, options",
  [
    (slice(0, 200), slice(0, 330), {}),
    (slice(0, 131), slice(0, 65), {"other": 0.3, "background": "sky, road"}),
    (slice(0, 40), slice(0, 200), {}),  # lower than a window
    (slice(0, 64), slice(0, 64), {}),  # one window
  ],
)
def test_strips_give_the_labels_of_the_whole_image(model, scene, rows, columns, options):
  image = np.ascontiguousarray(scene[rows, columns])
  got, asked = np.full(image.shape[:2], -2), []

  def read(top, count):
    asked.append((top, count))
    return image[top : top + count]

  for part in model.blocks(image.shape[:2], read, NAMES, **options):
    height, width = part.labels.shape
    got[part.top : part.top + height, part.left : part.left + width] = part.labels
  np.testing.assert_array_equal(got, whole(model, image, **options))
  crop = model.predictor.protocol.crop
  assert max(count for _, count in asked) <= crop
  assert len(asked) == len({top for top, _ in asked})  # every row of windows is computed once


def test_a_geotiff_keeps_its_place_and_names_its_classes(model, scene, tmp_path, capsys):
  path = write(tmp_path / "field.tif", scene)
  out = tmp_path / "out"
  assert cli.main([
    "segment", str(path), ", ".join(NAMES), "--model=shapes_clip", "--templates=single",
    f"--out={out}", "--background=sky",
  ]) == 0  # fmt: skip
  said = capsys.readouterr().out
  assert "330 x 200 pixels, bands 1, 2, 3 as red, green and blue, bytes as they are" in said
  right = whole(model, scene, background="sky")
  with rasterio.open(out / "field_labels.tif") as file:
    assert (file.crs, file.transform, file.nodata) == (CRS, TRANSFORM, 255)
    assert file.profile["tiled"] and file.compression.name == "deflate"
    labels, colors = file.read(1), file.colormap(1)
    tags = file.tags(1)
  np.testing.assert_array_equal(labels, np.where(right < 0, 255, right))
  for i, (name, color) in enumerate(zip(NAMES, class_colors(NAMES))):
    assert colors[i][:3] == tuple(color) and tags[f"class_{i}"] == name
  assert colors[255][3] == 0
  # GDAL itself reads the names: it writes them into the description of another file.
  shutil.copy(out / "field_labels.tif", tmp_path / "copy.vrt", driver="VRT")
  read = ET.parse(tmp_path / "copy.vrt").findall(".//Category")
  assert [each.text for each in read] == list(NAMES)
  summary = json.loads((out / "field.json").read_text())
  assert summary["crs"] == CRS and summary["transform"] == list(TRANSFORM)[:6]
  for each in summary["classes"]:
    assert each["share"] == pytest.approx((right == each["id"]).mean(), abs=1e-6)
    assert each["pixels"] == (right == each["id"]).sum()
  assert sum(each["pixels"] for each in summary["classes"]) + (right < 0).sum() == right.size
  assert sorted(file.name for file in out.iterdir()) == [
    "field.json", "field_labels.tif", "field_labels.tif.aux.xml", "field_overlay.png",
  ]  # fmt: skip
  with Image.open(out / "field_overlay.png") as file:
    assert file.size[0] > WIDTH


def test_bands_and_a_range_for_the_whole_raster(scene, tmp_path):
  values = np.concatenate([scene[..., ::-1].astype(np.uint16) * 10 + 100, scene[..., :1]], -1)
  path = write(tmp_path / "a.tif", values)
  source = raster.Raster(path, bands="3,2,1", limits="100,2650")
  np.testing.assert_array_equal(source.rows(0, HEIGHT), scene)
  np.testing.assert_array_equal(source.rows(70, 20), scene[70:90])
  assert "100 to 2650 (--range)" in source.describe()
  source = raster.Raster(path, bands="4")
  assert "band 4 as gray" in source.describe()
  np.testing.assert_array_equal(source.rows(0, 9).std(-1), 0)
  source = raster.Raster(path, bands="3,2,1")  # smaller than an overview, which is then all of it
  low, high = np.percentile(values[..., 2], [2, 98])
  right = np.clip((values[..., 2] - low) * (255 / (high - low)), 0, 255)
  assert np.abs(source.rows(0, HEIGHT)[..., 0] - right).max() <= 0.5 + 1e-3
  np.testing.assert_array_equal(source.rows(90, 20), source.rows(0, HEIGHT)[90:110])
  assert (
    f"{low:g} to {high:g}" in source.describe() and "(percentiles 2 and 98" in source.describe()
  )


def test_decoded_tiles_are_kept(scene, tmp_path):
  """GDAL's cache holds a row of tiles of a wide raster: it was 256 bytes once, not megabytes."""
  path = write(tmp_path / "a.tif", scene)
  source = raster.Raster(path)
  with source._one_line():
    kept = source._package._env.get_gdal_config("GDAL_CACHEMAX")
  assert int(kept) == raster.CACHE_BYTES > 20_000 * 256 * 4 * 2  # columns, rows, bands, bytes


def test_pixels_without_data_have_no_class(model, scene, tmp_path):
  values = scene.astype(np.float32) + 1
  values[:50, :70], values[100, 100] = -9, np.nan
  values[120, 120, 0] = -9  # in one band of three
  path = write(tmp_path / "a.tif", values, nodata=-9)
  source = raster.Raster(path, limits="1,256")
  raster.segment_raster(model, source, NAMES, tmp_path / "out")
  missing = np.zeros((HEIGHT, WIDTH), bool)
  missing[:50, :70] = missing[100, 100] = True
  with rasterio.open(tmp_path / "out/a_labels.tif") as file:
    np.testing.assert_array_equal(file.read(1) == 255, missing)
  summary = json.loads((tmp_path / "out/a.json").read_text())
  assert summary["without_data"] == pytest.approx(missing.mean(), abs=1e-6)
  assert sum(each["share"] for each in summary["classes"]) == pytest.approx(1, abs=1e-5)
  black = source.rows(0, 60)
  assert not black[:50, :70].any() and (black[50:, 70:] == scene[50:60, 70:]).all()


@pytest.mark.parametrize("kind", ["alpha", "mask"])
def test_masks_and_alpha_are_no_data_too(scene, tmp_path, kind):
  valid = np.ones((HEIGHT, WIDTH), bool)
  valid[20:60, 30:90] = False
  scene = scene.copy()
  scene[0, 0] = 0  # black, with data
  if kind == "alpha":
    values = np.concatenate([scene, np.where(valid, 255, 0).astype(np.uint8)[..., None]], -1)
    path = write(tmp_path / "a.tif", values, photometric="rgb", alpha="yes")
  else:
    path = write(tmp_path / "a.tif", scene, photometric="rgb")
    with rasterio.open(path, "r+") as file:
      file.write_mask(valid)
  source = raster.Raster(path)
  assert source.bands == [1, 2, 3]
  np.testing.assert_array_equal(source.valid(10, 20, (100, 200)), valid[10:110, 20:220])


def test_a_raster_without_a_place(model, scene, tmp_path):
  with pytest.warns(rasterio.errors.NotGeoreferencedWarning):
    path = write(tmp_path / "a.tif", scene, geo=False)
  raster.segment_raster(model, raster.Raster(path), NAMES, tmp_path / "out")  # warns of nothing
  assert not raster.is_raster(tmp_path / "out/a_labels.tif")  # none is invented
  with Image.open(tmp_path / "out/a_labels.tif") as file:
    np.testing.assert_array_equal(np.asarray(file), whole(model, scene))
  assert json.loads((tmp_path / "out/a.json").read_text())["crs"] is None


def test_colors_of_another_palette(model, scene, tmp_path):
  source = raster.Raster(write(tmp_path / "a.tif", scene))
  raster.segment_raster(model, source, NAMES, tmp_path / "out", palette="colorblind")
  wanted = class_colors(NAMES, "colorblind").tolist()
  for row in json.loads((tmp_path / "out/a.json").read_text())["classes"]:
    assert row["color"] == wanted[row["id"]]


def test_an_empty_raster_and_one_of_one_value(tmp_path):
  flat = raster.Raster(write(tmp_path / "f.tif", np.full((40, 40), 7, np.uint16)))
  assert not flat.rows(0, 40).any()
  empty = raster.Raster(write(tmp_path / "e.tif", np.zeros((40, 40), np.uint16), nodata=0))
  assert not empty.valid(0, 0, (40, 40)).any() and not empty.rows(0, 40).any()


def test_another_scale_moves_the_pixels_not_the_place(model, scene, tmp_path):
  source = raster.Raster(write(tmp_path / "a.tif", scene), scale=0.5)
  assert source.size == (100, 165)
  means = scene.reshape(100, 2, 165, 2, 3).mean((1, 3))
  assert np.abs(source.rows(10, 20) - means[10:30]).max() <= 1
  raster.segment_raster(model, source, NAMES, tmp_path / "out")
  with rasterio.open(tmp_path / "out/a_labels.tif") as file, rasterio.open(source.path) as given:
    assert file.shape == (100, 165) and file.bounds == given.bounds and file.res == (20, 20)


def test_what_is_a_raster(scene, tmp_path):
  assert raster.is_raster(write(tmp_path / "geo.tif", scene))
  with pytest.warns(rasterio.errors.NotGeoreferencedWarning):
    plain = write(tmp_path / "plain.tif", scene, geo=False)
  assert not raster.is_raster(plain)
  assert raster.is_raster(plain, True) and not raster.is_raster(tmp_path / "geo.tif", False)
  large = {"count": 1, "height": 20_000, "width": 20_000, "dtype": "uint8", "tiled": True}
  # Its blocks are not written.
  with (
    pytest.warns(rasterio.errors.NotGeoreferencedWarning),
    rasterio.open(
      tmp_path / "large.tif", "w", driver="GTiff", SPARSE_OK=True, bigtiff="yes", **large
    ),
  ):
    pass
  assert raster.is_raster(tmp_path / "large.tif")
  (tmp_path / "broken.tif").write_bytes(b"II*\0broken")
  assert not raster.is_raster(tmp_path / "broken.tif")
  Image.fromarray(scene).save(tmp_path / "a.png")
  assert not raster.is_raster(tmp_path / "a.png")


@pytest.mark.parametrize(("arguments", "message"), [
  ({"bands": "4,3"}, "--bands: expected three numbers, as 4,3,2, or one, got '4,3'"),
  ({"bands": "r,g,b"}, "--bands: expected three numbers"),
  ({"bands": "1,2,4"}, "--bands=1,2,4: expected bands of 1 to 3, which "),
  ({"limits": "3000"}, "--range: expected two numbers, as 0,3000, got '3000'"),
  ({"limits": "9,3"}, "--range: expected a lower and a higher number, got 9,3"),
  ({"limits": "nan,3"}, "--range: expected a lower and a higher number"),
  ({"scale": 0.0}, "--scale: expected a factor above 0, up to 4, got 0.0"),
])  # fmt: skip
def test_wrong_arguments(scene, tmp_path, arguments, message):
  path = write(tmp_path / "a.tif", scene[:20, :20])
  with pytest.raises(InputError, match=message):
    raster.Raster(path, **arguments)


@pytest.mark.parametrize("kind", ["tif", "jpg", "png"])
def test_what_viewers_turn_is_refused(scene, tmp_path, kind):
  for orientation in (0, 1, 6):
    turned = Image.Exif()
    turned[274] = orientation
    path = tmp_path / f"{orientation}.{kind}"
    Image.fromarray(scene).save(path, exif=turned)
    if orientation < 2:
      raster.Raster(path)
      continue
    with pytest.raises(InputError, match=rf"6\.{kind}: expected .* got orientation 6.*--no-raster"):
      raster.Raster(path)


def test_values_that_are_no_colors_are_refused(scene, tmp_path):
  path = write(tmp_path / "p.tif", scene[..., 0])
  with rasterio.open(path, "r+") as file:
    file.write_colormap(1, {i: (i, 255 - i, 9, 255) for i in range(256)})
  with pytest.raises(InputError, match="got a palette, as of a map of classes; make colors of it"):
    raster.Raster(path)
  path = write(tmp_path / "c.tif", scene[..., 0].astype(np.complex64))
  with pytest.raises(InputError, match="of integers or real numbers, got complex64"):
    raster.Raster(path)
  path, size = tmp_path / "i.tif", {"count": 1, "height": 9, "width": 9, "transform": TRANSFORM}
  rasterio.open(path, "w", driver="GTiff", dtype="complex_int16", **size).close()
  with pytest.raises(InputError, match="of integers or real numbers, got complex_int16"):
    raster.Raster(path)


def test_a_file_of_other_rasters_names_them(tmp_path):
  path = tmp_path / "a.nc"
  with scipy.io.netcdf_file(path, "w") as file:
    for name, length in (("y", 9), ("x", 12)):
      file.createDimension(name, length)
    for name in ("red", "green"):
      file.createVariable(name, "f4", ("y", "x"))[:] = 1
  with pytest.raises(InputError, match=rf"a file of 2 others: .*: netcdf:{path}:red, netcdf:.*:gr"):
    raster.Raster(path)


def test_bands_of_several_types(scene, tmp_path):
  bands = []
  for i, kind in enumerate((np.uint8, np.int32, np.float32)):
    values = scene[..., i].astype(kind) + 0.7 * (kind == np.float32)
    values[:9, : 10 * (i + 1)] = nodata = np.float32(0.7) if kind == np.float32 else 0
    write(tmp_path / f"{i}.tif", values.astype(kind), nodata=float(nodata))
    bands.append(
      f"<VRTRasterBand dataType='{('Byte', 'Int32', 'Float32')[i]}' band='{i + 1}'>"
      f"<NoDataValue>{nodata}</NoDataValue><ComplexSource>"
      f"<SourceFilename relativeToVRT='1'>{i}.tif</SourceFilename><NODATA>{nodata}</NODATA>"
      "</ComplexSource></VRTRasterBand>"
    )
  (tmp_path / "a.vrt").write_text(
    f"<VRTDataset rasterXSize='{WIDTH}' rasterYSize='{HEIGHT}'>{''.join(bands)}</VRTDataset>"
  )
  source = raster.Raster(tmp_path / "a.vrt", limits="0,255")
  rows = source.rows(0, 30).astype(int)
  assert not rows[:9, :10].any() and np.abs(rows[9:] - scene[9:30]).max() <= 1
  single = raster.Raster(tmp_path / "0.tif", limits="0,255")
  np.testing.assert_array_equal(rows[9:, :, 0], single.rows(9, 21)[..., 0])


def test_without_rasterio_one_line_names_it(scene, tmp_path, monkeypatch, capsys):
  path = write(tmp_path / "a.tif", scene[:20, :20])
  monkeypatch.setitem(sys.modules, "rasterio", None)
  assert cli.main(["segment", str(path), "grass", f"--out={tmp_path / 'out'}"]) == 2
  said = capsys.readouterr().err
  assert said.count("\n") == 1 and "pip install rasterio==1.4.4; --no-raster takes the file" in said
  assert not (tmp_path / "out").exists()


def test_a_damaged_raster_leaves_nothing_half_written(model, scene, tmp_path):
  path = write(tmp_path / "a.tif", scene, compress="deflate", blockysize=16)
  content = path.read_bytes()
  path.write_bytes(content[: len(content) * 2 // 3])
  with pytest.raises(InputError, match=r"a\.tif: expected a raster that GDAL reads, got .*QGIS"):
    raster.segment_raster(model, raster.Raster(path), NAMES, tmp_path / "out")
  (tmp_path / "no.tif").write_bytes(b"no raster")
  with pytest.raises(InputError, match=r"no\.tif: expected a raster that GDAL reads"):
    raster.Raster(tmp_path / "no.tif")
  assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_ctrl_c_leaves_nothing_half_written(model, scene, tmp_path, monkeypatch):
  path = write(tmp_path / "a.tif", scene)
  written = []

  def write_block(self, *given):
    written.append(given)
    if len(written) == 4:
      raise KeyboardInterrupt

  monkeypatch.setattr(raster.Raster, "write", write_block)
  with pytest.raises(KeyboardInterrupt, match="no labels of the raster are kept"):
    raster.segment_raster(model, raster.Raster(path), NAMES, tmp_path / "out")
  assert not list((tmp_path / "out").iterdir())


def test_labels_do_not_replace_their_own_raster(model, scene, tmp_path):
  path = write(tmp_path / "a_labels.tif", scene)
  link = tmp_path / "a.tif"
  link.symlink_to(path)
  with pytest.raises(InputError, match="its labels would replace it; use another --out"):
    raster.segment_raster(model, raster.Raster(link), NAMES, tmp_path)


def test_results_of_another_raster_stay(scene, tmp_path, capsys, monkeypatch):
  first, second = (write(tmp_path / name, scene[:64, :64]) for name in ("m.tif", "m.tiff"))
  out = tmp_path / "out"

  def run(path):
    return cli.main(["segment", str(path), "grass, sand", f"--out={out}"])

  assert run(first) == 0
  monkeypatch.chdir(tmp_path)
  assert run("m.tif") == 0  # again
  before = {path: path.read_bytes() for path in out.iterdir()}
  assert run(second) == 2
  said = f"{second}: expected names that are free in {out}, got {out}/m.json, which is of ../m.tif;"
  assert said in capsys.readouterr().err
  assert {path: path.read_bytes() for path in out.iterdir()} == before
  old = json.loads((out / "m.json").read_text())
  for content, of in (
    ({**old, "source": None, "raster": "m.png"}, "is of m.png"),  # as of earlier versions
    ({"image": "m.png"}, "no earlier call has made of it"),
    ([], "no earlier call has made of it"),
  ):
    (out / "m.json").write_text(json.dumps(content))
    assert run(first) == 2 and f"m.json, which {of}; rename" in capsys.readouterr().err
  (out / "m.json").unlink()
  assert run(first) == 2 and "m_labels.tif, which no earlier call" in capsys.readouterr().err


def test_a_protocol_that_needs_the_whole_image(model, scene):
  with pytest.raises(InputError, match=r"one scale, .* refine=pamr: use another model or method"):
    next(model.blocks((80, 80), lambda top, n: scene[top : top + n, :80], NAMES, refine="pamr"))


@pytest.mark.parametrize(("flags", "message"), [
  (["--every=2"], "--every is for a film, {} is taken for images: leave it out"),
  (["--bands=1"], "--bands is for a raster, {} is taken for images: leave it out, or add --raster"),
])  # fmt: skip
def test_flags_of_another_kind_are_refused(scene, tmp_path, capsys, flags, message):
  Image.fromarray(scene).save(tmp_path / "a.png")
  assert cli.main(["segment", str(tmp_path / "a.png"), "grass", *flags]) == 2
  assert message.format(tmp_path / "a.png") in capsys.readouterr().err
