"""What a network costs: python -m rpn_jax costs --config=configs/voc.py --classes=20

Parameters by component, floating-point operations of one image, memory and images per second of a
forward pass and of a training step on this machine (the columns of the paper's Table 1), as text
and, with --json=FILE, as JSON. With --backbone=b16 or l14 no weights are needed: they are random,
which costs the same.
"""

import argparse
import importlib.metadata
import math
import time
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import jaxprs_in_params

from rpn_jax import config as declared
from rpn_jax import devices
from rpn_jax.analysis.arguments import parse
from rpn_jax.base.console import table
from rpn_jax.base.errors import InputError
from rpn_jax.base.paths import expand, write_json
from rpn_jax.inference.predictor import make_network
from rpn_jax.models.clip import CLIPConfig, VisionTransformer
from rpn_jax.models.prompts import count
from rpn_jax.models.trained import TOWERS, init_prompts, join, split
from rpn_jax.training import losses, optim
from rpn_jax.training.step import TrainState, train_step
from rpn_jax.weights import checkpoints, clip_file

BACKBONES = {name: CLIPConfig(**b.architecture) for name, b in declared.BACKBONES.items()}


def random_tower(clip_config: CLIPConfig, key) -> dict:
  """Random parameters of a vision tower, as numpy."""
  side = clip_config.image_size
  init = jax.jit(VisionTransformer(clip_config).init)
  return jax.device_get({"visual": init(key, jnp.zeros((1, side, side, 3)))["params"]})


