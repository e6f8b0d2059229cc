"""Pictures are read back from disk and compared with what they must show."""

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from rpn_jax.base.paths import replacing
from rpn_jax.drawing import legend, plots
from rpn_jax.drawing.images import (
  OVERLAY_LONG_SIDE,
  _resized,
  annotated,
  colorize,
  overlay,
  prediction_grid,
  save_prediction,
)
from rpn_jax.drawing.legend import _dejavu, _font_with, drawable, get_font, legend_entries, wrap
from rpn_jax.drawing.palette import BLINDNESS, FIRST_COLORS, FULL_VISION, HATCH, _lab, class_colors
from rpn_jax.drawing.plots import _figure, _moving_mean, plot_curves

SHAPES = ["red circle", "blue square", "sand"]


def scene(height, width, classes, seed=0):
  rng = np.random.default_rng(seed)
  label = np.kron(rng.integers(0, classes, (4, 4)), np.ones((height // 4, width // 4), int))
  label = np.pad(label, ((0, height - label.shape[0]), (0, width - label.shape[1])), mode="edge")
  image = rng.integers(0, 256, (height, width, 3)).astype(np.uint8)
  return image, label


def colors_in(picture) -> set[tuple]:
  return set(map(tuple, np.asarray(picture.convert("RGB")).reshape(-1, 3).tolist()))


@pytest.mark.parametrize(("count", "least"), [(12, 25), (60, 20), (150, 14), (847, 6)])
def test_class_colors_are_far_apart(count, least):
  colors = class_colors([str(i) for i in range(count)])
  assert colors.shape == (count, 3)
  assert colors.dtype == np.uint8
  assert least_distance(colors) > least


def least_distance(colors, seen_through=FULL_VISION):
  lab = _lab(np.concatenate([colors, np.uint8(HATCH)]), seen_through)
  distance = np.linalg.norm(lab[:, None] - lab[None], axis=-1) + 1e9 * np.eye(len(lab))
  return distance.min()


@pytest.mark.parametrize(("count", "least"), [(7, 15), (20, 11), (60, 7)])
def test_colorblind_palette_stays_distinct_without_red_and_green(count, least):
  names = [f"c{i}" for i in range(count)]
  for view in (FULL_VISION, *BLINDNESS):
    safe = least_distance(class_colors(names, "colorblind"), view)
    assert safe > least
    if view != FULL_VISION:
      assert safe > 1.25 * least_distance(class_colors(names), view)
  grey = np.array([[128, 128, 128]])  # what the eye sees without it is seen with it
  np.testing.assert_allclose(_lab(grey, BLINDNESS[0]), _lab(grey), atol=0.5)
  with pytest.raises(ValueError, match="default, colorblind, got 'x'"):
    class_colors(names, "x")


def test_a_name_has_its_color_in_every_list():
  alone = {name: class_colors([name])[0].tolist() for name in map(str, range(200))}
  assert len({tuple(c) for c in alone.values()}) == len(FIRST_COLORS)
  differing = list({tuple(color): name for name, color in alone.items()}.values())
  for names in (differing[:3], differing[2::-1], differing):
    assert class_colors(names).tolist() == [alone[name] for name in names]


def test_lab_agrees_with_published_values():
  # sRGB primaries and white under D65.
  expected = [(53.24, 80.09, 67.20), (87.73, -86.18, 83.18), (32.30, 79.19, -107.86), (100, 0, 0)]
  got = _lab(np.array([(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)]))
  np.testing.assert_allclose(got, expected, atol=0.1)


def test_class_colors_are_stable():
  names = [f"c{i}" for i in range(40)]
  colors = class_colors(names)
  np.testing.assert_array_equal(colors, class_colors(names))
  np.testing.assert_array_equal(colors[:15], class_colors(names[:15]))
  twice = class_colors(["a", "b", "a"])
  np.testing.assert_array_equal(twice[0], twice[2])
  colors[:] = 0  # a caller's change must not reach the next caller
  assert class_colors(names).any()
  assert class_colors([]).shape == (0, 3)


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
  path = prediction_grid(
    tmp_path / "g.png", images, labels, labels, names, title="title " * 40, unseen=(0,)
  )
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


def test_legend_is_sorted_marked_and_counted(monkeypatch):
  label = np.array([[0, 1, 1, 2], [2, 2, 9, 9]])
  colors = class_colors(SHAPES)

  def texts(*args):
    return [text + end for _, text, end in legend_entries([label], SHAPES, colors, *args)]

  assert texts((1,)) == ["sand", "blue square *", "red circle", "ignored"]
  assert texts((), True) == [
    "sand: 37.5 %",
    "blue square: 25.0 %",
    "red circle: 12.5 %",
    "ignored: 25.0 %",
  ]
  monkeypatch.setattr(legend, "LEGEND_ENTRIES", 1)
  assert texts((), True)[1] == "and 2 with fewer pixels: 37.5 %"


@pytest.mark.parametrize("text", ["x" * 300, "many words " * 30, "short", ""])
@pytest.mark.parametrize("width", [60, 200])
def test_wrapped_text_fits_and_keeps_its_end(text, width):
  font = get_font(16)
  lines = wrap(text, font, width, 3, " *")
  assert 1 <= len(lines) <= 3
  assert all(font.getlength(line) <= width for line in lines)
  assert lines[-1].endswith("*")


@pytest.mark.parametrize("size", [(4, 3), (1, 1), (75, 130), (900, 2600)])
def test_saved_labels_are_the_ids(tmp_path, size):
  label = np.random.default_rng(0).integers(0, 3, size)
  label[0, 0] = 255
  image = np.zeros((*size, 3), np.uint8)
  shown, index = save_prediction(tmp_path / "new", "photo", image, label, SHAPES)
  assert [p.name for p in (shown, index)] == ["photo_overlay.png", "photo_labels.png"]
  assert sorted(p.name for p in shown.parent.iterdir()) == ["photo_labels.png", "photo_overlay.png"]
  saved = Image.open(index)
  assert saved.mode == "P"
  np.testing.assert_array_equal(np.asarray(saved), label)
  palette = np.array(saved.getpalette()).reshape(-1, 3)
  np.testing.assert_array_equal(palette[:3], class_colors(SHAPES))
  overlay = Image.open(shown)
  assert 300 < overlay.width <= OVERLAY_LONG_SIDE + 80


def test_saved_labels_of_many_classes_have_16_bits(tmp_path):
  names = [f"class {i}" for i in range(847)]
  label = np.arange(847)[None].repeat(3, 0)
  _, index = save_prediction(tmp_path, "a", np.zeros((3, 847, 3), np.uint8), label, names)
  saved = Image.open(index)
  assert saved.mode == "I;16"
  np.testing.assert_array_equal(np.asarray(saved), label)


def test_saving_refuses_ids_that_do_not_fit(tmp_path):
  image = np.zeros((2, 2, 3), np.uint8)
  for wrong in (-1, 256):
    with pytest.raises(ValueError, match=r"expected class ids 0\.\.255"):
      save_prediction(tmp_path, "a", image, np.full((2, 2), wrong), SHAPES)
  assert not list(tmp_path.iterdir())


def test_pixels_of_no_class_stay_as_they_are(tmp_path):
  image = np.full((600, 600, 3), 200, np.uint8)
  label = np.full((600, 600), -1)
  label[:300] = 1
  page = np.asarray(annotated(image, label, SHAPES, alpha=1.0))
  left = (page.shape[1] - 600) // 2
  picture = page[left : left + 600, left : left + 600]  # the margins are equal
  assert (picture[300:] == 200).all()
  assert (picture[:300] == class_colors(SHAPES)[1]).all()


def test_letters_that_no_font_has_are_named(monkeypatch):
  monkeypatch.setattr(legend, "_font_with", lambda wanted: _dejavu())
  warned = []
  monkeypatch.setattr(legend, "_warn_of_letters", warned.append)
  path, texts = drawable(["a cat", "猫 é"])
  assert (path, texts) == (_dejavu(), ["a cat", "<U+732B> é"])
  assert warned == ["猫"]
  assert drawable(["naïve Straße"])[1] == ["naïve Straße"]


def test_letters_are_drawn_with_a_font_that_has_them():
  path = _font_with(frozenset("猫"))
  if path == _dejavu():
    pytest.skip("no font with Chinese letters is installed")
  assert drawable(["猫"]) == (path, ["猫"])


def test_a_failed_write_leaves_the_old_file(tmp_path):
  path = tmp_path / "a.png"
  path.write_bytes(b"old")

  with pytest.raises(OSError, match="disk full"), replacing(path) as temporary:
    temporary.write_bytes(b"half")
    raise OSError("disk full")
  assert path.read_bytes() == b"old"
  assert list(tmp_path.iterdir()) == [path]


@pytest.fixture
def drawn(monkeypatch):
  """The figures made during a test."""
  figures, make = [], _figure

  def keep(panels):
    figures.append(make(panels))
    return figures[-1]

  monkeypatch.setattr(plots, "_figure", keep)
  return figures


def assert_nothing_overlaps(figure):
  """Legends lie beside the axes of all panels, and everything inside the figure."""
  figure.canvas.draw()
  renderer = figure.canvas.get_renderer()
  boxes = [ax.get_window_extent(renderer) for ax in figure.axes]
  legends = [ax.get_legend() for ax in figure.axes if ax.get_legend()]
  for beside in legends:
    box = beside.get_window_extent(renderer)
    assert not any(box.overlaps(other) for other in boxes)
    assert box.x1 <= figure.bbox.x1
    assert box.y0 >= figure.bbox.y0


def test_curves_group_by_kind(tmp_path, drawn):
  steps = range(0, 2000, 10)
  history = {
    "train/loss": [(s, 100 * 0.995**s + 0.1) for s in steps],
    "train/focal": [(s, float("nan") if s == 50 else 1.0) for s in steps],
    "train/grad_norm": [(s, 2.0) for s in steps],
    "train/learning_rate": [(s, 1e-5) for s in steps],
    "eval/hiou": [(1000, 0.4), (2000, 0.5)],
    "eval/pAcc": [(1000, 0.8), (2000, 0.9)],
    "speed": [(1000, 3.0)],
  }
  path = plot_curves(tmp_path / "c.png", history, title="a title " * 20)
  assert Image.open(path).width > 1000
  figure, axes = drawn[0]
  assert [ax.get_ylabel() for ax in axes] == [
    "loss",
    "score (%)",
    "learning rate (per step)",
    "L2 norm of the gradient",
    "value",
  ]
  assert [ax.get_yscale() for ax in axes] == ["log", "linear", "linear", "linear", "linear"]
  assert len(axes[0].lines) == 4  # two losses, each raw and smoothed
  assert [t.get_text() for t in axes[1].get_legend().get_texts()] == ["pAcc: 90.0", "hIoU: 50.0"]
  np.testing.assert_allclose(axes[1].lines[1].get_ydata(), [40, 50])
  assert_nothing_overlaps(figure)


@pytest.mark.parametrize("history", [{}, {"loss": []}, {"loss": [(1, float("nan"))]}])
def test_curves_of_nothing_say_so(tmp_path, drawn, history):
  plot_curves(tmp_path / "c.png", history)
  assert "nothing" in drawn[0][1][0].texts[0].get_text()


def test_moving_mean_keeps_constants_and_ends():
  np.testing.assert_allclose(_moving_mean(np.full(200, 3.0)), 3)
  line = np.arange(200.0)
  smooth = _moving_mean(line)
  np.testing.assert_allclose(smooth[:196], line[:196])
  noise = np.random.default_rng(0).normal(size=1000)
  assert _moving_mean(noise).std() < 0.3


def test_import_is_light():
  code = (
    "import sys, rpn_jax.drawing.images, rpn_jax.drawing.plots, rpn_jax.base.console;"
    "print([m for m in ('matplotlib', 'PIL', 'tensorboardX', 'jax') if m in sys.modules])"
  )
  assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
