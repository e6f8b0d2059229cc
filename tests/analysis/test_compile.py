"""`rpn compile`: what needs no chip's compiler here; what does is in tests/tpu."""

import json
import math

import jax
import jax.numpy as jnp
import pytest

from configs import cat_seg, shapes
from rpn_jax import chips, devices
from rpn_jax.analysis import compile as analysis
from rpn_jax.analysis import largest_batch
from rpn_jax.base.errors import InputError
from rpn_jax.models import kernels
from rpn_jax.models.clip import CLIPConfig

# Parameters of the head of the tiny CLIP, whose joint space is 64 wide: two Linears, two norms.
SMALL = {
  "embed_dim": 64, "image_size": 64, "patch_size": 8, "vision_width": 64, "vision_layers": 3,
  "vision_heads": 2, "text_width": 64, "text_layers": 1, "text_heads": 2,
}  # fmt: skip
LPM = (64 * 64 + 64) + (128 * 64 + 64) + 2 * 128
PROGRAM = """
  %all-reduce.1 = f32[75000]{0} all-reduce(%x), replica_groups={}
  %all-reduce-start = (f32[3]{0}, bf16[2,4]{1,0}) all-reduce-start(%y, %z)
  %gather = bf16[8,16]{1,0:T(8,128)} all-gather(%w), dimensions={0}
  %all-reduce-done = (f32[3]{0}, bf16[2,4]{1,0}) all-reduce-done(%all-reduce-start)
"""


def test_what_is_sent_between_chips_is_counted():
  assert analysis.collectives(PROGRAM) == {
    "all-reduce": {"count": 2, "bytes": 4 * 75000 + 4 * 3 + 2 * 8},
    "all-gather": {"count": 1, "bytes": 2 * 128},
  }


def test_every_turn_of_a_loop_is_counted():
  chip = chips.Chip(1e12, 1e11, 2**30)
  matrices = jax.ShapeDtypeStruct((10, 64, 64), jnp.float32)
  loop = jax.jit(lambda x: jax.lax.scan(lambda y, m: (y @ m, None), jnp.eye(64), x)[0])
  straight = jax.jit(lambda x: x[0] @ x[1])
  turns = analysis.measure(analysis.Program(loop, (matrices,), 1, "call"), chip, "loop")
  one = analysis.measure(analysis.Program(straight, (matrices,), 1, "call"), chip, "product")
  assert one["flops"] == pytest.approx(2 * 64**3, rel=0.05) and not one["loops"]
  assert turns["flops"] == pytest.approx(10 * 2 * 64**3, rel=0.05) and turns["loops"]
  assert turns["arithmetic_seconds"] == turns["flops"] / 1e12
  for measured, said in ((one, False), (turns, True)):
    result = {"topology": "v5e:1x1", "chips": 1, "programs": {"train": measured}}
    text = analysis.text_of({**result, "versions": {"jax": jax.__version__}})
    assert ("of a loop XLA counts what one turn reads" in text and "> 0." in text) == said


# How memory may grow with the batch: by the image, and what a chip's memory holds besides; not
# quite; where too much is refused without a number; and hardly, up to a cliff.
SHARES = {
  "proportional": lambda batch, limit: batch / limit,
  "line": lambda batch, limit: 0.3 + 0.7 * batch / limit,
  "bent": lambda batch, limit: (batch / limit) ** 1.4,
  "steps": lambda batch, limit: batch / limit + 0.02 * (batch % 3 - 2),
  "refused": lambda batch, limit: 0.2 + 0.8 * batch / limit if batch <= limit else math.inf,
  "cliff": lambda batch, limit: 0.01 if batch <= limit else 5.0,
}


@pytest.mark.parametrize("largest", [0, 1, 7, 16, 23, 100])
@pytest.mark.parametrize("start", [1, 16])
@pytest.mark.parametrize("name", SHARES)
def test_the_largest_batch_is_found(largest, start, name):
  share = lambda batch: SHARES[name](batch, largest + 0.5)
  asked = []
  found = largest_batch.search(lambda batch: asked.append(batch) or share(batch), start)
  assert len(asked) == len(set(asked)) <= largest_batch.TRIES
  assert share(max(1, found)) <= 1 if largest else not found
  # The steps of one batch may go over the limit where the next one does not.
  more = found + max(1, int(found * largest_batch.CLOSE))
  assert any(share(batch) > 1 for batch in range(found + 1, more + 1))
  if name != "steps" and largest * largest_batch.CLOSE < 2:
    assert found == largest
  if name in ("proportional", "line"):
    assert len(asked) <= 7  # where doubling and halving alone takes up to 14


def test_the_largest_batches_are_told_with_what_they_cost(monkeypatch):
  limits = {"none": 100, "dots": 0, "full": 300}

  def programs(config, clip, data, pod):
    batch, rest = divmod(config.data.batch_size, pod.mesh.size)
    assert not rest
    return {"train": (batch, config.remat)}

  def measure(program, chip, what):
    batch, remat = program
    if batch > limits[remat]:
      raise analysis.TooLarge(what)
    # What fits without recomputing anything takes 500 GFLOP an image, the rest a tenth more.
    return {
      "share_of_memory": batch / limits[remat], "count": batch, "bytes": batch * 2e9,
      "flops": batch * (500e9 if batch < 70 else 550e9), "per_second_per_chip": 384.0,
      "loops": remat == "full",
    }  # fmt: skip

  monkeypatch.setattr(analysis, "programs", programs)
  monkeypatch.setattr(analysis, "measure", measure)
  config, pod = shapes.get_config(), chips.Pod("", None, devices.data_mesh(jax.devices()), None)
  found = dict(analysis.find_batches(config, SMALL, None, pod))
  assert {remat: p and p["count"] for remat, p in found.items()} == limits | {"dots": None}
  told = {"topology": "v5e:2x2", "chips": 4, "programs": {}, "versions": {"jax": "1"}}
  text = analysis.text_of(told | {"largest_batch": json.loads(json.dumps(found))})
  lines = [line.split() for line in text.splitlines()]
  assert ["none", "100", "550", "2", "384"] in lines and ["dots", "none"] in lines
  assert ["full", "300", "550", ">", "2", "384"] in lines and ">: more than that" in text


