"""Locality, on towers of which it is known beforehand."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rpn_jax import cli
from rpn_jax.analysis import locality
from rpn_jax.base.errors import InputError
from rpn_jax.models.clip import VisionTransformer
from tests import tiny

PATCH, GRID = 4, 5
RNG = np.random.default_rng(0)
WINDOWS = RNG.integers(0, 256, (6, PATCH * GRID, PATCH * GRID, 3), np.uint8)


def own_color(windows):
  """A tower that sees of each patch its own pixels: their mean color, (B, N, 3)."""
  batch = len(windows)
  cells = windows.reshape(batch, GRID, PATCH, GRID, PATCH, 3)
  return cells.mean((2, 4)).reshape(batch, -1, 3) + 1.0


def neighbors_color(windows):
  """One that sees a patch and all next to it."""
  padded = np.pad(own_color(windows).reshape(-1, GRID, GRID, 3), ((0, 0), (1, 1), (1, 1), (0, 0)))
  shifted = [padded[:, i : i + GRID, j : j + GRID] for i in range(3) for j in range(3)]
  return sum(shifted).reshape(len(windows), -1, 3)


def mean_color(windows):
  """One whose patches are all the mean of the window."""
  own = own_color(windows)
  return np.broadcast_to(own.mean(1, keepdims=True), own.shape)


def brightest_channel(features):
  return features.argmax(-1)


@pytest.mark.parametrize("tower", [own_color, neighbors_color])
def test_far_pixels_change_nothing_in_a_local_tower(tower):
  changed, cosine = locality.far_pixels(tower, brightest_channel, WINDOWS, PATCH, seed=0)
  assert changed == 0 and cosine == pytest.approx(1)


def test_far_pixels_change_a_tower_that_averages():
  """Each window has one color, red or green, so that each patch becomes mostly the other one."""
  windows = np.zeros((2, 20, 20, 3), np.uint8)
  windows[0, ..., 0] = windows[1, ..., 1] = 199
  changed, cosine = locality.far_pixels(mean_color, brightest_channel, windows, PATCH, seed=0)
  assert changed == 1
  # Of 25 patches 4, 6 or 9 keep their color: 4 in the corners, 12 at edges, 9 inside.
  kept = np.array([4] * 4 + [6] * 12 + [9] * 9) / 25
  before, after = np.array([200, 1, 1]), np.stack([1 + 199 * kept, 200 - 199 * kept, kept**0], -1)
  cosines = after @ before / np.linalg.norm(after, axis=-1) / np.linalg.norm(before)
  assert cosines.min() < cosine < cosines.max()


def test_a_scene_is_never_its_own_other():
  """Of windows of one color each, every far pixel is of another color."""
  windows = np.arange(7, dtype=np.uint8)[:, None, None, None] * np.ones((20, 20, 3), np.uint8)
  seen = []

  def record(images):
    seen.append(images)
    return np.ones((len(images), GRID**2, 1))

  locality.far_pixels(record, lambda x: x[..., 0], windows, PATCH, seed=3)
  pairs = [set(np.unique(mixed).tolist()) for mixed in seen[1:]]
  assert len(pairs) == 7 and all(len(pair) == 2 and i in pair for i, pair in enumerate(pairs))
  # Its patch and the neighbors stay: 4, 6 or 9 patches of 16 pixels.
  own = [(mixed[..., 0] == i).sum((1, 2)) / 16 for i, mixed in enumerate(seen[1:])]
  assert set(np.unique(own).tolist()) == {4, 6, 9}


def test_the_probe_separates_what_is_separable():
  ids = RNG.integers(0, 3, 300)
  features = np.eye(3)[ids] * [1, 10, 100] + RNG.normal(size=(300, 3)) * [0.05, 0.5, 5] + 7
  probe = locality.fit_probe(features.astype(np.float32), ids, 3)
  assert (probe(features) == ids).all()


def test_the_probe_is_at_the_minimum_of_its_loss():
  """Against the gradient by hand, with classes that overlap."""
  ids = RNG.integers(0, 3, 200)
  features = (np.eye(3)[ids] + RNG.normal(size=(200, 3))).astype(np.float32)
  probe = locality.fit_probe(features, ids, 3)
  x = (features - features.mean(0)) / features.std(0)
  logits = np.float64(x @ probe.weight_ExC + probe.bias_C)
  wrong = np.exp(logits) / np.exp(logits).sum(1, keepdims=True) - np.eye(3)[ids]
  gradient = x.T @ wrong / 200 + locality.PENALTY * probe.weight_ExC
  assert np.abs(gradient).max() < 2 * locality.TOLERANCE
  assert np.abs(wrong.mean(0)).max() < 2 * locality.TOLERANCE


def test_a_patch_has_the_class_of_most_pixels():
  label = np.zeros((1, 4, 4), int)
  label[0, :2, :2] = [[1, 1], [1, 2]]
  label[0, :2, 2:] = [[2, 2], [1, 1]]  # a tie
  label[0, 2:, 2:] = 2
  assert locality.patch_classes(label, 2, 3).tolist() == [[1, 1, 0, 2]]


@pytest.mark.parametrize("side", [16, 40])
def test_windows_of_images_and_labels_belong_together(side):
  label = RNG.integers(0, 4, (4, 6)).astype(np.uint8).repeat(6, 0).repeat(6, 1)
  scene = {"image": np.stack([label * 60] * 3, -1), "label": label}
  image, classes = locality.take_windows([scene, scene], 2, side, seed=0)
  assert image.shape == (2, side, side, 3) and classes.shape == (2, side, side)
  assert not np.array_equal(image[0], image[1])  # at other places
  # Where they are enlarged, colors are mixed at edges.
  equal = np.rint(image[..., 0] / 60) == classes
  assert equal.all() if side == 16 else equal.mean() > 0.8


def with_attention(params, scale):
  """The tower with queries and keys of its blocks scaled."""
  params = jax.tree.map(np.array, params)
  for name, block in params["visual"].items():
    if name.startswith("block_"):
      for value in block["attn"]["in_proj"].values():
        value[..., : 2 * tiny.TINY.vision_width] *= scale
  return params


def test_even_attention_has_share_one():
  # Windows of its own: of some, the share of uneven attention is one, too, to five digits.
  windows = np.random.default_rng(1).integers(0, 256, (3, 32, 32, 3), np.uint8)
  tower = locality.Tower(tiny.TINY, with_attention(tiny._params(0), 0))
  distance, share = tower.attention_distance(windows)
  places = np.stack(np.divmod(np.arange(16), 4), -1)
  even = 8 * np.linalg.norm(places[:, None] - places, axis=-1).mean()
  assert share == pytest.approx(1, rel=1e-5) and distance == pytest.approx(even, rel=1e-5)
  assert abs(locality.Tower(tiny.TINY, tiny._params(0)).attention_distance(windows)[1] - 1) > 1e-4


def test_features_are_what_a_head_gets():
  """The projected patches of the tower, however many windows there are."""
  params = tiny._params(0)
  windows = RNG.integers(0, 256, (locality.PATCHES_EACH + 3, 32, 32, 3), np.uint8)
  got = locality.Tower(tiny.TINY, params).features(windows)
  mean, std = (np.array(x) for x in locality.normalization(None, None))
  image = jnp.float32((windows / 255 - mean) / std)

  def patches(tower):
    x, _ = tower.embed(image)
    for i in range(2):
      x = tower.run_block(i, x)
    return tower.project(x)[:, 1:]

  want = VisionTransformer(tiny.TINY).apply({"params": params["visual"]}, method=patches)
  np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4)


def scenes(count=4):
  """Left half class 0 and dark, right half class 1 and bright."""
  label = np.zeros((40, 40), np.uint8)
  label[:, 20:] = 1
  image = np.repeat(label[..., None] * 200 + 20, 3, axis=2).astype(np.uint8)
  scene = {"image": image, "label": label}
  return {"train": [scene] * count, "val": [scene] * count, "names": ("dark", "bright")}


def test_the_command(tmp_path, monkeypatch, capsys):
  tiny.save(tmp_path / "clip.safetensors")
  monkeypatch.setattr(cli, "_scenes", lambda folder: scenes())
  out = tmp_path / "locality.json"
  command = ["locality", f"--clip={tmp_path}/clip.safetensors", "--image-count=3"]
  assert cli.main([*command, f"--json={out}"]) == 0
  result = json.loads(out.read_text())
  assert list(result) == [
    "fingerprint", "probe_miou", "probe_accuracy", "majority_accuracy", "attention_distance",
    "attention_distance_share", "far_changed", "far_cosine", "scenes", "seed",
  ]  # fmt: skip
  assert result["scenes"] == {"train": 3, "val": 3} and result["seed"] == 0
  assert 0.5 < result["majority_accuracy"] <= result["probe_accuracy"] <= 1
  said = capsys.readouterr().out
  assert f"{100 * result['probe_miou']:.1f} %" in said and result["fingerprint"] in said
  assert cli.main([*command[:2], "--image-count=1"]) == 2
  assert "expected two scenes or more of train, got 1" in capsys.readouterr().err


def test_a_small_grid_is_refused():
  clip = dataclasses.replace(tiny.TINY, image_size=24)
  with pytest.raises(InputError, match="4 patches a side or more, got 3"):
    locality.locality(clip, {}, scenes(), 4, 0)
