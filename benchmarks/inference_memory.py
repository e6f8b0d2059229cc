"""Memory and time for segmenting a wide image with 847 classes.

    python -m benchmarks.inference_memory --network=rpn

`rpn` is RPN on ViT-B/16 with random weights; `stand_in` returns random logits of the same shape, so
that only the merging of windows is measured. The image has 512 x 2048 pixels; all its scores would
take 3.6 GB, and 14.2 GB at twice the size.
"""

import resource
import sys
import time

import jax
import numpy as np
from absl import app, flags, logging

from rpn_jax.base.console import table
from rpn_jax.config import RPNConfig
from rpn_jax.inference.sliding import SlidingWindow
from rpn_jax.models import kernels
from rpn_jax.models.clip import CLIPConfig
from rpn_jax.models.rpn import RPN

FLAGS = flags.FLAGS
flags.DEFINE_enum("network", "rpn", ("rpn", "stand_in"), "Source of the logits")
flags.DEFINE_integer("window_batch", 1, "Windows per call of the network")

CLASSES = 847
IMAGE = (512, 2048)
SIZES = ((512, 2048), (1024, 4096), (375, 1500))


def stand_in(windows):
  return np.random.default_rng(0).normal(size=(len(windows), 32, 32, CLASSES)).astype(np.float32)


def rpn():
  """RPN with initial prompts and random text embeddings, as a function of windows."""
  device_kernels = kernels.for_platform(jax.local_devices()[0].platform)
  model = RPN(CLIPConfig(), RPNConfig(), kernels=device_kernels)
  text = np.random.default_rng(0).normal(size=(CLASSES, 512)).astype(np.float32)
  text /= np.linalg.norm(text, axis=-1, keepdims=True)
  small = np.zeros((1, 32, 32, 3), np.float32)
  variables = jax.jit(model.init)(jax.random.key(0), small, text[:2])
  forward = jax.jit(lambda variables, image: model.apply(variables, image, text))
  return lambda windows: forward(variables, windows)


def peak() -> float:
  """Peak memory of this process so far, GB."""
  unit = 1 if sys.platform == "darwin" else 1024
  return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9


def main(argv) -> None:
  del argv
  logging.set_verbosity(logging.WARNING)
  image = np.random.default_rng(1).normal(size=(*IMAGE, 3)).astype(np.float32)
  network = rpn() if FLAGS.network == "rpn" else stand_in
  window = SlidingWindow(network, CLASSES, crop=512, stride=426, window_batch=FLAGS.window_batch)
  rows = [["before", "", "", f"{peak():.2f}"]]
  for size in SIZES:
    seconds = []
    for _ in range(2):  # the first one includes compilation
      began = time.perf_counter()
      window(image, size)
      seconds.append(f"{time.perf_counter() - began:.1f}")
    rows.append([f"{size[0]} x {size[1]}", *seconds, f"{peak():.2f}"])
  print(table(rows, ["result, pixels", "first, s", "second, s", "peak memory, GB"], markdown=True))


if __name__ == "__main__":
  app.run(main)
