"""What bfloat16 changes of segmentations: every method on scenes of the shapes data set.

    python -m benchmarks.precision --scenes=60

Each scene is segmented in float32 and in bfloat16. Of all pixels: how many get another class, and
how many have their own in each type; and the largest difference of a score.
"""

import numpy as np
from absl import app, flags

from configs import shapes as configs
from data_pipelines import shapes
from rpn_jax import Segmenter, devices
from rpn_jax.base.console import progress, table
from rpn_jax.models.training_free import METHODS

FLAGS = flags.FLAGS
flags.DEFINE_integer("scenes", 60, "Of the 120 evaluation scenes")
flags.DEFINE_list("methods", ["rpn", *METHODS], "rpn: the shipped prompts; others: CLIP alone")


def segmenter(method: str, dtype: str) -> Segmenter:
  if method == "rpn":
    return Segmenter.load("shapes", dtype=dtype)
  return Segmenter.load("shapes_clip", method=method, dtype=dtype)


def row(method: str, scenes: list[dict]) -> list[str]:
  exact, half = (segmenter(method, dtype) for dtype in ("float32", "bfloat16"))
  changed, right, other_right, largest, pixels = 0, 0, 0, 0.0, 0
  for scene in scenes:
    a, b = (s(scene["image"], shapes.CLASSES) for s in (exact, half))
    label = scene["label"]
    changed += (a.labels != b.labels).sum()
    right += (a.labels == label).sum()
    other_right += (b.labels == label).sum()
    largest = max(largest, float(np.abs(a.scores - b.scores).max()))
    pixels += label.size
  share = lambda count: f"{100 * count / pixels:.2f}"
  return [method, share(changed), share(right), share(other_right), f"{largest:.3f}"]


def main(argv) -> None:
  del argv
  devices.configure_cpu()
  source = shapes.open_shapes(configs.get_config().data, "val")
  scenes = [source[i] for i in range(FLAGS.scenes)]
  rows = [row(method, scenes) for method in progress(FLAGS.methods, "precision", "method")]
  columns = [
    "method", "% of pixels that change", "% right, float32", "bfloat16", "largest difference"
  ]  # fmt: skip
  print(table(rows, columns, markdown=True))


if __name__ == "__main__":
  app.run(main)
