"""The scenes of the synthetic `shapes` data set: drawn by a program, every pixel labeled.

A scene shows objects on textured grounds. An object class is a surface pattern and a color
("striped red"), so that a class never met in training is a new combination of two known words:
small as it is, the data set tests open-vocabulary segmentation.
"""

import dataclasses

import cv2
import numpy as np

from data_pipelines import vocabularies

# RGB. The hues lie far apart and are saturated, while the grounds are dull: grass is an olive
# green, sand a pale beige, water a blue-gray.
COLORS = {
  "red": (208, 22, 34),
  "orange": (250, 128, 8),
  "yellow": (248, 222, 24),
  "green": (0, 168, 74),
  "blue": (24, 62, 222),
  "purple": (146, 34, 180),
}
PATTERNS = ("plain", "striped", "dotted", "checked")
GROUNDS = ("grass", "sand", "water")

OBJECTS = tuple(f"{pattern} {color}" for color in COLORS for pattern in PATTERNS)
CLASSES = OBJECTS + GROUNDS  # the label of a pixel is an index into this tuple

# Unseen classes: walk through the colors and take the next pattern each time, starting from
# "striped". Each color occurs once and each pattern once or twice, so every color and every
# pattern is also part of a seen class; only their combination is new. All grounds are seen.
UNSEEN = tuple(len(PATTERNS) * color + (color + 1) % len(PATTERNS) for color in range(len(COLORS)))

# The classes of `crowds`, whose scenes are labeled more coarsely, as data sets differ in what they
# name: an object is its color, whatever its pattern. Every drawn class has one of these names.
COLOR_CLASSES = (*COLORS, *GROUNDS)
COLOR_OF_CLASS = {i: COLOR_CLASSES.index(name.split()[-1]) for i, name in enumerate(CLASSES)}

VOCABULARY = vocabularies.of_names("shapes", CLASSES, [CLASSES[i] for i in UNSEEN])
CROWDS_VOCABULARY = dataclasses.replace(
  vocabularies.of_names("crowds", COLOR_CLASSES), ids=COLOR_OF_CLASS
)

_YELLOW = list(COLORS).index("yellow")
_RGB = np.asarray(list(COLORS.values()), np.float32)
# A pattern's second tone has no hue, so that the color word names the first tone only.
_SECOND_TONES = np.asarray([(28, 28, 28), (244, 244, 244)], np.float32)
_MIN_VISIBLE = 0.65  # share of an object's area that later objects must leave in view
_PLACEMENT_TRIES = 12


def _smooth_field(rng, height, width, cells):
  """A smooth random field, float32 [H,W] of about unit scale, `cells` features across."""
  coarse = rng.standard_normal((cells, cells), dtype=np.float32)
  return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)


def _draw_ground(rng, name, height, width):
  """A ground texture, float32 [3,H,W] in about 0…255, not clipped."""
  noise = rng.standard_normal((height, width), dtype=np.float32)
  drift = _smooth_field(rng, height, width, 4)
  if name == "grass":  # blades: noise drawn out along the vertical
    blades = cv2.blur(noise, (1, 5)) * 2.2
    tone = 22 * blades + 8 * drift
    base, tint = (108, 128, 52), (0.85, 1.0, 0.5)
  elif name == "sand":  # fine grain with sparse dark specks
    tone = 7 * noise + 6 * drift - 48 * (noise > 2.0)
    base, tint = (210, 186, 142), (1.0, 1.0, 0.95)
  else:  # water: wavering horizontal crests
    period, phase = rng.uniform((7, 0), (10, 2 * np.pi))
    waver = _smooth_field(rng, height, width, 6)
    rows = np.arange(height, dtype=np.float32)[:, None] * np.float32(2 * np.pi / period)
    crest = np.sin(rows + np.float32(phase) + 1.4 * waver)
    tone = 20 * crest + 4 * noise + 5 * drift
    base, tint = (92, 124, 148), (1.0, 1.0, 0.9)
  return np.stack([tone * t + b for t, b in zip(tint, base)])


