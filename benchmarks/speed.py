"""Speed and memory of the network, compared with an implementation in PyTorch and in OpenVINO.

    make bench      or: python -m benchmarks.speed --torch=PYTHON_WITH_TORCH --cases=voc --batches=2

All get the same random weights of ViT-B/16 (or L/14) and the same images, and their outputs are
compared. Every measurement runs in its own process, for its peak memory, and ends with the fastest
product of two matrices that the same framework reaches there: the machine's peak. Without --torch,
or if that Python has no torch, its rows are missing; --openvino names a Python with torch and
openvino, for the forward pass.
"""

import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import sys
import tempfile
import time

import flax
import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging

from benchmarks import peak
from benchmarks.processes import best, peak_bytes, run
from configs import coco_stuff, voc
from rpn_jax import devices
from rpn_jax.analysis import costs
from rpn_jax.base.console import progress, table
from rpn_jax.config import RPNConfig
from rpn_jax.models import kernels
from rpn_jax.models.rpn import RPN
from rpn_jax.models.trained import in_compute_type, init_prompts
from rpn_jax.training import losses, optim
from rpn_jax.training.step import TrainState, train_step

FLAGS = flags.FLAGS
flags.DEFINE_list("cases", ["voc"], "Of voc, coco and voc_l14")
flags.DEFINE_list("batches", ["2"], "Images at a time")
flags.DEFINE_list("remat", ["none"], "Of none, dots and full")
flags.DEFINE_list("what", ["forward", "train"], "What is measured")
flags.DEFINE_enum("dtype", "float32", ("float32", "bfloat16"), "Compute type")
flags.DEFINE_string("torch", "", "A Python that has torch")
flags.DEFINE_string("openvino", "", "A Python that has torch and openvino")
flags.DEFINE_enum("torch_mode", "eager", ("eager", "compile"), "How PyTorch runs it")
flags.DEFINE_float("seconds", 20.0, "Timed seconds per measurement, at least two calls")
flags.DEFINE_integer("rounds", 1, "Repetitions of everything in turn; the fastest counts")
flags.DEFINE_string("child", "", "Internal: folder of a case")
flags.DEFINE_string("markdown", "", "Also write the table to this file")

# name -> (config module, backbone, prompted classes at test and in training)
CASES = {
  "voc": (voc, "b16", 20, 15),
  "coco": (coco_stuff, "b16", 171, 156),
  "voc_l14": (voc, "l14", 20, 15),
}


DEVICES: set[str] = set()  # that were measured


def config_of(case: str):
  module, backbone, _, _ = CASES[case]
  return module.get_config(f"preset=released,{backbone}")


def write_case(folder: pathlib.Path, case: str, what: str, batch: int) -> None:
  """Writes weights, images and settings for the child processes."""
  _, backbone, tested, trained = CASES[case]
  config, clip_config = config_of(case), costs.BACKBONES[backbone]
  classes = trained if what == "train" else tested
  side = config.data.crop
  tower = costs.random_towers(clip_config, jax.random.key(0))
  text = np.random.default_rng(1).normal(size=(classes, clip_config.embed_dim))
  text = np.float32(text / np.linalg.norm(text, axis=-1, keepdims=True))
  model = RPN(clip_config, RPNConfig(**config.model))
  prompts = jax.device_get(init_prompts(model, tower, text[:2], jax.random.key(1), side))
  tree = {"tower": tower["visual"], "prompts": prompts}
  np.savez(folder / "weights.npz", **flax.traverse_util.flatten_dict(tree, sep="/"))
  np.savez(folder / "data.npz", text=text, **costs.random_batch(batch, side, classes))
  settings = {
    "case": case,
    "heads": clip_config.vision_heads,
    "patch": clip_config.patch_size,
    "side": side,
    "dropout": config.model.prompt_dropout,
    "threads": os.cpu_count(),
    "seconds": FLAGS.seconds,
  }
  (folder / "case.json").write_text(json.dumps(settings))


def child(folder: pathlib.Path, what: str, dtype: str, remat: str) -> dict:
  """Measures JAX once, in this process."""
  case = json.loads((folder / "case.json").read_text())
  config = config_of(case["case"])
  clip_config = costs.BACKBONES[CASES[case["case"]][1]]
  flat = dict(np.load(folder / "weights.npz"))
  tree = jax.device_put(flax.traverse_util.unflatten_dict(flat, sep="/"))
  del flat
  params, prompts = in_compute_type({"visual": tree.pop("tower")}, dtype), tree.pop("prompts")
  data = jax.device_put(dict(np.load(folder / "data.npz")))
  text = data.pop("text")
  model = RPN(
    clip_config,
    RPNConfig(**config.model),
    jnp.dtype(dtype),
    remat,
    kernels=kernels.for_platform(jax.local_devices()[0].platform),
  )
  if what == "forward":
    function = jax.jit(lambda v, image: model.apply(v, image, text))
    arguments, donated = [{"params": params, "prompts": prompts}, data["image"]], None
  else:
    optimizer = optim.make_optimizer(config.optimizer, prompts)

    def function(state, params, batch, key):
      return train_step(
        state, params, text, batch, key,
        model=model, optimizer=optimizer, loss_fn=losses.sigmoid_loss,
      )  # fmt: skip

    options = devices.compiler_options(devices.data_mesh())
    function = jax.jit(function, donate_argnums=0, compiler_options=options)
    state = TrainState(jnp.int32(0), prompts, jax.jit(optimizer.init)(prompts))
    arguments, donated = [state, params, data, jax.random.key(0)], 0
    del prompts
  result = costs.measure(function, *arguments, donated=donated, timed=case["seconds"])
  peak_memory = peak_bytes()
  if what == "forward":
    np.save(folder / "jax.npy", np.asarray(function(*arguments), np.float32))
  return {
    **result,
    "peak_bytes": peak_memory,
    "peak_gflops": product_gflops(dtype),
    "device": jax.devices()[0].device_kind,
    "version": jax.__version__,
  }


