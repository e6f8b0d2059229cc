"""PASCAL Context with 59 classes and a background (Mottaghi et al., 2014)."""

import functools
import json
import pathlib
import re

import numpy as np

from data_pipelines import vocabularies
from data_pipelines.sources.builder import RawExample, SegmentationBuilder
from data_pipelines.sources.coco_masks import count_empty, read_mask
from data_pipelines.sources.files import read_index_image, require
from data_pipelines.sources.pascal import read_names
from rpn_jax.base.errors import InputError
from rpn_jax.base.pictures import check_size

# All that is read of trainval_merged.json; its parts, boundaries and occlusions are far larger.
_KEPT = {"images", "image_id", "file_name", "phase", "height", "width"}
_KEPT |= {"annos_segmentation", "category_id", "segmentation", "size", "counts"}


class Context(SegmentationBuilder):
  """PASCAL Context in the numbering of its 459 categories, of which 59 occur; 0 is the background.

  From the annotations of PASCAL in Detail or, without them, from the label images
  that mmsegmentation's converter makes of them: 0 the background, k class k − 1 of the 59.
  """

  name = "context"
  title = "PASCAL Context"
  vocabulary = "context60"
  # PASCAL in Detail has 10,100 of the paper's 10,103 images.
  counts = {"train": 4996, "val": 5104}  # noqa: RUF012
  obtain = (
    "VOCtrainval_03-May-2010.tar is on the page 'Visual Object Classes Challenge 2010 (VOC2010)', "
    "trainval_merged.json on 'PASCAL in Detail Challenge'"
  )
  license = "images: Flickr terms of use; annotations: research use, no license stated"
  raw_size = "2 GB"
  layout = """VOCdevkit/VOC2010/JPEGImages/*.jpg
VOCdevkit/VOC2010/trainval_merged.json
or, in place of the .json file, as converted by others:
VOCdevkit/VOC2010/SegmentationClassContext/*.png
VOCdevkit/VOC2010/ImageSets/SegmentationContext/{train,val}.txt"""
  wide = True

  def examples(self, manual_dir):
    root = manual_dir / "VOCdevkit" / "VOC2010"
    images = require(root / "JPEGImages", "the images of VOC 2010", self.obtain)
    annotations, converted = root / "trainval_merged.json", root / "SegmentationClassContext"
    if annotations.exists():
      return self._from_annotations(annotations, images)
    if not converted.is_dir():
      raise InputError(
        f"{annotations}: expected the labels of PASCAL Context, got neither this file nor "
        f"{converted}; {self.obtain}"
      )
    splits = {}
    for split in self.counts:
      names = root / "ImageSets" / "SegmentationContext" / f"{split}.txt"
      splits[split] = [
        RawExample(
          name,
          images / f"{name}.jpg",
          converted / f"{name}.png",
          functools.partial(_read_converted, converted / f"{name}.png"),
        )
        for name in read_names(names, f"the {split} list of PASCAL Context", self.obtain)
      ]
    return splits

  def _from_annotations(self, path: pathlib.Path, images: pathlib.Path):
    try:
      with path.open(encoding="utf-8") as file:
        data = json.load(file, object_hook=_kept)
      found = {image["image_id"]: [] for image in data["images"]}
      for annotation in data["annos_segmentation"]:
        found[annotation["image_id"]].append(annotation)
      splits = {split: [] for split in self.counts}
      empty = {}
      for image in sorted(data["images"], key=lambda image: image["file_name"]):
        if image["phase"] not in splits:  # test images carry no segmentation
          continue
        if re.search(r"[/\\\0]", image["file_name"]):
          raise ValueError(f"the path {image['file_name'][:60]!r}")
        file = images / image["file_name"]
        shape = int(image["height"]), int(image["width"])
        annotations = found[image["image_id"]]
        if count := sum(count_empty(annotation["segmentation"]) for annotation in annotations):
          empty[file.stem] = count
        paint = functools.partial(_paint, path, file.stem, annotations, shape)
        splits[image["phase"]].append(RawExample(file.stem, file, path, paint))
    except (OSError, ArithmeticError, LookupError, RecursionError, ValueError, TypeError,
            AttributeError) as error:  # fmt: skip
      raise InputError(
        f"{path}: expected the annotations of PASCAL in Detail (images, annos_segmentation), got "
        f"{type(error).__name__} ({error}); fetch it again: {self.obtain}"
      ) from error
    if empty:
      print(
        f"{path}: left out polygons of fewer than three points, which have no area: "
        f"{sum(empty.values()):,} in {len(empty):,} images, such as {next(iter(empty))}"
      )
    return splits


def _kept(item: dict) -> dict:
  return {key: value for key, value in item.items() if key in _KEPT}


def _paint(path: pathlib.Path, name: str, annotations: list, shape: tuple[int, int]) -> np.ndarray:
  """uint16 [H,W]: the image's masks in file order, later ones over earlier ones."""
  check_size(f"{path}, {name}", shape[::-1])
  label = np.zeros(shape, np.uint16)
  try:
    for annotation in annotations:
      category = annotation["category_id"]
      if not isinstance(category, int):
        raise TypeError(f"the category {category!r}")
      label[read_mask(annotation["segmentation"], shape)] = category
  except Exception as error:  # pycocotools raises any kind, Exception itself among them
    raise InputError(
      f"{path}: expected masks of {name} as RLE or polygons on {shape[1]}x{shape[0]} pixels, got "
      f"{type(error).__name__} ({error}); fetch the file again"
    ) from error
  return label


def _read_converted(path: pathlib.Path) -> np.ndarray:
  """uint16 [H,W] in the numbering of the 459 categories, of a label image with values 0…59."""
  label = read_index_image(path)
  if label.max(initial=0) > 59:
    raise InputError(
      f"{path}: expected 0 (background) to 59, got {label.max()}; convert trainval_merged.json anew"
    )
  ids = vocabularies.load(Context.vocabulary).ids
  raw = np.zeros(60, np.uint16)
  raw[list(ids.values())] = list(ids)
  return raw[label]
