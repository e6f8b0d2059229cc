"""The embedded world: procedurally drawn scenes in which every pixel has a label.

A scene shows objects on textured grounds. An object class is a surface pattern
and a colour ("striped red"), so a class never met in training is a new
combination of two known words; that is what makes a small world fit for
open-vocabulary segmentation. Three views of the same world:

* `Shapes`, a TFDS builder of scenes with masks (`prepare` writes it, `source` reads it);
* `CaptionedShapes`, endless image-caption pairs for contrastive pretraining;
* `single_object_images`, labelled pictures for zero-shot classification.
"""

import contextlib
import dataclasses
import io
import pathlib
import shutil

import cv2
import numpy as np
import tensorflow_datasets as tfds
import tqdm
from absl import logging
from PIL import Image

from rpn_jax.base.errors import InputError

# RGB anchors. Hues lie well apart and are saturated, while the grounds are dull:
# grass is an olive green, sand a pale beige, water a blue-grey.
COLOURS = {
  "red": (208, 22, 34),
  "orange": (250, 128, 8),
  "yellow": (248, 222, 24),
  "green": (0, 168, 74),
  "blue": (24, 62, 222),
  "purple": (146, 34, 180),
}
PATTERNS = ("plain", "striped", "dotted", "checked")
GROUNDS = ("grass", "sand", "water")

OBJECTS = tuple(f"{pattern} {colour}" for colour in COLOURS for pattern in PATTERNS)
CLASSES = OBJECTS + GROUNDS  # the label of a pixel is an index into this tuple

# Unseen classes: walk through the colours and take the next pattern each time, starting from
# "striped". Each colour occurs once and each pattern once or twice, so every colour and every
# pattern is also part of a seen class; only their combination is new. All grounds are seen.
UNSEEN = tuple(
  len(PATTERNS) * colour + (colour + 1) % len(PATTERNS) for colour in range(len(COLOURS))
)
SEEN = tuple(i for i in range(len(CLASSES)) if i not in UNSEEN)

# The names of the second world, whose scenes are counted more coarsely, as data sets differ in
# what they name: whatever its pattern, an object is its colour. Every drawn class has one of them.
COLOUR_CLASSES = (*COLOURS, *GROUNDS)
COLOUR_OF_CLASS = {i: COLOUR_CLASSES.index(name.split()[-1]) for i, name in enumerate(CLASSES)}

_YELLOW = list(COLOURS).index("yellow")
_RGB = np.asarray(list(COLOURS.values()), np.float32)
# A pattern's second tone has no hue, so that the colour word names the first tone only.
_SECOND_TONES = np.asarray([(28, 28, 28), (244, 244, 244)], np.float32)
_MIN_VISIBLE = 0.65  # share of an object's area that later objects must leave in view
_PLACEMENT_TRIES = 12


# ---------------------------------------------------------------- drawing


def _smooth_field(rng, height, width, cells):
  """A smooth random field f32[height, width] of about unit scale, `cells` features across."""
  coarse = rng.standard_normal((cells, cells), dtype=np.float32)
  return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)


def _draw_ground(rng, name, height, width):
  """A ground texture f32[3, height, width] in 0..255, not clipped."""
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
  """Depth in pixels below a random outline at offsets `x`, `y`; at least 0 inside.

  `x` and `y` are f32 offsets from the centre that broadcast together. The depth is a
  distance near the outline only, which is all that antialiasing needs. No outline reaches
  farther than `radius` from the centre.
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
  """A top-left corner for an object such that every object stays mostly in view, or None.

  `owner` i32[H, W] names the object at each pixel (-1 for none), `areas` and `visible`
  count the pixels of the objects so far, `depth` is the new object's patch from `_inside`.
  """
  height, width = owner.shape
  size = depth.shape[0]
  margin = size * 0.42  # the centre stays this far from the border: little is cut off
  for _ in range(_PLACEMENT_TRIES):
    centre = [
      rng.uniform(min(margin, extent / 2), max(extent - margin, extent / 2))
      for extent in (height, width)
    ]
    top, left = (round(c - size / 2) for c in centre)
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


def _compose(rng, height, width, object_ids, ground_ids, diameter):
  """A scene of the given classes; see `draw_scene`. `ground_ids` holds one or two class ids."""
  # Colour is the first axis while drawing: numpy is several times slower with it last.
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
    colour, pattern = divmod(int(class_id), len(PATTERNS))
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
    surface = (_RGB[colour] + rng.uniform(-10, 10, 3).astype(np.float32))[:, None, None]
    if pattern:
      share = _second_tone_share(rng, PATTERNS[pattern], x, y, span)
      # White hardly shows on yellow, which therefore always gets the dark tone.
      second = _SECOND_TONES[0 if colour == _YELLOW else rng.integers(2)]
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


def _random_grounds(rng, split_chance=0.5):
  """One ground class id, or with `split_chance` two different ones (top, bottom)."""
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
    height: in pixels.
    width: in pixels.
    num_objects: least and greatest number of objects, both included. Later objects occlude
      earlier ones, but an object for which no place is found that leaves most of every other
      in view is left out, so a crowded scene may hold fewer.
    diameter: least and greatest diameter of an object, in pixels.

  Returns:
    The image, uint8[height, width, 3] RGB, and the label, uint8[height, width], which holds
    for every pixel the index into `CLASSES` of what its centre shows.
  """
  count = rng.integers(num_objects[0], num_objects[1] + 1)
  object_ids = rng.integers(len(OBJECTS), size=count)
  return _compose(rng, height, width, object_ids, _random_grounds(rng), diameter)


