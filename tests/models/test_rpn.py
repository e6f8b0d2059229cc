"""The network: parameter counts, collections, invariances."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import common
from rpn_jax.config import RPNConfig
from rpn_jax.models import prompts, rpm
from rpn_jax.models.block import Block
from rpn_jax.models.clip import CLIP, CLIPConfig, VisionTransformer, l2_normalize
from rpn_jax.models.rpn import RPN
from rpn_jax.models.trained import init_prompts
from rpn_jax.training import losses

TINY = CLIPConfig(
  embed_dim=12, image_size=32, patch_size=8, vision_width=16, vision_layers=2, vision_heads=2,
  text_width=8, text_layers=1, text_heads=2, context_length=16, vocab_size=50,
)  # fmt: skip
DEEPER = CLIPConfig(**{**vars(TINY), "vision_layers": 3})
B16 = CLIPConfig()
L14 = CLIPConfig(
  embed_dim=768, patch_size=14, vision_width=1024, vision_layers=24, vision_heads=16,
  text_width=768, text_heads=12,
)  # fmt: skip

# (preset, tower, deep tokens of the released preset, side of a crop): trained parameters.
# Released: 2,524,416 and 3,353,856 less the 1,536 of a norm that nothing uses.
COUNTS = {
  "released VOC B/16": (B16, "released", 10, 512, 2_522_880),
  "released COCO B/16": (B16, "released", 100, 512, 3_352_320),
  "paper B/16": (B16, "paper", 0, 512, 3_098_193),
  "paper L/14": (L14, "paper", 0, 518, 9_023_285),
}

SLOW = ("paper L/14", "released VOC B/16")


def network(clip, preset, released_tokens, side, **changes):
  grid = side // clip.patch_size
  fields = common.model(preset, deep_tokens=released_tokens, h_grid=(grid, grid)).to_dict()
  return RPN(clip, RPNConfig(**{**fields, **changes}))


@pytest.mark.parametrize(
  "name", [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in COUNTS]
)
def test_parameter_counts(name):
  clip, preset, deep_tokens, side, expected = COUNTS[name]
  model = network(clip, preset, deep_tokens, side)
  shapes = jax.eval_shape(
    lambda: model.init(
      {k: jax.random.key(0) for k in ("params", "prompts")},
      jnp.zeros((1, side, side, 3)),
      jnp.zeros((15, clip.embed_dim)),
    )
  )
  assert set(shapes) == {"params", "prompts"}
  assert prompts.count(shapes["prompts"]) == expected


def test_clip_b16_parameter_count():
  """149,620,737 parameters, as OpenAI's ViT-B/16 has."""
  shapes = jax.eval_shape(
    lambda: CLIP(B16).init(
      jax.random.key(0), jnp.zeros((1, 224, 224, 3)), jnp.zeros((1, 77), jnp.int32)
    )
  )
  assert prompts.count(shapes) == 149_620_737


@functools.cache
def inputs():
  image = jax.random.normal(jax.random.key(1), (2, 32, 32, 3))
  text = l2_normalize(jax.random.normal(jax.random.key(2), (5, TINY.embed_dim)))
  params = {"visual": jax.jit(VisionTransformer(TINY).init)(jax.random.key(0), image)["params"]}
  return params, image, text


@functools.cache
def tiny(preset="paper"):
  """Of as many experts as a token takes: every expert is two convolutions to compile."""
  model = network(TINY, preset, 2, 32, m2oe_experts=2)
  params, image, text = inputs()
  return model, params, init_prompts(model, params, text, jax.random.key(3), 32), image, text


def prompt_shapes(**changes):
  """The prompts of a variant of the paper preset, as shapes."""
  model = network(DEEPER, "paper", 2, 32, **changes)
  image, text = jnp.zeros((1, 32, 32, 3)), jnp.zeros((5, TINY.embed_dim))
  return jax.eval_shape(lambda: model.init(jax.random.key(0), image, text))["prompts"]


