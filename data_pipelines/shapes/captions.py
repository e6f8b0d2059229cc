"""Drawn images with words: captions to pre-train CLIP on, single objects to classify."""

import dataclasses

import numpy as np

from data_pipelines.shapes.world import CLASSES, OBJECTS, compose, random_grounds

VIEW_SIZE = 64  # height and width in pixels of images unless another size is asked for


@dataclasses.dataclass(frozen=True)
class Kind:
  """What captioned images of a kind show, and what their captions name.

  Attributes:
    fewest: objects in an image, at least.
    shares: of the images with so many objects, and with up to one, two … more; the last, 1, is left
      out.
    diameter: smallest and largest diameter of an object, pixels.
    named: a caption names the classes that show on at least this share of the pixels.
    all_objects: whether every caption names all objects; else some name the grounds only.
  """

  fewest: int
  shares: tuple[float, ...]
  diameter: tuple[float, float]
  named: float
  all_objects: bool


KINDS = {
  # Diameters wider than in scenes, so that a model meets every scale.
  "views": Kind(0, (0.06, 0.56, 0.8), (20, 56), 0.02, False),
  # Three to eight objects, all as likely. The least that can be seen of one, with a diameter of 18
  # and a third hidden, is more than half a percent of 96 x 96 pixels.
  "crowded": Kind(3, (1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6), (18, 36), 0.005, True),
}

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


def visible_classes(label: np.ndarray, share: float = KINDS["views"].named) -> list[int]:
  """Ids of the classes on at least `share` of the pixels of a label map, in ascending order."""
  counts = np.bincount(label.ravel(), minlength=len(CLASSES))
  return np.flatnonzero(counts >= share * label.size).tolist()


def _listed(names):
  """["a", "b", "c"] -> "a, b and c"."""
  return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def _caption(rng, class_ids, all_objects=False):
  """A sentence about the classes in random order; some leave out the grounds or, unless they name
  `all_objects`, the objects."""
  ids = rng.permutation(class_ids)
  article = _ARTICLES[rng.integers(len(_ARTICLES))]
  objects = [article + CLASSES[i] for i in ids if i < len(OBJECTS)]
  grounds = [CLASSES[i] for i in ids if i >= len(OBJECTS)]
  template = _TEMPLATES[rng.integers(len(_TEMPLATES))]
  order, extent = rng.random(2)
  if objects and grounds:
    if extent < 0.2:
      grounds = []
    elif extent < 0.25 and not all_objects:
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
  """Random-access image-caption pairs for contrastive pre-training.

  Item i is a pure function of (seed, i), drawn on access, so that any length is free. Of the kind
  "views" half the images show one object, most others two or three, a few none, and one caption in
  four, like text on the web, leaves out the grounds or the objects. Of the kind "crowded" they show
  three to eight objects, unless there is no room, and captions name all of them; one in five leaves
  out the grounds.
  """

  def __init__(
    self, seed: int = 0, length: int = 10_000_000, kind: str = "views", size: int = VIEW_SIZE
  ):
    """A source of `length` items; `seed` is 0 or more, `kind` a key of KINDS, `size` in pixels."""
    self._seed, self._length, self._kind, self._size = seed, length, KINDS[kind], size

  def __len__(self) -> int:
    return self._length

  def __getitem__(self, index: int) -> dict[str, np.ndarray | str]:
    """{"image": uint8 [size,size,3] in RGB, "caption": str}; IndexError outside the source."""
    image, _, caption = self._draw(int(index))
    return {"image": image, "caption": caption}

  def _draw(self, index):
    """Image, label map and caption of one item; the label map is for tests only."""
    if not 0 <= index < self._length:
      raise IndexError(f"item {index} of a source of {self._length} items")
    rng, kind, size = np.random.default_rng((self._seed, index)), self._kind, self._size
    count = kind.fewest + np.searchsorted(kind.shares, rng.random())
    object_ids = rng.permutation(len(OBJECTS))[:count]
    grounds = random_grounds(rng, 0.3)
    image, label = compose(rng, size, size, object_ids, grounds, kind.diameter)
    return image, label, _caption(rng, visible_classes(label, kind.named), kind.all_objects)


def single_object_images(
  n: int, seed: int, kind: str = "views", size: int = VIEW_SIZE
) -> tuple[np.ndarray, np.ndarray]:
  """Images of one object on one ground, for zero-shot classification of the 24 objects.

  Args:
    n: number of images; every class occurs n // 24 times or once more.
    seed: 0 or more; the same seed gives the same images.
    kind: a key of KINDS, whose diameters the objects have.
    size: height and width, pixels.

  Returns:
    Images, uint8 [n,size,size,3] in RGB, and class ids, int32 [n], in shuffled order.
  """
  rng = np.random.default_rng(seed)
  class_ids = rng.permutation(np.arange(n, dtype=np.int32) % len(OBJECTS))
  images = np.empty((n, size, size, 3), np.uint8)
  for i, class_id in enumerate(class_ids):
    grounds = random_grounds(rng, split_chance=0)
    images[i], _ = compose(rng, size, size, [class_id], grounds, KINDS[kind].diameter)
  return images, class_ids
