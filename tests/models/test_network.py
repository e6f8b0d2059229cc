"""What every network of the registry answers; trained and frozen parameters kept apart."""

import copy
import functools
import inspect
import pickle

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rpn_jax.config import CATSegConfig, RPNConfig
from rpn_jax.models import NETWORKS, Network, clip, heads, kernels, trained
from rpn_jax.models.clip import CLIPConfig
from rpn_jax.models.network import Windows

CLIP = CLIPConfig(
  embed_dim=12, image_size=32, patch_size=8, vision_width=16, vision_layers=2, vision_heads=2,
  text_width=16, text_layers=1, text_heads=2, context_length=8, vocab_size=9,
)  # fmt: skip
CAT_SEG = CATSegConfig(
  resolution=32, width=32, window=2, appearance_width=4, text_width=4, pad_len=5,
  guidance_layers=(0, 0), guidance_widths=(6, 5), decoder_guidance_widths=(4, 3),
  decoder_widths=(16, 16), class_pooling_train=(2, 1),
)  # fmt: skip
SETTINGS = {
  "rpn": [
    RPNConfig(m2oe_experts=2),
    RPNConfig(tuner="full"),
    RPNConfig(tuner="lora+ssf", head="tfpm_c"),
  ],
  "cat_seg": [CAT_SEG],
  "training_free": [
    {"method": "sclip", "denoise": 0.0, "key_smoothing": False},  # as runs of 0.2.0 have it
    {"method": "res_clip"},
  ],
}
CASES = [(name, settings) for name in NETWORKS for settings in SETTINGS[name]]
MEMBERS = [name for name in vars(Network) if not name.startswith("_")] + [*Network.__annotations__]


class Encoder:
  sentences = 1

  def embed(self, names):
    return np.eye(len(names), CLIP.embed_dim, dtype=np.float32)

  def tokens(self, names):
    return np.array([[[7, 1 + i, 8, 0]] for i, _ in enumerate(names)], np.int32)


def variables_of(network, text):
  """Made up, since initial ones are a program to compile for every network."""
  key = (network, text.shape, text.dtype)
  if key not in SHAPES:
    image = jnp.zeros((1, 32, 32, 3))
    SHAPES[key] = jax.eval_shape(network.init, jax.random.key(0), image, text)
  rng = np.random.default_rng(0)
  variables = jax.tree.map(lambda x: np.float32(0.2 * rng.normal(size=x.shape)), SHAPES[key])
  return variables["params"], variables.get("prompts", {})


# Of initial variables, by network and text.
SHAPES = {}


@functools.partial(jax.jit, static_argnums=0, static_argnames="method")
def apply(network, *arguments, **options):
  """Equal networks are traced once."""
  return network.apply(*arguments, **options)


@pytest.mark.parametrize("name, settings", CASES)
def test_every_network_answers(name, settings):
  network = NETWORKS[name].create(CLIP, settings)
  for member in MEMBERS:
    getattr(network, member)
  signature = lambda c, f: list(inspect.signature(getattr(c, f)).parameters.values())[1:]
  # Positions, not names: networks call their inputs by their shapes.
  by_name = lambda p: (p.kind is p.KEYWORD_ONLY, p.default)
  want = [by_name(p) for p in signature(Network, "__call__")]
  assert [by_name(p) for p in signature(NETWORKS[name], "__call__")] == want

  text = network.text_input(Encoder(), ("a", "b", "c"))
  params, prompts = variables_of(network, text)
  assert set(params) == set(network.towers)
  image = jax.random.normal(jax.random.key(1), (2, 32, 48, 3))
  assert network.input_multiple in (1, CLIP.patch_size)
  variables = {"params": params, "prompts": prompts}
  logits = apply(network, variables, image, text)
  grid = (16, 16) if name == "cat_seg" else (4, 6)  # it squashes images
  assert logits.shape == (2, *grid, 3) and logits.dtype == jnp.float32
  encoded = apply(network, variables, text, method="encode_text")
  assert len(encoded) == len(text)
  np.testing.assert_allclose(apply(network, variables, image, encoded), logits, atol=1e-5)
  values = network.probabilities(network.scores(logits))
  assert values.shape == logits.shape and values.min() >= 0 and values.max() <= 1
  found, frozen = trained.split(params, network.trained)
  assert network.trainable == bool(found or prompts)
  assert jax.tree.structure(trained.join(frozen, found)["params"]) == jax.tree.structure(params)


@pytest.mark.parametrize("name, settings", CASES)
def test_equal_networks_share_programs(name, settings):
  first, second = (NETWORKS[name].create(CLIP, settings) for _ in range(2))
  assert first == second and hash(first) == hash(second)
  assert first.scores is second.scores and first.probabilities is second.probabilities
  for platform in ("cpu", "gpu", "tpu", "another"):
    own = NETWORKS[name].create(CLIP, settings, kernels=kernels.for_platform(platform))
    assert first != own
    assert pickle.loads(pickle.dumps(own)) == copy.deepcopy(own) == own
  assert pickle.loads(pickle.dumps(first)) == copy.deepcopy(first) == first


