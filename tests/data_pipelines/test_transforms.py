"""Parity with the recorded pipeline of the official code, and the label tables.

The recording is in BGR and drawn from numpy's legacy global generator; `Legacy` gives that
generator the two newer method names, `Scripted` plays a written list of draws.
"""

import json
import types

import numpy as np
import pytest

from data_pipelines import recipes, transforms
from rpn_jax.base import pixels
from rpn_jax.base.errors import InputError


def identity(count, **options):
  return transforms.LabelMap.from_ids({i: i for i in range(count)}, **options)


class Legacy:
  """numpy.random.RandomState under the Generator's names."""

  def __init__(self, seed):
    state = np.random.RandomState(seed)
    self.integers, self.uniform, self.random = state.randint, state.uniform, state.random_sample


class Scripted:
  """Returns given integers and uniforms, one by one, and checks that they were in range."""

  def __init__(self, ints, uniforms):
    self.ints, self.uniforms, self.ranges = list(ints), list(uniforms), set()

  def integers(self, low, high):
    value = self.ints.pop(0)
    self.ranges.add((low, high))
    assert low <= value < high
    return value

  def uniform(self, low, high):
    value = self.uniforms.pop(0)
    self.ranges.add((low, high))
    assert low <= value <= high
    return value


@pytest.fixture(scope="module")
def golden(golden_dir):
  with np.load(golden_dir / "pipeline.npz") as arrays:
    return dict(arrays)


def rgb(bgr):
  return np.ascontiguousarray(bgr[..., ::-1])


def same(got, want):
  np.testing.assert_array_equal(got, want)
  assert got.dtype == want.dtype


def numbers(golden, prefix, suffix):
  """0, 1, … for which `prefix{i}.suffix` was recorded."""
  found = [i for i in range(100) if f"{prefix}{i}.{suffix}" in golden]
  assert found
  return found


def test_test_resize_sizes(golden):
  for size, want in zip(golden["test_resize_in"], golden["test_resize_out"], strict=True):
    assert pixels.short_side_size(*size.tolist(), 512) == tuple(want), size


def test_train_resize_sizes(golden):
  resize = transforms.RandomResize((2048, 512))
  for height, width, ratio, *want in golden["train_resize"].tolist():
    assert list(resize.size(int(height), int(width), ratio)) == want, (height, width, ratio)


def test_resized_pixels(golden):
  image = rgb(golden["image_bgr"])
  for i in numbers(golden, "resize", "img"):
    size = transforms.fit_size(*image.shape[:2], golden[f"resize{i}.scale"].tolist())
    same(pixels.resize(image, size), rgb(golden[f"resize{i}.img"]))
    same(transforms.resize_label(golden["seg"], size), golden[f"resize{i}.seg"])


@pytest.mark.parametrize(
  ("step", "field", "value"),
  [
    ("brightness", "brightness", "beta"),
    ("contrast", "contrast", "alpha"),
    ("saturation", "saturation", "alpha"),
    ("hue", "hue", "delta"),
  ],
)
def test_one_photometric_step(golden, step, field, value):
  none = transforms.PhotoDraws(None, None, True, None, None)
  for i in numbers(golden, step, "img"):
    draws = none._replace(**{field: golden[f"{step}{i}.{value}"].item()})
    got = transforms.PhotoMetricDistortion().apply(rgb(golden["image_bgr"]), draws)
    same(got, rgb(golden[f"{step}{i}.img"]))


@pytest.mark.parametrize("mode", [0, 1])
def test_scripted_photometric_distortion(golden, mode):
  rng = Scripted(**json.loads(str(golden[f"photo_mode{mode}.draws"])))
  photo = transforms.PhotoMetricDistortion()
  draws = photo.draw(rng)
  assert not rng.ints and not rng.uniforms
  assert rng.ranges == {(0, 2), (-18, 18), (-32, 32), (0.5, 1.5)}
  assert draws.contrast_first == bool(mode)
  same(photo.apply(rgb(golden["image_bgr"]), draws), rgb(golden[f"photo_mode{mode}.img"]))


