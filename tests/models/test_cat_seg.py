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
from rpn_jax.models.prompts import count
from tests.models.test_network import CAT_SEG, Encoder, variables_of
from tests.models.test_network import CLIP as TINY

L14 = CLIPConfig(**{**BACKBONES["l14"].architecture, "image_size": 336})


@pytest.mark.parametrize(
  "clip, fields, of_clip, total, frozen",
  [
    (CLIPConfig(), {}, 20_447_232, 25_115_873, 154_289_378),
    (L14, {"resolution": 336, "guidance_layers": (7, 15)}, 64_487_424, 70_270_177, 433_726_946),
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


def logits_and_gradients(network, variables, image, tokens):
  def loss(variables):
    logits = network.apply(variables, image, tokens, train=True)
    return (logits**2).sum(), logits

  (_, logits), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(variables)
  return logits, grads


@pytest.mark.parametrize("remat", ["none", "full"])
def test_chunks_change_nothing(tiny, monkeypatch, remat):
  want, grads = logits_and_gradients(CATSeg(TINY, CAT_SEG), *tiny)
  monkeypatch.setattr(cost_aggregation, "CHUNK_ELEMENTS", 2**12)  # one class, some positions
  got, chunked = logits_and_gradients(CATSeg(TINY, CAT_SEG, remat=remat), *tiny)
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
  for path, value in traverse_util.flatten_dict(grads).items():
    tolerance = 1e-4 * max(float(jnp.abs(value).max()), 1)
    other = traverse_util.flatten_dict(chunked)[path]
    np.testing.assert_allclose(other, value, atol=tolerance, err_msg=str(path))


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


def test_a_grid_that_is_no_multiple_of_the_window(tiny):
  variables, image, tokens = tiny
  config = dataclasses.replace(CAT_SEG, window=3)
  logits = jax.jit(CATSeg(TINY, config).apply)(variables, image, tokens)
  assert logits.shape == (2, 16, 16, 3) and jnp.isfinite(logits).all()


def test_classes_in_another_order(tiny):
  variables, image, tokens = tiny
  apply = jax.jit(CATSeg(TINY, CAT_SEG).apply)
  order = np.array([2, 0, 1])
  want = apply(variables, image, tokens)[..., order]
  np.testing.assert_allclose(apply(variables, image, tokens[order]), want, atol=1e-4)


@pytest.mark.parametrize(
  "fields, change",
  [
    ("class_pooling_eval", (2, 2)), ("class_pool_align_corners", False),
    ("class_residual_includes_pooled", False), ("dense_residual", "own"), ("pad_len", 0),
    ("truncated_logit", -7.0), ("class_attention", "full"),
  ],
)  # fmt: skip
def test_every_quirk_matters(tiny, fields, change):
  variables, image, tokens = tiny
  base = {"class_pooling_eval": (2, 2)} if "pool" in fields else {}
  base |= {"pad_len": 2} if fields == "truncated_logit" else {}
  networks = [
    CATSeg(TINY, dataclasses.replace(CAT_SEG, **{**base, **more}))
    for more in ({}, {fields: change})
  ]
  if fields == "class_pooling_eval":
    networks[0] = CATSeg(TINY, CAT_SEG)
  first, second = (jax.jit(n.apply)(variables, image, tokens) for n in networks)
  assert float(jnp.abs(first - second).max()) > 1e-4


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
  variables, image, tokens = tiny
  network = CATSeg(TINY, CAT_SEG)
  text = network.apply(variables, tokens, method="encode_text")
  apply = functools.partial(network.apply, variables, image)
  np.testing.assert_allclose(apply(text), apply(tokens), atol=1e-5)
  calls = jax.make_jaxpr(apply)(text).pretty_print()
  assert "gather" not in calls  # no token embedding


@pytest.mark.parametrize(
  "fields, message",
  [
    ({"resolution": 36}, "resolution=36: expected a multiple of the patch size, 8, as 192"),
    ({"guidance_layers": (0, 1)}, "expected blocks of 0 to 0, since the last is read another way"),
    ({"width": 30}, r"width=30: expected multiples of 4"),
    ({"decoder_widths": (16, 20)}, r"decoder_widths=\(16, 20\): expected multiples of 16"),
    (
      {"decoder_guidance_widths": (32, 3)},
      "expected fewer than the 32 channels before upsampling 0",
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
  class OfThree:
    def tokens(self, names):
      return np.zeros((len(names), 3, 8), np.int32)

  network = CATSeg(TINY, dataclasses.replace(CAT_SEG, prompts=2))
  with pytest.raises(
    ValueError, match="prompts=2: expected as many sentences in the templates, got 3"
  ):
    network.text_input(OfThree(), ["a"])
