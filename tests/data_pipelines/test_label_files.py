"""Label files that hold other values than were drawn, or may do so: refused by what they are."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from data_pipelines.sources import files
from data_pipelines.sources.ade150 import Ade150
from data_pipelines.sources.ade847 import Ade847
from data_pipelines.sources.cityscapes import Cityscapes
from data_pipelines.sources.coco_stuff import CocoStuff
from data_pipelines.sources.context import Context
from data_pipelines.sources.folder import Folder
from data_pipelines.sources.voc import Voc
from rpn_jax.base.errors import InputError
from tests.data_pipelines import raw_ade_coco, raw_pascal

LABEL = (np.arange(12 * 16).reshape(12, 16) // 40).astype(np.uint8)
MASK = Image.fromarray(LABEL)


def save(path, kind, image=MASK, **options):
  image.save(path, kind, **options)
  return path


@pytest.mark.parametrize(
  ("kind", "options"),
  [("PNG", {}), ("BMP", {}), ("GIF", {}), ("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"}),
   ("TIFF", {"compression": "tiff_adobe_deflate"})],
)  # fmt: skip
def test_files_without_loss(kind, options, tmp_path):
  path = save(tmp_path / "mask.png", kind, **options)
  np.testing.assert_array_equal(files.read_index_image(path), LABEL)


@pytest.mark.parametrize(
  ("kind", "options", "got"),
  [
    ("JPEG", {"quality": 100}, "JPEG"),
    ("MPO", {"save_all": True, "append_images": [MASK]}, "MPO"),
    ("JPEG2000", {"irreversible": True}, "JPEG2000"),
    ("WEBP", {}, "WEBP"),
    ("WEBP", {"lossless": True}, "WEBP"),
    ("AVIF", {}, "AVIF"),
    ("PPM", {}, "PPM"),  # scaled where its largest value is not 255
    ("TIFF", {"compression": "jpeg"}, "TIFF with jpeg compression"),
  ],
)
def test_files_with_loss(kind, options, got, tmp_path):
  path = save(tmp_path / "mask.png", kind, **options)
  with pytest.raises(InputError) as caught:
    files.read_index_image(path)
  expected = f"mask.png: expected a label file without loss (PNG, BMP, GIF, TIFF), got {got}, which"
  assert expected in str(caught.value)


@pytest.mark.parametrize(
  ("cls", "paint"),
  [
    (Folder, raw_ade_coco.folder),
    (Ade150, raw_ade_coco.ade150),
    (Ade847, raw_ade_coco.ade847),
    (CocoStuff, raw_ade_coco.coco_stuff),
    (Cityscapes, raw_ade_coco.cityscapes),
    (Voc, lambda root: raw_pascal.voc(root, "converted")),
    (Context, lambda root: raw_pascal.context(root, "png")),
  ],
)
def test_every_set_of_label_images_refuses_them(cls, paint, tmp_path):
  paint(tmp_path / "raw")
  builder = cls(data_dir=tmp_path, file_format="array_record")
  raw = builder.examples(tmp_path / "raw")["val"][0]
  with Image.open(raw.label) as image:
    image.convert("RGB" if image.mode == "RGB" else "L").save(raw.label, "JPEG")
  with pytest.raises(InputError, match=r"\.png: expected a label file without loss .* got JPEG"):
    builder.read(raw)


def test_several_images_in_one_file(tmp_path):
  path = save(tmp_path / "mask.png", "TIFF", save_all=True, append_images=[MASK])
  with pytest.raises(InputError, match="expected one label image in the file, got 2"):
    files.read_index_image(path)


def gray_png(bits, width, row):
  """A PNG of one line of gray pixels, which Pillow writes with eight bits only."""

  def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

  header = struct.pack(">IIBBBBB", width, 1, bits, 0, 0, 0, 0)
  parts = ((b"IHDR", header), (b"IDAT", zlib.compress(b"\0" + row)), (b"IEND", b""))
  return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def test_gray_of_few_bits(tmp_path):
  path = tmp_path / "mask.png"
  for bits in (2, 4):
    path.write_bytes(gray_png(bits, 4, b"\x1b\x1b"))
    with pytest.raises(InputError, match=f"of 1, 8 or 16 bits, got {bits} bits"):
      files.read_index_image(path)
  path.write_bytes(gray_png(1, 8, b"\x1b"))
  assert files.read_index_image(path).tolist() == [[0, 0, 0, 1, 1, 0, 1, 1]]


@pytest.mark.parametrize("mode", ["LA", "RGB", "RGBA", "F", "I"])
def test_grays_in_other_channels(mode, tmp_path):
  path = save(tmp_path / "mask", "TIFF" if mode in "FI" else "PNG", MASK.convert(mode))
  np.testing.assert_array_equal(files.read_index_image(path), LABEL)


@pytest.mark.parametrize(
  ("value", "message"),
  [
    (0.5, r"no integers on 1 pixels, 0…4; save class ids, not scores"),
    (np.nan, r"expected ids 0…65535, got nan…nan"),
    (-1, r"expected ids 0…65535, got -1"),
    (7e4, r"expected ids 0…65535, got .*70000"),
  ],
)
def test_numbers_that_are_no_ids(value, message, tmp_path):
  label = LABEL.astype(np.float32)
  label[0, 0] = value
  path = save(tmp_path / "mask.tif", "TIFF", Image.fromarray(label))
  with pytest.raises(InputError, match=message):
    files.read_index_image(path)


def test_transparent_masks(tmp_path):
  for mode in ("LA", "RGBA"):
    image = MASK.convert(mode)
    image.putalpha(Image.fromarray(np.where(LABEL == 2, 0, 255).astype(np.uint8)))
    path = save(tmp_path / "mask.png", "PNG", image)
    with pytest.raises(InputError, match="without transparency, got 40 transparent pixels"):
      files.read_index_image(path)


def test_colors_are_shown(tmp_path):
  table = np.array([[0, 0, 0], [200, 0, 0], [0, 200, 0], [0, 0, 200], [9, 9, 9]], np.uint8)
  path = save(tmp_path / "mask.png", "PNG", Image.fromarray(table[LABEL]))
  with pytest.raises(InputError) as caught:
    files.read_index_image(path)
  assert str(caught.value) == (
    f"{path}: expected class ids, got 5 colors: 0,0,0 (20.8%), 0,0,200 (20.8%), 0,200,0 (20.8%), "
    "200,0,0 (20.8%), 9,9,9 (16.7%); store class ids, not colors"
  )
  smoothed = Image.fromarray(table[LABEL].repeat(9, 0)).resize((160, 120), Image.Resampling.BICUBIC)
  path = save(tmp_path / "mask.png", "PNG", smoothed)
  with pytest.raises(InputError, match=r"got 1.. colors: a mask with smoothed edges, one that was"):
    files.read_index_image(path)


def test_other_modes_are_refused(tmp_path):
  path = save(tmp_path / "mask.tif", "TIFF", MASK.convert("CMYK"))
  with pytest.raises(InputError, match=r"of RGB colors, got mode CMYK; save it as PNG"):
    files.read_index_image(path)


# Palettes


def palette_file(path, colors, label=LABEL, kind="PNG"):
  image = Image.fromarray(label, "P")
  image.putpalette(np.array(colors, np.uint8).tobytes())
  return save(path, kind, image)


def test_grays_that_are_not_their_indices(tmp_path):
  """Either may be meant: a gray mask that a program made smaller, or ids shown in grays."""
  path = palette_file(tmp_path / "a.png", [[9 * i] * 3 for i in range(5)])
  with pytest.raises(InputError, match="palette of grays whose index 1 is gray 9, and either may"):
    files.read_index_image(path)
  # Pillow numbers the grays of a mask anew when it saves a GIF.
  path = save(tmp_path / "b.png", "GIF", Image.fromarray(LABEL * 60))
  with pytest.raises(InputError, match="index 1 is gray 60"):
    files.read_index_image(path)
  for colors in ([[i] * 3 for i in range(5)], [[9 * i] * 3 for i in range(4)] + [[1, 2, 3]]):
    path = palette_file(tmp_path / "c.png", colors)
    np.testing.assert_array_equal(files.read_index_image(path), LABEL)


def test_palettes_made_one_by_one_are_told_once(tmp_path, capsys):
  """Colored masks reduced to palettes by frequency: an id is another class in every file."""
  colors = files.Colors()
  red, green = [200, 0, 0], [0, 200, 0]
  one = palette_file(tmp_path / "1.png", [[0, 0, 0], red, green, red, green])
  files.read_index_image(one, colors)
  files.read_index_image(one, colors)
  unused = np.minimum(LABEL, 1)  # only colors in use count, and not that of "no class"
  unused[0] = 255
  whole = np.zeros((256, 3), int) + red
  whole[0] = 0
  for last in ((255, 255, 255), (1, 1, 1)):
    whole[255] = last
    files.read_index_image(palette_file(tmp_path / "2.png", whole, unused), colors)
  assert capsys.readouterr().out == ""
  for name in "34":
    path = palette_file(tmp_path / f"{name}.png", [[0, 0, 0], green, red, red, green])
    files.read_index_image(path, colors)
  out = capsys.readouterr().out
  assert out.startswith(f"label 1 has the color (200, 0, 0) in {one} and (0, 200, 0) in {tmp_path}")
  assert out.count("\n") == 1 and "preview.png" in out


def test_a_set_compares_its_palettes(tmp_path, capsys):
  raw_ade_coco.folder(tmp_path, ("train",))
  builder = Folder(data_dir=tmp_path)
  first, second, *_ = (e for e in builder.examples(tmp_path)["train"] if _is_palette(e.label))
  with Image.open(second.label) as image:
    palette_file(second.label, np.arange(768).reshape(256, 3) % 251, np.array(image))
  builder.read(first)
  builder.read(second)
  assert f"in {first.label} and " in capsys.readouterr().out


def _is_palette(path):
  return Image.open(io.BytesIO(path.read_bytes())).mode == "P"
