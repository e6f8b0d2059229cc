"""Pascal VOC's label images: an index PNG in VOC's colors, and a file of class names."""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from rpn_jax.base.errors import InputError

BACKGROUND = "background"
VOID = 255


def indices(names: Sequence[str]) -> np.ndarray:
  """The index (C,) uint8 of each class: from 1, but 0 for the one that is called "background".

  Raises:
    InputError: more classes than VOC's files hold.
  """
  own = [i for i, name in enumerate(names) if name.casefold() == BACKGROUND]
  others = [i for i in range(len(names)) if i not in own[:1]]
  if len(others) >= VOID:
    raise InputError(
      f"save=voc: expected at most {VOID - 1} classes, since its files have 8 bits, got "
      f"{len(others)}: save labels or coco instead"
    )
  table = np.zeros(len(names), np.uint8)
  table[others] = np.arange(1, len(others) + 1)
  return table


def label_image(labels_HxW: np.ndarray, table_C: np.ndarray) -> Image.Image:
  """A palette image of `indices`; pixels of no class are VOID.

  Args:
    labels_HxW: class ids; -1 is no class.
    table_C: index of each class.
  """
  index = np.where(labels_HxW < 0, VOID, table_C[labels_HxW]).astype(np.uint8)
  image = Image.fromarray(index)
  image.putpalette(palette().tobytes())
  return image


def palette() -> np.ndarray:
  """VOC's colors (256, 3) uint8: bits 0, 3, 6 … of the index are red's from the highest on.

  Source: VOClabelcolormap.m of the VOC devkit.
  """
  index = np.arange(256)
  colors = np.zeros((256, 3), int)
  for bit in range(3):
    for channel in range(3):
      colors[:, channel] |= (index >> (3 * bit + channel) & 1) << (7 - bit)
  return colors.astype(np.uint8)


def class_names(names: Sequence[str], table_C: np.ndarray) -> str:
  """The text of the file of names: line n, counted from 0, is index n.

  Raises:
    InputError: a name of several lines, after which all others would be of another index.
  """
  for name in names:
    if len(name.splitlines()) > 1:
      raise InputError(f"save=voc: expected class names of one line, got {name!r}: rename it")
  lines = {0: BACKGROUND} | {int(index): name for index, name in zip(table_C, names)}
  return "".join(f"{lines[i]}\n" for i in sorted(lines))
