"""What a network costs, as the command prints and writes it."""

import dataclasses
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import cat_seg as cat_seg_config
from configs import shapes as shapes_config
from rpn_jax import cli
from rpn_jax.analysis import costs
from rpn_jax.models import layers
from rpn_jax.models.kernels import cpu
from rpn_jax.models.trained import init_prompts
from tests import ROOT, tiny


@pytest.fixture(autouse=True)
def timed_briefly(monkeypatch):
  """Instead of for three seconds each, which no test needs."""
  monkeypatch.setitem(costs.measure.__kwdefaults__, "timed", 0.01)


@pytest.fixture
def run(capsys, monkeypatch):
  """A command -> exit status, output, errors."""
  monkeypatch.chdir(ROOT)

  def run(*arguments: str) -> tuple[int, str, str]:
    try:
      status = cli.main(list(arguments))
    except SystemExit as ended:  # argparse
      status = ended.code
    return status, *capsys.readouterr()

  return run


def test_a_small_network(run, tmp_path):
  path, weights = tmp_path / "cost.json", tmp_path / "clip.safetensors"
  tiny.save(weights)
  flags = (*tiny.FLAGS, f"--config.clip={weights}")
  status, output, error = run(
    "costs", "--config=configs/shapes.py", *flags, "--classes=5", "--batch=2", f"--json={path}"
  )
  assert status == 0, error
  result = json.loads(path.read_text())
  parts = result["parameters"]
  assert parts["trained"] == sum(n for k, n in parts.items() if k.startswith("prompts/")) == 987
  assert "987" in output and "prompts/m2oe" in output
  forward, step = result["forward"], result["train_step"]
  # Patches, blocks and projections alone: 2 operations for every weight and token.
  weights_in_blocks = 12 * tiny.TINY.vision_width**2 * tiny.TINY.vision_layers
  assert forward["flops_per_image"] > 2 * 16 * weights_in_blocks
  assert 1.5 < step["flops"] / forward["flops"] < 4
  for cost in (forward, step):
    assert cost["images_per_second"] > 0 and cost["temporary_bytes"] > 0
  assert (result["classes"], result["batch"], result["side"]) == (5, 2, 32)


@pytest.mark.slow
def test_a_tower_that_is_trained_is_counted_once():
  config = shapes_config.get_config("tuner=full").unlock()
  config.data.crop = config.eval.crop = 32
  clip = dataclasses.replace(tiny.TINY, vision_layers=1)
  tower = costs.random_towers(clip, jax.random.key(0))
  result = costs.costs(config, clip, tower, 3, 1)
  parts = result["parameters"]
  assert parts["params/visual"] == sum(x.size for x in jax.tree.leaves(tower))
  assert parts["frozen vision tower"] == 0
  assert parts["trained"] == sum(n for name, n in parts.items() if "/" in name)


@pytest.mark.slow
def test_a_network_that_trains_both_towers(monkeypatch):
  """The text tower runs once for a list of classes, and in every training step."""
  config = cat_seg_config.get_config("data=shapes").unlock()
  config.data.crop = 32
  config.cat_seg.update(
    resolution=32, width=16, heads=2, layers=1, window=2, appearance_width=4, text_width=4,
    guidance_layers=(0, 0), guidance_widths=(6, 5), decoder_guidance_widths=(4, 3),
    decoder_widths=(16, 16),
  )  # fmt: skip
  metrics = {}

  def traced(function, *arguments, donated=None):
    """`measure` without compiling."""
    if donated is not None:
      metrics.update(jax.eval_shape(function, *arguments)[1])
    flops = costs.operations(function.trace(*arguments).jaxpr.jaxpr)
    return dict.fromkeys(("seconds", "seconds_to_compile", "temporary_bytes"), 1) | {"flops": flops}

  def made_up(*arguments):
    shapes = jax.eval_shape(lambda: init_prompts(*arguments))
    return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)

  monkeypatch.setattr(costs, "measure", traced)
  monkeypatch.setattr(costs, "init_prompts", made_up)
  towers = costs.random_towers(tiny.TINY, jax.random.key(0), ("visual", "text"))
  result = costs.costs(config, tiny.TINY, towers, 3, 2)
  assert "loss_bce" in metrics
  parts = result["parameters"]
  of_blocks = tiny.TINY.vision_layers * 2 * 16**2, tiny.TINY.text_layers * 2 * 8**2
  assert (parts["params/visual"], parts["params/text"]) == of_blocks  # queries and values
  for name, title, trained in zip(("visual", "text"), ("vision", "text"), of_blocks):
    total = sum(x.size for x in jax.tree.leaves(towers[name]))
    assert parts[f"frozen {title} tower"] == total - trained
  # "a photo of a class 0" and two ends are 8 tokens; every weight of a block takes part.
  text, forward, step = (result[part]["flops"] for part in ("text", "forward", "train_step"))
  weights = 12 * 8**2 * tiny.TINY.text_layers
  assert 2 * weights < text / (3 * 8) < 3 * weights
  assert step > 2 * (forward + text)
  assert "class names, once" in costs.text_of(result)


