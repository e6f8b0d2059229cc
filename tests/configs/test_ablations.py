"""Every row of every table: runs for a step, changes what it names and nothing else."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import ablations
from rpn_jax.analysis.runs import flatten
from rpn_jax.config import RPNConfig
from rpn_jax.models import tuners
from rpn_jax.models.clip import VisionTransformer, l2_normalize
from rpn_jax.models.rpn import RPN
from rpn_jax.models.trained import init_prompts
from rpn_jax.models.training_free import DenseCLIP
from rpn_jax.training import losses, optim, step
from tests.tiny import TINY

ROWS = {tuple(sorted(changes.items())): name for name, changes in ablations.ROWS.items()}
# Field (and value) -> parts of the trained tree that it gives another shape or takes away.
M2OE, PROMPTS = {"m2oe_0", "m2oe_1"}, {"h", "prompt_norm", "prompt_proj"}
CHANGES = {
  ("model.itp", "no_pixel"): M2OE | {"h"},
  ("model.apg", "linear"): {"h_bias"},
  ("model.m2oe", "none"): M2OE,
  ("model.m2oe", "sum"): M2OE,
  ("model.m2oe_reduced", 6): M2OE,
  ("model.m2oe_reduced", 12): M2OE,
  ("model.head", "lpm_a"): {"head"},
  ("model.head", "lpm_b"): {"head"},
  ("model.head", "tfpm_a"): {"head"},
  ("model.head", "tfpm_b"): {"head"},
  ("model.head", "tfpm_c"): {"head"},
  ("model.rpm_layers", "first"): {"h", "m2oe_1"},
  ("model.rpm_layers", "last"): {"h", "m2oe_1"},
  ("model.rpm_layers", "odd"): {"h", "m2oe_1"},
  ("model.rpm_layers", "even"): {"h", "m2oe_1"},
  ("model.rpm_layers", "none"): {"h", "prompt_proj"} | M2OE,
  ("model.tuner", "lpm"): PROMPTS | M2OE,
  ("model.tuner", "vpt"): {"h", "deep_tokens"} | M2OE,
  ("model.tuner", "rpn+vpt"): {"deep_tokens"},
  ("model.tuner", "full"): PROMPTS | M2OE | {"visual"},
  ("preset", "released"): {"h", "deep_tokens", "head"} | M2OE,
} | {
  ("model.tuner", name): PROMPTS | M2OE | {name}
  for name in ("adapter", "bitfit", "dora", "lora", "lst", "oft", "ssf", "text_bitfit", "text_lora")
} | {
  ("model.tuner", "oft+text_oft"): PROMPTS | M2OE | {"oft", "text_oft"},
  ("model.tuner", "lora+text_lora"): PROMPTS | M2OE | {"lora", "text_lora"},
  ("model.tuner", "coop"): PROMPTS | M2OE | {"offset"},
  ("model.tuner", "maple"): PROMPTS | M2OE | {"context", "coupling_0"},
  ("model.tuner", "rpn+coop"): {"offset"},
  ("model.tuner", "rpn+text_lora"): {"text_lora"},
}  # fmt: skip


BASE = "table10_rpn"
# What no other test runs, in two networks: one by one the rows take minutes.
TOGETHER = (
  {"model.itp": "no_image", "model.apg": "linear", "model.m2oe": "sum", "model.combine": "mul",
   "model.head": "tfpm_c", "loss.name": "softmax"},
  {"model.itp": "no_pixel", "model.head": "lpm_b", "model.rpm_layers": "even"},
)  # fmt: skip


@functools.cache
def tower():
  clip = TINY.__class__(**{**vars(TINY), "vision_layers": 3})
  image = jax.random.normal(jax.random.key(1), (2, 64, 64, 3))
  text = l2_normalize(jax.random.normal(jax.random.key(2), (5, TINY.embed_dim)))
  visual = jax.jit(VisionTransformer(clip).init)(jax.random.key(0), image)["params"]
  return clip, {"visual": visual}, image, text


def config_of(row):
  return ablations.get_config(f"{row},dataset=shapes,runlocal")


@functools.cache
def network(row, changes=()):
  """Model, config, and the shapes of what it trains."""
  config = config_of(row).unlock()
  config.update_from_flattened_dict(dict(changes))
  config.optimizer.warmup_steps = 0
  settings = RPNConfig(**{**config.model, "m2oe_experts": 2, "oft_block": 4})
  model = RPN(tower()[0], settings)
  return model, config, shapes_of(settings)


@functools.cache
def shapes_of(settings):
  """Of what a network trains; rows of losses and rates have that of the base."""
  clip, params, _, text = tower()
  init = lambda: init_prompts(RPN(clip, settings), params, text, jax.random.key(3), 64)
  return jax.eval_shape(init)


@functools.cache
def one_step(row, changes=(), update=True):
  """The trained tree before and after a step, and the loss before it; or the loss alone."""
  _, params, image, text = tower()
  model, config, like = network(row, changes)
  rng = np.random.default_rng(0)
  # Made up instead of initial: nothing to compile, and no zeros that hold gradients back.
  tree = jax.tree.map(lambda x: np.float32(0.3 * rng.normal(size=x.shape)), like)
  batch = {"image": image, "label": np.arange(2 * 64 * 64).reshape(2, 64, 64) // 700 % 5}
  settings = {"model": model, "loss_fn": losses.make_loss(config.loss, 255)}
  arguments = (params, text, batch, jax.random.key(4))
  if not update:  # gradients that nothing uses are not compiled
    state = step.TrainState(jnp.int32(20), tree, ())
    terms = jax.jit(lambda state: step.gradients(state, *arguments, **settings)[1])(state)
    return sum(float(term.value) for term in terms.values())
  optimizer = optim.make_optimizer(config.optimizer, tree)
  state = step.TrainState(jnp.int32(20), tree, optimizer.init(tree))
  run = jax.jit(lambda s: step.train_step(s, *arguments, optimizer=optimizer, **settings))
  after, metrics = run(state)
  return tree, after.prompts, float(metrics["loss"])


@pytest.mark.parametrize("changes, row", ROWS.items(), ids=ROWS.values())
def test_a_row_changes_what_it_names(changes, row):
  config, plain = (flatten(config_of(r).to_dict()) for r in (row, BASE))
  if family := dict(changes).get("family"):  # another network: tests/models/test_cat_seg.py
    assert (config["method"], config["data.setting"]) == (family, plain["data.setting"])
    return
  differing = {name: config[name] for name in config if config[name] != plain[name]}
  if "preset" not in dict(changes):
    assert differing == dict(changes)
  if dict(changes).get("method") == "training_free":
    return
  shapes = lambda tree: jax.tree.map(lambda x: x.shape, dict(tree))
  was, now = shapes(network(BASE)[2]), shapes(network(row)[2])
  found = {part for part in was.keys() | now.keys() if was.get(part) != now.get(part)}
  assert found == set().union(*(CHANGES.get(change, set()) for change in changes))


def check_step(tree, after, loss):
  assert np.isfinite(loss)
  moved = jax.tree.map(lambda a, b: bool((a != b).any()), tree, after)
  still = [str(path) for path, m in jax.tree_util.tree_leaves_with_path(moved) if not m]
  # A gate may choose no expert but its best two.
  assert not [path for path in still if "expert" not in path]


@pytest.mark.parametrize("changes", [*(pytest.param(c, marks=pytest.mark.slow) for c in TOGETHER)])
def test_words_of_several_rows_run_for_a_step(changes):
  step_of_all = one_step(BASE, tuple(changes.items()))
  check_step(*step_of_all)
  assert step_of_all[2] != pytest.approx(one_step(BASE, update=False), rel=1e-5)


@pytest.mark.slow
def test_the_row_without_training_runs():
  _, params, image, text = tower()
  dense = DenseCLIP(tower()[0], **config_of("table4_none").dense)
  assert np.isfinite(dense.apply({"params": params, "prompts": {}}, image, text)).all()


@pytest.mark.slow
@pytest.mark.parametrize(
  "changes, row",
  [
    pytest.param(changes, row, id=row)
    for changes, row in ROWS.items()
    # Other towers: tests/weights/test_plain_vit.py; labels: tests/tasks/test_annotation_free.py;
    # text towers: tests/models/test_text_side.py
    if not dict(changes).keys() & {"clip", "family", "data.setting"}
    and dict(changes).get("method") != "training_free"
    and not tuners.of_text(dict(changes).get("model.tuner", "").split("+"))
  ],
)
def test_a_row_runs_for_a_step(changes, row):
  check_step(*one_step(row))
  if changes:  # also where it has the same parameters
    assert one_step(row)[2] != one_step(BASE)[2]


def test_every_row_is_there_once():
  assert len(ablations.ROWS) == sum(map(len, ablations.TABLES.values())) == 77
  assert len(ROWS) == 57


@pytest.mark.parametrize(
  "words, message",
  [
    ("table5_itp_no_imag", "table5_itp_no_image"),
    ("", "TABLE_ROW"),
    ("table5_rpn,dataset=ade", "dataset='ade' is not known; .* shapes, voc"),
    ("table5_rpn,dataset=voc,sett=zero_shot", "did you mean"),
  ],
)
def test_wrong_words(words, message):
  with pytest.raises(ValueError, match=message):
    ablations.get_config(words)


def test_other_recipes_take_the_same_rows():
  config = ablations.get_config("table13_layers_odd,dataset=voc,backbone=l14")
  assert config.data.name == "voc20" and config.data.crop == 518
  assert config.model.rpm_layers == "odd"
