"""What a network costs: python -m rpn_jax costs --config=configs/voc.py --classes=20

Parameters by component, floating-point operations of one image, memory and images per second of a
forward pass and of a training step on this machine (the columns of the paper's Table 1), as text
and, with --json=FILE, as JSON. Where a text tower is trained, a training step encodes the class
names; in inference that is done once and has a row of its own. With --backbone=b16 or l14 no
weights are needed: they are random, which costs the same.
"""

import argparse
import importlib.metadata
import math
import time
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import jaxprs_in_params
from jax.interpreters import partial_eval

from rpn_jax import config as declared
from rpn_jax import devices
from rpn_jax.analysis.arguments import parse
from rpn_jax.base.console import table
from rpn_jax.base.errors import InputError
from rpn_jax.base.paths import expand, write_json
from rpn_jax.inference.predictor import make_network
from rpn_jax.models.clip import CLIPConfig, TextTransformer, VisionTransformer
from rpn_jax.models.prompts import count
from rpn_jax.models.trained import TOWERS, init_prompts, join, split
from rpn_jax.text.embeddings import TextEncoder
from rpn_jax.training import losses, optim
from rpn_jax.training.step import TrainState, train_step
from rpn_jax.weights import checkpoints, clip_file

TITLES = {"visual": "vision tower", "text": "text tower"}
BACKBONES = {name: CLIPConfig(**b.architecture) for name, b in declared.BACKBONES.items()}


def init_towers(clip_config: CLIPConfig, key: jax.Array, towers: Sequence[str]) -> dict:
  """Random parameters of towers by their names."""
  side = clip_config.image_size
  inputs = {
    "visual": (VisionTransformer(clip_config), jnp.zeros((1, side, side, 3))),
    "text": (TextTransformer(clip_config), jnp.zeros((1, 8), jnp.int32)),
  }

  def init(name: str) -> dict:
    tower, example = inputs[name]
    return jax.jit(tower.init)(key, example)["params"]

  return {name: init(name) for name in towers}


def random_towers(
  clip_config: CLIPConfig, key: jax.Array, towers: Sequence[str] = ("visual",)
) -> dict:
  """`init_towers` as numpy."""
  return jax.device_get(init_towers(clip_config, key, towers))


