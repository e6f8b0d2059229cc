"""A folder of images beside the network alone: images per second, CPU seconds, memory.

    python -m benchmarks.folder --images=100,500,1000
    python -m benchmarks.folder --images=24 --model=random_b16

Draws images of 640 x 480 as JPEG files. The network alone is given decoded images and gives labels
at their size, in the same batches, and neither reads nor writes; the folder is what `rpn segment
FOLDER` does, with overlay, labels and JSON of every image. Both run in turn in one process, by
halves: network, folder, folder, network.
"""

import pathlib
import resource
import tempfile
import time

import cv2
import jax
import numpy as np
from absl import app, flags, logging

from data_pipelines import shapes
from rpn_jax import Segmenter, devices
from rpn_jax.base import console, pictures
from rpn_jax.base.console import progress, table
from rpn_jax.base.picture_files import Found
from rpn_jax.models.clip import CLIP, CLIPConfig
from rpn_jax.tasks.predict import save_all
from rpn_jax.weights import clip_file

FLAGS = flags.FLAGS
flags.DEFINE_list("images", ["100", "500", "1000"], "Numbers of images, in this order")
flags.DEFINE_string("model", "shapes", "What Segmenter.load takes; random_b16: ViT-B/16, random")
flags.DEFINE_integer("words", 6, "Number of classes")
flags.DEFINE_string("folder", "", "Where images are kept for another call; empty: nowhere")

HEIGHT, WIDTH, QUALITY = 480, 640, 90
DISTINCT = 16  # images that the network alone is given, again and again


def draw(folder: pathlib.Path, count: int) -> list[pathlib.Path]:
  """The first `count` images of a folder, drawn where they are missing."""
  folder.mkdir(parents=True, exist_ok=True)
  files = [folder / f"{i:05}.jpg" for i in range(count)]
  for i, file in enumerate(progress(files, "draw", "image")):
    if not file.exists():
      image, _ = shapes.draw_scene(np.random.default_rng(i), HEIGHT, WIDTH, (2, 5))
      cv2.imwrite(str(file), image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, QUALITY])
  return files


def random_b16(folder: pathlib.Path) -> pathlib.Path:
  path = folder / "random_b16.safetensors"
  config = CLIPConfig()
  size = config.image_size
  image, tokens = np.zeros((1, size, size, 3)), np.zeros((1, 77), np.int32)
  params = jax.device_get(jax.jit(CLIP(config).init)(jax.random.key(0), image, tokens)["params"])
  clip_file.save(path, config, params)
  return path


def cpu_seconds() -> float:
  used = resource.getrusage(resource.RUSAGE_SELF)
  return used.ru_utime + used.ru_stime


def timed(action, *arguments) -> np.ndarray:
  """Wall and CPU seconds of all threads."""
  wall, cpu = time.perf_counter(), cpu_seconds()
  action(*arguments)
  return np.array([time.perf_counter() - wall, cpu_seconds() - cpu])


def main(argv) -> None:
  del argv
  logging.set_verbosity(logging.WARNING)
  rows = []
  with tempfile.TemporaryDirectory() as temporary, devices.runtime():
    out = pathlib.Path(temporary, "out")
    files = draw(pathlib.Path(FLAGS.folder or temporary, "images"), max(map(int, FLAGS.images)))
    model = FLAGS.model
    if model == "random_b16":
      model = random_b16(pathlib.Path(temporary))
    segmenter, names = Segmenter.load(model, templates="single"), shapes.CLASSES[: FLAGS.words]
    images = [pictures.read(file) for file in files[:DISTINCT]]

    def network(count: int) -> None:
      for result in segmenter.stream((images[i % len(images)] for i in range(count)), names):
        _ = result.labels

    def folder(part: list[pathlib.Path]) -> None:
      save_all(segmenter, Found(part[0].parent, part, []), names, out)

    network(8)  # compiles
    console.silence()
    folder(files[:8])
    for count in map(int, FLAGS.images):
      first, second = files[: count // 2], files[count // 2 : count]
      alone = timed(network, len(first))
      whole = timed(folder, first) + timed(folder, second)
      alone += timed(network, len(second))
      peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
      rates = [f"{count / seconds[0]:.3g}" for seconds in (alone, whole)]
      cpu = [f"{1e3 * seconds[1] / count:.0f}" for seconds in (alone, whole)]
      rows.append([count, *rates, f"{alone[0] / whole[0]:.2f}", *cpu, f"{peak:.0f}"])
  heads = [
    "images", "network alone, images/s", "folder, images/s", "ratio",
    "network alone, CPU ms per image", "folder, CPU ms per image", "peak MB so far",
  ]  # fmt: skip
  with open("/dev/stdout", "w") as terminal:  # console.silence() has turned off the other one
    print(table(rows, heads, markdown=True), file=terminal)


if __name__ == "__main__":
  app.run(main)
