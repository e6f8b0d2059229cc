"""What training-free methods cost, and what they score on the synthetic data sets.

    python -m benchmarks.training_free --what=speed
    python -m benchmarks.training_free --what=worlds

`speed`: one image of 336 x 448 pixels as one window, ViT-B/16 with random weights, 20 rows of text.
Every round calls each method once, and PAMR at the size of the image; a ratio is the median of the
rounds' ratios to vanilla. `worlds`: mIoU over all classes that occur in the evaluation scenes of
shapes and crowds, by the shipped CLIP, without and with PAMR.
"""

import datetime
import importlib.metadata
import os
import platform
import time
from collections.abc import Callable

import jax
import numpy as np
from absl import app, flags, logging

from benchmarks.processes import peak_bytes
from configs import training_free as configs
from data_pipelines import datasets
from rpn_jax import devices
from rpn_jax.analysis import costs
from rpn_jax.base.console import progress, table
from rpn_jax.inference.evaluation import evaluate
from rpn_jax.inference.predictor import Predictor
from rpn_jax.inference.refinement import REFINEMENTS, Refinement, refine
from rpn_jax.models import kernels
from rpn_jax.models.training_free import METHODS, DenseCLIP
from rpn_jax.weights.clip_file import with_normalization

FLAGS = flags.FLAGS
flags.DEFINE_enum("what", "speed", ("speed", "worlds"), "What is measured")
flags.DEFINE_list("methods", list(METHODS), "Which are measured; speed adds vanilla")
flags.DEFINE_integer("rounds", 7, "speed: calls of each method", lower_bound=1)
flags.DEFINE_integer("images", 0, "worlds: evaluation scenes of each set; 0: as configured")

IMAGE, ROWS = (336, 448), 20
# A ratio above this is marked.
LIMIT = 1.3
SETS = configs.SYNTHETIC
# Scenes that are segmented before the clock starts, so that programs are compiled.
WARM_UP = 4


def methods() -> dict[str, tuple[Callable, float]]:
  """Method -> a call that waits for its scores, and its GFLOPs."""
  clip = costs.BACKBONES["b16"]
  params = jax.device_put(costs.random_towers(clip, jax.random.key(0)))
  image = jax.device_put(costs.random_batch(1, max(IMAGE), ROWS)["image"][:, : IMAGE[0]])
  text = costs.RandomEncoder(clip, {}, "single", "mean").embed(["name"] * ROWS)
  device_kernels = kernels.for_platform(jax.local_devices()[0].platform)

  def prepared(name: str) -> tuple[Callable, float]:
    network = DenseCLIP(clip, name, kernels=device_kernels)
    traced = jax.jit(network.apply).trace({"params": params}, image, text)
    compiled = traced.lower().compile()
    call = lambda: jax.block_until_ready(compiled({"params": params}, image, text))
    return call, costs.operations(traced.jaxpr.jaxpr) / 1e9

  names = dict.fromkeys(("vanilla", *FLAGS.methods))
  return {name: prepared(name) for name in progress(list(names), "compile", "method")}


def refinement() -> Callable:
  """A call of PAMR, as evaluations make it."""
  rng = np.random.default_rng(0)
  image = rng.normal(size=(*IMAGE, 3)).astype(np.float32)
  scores = rng.normal(size=(*IMAGE, ROWS)).astype(np.float32)
  return lambda: refine(scores.copy(), image, Refinement("pamr"))


def speed() -> str:
  """A table: seconds, in units of vanilla, of each method and of PAMR."""
  prepared = methods()
  calls = {name: call for name, (call, _) in prepared.items()}
  calls["PAMR"] = refinement()
  seconds: dict[str, list[float]] = {name: [] for name in calls}
  for timed in progress([False] + [True] * FLAGS.rounds, "measure", "round"):
    for name, call in calls.items():
      began = time.perf_counter()
      call()
      if timed:
        seconds[name].append(time.perf_counter() - began)
  rows = []
  for name, times in seconds.items():
    ratios = np.divide(times, seconds["vanilla"])
    ratio = float(np.median(ratios))
    rows.append([
      name,
      f"{prepared[name][1]:.0f}" if name in prepared else "-",
      f"{np.median(times):.3g}",
      f"{ratio:.2f}",
      f"{ratios.min():.2f} to {ratios.max():.2f}",
      "yes" if ratio > LIMIT else "",
    ])  # fmt: skip
  columns = ["method", "GFLOPs", "s", "ratio to vanilla", "of rounds", f"above {LIMIT}"]
  return table(rows, columns, markdown=True)


def world(name: str) -> dict[str, list[str]]:
  """Method -> cells of a data set: mIoU in % and images/s, each without and with PAMR."""
  config = configs.get_config(f"set={name}").unlock()
  if FLAGS.images:
    config.data.eval_images = FLAGS.images
  predictor = Predictor.from_config(config.lock())
  (data,) = datasets.load_evaluations(with_normalization(config, predictor.clip))
  examples = list(data.eval_examples())
  cells = {}
  for method in FLAGS.methods:
    scores, rates = [], []
    for refinement in REFINEMENTS:
      config = configs.get_config(f"method={method},set={name}").unlock()
      config.eval.refine = refinement
      window = predictor.for_config(config.lock()).for_data(data)
      list(window.stream((e["image"], e["label"].shape) for e in examples[:WARM_UP]))
      began = time.perf_counter()
      evaluation = evaluate(window, examples, data)
      rates.append(f"{len(examples) / (time.perf_counter() - began):.1f}")
      scores.append(f"{100 * evaluation.scores['miou_gt']:.1f}")
    cells[method] = [*scores, *rates]
  return cells


def worlds() -> str:
  """A table of all methods on both data sets."""
  of_sets = [world(name) for name in SETS]
  rows = [[name, *(cell for cells in of_sets for cell in cells[name])] for name in FLAGS.methods]
  of_each = ("mIoU", "with PAMR", "images/s", "with PAMR")
  return table(rows, ["method", *(f"{s}: {c}" for s in SETS for c in of_each)], markdown=True)


def main(argv) -> None:
  del argv
  logging.set_verbosity(logging.WARNING)
  devices.configure_cpu()
  began = time.time()
  result = speed() if FLAGS.what == "speed" else worlds()
  print(result)
  print(
    f"\n{jax.devices()[0].device_kind}; {platform.machine()}, {os.cpu_count()} cores; JAX "
    f"{importlib.metadata.version('jax')}; {datetime.date.today()}; peak memory "
    f"{peak_bytes() / 1e9:.2f} GB; {time.time() - began:.0f} s"
  )


if __name__ == "__main__":
  app.run(main)
