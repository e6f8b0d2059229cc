"""Miniature raw trees of VOC + SBD, PASCAL Context and PASCAL Context 459.

Every function writes files as the real sets have them and returns what it painted: name ->
label, by plain array slices.
"""

import json

import numpy as np
import scipy.io
from PIL import Image

# The categories of the miniature Context: raw ids among 459, and places among the 59 from 1 on.
SKY, GRASS, DOG = 360, 187, 113
RANK = {0: 0, DOG: 23, GRASS: 29, SKY: 47}


def jpeg(path, height, width, mode="RGB", orientation=None):
  """A noise image; `height` and `width` are those of the stored pixels."""
  path.parent.mkdir(parents=True, exist_ok=True)
  bands = {"L": (), "RGB": (3,), "CMYK": (4,)}[mode]
  pixels = np.random.default_rng(height * width).integers(0, 256, (height, width, *bands), np.uint8)
  exif = Image.Exif()
  if orientation is not None:
    exif[0x0112] = orientation
  Image.fromarray(pixels, mode).save(path, quality=95, exif=exif)


def palette_png(path, label):
  path.parent.mkdir(parents=True, exist_ok=True)
  image = Image.fromarray(label.astype(np.uint8)).convert("P")
  image.putdata(label.astype(np.uint8).ravel())
  image.putpalette(np.random.default_rng(0).integers(0, 256, 768).astype(np.uint8).tobytes())
  image.save(path)


def gray_png(path, label):
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.fromarray(label.astype(np.uint8)).save(path)


def names(path, lines, end="\n"):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text("".join(line + end for line in lines), encoding="utf-8")


def sbd_mat(path, label):
  path.parent.mkdir(parents=True, exist_ok=True)
  boundaries = np.empty((20, 1), object)
  boundaries[:] = [[np.zeros(label.shape, np.uint8)]] * 20
  fields = {
    "Boundaries": boundaries,
    "Segmentation": label.astype(np.uint8),
    "CategoriesPresent": np.unique(label).astype(np.uint8),
  }
  scipy.io.savemat(path, {"GTcls": fields}, do_compression=True)


def context_mat(path, label):
  path.parent.mkdir(parents=True, exist_ok=True)
  scipy.io.savemat(path, {"LabelMap": label.astype(np.uint16)}, do_compression=True)


def runs(mask):
  """The lengths of the runs of 0, 1, 0, … down the columns of a bool [H,W]."""
  lengths, value = [0], False
  for pixel in mask.T.ravel():
    if pixel != value:
      lengths.append(0)
      value = pixel
    lengths[-1] += 1
  return lengths


def packed(lengths):
  """COCO's text of run lengths: from the fourth on as differences, six bits to a character."""
  text = ""
  for i, length in enumerate(lengths):
    value = length - lengths[i - 2] if i > 2 else length
    more = True
    while more:
      low, value = value & 31, value >> 5
      more = value != (-1 if low & 16 else 0)
      text += chr(48 + (low | 32 if more else low))
  return text


def rle(mask, compressed):
  lengths = runs(mask)
  return {"size": list(mask.shape), "counts": packed(lengths) if compressed else lengths}


def voc(root, labels="sbd", folder="benchmark_RELEASE/dataset"):
  """VOC + SBD below `root`; `labels` is "sbd" (.mat files and lists) or "converted" (PNG files)."""
  home = root / "VOCdevkit" / "VOC2012"
  # name: stored height, width, mode, EXIF orientation
  images = {
    "2007_000001": (31, 45, "RGB", None),
    "2007_000002": (17, 9, "L", None),
    "2007_000003": (20, 33, "RGB", None),  # val, and in SBD's lists
    "2007_000004": (1, 7, "RGB", None),  # val
    "2008_000010": (23, 11, "CMYK", None),
    "2008_000011": (19, 29, "RGB", 6),  # the label is of the turned size
  }
  for name, (height, width, mode, orientation) in images.items():
    jpeg(home / "JPEGImages" / f"{name}.jpg", height, width, mode, orientation)

  own = {n: np.zeros(images[n][:2], np.uint8) for n in images if n.startswith("2007")}
  own["2007_000001"][4:20, 5:30] = 255
  own["2007_000001"][5:19, 6:29] = 20
  own["2007_000002"][:, 3:] = 7
  own["2007_000003"][2:9, 10:30] = 15
  own["2007_000004"][0, 2:5] = (1, 255, 3)
  sbd = {
    "2007_000001": np.full((31, 45), 5, np.uint8),  # VOC's own is another
    "2007_000003": np.full((20, 33), 6, np.uint8),  # likewise
    "2008_000010": np.zeros((23, 11), np.uint8),
    "2008_000011": np.zeros((29, 19), np.uint8),
  }
  sbd["2008_000010"][10:, 2:8] = 12
  sbd["2008_000011"][3:28, 0:5] = 1
  sbd["2008_000011"][0, 18] = 20

  for name, label in own.items():
    palette_png(home / "SegmentationClass" / f"{name}.png", label)
  lists = home / "ImageSets" / "Segmentation"
  names(lists / "train.txt", ["\ufeff2007_000002", "2007_000001"])  # some editors leave a mark
  names(lists / "val.txt", ["2007_000003", "2007_000004"], end="\r\n")
  if labels == "sbd":
    for name, label in sbd.items():
      sbd_mat(root / folder / "cls" / f"{name}.mat", label)
    names(root / folder / "train.txt", ["2008_000010", "2007_000001", "2007_000003"])
    names(root / folder / "val.txt", ["2008_000011"])
  else:
    for name, label in sbd.items():
      gray_png(home / "SegmentationClassAug" / f"{name}.png", label)
    train = ["2007_000001", "2007_000002", "2008_000010", "2008_000011"]
    names(lists / "trainaug.txt", [*train, ""])
  val = {n: own[n] for n in ("2007_000003", "2007_000004")}
  return {"train": {n: label for n, label in {**sbd, **own}.items() if n not in val}, "val": val}