def _inside(rng, x, y, radius):
  """Distance in pixels from a random outline at offsets `x`, `y`; 0 or more inside.

  `x` and `y` are float32 offsets from the center that broadcast together. The result is a distance
  only near the outline, which is all that antialiasing needs. No outline reaches farther than
  `radius` from the center.
  """
  kind = rng.integers(5)
  if kind == 0:  # circle
    return radius - np.sqrt(x * x + y * y)
  if kind == 1:  # ellipse
    minor = radius * rng.uniform(0.62, 0.85)
    return (1 - np.sqrt((x / radius) ** 2 + (y / minor) ** 2)) * minor
  if kind == 2:  # rounded square; its half side is chosen so that the corners touch `radius`
    corner = radius * rng.uniform(0.2, 0.4)
    half = (radius - corner) * np.float32(np.sqrt(0.5))
    dx, dy = np.abs(x) - half, np.abs(y) - half
    outside = np.sqrt(np.maximum(dx, 0) ** 2 + np.maximum(dy, 0) ** 2)
    return corner - outside - np.minimum(np.maximum(dx, dy), 0)
  if kind == 3:  # triangle, its tips cut off by the circle
    slant = np.float32(np.sqrt(0.75))
    sides = np.maximum(np.maximum(slant * x + 0.5 * y, 0.5 * y - slant * x), -y)
    return np.minimum(0.58 * radius - sides, radius - np.sqrt(x * x + y * y))
  # blob: a circle whose radius is a random low-order Fourier series of the angle
  angle = np.arctan2(y, x)
  amplitude = rng.uniform(0.02, 0.13, 4).astype(np.float32)
  phase = rng.uniform(0, 2 * np.pi, 4).astype(np.float32)
  edge = sum(a * np.cos(k * angle + p) for k, a, p in zip((2, 3, 4, 5), amplitude, phase))
  return radius * (1 + edge) / (1 + amplitude.sum()) - np.sqrt(x * x + y * y)


def _second_tone_share(rng, pattern, x, y, diameter):
  """Share in [0, 1] of the second tone at offsets `x`, `y` of a patterned surface."""
  # Never more than a third of the object, else a small one would not show its pattern.
  period = np.float32(min(rng.uniform(6, 10), diameter / 3))
  turn = rng.uniform(0, np.pi)
  c, s = np.float32(np.cos(turn)), np.float32(np.sin(turn))
  du, dv = rng.uniform(0, 1, 2).astype(np.float32)
  u = (c * x + s * y) / period + du
  if pattern == "striped":
    wave = np.abs(u - np.floor(u) - 0.5) - 0.27  # the second tone is a little the narrower
    return np.clip(wave * period + 0.5, 0, 1)
  v = (c * y - s * x) / period + dv
  if pattern == "dotted":
    u, v = u - np.rint(u), v - np.rint(v)
    return np.clip((0.3 - np.sqrt(u * u + v * v)) * period + 0.5, 0, 1)
  edge_u = np.clip((np.abs(u - np.floor(u) - 0.5) - 0.25) * period, -0.5, 0.5)
  edge_v = np.clip((np.abs(v - np.floor(v) - 0.5) - 0.25) * period, -0.5, 0.5)
  return 0.5 + 2 * edge_u * edge_v


def _place(rng, owner, areas, visible, depth):
  """A top-left corner for an object that leaves most of every other in view, or None.

  `owner`, int32 [H,W], is the object at each pixel (-1 for none); `areas` and `visible` count the
  pixels of the objects so far; `depth` is the new object's patch from `_inside`.
  """
  height, width = owner.shape
  size = depth.shape[0]
  margin = size * 0.42  # the center stays this far from the border: little is cut off
  for _ in range(_PLACEMENT_TRIES):
    center = [
      rng.uniform(min(margin, extent / 2), max(extent - margin, extent / 2))
      for extent in (height, width)
    ]
    top, left = (round(c - size / 2) for c in center)
    window, patch = _overlap(top, left, size, height, width)
    covered = owner[window][depth[patch] >= 0]
    hidden = np.bincount(covered[covered >= 0], minlength=len(areas))
    if all(v - h >= _MIN_VISIBLE * a for v, h, a in zip(visible, hidden, areas)):
      return top, left
  return None


def _overlap(top, left, size, height, width):
  """Slices (in the scene, in the patch) where a square patch at `top`, `left` meets the scene."""
  t, b, l, r = max(top, 0), min(top + size, height), max(left, 0), min(left + size, width)
  return np.s_[t:b, l:r], np.s_[t - top : b - top, l - left : r - left]