@pytest.mark.parametrize("name, settings", CASES)
def test_the_merged_network_gives_the_same_logits(name, settings):
  network = NETWORKS[name].create(CLIP, settings)
  text = network.text_input(Encoder(), "abc")
  params, prompts = variables_of(network, text)
  found, _ = trained.split(params, network.trained)
  prompts = jax.tree.map(lambda x: x + 0.01, {**prompts, **found})
  image = jax.random.normal(jax.random.key(1), (2, 32, 48, 3))
  want = apply(network, trained.join(params, prompts), image, text)
  merged, params, prompts = network.merged(params, prompts)
  got = apply(merged, {"params": params, "prompts": prompts}, image, text)
  np.testing.assert_allclose(got, want, atol=1e-4)
  assert merged.trained == ""


@pytest.mark.parametrize(
  "name, settings", [CASES[0], *(pytest.param(*c, marks=pytest.mark.slow) for c in CASES[1:])]
)
def test_kernels_in_the_compute_type_change_nothing(name, settings):
  network = NETWORKS[name].create(CLIP, settings, dtype=jnp.bfloat16)
  text = network.text_input(Encoder(), "abc")
  params, prompts = variables_of(network, text)
  found, frozen = trained.split(params, network.trained)
  stored = trained.in_compute_type(frozen, jnp.bfloat16)
  sizes = lambda tree: {x.dtype.itemsize for x in jax.tree.leaves(tree)}
  assert sizes(frozen) <= {4} and (not frozen or sizes(stored) == {2, 4})
  apply = jax.jit(lambda frozen: network.apply(
    trained.join(frozen, {**prompts, **found}), jnp.ones((1, 32, 32, 3)), text
  ))  # fmt: skip
  np.testing.assert_array_equal(apply(stored), apply(frozen))
  assert sizes(trained.in_compute_type(frozen, jnp.float32)) <= {4}


@pytest.mark.parametrize("loss", ["sigmoid", "softmax"])
def test_scores_are_those_of_the_loss(loss):
  network = NETWORKS["rpn"].create(CLIP, RPNConfig(), loss=loss)
  assert network.scores is heads.SCORES[loss]
  logits = jnp.array([[1.0, -2.0]])
  e = np.exp(np.array([1.0, -2.0]))
  want = {"sigmoid": e / (1 + e), "softmax": e / e.sum()}[loss]
  np.testing.assert_allclose(network.scores(logits)[0], want, rtol=1e-6)
  assert network.emphasis == 0.5 and NETWORKS["training_free"].emphasis == 0.05


def test_rows_are_independent_where_no_class_sees_the_others():
  free = lambda **fields: NETWORKS["training_free"].create(
    CLIP, {"method": "sclip", "denoise": 0.0, "key_smoothing": False, **fields}
  )
  assert free().independent
  assert not free(denoise=0.5).independent and not free(key_smoothing=True).independent
  assert free(method="sc_clip").independent and not free(method="res_clip").independent
  assert not NETWORKS["rpn"].create(CLIP, RPNConfig()).independent


def test_windows_are_those_of_the_papers():
  b16, l14 = CLIPConfig(), CLIPConfig(patch_size=14)
  assert NETWORKS["rpn"].windows(b16) == Windows(512, 512, 426)
  assert NETWORKS["rpn"].windows(l14) == Windows(518, 518, 432)
  assert NETWORKS["training_free"].windows(b16) == Windows(336, 224, 112)
  for network in NETWORKS.values():
    windows = network.windows(CLIP)
    assert windows.crop % CLIP.patch_size == 0 and 0 < windows.stride <= windows.crop


@pytest.mark.parametrize(
  "fields, message",
  [
    ({"loss": "hinge"}, "loss must be one of sigmoid, bce, softmax, cosine, got 'hinge'"),
    ({"remat": "half"}, "remat must be one of none, dots, full, got 'half'"),
  ],
)
def test_bad_words_are_refused(fields, message):
  with pytest.raises(ValueError, match=message):
    NETWORKS["rpn"].create(CLIP, RPNConfig(), **fields)


@pytest.mark.parametrize(
  "fields, message",
  [
    ({"m2oe_experts": 1}, "m2oe_top_k=2: expected at most m2oe_experts=1"),
    (
      {"tuner": "lst", "lst_reduction": 5},
      "lst_reduction=5: .* multiple of its 2 heads, got a .* 3",
    ),
    ({"tuner": "lst", "lst_reduction": 99}, "lst_reduction=99: .* got a side network of 0"),
  ],
)
def test_settings_that_do_not_go_together_are_refused_before_anything_is_traced(fields, message):
  with pytest.raises(ValueError, match=message):
    NETWORKS["rpn"].create(CLIP, RPNConfig(**fields))


def test_a_plain_tower_knows_no_words():
  plain = CLIPConfig(vision="vit")
  with pytest.raises(ValueError, match='needs the vision tower of a CLIP, got vision="vit"'):
    NETWORKS["training_free"].create(plain, SETTINGS["training_free"][0])