def test_exact_prompt_tree_of_the_paper_preset():
  tree = prompt_shapes()
  names = {jax.tree_util.keystr(k, simple=True, separator="/"): v.shape for k, v in
           jax.tree_util.tree_leaves_with_path(tree)}  # fmt: skip
  expected = {
    "h": (2, 16, 16),
    "prompt_proj/kernel": (16, 16),
    "prompt_proj/bias": (16,),
    "prompt_norm/scale": (16,),
    "prompt_norm/bias": (16,),
    "head/patch_proj/kernel": (12, 12),
    "head/patch_proj/bias": (12,),
    "head/patch_norm/scale": (12,),
    "head/patch_norm/bias": (12,),
    "head/text_proj/kernel": (24, 12),
    "head/text_proj/bias": (12,),
    "head/text_norm/scale": (12,),
    "head/text_norm/bias": (12,),
  }
  for i in range(2):
    expected |= {
      f"m2oe_{i}/reduce/kernel": (16, 3),
      f"m2oe_{i}/reduce/bias": (3,),
      f"m2oe_{i}/expand/kernel": (3, 16),
      f"m2oe_{i}/expand/bias": (16,),
      f"m2oe_{i}/gate": (3, 4),
      f"m2oe_{i}/gate_noise": (3, 4),
    }
    expected |= {f"m2oe_{i}/expert_{j}/kernel": (3, 3, 1, 3) for j in range(4)}
    expected |= {f"m2oe_{i}/expert_{j}/bias": (3,) for j in range(4)}
  assert names == expected


# The logits and gradients of the preset `released` are the official code's: test_parity.py.
PRESETS = ["paper", pytest.param("released", marks=pytest.mark.slow)]


@pytest.mark.parametrize("preset", PRESETS)
def test_class_order_does_not_matter(preset):
  """Permuting the words permutes the logits: classes are a set."""
  model, params, tree, image, text = tiny(preset)
  order = np.array([3, 0, 4, 1, 2])
  apply = jax.jit(lambda t: model.apply({"params": params, "prompts": tree}, image, t))
  np.testing.assert_allclose(apply(text)[..., order], apply(text[order]), atol=2e-5)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_prompt_gets_a_gradient(preset):
  model, params, tree, image, text = tiny(preset)
  rngs = {"dropout": jax.random.key(4), "gate": jax.random.key(5)}
  weights = jax.random.normal(jax.random.key(6), (2, 4, 4, 5))

  def loss(p):
    out = model.apply({"params": params, "prompts": p}, image, text, train=True, rngs=rngs)
    return (weights * out).sum()

  for path, grad in jax.tree_util.tree_leaves_with_path(jax.jit(jax.grad(loss))(tree)):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    # A gate may never choose an expert on two images; all others must move.
    assert "expert_" in name or np.abs(grad).max() > 0, name


def test_train_noise_comes_from_its_own_streams():
  model, params, tree, image, text = tiny()

  @jax.jit
  def apply(dropout, gate):
    rngs = {"dropout": jax.random.key(dropout), "gate": jax.random.key(gate)}
    return model.apply({"params": params, "prompts": tree}, image, text, train=True, rngs=rngs)

  np.testing.assert_array_equal(apply(0, 0), apply(0, 0))
  assert np.abs(apply(0, 0) - apply(1, 0)).max() > 0
  assert np.abs(apply(0, 0) - apply(0, 1)).max() > 0


def test_paper_preset_runs_at_other_sizes():
  model, params, tree, _, text = tiny()
  image = jnp.ones((1, 40, 64, 3))
  out = jax.eval_shape(model.apply, {"params": params, "prompts": tree}, image, text)
  assert out.shape == (1, 5, 8, 5)


@functools.cache
def gradients(**fields):
  """Gradients of a loss, and the logits, of the tiny network with other fields."""
  model, params, tree, image, text = tiny()
  label = np.arange(2 * 32 * 32).reshape(2, 32, 32) // 100 % 5

  def loss(prompts):
    variables = {"params": params, "prompts": prompts}
    logits = model.clone(**fields).apply(variables, image, text)
    return sum(term.value for term in losses.sigmoid_loss(logits, label).values()), logits

  return jax.jit(jax.grad(loss, has_aux=True))(tree)


@pytest.mark.parametrize("policy", [pytest.param("dots", marks=pytest.mark.slow), "full"])
def test_recomputing_blocks_changes_nothing(policy):
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
    gradients(),
    gradients(remat=policy),
  )


def test_bfloat16_is_near_float32():
  (want, logits), (got, half) = gradients(), gradients(dtype=jnp.bfloat16)
  assert half.dtype == jnp.float32
  assert np.abs(logits - half).max() < 0.05 * np.abs(logits).max()
  for x in jax.tree.leaves(got):
    assert x.dtype == jnp.float32
  norm = lambda tree: np.linalg.norm([np.linalg.norm(x) for x in jax.tree.leaves(tree)])
  difference = jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), want, got)
  assert norm(difference) < 0.05 * norm(want)


def test_switched_off_parts_have_no_parameters():
  assert set(prompt_shapes(rpm_layers="none")) == {"prompt_norm", "head"}
  assert set(prompt_shapes(tuner="lpm")) == {"head"}
  assert set(prompt_shapes(tuner="vpt", deep_tokens=2)) == {
    "deep_tokens", "prompt_proj", "prompt_norm", "head",
  }  # fmt: skip
  assert not any(k.startswith("m2oe") for k in prompt_shapes(m2oe="none"))