# ---------------------------------------------------------------- pictures with words

VIEW_SIZE = 64  # height and width in pixels of captioned and of single-object images
VIEW_DIAMETER = (20, 56)  # wider than in scenes, so that a model meets every scale
# A caption names a class that shows on at least this share of the pixels.
NAMED_SHARE = 0.02

_TEMPLATES = (
  "a photo of {}",
  "a photo of {}",
  "{}",
  "a picture of {}",
  "an image of {}",
  "this is {}",
  "there is {}",
)
_ARTICLES = ("a ", "a ", "", "the ")


def visible_classes(label: np.ndarray, share: float = NAMED_SHARE) -> list[int]:
  """Ids of the classes on at least `share` of the pixels of a label map, in rising order."""
  counts = np.bincount(label.ravel(), minlength=len(CLASSES))
  return np.flatnonzero(counts >= share * label.size).tolist()


def _listed(names):
  """["a", "b", "c"] -> "a, b and c"."""
  return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def _caption(rng, class_ids):
  """A sentence on the classes, in random order; a few leave out the grounds or the objects."""
  ids = rng.permutation(class_ids)
  article = _ARTICLES[rng.integers(len(_ARTICLES))]
  objects = [article + CLASSES[i] for i in ids if i < len(OBJECTS)]
  grounds = [CLASSES[i] for i in ids if i >= len(OBJECTS)]
  template = _TEMPLATES[rng.integers(len(_TEMPLATES))]
  order, extent = rng.random(2)
  if objects and grounds:
    if extent < 0.2:
      grounds = []
    elif extent < 0.25:
      objects = []
  if not objects or not grounds:
    return template.format(_listed(objects or grounds))
  if order < 0.6:
    return template.format(f"{_listed(objects)} on {_listed(grounds)}")
  if order < 0.8:
    return template.format(f"{_listed(grounds)} with {_listed(objects)}")
  names = objects + grounds
  return template.format(_listed([names[i] for i in rng.permutation(len(names))]))


class CaptionedShapes:
  """Random-access image-caption pairs for contrastive pretraining.

  Item `i` is a pure function of `(seed, i)` and is drawn when asked for, so the source is as
  long as one likes. Half the images hold one object, most others two or three, a few none.
  A caption names every class of which the image shows at least `NAMED_SHARE`; one in four,
  like text found on the web, is silent on the grounds or on the objects.
  """

  def __init__(self, seed: int = 0, length: int = 10_000_000):
    """`seed` is at least 0; `length` is the number of items, and costs nothing."""
    self._seed, self._length = seed, length

  def __len__(self) -> int:
    return self._length

  def __getitem__(self, index: int) -> dict[str, np.ndarray | str]:
    """`{"image": uint8[64, 64, 3] RGB, "caption": str}`; IndexError outside the source."""
    image, _, caption = self._draw(int(index))
    return {"image": image, "caption": caption}

  def _draw(self, index):
    """Image, label map and caption of one item; the label map is for tests only."""
    if not 0 <= index < self._length:
      raise IndexError(f"item {index} of a source of {self._length} items")
    rng = np.random.default_rng((self._seed, index))
    count = np.searchsorted((0.06, 0.56, 0.8), rng.random())  # none, one, two or three
    object_ids = rng.permutation(len(OBJECTS))[:count]
    image, label = _compose(
      rng, VIEW_SIZE, VIEW_SIZE, object_ids, _random_grounds(rng, 0.3), VIEW_DIAMETER
    )
    return image, label, _caption(rng, visible_classes(label))


