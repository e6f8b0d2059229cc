"""CAT-Seg beside its parity: sizes, chunks, any grid, what is trained, what is refused."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from rpn_jax.config import BACKBONES, CATSegConfig
from rpn_jax.models import cost_aggregation, trained
from rpn_jax.models.cat_seg import CATSeg
from rpn_jax.models.clip import CLIP, CLIPConfig
from rpn_jax.models.cost_decoder import GroupNorm
from rpn_jax.models.prompts import count
from tests.models.test_network import CAT_SEG, Encoder, variables_of
from tests.models.test_network import CLIP as TINY

L14 = CLIPConfig(**{**BACKBONES["l14"].architecture, "image_size": 336})


@pytest.mark.parametrize(
  "clip, fields, of_clip, total, frozen",
  [
    (CLIPConfig(), {}, 20_447_232, 25_115_873, 154_289_378),
    pytest.param(
      L14,
      {"resolution": 336, "guidance_layers": (7, 15)},
      64_487_424,
      70_270_177,
      433_726_946,
      marks=pytest.mark.slow,
    ),
  ],
)
def test_published_sizes(clip, fields, of_clip, total, frozen):
  network = CATSeg(clip, CATSegConfig(**fields))
  tokens = jax.ShapeDtypeStruct((2, 1, 8), jnp.int32)
  side = clip.image_size
  params = jax.eval_shape(
    lambda key: CLIP(clip).init(key, jnp.zeros((1, side, side, 3)), jnp.zeros((2, 8), jnp.int32)),
    jax.random.key(0),
  )["params"]
  towers = {name: params[name] for name in network.towers}
  tree = jax.eval_shape(
    lambda params, tokens: trained.init_prompts(network, params, tokens, jax.random.key(0), 384),
    towers, tokens,
  )  # fmt: skip
  assert count({name: tree[name] for name in trained.TOWERS}) == of_clip
  assert count(tree) == total
  prompts = {name: x for name, x in tree.items() if name not in trained.TOWERS}
  assert count(params) + count(prompts) == frozen


@pytest.fixture(scope="module")
def tiny():
  """Variables of the small network, an image and token ids."""
  tokens = Encoder().tokens("abc")
  params, prompts = variables_of(CATSeg(TINY, CAT_SEG), tokens)
  image = np.random.default_rng(1).normal(size=(2, 32, 32, 3))
  return {"params": params, "prompts": prompts}, np.float32(image), tokens


@pytest.fixture(scope="module")
def inputs():
  """Made-up features, guidance and text of two images and three classes, for `segment`."""
  rng, c = np.random.default_rng(2), CAT_SEG
  array = lambda *shape: np.float32(rng.normal(size=shape))
  guidance = tuple(array(2, 4 * f, 4 * f, w) for f, w in zip((2, 4), c.guidance_widths))
  return array(2, 4, 4, TINY.embed_dim), guidance, array(3, 1, TINY.embed_dim)


def segment(variables, inputs, config, train=False):
  apply = functools.partial(CATSeg(TINY, config).apply, method="segment", train=train)
  return jax.jit(apply)(variables, *inputs)


@pytest.mark.slow
def test_chunks_computed_again_change_nothing(tiny, inputs, monkeypatch):
  config = dataclasses.replace(CAT_SEG, layers=1)

  def logits_and_gradients(remat):
    network = CATSeg(TINY, config, remat=remat)

    def loss(prompts):
      variables = {**tiny[0], "prompts": prompts}
      logits = network.apply(variables, *inputs, train=True, method="segment")
      return (logits**2).sum(), logits

    (_, logits), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(tiny[0]["prompts"])
    return logits, traverse_util.flatten_dict(grads)

  want, grads = logits_and_gradients("none")
  monkeypatch.setattr(cost_aggregation, "CHUNK_ELEMENTS", 2**12)  # one class, some positions
  got, chunked = logits_and_gradients("full")
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
  for path, value in grads.items():
    tolerance = 1e-4 * max(float(jnp.abs(value).max()), 1)
    np.testing.assert_allclose(chunked[path], value, atol=tolerance, err_msg=str(path))


def test_windows_of_any_grid():
  """A token attends to those that share its window in the image, shifted or not."""
  height, width, window = 5, 7, 3
  for shift in (0, 1):
    side, by, rows, columns, mask = cost_aggregation.window_layout(height, width, window, shift)
    assert (side, by, rows, columns) == (3, shift, 1, 2)
    at = np.arange((height + rows) * (width + columns)).reshape(height + rows, width + columns)
    at = np.roll(at, (-shift, -shift), (0, 1))
    windows = at.reshape(2, 3, 3, 3).swapaxes(1, 2).reshape(-1, 9)
    for ids, added in zip(windows, mask):
      y, x = ids // (width + columns), ids % (width + columns)
      inside = (y < height) & (x < width)
      for i, j in np.ndindex(9, 9):
        if inside[i] and inside[j]:  # without the roll they are within a window's side
          near = abs(y[i] - y[j]) < window and abs(x[i] - x[j]) < window
          assert added[i, j] == (0 if near else cost_aggregation.NOT_NEIGHBORS)
        elif inside[i] != inside[j]:
          assert added[i, j] == cost_aggregation.NOT_NEIGHBORS


def test_a_grid_that_is_no_multiple_of_the_window(tiny, inputs):
  logits = segment(tiny[0], inputs, dataclasses.replace(CAT_SEG, window=3))
  assert logits.shape == (2, 16, 16, 3) and jnp.isfinite(logits).all()


@pytest.fixture(scope="module")
def base(tiny, inputs):
  return segment(tiny[0], inputs, CAT_SEG)


def test_classes_in_another_order(tiny, inputs, base):
  order = np.array([2, 0, 1])
  features, guidance, text = inputs
  got = segment(tiny[0], (features, guidance, text[order]), CAT_SEG)
  np.testing.assert_allclose(got, base[..., order], atol=1e-4)


def test_pooling_differs_between_training_and_evaluation(tiny, inputs, base):
  pooled = segment(tiny[0], inputs, CAT_SEG, train=True)
  assert float(jnp.abs(pooled - base).max()) > 1e-4
  same = dataclasses.replace(CAT_SEG, class_pooling_eval=CAT_SEG.class_pooling_train)
  np.testing.assert_allclose(segment(tiny[0], inputs, same), pooled, atol=1e-5)


# Also compared with what the official code gives: test_cat_seg_parity.py.
REPLAYED = (("pad_len", 0), ("pad_len", 2), ("class_attention", "full"))


@pytest.mark.parametrize(
  "field, value",
  [
    ("class_pool_align_corners", False), ("class_residual_includes_pooled", False), ("layers", 1),
    *(pytest.param(*quirk, marks=pytest.mark.slow) for quirk in REPLAYED),
  ],
)  # fmt: skip
def test_every_quirk_matters(tiny, inputs, base, field, value):
  pooled = {"class_pooling_eval": (2, 2)} if "pool" in field else {}
  want = segment(tiny[0], inputs, dataclasses.replace(CAT_SEG, **pooled)) if pooled else base
  got = segment(tiny[0], inputs, dataclasses.replace(CAT_SEG, **pooled, **{field: value}))
  assert float(jnp.abs(want - got).max()) > 1e-4


@pytest.mark.parametrize("channels, groups", [(16, 1), (24, 1), (40, 2), (63, 3)])
def test_channels_are_normalized_in_as_many_groups_as_they_have_whole_16(channels, groups):
  rng = np.random.default_rng(0)
  x = rng.normal(2, 3, (2, 3, 4, 5, channels)).astype(np.float32)
  prompts = {name: rng.normal(size=channels).astype(np.float32) for name in ("scale", "bias")}
  got = GroupNorm().apply({"prompts": prompts}, x)
  moments = {"axis": (2, 3, 4), "keepdims": True}
  parts = [
    (part - part.mean(**moments)) / np.sqrt(part.var(**moments) + 1e-5)
    for part in np.split(np.float64(x), groups, axis=-1)
  ]
  want = np.concatenate(parts, axis=-1) * prompts["scale"] + prompts["bias"]
  np.testing.assert_allclose(got, want, atol=1e-5)
  CATSeg(TINY, dataclasses.replace(CAT_SEG, decoder_widths=(channels, channels)))


def test_the_residual_of_the_last_block(tiny):
  variables, image, _ = tiny
  dense = []
  for residual in ("class_token", "own"):
    network = CATSeg(TINY, dataclasses.replace(CAT_SEG, dense_residual=residual))
    features = jax.jit(functools.partial(network.apply, method="dense_features"))
    dense.append(features(variables, image)[0])
  assert float(jnp.abs(dense[0] - dense[1]).max()) > 1e-4


def test_classes_that_are_not_kept(tiny, inputs):
  config = dataclasses.replace(CAT_SEG, pad_len=2, truncated_logit=-7.0)
  logits = segment(tiny[0], inputs, config)
  assert ((logits == -7).all((1, 2)).sum(-1) == 1).all()


@pytest.mark.parametrize(
  "fields, paths",
  [
    ({"tuned": "none"}, set()),
    ({"tuned": "query_value"}, {"query", "value"}),
    ({"tuned": "query_key"}, {"query", "key"}),
    ({"tuned": "attention"}, {"kernel", "bias"}),
    ({"tuned": "none", "tuned_positions": True}, {"position_embedding"}),
  ],
)
def test_what_is_trained_of_clip(tiny, fields, paths):
  network = CATSeg(TINY, dataclasses.replace(CAT_SEG, **fields))
  tree, frozen = trained.split(tiny[0]["params"], network.trained)
  flat = traverse_util.flatten_dict(tree)
  assert {path[-1] for path in flat} == paths
  if "query" in paths:
    assert {path[:2] for path in flat} == {
      ("visual", "block_0"), ("visual", "block_1"), ("text", "block_0")
    }  # fmt: skip
  joined = trained.join(frozen, tree)["params"]
  jax.tree.map(np.testing.assert_array_equal, joined, tiny[0]["params"])


def test_the_unused_query_can_be_left_alone(tiny):
  network = CATSeg(TINY, dataclasses.replace(CAT_SEG, tuned_unused_query=False))
  tree, _ = trained.split(tiny[0]["params"], network.trained)
  assert set(tree["visual"]["block_1"]["attn"]["in_proj"]) == {"value"}
  assert set(tree["visual"]["block_0"]["attn"]["in_proj"]) == {"query", "value"}


def test_names_are_encoded_once(tiny):
  variables, _, tokens = tiny
  encode = functools.partial(CATSeg(TINY, CAT_SEG).apply, variables, method="encode_text")
  text = jax.jit(lambda: encode(tokens))()
  assert text.shape == (3, 1, TINY.embed_dim) and encode(text) is text


def test_sentences_are_encoded_in_chunks(tiny, monkeypatch):
  variables = jax.tree.map(jnp.asarray, tiny[0])
  words = np.random.default_rng(0).integers(1, 7, (5, 3))
  tokens = np.stack([np.full_like(words, 7), words, np.full_like(words, 8)], -1)

  def traced():
    apply = functools.partial(CATSeg(TINY, CAT_SEG).apply, method="encode_text")
    return jax.jit(apply).trace(variables, tokens)

  whole = traced()
  monkeypatch.setattr(cost_aggregation, "CHUNK_ELEMENTS", 2**10)  # five sentences
  chunked = traced()
  assert "scan" not in str(whole.jaxpr) and "length=3" in str(chunked.jaxpr)
  want, got = (x.lower().compile()(variables, tokens) for x in (whole, chunked))
  np.testing.assert_allclose(got, want, atol=1e-6)


@pytest.mark.parametrize(
  "fields, message",
  [
    ({"resolution": 36}, "resolution=36: expected a multiple of the patch size, 8, as 192"),
    ({"guidance_layers": (0, 1)}, "expected blocks of 0 to 0, since the last is read another way"),
    (
      {"class_pooling_eval": (1, 5)},
      r"class_pooling_eval=\(1, 5\): expected at most the 4 x 4 pat",
    ),
    ({"width": 30}, r"width=30: expected a multiple of 4, the heads"),
    (
      {"decoder_widths": (16, 33)},
      r"decoder_widths=\(16, 33\): expected 16 channels or more that 33 // 16 groups divide",
    ),
    ({"decoder_widths": (15, 16)}, r"decoder_widths=\(15, 16\): expected 16 channels or more"),
    (
      {"decoder_guidance_widths": (32, 3)},
      "expected fewer than the 32 channels before doubling 1",
    ),
  ],
)
def test_settings_that_do_not_fit(fields, message):
  with pytest.raises(ValueError, match=message):
    CATSeg(TINY, dataclasses.replace(CAT_SEG, **fields))


def test_a_plain_tower_is_refused():
  with pytest.raises(ValueError, match="needs the vision tower of a CLIP"):
    CATSeg(dataclasses.replace(TINY, vision="vit"), CAT_SEG)


def test_the_number_of_sentences_must_fit(tiny):
  class OfTwo(Encoder):
    sentences = 2

  network = CATSeg(TINY, dataclasses.replace(CAT_SEG, prompts=4))
  # Though names with two synonyms have four.
  with pytest.raises(ValueError, match=r"prompts=4: expected 1 or as many as .* sentences, 2"):
    network.text_input(OfTwo(), ["a, b"])
