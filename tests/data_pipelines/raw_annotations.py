"""Small data sets as annotation tools export them, written by the documentation of each form.

COCO's as pycocotools reads it; labelme's as its versions 3, 5.1 and 5.5 save it; YOLO's by
ultralytics' page on segmentation data; VOC's as CVAT ("Segmentation mask 1.1") and labelme2voc do.
"""

import base64
import io
import json

import numpy as np
from PIL import Image

from tests.data_pipelines.raw_pascal import gray_png, jpeg, palette_png, rle

SHAPE = 20, 30  # height, width of all images
NO = 255


def box(left, top, right, bottom, shape=SHAPE):
  """bool [H,W]: the pixels of a box, its right and lower edges excluded."""
  mask = np.zeros(shape, bool)
  mask[top:bottom, left:right] = True
  return mask


def corners(left, top, right, bottom):
  """The same as corners x, y, x, y, … in pixels."""
  return [left, top, right, top, right, bottom, left, bottom]


def painted(*layers, rest=NO, shape=SHAPE):
  """uint16 [H,W] of (mask, label), later ones over earlier ones."""
  label = np.full(shape, rest, np.uint16)
  for mask, value in layers:
    label[mask] = value
  return label


def write_json(path, content):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
  return path


def picture(path, orientation=None, shape=SHAPE):
  jpeg(path, *shape, "RGB", orientation)
  return path


def labels_of(builder, raw):
  """Split -> id -> label, of all examples, each read with its image."""
  splits = builder.examples(raw)
  return {s: {e.id: builder.read(e)["label"] for e in found} for s, found in splits.items()}


# COCO


def coco(images, annotations, categories=((1, "cat"), (7, "dog"))):
  """The content of a file; images are id -> file name, annotations dictionaries without ids."""
  height, width = SHAPE
  return {
    "info": {},
    "licenses": [],
    "images": [
      {"id": i, "file_name": name, "height": height, "width": width} for i, name in images.items()
    ],
    "annotations": [
      {"id": i, "iscrowd": 0, "area": 1, **annotation} for i, annotation in enumerate(annotations)
    ],
    "categories": [{"id": i, "name": name, "supercategory": ""} for i, name in categories],
  }


def of_image(image, category, segmentation, **more):
  return {"image_id": image, "category_id": category, "segmentation": segmentation, **more}


def coco_tree(root):
  """COCO's own layout with every kind of segmentation; returns the labels."""
  big, small, other = (2, 2, 22, 18), (5, 5, 10, 10), (12, 4, 28, 12)
  pictures = {1: "a.jpg", 2: "sub/b.jpg", 3: "empty.jpg"}
  for name in pictures.values():
    picture(root / "train2017" / name)
  picture(root / "val2017" / "a.jpg")  # of the same name as one for training
  train = [
    of_image(1, 7, [corners(*small)]),  # listed before what is around it
    of_image(1, 1, [corners(*big)], bbox=[2, 2, 20, 16]),
    of_image(1, 7, rle(box(*other), compressed=True)),
    of_image(2, 1, rle(box(*big), compressed=False), iscrowd=1),
    of_image(2, 7, [corners(-3, -2, 4, 5), corners(25, 15, 40, 40)]),  # over the edges
    of_image(2, 7, [corners(30, 0, 40, 5)]),  # outside
    of_image(2, 7, [], bbox=[0, 18, 30, 2]),  # a box only
    of_image(2, 7, [[1, 2, 3, 4]]),  # no area
  ]
  write_json(root / "annotations/instances_train2017.json", coco(pictures, train))
  val = coco({9: "a.jpg"}, [of_image(9, 1, [corners(*small)])], ((1, "cat"), (3, "bird")))
  write_json(root / "annotations/instances_val2017.json", val)
  write_json(root / "annotations/captions_val2017.json", {"images": [], "annotations": []})
  ends = box(0, 0, 4, 5) | box(25, 15, 30, 20)
  return {
    "train": {
      "a.jpg": painted((box(*big), 0), (box(*other), 1), (box(*small), 1)),
      "sub/b.jpg": painted((box(*big), 0), (ends, 1)),
      "empty.jpg": painted(),
    },
    "val": {"a.jpg": painted((box(*small), 0))},
  }