def context(root, labels="json"):
  """PASCAL Context below `root`; `labels` is "json" or "png". Labels are in the 459 numbering."""
  home = root / "VOCdevkit" / "VOC2010"
  painted = {n: np.zeros((25, 40), np.uint16) for n in ("2008_000002", "2008_000003")}
  painted["2008_000009"] = np.zeros((13, 7), np.uint16)
  for name, label in painted.items():
    jpeg(home / "JPEGImages" / f"{name}.jpg", *label.shape)

  def region(name, rows, columns):
    mask = np.zeros(painted[name].shape, bool)
    mask[rows, columns] = True
    return mask

  annotations = []

  def paint(name, category, segmentation, mask):
    painted[name][mask] = category
    annotations.append(
      {
        "id": len(annotations) + 1,
        "image_id": int(name.replace("_", "")),
        "category_id": category,
        "segmentation": segmentation,
        "parts": [{"part_id": 100, "segmentation": {"size": [1, 1], "counts": "01"}}],
      }
    )

  one, two, three = painted
  mask = region(one, slice(2, 20), slice(5, 30))
  paint(one, SKY, rle(mask, compressed=True), mask)
  mask = region(two, slice(0, 25), slice(0, 40))
  paint(two, GRASS, rle(mask, compressed=False), mask)
  # Over the sky, though with the lower number: order decides.
  mask = region(one, slice(10, 25), slice(20, 35))
  paint(one, GRASS, rle(mask, compressed=False), mask)
  # An L and a square: sides on whole numbers cover the pixels from there on.
  mask = region(two, slice(3, 9), slice(4, 12)) | region(two, slice(9, 15), slice(4, 7))
  mask |= region(two, slice(18, 21), slice(30, 33))
  shapes = [[4, 3, 12, 3, 12, 9, 7, 9, 7, 15, 4, 15], [30, 18, 33, 18, 33, 21, 30, 21]]
  paint(two, DOG, shapes, mask)
  mask = region(three, slice(0, 13), slice(6, 7)) | region(three, slice(0, 1), slice(0, 2))
  paint(three, DOG, rle(mask, compressed=True), mask)

  phases = {three: "train", two: "train", one: "val"}
  if labels == "json":
    images = [
      {
        "file_name": f"{name}.jpg",
        "image_id": int(name.replace("_", "")),
        "height": painted[name].shape[0],
        "width": painted[name].shape[1],
        "phase": phase,
      }
      for name, phase in phases.items()
    ]
    images.append({"file_name": "2008_000001.jpg", "image_id": 2008000001, "phase": "test"})
    data = {
      "info": {"version": "4.0"},
      "images": images,
      "categories": [{"category_id": SKY, "name": "sky"}],
      "annos_segmentation": annotations,
      "annos_occlusion": [{"image_id": 2008000002, "edges": {"indices": [[1, 2, 3]]}}],
    }
    (home / "trainval_merged.json").write_text(json.dumps(data), encoding="utf-8")
  else:
    ranks = np.zeros(460, np.uint8)
    ranks[list(RANK)] = list(RANK.values())
    for name, label in painted.items():
      gray_png(home / "SegmentationClassContext" / f"{name}.png", ranks[label])
    for split in ("train", "val"):
      lines = sorted(n for n, phase in phases.items() if phase == split)
      names(home / "ImageSets" / "SegmentationContext" / f"{split}.txt", lines)
  return {
    "train": {two: painted[two], three: painted[three]},
    "val": {one: painted[one]},
  }


def context459(root, train=False):
  """PASCAL Context 459 below `root`; `train` adds the lists of mmsegmentation's converter."""
  home = root / "VOCdevkit" / "VOC2010"
  painted = {n: np.full((21, 34), 459, np.uint16) for n in ("2008_000002", "2008_000003")}
  painted["2008_000002"][1:5, 2:9] = 256
  painted["2008_000003"][20, 33] = 1
  painted["2008_000003"][0, :3] = 0
  for name, label in painted.items():
    jpeg(home / "JPEGImages" / f"{name}.jpg", *label.shape)
    context_mat(home / "trainval" / f"{name}.mat", label)
  if not train:
    names(home / "pascalcontext_val.txt", ["2008_000003", "2008_000002"])
    return {"val": painted}
  names(home / "ImageSets" / "SegmentationContext" / "val.txt", ["2008_000003"])
  names(home / "ImageSets" / "SegmentationContext" / "train.txt", ["2008_000002"])
  return {split: {n: painted[n]} for split, n in (("train", "2008_000002"), ("val", "2008_000003"))}
