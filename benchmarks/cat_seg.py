"""Speed and memory of CAT-Seg at full size, compared with an implementation in PyTorch.

    python -m benchmarks.cat_seg --torch=PYTHON_WITH_TORCH
    python -m benchmarks.cat_seg --what=evaluate --classes=847      (without PyTorch)

ViT-B/16 at 384 pixels with random weights: a training step with the 171 classes of COCO-Stuff, and
the evaluation of one image in five views with 150 classes, whose names are encoded beforehand. Both
frameworks get the same weights and images; logits, class ids, loss and norm of the gradient are
compared. Every measurement runs in its own process, for its peak memory.
"""

import json
import os
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable

import flax
import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging

from benchmarks.processes import best, peak_bytes, run
from configs import cat_seg
from rpn_jax import devices
from rpn_jax.analysis import costs
from rpn_jax.base.console import progress, table
from rpn_jax.inference.predictor import Predictor, Protocol, make_network
from rpn_jax.inference.protocol import PROTOCOL_FIELDS
from rpn_jax.models.clip import CLIPConfig
from rpn_jax.models.trained import init_prompts, split
from rpn_jax.training import losses, optim
from rpn_jax.training.step import TrainState, train_step
from rpn_jax.weights.cat_seg import to_official

FLAGS = flags.FLAGS
flags.DEFINE_list("what", ["train", "evaluate"], "What is measured")
flags.DEFINE_list("remat", ["full"], "Of none, dots and full")
flags.DEFINE_string("torch", "", "A Python that has torch")
flags.DEFINE_float("seconds", 20.0, "Timed seconds per measurement, at least two calls")
flags.DEFINE_integer("rounds", 1, "Repetitions of everything in turn; the fastest counts")
flags.DEFINE_string("child", "", "Internal: folder of a case")
flags.DEFINE_integer("classes", 0, "How many are prompted; 0: 171 in training, 150 in evaluation")
flags.DEFINE_integer("batch", 1, "Images of a training step")

# Pixels of the evaluated image, already resized to a short side of 640, and of the result.
IMAGE, RESULT = (640, 853), (480, 640)


def settings():
  config = cat_seg.get_config().unlock()
  return config, costs.BACKBONES["b16"]


def write_case(folder: pathlib.Path, config, clip: CLIPConfig) -> None:
  """Writes weights, images and settings for the child processes."""
  network = make_network(config, clip)
  towers = costs.random_towers(clip, jax.random.key(0), network.towers)
  encoder = costs.RandomEncoder(clip, {}, config.templates, config.synonyms)
  names = lambda count: [f"class {i}" for i in range(count)]
  tokens = encoder.tokens(names(2))
  prompts = init_prompts(network, towers, tokens, jax.random.key(1), config.data.crop)
  prompts = {name: x for name, x in jax.device_get(prompts).items() if name not in towers}
  tree = {"params": towers, "prompts": prompts}
  np.savez(folder / "weights.npz", **flax.traverse_util.flatten_dict(tree, sep="/"))
  grid, window = config.cat_seg.resolution // clip.patch_size, config.cat_seg.window
  params = {**towers, "logit_scale": np.float32(1)}
  np.savez(folder / "official.npz", **to_official(clip, params, prompts, grid=grid, window=window))
  rng = np.random.default_rng(2)
  train, evaluate = FLAGS.classes or 171, FLAGS.classes or 150
  image = rng.normal(size=(1, *IMAGE, 3)).astype(np.float32)
  np.savez(folder / "evaluate.npz", image=image, tokens=encoder.tokens(names(evaluate)))
  data = costs.random_batch(FLAGS.batch, config.data.crop, train)
  np.savez(folder / "train.npz", tokens=encoder.tokens(names(train)), **data)
  case = {
    "heads": [clip.vision_heads, clip.text_heads],
    "guidance_layers": list(config.cat_seg.guidance_layers),
    "side": config.cat_seg.resolution,
    "size": RESULT,
    "threads": os.cpu_count(),
    "seconds": FLAGS.seconds,
  }
  (folder / "case.json").write_text(json.dumps(case))


def child(folder: pathlib.Path, what: str, remat: str) -> dict:
  """Measures JAX once, in this process."""
  case = json.loads((folder / "case.json").read_text())
  config, clip = settings()
  config.remat = remat
  network = make_network(config, clip)
  with np.load(folder / "weights.npz") as arrays:
    flat = {name: jax.device_put(arrays[name]) for name in arrays.files}
  tree = flax.traverse_util.unflatten_dict(flat, sep="/")
  del flat
  data = dict(np.load(folder / f"{what}.npz"))
  measure = evaluate if what == "evaluate" else train
  result = measure(folder, case, config, network, tree, data)
  return {**result, "device": jax.devices()[0].device_kind, "version": jax.__version__}


def repeat(call: Callable, seconds: float) -> dict:
  """Seconds of the first call, which compiles, and of the others in the median; peak memory."""
  times: list[float] = []
  while len(times) < 3 or sum(times[1:]) < seconds:
    began = time.perf_counter()
    call()
    times.append(time.perf_counter() - began)
  return {"first": times[0], "seconds": float(np.median(times[1:])), "peak_bytes": peak_bytes()}