@pytest.mark.parametrize("elements", [0, 2**21])
def test_operations_of_loops_and_of_what_is_computed_again(elements, monkeypatch):
  """One head after another is as many products as all at once; a gradient has two for each."""
  monkeypatch.setattr(cpu, "MAX_MAP_ELEMENTS", elements)
  q = jnp.ones((2, 7, 4, 8))
  count = lambda f, *a: costs.operations(jax.make_jaxpr(f)(*a).jaxpr)
  by_head = lambda q: cpu.attend_heads(*[q.reshape(8, 7, 8)] * 3, False)
  products = 2 * (2 * 4) * 7 * 7 * 8
  assert count(by_head, q) == count(lambda q: layers.attend(q, q, q), q) == 2 * products
  # Forward two, and of the backward pass one that computes the map again and four.
  assert count(jax.value_and_grad(lambda q: by_head(q).sum()), q) == 7 * products
  image, kernel = jnp.ones((1, 8, 8, 3)), jnp.ones((4, 4, 3, 5))
  conv = nn.Conv(5, (4, 4), strides=(4, 4), padding="VALID", use_bias=False)
  assert count(lambda x: conv.apply({"params": {"kernel": kernel}}, x), image) == 2 * 4 * 48 * 5


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_operations_that_nobody_needs_are_not_counted(dtype):
  """In bfloat16 the gradient of a frozen kernel is traced with that of the input."""
  x, w = jnp.ones((3, 8), dtype), jnp.ones((8, 5), dtype)
  out = lambda x, w: cpu.product(2 * x, w).astype(jnp.float32).sum()
  count = lambda f: costs.operations(jax.make_jaxpr(f)(x, w).jaxpr)
  one = 2 * 3 * 8 * 5
  assert count(out) == count(jax.grad(out)) == one
  assert count(jax.value_and_grad(out)) == count(jax.grad(out, (0, 1))) == 2 * one


def test_wrong_words_are_named(run):
  for arguments, message in (
    (["attention"], "required: --image, --classes"),
    (["costs", "--classes=a"], "expected how many classes are prompted, got 'a'"),
    (["costs", "attention"], "error: unexpected argument 'attention'"),
    (["costs", "--bach=2"], "Unknown command line flag 'bach'"),
    (["costs", "--config.stepz=2"], 'Did you mean "steps" instead of "stepz"?'),
    (["costs", "--config.steps=x"], "flag --config.steps=x: invalid literal for int()"),
  ):
    status, _, error = run(*arguments, "--config=configs/shapes.py")
    assert status == 2 and message in error
  status, _, error = run("costs", "--config=configs/shapez.py")
  assert status == 2 and "No such file or directory: 'configs/shapez.py'" in error


def test_missing_weights_are_named(run):
  status, _, error = run("costs", "--config=configs/voc.py", "--config.clip=ViT-B-16.safetensors")
  lines = error.strip().splitlines()
  assert status == 2 and len(lines) == 1
  assert "ViT-B-16.safetensors: no such file; give --backbone=b16" in lines[0]
