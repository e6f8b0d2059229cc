"""Sliding windows: geometry, averaging, tiles, sizes, views."""

import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rpn_jax.base.errors import InputError
from rpn_jax.inference import layouts, sliding, views
from rpn_jax.models.resizing import resize_grid


def identity(logits):
  return logits


def test_windows_cover_and_stay_inside():
  corners = layouts.window_corners(512, 683, 512, 426)
  assert corners == [(0, 0), (0, 171)]
  for height, width in [(96, 80), (64, 64), (65, 200)]:
    seen = np.zeros((height, width), bool)
    for y, x in layouts.window_corners(height, width, 64, 53):
      assert 0 <= y <= height - 64 and 0 <= x <= width - 64
      seen[y : y + 64, x : x + 64] = True
    assert seen.all()
  assert layouts.window_corners(40, 80, 64, 53) == [(0, 0), (0, 16)]


@pytest.mark.parametrize("stride", [33, 0])
def test_pixels_between_windows_are_refused(stride):
  message = f"expected a stride of 1 to 32 pixels, the crop, got {stride}"
  with pytest.raises(ValueError, match=message):
    layouts.window_corners(96, 96, 32, stride)
  with pytest.raises(ValueError, match=message):
    slider(stride=stride)


def test_bucket():
  buckets = [1, 2, 3, 4, 6, 8, 12, 16, 24]
  for n in range(1, 25):
    assert views.round_up(n) == min(b for b in buckets if b >= n)
    assert views.round_down(n) == max(b for b in buckets if b <= n)


@pytest.mark.parametrize("sizes", [(5, 13), (13, 5), (1, 4), (4, 1), (7, 7), (512, 375)])
def test_interpolation_is_jax_s_bilinear_resize(sizes):
  x = np.random.default_rng(0).random((sizes[0], 1), np.float32)
  want = resize_grid(x, sizes[1], 1)
  got = views.interpolate(x, *views.interpolation_weights(*sizes), 0)
  np.testing.assert_allclose(got, want, atol=1e-4)
  image = np.broadcast_to(x[:, :, None], (sizes[0], 3, 3))
  want = resize_grid(image, sizes[1], 8)
  np.testing.assert_allclose(layouts.resize_image(image, sizes[1], 8), want, atol=1e-4)


@jax.jit
def colours(windows):
  """A network whose two logits are the mean red and the mean green of each 8-pixel patch.

  They grow from left to right, so that it matters where a window lies and whether it is mirrored.
  """
  n, side = windows.shape[0], windows.shape[1] // 8
  means = jnp.asarray(windows)[..., :2].reshape(n, side, 8, side, 8, 2).mean((2, 4))
  return means * (1 + jnp.arange(side)[:, None])


def slider(**options):
  options = {"crop": 32, "stride": 24, "activation": identity} | options
  return sliding.SlidingWindow(colours, 2, **options)


def image_of(height, width, seed=0):
  return np.random.default_rng(seed).normal(size=(height, width, 3)).astype(np.float32)


def reference(image, size, *, crop=32, stride=24, activation=identity):
  """The same scores in the plain way, with everything at full size."""
  height, width = image.shape[:2]
  total, count = np.zeros((height, width, 2)), np.zeros((height, width, 1))
  for y, x in layouts.window_corners(height, width, crop, stride):
    window = image[y : y + crop, x : x + crop]
    inside = window.shape[:2]
    window = np.pad(window, ((0, crop - inside[0]), (0, crop - inside[1]), (0, 0)))
    scores = activation(resize_grid(colours(window[None])[0], crop, crop))
    total[y : y + crop, x : x + crop] += scores[: inside[0], : inside[1]]
    count[y : y + crop, x : x + crop] += 1
  return np.asarray(resize_grid(np.float32(total / count), *size))


def test_window_covering_the_image_is_the_plain_forward():
  image = image_of(32, 32)
  want = jax.nn.sigmoid(resize_grid(colours(image[None])[0], 32, 32))
  got = slider(activation=jax.nn.sigmoid).scores(image)
  np.testing.assert_allclose(got, want, atol=1e-6)


@pytest.mark.slow
# Tiles of 4, 16 and 128 pixels, or fewer where the result is smaller than the input.
@pytest.mark.parametrize("elements", [2 * 4**2, 2 * 16**2, views.TILE_ELEMENTS])
@pytest.mark.parametrize(
  "shape, size",
  [
    ((32, 50), (32, 50)),
    ((70, 33), (45, 71)),  # several rows of windows; lower and wider
    ((32, 90), (16, 25)),
    ((81, 60), (200, 9)),
    ((20, 45), (20, 45)),  # lower than the window
    ((9, 11), (40, 30)),  # smaller on both sides
    ((32, 32), (1, 1)),
  ],
)
def test_tiles_of_rounded_sizes_are_the_plain_computation(shape, size, elements, monkeypatch):
  monkeypatch.setattr(views, "TILE_ELEMENTS", elements)
  image = image_of(*shape)
  want = reference(image, size, activation=jax.nn.sigmoid)
  slide = slider(activation=jax.nn.sigmoid)
  np.testing.assert_allclose(slide.scores(image, size), want, atol=1e-5)
  clear = abs(want[..., 0] - want[..., 1]) > 1e-4  # elsewhere rounding may decide
  assert clear.mean() > 0.9
  np.testing.assert_array_equal(slide(image, size)[clear], want.argmax(-1)[clear])