def train(folder, case, config, network, tree, data) -> dict:
  del folder
  trained, frozen = split(tree["params"], network.trained)
  prompts = jax.tree.map(jnp.copy, {**tree.pop("prompts"), **trained})
  del trained, tree
  optimizer = optim.make_optimizer(config.optimizer, prompts)
  text = data.pop("tokens")

  def step(state, params, text, batch, key):
    return train_step(
      state, params, text, batch, key,
      model=network, optimizer=optimizer, loss_fn=losses.make_loss(config.loss, 255),
    )  # fmt: skip

  options = devices.compiler_options(devices.data_mesh())
  step = jax.jit(step, donate_argnums=0, compiler_options=options)
  state = TrainState(jnp.int32(0), prompts, jax.jit(optimizer.init)(prompts))
  del prompts
  first: dict = {}

  def call() -> None:
    nonlocal state
    state, metrics = jax.block_until_ready(step(state, frozen, text, data, jax.random.key(0)))
    first.setdefault("loss", float(metrics["loss"]))
    first.setdefault("grad_norm", float(metrics["grad_norm"]))

  result = repeat(call, case["seconds"])
  return {**result, **first}


def evaluate(folder, case, config, network, tree, data) -> dict:
  protocol = Protocol(
    short_side=config.data.short_side, **{name: config.eval[name] for name in PROTOCOL_FIELDS}
  )
  encoder = costs.RandomEncoder(network.clip, {}, config.templates, config.synonyms)
  predictor = Predictor(network, tree["params"], tree["prompts"], encoder, protocol)
  window = predictor.sliding_window(data["tokens"])
  image = data["image"][0]
  result = repeat(lambda: window(image, RESULT), case["seconds"])
  np.save(folder / "jax_ids.npy", window(image, RESULT))
  np.save(folder / "jax.npy", window.logits_fn(np.stack(window.layout.windows(image))))
  return result


def differences(folder: pathlib.Path, what: str, mine: dict, other: dict) -> str:
  """How far the outputs are apart."""
  if what == "train":
    apart = [abs(mine[n] / other[n] - 1) for n in ("loss", "grad_norm")]
    return f"loss {apart[0]:.0e}, gradient {apart[1]:.0e}"
  a, b = (np.load(folder / f"{name}.npy") for name in ("jax", "torch"))
  logits = float(np.abs(a - b).max() / np.sqrt((b**2).mean()))
  a, b = (np.load(folder / f"{name}_ids.npy") for name in ("jax", "torch"))
  return f"logits {logits:.0e}, {np.mean(a != b):.2%} of the pixels"


COLUMNS = [
  "what", "remat", "s", "peak GB", "first s", "PyTorch s", "PyTorch peak GB", "speed ratio",
  "memory ratio", "outputs differ by",
]  # fmt: skip


def measure_case(folder: pathlib.Path, what: str) -> list[list]:
  """Table rows: one per remat policy for training, one otherwise."""
  policies = FLAGS.remat if what == "train" else ["none"]
  ours, theirs = {remat: [] for remat in policies}, []
  for _ in range(FLAGS.rounds):
    if FLAGS.torch:
      theirs.append(run([FLAGS.torch, "benchmarks/torch_cat_seg.py", str(folder), what]))
    for remat in policies:
      ours[remat].append(run([
        sys.executable, "-m", "benchmarks.cat_seg", f"--child={folder}", f"--what={what}",
        f"--remat={remat}",
      ]))  # fmt: skip
  rows, other = [], best(theirs)
  for remat in policies:
    mine = best(ours[remat])
    if mine is None:
      rows.append([what, remat, *["failed"] * 3, *["-"] * 5])
      continue
    cells = [
      what, remat if what == "train" else "", f"{mine['seconds']:.1f}",
      f"{mine['peak_bytes'] / 1e9:.2f}", f"{mine['first']:.0f}",
    ]  # fmt: skip
    rows.append([*cells, *["-"] * 5] if other is None else [
      *cells, f"{other['seconds']:.1f}", f"{other['peak_bytes'] / 1e9:.2f}",
      f"{other['seconds'] / mine['seconds']:.2f}",
      f"{mine['peak_bytes'] / other['peak_bytes']:.2f}",
      differences(folder, what, mine, other),
    ])  # fmt: skip
  return rows


def main(argv) -> None:
  del argv
  logging.set_verbosity(logging.WARNING)
  devices.configure_cpu()
  if FLAGS.child:
    print(json.dumps(child(pathlib.Path(FLAGS.child), FLAGS.what[0], FLAGS.remat[0])))
    return
  rows = []
  with tempfile.TemporaryDirectory() as name:
    write_case(pathlib.Path(name), *settings())
    for one in progress(FLAGS.what, "bench", "case"):
      rows += measure_case(pathlib.Path(name), one)
  print(table(rows, COLUMNS, markdown=True))


if __name__ == "__main__":
  app.run(main)