def product_gflops(dtype: str) -> float:
  """By the function that the network's products are made by."""
  a = jax.random.normal(jax.random.key(0), (peak.SIDE, peak.SIDE), jnp.dtype(dtype))
  multiply = jax.jit(kernels.for_platform(jax.local_devices()[0].platform).product)
  return peak.gflops(lambda: multiply(a, a).block_until_ready())


def commands(folder: str, what: str) -> dict[str, list[str]]:
  """Program -> the command that measures it once."""
  found = {}
  if FLAGS.torch:
    torch = [FLAGS.torch, "-m", "benchmarks.torch_rpn", folder, what]
    types = {"": FLAGS.dtype}
    if FLAGS.dtype == "bfloat16":
      types = {", autocast": "bfloat16", ", bfloat16 weights": "bfloat16_weights"}
    found = {f"PyTorch{name}": [*torch, dtype, FLAGS.torch_mode] for name, dtype in types.items()}
  convert = [FLAGS.openvino, "-m", "benchmarks.torch_rpn", folder, "openvino"]
  if FLAGS.openvino and what == "forward" and run(convert) is not None:
    measured = [FLAGS.openvino, "-m", "benchmarks.openvino_rpn", folder, FLAGS.dtype]
    found["OpenVINO"] = measured
  for remat in FLAGS.remat if what == "train" else ["none"]:
    found[f"ours, {remat}" if what == "train" else "ours"] = [
      sys.executable, "-m", "benchmarks.speed", f"--child={folder}", f"--what={what}",
      f"--dtype={FLAGS.dtype}", f"--remat={remat}",
    ]  # fmt: skip
  return found


def measure_case(case: str, what: str, batch: int) -> list[list]:
  """Table rows: one for each program, ours for each remat policy."""
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    write_case(folder, case, what, batch)
    programs = commands(name, what)
    results: dict[str, list] = {program: [] for program in programs}
    outputs = {}
    # Round by round, since the speed of a shared machine changes by the minute.
    for _ in range(FLAGS.rounds):
      for program, command in programs.items():
        results[program].append(run(command))
        output = folder / ("jax.npy" if program.startswith("ours") else "other.npy")
        if output.exists():
          outputs[program] = np.load(output)
          output.unlink()
    mine = next(program for program in programs if program.startswith("ours"))
    return [
      [case, what, batch, program, *row(batch, best(results[program]), best(results[mine]),
        difference(outputs.get(program), outputs.get(mine)))]
      for program in programs
    ]  # fmt: skip


def difference(a: np.ndarray | None, b: np.ndarray | None) -> float | None:
  """The largest difference over the root of the mean square; None where there is nothing to say."""
  if a is None or b is None or a is b:
    return None
  return float(np.abs(a - b).max() / np.sqrt((b**2).mean()))


def row(batch: int, result: dict | None, mine: dict | None, differs: float | None) -> list:
  if result is None:
    return ["failed", *["-"] * 7]
  DEVICES.add(result["device"])
  # All compute the same network: the count of operations of ours is everybody's.
  gflops = mine["flops"] / result["seconds"] / 1e9 if mine else None
  number = lambda x, form: "-" if x is None else format(x, form)
  return [
    f"{batch / result['seconds']:.3g}",
    number(gflops, ",.0f"),
    f"{result['peak_gflops']:,.0f}",
    f"{result['seconds_to_compile']:.0f}",
    f"{result['peak_bytes'] / 1e9:.2f}",
    number(mine and result["seconds"] / mine["seconds"], ".2f"),
    number(mine and mine["peak_bytes"] / result["peak_bytes"], ".2f"),
    number(differs, ".0e"),
  ]


COLUMNS = [
  "case", "what", "batch", "program", "images/s", "GFLOP/s", "peak GFLOP/s", "compile s", "peak GB",
  "ours is faster by", "our memory", "outputs differ by",
]  # fmt: skip


def main(argv) -> None:
  del argv
  logging.set_verbosity(logging.WARNING)
  devices.configure_cpu()
  if FLAGS.child:
    result = child(pathlib.Path(FLAGS.child), FLAGS.what[0], FLAGS.dtype, FLAGS.remat[0])
    print(json.dumps(result))
    return
  jax.config.update("jax_platforms", "cpu")  # an accelerator's memory is the children's
  wanted = [
    (case, what, int(batch))
    for case in FLAGS.cases
    for batch in FLAGS.batches
    for what in FLAGS.what
  ]
  began, rows = time.time(), []
  for item in progress(wanted, "bench", "case"):
    rows += measure_case(*item)
  result = table(rows, COLUMNS, markdown=True)
  versions = ", ".join(f"{n} {importlib.metadata.version(n)}" for n in ("jax", "jaxlib", "flax"))
  print(result)
  print(
    f"\n{FLAGS.dtype}; {', '.join(sorted(DEVICES))}; {platform.machine()}, {os.cpu_count()} cores; "
    f"{versions}; PyTorch: {FLAGS.torch_mode}; "
    f"{datetime.date.today()}; {time.time() - began:.0f} s. Ours is better where "
    "the speed ratio is above 1 and the memory ratio below 1."
  )
  if FLAGS.markdown:
    pathlib.Path(FLAGS.markdown).write_text(result + "\n")


if __name__ == "__main__":
  app.run(main)
