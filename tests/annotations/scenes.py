"""Label maps with what is difficult to draw around."""

import numpy as np

NAMES = ("cat, kitten", "Straße: «猫»", "empty", 'a "quote" # and \\', "background")


def nested() -> np.ndarray:
  """Rings within rings: islands in holes, which touch the border, a corner or nothing."""
  label = np.full((40, 50), -1)
  label[:, :30] = 0  # at three borders
  label[4:30, 4:26] = 1
  label[8:26, 8:22] = 0  # an island in the hole of class 0
  label[12:20, 12:18] = 3
  label[15, 15] = 4  # one pixel in a hole in an island in a hole
  label[34, 40] = label[35, 41] = label[36, 42] = 3  # only corners touch
  label[39, 49] = 4
  label[34:38, 46] = 1  # a line
  label[2:5, 34:48] = 0
  label[3, 35:47] = -1  # a long hole without a class
  label[26:33, 34:40] = 4
  label[27:32, 35] = label[[28, 30], 37] = 0  # several holes in a row
  return label


def noise(height: int, width: int, seed: int, classes: int = 3) -> np.ndarray:
  """Every pixel another class or none: all corners, pinched outlines, regions at all borders."""
  return np.random.default_rng(seed).integers(-1, classes, (height, width))


def image(label: np.ndarray) -> np.ndarray:
  return np.random.default_rng(1).integers(0, 256, (*label.shape, 3)).astype(np.uint8)


def full_mask(region, size) -> np.ndarray:
  """A region's mask at the image's size."""
  mask = np.zeros(size, bool)
  height, width = region.mask.shape
  mask[region.top : region.top + height, region.left : region.left + width] = region.mask
  return mask
