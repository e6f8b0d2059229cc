"""The recipe of detectron2: parity with what was recorded from the code of CAT-Seg's authors.

Sizes are read from the set, so that another one runs unchanged (`--golden-catseg`).
"""

import re

import numpy as np
import pytest

from data_pipelines import recipes, transforms
from rpn_jax.base import fields, pixels
from rpn_jax.base.errors import InputError
from rpn_jax.config import Run, check, defaults

# What makes pixels readable again after normalization.
PLAIN = {"mean": (0, 0, 0), "std": (1 / 255,) * 3}


@pytest.fixture(scope="module")
def golden(golden_catseg):
  with np.load(golden_catseg / "preprocess.npz") as arrays:
    return dict(arrays)


def label_map():
  return transforms.LabelMap.from_ids({i: i for i in range(255)})


def test_every_recorded_array_is_replayed(golden):
  kinds = {re.sub(r"\d+", "", name) for name in golden}
  parts = ("image_in", "label_in", "resize_crop_flip", "image_out", "label_out")
  assert kinds == {
    *("test_in", "test_out_a", "test_out_b", "color_in", "color_draws", "color_out"),
    *(f"train_{case}_{part}" for case in ("normal", "extreme") for part in parts),
  }


def test_recorded_evaluation_images(golden):
  image, short_side = golden["test_in"], min(golden["test_out_a"].shape[:2])
  # The set does not say the limits: that of `a` is not reached, that of `b` is.
  limits = {"a": 4 * max(golden["test_out_a"].shape), "b": max(golden["test_out_b"].shape)}
  for case, long_side in limits.items():
    options = {"recipe": "detectron2", "long_side": long_side, **PLAIN}
    got = recipes.eval_transform(short_side, **options)({"image": image})["image"]
    np.testing.assert_array_equal(got, golden[f"test_out_{case}"])
    args = image, short_side, *PLAIN.values(), long_side, "detectron2"
    np.testing.assert_array_equal(pixels.to_network(*args), got)
  unlimited = recipes.eval_transform(short_side, recipe="detectron2", **PLAIN)({"image": image})
  np.testing.assert_array_equal(unlimited["image"], golden["test_out_a"])


class Recorded:
  """Gives the recorded crop and flip in the order in which they are drawn."""

  def __init__(self, y, x, flip):
    self.offsets, self.flip = [int(y), int(x)], flip

  def uniform(self, low, high):
    assert low == high == 1
    return 1.0

  def integers(self, low, high):
    assert low <= self.offsets[0] < high
    return self.offsets.pop(0)

  def random(self):
    return 0.0 if self.flip else 0.999


@pytest.mark.parametrize("case", ["normal", "extreme"])
def test_recorded_training_images(golden, case):
  recorded = lambda part: golden[f"train_{case}_{part}"]
  height, width, y, x, h, w, flip = recorded("resize_crop_flip").tolist()
  crop = recorded("label_out").shape
  assert (h, w) == (min(height, crop[0]), min(width, crop[1]))
  # The limits that the two recorded sizes tell: crops are as large as the short side.
  scale = (max(golden["train_extreme_resize_crop_flip"][:2].tolist()), crop[0])
  assert transforms.RandomResize(scale, (1, 1), "detectron2").size(
    *recorded("label_in").shape, 1.0
  ) == (height, width)
  transform = recipes.train_transform(
    label_map(), recipe="detectron2", crop=crop, scale=scale, ratio=(1.0, 1.0), photometric=False,
    **PLAIN,
  )  # fmt: skip
  example = {"image": recorded("image_in"), "label": recorded("label_in"), "id": case}
  got = transform(example, Recorded(y, x, flip))
  np.testing.assert_array_equal(got["image"].transpose(2, 0, 1), recorded("image_out"))
  np.testing.assert_array_equal(got["label"], recorded("label_out"))


class Draws:
  """Gives recorded values, a coin or a value at a time."""

  def __init__(self, values):
    self.values = values.tolist()

  def integers(self, low, high):
    value = self.values.pop(0)
    assert low <= value < high and value == int(value)
    return int(value)

  def uniform(self, low, high):
    value = self.values.pop(0)
    assert low <= value <= high
    return value


def test_recorded_colors(golden):
  transform = recipes.train_transform(label_map(), recipe="detectron2")
  (colors,) = (t for t in transform.transforms if isinstance(t, transforms.PhotoMetricDistortion))
  cases = [name.removesuffix("_draws") for name in golden if name.endswith("_draws")]
  assert cases
  for case in cases:
    draws = Draws(golden[f"{case}_draws"])
    got = colors({"image": golden["color_in"]}, draws)["image"]
    assert not draws.values
    np.testing.assert_array_equal(got, golden[f"{case}_out"])


def test_rules_of_nearest_pixels():
  pick = transforms.source_indices
  np.testing.assert_array_equal(pick(4, 8, "floor_nearest"), [0, 0, 1, 1, 2, 2, 3, 3])
  np.testing.assert_array_equal(pick(9, 3, "floor_nearest"), [0, 3, 6])
  np.testing.assert_array_equal(pick(9, 3, "nearest"), [1, 4, 7])
  # In float32, 120 · (400 / 384) is below 125, so that the pixel is another.
  found = pick(400, 384, "floor_nearest")
  assert found[120] == 124 and 120 * 400 / 384 == 125
  np.testing.assert_array_equal(np.delete(found - np.arange(384) * 400 // 384, [120, 216, 240]), 0)
  label = np.arange(9, dtype=np.uint8)[None]
  for library in pixels.RESIZES:
    assert transforms.resize_label(label, (1, 3), library).tolist() == [[0, 3, 6]]
    assert transforms.resize_label(label, (1, 3), library, "nearest").tolist() == [[1, 4, 7]]


def test_padding_is_gray_in_one_recipe_and_the_mean_in_the_other():
  example = {"image": np.zeros((4, 6, 3), np.uint8), "label": np.zeros((4, 6), np.uint8)}
  for recipe, want in [("mmsegmentation", 0.0), ("detectron2", (128 / 255 - 0.5) / 0.25)]:
    transform = recipes.train_transform(
      label_map(), recipe=recipe, crop=8, scale=(8, 4), ratio=(1.0, 1.0), mean=(0.5,) * 3,
      std=(0.25,) * 3,
    )  # fmt: skip
    got = transform(example, np.random.default_rng(0))
    np.testing.assert_allclose(got["image"][-1], want, rtol=1e-5)
    assert (got["label"][-1] == 255).all()


def test_the_words_are_those_of_the_config():
  words = lambda path: fields.spec(fields.declared(Run)[path]).words
  assert words("data.recipe") == recipes.RECIPES == tuple(pixels.RESIZES)
  for word in words("data.label_resize"):
    assert len(transforms.source_indices(3, 5, word)) == 5
  with pytest.raises(InputError, match="recipe 'detectron' is not known; did you mean"):
    recipes.train_transform(label_map(), recipe="detectron")
  c = defaults()
  c.data.recipe = "detectron"
  with pytest.raises(InputError, match=r"config\.data\.recipe="):
    check(c)