def compose(rng, height, width, object_ids, ground_ids, diameter):
  """A scene of the given objects on one ground or two; see `draw_scene`.

  Args:
    rng: the only source of randomness.
    height, width: pixels.
    object_ids: class ids, drawn in this order.
    ground_ids: one class id, or those of the upper and the lower ground.
    diameter: smallest and largest diameter of an object, pixels.

  Returns:
    The image, uint8 [H,W,3], and the label, uint8 [H,W].
  """
  # Color is the first axis while drawing: numpy is several times slower with it last.
  image = _draw_ground(rng, CLASSES[ground_ids[0]], height, width)
  label = np.full((height, width), ground_ids[0], np.uint8)
  if len(ground_ids) == 2:  # the second ground lies below a wavy horizon
    level, swing, waves, phase = rng.uniform((0.3, 0.02, 0.5, 0), (0.7, 0.08, 2, 2 * np.pi))
    across = np.arange(width, dtype=np.float32)
    horizon = height * (level + swing * np.sin(2 * np.pi * waves * across / width + phase))
    depth = np.arange(height, dtype=np.float32)[:, None] - horizon.astype(np.float32)
    below = _draw_ground(rng, CLASSES[ground_ids[1]], height, width)
    image += np.clip(depth + 0.5, 0, 1) * (below - image)
    label[depth >= 0] = ground_ids[1]

  owner = np.full((height, width), -1, np.int32)
  areas, visible = [], []
  light = rng.uniform(0, 2 * np.pi)  # one direction for the whole scene
  for class_id in object_ids:
    color, pattern = divmod(int(class_id), len(PATTERNS))
    span = rng.uniform(*diameter)
    size = int(np.ceil(span)) + 2
    offset = np.arange(size, dtype=np.float32) - np.float32((size - 1) / 2)
    x, y = offset[None, :], offset[:, None]
    turn = rng.uniform(0, 2 * np.pi)
    c, s = np.float32(np.cos(turn)), np.float32(np.sin(turn))
    depth = _inside(rng, c * x + s * y, c * y - s * x, np.float32(span / 2))
    corner = _place(rng, owner, areas, visible, depth)
    if corner is None:
      continue
    surface = (_RGB[color] + rng.uniform(-10, 10, 3).astype(np.float32))[:, None, None]
    if pattern:
      share = _second_tone_share(rng, PATTERNS[pattern], x, y, span)
      # White hardly shows on yellow, which therefore always gets the dark tone.
      second = _SECOND_TONES[0 if color == _YELLOW else rng.integers(2)]
      surface = surface + share * (second[:, None, None] - surface)
    slope = np.float32(rng.uniform(0.08, 0.2) * 2 / span)
    shade = 1 + slope * (np.float32(np.cos(light)) * x + np.float32(np.sin(light)) * y)
    surface = surface * shade

    window, patch = _overlap(*corner, size, height, width)
    depth = depth[patch]
    canvas = image[:, *window]
    canvas += np.clip(depth + 0.5, 0, 1) * (surface[:, *patch] - canvas)
    mask = depth >= 0
    covered = owner[window][mask]
    hidden = np.bincount(covered[covered >= 0], minlength=len(areas))
    visible = [v - h for v, h in zip(visible, hidden)]
    owner[window][mask] = len(areas)
    label[window][mask] = class_id
    areas.append(covered.size)
    visible.append(covered.size)

  image *= np.float32(rng.uniform(0.92, 1.06))  # exposure
  image += 4 * rng.standard_normal((height, width), dtype=np.float32)
  return cv2.merge(list(np.clip(image, 0, 255).astype(np.uint8))), label


def random_grounds(rng, split_chance=0.5):
  """One ground class id or, with probability `split_chance`, two different ones (top, bottom)."""
  count = 2 if rng.random() < split_chance else 1
  return len(OBJECTS) + rng.permutation(len(GROUNDS))[:count]


def draw_scene(
  rng: np.random.Generator,
  height: int,
  width: int,
  num_objects: tuple[int, int],
  diameter: tuple[float, float] = (22, 44),
) -> tuple[np.ndarray, np.ndarray]:
  """Draws a scene: objects of random classes on one ground or two.

  Args:
    rng: the only source of randomness; the same state draws the same scene.
    height, width: pixels.
    num_objects: smallest and largest number of objects. Later objects occlude earlier ones; an
      object that would hide most of another wherever it is placed is left out, so that a crowded
      scene may have fewer.
    diameter: smallest and largest diameter of an object, pixels.

  Returns:
    The image, uint8 [H,W,3] in RGB, and the label, uint8 [H,W]: for every pixel the index into
    `CLASSES` of what its center shows.
  """
  count = rng.integers(num_objects[0], num_objects[1] + 1)
  object_ids = rng.integers(len(OBJECTS), size=count)
  return compose(rng, height, width, object_ids, random_grounds(rng), diameter)