def test_seeded_photometric_distortion(golden):
  for i in numbers(golden, "photo_seed", "img"):
    got = transforms.PhotoMetricDistortion()({"image": rgb(golden["image_bgr"])}, Legacy(i))
    same(got["image"], rgb(golden[f"photo_seed{i}.img"]))


def test_seeded_crops(golden):
  label = golden["crop.seg"]
  image = np.repeat(label[..., None], 3, axis=2)
  for i in numbers(golden, "crop_seed", "seg"):
    tried = []

    class Recording(transforms.RandomCrop):
      def draw(self, height, width, rng, tried=tried):
        tried.append(super().draw(height, width, rng))
        return tried[-1]

    size = golden[f"crop_seed{i}.seg"].shape
    crop = Recording(size, golden[f"crop_seed{i}.cat_max_ratio"].item())
    got = crop({"image": image, "label": label}, Legacy(i))
    np.testing.assert_array_equal(tried, golden[f"crop_seed{i}.boxes_tried"])
    np.testing.assert_array_equal(tried[-1], golden[f"crop_seed{i}.box_used"])
    same(got["label"], golden[f"crop_seed{i}.seg"])
    same(got["image"][..., 0], got["label"])


def test_normalize_and_pad(golden):
  normalize = transforms.Normalize(pixels.IMAGENET_MEAN, pixels.IMAGENET_STD)
  example = normalize({"image": rgb(golden["image_bgr"]), "label": golden["seg"]})
  same(example["image"], golden["normalized_rgb"])
  padded = transforms.Pad(golden["padded.seg"].shape)(example)
  same(padded["image"], golden["padded.img"])
  same(padded["label"], golden["padded.seg"])


def test_every_recorded_array_is_replayed(golden):
  """Names the arrays this file reads, so that a new kind of recording cannot pass unseen."""
  kinds = {name.split(".")[0].rstrip("0123456789") for name in golden}
  assert kinds == {
    *("test_resize_in", "test_resize_out", "train_resize", "image_bgr", "seg", "resize"),
    *("brightness", "contrast", "saturation", "hue", "photo_mode", "photo_seed"),
    *("crop", "crop_seed", "normalized_rgb", "padded"),
  }


def example(height=40, width=60, classes=5, seed=0):
  rng = np.random.default_rng(seed)
  return {
    "image": rng.integers(0, 256, (height, width, 3), np.uint8),
    "label": rng.integers(0, classes, (height, width), np.uint8),
    "id": "pic_7",
  }


def test_train_transform_is_a_pure_function_of_example_and_generator():
  # The sizes of the shapes data set; the small image needs padding at ratios below 1.
  transform = recipes.train_transform(identity(5), crop=96, scale=(384, 96), ratio=(0.5, 0.9))
  source = example()
  before = {k: np.copy(v) for k, v in source.items()}
  first, again, other = (transform(source, np.random.default_rng(s)) for s in (3, 3, 4))
  assert first["image"].shape == (96, 96, 3) and first["image"].dtype == np.float32
  assert first["label"].shape == (96, 96) and first["label"].dtype == np.int32
  assert first["image"].flags.c_contiguous and first["label"].flags.c_contiguous
  assert np.all(first["label"][-1] == 255) and np.all(first["image"][-1] == 0)
  np.testing.assert_array_equal(first["image"], again["image"])
  np.testing.assert_array_equal(first["label"], again["label"])
  assert not np.array_equal(first["image"], other["image"])
  for key, value in before.items():
    np.testing.assert_array_equal(source[key], value)


@pytest.mark.parametrize(("drawn", "flipped"), [(0.49, True), (0.5, False)])
def test_flip_mirrors_image_and_label(drawn, flipped):
  source = example()
  got = transforms.RandomFlip()(source, types.SimpleNamespace(random=lambda: drawn))
  step = -1 if flipped else 1
  same(got["image"], source["image"][:, ::step])
  same(got["label"], source["label"][:, ::step])


