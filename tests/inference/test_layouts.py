"""Layouts other than sliding windows, against a plain computation; recorded arrays are replayed in
test_cat_seg_parity.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rpn_jax.base import fields
from rpn_jax.base.errors import InputError
from rpn_jax.config import Run, check, defaults
from rpn_jax.inference import layouts, sliding, views
from rpn_jax.models.resizing import resize_grid

CROP, STRIDE, SQUARE, CLASSES = 24, 16, 40, 5


@jax.jit
def network(windows):
  """Logits (N, 12, 12, C): colors of 2-pixel patches, larger to the right and to the bottom."""
  n, grid = windows.shape[0], CROP // 2
  means = jnp.asarray(windows).reshape(n, grid, 2, grid, 2, 3).mean((2, 4))
  place = 1 + jnp.arange(grid)[:, None] / 6
  mixed = means @ np.linspace(-2, 2, 3 * CLASSES).reshape(3, CLASSES)
  return mixed * place * place[:, None]


resize = lambda x, size: np.asarray(resize_grid(np.ascontiguousarray(x), *size))
scored = lambda window: jax.nn.sigmoid(network(window[None]))[0]


def square_scores(image, size, flip=False):
  """The sliding window of CAT-Seg, with everything at full size."""
  large = resize(image, (SQUARE, SQUARE))
  total, count = np.zeros((SQUARE, SQUARE, CLASSES)), np.zeros((SQUARE, SQUARE, 1))
  upsampled = lambda x: jax.nn.sigmoid(resize(network(x[None])[0], (CROP, CROP)))
  for y in range(0, SQUARE - CROP + 1, STRIDE):
    for x in range(0, SQUARE - CROP + 1, STRIDE):
      total[y : y + CROP, x : x + CROP] += upsampled(large[y : y + CROP, x : x + CROP])
      count[y : y + CROP, x : x + CROP] += 1
  whole = resize(upsampled(resize(image, (CROP, CROP))), (SQUARE, SQUARE))
  return resize(np.float32((total / count + whole) / 2), size)


def whole_scores(image, size, keep_padding=True):
  """The whole image at once; the padding is cut off, or the grid instead."""
  height, width = image.shape[:2]
  padded = np.pad(image, ((0, -height % 32), (0, -width % 32), (0, 0)))
  scores = scored(resize(padded, (CROP, CROP)))
  if not keep_padding:
    scores = resize(scores, padded.shape[:2])
  return resize(scores[:height, :width], size)


PLAIN = {
  "square": ({"layout": "square", "square": SQUARE}, square_scores),
  "whole": ({"layout": "whole"}, whole_scores),
  "cut": (
    {"layout": "whole", "keep_padding": False}, lambda *args: whole_scores(*args, False),
  ),
}  # fmt: skip


SMALL = CLASSES * 4**2


def slider(options, **more):
  geometry = {"crop": CROP, "stride": STRIDE, **options, **more}
  return sliding.SlidingWindow(network, CLASSES, **geometry)


def image_of(height, width, seed=0):
  return np.random.default_rng(seed).normal(size=(height, width, 3)).astype(np.float32)


# Tiles of 4 pixels, or as few as an image of this size takes.
@pytest.mark.parametrize(
  "shape, size, elements",
  [
    ((60, 90), (75, 113), SMALL),  # larger than the square
    pytest.param((60, 90), (75, 113), views.TILE_ELEMENTS, marks=pytest.mark.slow),
    pytest.param((30, 21), (30, 21), SMALL, marks=pytest.mark.slow),  # smaller on both sides
    ((9, 80), (7, 33), views.TILE_ELEMENTS),  # wide, and lower than the grid of the logits
    pytest.param((64, 32), (150, 64), views.TILE_ELEMENTS, marks=pytest.mark.slow),  # no padding
  ],
)
@pytest.mark.parametrize("name", PLAIN)
def test_tiles_are_the_plain_computation(name, shape, size, elements, monkeypatch):
  monkeypatch.setattr(views, "TILE_ELEMENTS", elements)
  options, plain = PLAIN[name]
  image = image_of(*shape)
  want = plain(image, size)
  slide = slider(options)
  np.testing.assert_allclose(slide.scores(image, size), want, atol=1e-5)
  best = np.sort(want, -1)
  clear = best[..., -1] - best[..., -2] > 1e-4  # elsewhere rounding may decide
  assert clear.mean() > 0.3  # padding is a tie
  np.testing.assert_array_equal(slide(image, size)[clear], want.argmax(-1)[clear])


@pytest.mark.parametrize("name", PLAIN)
def test_mirrored_views_are_averaged(name):
  options, plain = PLAIN[name]
  image, size = image_of(33, 50), (40, 61)
  mirrored = plain(image[:, ::-1], size)[:, ::-1]
  want = (plain(image, size) + mirrored) / 2
  np.testing.assert_allclose(slider(options, flip=True).scores(image, size), want, atol=1e-5)
  assert abs(mirrored - want).max() > 0.01


@pytest.mark.parametrize("name", PLAIN)
def test_a_batch_returns_every_image(name):
  options, plain = PLAIN[name]
  calls = []

  def counted(windows):
    calls.append(windows.shape)
    return network(windows)

  geometry = {"crop": CROP, "stride": STRIDE, **options}
  slide = sliding.SlidingWindow(counted, CLASSES, window_batch=4, **geometry)
  images = [image_of(*shape, seed) for seed, shape in enumerate([(30, 40), (50, 20), (70, 90)])]
  sizes = [(32, 50), (33, 44), (10, 20)]
  for image, size, logits in zip(images, sizes, slide.window_logits(images), strict=True):
    scores = logits.merge(views.all_scores, size)
    np.testing.assert_allclose(scores, plain(image, size), atol=1e-5)
    # No window is there twice: of many classes their logits are not small.
    assert [len(x) for x in logits.logits] == ([4, 1] if name == "square" else [1])
  windows = 3 * (5 if name == "square" else 1)
  assert calls == [(4, CROP, CROP, 3)] * -(-windows // 4)


def test_images_of_many_sizes_share_programs():
  rng = np.random.default_rng(0)
  for options, _ in PLAIN.values():
    views.tile_program.cache_clear()
    for size in rng.integers(60, 400, (12, 2)):
      shape = np.rint(36 * size / size.min()).astype(int)
      assert slider(options)(image_of(*shape), tuple(size)).shape == tuple(size)
    assert views.tile_program.cache_info().misses <= 8


@pytest.mark.parametrize(
  "options, message",
  [
    ({"layout": "whole", "scales": (1.0, 0.5)}, r"scales: expected \(1.0,\) where images are"),
    ({"layout": "square", "square": 40, "scales": (2.0,)}, r"scales: expected \(1.0,\) where"),
    ({"layout": "square", "square": 20}, "square: expected at least 24 pixels, the crop, got 20"),
    ({"layout": "square", "square": 40, "stride": 30}, "expected a stride of 1 to 24 pixels"),
  ],
)
def test_what_a_layout_cannot_do_is_refused(options, message):
  with pytest.raises(ValueError, match=message):
    slider(options)


@pytest.mark.parametrize(
  "fields, message",
  [
    ({"layout": "square", "square": 500}, r"config.eval.square=500: expected at least .*=512"),
    (
      {"layout": "whole", "scales": (1.0, 0.5)},
      r"config.eval.scales=\(1.0, 0.5\): expected \(1.0,\) with config.eval.layout='whole'",
    ),
    ({"layout": "square", "stride": 600}, r"config.eval.stride=600: expected at most"),
    ({"layout": "squares"}, "config.eval.layout='squares' is not known; did you mean 'square'"),
  ],
)
def test_the_config_refuses_it_before(fields, message):
  config = defaults()
  config.eval.update(fields)
  with pytest.raises(InputError, match=message):
    check(config)
  assert "\n" not in message
  config.eval.update({"layout": "whole", "stride": 600, "scales": (1.0,)})
  check(config)  # which has no stride


def test_the_words_are_those_of_the_config():
  assert fields.spec(fields.declared(Run)["eval.layout"]).words == tuple(layouts.LAYOUTS)
  with pytest.raises(InputError, match="layout 'squares' is not known; did you mean 'square'"):
    slider({"layout": "squares"})