def single_object_images(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
  """Images of one object on one ground, for zero-shot classification of the 24 objects.

  Args:
    n: the number of images; every class occurs `n // 24` times or once more.
    seed: at least 0; the same seed gives the same images.

  Returns:
    Images, uint8[n, 64, 64, 3] RGB, and class ids, int32[n], in shuffled order.
  """
  rng = np.random.default_rng(seed)
  class_ids = rng.permutation(np.arange(n, dtype=np.int32) % len(OBJECTS))
  images = np.empty((n, VIEW_SIZE, VIEW_SIZE, 3), np.uint8)
  for i, class_id in enumerate(class_ids):
    grounds = _random_grounds(rng, split_chance=0)
    images[i], _ = _compose(rng, VIEW_SIZE, VIEW_SIZE, [class_id], grounds, VIEW_DIAMETER)
  return images, class_ids


# ---------------------------------------------------------------- scenes on disk

_SCENE_SIZES = ((96, 96), (96, 128), (128, 96))  # height, width in pixels

# Numbers of objects in a scene and their diameters in pixels, least and greatest. "shapes" is
# trained on; "crowds" are many small objects, which a model has not met.
WORLDS = {"shapes": ((3, 6), (22, 44)), "crowds": ((6, 12), (16, 26))}


@dataclasses.dataclass
class ShapesConfig(tfds.core.BuilderConfig):
  """Which scenes to write, how many, and from which seed.

  The name is made of all this, so data written for other numbers lie in another folder
  and are never taken for these.
  """

  name: str = ""
  world: str = "shapes"  # a key of WORLDS
  num_train: int = 1600
  num_val: int = 120
  seed: int = 0

  def __post_init__(self):
    world = "" if self.world == "shapes" else f"{self.world}_"
    self.name = f"{world}train{self.num_train}_val{self.num_val}_seed{self.seed}"


def _scene(config, split, index):
  """Image and label map of scene `index` of a split, a pure function of its arguments."""
  objects, diameter = WORLDS[config.world]
  rng = np.random.default_rng((config.seed, ("train", "val").index(split), index))
  height, width = _SCENE_SIZES[rng.integers(len(_SCENE_SIZES))]
  object_ids = rng.integers(len(OBJECTS), size=rng.integers(*objects, endpoint=True))
  # The first object is never left out and the first ground hardly ever hidden. Taking them
  # in turn puts every class into every split of 24 scenes or more.
  object_ids[0] = index % len(OBJECTS)
  ground_ids = _random_grounds(rng)
  turn = len(OBJECTS) + index % len(GROUNDS)
  ground_ids = [turn, *(g for g in ground_ids[1:] if g != turn)]
  return _compose(rng, height, width, object_ids, ground_ids, diameter)


def _encoded(array, **options):
  """The file, as bytes, of an image uint8[H, W, 3] or [H, W]."""
  # TFDS encodes arrays by TensorFlow, which is not required here, but takes bytes as they are.
  file = io.BytesIO()
  Image.fromarray(array).save(file, **options)
  return file.getvalue()


class Shapes(tfds.core.GeneratorBasedBuilder):
  """Scenes of a world, short side 96 pixels, in splits "train" and "val".

  Both splits hold all of `CLASSES`, seen and unseen; hiding the unseen from training is the
  input pipeline's task. Features: `image`, a JPEG; `label`, a lossless map of class ids
  with one channel; `id`.
  """

  VERSION = tfds.core.Version("1.0.0")
  BUILDER_CONFIGS = [ShapesConfig()]  # noqa: RUF012 (a list is what TFDS asks for)
  # TFDS would look this up by importlib_resources, which it uses but does not install.
  code_path = pathlib.Path(__file__)

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
      builder=self,
      description="Procedurally drawn objects on textured grounds, every pixel labelled.",
      features=tfds.features.FeaturesDict(
        {
          "image": tfds.features.Image(shape=(None, None, 3), encoding_format="jpeg"),
          "label": tfds.features.Image(
            shape=(None, None, 1), dtype=np.uint8, encoding_format="png"
          ),
          "id": tfds.features.Text(),
        }
      ),
    )

  def _split_generators(self, dl_manager):
    del dl_manager  # nothing is downloaded
    config = self.builder_config
    return {
      "train": self._generate_examples("train", config.num_train),
      "val": self._generate_examples("val", config.num_val),
    }

  def _generate_examples(self, split, count):
    # disable=None: no bar where stderr is not a terminal.
    for i in tqdm.tqdm(range(count), desc=f"drawing {split}", unit="scene", disable=None):
      image, label = _scene(self.builder_config, split, i)
      name = f"{split}_{i:05d}"
      yield (
        name,
        {
          "image": _encoded(image, format="JPEG", quality=95, subsampling=0),
          "label": _encoded(label, format="PNG"),
          "id": name,
        },
      )