def test_image_and_label_stay_aligned():
  # Red repeats the label, so wherever the two were moved, they must still agree.
  label = np.kron(np.arange(24, dtype=np.uint8).reshape(4, 6), np.ones((16, 16), np.uint8))
  image = np.repeat(label[..., None] * 10, 3, axis=2)
  transform = recipes.train_transform(
    identity(24),
    crop=48,
    scale=(192, 64),
    photometric=False,
    mean=(0, 0, 0),
    std=(1 / 255,) * 3,
  )
  for seed in range(4):
    got = transform({"image": image, "label": label, "id": "a"}, np.random.default_rng(seed))
    inside = got["label"] != 255
    wrong = np.abs(got["image"][..., 0] / 10 - got["label"])[inside] > 0.51
    assert wrong.mean() < 0.2  # only block edges, where the image is interpolated


def test_eval_transform_keeps_the_label_size():
  got = recipes.eval_transform(64, identity(5))(example(40, 60))
  assert got["image"].shape == (64, 96, 3) and got["image"].dtype == np.float32
  assert got["label"].shape == (40, 60) and got["label"].dtype == np.int32
  assert "label" not in recipes.eval_transform(64)({"image": example()["image"]})


def test_label_maps():
  label = np.array([[0, 1, 2], [3, 255, 1]], np.uint8)
  zero_based = transforms.LabelMap.from_ids({0: 255, 1: 0, 2: 1, 3: 2})
  same(zero_based.encode(label), np.array([[255, 0, 1], [2, 255, 0]], np.uint8))
  seen = transforms.LabelMap.seen((0, 2), 3)
  same(seen.encode(np.array([[0, 1, 2, 255]])), np.array([[0, 255, 1, 255]], np.uint8))
  same(zero_based.then(seen).encode(label), np.array([[255, 0, 255], [1, 255, 0]], np.uint8))
  rest = transforms.LabelMap.from_ids({7: 0}, unlisted="ignore")
  same(rest.encode(np.array([[7, 8]], np.uint16)), np.array([[0, 255]], np.uint8))


def test_label_maps_beyond_255_classes():
  wide = identity(459, ignore=65535)
  same(wide.encode(np.array([[458, 65535]])), np.array([[458, 65535]], np.uint16))
  narrow = wide.then(transforms.LabelMap.from_ids({300: 3}, unlisted="ignore"))
  same(narrow.encode(np.array([[300, 65535, 5]], np.uint16)), np.array([[3, 255, 255]], np.uint8))
  crop = transforms.RandomCrop((8, 8), ignore=65535)
  assert not crop.mixed(np.array([[300, 65535]], np.uint16))
  assert crop.mixed(np.array([[300, 400]], np.uint16))
  with pytest.raises(InputError, match="ignore=65535"):
    identity(459)


@pytest.mark.parametrize(("dtype", "value"), [(np.uint8, 9), (np.int32, -1), (np.int32, 70000)])
def test_a_label_outside_the_classes_names_example_and_value(dtype, value):
  label = np.array([[0, value]], dtype)
  with pytest.raises(InputError, match=rf"example pic_7: .* 0…4 or 255, got {value} on 1 pixels"):
    identity(5)({"label": label, "id": "pic_7"})


@pytest.mark.parametrize("seen", [(0, 5), (1, 1)])
def test_seen_ids_are_checked(seen):
  with pytest.raises(InputError, match="distinct seen class ids in 0…4"):
    transforms.LabelMap.seen(seen, 5)


def test_bad_id_tables():
  with pytest.raises(InputError, match="below the ignore value 255, got 300"):
    transforms.LabelMap.from_ids({1: 300})
  with pytest.raises(InputError, match="raw label values in 0…65535"):
    transforms.LabelMap.from_ids({70000: 1})
  with pytest.raises(ValueError, match="'error' or 'ignore'"):
    transforms.LabelMap.from_ids({1: 1}, unlisted="drop")
