"""Tuners of the tower: where they start, what they train, and what merging them gives."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rpn_jax.config import Optimizer, RPNConfig
from rpn_jax.models import prompts, trained, tuners
from rpn_jax.models.clip import CLIPConfig, TextTransformer, VisionTransformer, l2_normalize
from rpn_jax.models.rpn import RPN
from rpn_jax.training import step
from rpn_jax.training.losses import sigmoid_loss
from rpn_jax.training.optim import assign_groups

B16 = CLIPConfig()
TINY = CLIPConfig(
  embed_dim=12, image_size=32, patch_size=8, vision_width=16, vision_layers=2, vision_heads=2,
  text_width=8, text_layers=2, text_heads=2, context_length=16, vocab_size=50,
)  # fmt: skip
SMALL = {
  "deep_tokens": 3, "adapter_width": 4, "lora_rank": 2, "lst_reduction": 2, "m2oe": "none",
  "oft_block": 4, "context_tokens": 2,
}  # fmt: skip
OF_SITES = ["adapter", "bitfit", "dora", "lora", "oft", "ssf"]
# In `make test` the tuners of sites run together; one by one they are slow tests.
SITES = "adapter+bitfit+lora+ssf"
SINGLE = [pytest.param(name, marks=pytest.mark.slow) for name in OF_SITES]

# Trained parameters with ViT-B/16 and the head of the paper preset, 789,504 of them in the head.
HEAD = 789_504
# Per block, and beside the blocks.
COUNTS = {
  "lpm": (0, 0),
  "bitfit": (2 * 768 + 3 * 768 + 768 + 4 * 768 + 768, 2 * 768),
  "adapter": (2 * (2 * 768 * 64 + 64 + 768), 0),
  "ssf": (2 * (2 * 768 + 3 * 768 + 768 + 4 * 768 + 768), 2 * 3 * 768),
  "lora": (4 * 768 * 8, 0),
  "dora": (4 * 768 * 8 + 2 * 768, 0),
  # Rotations of 48 blocks of 16 channels for queries, keys, values and the attention's result.
  "oft": (4 * 768 * 16, 0),
  "vpt": (40 * 768, 768 * 768 + 3 * 768),
  # A gate, a way down and a block of width 96; another way down, a norm, the way up.
  "lst": (1 + 768 * 96 + 96 + 4 * 96 + 12 * 96**2 + 9 * 96, 768 * 96 + 96 + 192 + 97 * 768),
  # Of the 86,192,640 parameters of the tower, a block has 12 matrices, 9 biases and 2 norms.
  "full": (12 * 768**2 + 13 * 768, 86_192_640 - 12 * (12 * 768**2 + 13 * 768)),
}


@functools.cache
def tiny(tuner):
  """Network, frozen parameters, initial trained ones, images and text."""
  model, (params, image, text) = network(tuner), inputs()
  tree = trained.init_prompts(model, params, text, jax.random.key(3), 32)
  return model, params, tree, image, text


def network(tuner):
  return RPN(TINY, RPNConfig(tuner=tuner, **SMALL))


@functools.cache
def drawn(tuner):
  """As `tiny`, with random parameters as if trained: initial ones are a program to compile."""
  model, (params, image, text) = network(tuner), inputs()
  init = lambda: trained.init_prompts(model, params, text, jax.random.key(3), 32)
  rng = np.random.default_rng(0)
  draw = lambda x: np.float32(0.3 * rng.normal(size=x.shape))
  return model, params, jax.tree.map(draw, jax.eval_shape(init)), image, text


@functools.cache
def inputs():
  image = jax.random.normal(jax.random.key(1), (2, 32, 32, 3))
  text = l2_normalize(jax.random.normal(jax.random.key(2), (5, TINY.embed_dim)))
  params = {"visual": jax.jit(VisionTransformer(TINY).init)(jax.random.key(0), image)["params"]}
  return params, image, text


@functools.partial(jax.jit, static_argnums=0)
def apply(model, variables, image, text):
  """Equal networks are traced once."""
  return model.apply(variables, image, text)


def logits(model, params, tree, image, text):
  return apply(model, trained.join(params, tree), image, text)


def moved(tree):
  """The tree after noise, as if it had been trained."""
  rng = np.random.default_rng(7)
  # By NumPy, since every shape is programs to compile.
  return jax.tree.map(lambda x: np.float32(x + 0.05 * rng.normal(size=x.shape)), tree)


@pytest.mark.parametrize(
  "tuner, layers",
  [(tuner, 2) for tuner in COUNTS]
  + [pytest.param(tuner, 12, marks=pytest.mark.slow) for tuner in COUNTS],
)
def test_parameter_counts(tuner, layers):
  block, rest = COUNTS[tuner]
  tower = dataclasses.replace(B16, vision_layers=layers)
  assert count(tower, tuner) == HEAD + layers * block + rest


@pytest.mark.slow
def test_parameter_counts_with_rpn():
  assert count(B16, "rpn+vpt") == count(B16, "rpn") + 12 * 40 * 768 == 3_098_193 + 12 * 40 * 768


def count(tower, tuner):
  """Trained parameters."""
  model = RPN(tower, RPNConfig(tuner=tuner))
  shapes = jax.eval_shape(
    lambda: model.init(jax.random.key(0), jnp.zeros((1, 224, 224, 3)), jnp.zeros((15, 512)))
  )
  visual = prompts.count(shapes["params"]) if tuner == "full" else 0
  return prompts.count(shapes["prompts"]) + visual


@pytest.mark.parametrize(
  "tuner", [*SINGLE, pytest.param("lst", marks=pytest.mark.slow), "full", SITES]
)
def test_it_starts_as_the_frozen_tower_to_the_bit(tuner):
  bare, params, head, image, text = tiny("lpm")
  model, _, tree, _, _ = tiny(tuner)
  want = logits(bare, params, head, image, text)
  got = logits(model, params, {**tree, **head}, image, text)
  np.testing.assert_array_equal(got, want)
  # And it does not stay there.
  changed = logits(model, params, moved({**tree, **head}) | head, image, text)
  assert np.abs(changed - want).max() > 1e-3


@pytest.mark.parametrize("tuner", [*SINGLE[1:], "full", "bitfit+lora+ssf", "rpn+lora"])
def test_merged_into_the_tower_it_gives_the_same(tuner):
  model, params, tree, image, text = drawn(tuner)
  config, merged, rest = tuners.merge(model.config, params, tree)
  assert config.tuner == ("rpn" if "rpn" in tuner else "lpm")
  assert not set(rest) & {*OF_SITES, "visual"}
  want = logits(model, params, tree, image, text)
  got = logits(model.clone(config=config), merged, rest, image, text)
  np.testing.assert_allclose(got, want, atol=2e-5)


def test_what_has_no_weights_of_its_own_is_not_merged():
  model, params, tree, _, _ = drawn(SITES)
  assert tuners.merge(model.config, params, tree) == (model.config, params, tree)


@pytest.mark.parametrize(
  "tuner",
  [*SINGLE, pytest.param("vpt", marks=pytest.mark.slow), f"rpn+vpt+{SITES}", "lst", "full"],
)
def test_every_trained_tensor_gets_a_gradient(tuner):
  check_gradients(*drawn(tuner))


def check_gradients(model, params, tree, image, text):
  """Asserts that a step has a gradient for every trained tensor, and for nothing else."""
  label = np.arange(2 * 32 * 32).reshape(2, 32, 32) // 90 % len(text)
  state = step.TrainState(jnp.int32(0), tree, ())
  grads, _ = jax.jit(functools.partial(step.gradients, model=model, loss_fn=sigmoid_loss))(
    state, params, text, {"image": image, "label": label}, jax.random.key(0)
  )
  assert jax.tree.structure(grads) == jax.tree.structure(tree)
  for path, grad in jax.tree_util.tree_leaves_with_path(grads):
    assert np.abs(grad).max() > 0, jax.tree_util.keystr(path)


def test_the_whole_tower_is_within_reach():
  """Every projection and norm of the tower is a site."""
  visual = inputs()[0]["visual"]
  sites = tuners.sites(TINY)
  for part, tree in visual.items():
    if part.startswith("block_"):
      leaves = jax.tree_util.tree_leaves_with_path(tree)
      found = {tuple(k.key for k in path[:-1]) for path, _ in leaves}
      assert found == {tuners.BLOCK_SITES[site.name] for site in sites[part]}
    elif isinstance(tree, dict):
      assert part in {site.name for site in sites["stem"]}


@functools.cache
def text_tower():
  tokens = jnp.array([[48, 7, 49, 0, 0], [48, 5, 6, 8, 49]])
  return tokens, jax.jit(TextTransformer(TINY).init)(jax.random.key(0), tokens)["params"]


def test_the_whole_text_tower_is_within_reach():
  """Every projection and norm of it is a site, with the channels of its weights."""
  params, places = text_tower()[1], tuners.sites(TINY, "text")
  shapes = {}
  for part, sites in places.items():
    for site in sites:
      tree = params[site.name] if part == "stem" else params[part]
      for key in () if part == "stem" else tuners.BLOCK_SITES[site.name]:
        tree = tree[key]
      want = (site.inputs, site.outputs) if "kernel" in tree else (site.outputs,)
      assert tree.get("kernel", tree.get("scale")).shape == want
      shapes[part, site.name] = want
  leaves = jax.tree_util.tree_leaves_with_path(params)
  parents = {path[:-1] for path, _ in leaves if len(path) > 1}
  assert len(shapes) == len(parents) == 1 + 6 * TINY.text_layers


@pytest.mark.parametrize(
  "words", [*(pytest.param((x,), marks=pytest.mark.slow) for x in ("lora", "ssf")), ("lora", "ssf")]
)
@pytest.mark.parametrize("remat", ["none", pytest.param("dots", marks=pytest.mark.slow)])
def test_the_text_tower_is_tuned_at_the_same_sites(words, remat):
  tokens, params = text_tower()
  tower, config = TextTransformer(TINY, remat=remat), RPNConfig(**SMALL)
  initial = {
    word: tuners.initial(tuners.TUNERS[word], TINY, config, jax.random.key(i), "text")
    for i, word in enumerate(words)
  }

  @jax.jit
  def embed(params, tuned):
    return tower.apply({"params": params}, tokens, functools.partial(tuners.tune_part, tuned))

  plain = jax.jit(tower.apply)({"params": params}, tokens)
  np.testing.assert_array_equal(embed(params, initial), plain)
  tuned = moved(initial)
  want = embed(params, tuned)
  assert np.abs(want - plain).max() > 1e-3
  merged = tuners.merge_tower(params, tuned)
  np.testing.assert_allclose(jax.jit(tower.apply)({"params": merged}, tokens), want, atol=2e-5)
  for grad in jax.tree.leaves(jax.jit(jax.grad(lambda t: (embed(params, t) ** 2).sum()))(tuned)):
    assert np.abs(grad).max() > 0


@pytest.mark.parametrize("remat", ["dots", pytest.param("full", marks=pytest.mark.slow)])
def test_recomputed_blocks_are_tuned_too(remat):
  model, params, tree, image, text = drawn("lora+ssf")
  loss = lambda m: lambda p: m.apply({"params": params, "prompts": p}, image, text).sum()
  want, got = (jax.jit(jax.grad(loss(m)))(tree) for m in (model, model.clone(remat=remat)))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), want, got)


@pytest.mark.parametrize("tuner", [*SINGLE, SITES, "lst"])
def test_bfloat16_keeps_its_type(tuner):
  model, params, tree, image, text = drawn(tuner)
  want = logits(model, params, tree, image, text)
  half = model.clone(dtype=jnp.bfloat16)
  got, inside = jax.jit(functools.partial(half.apply, mutable=["intermediates"]))(
    trained.join(params, tree), image, text
  )
  assert {x.dtype for x in inside["intermediates"]["hidden"]} == {jnp.dtype("bfloat16")}
  assert np.abs(want - got).max() < 0.1 * np.abs(want).max()


def test_wrong_words_are_named():
  with pytest.raises(ValueError, match=r"got 'rpn\+adaptor'"):
    RPN(TINY, RPNConfig(tuner="rpn+adaptor"))
  with pytest.raises(ValueError, match=r"each once.*got 'lora\+lora'"):
    RPN(TINY, RPNConfig(tuner="lora+lora"))
  with pytest.raises(ValueError, match=r"combine='sum' is not known.* Known: cat, add, mul"):
    RPNConfig(combine="sum")


def test_a_tree_of_the_wrong_shape_is_refused():
  model, params, tree, image, text = drawn("lora+ssf")
  wider = dataclasses.replace(model.config, lora_rank=3)
  with pytest.raises(Exception, match="lora"):
    model.clone(config=wider).apply(trained.join(params, tree), image, text)


def test_default_groups_cover_every_tuner():
  groups = Optimizer().groups
  for tuner in ("rpn+lora", "vpt", "lst", "full", SITES):
    names = assign_groups(drawn(tuner)[2], groups)
    assert set(jax.tree.leaves({k: v for k, v in names.items() if k != "h"})) == {"rest"}