def random_batch(batch: int, side: int, classes: int) -> dict:
  """Noise with labels in blocks of 32 pixels, a tenth of them ignored."""
  rng = np.random.default_rng(0)
  blocks = rng.integers(0, classes, (batch, -(-side // 32), -(-side // 32)))
  blocks[rng.random(blocks.shape) < 0.1] = 255
  label = blocks.repeat(32, 1).repeat(32, 2)[:, :side, :side]
  image = rng.normal(size=(batch, side, side, 3)).astype(np.float32)
  return {"image": image, "label": np.int32(label)}


def parameters(prompts: dict, frozen: dict) -> dict[str, int]:
  """Parameters by component: the parts of what is trained, then the frozen part of the tower."""
  parts = {
    f"{'params' if name in TOWERS else 'prompts'}/{name}": count(tree)
    for name, tree in prompts.items()
  }
  # One row for the experts of all layers.
  experts = sum(parts.pop(name) for name in list(parts) if "m2oe" in name)
  if experts:
    parts["prompts/m2oe"] = experts
  parts = dict(sorted(parts.items()))
  return {**parts, "trained": count(prompts), "frozen vision tower": count(frozen)}


def operations(jaxpr) -> float:
  """Floating-point operations of the matrix products and convolutions of a `ClosedJaxpr.jaxpr`.

  XLA's own analysis counts the body of a loop once, and so one head of attention on CPUs.
  """
  total = 0.0
  for equation in jaxpr.eqns:
    operation, params = equation.primitive.name, equation.params
    if operation == "dot_general":
      (contracted, _), _ = params["dimension_numbers"]
      shape = equation.invars[0].aval.shape
      total += 2 * equation.outvars[0].aval.size * math.prod(shape[axis] for axis in contracted)
    elif operation == "conv_general_dilated":
      kernel = equation.invars[1].aval
      features = kernel.shape[params["dimension_numbers"].rhs_spec[0]]
      total += 2 * equation.outvars[0].aval.size * kernel.size / features
    times = params["length"] if operation == "scan" else 1
    total += times * sum(map(operations, jaxprs_in_params(params)))
  return total


def measure(
  function, *arguments, donated: int | None = None, timed: float = 3.0
) -> dict[str, float]:
  """Compilation, operations, memory and seconds of a jitted function on this machine.

  Args:
    function: jitted.
    *arguments: of it.
    donated: index of the argument that the function uses up and returns first.
    timed: seconds of timed calls, at least two of them.
  """
  traced = function.trace(*arguments)
  lowered = traced.lower()
  began = time.perf_counter()
  compiled = lowered.compile()
  seconds_to_compile = time.perf_counter() - began
  memory = compiled.memory_analysis()
  given = list(arguments)

  def call():
    out = compiled(*given)
    if donated is not None:
      given[donated] = out[0]
    return jax.block_until_ready(out)

  call()
  times: list[float] = []
  while len(times) < 2 or sum(times) < timed:
    began = time.perf_counter()
    call()
    times.append(time.perf_counter() - began)
  return {
    "seconds_to_compile": seconds_to_compile,
    "flops": operations(traced.jaxpr.jaxpr),
    "temporary_bytes": int(memory.temp_size_in_bytes),
    "argument_bytes": int(memory.argument_size_in_bytes),
    "seconds": float(np.median(times)),
  }


class RandomEncoder(NamedTuple):
  """Random unit-length embeddings: what a network costs does not depend on them."""

  embed_dim: int

  def embed(self, names: Sequence[str]) -> np.ndarray:
    text = np.random.default_rng(1).normal(size=(len(names), self.embed_dim))
    return (text / np.linalg.norm(text, axis=-1, keepdims=True)).astype(np.float32)


def costs(config, clip_config: CLIPConfig, tower: dict, classes: int, batch: int) -> dict:
  """Everything the command prints.

  Args:
    config: config of a segmentation run.
    clip_config: architecture of the tower.
    tower: its parameters, the branch `visual`.
    classes: how many are prompted.
    batch: images at a time.

  Raises:
    InputError: a training-free method, or a crop that is no multiple of the patch size.
  """
  model, side, mesh = make_network(config, clip_config), config.data.crop, devices.data_mesh()
  if not model.trainable:
    raise InputError(f"method {config.method!r} has no parameters to count: inspect another config")
  declared.check_whole_patches("config.data.crop", side, config.clip, model.input_multiple)
  text = model.text_input(RandomEncoder(clip_config.embed_dim), [""] * classes)
  key = jax.random.key(config.seed)
  prompts = init_prompts(model, tower, text, key, side)
  optimizer = optim.make_optimizer(config.optimizer, prompts)
  data = random_batch(batch, side, classes)

  # As in inference: merged into the tower where that is possible.
  merged_model, *merged = model.merged(tower, prompts)
  forward = jax.jit(lambda variables, image: merged_model.apply(variables, image, text))
  _, frozen = split(tower, model.trained)

  def one_step(state, params, batch, key):
    return train_step(
      state, params, text, batch, key,
      model=model, optimizer=optimizer, loss_fn=losses.sigmoid_loss,
    )  # fmt: skip

  params = jax.device_put(frozen)
  result: dict[str, dict] = {
    "parameters": parameters(prompts, frozen),
    "forward": measure(forward, join(*merged), data["image"]),
  }
  state = TrainState(jnp.int32(0), prompts, jax.jit(optimizer.init)(prompts))
  jitted = jax.jit(one_step, donate_argnums=0, compiler_options=devices.compiler_options(mesh))
  result["train_step"] = measure(jitted, state, params, data, key, donated=0)
  for part in ("forward", "train_step"):
    result[part]["images_per_second"] = batch / result[part]["seconds"]
    result[part]["flops_per_image"] = result[part]["flops"] / batch
  device = jax.devices()[0]
  return {
    **result,
    "classes": classes,
    "batch": batch,
    "side": side,
    "device": f"{device.platform}: {device.device_kind}",
    "versions": {name: importlib.metadata.version(name) for name in ("jax", "flax")},
  }


def text_of(result: dict) -> str:
  """The numbers as two tables."""
  parts = result["parameters"]
  total = parts["trained"] + parts["frozen vision tower"]
  rows = [[name, f"{n:,}", f"{100 * n / total:.2f} %"] for name, n in parts.items()]
  cost = [
    [
      name.replace("_", " "),
      f"{r['flops_per_image'] / 1e9:.1f}",
      f"{r['temporary_bytes'] / 2**20:,.0f}",
      f"{r['images_per_second']:.3g}",
      f"{r['seconds_to_compile']:.1f}",
    ]
    for name, r in ((name, result[name]) for name in ("forward", "train_step"))
  ]
  heads = ["", "GFLOPs/image", "temporary MiB", "images/s", "compile s"]
  note = (
    f"{result['batch']} image(s) of {result['side']} x {result['side']}, {result['classes']} "
    f"classes, {result['device']}, JAX {result['versions']['jax']}. A multiplication and an "
    "addition are two operations; publications often count one, half of these figures."
  )
  return "\n\n".join([table(rows, ["parameters", "number", "of all"]), table(cost, heads), note])


def _positive(what: str):
  """An argparse type: a whole number of `what`, at least 1."""

  def parsed(text: str) -> int:
    if not text.isdecimal() or not int(text):
      raise argparse.ArgumentTypeError(f"expected {what}, got {text!r}")
    return int(text)

  return parsed


def main(arguments: list[str]) -> int:
  parser = argparse.ArgumentParser(prog="rpn costs", description=__doc__)
  parser.formatter_class = argparse.RawDescriptionHelpFormatter
  add = parser.add_argument
  how_many = _positive("how many classes are prompted")
  add("--classes", type=how_many, default=20, help="how many are prompted (%(default)s)")
  add(
    "--batch", type=_positive("how many images"), default=1, help="images at a time (%(default)s)"
  )
  add("--backbone", choices=tuple(BACKBONES), help="random weights instead of config.clip")
  add("--json", help="also write the numbers to this file")
  args, config = parse(parser, arguments)
  devices.configure_cpu()  # no cache of programs: how long they compile is measured
  if args.backbone:
    clip_config = BACKBONES[args.backbone]
    tower = random_tower(clip_config, jax.random.key(0))
  elif (
    not expand(config.clip).exists() and (named := checkpoints.find(config.clip)) and named.config
  ):
    clip_config = named.config  # what it costs depends on no weight: nothing is fetched
    tower = random_tower(clip_config, jax.random.key(0))
  else:
    path = clip_file.find_weights(config.clip)
    if not path.exists():
      raise InputError(
        f"config.clip={config.clip}: no such file; give --backbone=b16 or l14 for random weights"
      )
    clip_config, clip = clip_file.load(path)
    tower = {"visual": clip["visual"]}
  result = costs(config, clip_config, tower, args.classes, args.batch)
  print(text_of(result))
  if args.json:
    write_json(expand(args.json), result)
  return 0
