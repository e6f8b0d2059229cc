"""Miniature raw trees of ADE20K-150, ADE20K-847, COCO-Stuff, Cityscapes and of your own folder.

Every function writes files as the real sets have them and returns what it painted: split -> name ->
label, by plain array slices.
"""

import numpy as np
from PIL import Image

from tests.data_pipelines.raw_pascal import gray_png, jpeg, palette_png


def rectangles(height, width, values, seed=0):
  """A label map of overlapping rectangles, in which every value occurs."""
  rng = np.random.default_rng(seed)
  label = np.full((height, width), values[0], np.uint16)
  for value in values[1:]:
    top, left = rng.integers(0, height), rng.integers(0, width)
    label[top : top + 1 + height // 2, left : left + 1 + width // 2] = value
  label.ravel()[: len(values)] = values
  return label


def wide_png(path, label):
  """A gray PNG of 16 bits."""
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.fromarray(label.astype(np.uint16)).save(path)


def ade150(root, train=7, val=2):
  """ADEChallengeData2016; image sizes are odd and differ, one is gray and one CMYK."""
  home = root / "ADEChallengeData2016"
  painted = {"train": {}, "val": {}}
  for split, folder, count in (("train", "training", train), ("val", "validation", val)):
    for i in range(count):
      name = f"ADE_{split}_{i + 1:08d}"
      label = rectangles(11 + 2 * i, 23 - 2 * (i % 8), [0, 1, 150, i + 2], seed=i)
      jpeg(
        home / "images" / folder / f"{name}.jpg", *label.shape, {1: "L", 2: "CMYK"}.get(i, "RGB")
      )
      gray_png(home / "annotations" / folder / f"{name}.png", label)
      painted[split][name] = label
  return painted


def object_png(path, label, seed=0):
  """Object ids as ADE20K has them: red tens of the high part, green the low byte, blue instances.

  Reds that are no multiple of ten stand for the ten below.
  """
  rng = np.random.default_rng(seed)
  red = label // 256 * 10 + rng.integers(0, 6, label.shape)
  blue = rng.integers(0, 256, label.shape)
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.fromarray(np.stack([red, label % 256, blue], -1).astype(np.uint8)).save(
    path, compress_level=1
  )


def ade847(root):
  """ADE20K_2021_17_01: images above and below 512 pixels, parts and instances beside them."""
  home = root / "ADE20K_2021_17_01" / "images" / "ADE"
  ids = [0, 255, 256, 2978, 3156]
  # path: stored height, width, mode, EXIF orientation; labels are of the stored size but for one
  images = {
    "training/urban/street/ADE_train_00000003": (600, 900, "RGB", None),
    "training/home or hotel/küche/ADE_train_00000001": (31, 600, "L", None),
    "training/urban/ADE_train_00000002": (25, 40, "RGB", 6),
    "validation/nature/sea/ADE_val_00000002": (801, 530, "RGB", None),
    "validation/misc/ADE_val_00000001": (512, 700, "CMYK", None),
  }
  painted = {"train": {}, "val": {}}
  for i, (file, (height, width, mode, orientation)) in enumerate(images.items()):
    path = home / file
    jpeg(path.with_name(f"{path.name}.jpg"), height, width, mode, orientation)
    shape = (width, height) if orientation == 6 else (height, width)
    label = rectangles(*shape, ids, seed=i)
    object_png(path.with_name(f"{path.name}_seg.png"), label, seed=i)
    object_png(path.with_name(f"{path.name}_parts_1.png"), label * 0)
    gray_png(path / "instance_000_x.png", label * 0)
    split = "train" if "train" in path.name else "val"
    painted[split][path.name] = label
  return painted


def coco_stuff(root, train=3, val=2):
  """images/ and stuffthingmaps_trainval2017/; slots of no class, such as 11, occur."""
  painted = {"train": {}, "val": {}}
  for split, count in (("train", train), ("val", val)):
    for i in range(count):
      name = f"{i * 37 + 9:012d}"
      label = rectangles(17 + i, 30 - 3 * i, [255, 0, 11, 181, 90 + i], seed=i)
      mode = "L" if (split, i) == ("train", 1) else "RGB"
      jpeg(root / "images" / f"{split}2017" / f"{name}.jpg", *label.shape, mode)
      gray_png(root / "stuffthingmaps_trainval2017" / f"{split}2017" / f"{name}.png", label)
      painted[split][name] = label
  return painted


def cityscapes(root, train=3, val=2):
  """leftImg8bit/ and gtFine/ with all that the archives have beside the ids, and the test split."""
  painted = {"train": {}, "val": {}, "test": {}}
  for split, cities, count in (
    ("train", ("aachen", "zürich"), train), ("val", ("lindau",), val), ("test", ("bonn",), 1),
  ):  # fmt: skip
    for i in range(count):
      city = cities[i % len(cities)]
      name = f"{city}_{i:06d}_000019"
      label = rectangles(16 + 2 * i, 32 - i, [0, 3, 7, 26 + i, 33], seed=i)
      files = root / "gtFine" / split / city
      gray_png(files / f"{name}_gtFine_labelIds.png", label)
      wide_png(files / f"{name}_gtFine_instanceIds.png", np.where(label < 24, label, label * 1000))
      color = np.stack([label * 7, label, label, label * 0 + 255], -1).astype(np.uint8)
      Image.fromarray(color).save(files / f"{name}_gtFine_color.png")
      (files / f"{name}_gtFine_polygons.json").write_text("{}")
      image = root / "leftImg8bit" / split / city / f"{name}_leftImg8bit.png"
      image.parent.mkdir(parents=True, exist_ok=True)
      Image.fromarray(color[..., :3]).save(image)
      painted[split][name] = label
  del painted["test"]
  return painted


def folder(root, splits=("train", "val"), names=("sky", "big tree, tree", "Straße", "猫")):
  """Your own folder with masks of three kinds; `splits=("",)` is the flat layout."""
  painted = {split: {} for split in splits}
  for split in splits:
    for i in range(10):
      label = rectangles(9 + i, 21 - i, [*range(len(names)), 255], seed=i)
      name = f"pic {i} ä"
      jpeg(root / "images" / split / f"{name}.jpg", *label.shape)
      (gray_png, palette_png, wide_png)[i % 3](root / "labels" / split / f"{name}.png", label)
      painted[split][name] = label
  (root / "names.txt").write_text("".join(f"{n}\n" for n in names), encoding="utf-8")
  return painted
