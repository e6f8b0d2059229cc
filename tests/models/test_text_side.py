"""Tuners of the text tower: where they start, what they train, and what a network reads then."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rpn_jax.config import RPNConfig
from rpn_jax.models import prompts, text_side, trained, tuners
from rpn_jax.models.clip import TextTransformer, VisionTransformer, l2_normalize
from rpn_jax.models.rpn import RPN
from tests.models.test_tuners import B16, HEAD, SMALL, TINY, check_gradients, moved

# Begin, two tokens that all share, a name, end; the second name has two synonyms.
TOKENS = np.array(
  [
    [[[48, 3, 4, 9, 49, 0]], [[0, 0, 0, 0, 0, 0]]],
    [[[48, 3, 4, 7, 8, 49]], [[48, 3, 4, 11, 49, 0]]],
    [[[48, 3, 4, 12, 49, 0]], [[0, 0, 0, 0, 0, 0]]],
  ],
  np.int32,
)
MIXED = "oft+coop+text_dora"
# Trained beside the head with ViT-B/16, whose text tower is 512 wide: per block, and beside them.
COUNTS = {
  "coop": (0, 4 * 512),
  "maple": (4 * 512 + 512 * 768 + 768, 0),
  "text_lora": (4 * 512 * 8, 0),
  "text_dora": (4 * 512 * 8 + 2 * 512, 0),
  "text_oft": (4 * 512 * 16, 0),
  "text_bitfit": (2 * 512 + 3 * 512 + 512 + 4 * 512 + 512, 512),
  "text_ssf": (2 * (2 * 512 + 3 * 512 + 512 + 4 * 512 + 512), 2 * 512),
  "text_adapter": (2 * (2 * 512 * 64 + 64 + 512), 0),
  "oft+text_oft": (4 * (768 + 512) * 16, 0),
}


@functools.cache
def towers():
  image = jax.random.normal(jax.random.key(1), (2, 32, 32, 3))
  visual = jax.jit(VisionTransformer(TINY).init)(jax.random.key(0), image)["params"]
  text = jax.jit(TextTransformer(TINY).init)(jax.random.key(5), TOKENS[0, 0])["params"]
  return image, {"visual": visual, "text": text}


@functools.cache
def tiny(tuner):
  model = RPN(TINY, RPNConfig(tuner=tuner, **SMALL))
  _, params = towers()
  tree = trained.init_prompts(model, params, TOKENS, jax.random.key(3), 32)
  return model, params, tree


@functools.partial(jax.jit, static_argnums=0)
def encoded(model, variables):
  return model.apply(variables, TOKENS, method="encode_text")


@jax.jit
def plain(params):
  """By the frozen text tower."""
  encode = functools.partial(
    text_side.encode, lambda module, tokens: module(tokens), tokens_CxSxKxT=TOKENS, clip=TINY
  )
  return TextTransformer(TINY).apply({"params": params}, method=lambda module: encode(module))


@pytest.mark.parametrize("tuner", COUNTS)
@pytest.mark.parametrize("layers", [2, pytest.param(12, marks=pytest.mark.slow)])
def test_parameter_counts(tuner, layers):
  block, rest = COUNTS[tuner]
  clip = dataclasses.replace(B16, vision_layers=layers, text_layers=layers)
  model = RPN(clip, RPNConfig(tuner=tuner))
  shapes = jax.eval_shape(
    lambda: model.init(jax.random.key(0), jnp.zeros((1, 224, 224, 3)), jnp.zeros((15, 512)))
  )
  assert prompts.count(shapes["prompts"]) == HEAD + layers * block + rest


def test_means_are_over_sentences_then_synonyms():
  _, params = towers()
  rows = jax.jit(lambda tokens: TextTransformer(TINY).apply({"params": params["text"]}, tokens))(
    TOKENS.reshape(-1, 6)
  )
  rows = l2_normalize(rows).reshape(3, 2, -1)
  want = l2_normalize(jnp.stack([rows[0, 0], rows[1].sum(0), rows[2, 0]]))
  np.testing.assert_allclose(plain(params["text"]), want, atol=1e-6)


@pytest.mark.parametrize(
  "tuner",
  [
    MIXED,
    *(
      pytest.param(f"text_{name}", marks=pytest.mark.slow)
      for name in ("adapter", "bitfit", "lora", "oft", "ssf")
    ),
  ],
)
def test_it_starts_as_the_frozen_text_tower_to_the_bit(tuner):
  model, params, tree = tiny(tuner)
  want = plain(params["text"])
  np.testing.assert_array_equal(encoded(model, trained.join(params, tree)), want)
  assert np.abs(encoded(model, trained.join(params, moved(tree))) - want).max() > 1e-3


@pytest.mark.parametrize(
  "tuner", [MIXED, "maple", pytest.param("rpn+coop", marks=pytest.mark.slow)]
)
def test_every_trained_tensor_gets_a_gradient(tuner):
  model, params, tree = tiny(tuner)
  check_gradients(model, params, moved(tree), towers()[0], TOKENS)


def test_coop_trains_the_vectors_of_the_first_tokens():
  model, params, tree = tiny(MIXED)
  offset = 0.1 * jax.random.normal(jax.random.key(9), (2, TINY.text_width))
  got = encoded(model, trained.join(params, {**tree, "offset": offset}))
  # The same by two unused rows of the vocabulary.
  table = params["text"]["token_embedding"]
  table = table.at[30].set(table[3] + offset[0]).at[31].set(table[4] + offset[1])
  replaced = np.select([TOKENS == 3, TOKENS == 4], [30, 31], TOKENS)
  tower = jax.jit(TextTransformer(TINY).apply)
  rows = tower({"params": {**params["text"], "token_embedding": table}}, replaced.reshape(-1, 6))
  rows = l2_normalize(rows).reshape(3, 2, -1)
  want = l2_normalize(jnp.stack([rows[0, 0], rows[1].sum(0), rows[2, 0]]))
  np.testing.assert_allclose(got, want, atol=1e-6)


def test_maple_replaces_what_earlier_blocks_made_of_its_tokens():
  model, params, tree = tiny("maple")
  assert tree["context"].shape == (2, 2, TINY.text_width)
  got = encoded(model, trained.join(params, tree))
  # Of the tokens themselves nothing is left.
  others = np.select([TOKENS == 3, TOKENS == 4], [5, 6], TOKENS)
  variables = trained.join(params, tree)
  same = jax.jit(lambda: model.apply(variables, others, method="encode_text"))()
  np.testing.assert_allclose(same, got, atol=1e-6)
  for level in range(2):
    noise = 0.3 * jax.random.normal(jax.random.key(8), tree["context"].shape[1:])
    changed = {**tree, "context": tree["context"].at[level].add(noise)}
    assert np.abs(encoded(model, trained.join(params, changed)) - got).max() > 1e-4


def test_in_inference_embeddings_take_the_tokens_place():
  model, params, tree = tiny(MIXED)
  variables, (image, _) = trained.join(params, moved(tree)), towers()
  apply = jax.jit(model.apply)
  np.testing.assert_allclose(
    apply(variables, image, encoded(model, variables)), apply(variables, image, TOKENS), atol=1e-5
  )
  # What is merged at inference keeps the text tower's tuners.
  network, merged, rest = model.merged(params, moved(tree))
  assert network.config.tuner == "coop+text_dora" and network.towers == ("visual", "text")
  joined = trained.join(merged, rest)
  np.testing.assert_allclose(
    jax.jit(network.apply)(joined, image, encoded(network, joined)),
    apply(variables, image, TOKENS),
    atol=2e-5,
  )


def test_a_network_without_such_tuners_has_no_text_tower():
  model = RPN(TINY, RPNConfig(tuner="rpn+lora", **SMALL))
  assert model.towers == ("visual",) and not model.text_tuners
  encoder = types.SimpleNamespace(embed=lambda names: np.ones((len(names), 3)))
  assert model.text_input(encoder, ["a", "b"]).shape == (2, 3)


def test_sentences_that_begin_differently_have_no_context_in_common():
  rows = np.array([[[48, 3, 4, 9, 49]], [[48, 3, 5, 9, 49]]])
  encoder = types.SimpleNamespace(tokens=lambda names: rows, sentences=1)
  assert text_side.tokens(encoder, ["a", "b"], 1).shape == (2, 1, 1, 5)
  with pytest.raises(ValueError, match="context_tokens=2: expected sentences of"):
    text_side.tokens(encoder, ["a", "b"], 2)


def test_a_name_is_no_part_of_the_context():
  ids = {"red dog": 7, "a": 8, "b": 9}
  rows = lambda names: np.array([[[48, ids[name], 49]] for name in names])
  encoder = types.SimpleNamespace(tokens=rows, sentences=1)
  with pytest.raises(ValueError, match="context_tokens=1: expected sentences of"):
    text_side.tokens(encoder, ["red dog"], 1)  # alone, or beside others that begin so


@pytest.mark.parametrize("words", ["coop+maple", "lora+dora", "oft+rpn+lora", "text_oft+text_lora"])
def test_words_that_exclude_each_other(words):
  with pytest.raises(ValueError, match=r"expected one of .* at the most"):
    tuners.parse(words)
  assert tuners.of_text(("rpn", "lora", "text_lora", "coop")) == ("text_lora", "coop")


def test_a_block_that_does_not_divide_the_width():
  config = RPNConfig(tuner="oft", oft_block=5)
  site = tuners.Site("in_proj", 16, 48)
  with pytest.raises(ValueError, match="oft_block=5: expected a divisor of the tower's width, 16"):
    tuners.TUNERS["oft"].parameters(site, config)


def test_rotations_are_orthogonal():
  skew = 0.3 * jax.random.normal(jax.random.key(0), (3, 4, 4, 4))
  r = tuners._rotations({"skew": skew})
  np.testing.assert_allclose(r @ r.mT, np.broadcast_to(np.eye(4), r.shape), atol=1e-5)
  np.testing.assert_array_equal(
    tuners._rotations({"skew": 0 * skew}), np.broadcast_to(np.eye(4), r.shape)
  )


def test_dora_is_its_papers():
  """W' = m (W + BA) / |W + BA|, column by column, of queries and values (Liu et al., Eq. 5)."""
  rng = np.random.default_rng(0)
  kernel = rng.normal(size=(6, 18)).astype(np.float32)
  p = {n: rng.normal(size=s).astype(np.float32) for n, s in (
    ("q_a", (6, 2)), ("q_b", (2, 6)), ("v_a", (6, 2)), ("v_b", (2, 6)), ("q_norm", 6), ("v_norm", 6)
  )}  # fmt: skip
  x = rng.normal(size=(5, 6)).astype(np.float32)
  want = x @ kernel
  for name, at in (("q", slice(0, 6)), ("v", slice(12, 18))):
    w = kernel[:, at]
    direction = w + p[f"{name}_a"] @ p[f"{name}_b"]
    m = np.linalg.norm(w, axis=0) + p[f"{name}_norm"]
    want[:, at] = x @ (m * direction / np.linalg.norm(direction, axis=0))
  dora = tuners.TUNERS["dora"]
  np.testing.assert_allclose(dora.apply(p, x, x @ kernel, {"kernel": kernel}), want, atol=1e-4)
  merged = dora.merge(p, {"kernel": kernel})["kernel"]
  np.testing.assert_allclose(x @ merged, want, atol=1e-4)