def random_batch(batch: int, side: int, classes: int) -> dict:
  """Noise with labels in blocks of 32 pixels, a tenth of them ignored."""
  rng = np.random.default_rng(0)
  blocks = rng.integers(0, classes, (batch, -(-side // 32), -(-side // 32)))
  blocks[rng.random(blocks.shape) < 0.1] = 255
  label = blocks.repeat(32, 1).repeat(32, 2)[:, :side, :side]
  image = rng.normal(size=(batch, side, side, 3)).astype(np.float32)
  return {"image": image, "label": np.int32(label)}


def parameters(prompts: dict, frozen: dict) -> dict[str, int]:
  """Parameters by component: the parts of what is trained, then the frozen parts of the towers."""
  parts = {
    f"{'params' if name in TOWERS else 'prompts'}/{name}": count(tree)
    for name, tree in prompts.items()
  }
  # One row for the experts of all layers.
  experts = sum(parts.pop(name) for name in list(parts) if "m2oe" in name)
  if experts:
    parts["prompts/m2oe"] = experts
  parts = dict(sorted(parts.items()))
  rest = {f"frozen {TITLES[name]}": count(tree) for name, tree in frozen.items()}
  return {**parts, "trained": count(prompts), **rest}


def operations(jaxpr, in_loops: bool = True) -> float:
  """Floating-point operations of the matrix products and convolutions of a `ClosedJaxpr.jaxpr`.

  XLA's own analysis counts the body of a loop once, and so one head of attention on CPUs. What no
  result depends on is not counted: gradients that nobody takes are traced and compiled to nothing.
  Of a Pallas kernel it is what that says of itself.

  Args:
    jaxpr: of a program; in a map over devices, the part of one is counted.
    in_loops: False counts the body of a loop once, as XLA does.
  """
  return _operations(partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[0], in_loops)


def _operations(jaxpr, in_loops: bool) -> float:
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
    elif operation == "pallas_call":
      total += params["cost_estimate"].flops
      continue  # its own program is of one block
    times = params["length"] if operation == "scan" and in_loops else 1
    total += times * sum(_operations(inner, in_loops) for inner in jaxprs_in_params(params))
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


class RandomEncoder(TextEncoder):
  """Token ids of real sentences; embeddings are random, since what a network costs does not depend
  on them."""

  def embed(self, names: Sequence[str]) -> np.ndarray:
    text = np.random.default_rng(1).normal(size=(len(names), self.config.embed_dim))
    return (text / np.linalg.norm(text, axis=-1, keepdims=True)).astype(np.float32)


def costs(config, clip_config: CLIPConfig, params: Mapping, classes: int, batch: int) -> dict:
  """Everything the command prints.

  Args:
    config: config of a segmentation run.
    clip_config: architecture of the towers.
    params: their parameters, at least of those towers that the network uses.
    classes: how many are prompted.
    batch: images at a time.

  Raises:
    InputError: a training-free method, or a crop that is no multiple of the patch size.
  """
  model, side, mesh = make_network(config, clip_config), config.data.crop, devices.data_mesh()
  if not model.trainable:
    raise InputError(f"method {config.method!r} has no parameters to count: inspect another config")
  declared.check_whole_patches("config.data.crop", side, config.clip, model.input_multiple)
  encoder = RandomEncoder(clip_config, {}, config.templates, config.synonyms)
  text = jnp.asarray(model.text_input(encoder, [f"class {i}" for i in range(classes)]))
  key = jax.random.key(config.seed)
  towers = {name: params[name] for name in model.towers}
  prompts = init_prompts(model, towers, text, key, side)
  optimizer = optim.make_optimizer(config.optimizer, prompts)
  data = random_batch(batch, side, classes)
  _, frozen = split(towers, model.trained)
  result: dict[str, dict] = {
    "parameters": parameters(prompts, {name: frozen.get(name, {}) for name in model.towers})
  }

  # As in inference: merged into the towers where that is possible, and the text encoded once.
  merged_model, *merged = model.merged(towers, prompts)
  variables, encoded = join(*merged), text
  if "text" in model.towers:
    encode = jax.jit(lambda v, text: merged_model.apply(v, text, method="encode_text"))
    result["text"] = measure(encode, variables, text)
    encoded = encode(variables, text)
  forward = jax.jit(lambda v, image, text: merged_model.apply(v, image, text))
  result["forward"] = measure(forward, variables, data["image"], encoded)
  del variables

  def one_step(state, params, text, batch, key):
    return train_step(
      state, params, text, batch, key,
      model=model, optimizer=optimizer, loss_fn=losses.make_loss(config.loss, 255),
    )  # fmt: skip

  state = TrainState(jnp.int32(0), prompts, jax.jit(optimizer.init)(prompts))
  jitted = jax.jit(one_step, donate_argnums=0, compiler_options=devices.compiler_options(mesh))
  arguments = (state, jax.device_put(frozen), text, data, key)
  result["train_step"] = measure(jitted, *arguments, donated=0)
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
  total = parts["trained"] + sum(n for name, n in parts.items() if name.startswith("frozen "))
  rows = [[name, f"{n:,}", f"{100 * n / total:.2f} %"] for name, n in parts.items()]
  rows.append(["all", f"{total:,}", ""])
  cost = [
    [
      title,
      f"{r.get('flops_per_image', r['flops']) / 1e9:.1f}",
      f"{r['temporary_bytes'] / 2**20:,.0f}",
      f"{r['images_per_second']:.3g}" if "images_per_second" in r else "",
      f"{r['seconds_to_compile']:.1f}",
    ]
    for title, r in (
      ("class names, once", result.get("text")),
      ("forward", result["forward"]),
      ("train step", result["train_step"]),
    )
    if r
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
  params = None
  # What it costs depends on no weight: none is fetched.
  known = BACKBONES.get(args.backbone) or checkpoints.unfetched(config.clip)
  if known:
    clip_config = known
  else:
    path = clip_file.find_weights(config.clip)
    if not path.exists():
      raise InputError(
        f"config.clip={config.clip}: no such file; give --backbone=b16 or l14 for random weights"
      )
    clip_config, params = clip_file.load(path)
  if params is None:
    towers = make_network(config, clip_config).towers
    params = random_towers(clip_config, jax.random.key(0), towers)
  result = costs(config, clip_config, params, args.classes, args.batch)
  print(text_of(result))
  if args.json:
    write_json(expand(args.json), result)
  return 0
