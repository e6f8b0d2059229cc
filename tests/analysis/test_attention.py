"""Looking inside: the numbers behind the figures, and the figures."""

import csv
import functools
import itertools
import types
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from rpn_jax.analysis import attention, distance
from rpn_jax.base import pixels
from rpn_jax.base.errors import InputError
from rpn_jax.base.words import parse_names
from rpn_jax.config import RPNConfig
from rpn_jax.inference.predictor import Predictor, Protocol
from rpn_jax.models.cat_seg import CATSeg
from rpn_jax.models.clip import VisionTransformer, l2_normalize
from rpn_jax.models.rpn import RPN
from rpn_jax.models.trained import init_prompts
from tests.models.test_network import CAT_SEG
from tests.tiny import TINY

NAMES = ["a cat", "grass", "sky"]


@functools.cache
def weights(**changes):
  """A network, random weights, and its initial prompts."""
  network = RPN(TINY, RPNConfig(m2oe="none", **changes))
  params = tower()
  return network, params, init_prompts(network, params, embed(NAMES), jax.random.key(2), 32)


@functools.cache
def tower():
  image = jnp.zeros((1, 32, 32, 3))
  return {"visual": jax.jit(VisionTransformer(TINY).init)(jax.random.key(0), image)["params"]}


def predictor(**changes):
  """A Predictor with random weights and a text encoder of noise."""
  network, params, prompts = weights(**changes)
  protocol = Protocol(32, crop=32, stride=24, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
  encoder = types.SimpleNamespace(config=TINY, embed=embed, synonyms="mean")
  return Predictor(network, params, prompts, encoder, protocol)


def embed(names):
  """A unit vector for each name, whatever list it is in."""
  keys = [jax.random.key(zlib.crc32(name.encode())) for name in names]
  return l2_normalize(jnp.stack([jax.random.normal(key, (TINY.embed_dim,)) for key in keys]))


@pytest.fixture
def picture(tmp_path):
  path = tmp_path / "wide.png"
  Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 81, 3), np.uint8)).save(path)
  return path


def test_distance_of_even_attention():
  """Zero queries look everywhere alike: the mean distance between two patches."""
  got = distance.mean_distance(jnp.zeros((2, 3 + 6, 3 * 8)), 4, (2, 3), 16)
  places = np.array([(y, x) for y in range(2) for x in range(3)])
  want = 16 * np.linalg.norm(places[:, None] - places[None], axis=-1).mean()
  np.testing.assert_allclose(got, np.full(4, want), rtol=1e-5)


def test_distance_of_a_head_that_looks_at_itself():
  q = 100 * jnp.tile(jnp.eye(6), 2)  # the first head; the second has zeros
  q = q.at[:, 6:].set(0)
  qkv = jnp.concatenate([q, q, q], -1)[None]
  itself, evenly = distance.mean_distance(qkv, 2, (2, 3), 16)
  assert itself < 1e-3 < 10 < evenly


