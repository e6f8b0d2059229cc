"""From a config to data: the one place where a data set's name is looked up."""

import dataclasses
import difflib
import functools
import pathlib
from collections.abc import Callable, Iterator

import grain
import numpy as np
from PIL import Image, ImageOps

from data_pipelines import pipeline, shapes, transforms
from data_pipelines.errors import DataError

# Larger pictures are refused: decoded they would fill memory (Pillow's own limit only warns).
MAX_PIXELS = 200_000_000


@dataclasses.dataclass(frozen=True)
class SegmentationData:
  """A segmentation data set as a training run sees it.

  Attributes:
    names: C class names; labels index them.
    seen: ids of the classes trained on.
    unseen: ids of the classes only evaluated on.
    train_batches: start step -> endless batches {image f32[B,H,W,3], label i32[B,H,W]}; labels
      are positions in `seen`, or 255.
    eval_examples: () -> sized iterable of {image f32[h,w,3], label i32[H,W], id}; labels are
      class ids, or 255.
  """

  names: tuple[str, ...]
  seen: tuple[int, ...]
  unseen: tuple[int, ...]
  train_batches: Callable[[int], Iterator[dict]]
  eval_examples: Callable[[], pipeline.EvalExamples]


def load(config) -> SegmentationData:
  """Prepares (if needed) and opens the data set of `config.data`.

  Raises:
    DataError: an unknown name or setting, or bad data.
  """
  c = config.data
  _known("config.data.name", c.name, ("shapes",))
  _known("config.data.setting", c.setting, ("zero_shot", "supervised"))
  names, unseen = shapes.CLASSES, tuple(shapes.UNSEEN)
  if c.setting == "supervised":
    unseen = ()
  seen = tuple(i for i in range(len(names)) if i not in unseen)
  world = shapes.ShapesConfig(num_train=c.train_images, num_val=c.eval_images)
  shapes.prepare(c.data_dir, world)

  train_transform = transforms.train_transform(
    transforms.LabelMap.seen(seen, len(names)),
    crop=c.crop,
    scale=c.scale,
    ratio=c.ratio,
    photometric=c.photometric,
    mean=c.mean,
    std=c.std,
  )
  eval_transform = transforms.eval_transform(
    c.short_side, transforms.LabelMap.identity(len(names)), mean=c.mean, std=c.std
  )

  def train_batches(start_step: int) -> Iterator[dict]:
    return pipeline.train_batches(
      shapes.source(c.data_dir, "train", world),
      train_transform,
      batch_size=c.batch_size,
      seed=config.seed,
      start_step=start_step,
      num_threads=c.threads,
      workers=c.workers,
    )

  # Opened once: every evaluation of a run reads the same examples.
  examples = functools.cache(
    lambda: pipeline.eval_examples(shapes.source(c.data_dir, "val", world), eval_transform)
  )
  return SegmentationData(tuple(names), seen, unseen, train_batches, examples)


def captions(config) -> dict:
  """Image-caption batches and the zero-shot test of the embedded world, for pre-training."""
  source = shapes.CaptionedShapes(config.seed, config.steps * config.batch_size)

  def batches() -> Iterator[dict]:
    stream = grain.MapDataset.source(source).batch(config.batch_size, drop_remainder=True)
    return iter(stream.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)))

  # Another seed than the training pictures'.
  images, labels = shapes.single_object_images(config.test_images, seed=config.seed + 1)
  return {
    "batches": batches,
    "test_images": images,
    "test_labels": labels,
    "test_names": shapes.OBJECTS,
  }


def image_loader(config) -> Callable[[pathlib.Path], dict]:
  """A function path -> {image f32[h,w,3] for the network, original uint8 [H,W,3], id}."""
  transform = transforms.eval_transform(
    config.data.short_side, mean=config.data.mean, std=config.data.std
  )

  def load_image(path: pathlib.Path) -> dict:
    original = read_image(path)
    image = transform({"image": original, "id": path.name})["image"]
    return {"image": image, "original": original, "id": path.name}

  return load_image


def read_image(path: pathlib.Path) -> np.ndarray:
  """A picture file as uint8 RGB [H,W,3], turned upright as its EXIF data says.

  Raises:
    DataError: not a picture, damaged, or larger than MAX_PIXELS.
  """
  try:
    with Image.open(path) as file:
      width, height = file.size
      if width * height > MAX_PIXELS:
        raise DataError(
          f"{path}: expected at most {MAX_PIXELS:,} pixels, got {width} x {height}; "
          "make the picture smaller"
        )
      return np.array(ImageOps.exif_transpose(file).convert("RGB"))
  except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
    if isinstance(error, DataError):
      raise
    raise DataError(
      f"{path}: expected a readable jpg, png or webp picture, got {type(error).__name__} "
      f"({' '.join(str(error).split())}); open it in a viewer to see whether it is damaged"
    ) from error


def _known(field: str, value: str, known: tuple[str, ...]) -> None:
  if value not in known:
    near = difflib.get_close_matches(value, known, 1, 0.0)[0]
    raise DataError(f"{field}={value!r} is not known; did you mean {near!r}? Known: {known}")
