"""ADE20K with all its object names, of which the benchmark counts 847 (Zhou et al., 2019)."""

import functools
import pathlib

import cv2
import numpy as np
import tensorflow_datasets as tfds

from data_pipelines.sources.builder import RawExample, SegmentationBuilder
from data_pipelines.sources.files import open_label, require
from rpn_jax.base.errors import InputError
from rpn_jax.base.picture_files import list_images

_SPLITS = {"train": "training", "val": "validation"}
_SHORT_SIDE = 512
SHORT512, NATIVE = (
  tfds.core.BuilderConfig(name="short512", description="larger images reduced, as benchmarked"),
  tfds.core.BuilderConfig(name="native", description="every image in its own size"),
)


class Ade847(SegmentationBuilder):
  """ADE20K_2021_17_01: the label is the object id, 0 for pixels without an object."""

  name = "ade847"
  BUILDER_CONFIGS = [SHORT512, NATIVE]  # noqa: RUF012 (a list is what TFDS asks for)
  title = "ADE20K-847"
  # As the README of the data set's repository states them.
  counts = {"train": 25574, "val": 2000}  # noqa: RUF012
  obtain = "ADE20K_2021_17_01.zip is sent after registering on the page 'ADE20K dataset'"
  license = "images: non-commercial research; annotations: BSD-3"
  raw_size = "5 GB or more"
  layout = """ADE20K_2021_17_01/images/ADE/{training,validation}/**/*.jpg
ADE20K_2021_17_01/images/ADE/{training,validation}/**/*_seg.png"""
  wide = True

  def examples(self, manual_dir):
    root = manual_dir / "ADE20K_2021_17_01" / "images" / "ADE"
    splits = {}
    for split, folder in _SPLITS.items():
      here = require(root / folder, f"the {folder} images", self.obtain)
      # By name: the folders in between are kinds of scenes.
      images = sorted(
        list_images(here, suffixes=(".jpg",), recursive=True), key=lambda path: path.name
      )
      if not images:
        raise InputError(
          f"{here}: expected .jpg files in folders of scenes, got none; {self.obtain}"
        )
      splits[split] = [_example(path) for path in images]
    return splits

  def adjust(self, image, label):
    # The published conversion (prepare_ade20k_full_sem_seg.py of MaskFormer, which later work
    # shares) reduces images larger than 512 on both sides to a short side of 512 by OpenCV, the
    # image bilinearly without antialiasing and the label to the nearest pixel. So does this. It
    # then saves a JPEG of quality 75; here the reduced image is kept without loss.
    height, width = label.shape
    short = min(height, width)
    if self.builder_config is NATIVE or short <= _SHORT_SIDE:
      return None
    size = tuple(round(side / short * _SHORT_SIDE) for side in (width, height))
    reduced = cv2.resize(image, size, interpolation=cv2.INTER_LINEAR)
    return reduced, cv2.resize(label, size, interpolation=cv2.INTER_NEAREST)


def _example(image: pathlib.Path) -> RawExample:
  label = image.with_name(f"{image.stem}_seg.png")
  return RawExample(image.stem, image, label, functools.partial(_read_objects, label))


def _read_objects(path: pathlib.Path) -> np.ndarray:
  """Object ids, uint16 [H,W]: red holds the high byte in tens, green the low byte."""
  with open_label(path) as file:
    if file.mode != "RGB":
      raise InputError(
        f"{path}: expected object ids in the colors of an RGB image, got mode {file.mode}; "
        "fetch the file again"
      )
    red, green, _ = np.moveaxis(np.asarray(file, np.uint16), -1, 0)
  return red // 10 * 256 + green