def _builder(data_dir, config):
  """The builder for a config, which need not be a registered one."""
  # TFDS takes a config of a registered name only if it is the registered object.
  config = Shapes.builder_configs.get(config.name, config)
  return Shapes(data_dir=data_dir, config=config, file_format="array_record")


def _folder(data_dir, config):
  """Where TFDS keeps the scenes; asking a builder would fail if they are damaged."""
  return pathlib.Path(data_dir) / Shapes.name / config.name / str(Shapes.VERSION)


def _is_complete(folder, config):
  """Whether every split of the configured size is in `folder` in full."""
  expected = {"train": config.num_train, "val": config.num_val}
  try:
    splits = tfds.builder_from_directory(folder).info.splits
    counts = {name: split.num_examples for name, split in splits.items()}
    files = [path for split in splits.values() for path in split.filepaths]
  except Exception:  # TFDS fails in many ways on a damaged folder
    return False
  return counts == expected and all(pathlib.Path(path).is_file() for path in files)


@contextlib.contextmanager
def _quiet():
  """Keeps TFDS from printing and from drawing bars of its own."""
  verbosity = logging.get_verbosity()
  logging.set_verbosity(logging.ERROR)
  tfds.disable_progress_bar()
  try:
    with contextlib.redirect_stdout(io.StringIO()):
      yield
  finally:
    tfds.enable_progress_bar()
    logging.set_verbosity(verbosity)


def prepare(data_dir: str | pathlib.Path, config: ShapesConfig | None = None) -> pathlib.Path:
  """Writes the scenes below `data_dir` unless they are there, and returns their folder.

  Takes some seconds the first time and shows a bar on a terminal. A folder that an earlier
  attempt left half written is replaced.

  Args:
    data_dir: the root of all data sets; made if missing.
    config: how many scenes and which seed; by default 1600 for training and 120 for
      validation.

  Raises:
    InputError: `data_dir` cannot be written to.
  """
  config = config or ShapesConfig()
  folder = _folder(data_dir, config)
  try:
    with _quiet():
      if not _is_complete(folder, config):
        if folder.exists():
          shutil.rmtree(folder)  # else TFDS takes whatever it holds for the whole
        folder.parent.mkdir(parents=True, exist_ok=True)
        _builder(data_dir, config).download_and_prepare()
  except OSError as error:
    # Another run may have written the same scenes meanwhile; they are the same to the bit.
    if _is_complete(folder, config):
      return folder
    raise InputError(
      f"expected a folder to write scenes to, got {data_dir!s} ({error}); "
      "choose a data_dir that is writable and has a few MiB of room"
    ) from error
  return folder


class _Scenes:
  """A TFDS data source with plain values; see `source`. Random access, fit for grain."""

  def __init__(self, records):
    self._records = records

  def __len__(self) -> int:
    return len(self._records)

  def __getitem__(self, index: int) -> dict[str, np.ndarray | str]:
    if not 0 <= index < len(self):  # array_record raises ValueError, which breaks iteration
      raise IndexError(f"scene {index} of a source of {len(self)} scenes")
    record = self._records[index]
    return {
      "image": record["image"],
      "label": record["label"][..., 0],
      "id": record["id"].decode(),
    }


def source(data_dir: str | pathlib.Path, split: str, config: ShapesConfig | None = None) -> _Scenes:
  """Random access to the scenes that `prepare` wrote below `data_dir`.

  Args:
    data_dir: the same root as given to `prepare`.
    split: "train" or "val", or a TFDS slice such as "train[:10%]".
    config: the same as given to `prepare`.

  Returns:
    A sequence of `{"image": uint8[H, W, 3] RGB, "label": uint8[H, W], "id": str}`, the
    label holding indices into `CLASSES`.

  Raises:
    InputError: the scenes are not there, or there is no such split.
  """
  config = config or ShapesConfig()
  folder = _folder(data_dir, config)
  with _quiet():
    if not _is_complete(folder, config):
      raise InputError(
        f"expected prepared scenes, got none or a part in {folder}; "
        "run data_pipelines.shapes.prepare first"
      )
    try:
      return _Scenes(tfds.builder_from_directory(folder).as_data_source(split=split))
    except ValueError as error:
      raise InputError(
        f'expected split "train" or "val" or a slice of one, got {split!r} for '
        f"{folder} ({error}); correct the name"
      ) from error
