"""Images are read back from disk and compared with what they must show."""

import pathlib

import numpy as np
import pytest
from PIL import Image

from rpn_jax.drawing.images import (
  MAX_OVERLAY_SIDE,
  _resized,
  colorize,
  index_image,
  overlay,
  overlay_with_legend,
  prediction_grid,
  save_png,
)
from rpn_jax.drawing.palette import HATCH, class_colors

SHAPES = ["red circle", "blue square", "sand"]


def scene(height, width, classes, seed=0):
  rng = np.random.default_rng(seed)
  label = np.kron(rng.integers(0, classes, (4, 4)), np.ones((height // 4, width // 4), int))
  label = np.pad(label, ((0, height - label.shape[0]), (0, width - label.shape[1])), mode="edge")
  image = rng.integers(0, 256, (height, width, 3)).astype(np.uint8)
  return image, label


def colors_in(picture) -> set[tuple]:
  found = picture.convert("RGB").getcolors(picture.width * picture.height)
  return {color for _, color in found}


def test_colorize_hatches_what_is_no_class():
  colors = class_colors(SHAPES)
  label = np.full((40, 40), 255, np.uint8)
  label[:10], label[10:20] = 1, 2
  picture = colorize(label, colors)
  np.testing.assert_array_equal(picture[:10], np.broadcast_to(colors[1], (10, 40, 3)))
  np.testing.assert_array_equal(picture[10:20], np.broadcast_to(colors[2], (10, 40, 3)))
  assert set(map(tuple, picture[20:].reshape(-1, 3).tolist())) == set(HATCH)
  with pytest.raises(ValueError, match=r"expected a label \(H, W\) of integers"):
    colorize(label.astype(np.float32), colors)


def test_colorize_keeps_255_as_a_class_of_a_large_vocabulary():
  colors = class_colors([str(i) for i in range(300)])
  label = np.full((2, 2), 255, np.uint8)
  np.testing.assert_array_equal(colorize(label, colors)[0, 0], colors[255])


def test_overlay_mixes():
  image, label = np.full((2, 3, 3), 100, np.uint8), np.zeros((2, 3), int)
  colors = np.uint8([[200, 0, 50]])
  assert (overlay(image, label, colors, 0) == 100).all()
  np.testing.assert_array_equal(overlay(image, label, colors, 1)[1, 1], colors[0])
  np.testing.assert_array_equal(overlay(image, label, colors, 0.25)[0, 0], [125, 75, 88])
  with pytest.raises(ValueError, match="alpha"):
    overlay(image, label, colors, 1.5)
  with pytest.raises(ValueError, match="one size"):
    overlay(image, label[:1], colors)


def test_grid_enlarges_by_whole_factors(tmp_path):
  image, label = scene(96, 96, 3)
  path = prediction_grid(tmp_path / "g.png", [image], [label], [label], SHAPES)
  page = np.asarray(Image.open(path).convert("RGB"))
  blocks = np.repeat(np.repeat(image, 5, 0), 5, 1)  # 480 / 96
  rows = [y for y in range(page.shape[0] - 480) if (page[y, 22:502] == blocks[0]).all()]
  np.testing.assert_array_equal(page[rows[0] : rows[0] + 480, 22:502], blocks)


@pytest.mark.parametrize(("count", "classes"), [(1, 3), (3, 60), (8, 12)])
def test_grid_shows_every_class_that_appears_and_no_other(tmp_path, count, classes):
  names = [f"a name with many words, its synonym, and another one, number {i}" for i in range(60)]
  names = names[:classes]
  sizes = [(96, 96), (75, 130), (300, 20), (700, 500)]
  pairs = [scene(*sizes[i % 4], classes, i) for i in range(count)]
  labels = [label for _, label in pairs]
  # Images come at the network's size, labels at their own.
  images = [_resized(image, (64, 48)) * 0 for image, _ in pairs]
  path = prediction_grid(tmp_path / "g.png", images, labels, labels, names, unseen=(0,))
  drawn = colors_in(Image.open(path))
  present = set(np.concatenate([np.unique(x) for x in labels]).tolist())
  for i, color in enumerate(class_colors(names).tolist()):
    assert (tuple(color) in drawn) == (i in present)
  assert [p.name for p in tmp_path.iterdir()] == ["g.png"]


def test_grid_says_what_is_wrong(tmp_path):
  image, label = scene(8, 8, 3)
  for images in ([], [image, image]):
    with pytest.raises(ValueError, match="as many images"):
      prediction_grid(tmp_path / "g.png", images, [label], [label], SHAPES)
  with pytest.raises(ValueError, match="example 0: expected a prediction of the label's shape"):
    prediction_grid(tmp_path / "g.png", [image], [label], [label[:4]], SHAPES)
  with pytest.raises(ValueError, match="uint8"):
    prediction_grid(tmp_path / "g.png", [image / 255], [label], [label], SHAPES)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("size", [(4, 3), (1, 1), (75, 130), (900, 2600)])
def test_saved_labels_are_the_ids(tmp_path, size):
  label = np.random.default_rng(0).integers(0, 3, size)
  label[0, 0] = 255
  image = np.zeros((*size, 3), np.uint8)
  path = save_png(tmp_path / "new" / "photo.png", index_image(label, SHAPES))
  assert [*path.parent.iterdir()] == [path]
  saved = Image.open(path)
  assert saved.mode == "P"
  np.testing.assert_array_equal(np.asarray(saved), label)
  palette = np.array(saved.getpalette()).reshape(-1, 3)
  np.testing.assert_array_equal(palette[:3], class_colors(SHAPES))
  overlay = overlay_with_legend(image, label, SHAPES)
  assert 300 < overlay.width <= MAX_OVERLAY_SIDE + 100


def test_saved_labels_of_many_classes_have_16_bits(tmp_path):
  names = [f"class {i}" for i in range(847)]
  label = np.arange(847)[None].repeat(3, 0)
  saved = Image.open(save_png(tmp_path / "a.png", index_image(label, names)))
  assert saved.mode == "I;16"
  np.testing.assert_array_equal(np.asarray(saved), label)


def test_saving_refuses_ids_that_do_not_fit():
  for wrong in (-1, 256):
    with pytest.raises(ValueError, match=r"expected class ids 0\.\.255"):
      index_image(np.full((2, 2), wrong), SHAPES)


def test_pixels_of_no_class_stay_as_they_are(tmp_path):
  image = np.full((600, 600, 3), 200, np.uint8)
  label = np.full((600, 600), -1)
  label[:300] = 1
  page = np.asarray(overlay_with_legend(image, label, SHAPES, alpha=1.0))
  left = (page.shape[1] - 600) // 2
  picture = page[left : left + 600, left : left + 600]  # the margins are equal
  assert (picture[300:] == 200).all()
  assert (picture[:300] == class_colors(SHAPES)[1]).all()


def test_the_legend_of_a_large_image_can_be_read_on_a_page():
  """12 megapixels, shown 600 pixels wide: letters of 12 pixels or more, beside a swatch as high."""
  image, label = np.full((3000, 4000, 3), 200, np.uint8), np.zeros((3000, 4000), int)
  page = np.asarray(overlay_with_legend(image, label, ["sand"], alpha=0.0))
  swatch = (page == class_colors(["sand"])[0]).all(-1).any(1).sum()
  assert swatch * 600 / page.shape[1] > 12


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
  path = tmp_path / "a.png"
  path.write_bytes(b"old")

  def half(file, data):
    file.write_text("half")
    raise OSError("disk full")

  monkeypatch.setattr(pathlib.Path, "write_bytes", half)
  with pytest.raises(OSError, match="disk full"):
    save_png(path, Image.new("RGB", (4, 3)))
  assert path.read_bytes() == b"old"
  assert list(tmp_path.iterdir()) == [path]