# labelme


def png_text(array):
  file = io.BytesIO()
  Image.fromarray(array).save(file, "PNG")
  return base64.b64encode(file.getvalue()).decode()


def shape(label, kind, points, **more):
  """A shape as version 5.5 saves it."""
  return {"label": label, "points": points, "group_id": None, "description": "",
          "shape_type": kind, "flags": {}, "mask": None, **more}  # fmt: skip


def labelme(path, shapes, image="a.jpg", version="5.5.0", **more):
  content = {"version": version, "flags": {}, "shapes": shapes, "imagePath": image,
             "imageData": None, "imageHeight": SHAPE[0], "imageWidth": SHAPE[1]}  # fmt: skip
  return write_json(path, content | more)


def points(left, top, right, bottom):
  return np.reshape(corners(left, top, right, bottom), (-1, 2)).tolist()


# YOLO


def yolo_line(index, *pixels, shape=SHAPE):
  shares = np.reshape(pixels, (-1, 2)) / shape[::-1]
  return " ".join([str(index), *(f"{value:.6f}" for value in shares.ravel())])


def text(path, *lines):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
  return path


def yolo_tree(root, yaml, images="images/{split}"):
  """Two images in each split, one of them with objects; returns the labels."""
  for split in ("train", "val"):
    folder = root / images.format(split=split)
    labels = root / images.format(split=split).replace("images", "labels")
    for name in ("a.jpg", "b.jpg"):
      picture(folder / name)
    text(labels / "a.txt", yolo_line(1, *corners(5, 5, 10, 10)),
         yolo_line(0, *corners(2, 2, 22, 18)), "")  # fmt: skip
    text(labels / "b.txt")
  text(root / "data.yaml", *yaml.splitlines())
  label = painted((box(2, 2, 22, 18), 0), (box(5, 5, 10, 10), 1))
  return {
    split: {
      f"{images.format(split=split)}/a.jpg": label,
      f"{images.format(split=split)}/b.jpg": painted(),
    }
    for split in ("train", "val")
  }


# VOC


INDEX = painted((box(2, 2, 22, 18), 1), (box(5, 5, 10, 10), 2), (box(0, 0, 1, 20), NO), rest=0)


def rgb_png(path, colors, index=INDEX):
  """A mask of colors: index -> (red, green, blue)."""
  table = np.zeros((256, 3), np.uint8)
  for value, color in colors.items():
    table[value] = color
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.fromarray(table[index]).save(path)
  return path


def voc_tree(root, class_lines=("_background_", "cat", "dog"), class_file="class_names.txt",
             colors=None, masks="SegmentationClass"):  # fmt: skip
  """Lists of train and val; masks of VOC's palette, or of RGB colors."""
  for split, names in (("train", ("a", "sub/b")), ("val", ("c",))):
    text(root / f"ImageSets/Segmentation/{split}.txt", *names)
    for name in names:
      picture(root / f"JPEGImages/{name}.jpg")
      path = root / masks / f"{name}.png"
      if colors:
        rgb_png(path, colors)
      else:
        (palette_png if name == "a" else gray_png)(path, INDEX)
  text(root / "ImageSets/Segmentation/trainval.txt", "a", "sub/b", "c")
  text(root / class_file, *class_lines)
  label = np.where(INDEX == NO, NO, np.where(INDEX == 0, NO, INDEX - 1)).astype(np.uint16)
  return {"train": {"a": label, "sub/b": label}, "val": {"c": label}}


def same(found, expected):
  """Asserts that split -> name -> label is as expected, in the same order."""
  assert {s: [*x] for s, x in found.items()} == {s: [*x] for s, x in expected.items()}
  for split, labels in expected.items():
    for name, label in labels.items():
      np.testing.assert_array_equal(found[split][name], label, err_msg=name)
