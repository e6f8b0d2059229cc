"""Unrolled layers of a tower, as the models have them, against a scan over stacked weights.

    python -m benchmarks.scan

Both compute the gradient with respect to the tokens of two 512 x 512 images through the twelve
blocks of ViT-B/16, with and without rematerialization of the blocks.
"""

import jax
import jax.numpy as jnp
from absl import app, flags

from rpn_jax import devices
from rpn_jax.analysis import costs
from rpn_jax.base.console import progress, table
from rpn_jax.models import kernels
from rpn_jax.models.block import Block

FLAGS = flags.FLAGS
flags.DEFINE_float("seconds", 15.0, "Seconds of timed calls for each row, at least two calls")

TOKENS = 1 + (512 // 16) ** 2


def main(argv) -> None:
  del argv
  devices.configure_cpu()
  clip = costs.BACKBONES["b16"]
  tower = costs.random_towers(clip, jax.random.key(0))["visual"]
  layers = [tower[f"block_{i}"] for i in range(clip.vision_layers)]
  stacked = jax.tree.map(lambda *x: jnp.stack(x), *layers)
  device_kernels = kernels.for_platform(jax.local_devices()[0].platform)
  block = Block(clip.vision_width, clip.vision_heads, clip.activation, kernels=device_kernels)
  x = jax.random.normal(jax.random.key(1), (2, TOKENS, clip.vision_width))
  apply = lambda x, params: block.apply({"params": params}, x)

  def gradient(kind, remat):
    one = jax.checkpoint(apply) if remat == "full" else apply

    def loss(x, params):
      if kind == "scan":
        x, _ = jax.lax.scan(lambda x, p: (one(x, p), None), x, params)
      else:
        for p in params:
          x = one(x, p)
      return (x**2).mean()

    return jax.jit(jax.grad(loss), compiler_options=devices.compiler_options(devices.data_mesh()))

  rows = []
  cases = [(kind, remat) for remat in ("none", "full") for kind in ("unrolled", "scan")]
  for kind, remat in progress(cases, "bench", "case"):
    params = jax.device_put(stacked if kind == "scan" else layers)
    got = costs.measure(gradient(kind, remat), x, params, timed=FLAGS.seconds)
    rows.append([
      kind, remat, f"{got['seconds']:.2f}", f"{got['temporary_bytes'] / 2**20:,.0f}",
      f"{got['seconds_to_compile']:.1f}",
    ])  # fmt: skip
  print(table(rows, ["layers", "remat", "seconds", "temporary MiB", "compile s"], markdown=True))


if __name__ == "__main__":
  app.run(main)
