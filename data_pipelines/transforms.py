"""Augmentation and label encoding: pure functions of (example, numpy random generator).

An example is a dict with `image` uint8 [H,W,3] in RGB, `label` [H,W] of class ids (optional when
predicting) and `id`. Every transform returns a new dict and touches neither its input nor any
global random state. Drawing random values and applying them are separate methods, so a recorded
or scripted draw can be replayed. Sizes and the order of the draws follow mmsegmentation 0.24 or
detectron2, so that a training run is comparable with the published one; `recipes` has their order.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import cv2
import numpy as np

from data_pipelines.vocabularies import IGNORE, IGNORE_WIDE
from rpn_jax.base import pixels
from rpn_jax.base.errors import InputError

_LABEL_VALUES = 65536  # every uint16
_BYTES = np.arange(256, dtype=np.float32)


class LabelMap:
  """A table from stored label values to the ids a model is trained on or scored with.

  Made by `from_ids` or `seen`; `a.then(b)` applies a, then b.

  Attributes:
    table: int32 [65536]; the new id, `ignore`, or −1 for a value that must not occur.
    ignore: the value given to pixels without a class.
  """

  def __init__(self, table: np.ndarray, ignore: int):
    self.table = table
    self.ignore = ignore

  @classmethod
  def from_ids(
    cls, ids: Mapping[int, int], *, ignore: int = IGNORE, unlisted: str = "error"
  ) -> "LabelMap":
    """Maps each raw value in `ids`; `ignore` maps to itself unless it is listed.

    Args:
      ids: raw value -> class id or `ignore`; `ignore` itself, too, if it is to be another value.
      ignore: value of pixels without a class; above every class id.
      unlisted: "ignore" turns all other raw values into `ignore`, "error" rejects them.
    """
    if unlisted not in ("error", "ignore"):
      raise ValueError(f"expected unlisted 'error' or 'ignore', got {unlisted!r}")
    raw = np.fromiter(ids.keys(), np.int64, len(ids))
    new = np.fromiter(ids.values(), np.int64, len(ids))
    if len(ids) and (min(raw.min(), new.min()) < 0 or raw.max() >= _LABEL_VALUES):
      raise InputError(
        f"expected raw label values in 0…{_LABEL_VALUES - 1} and class ids of 0 or more, got "
        f"raw {raw.min()}…{raw.max()} and ids from {new.min()}; correct the id table"
      )
    if len(ids) and new.max() > ignore:
      raise InputError(
        f"expected class ids below the ignore value {ignore}, got {new.max()}; "
        f"use ignore={IGNORE_WIDE} for sets of more than {IGNORE} classes"
      )
    table = np.full(_LABEL_VALUES, ignore if unlisted == "ignore" else -1, np.int32)
    table[ignore] = ignore
    table[raw] = new
    return cls(table, ignore)

  @classmethod
  def seen(cls, seen: Sequence[int], num_classes: int, *, ignore: int = IGNORE) -> "LabelMap":
    """Zero-shot training: a class id becomes its position in `seen`, unseen ones `ignore`."""
    wrong = [i for i in seen if not 0 <= i < num_classes]
    if wrong or len(set(seen)) != len(seen):
      raise InputError(
        f"expected distinct seen class ids in 0…{num_classes - 1}, got {wrong or list(seen)}"
      )
    ids = dict.fromkeys(range(num_classes), ignore)
    ids.update({c: i for i, c in enumerate(seen)})
    return cls.from_ids(ids, ignore=ignore)

  def then(self, after: "LabelMap") -> "LabelMap":
    """This map followed by another one; ignored pixels stay ignored, unless it lists them."""
    table = np.where(self.table < 0, -1, after.table[self.table])
    if self.ignore != after.ignore:
      table[self.table == self.ignore] = after.ignore
    return LabelMap(table.astype(np.int32), after.ignore)

  def encode(self, label: np.ndarray, example_id: str = "?") -> np.ndarray:
    """Looks every pixel up.

    Args:
      label: integers [H,W].
      example_id: named in the error.

    Returns:
      uint8 [H,W], or uint16 where `ignore` needs it.

    Raises:
      InputError: a value that the table does not allow.
    """
    if label.dtype not in (np.uint8, np.uint16):
      outside = (label < 0) | (label >= _LABEL_VALUES)
      if outside.any():
        self._reject(label, outside, example_id)
    new = self.table[label]
    wrong = new < 0
    if wrong.any():
      self._reject(label, wrong, example_id)
    return new.astype(np.uint8 if self.ignore <= 255 else np.uint16)

  def _reject(self, label, wrong, example_id):
    allowed = np.flatnonzero(self.table >= 0)
    allowed = allowed[allowed != self.ignore]
    span = f"{allowed.min()}…{allowed.max()} or {self.ignore}" if len(allowed) else self.ignore
    values = np.unique(label[wrong])
    raise InputError(
      f"example {example_id}: expected label values {span}, got "
      f"{', '.join(map(str, values[:5]))} on {int(wrong.sum())} pixels; "
      "check that the label file and the id table belong to the same data set"
    )

  def __call__(self, example, rng=None):
    if "label" not in example:
      return example
    return {**example, "label": self.encode(example["label"], example.get("id", "?"))}


def fit_size(height: int, width: int, scale: Sequence[int]) -> tuple[int, int]:
  """The largest size of the same aspect within a box; either orientation.

  Args:
    height, width: pixels.
    scale: two limits in pixels, the larger for the long side, the smaller for the short one.

  Returns:
    (height, width), each `int(x · factor + 0.5)`.
  """
  factor = min(max(scale) / max(height, width), min(scale) / min(height, width))
  return max(1, int(height * factor + 0.5)), max(1, int(width * factor + 0.5))


def source_indices(inputs: int, outputs: int, rule: str) -> np.ndarray:
  """For each output pixel of one axis, the index of the input pixel it is copied from.

  Args:
    inputs, outputs: pixels.
    rule: "floor_nearest", PyTorch's `nearest`: floor(i · inputs / outputs), in float32; "nearest",
      Pillow's: the input at the center of the output.
  """
  i = np.arange(outputs)
  if rule == "nearest":
    return ((2 * i + 1) * inputs) // (2 * outputs)
  at = i.astype(np.float32) * (np.float32(inputs) / np.float32(outputs))
  return np.minimum(at.astype(np.int64), inputs - 1)


def resize_label(
  label: np.ndarray,
  size: tuple[int, int],
  library: str = "mmsegmentation",
  rule: str = "floor_nearest",
) -> np.ndarray:
  """Nearest neighbor to (height, width), by one of the rules of `source_indices`.

  Under mmsegmentation, OpenCV computes floor(i · inputs / outputs) in float64: now and then
  another pixel than PyTorch's.
  """
  if library == "mmsegmentation" and rule == "floor_nearest":
    return cv2.resize(label, (size[1], size[0]), interpolation=cv2.INTER_NEAREST)
  rows, columns = (source_indices(n, m, rule) for n, m in zip(label.shape, size))
  return label[rows[:, None], columns]


class Resize:
  """Resizes the image; the label keeps its size, as scoring needs it.

  Args:
    short_side, long_side, library: see `pixels.to_network`.
  """

  def __init__(self, short_side: int, long_side: int = 0, library: str = "mmsegmentation"):
    self.sides = short_side, long_side
    self.library = library

  def __call__(self, example, rng=None):
    image = example["image"]
    size = pixels.short_side_size(*image.shape[:2], *self.sides)
    return {**example, "image": pixels.resize(image, size, self.library)}


class RandomResize:
  """Resizes image and label into `scale` times a ratio drawn from U(ratio).

  Args:
    scale: limits of the long and the short side at ratio 1, pixels.
    ratio: range of the ratio.
    library: how sizes are rounded and images resized, one of `pixels.RESIZES`.
    label_rule: see `resize_label`.
  """

  def __init__(
    self,
    scale: tuple[int, int] = (2048, 512),
    ratio: tuple[float, float] = (0.5, 2.0),
    library: str = "mmsegmentation",
    label_rule: str = "floor_nearest",
  ):
    self.scale = scale
    self.ratio = ratio
    self.library = library
    self.label_rule = label_rule

  def size(self, height: int, width: int, ratio: float) -> tuple[int, int]:
    """New (height, width) for one drawn ratio; the limits are truncated to whole pixels."""
    limits = sorted(int(limit * ratio) for limit in self.scale)
    if self.library == "detectron2":
      return pixels.short_side_size(height, width, *limits)
    return fit_size(height, width, limits)

  def __call__(self, example, rng):
    size = self.size(*example["image"].shape[:2], rng.uniform(*self.ratio))
    return {
      **example,
      "image": pixels.resize(example["image"], size, self.library),
      "label": resize_label(example["label"], size, self.library, self.label_rule),
    }


class RandomCrop:
  """Crops image and label to a drawn box; an image smaller than the box is kept whole.

  A box is redrawn, up to 10 times, while one label covers `cat_max_ratio` or more of its labeled
  pixels. The last box is used unchecked, as in the official recipe.
  """

  def __init__(self, size: tuple[int, int], cat_max_ratio: float = 0.75, ignore: int = IGNORE):
    self.size = size
    self.cat_max_ratio = cat_max_ratio
    self.ignore = ignore

  def draw(self, height: int, width: int, rng) -> tuple[int, int, int, int]:
    """One box (y1, y2, x1, x2); the vertical offset is drawn first."""
    y = int(rng.integers(0, max(height - self.size[0], 0) + 1))
    x = int(rng.integers(0, max(width - self.size[1], 0) + 1))
    return y, y + self.size[0], x, x + self.size[1]

  def mixed(self, label: np.ndarray) -> bool:
    """Whether at least two labels occur and none dominates; ignored pixels do not count."""
    counts = np.bincount(label.ravel(), minlength=self.ignore + 1)
    counts[self.ignore] = 0
    return np.count_nonzero(counts) > 1 and counts.max() / counts.sum() < self.cat_max_ratio

  def choose(self, label: np.ndarray, rng) -> tuple[int, int, int, int]:
    """Draws boxes until one is mixed enough or ten redraws are spent."""
    box = self.draw(*label.shape, rng)
    if self.cat_max_ratio < 1:
      for _ in range(10):
        y1, y2, x1, x2 = box
        if self.mixed(label[y1:y2, x1:x2]):
          break
        box = self.draw(*label.shape, rng)
    return box

  def __call__(self, example, rng):
    y1, y2, x1, x2 = self.choose(example["label"], rng)
    return {
      **example,
      "image": example["image"][y1:y2, x1:x2],
      "label": example["label"][y1:y2, x1:x2],
    }


class RandomFlip:
  """Mirrors image and label left to right with probability ½."""

  def __call__(self, example, rng):
    if rng.random() >= 0.5:
      return example
    image, label = example["image"], example["label"]
    return {**example, "image": cv2.flip(image, 1), "label": cv2.flip(label, 1)}


class PhotoDraws(NamedTuple):
  """Values of one photometric distortion; None leaves that step out."""

  brightness: float | None  # added, in gray levels
  contrast: float | None  # factor
  contrast_first: bool  # before saturation and hue, or after them
  saturation: float | None  # factor
  hue: int | None  # added, in OpenCV's half degrees (H in 0…179)


class PhotoMetricDistortion:
  """Brightness, contrast, saturation and hue, each with probability ½, on uint8.

  Every step truncates back to uint8 before the next one, so each is a table of 256 entries.

  Args:
    hue: the lowest and, excluded, the highest shift, in half degrees.
  """

  brightness = 32.0  # limit of what is added, in gray levels
  contrast = saturation = (0.5, 1.5)  # ranges of the factors

  def __init__(self, hue: tuple[int, int] = (-18, 18)):
    self.hue = hue

  def draw(self, rng) -> PhotoDraws:
    """Draws in the official order: a coin before each value, the mode after brightness."""

    def coin() -> bool:
      return bool(rng.integers(0, 2))

    brightness = rng.uniform(-self.brightness, self.brightness) if coin() else None
    contrast_first = coin()
    contrast = None
    if contrast_first and coin():
      contrast = rng.uniform(*self.contrast)
    saturation = rng.uniform(*self.saturation) if coin() else None
    hue = int(rng.integers(*self.hue)) if coin() else None
    if not contrast_first and coin():
      contrast = rng.uniform(*self.contrast)
    return PhotoDraws(brightness, contrast, contrast_first, saturation, hue)

  def apply(self, image: np.ndarray, draws: PhotoDraws) -> np.ndarray:
    """Applies drawn values to uint8 [H,W,3]."""
    if draws.brightness is not None:
      image = cv2.LUT(image, _affine_table(add=draws.brightness))
    if draws.contrast is not None and draws.contrast_first:
      image = cv2.LUT(image, _affine_table(factor=draws.contrast))
    if draws.saturation is not None:
      image = _in_hsv(image, 1, _affine_table(factor=draws.saturation))
    if draws.hue is not None:
      image = _in_hsv(image, 0, ((np.arange(256) + draws.hue) % 180).astype(np.uint8))
    if draws.contrast is not None and not draws.contrast_first:
      image = cv2.LUT(image, _affine_table(factor=draws.contrast))
    return image

  def __call__(self, example, rng):
    return {**example, "image": self.apply(example["image"], self.draw(rng))}


def _affine_table(factor: float = 1.0, add: float = 0.0) -> np.ndarray:
  """uint8 [256] of clipped, truncated `value · factor + add`, computed in float32."""
  table = _BYTES * np.float32(factor) + np.float32(add)
  return np.clip(table, 0, 255).astype(np.uint8)


def _in_hsv(image: np.ndarray, channel: int, table: np.ndarray) -> np.ndarray:
  """Looks one HSV channel of an RGB image up in a table."""
  hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
  hsv[..., channel] = cv2.LUT(hsv[..., channel], table)
  return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)


class Normalize:
  """uint8 [H,W,3] -> float32 [H,W,3]: (value / 255 − mean) / std per channel (R, G, B)."""

  def __init__(self, mean: Sequence[float], std: Sequence[float]):
    self.mean = mean
    self.std = std

  def __call__(self, example, rng=None):
    return {**example, "image": pixels.normalize(example["image"], self.mean, self.std)}


class Pad:
  """Pads bottom and right up to a size: the image with `fill`, the label with `ignore`."""

  def __init__(self, size: tuple[int, int], ignore: int = IGNORE, fill: int = 0):
    self.size = size
    self.ignore = ignore
    self.fill = fill

  def __call__(self, example, rng=None):
    height, width = example["image"].shape[:2]
    below, right = max(self.size[0] - height, 0), max(self.size[1] - width, 0)
    if not below and not right:
      return example
    edges = ((0, below), (0, right))
    return {
      **example,
      "image": np.pad(example["image"], (*edges, (0, 0)), constant_values=self.fill),
      "label": np.pad(example["label"], edges, constant_values=self.ignore),
    }


class Compose:
  """Transforms in order; the label leaves as int32, contiguous like the image."""

  def __init__(self, *transforms):
    self.transforms = transforms

  def __call__(self, example, rng=None):
    for transform in self.transforms:
      example = transform(example, rng)
    example = {**example, "image": np.ascontiguousarray(example["image"])}
    if "label" in example:
      # Labels travel as uint8 or uint16 until here: OpenCV is several times faster on them.
      example["label"] = np.ascontiguousarray(example["label"], np.int32)
    return example