PARAMS = {
  "visual": {"proj": 1, "block_0": {"q": 2, "v": 3}},
  "text": {"block_0": {"q": 4, "v": 5}},
}


def test_what_is_trained_is_split_off_and_joined_again():
  found, frozen = trained.split(PARAMS, r"(visual|text)/block_\d+/q")
  assert found == {"visual": {"block_0": {"q": 2}}, "text": {"block_0": {"q": 4}}}
  assert frozen == {"visual": {"proj": 1, "block_0": {"v": 3}}, "text": {"block_0": {"v": 5}}}
  tree = {"h": 6, "visual": {"block_0": {"q": 20}}, "text": {"block_0": {"q": 40}}}
  want = {
    "visual": {"proj": 1, "block_0": {"q": 20, "v": 3}},
    "text": {"block_0": {"q": 40, "v": 5}},
  }
  # Whether the frozen parameters still hold the initial values of what is trained or not.
  for params in (frozen, PARAMS):
    assert trained.join(params, tree) == {"params": want, "prompts": {"h": 6}}
  assert trained.split(PARAMS, "") == ({}, PARAMS)
  assert trained.split(PARAMS, "visual/.*") == (
    {"visual": PARAMS["visual"]}, {"text": PARAMS["text"]},
  )  # fmt: skip
  # Whole paths: "proj" alone names nothing.
  for pattern in ("proj", "visual/block"):
    with pytest.raises(ValueError, match="expected a pattern"):
      trained.split(PARAMS, pattern)


@pytest.mark.parametrize("name, settings", CASES)
def test_shapes_of_prompts_are_those_of_the_initial_ones(name, settings):
  network = NETWORKS[name].create(CLIP, settings)
  text = network.text_input(Encoder(), ["a", "b", "c"])
  params, _ = variables_of(network, text)
  init = lambda key: trained.init_prompts(network, params, text, key, 32)
  want = jax.eval_shape(init, jax.random.key(0))
  assert trained.prompt_shapes(network, params, text, 32) == want


def test_a_stored_parameter_of_another_shape_is_refused():
  image, tokens = jnp.zeros((1, 32, 32, 3)), jnp.ones((1, 8), jnp.int32)
  model = clip.CLIP(CLIP)
  variables = jax.eval_shape(model.init, jax.random.key(0), image, tokens)
  for path, shape in (
    (("visual", "block_1", "attn", "in_proj", "kernel"), (16, 47)),
    (("visual", "block_0", "ln_1", "scale"), (1,)),  # would be broadcast
    (("text", "projection"), (16, 1)),
  ):
    wrong = jax.tree_util.tree_map_with_path(
      lambda at, x, path=path, shape=shape: jax.ShapeDtypeStruct(
        shape if tuple(key.key for key in at)[1:] == path else x.shape, x.dtype
      ),
      variables,
    )
    with pytest.raises(flax.errors.ScopeParamShapeError, match=path[-1]):
      jax.eval_shape(model.apply, wrong, image, tokens)


def rounded_products(jaxpr, found):
  """Appends the products of a program, and of those in it, whose result is bfloat16."""
  for equation in jaxpr.eqns:
    (out, *_), given = equation.outvars or (None,), equation.params
    if equation.primitive.name == "dot_general" and out.aval.dtype == jnp.bfloat16:
      found.append(str(equation.source_info.name_stack))
    for inner in jax.tree.leaves(tuple(given.values()), is_leaf=lambda x: hasattr(x, "eqns")):
      inner = getattr(inner, "jaxpr", inner)
      if hasattr(inner, "eqns"):
        rounded_products(inner, found)
  return found


@pytest.mark.parametrize("name, settings", [case for case in CASES if case[0] != "cat_seg"])
def test_products_have_float32_results_on_cpus(name, settings, monkeypatch):
  """A bfloat16 result takes twice the time there, and is rounded on the way.

  CAT-Seg's aggregation of costs has products of its own, in the compute type.
  """
  monkeypatch.setattr(kernels.cpu, "MAX_MAP_ELEMENTS", 0)
  create = functools.partial(NETWORKS[name].create, CLIP, settings, dtype=jnp.bfloat16)
  text = create().text_input(Encoder(), "abc")
  params, prompts = variables_of(create(), text)
  found, frozen = trained.split(params, create().trained)
  frozen = trained.in_compute_type(frozen, jnp.bfloat16)
  image, key = jnp.ones((2, 32, 32, 3)), jax.random.key(0)

  def products(network, train):
    rngs = {"dropout": key, "gate": key} if train else None
    loss = lambda tree: network.apply(
      trained.join(frozen, tree), image, text, train=train, rngs=rngs
    ).sum()  # fmt: skip
    program = jax.grad(loss) if train else loss
    return rounded_products(jax.make_jaxpr(program)({**prompts, **found}).jaxpr, [])

  network = create(kernels=kernels.for_platform("cpu"))
  for train in [False, True] if network.trainable else [False]:
    assert not products(network, train)
  assert products(create(kernels=kernels.LEAN), False)  # so there are some to find
