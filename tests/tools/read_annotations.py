"""Reads annotations with the programs they are made for: PYTHON read_annotations.py FOLDER OUT.

It runs in the environment of `make test-consumers`, which has none of this project's packages.
FOLDER has the images, and what a `Collection` wrote. OUT becomes an archive with, for each form and
image, masks (n, H, W) and names (n,).
"""

import pathlib
import sys

import labelme.utils
import numpy as np
import supervision
from labelme._label_file import LabelFile


def by_supervision(kind: str, dataset) -> dict:
  """Masks and names of a `DetectionDataset`."""
  found = {}
  for path, _, detections in dataset:
    key = f"{kind}/{pathlib.Path(path).stem}"
    found[f"{key}/names"] = np.array([dataset.classes[i] for i in detections.class_id], "U99")
    if len(detections):
      found[f"{key}/masks"] = detections.mask
  found[f"{kind}/classes"] = np.array(dataset.classes, "U99")
  return found


def by_labelme(path: pathlib.Path) -> dict:
  """Masks and names of labelme's file, one by one, as its own converters draw them."""
  file = LabelFile(str(path))
  size = labelme.utils.img_data_to_arr(file.image_data).shape[:2]
  names = [shape["label"] for shape in file.shapes]
  draw = lambda shape: labelme.utils.shapes_to_label(size, [shape], {shape["label"]: 1})[0] > 0
  masks = [draw(shape) for shape in file.shapes]
  key = f"labelme/{path.stem}"
  return {f"{key}/names": np.array(names, "U99"), f"{key}/masks": np.array(masks)}


def main(folder: pathlib.Path, out: str) -> None:
  dataset, found = supervision.DetectionDataset, {}
  images, labels = str(folder / "yolo/images"), str(folder / "yolo/labels")
  coco = folder / "coco/annotations.json"
  found |= by_supervision("coco", dataset.from_coco(str(folder), str(coco), force_masks=True))
  yaml = str(folder / "yolo/data.yaml")
  found |= by_supervision("yolo", dataset.from_yolo(images, labels, yaml, force_masks=True))
  for path in sorted((folder / "labelme").glob("*.json")):
    found |= by_labelme(path)
  np.savez(out, **found)


if __name__ == "__main__":
  main(pathlib.Path(sys.argv[1]), sys.argv[2])