def test_images_of_many_sizes_share_programs():
  views.tile_program.cache_clear()
  rng = np.random.default_rng(0)
  slide = slider()
  for size in rng.integers(60, 501, (40, 2)):  # inputs of 36 x 36 to 36 x 288
    shape = np.rint(36 * size / size.min()).astype(int)
    assert slide(image_of(*shape), tuple(size)).shape == tuple(size)
  # A result is 1.7 to 13.9 times as large as the network's input; windows are 8, 16 or 32.
  assert views.tile_program.cache_info().misses <= 12


def test_programs_that_were_not_used_for_long_are_freed():
  views.tile_program.cache_clear()
  make = lambda side: views.tile_program((side,), (3,), (32,), identity, views.class_ids)
  first = weakref.ref(make(0))
  for side in range(1, views.KEPT_PROGRAMS):
    make(side)
  gc.collect()
  assert first() is not None
  make(views.KEPT_PROGRAMS)
  gc.collect()
  assert first() is None
  assert views.tile_program.cache_info().currsize == views.KEPT_PROGRAMS


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_scores_that_are_not_finite_are_refused(value):
  def broken(windows):
    return colours(windows).at[0, 1, 2, 0].set(value)

  slide = sliding.SlidingWindow(broken, 2, crop=32, stride=32)
  with pytest.raises(InputError, match=r"1 of 32 are NaN or infinite: use config\.dtype=float32"):
    slide(image_of(32, 32))


def test_a_stream_is_the_images_one_by_one():
  calls = []

  def counted(windows):
    calls.append(len(windows))
    return colours(windows)

  images = [image_of(*shape, seed) for seed, shape in enumerate([(32, 50), (20, 20), (70, 90)])]
  sizes = [(32, 50), (33, 44), (10, 20)]
  slide = sliding.SlidingWindow(counted, 2, crop=32, stride=24, window_batch=4)
  got = list(slide.stream(zip(images, sizes)))
  assert calls == [4] * 4  # 2 + 1 + 12 windows
  for image, size, ids in zip(images, sizes, got, strict=True):
    assert ids.shape == size and ids.dtype == np.int32
    one = slider(window_batch=1, activation=jax.nn.sigmoid)(image, size)
    np.testing.assert_array_equal(ids, one)
  assert list(slide.stream([])) == []


def test_penalty_moves_the_arg_max():
  image = np.zeros((32, 32, 3), np.float32)
  image[..., 0], image[..., 1] = 0.55, 0.5
  assert (slider()(image) == 0).all()
  assert (slider(penalty=0.3, penalized=[0])(image) == 1).all()
  assert (slider(class_of_row=[7, 5])(image) == 7).all()


def test_mirrored_views_are_averaged():
  # Two columns of windows with a stride that does not divide: mirrored they lie elsewhere.
  image = image_of(40, 51)
  size = (27, 64)
  mirrored = reference(image[:, ::-1], size)[:, ::-1]
  want = (reference(image, size) + mirrored) / 2
  np.testing.assert_allclose(slider(flip=True).scores(image, size), want, atol=1e-5)
  assert abs(mirrored - want).max() > 0.01


def test_scaled_views_are_averaged():
  image = image_of(48, 60)
  size = (50, 70)
  # At half size the image is smaller than the window.
  parts = [
    reference(image, size),
    reference(np.asarray(resize_grid(image, 24, 30)), size),
    reference(np.asarray(resize_grid(image, 72, 90)), size),
  ]
  slide = slider(scales=(1.0, 0.5, 1.5), penalty=0.25, penalized=[1])
  want = np.mean(parts, 0) - np.float32([0, 0.25])
  np.testing.assert_allclose(slide.scores(image, size), want, atol=1e-4)


def test_all_scores_are_never_there_at_once(monkeypatch):
  """What the program of a wide image with 847 classes holds at a time."""
  view = views.View(512, 2048, tuple(layouts.window_corners(512, 2048, 512, 426)), (512, 512))
  logits = jax.ShapeDtypeStruct((6, 32, 32, 847), np.float32)
  calls, program = [], views.tile_program
  stand_in = lambda *a: lambda *arrays: calls.append((a, arrays)) or np.zeros((1, 1))
  monkeypatch.setattr(views, "tile_program", stand_in)
  views.merge_views(
    [view], [np.empty((6, 1))], np.zeros(847, np.float32), (1024, 4096),
    activation=jax.nn.sigmoid, output=views.class_ids,
  )  # fmt: skip
  static, ((part,), penalty) = calls[0]
  lowered = program(*static).lower(((logits, *part[1:]),), penalty)
  memory = lowered.compile().memory_analysis()
  assert 10e6 < memory.temp_size_in_bytes < 400e6  # of 14 GB