def test_a_prompt_of_the_wrong_shape_is_refused():
  model, params, tree, image, text = tiny()
  wrong = {**tree, "h": tree["h"][:, :1]}  # would broadcast
  with pytest.raises(Exception, match="h"):
    model.apply({"params": params, "prompts": wrong}, image, text)


@pytest.mark.parametrize("rate", [0.0, 0.5, 1.0])
def test_dropout_keeps_the_mean_and_finite_gradients(rate):
  keys = prompts.example_keys(jax.random.key(0), 0, 2)
  drop = lambda x: prompts.dropout(x, rate, keys)
  x = jnp.ones((2, 300, 8))
  assert set(np.unique(drop(x))) <= {0.0, 1 / (1 - rate) if rate < 1 else 0.0}
  assert float(drop(x).mean()) == pytest.approx(float(rate < 1), abs=0.1)
  assert np.isfinite(jax.grad(lambda x: drop(x).sum())(x)).all()


def test_itp_is_equation_2():
  rng = np.random.default_rng(0)
  p, g, t = rng.normal(size=(2, 6, 4)), rng.normal(size=(2, 4)), rng.normal(size=(3, 4))
  want = np.stack([p[b] @ (t * g[b]).T for b in range(2)])
  np.testing.assert_allclose(rpm.itp(p, g, t), want, rtol=1e-5)


def test_apg_is_equation_3():
  rng = np.random.default_rng(0)
  m, h = rng.normal(size=(2, 6, 3)), rng.normal(size=(6, 5))
  np.testing.assert_allclose(rpm.apg(m, h), np.stack([m[b].T @ h for b in range(2)]), rtol=1e-5)


def test_gate_keeps_top_k():
  scores = np.array([[0.0, 3.0, 2.0, -1.0], [5.0, 0.0, 0.0, 4.0]], np.float32)
  e = np.exp(1.0)
  want = [[0, e / (1 + e), 1 / (1 + e), 0], [e / (1 + e), 0, 0, 1 / (1 + e)]]
  np.testing.assert_allclose(rpm.top_k_gates(scores, 2), want, rtol=1e-6)


def test_text_padding_changes_nothing():
  model = CLIP(TINY)
  tokens = jnp.array([[1, 7, 49, 0, 0, 0, 0, 0], [1, 5, 6, 8, 49, 0, 0, 0]])
  init = jax.jit(functools.partial(model.init, method="encode_text"))
  variables = init(jax.random.key(0), tokens)
  encode = jax.jit(lambda t: model.apply(variables, t, method="encode_text"))
  np.testing.assert_allclose(encode(tokens), encode(tokens[:, :5]), atol=3e-6)


def test_exact_gelu_differs_from_quick():
  params, image, _ = inputs()
  params = {"params": params["visual"]}
  exact = VisionTransformer(CLIPConfig(**{**vars(TINY), "activation": "gelu"}))
  exact, quick = (jax.jit(m.apply)(params, image) for m in (exact, VisionTransformer(TINY)))
  difference = np.abs(exact - quick)
  assert 0 < difference.max() < 0.1


def test_extra_tokens_are_looked_at_only():
  """A block on x and extra tokens gives x what it gives it when they are among its tokens."""
  x, extra = jax.random.normal(jax.random.key(0), (2, 5, 16)), jnp.ones((2, 3, 16))
  block = Block(width=16, heads=2, activation="quick_gelu")
  variables = jax.jit(block.init)(jax.random.key(1), x)
  bias = variables["params"]["attn"]["in_proj"]["bias"]
  variables["params"]["attn"]["in_proj"]["bias"] = jax.random.normal(jax.random.key(2), bias.shape)

  @jax.jit
  def joined(x, extra):
    y = block.apply(variables, jnp.concatenate([x[:, :1], extra, x[:, 1:]], axis=1))
    return jnp.concatenate([y[:, :1], y[:, 4:]], axis=1)

  apart = jax.jit(lambda x, extra: block.apply(variables, x, extra_BxPxD=extra))
  gradient = lambda f: jax.jit(jax.grad(lambda *a: (f(*a) ** 2).sum(), (0, 1)))(x, extra)
  for got, want in zip((apart(x, extra), *gradient(apart)), (joined(x, extra), *gradient(joined))):
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
  assert np.abs(apart(x, extra) - jax.jit(block.apply)(variables, x)).max() > 0.01
