"""Speed of the training pipeline of VOC, in total and by stage.

    make bench-data     or: python -m benchmarks.data --images=400

Generates 500 x 375 JPEGs with the file size of VOC's (about 85 kB each), prepares them as VOC, and
prints three tables: images per second of the whole pipeline (512 x 512 crops, batches of 16) by
number of reader processes; CPU time per image by stage; and CPU time of the two image libraries for
the stages that could use either. CPU time hardly depends on the load of the machine.
"""

import io
import os
import pathlib
import platform
import tempfile
import time

import cv2
import numpy as np
import PIL
from absl import app, flags, logging
from PIL import Image

from data_pipelines import pipeline, prepare, recipes, records, transforms, vocabularies
from rpn_jax.base.console import progress, table

FLAGS = flags.FLAGS
flags.DEFINE_integer("images", 400, "Images of the generated set")
flags.DEFINE_integer("batches", 20, "Batches of 16 timed per row, after two that are not")
flags.DEFINE_list("workers", ["0", "1", "2"], "Reader processes to compare")

BATCH = 16
HEIGHT, WIDTH = 375, 500
# Images per second that an accelerator consumes at 512 x 512, and CPU cores of its host.
REQUIRED_RATE, CORES = 750, 16


def make_image(rng) -> Image.Image:
  """A coarse color pattern with fine noise, which compresses to about the size of a photo."""
  coarse = cv2.resize(rng.integers(0, 256, (12, 16, 3), np.uint8), (WIDTH, HEIGHT))
  grain = cv2.resize(rng.normal(0, 22, (HEIGHT // 2, WIDTH // 2)), (WIDTH, HEIGHT))
  return Image.fromarray(np.clip(coarse + grain[..., None], 0, 255).astype(np.uint8))


def make_raw(root: pathlib.Path, images: int) -> None:
  """Writes a raw VOC tree with `images` training images and one for evaluation."""
  voc = root / "VOCdevkit/VOC2012"
  for folder in ("JPEGImages", "SegmentationClass", "SegmentationClassAug"):
    (voc / folder).mkdir(parents=True)
  (voc / "ImageSets/Segmentation").mkdir(parents=True)
  names = [f"2007_{i:06d}" for i in range(images + 1)]
  for i, name in enumerate(progress(names, "make", "image")):
    rng = np.random.default_rng(i)
    make_image(rng).save(voc / f"JPEGImages/{name}.jpg", quality=95)
    label = cv2.resize(
      rng.integers(0, 21, (4, 5), np.uint8), (WIDTH, HEIGHT), interpolation=cv2.INTER_NEAREST
    )
    for folder in ("SegmentationClass", "SegmentationClassAug"):
      Image.fromarray(label).save(voc / folder / f"{name}.png")
  lists = {"train": names[:-1], "trainaug": names[:-1], "val": names[-1:]}
  for split, listed in lists.items():
    (voc / f"ImageSets/Segmentation/{split}.txt").write_text("\n".join(listed) + "\n")


def label_map() -> transforms.LabelMap:
  vocabulary = vocabularies.load("voc20")
  raw = transforms.LabelMap.from_ids(vocabulary.ids, unlisted=vocabulary.unlisted)
  return raw.then(transforms.LabelMap.seen(vocabulary.seen, 20))


def throughput(source, workers: int) -> float:
  """Images per second."""
  batches = pipeline.train_batches(
    source,
    recipes.train_transform(label_map()),
    batch_size=BATCH,
    seed=0,
    num_threads=4,
    workers=workers,
  )
  for _ in range(2):
    next(batches)
  began = time.perf_counter()
  for _ in range(FLAGS.batches):
    next(batches)
  seconds = time.perf_counter() - began
  if workers:
    batches.close()
  return FLAGS.batches * BATCH / seconds


def stages(source) -> dict[str, float]:
  """CPU milliseconds per image of every stage, in order."""
  spent: dict[str, float] = {}

  def timed(name, function, *args):
    began = time.process_time()
    result = function(*args)
    spent[name] = spent.get(name, 0.0) + time.process_time() - began
    return result

  transform = recipes.train_transform(label_map())
  for i in range(len(source)):
    rng = np.random.default_rng(i)
    example = timed("read the record", source.__getitem__, i)
    example = timed("decode", pipeline.check_example, example)
    for step in transform.transforms:
      example = timed(type(step).__name__, step, example, rng)
  return {name: 1000 * seconds / len(source) for name, seconds in spent.items()}


def libraries(source) -> list[list]:
  """Table rows: stage, OpenCV ms, Pillow ms."""
  data = source[0]["image"]
  image = np.array(Image.open(io.BytesIO(data)))
  size = (683, 512)
  encoded = np.frombuffer(data, np.uint8)
  pairs = {
    "decode a JPEG": (
      lambda: cv2.cvtColor(cv2.imdecode(encoded, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB),
      lambda: np.array(Image.open(io.BytesIO(data)).convert("RGB")),
    ),
    "resize an image to 683 x 512": (
      lambda: cv2.resize(image, size),
      lambda: np.array(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR)),
    ),
    "RGB to HSV and back": (
      lambda: cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2HSV), cv2.COLOR_HSV2RGB),
      lambda: np.array(Image.fromarray(image).convert("HSV").convert("RGB")),
    ),
  }

  def milliseconds(function) -> float:
    function()
    began = time.process_time()
    for _ in range(100):
      function()
    return 10 * (time.process_time() - began)

  return [[name, *(f"{milliseconds(f):.2f}" for f in both)] for name, both in pairs.items()]


def main(argv) -> None:
  del argv
  logging.set_verbosity(logging.WARNING)
  cv2.setNumThreads(1)  # the pipeline's parallelism is over images
  with tempfile.TemporaryDirectory() as folder:
    raw, data_dir = pathlib.Path(folder, "raw"), pathlib.Path(folder, "data")
    make_raw(raw, FLAGS.images)
    prepare.prepare("voc", raw, data_dir, allow_partial=True)
    source = records.source("voc", data_dir, "train")
    size = np.mean([len(source[i]["image"]) for i in range(len(source))]) / 1000
    rates = [[w, f"{throughput(source, int(w)):.0f}"] for w in FLAGS.workers]
    spent = stages(source)
    compared = libraries(source)
  total = sum(spent.values())
  shares = [[name, f"{ms:.2f}", f"{100 * ms / total:.0f} %"] for name, ms in spent.items()]
  print(table(rates, ["reader processes", "images/s"], markdown=True))
  print()
  print(table([*shares, ["all", f"{total:.2f}", ""]], ["stage", "CPU ms", "share"], markdown=True))
  print()
  print(table(compared, ["stage", "OpenCV ms", "Pillow ms"], markdown=True))
  per_core = 1000 / total
  print(
    f"\n{per_core:.0f} images/s per core; {CORES} cores: {CORES * per_core:.0f} of the "
    f"{REQUIRED_RATE} that an accelerator consumes. JPEGs of {size:.0f} kB. {platform.machine()}, "
    f"{os.cpu_count()} cores, OpenCV {cv2.__version__}, Pillow {PIL.__version__}, "
    f"Python {platform.python_version()}."
  )


if __name__ == "__main__":
  app.run(main)