@pytest.mark.parametrize(
  "name, message",
  [
    ("tpu", r"expected chips such as v5e:2x4.*, got 'tpu'"),
    ("v5e", "expected chips such as"),
    ("v3:2x2", "generation 'v3' is not known; did you mean 'v4'. Known: v4, v5e, v5p, v6e"),
  ],
)
def test_a_mistyped_topology(name, message):
  with pytest.raises(InputError, match=message):
    chips.pod(name)


def test_without_the_compiler_the_package_is_named(monkeypatch):
  monkeypatch.setattr(chips.importlib.util, "find_spec", lambda name: None)
  with pytest.raises(InputError, match=r'libtpu, which is not installed: pip install "jax\[tpu\]"'):
    chips.pod("v5e:2x4")


def test_a_program_that_is_too_large_is_one_line():
  error = analysis._too_large(
    "RESOURCE_EXHAUSTED: ... Used 18.20G of 15.75G hbm. Exceeded ...", "step"
  )
  assert str(error).startswith("the step needs 18.20G of 15.75G: lower config.data.batch_size")
  assert error.share == pytest.approx(18.2 / 15.75)
  temporaries = "temporaries (18.38G) exceeds available HBM (15.75G)."
  error = analysis._too_large(f"RESOURCE_EXHAUSTED: required for HLO {temporaries}", "step")
  assert str(error).startswith("the step needs 18.38G of 15.75G")
  assert error.share == pytest.approx(18.38 / 15.75)
  rounded = "RESOURCE_EXHAUSTED: Used 15.75G of 15.75G hbm. Exceeded hbm capacity by 1.2M."
  assert analysis._too_large(rounded, "step").share > 1
  megabytes = analysis._too_large("RESOURCE_EXHAUSTED: Used 900.00M of 0.50G hbm.", "step")
  assert megabytes.share == pytest.approx(900 / 512)
  assert analysis._too_large("RESOURCE_EXHAUSTED: no numbers", "step").share is None


@pytest.mark.parametrize(
  "family, parallel",
  [
    (shapes, "shard_map"),
    pytest.param(shapes, "pmap", marks=pytest.mark.slow),
    pytest.param(cat_seg, "shard_map", marks=pytest.mark.slow),
  ],
)
def test_every_program_lowers_for_gpus(family, parallel, monkeypatch):
  """Training, evaluation's windows and tiles, text: without a GPU, and so without cuDNN."""
  mesh = devices.data_mesh(jax.devices()[:1])
  pod = chips.Pod("cuda", chips.Chip(1e12, 1e11, 2**30), mesh, mesh)
  monkeypatch.setitem(kernels.PLATFORMS, "tpu", kernels.PLATFORMS["gpu"])
  lower, platforms = jax.stages.Traced.lower, []

  def for_gpus(traced, **options):
    platforms.append("cuda")
    return lower(traced, lowering_platforms=("cuda",), **options)

  monkeypatch.setattr(jax.stages.Traced, "lower", for_gpus)
  config = family.get_config("data=shapes,runlocal" if family is cat_seg else "runlocal").unlock()
  config.parallel, config.data.batch_size, config.dtype = parallel, 2, "bfloat16"
  config.cat_seg.guidance_layers, config.model.m2oe_experts = (0, 1), 2
  classes = analysis.Classes(("a square", "sand", "a circle"), (0, 1))
  clip = CLIPConfig(**SMALL)
  programs = analysis.programs(config.lock(), clip, classes, pod)
  assert set(programs) == {"train", "windows", "tile", "text"}
  for program in programs.values():
    assert program.lower().as_text()
  assert platforms == 4 * ["cuda"]  # no program went another way


def test_a_report(monkeypatch, tmp_path, capsys):
  """A device of this machine stands in for a chip, with kernels that it can run."""
  mesh = devices.data_mesh(jax.devices()[:1])
  pod = chips.Pod("cpu", chips.Chip(1e12, 1e11, 2**30), mesh, mesh)
  monkeypatch.setattr(chips, "pod", lambda name: pod)
  monkeypatch.setitem(kernels.PLATFORMS, "tpu", kernels.LEAN)
  config = shapes.get_config("tuner=lpm").unlock()
  config.data.batch_size = 4
  data = analysis.Classes(("a square", "sand", "a circle"), (0, 1))
  file = tmp_path / "costs.json"
  result = analysis.report(config.lock(), "cpu", data, json=str(file))
  assert set(result["programs"]) == {"train", "windows", "tile", "text"}
  step = result["programs"]["train"]
  assert step["count"] == 4 and step["memory_seconds"] == step["bytes"] / 1e11
  # The gradients of all that is trained and the two sums of the loss, and the number of masks.
  assert step["collectives"] == {"all-reduce": {"count": 2, "bytes": 4 * (LPM + 3)}}
  assert result["programs"]["windows"]["collectives"] == {}
  assert json.loads(file.read_text())["programs"]["train"]["flops"] == step["flops"]
  said = capsys.readouterr().out
  assert "between chips" in said and "1 chips" in said and "compiled, not run" in said
