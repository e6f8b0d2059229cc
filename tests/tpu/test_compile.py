"""What the TPU's own compiler makes of the programs: `make test-tpu`, which installs libtpu.

Low effort compiles four times as fast; what is asserted of the programs does not depend on it.
"""

import importlib.util

import jax
import pytest

from configs import cat_seg, shapes, voc
from rpn_jax import chips
from rpn_jax.analysis import compile as analysis
from rpn_jax.models import tuners
from rpn_jax.models.clip import CLIPConfig
from rpn_jax.models.prompts import count

pytestmark = [
  pytest.mark.tpu_compile,
  pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"),
]
# Two heads of 64 channels make up the kernel's block of 128 lanes, as in published towers.
TINY = CLIPConfig(
  embed_dim=64, image_size=64, patch_size=8, vision_width=128, vision_layers=3, vision_heads=2,
  text_width=128, text_layers=2, text_heads=2, context_length=32, vocab_size=49408,
)  # fmt: skip
CLASSES = analysis.Classes(("a square", "sand", "a circle", "water"), (0, 1, 2), (3,), 254)
OF_TEXT = (*tuners.CONTEXTS, *(f"{tuners.TEXT}{name}" for name in tuners.TUNERS))
TUNERS = ("rpn+vpt", *(name for name in tuners.OTHERS if name != "rpn"), *tuners.TUNERS, *OF_TEXT)


@pytest.fixture(autouse=True, scope="module")
def low_effort():
  with jax.default_matmul_precision("default"):
    before = jax.config.jax_exec_time_optimization_effort
    jax.config.update("jax_exec_time_optimization_effort", -1.0)
    yield
    jax.config.update("jax_exec_time_optimization_effort", before)


def small(words="", **changes):
  config = shapes.get_config(words).unlock()
  config.dtype = "bfloat16"
  config.update_from_flattened_dict(changes)
  return config


def compiled(config, pod, clip=TINY, only=None):
  """Program -> what `measure` tells of it, and what is trained."""
  config.data.batch_size = 2 * pod.mesh.size
  programs = analysis.programs(config.lock(), clip, CLASSES, pod)
  return {
    name: analysis.measure(program, pod.chip, name)
    for name, program in programs.items()
    if only is None or name in only
  }


def check_sent(step, trained, slices=1):
  """The trained numbers once, the sums of the loss and the count of masks; nothing of the tower."""
  sent = step["collectives"]
  if slices == 1:
    assert sent == {"all-reduce": {"count": 2, "bytes": pytest.approx(4 * trained, abs=8192)}}
  else:  # within slices, between them, and back
    assert set(sent) <= {"all-reduce", "reduce-scatter", "all-gather"}
    assert all(kind["bytes"] <= 4 * trained + 8192 for kind in sent.values()), sent


def trained_numbers(config):
  network = analysis.predictor.make_network(config, TINY, "tpu")
  encoder = analysis.RandomEncoder(TINY, {}, config.templates, config.synonyms)
  text = network.text_input(encoder, [CLASSES.names[i] for i in CLASSES.trained])
  shapes_ = jax.eval_shape(
    lambda: analysis.init_prompts(
      network,
      analysis.init_towers(TINY, jax.random.key(0), network.towers),
      text,
      jax.random.key(0),
      config.data.crop,
    )
  )
  return count(shapes_)


@pytest.mark.parametrize("tuner", TUNERS)
def test_every_tuner(tuner):
  config, pod = small(**{"model.tuner": tuner}), chips.pod("v5e:2x2")
  step = compiled(config, pod, only=("train",))["train"]
  check_sent(step, trained_numbers(config))
  assert 0 < step["share_of_memory"] < 0.1


@pytest.mark.parametrize("name", ["v4:2x2x1", "v5p:2x2x1", "v6e:2x2", "v5e:1x1", "2xv5e:2x2"])
def test_every_generation(name):
  config, pod = small(), chips.pod(name)
  assert pod.mesh.size == {"v5e:1x1": 1, "2xv5e:2x2": 8}.get(name, 4)
  parts = compiled(config, pod)
  assert set(parts) == {"train", "windows", "tile", "text"}
  if pod.mesh.size > 1:
    check_sent(parts["train"], trained_numbers(config), slices=pod.mesh.size // 4)
  for part in ("windows", "tile", "text"):
    assert not parts[part]["collectives"], part


def test_pmap():
  config = small(parallel="pmap")
  step = compiled(config, chips.pod("v5e:2x2"), only=("train",))["train"]
  check_sent(step, trained_numbers(config))


@pytest.mark.slow
def test_256_chips():
  config = small()
  step = compiled(config, chips.pod("v5e:16x16"), only=("train",))["train"]
  check_sent(step, trained_numbers(config))


@pytest.mark.slow
def test_cat_seg():
  config = cat_seg.get_config("data=shapes").unlock()
  config.cat_seg.guidance_layers = (0, 1)
  parts = compiled(config, chips.pod("v5e:2x2"), only=("train", "windows", "text"))
  assert set(parts["train"]["collectives"]) == {"all-reduce"}


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["released", "paper"])
def test_a_step_of_full_size_is_bound_by_arithmetic(preset):
  config = voc.get_config(f"preset={preset}").unlock()
  config.dtype = "bfloat16"
  pod = chips.pod("v5e:2x2")
  config.data.batch_size = 16 * pod.mesh.size
  data = analysis.Classes([f"class {i}" for i in range(20)], range(15), range(15, 20), 254)
  program = analysis.programs(config.lock(), CLIPConfig(), data, pod)["train"]
  step = analysis.measure(program, pod.chip, "train step")
  assert step["temporary_bytes"] < 6e9
  assert step["memory_seconds"] < 1.25 * step["arithmetic_seconds"]


@pytest.mark.slow
def test_what_is_too_large_is_told():
  config = voc.get_config("preset=released").unlock()
  config.data.batch_size = 4 * 128
  data = analysis.Classes([f"class {i}" for i in range(20)], range(15), range(15, 20), 254)
  pod = chips.pod("v5e:2x2")
  program = analysis.programs(config.lock(), CLIPConfig(), data, pod)["train"]
  with pytest.raises(analysis.TooLarge, match=r"the train step needs [\d.]+G of 15.75G: lower"):
    analysis.measure(program, pod.chip, "train step")