def test_attention_from_a_patch_is_that_of_the_tower(picture):
  """The bottom left corner, against weights computed for all patches at once."""
  e = predictor()
  _, image = attention.read_image(picture, e.protocol, TINY.patch_size)
  h, w = (side // TINY.patch_size for side in image.shape[1:3])
  maps = attention.attention_from(e, image, (0.99, 0.0))
  assert maps.shape == (TINY.vision_layers, h, w)
  np.testing.assert_allclose(maps.sum((1, 2)), 1, rtol=1e-5)
  apply = jax.jit(functools.partial(VisionTransformer(TINY).apply, mutable=["intermediates"]))
  inside = apply({"params": e.params["visual"]}, image)[1]["intermediates"]
  qkv = inside["block_1"]["attn"]["qkv"][0][:, -h * w :]
  q, k, _ = (x.reshape(1, h * w, TINY.vision_heads, -1) for x in jnp.split(qkv, 3, axis=-1))
  scores = jnp.einsum("bnhd,bmhd->bhnm", q, k) * q.shape[-1] ** -0.5
  want = jax.nn.softmax(scores).mean(1)[0, (h - 1) * w]
  np.testing.assert_allclose(maps[1], want.reshape(h, w), rtol=1e-4)


def test_distance_counts_patches_only():
  tokens = jax.random.normal(jax.random.key(0), (1, 4, 24))
  others = jax.random.normal(jax.random.key(1), (1, 5, 24))
  with_others = jnp.concatenate([others, tokens], 1)
  want = distance.mean_distance(tokens, 2, (2, 2), 8)
  np.testing.assert_allclose(distance.mean_distance(with_others, 2, (2, 2), 8), want, rtol=1e-6)


def test_a_picture_is_read_whole(picture):
  original, image = attention.read_image(picture, predictor().protocol, 8)
  assert original.shape == (40, 81, 3) and image.shape == (1, 32, 64, 3)
  assert -1 <= image.min() < -0.8 and 0.8 < image.max() <= 1


@pytest.mark.parametrize("size", [(32, 64), (40, 80), (96, 48), (60, 60)])
def test_the_network_sees_what_evaluation_sees(tmp_path, size):
  """Resized without antialiasing; only sides that are no whole patches differ."""
  path, protocol = tmp_path / "a.png", predictor().protocol
  image = np.random.default_rng(0).integers(0, 255, (*size, 3), np.uint8)
  Image.fromarray(image).save(path)
  _, inputs = attention.read_image(path, protocol, 8)
  want = pixels.to_network(image, protocol.short_side, protocol.mean, protocol.std)
  np.testing.assert_array_equal(inputs[0], want)


def test_competing_synonyms_have_the_map_of_the_best(picture):
  trained = predictor()
  _, inputs = attention.read_image(picture, trained.protocol, 8)
  (apart,) = attention.relationship_maps(trained, inputs, ["cat", "kitten", "grass"])
  trained.encoder.synonyms = "max"
  (m,) = attention.relationship_maps(trained, inputs, parse_names("cat | kitten, grass"))
  want = np.stack([apart[..., :2].max(-1), apart[..., 2]], -1)
  np.testing.assert_allclose(m, want, rtol=1e-5, atol=1e-7)
  assert not np.allclose(m[..., 0], apart[..., 0])


def test_maps_are_drawn(picture, tmp_path):
  trained = predictor()
  (path,) = attention.attention(trained, [picture], NAMES, tmp_path)
  assert path.name == "attention_wide.png" and len(np.unique(np.array(Image.open(path)))) > 50
  _, image = attention.read_image(picture, trained.protocol, 8)
  (m,) = attention.relationship_maps(trained, image, NAMES)  # one of two layers
  assert m.shape == (4, 8, 3)


def test_figures_of_files_with_one_stem_are_apart(picture, tmp_path):
  (tmp_path / "more").mkdir()
  others = [picture.with_suffix(".bmp"), tmp_path / "more" / picture.name]
  for other in others:
    Image.open(picture).save(other)
  paths = attention.attention(predictor(), [picture, *others], NAMES, tmp_path / "out")
  assert [path.name for path in paths] == [
    "attention_wide_png.png", "attention_wide_bmp.png", "attention_wide_png_2.png",
  ]  # fmt: skip
  assert sorted(paths) == sorted((tmp_path / "out").iterdir())


@pytest.mark.parametrize("size", [(60, 90), (90, 30)])
def test_names_and_titles_lie_inside_the_figure(tmp_path, monkeypatch, size):
  figures = []
  monkeypatch.setattr(attention, "save_png", lambda path, fig: figures.append(fig))
  names, layers = ["a name, its synonym, and another", "grass"], range(1, 12)
  maps = [np.random.default_rng(i).normal(size=(4, 6, 2)) for i in layers]
  attention.draw_maps(tmp_path / "m.png", np.zeros((*size, 3), np.uint8), maps, names, layers)
  (fig,) = figures
  fig.canvas.draw()
  axes = fig.axes[:-1]  # the last is the color bar
  titles = [ax.title.get_window_extent() for ax in axes[: len(maps) + 1]]
  labels = [ax.yaxis.label.get_window_extent() for ax in axes[:: len(maps) + 1]]
  for box in (*titles, *labels):
    assert box.x0 >= 0 and box.x1 <= fig.bbox.x1 and box.y1 <= fig.bbox.y1
  assert not any(a.overlaps(b) for a, b in itertools.pairwise(titles))


@pytest.mark.slow
def test_before_and_after_are_compared(picture, tmp_path):
  trained = predictor(tuner="rpn+lora")
  initial = trained.prompts
  trained.prompts = {**initial, "lora": jax.tree.map(lambda x: x + 0.3, initial["lora"])}
  png, table = distance.distance(trained, [picture, picture], NAMES, tmp_path)
  assert len(np.unique(np.array(Image.open(png)))) > 50
  rows = list(csv.DictReader(table.read_text().splitlines()))
  assert [(int(r["layer"]), int(r["head"])) for r in rows] == [(1, 1), (1, 2), (2, 1), (2, 2)]
  before, after = (np.array([float(r[f"{w}_pixels"]) for r in rows]) for w in ("before", "after"))
  assert (before > 0).all() and not np.allclose(before, after)
  # Without training the first layer, which sees no prompts, looks as CLIP's does.
  trained.prompts = initial
  distance.distance(trained, [picture], NAMES, tmp_path)
  first = next(csv.DictReader(table.read_text().splitlines()))
  assert first["before_pixels"] == first["after_pixels"]


def test_what_has_no_maps_is_refused(picture, tmp_path):
  for changes, message in (({"tuner": "lora"}, "no relationship"), ({"itp": "no_pixel"}, "no map")):
    without = predictor()
    without.network = RPN(TINY, RPNConfig(m2oe="none", **changes))
    without.prompts = {"some": 1}
    with pytest.raises(InputError, match=message):
      attention.attention(without, [picture], NAMES, tmp_path)
  squashing = predictor()
  squashing.network, squashing.prompts = CATSeg(TINY, CAT_SEG), {"some": 1}
  with pytest.raises(InputError, match=r"no relationship prompts in this config \(CAT-Seg\)"):
    attention.attention(squashing, [picture], NAMES, tmp_path)
  with pytest.raises(InputError, match="CAT-Seg resizes each to a square"):
    distance.distance(squashing, [picture], NAMES, tmp_path)
  with pytest.raises(InputError, match="at most 12"):
    attention.attention(predictor(), [picture], [str(i) for i in range(13)], tmp_path)
  (tmp_path / "no.png").write_text("no picture")
  with pytest.raises(InputError, match=r"no\.png: expected a readable"):
    attention.attention(predictor(), [tmp_path / "no.png"], NAMES, tmp_path)
