"""Drawn images with words: captions to pre-train CLIP on, single objects to classify."""

import numpy as np

from data_pipelines.shapes.world import CLASSES, OBJECTS, compose, random_grounds

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
  """Ids of the classes on at least `share` of the pixels of a label map, in ascending order."""
  counts = np.bincount(label.ravel(), minlength=len(CLASSES))
  return np.flatnonzero(counts >= share * label.size).tolist()


def _listed(names):
  """["a", "b", "c"] -> "a, b and c"."""
  return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def _caption(rng, class_ids):
  """A sentence about the classes in random order; some leave out the grounds or the objects."""
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
  """Random-access image-caption pairs for contrastive pre-training.

  Item i is a pure function of (seed, i), drawn on access, so that any length is free. Half the
  images show one object, most others two or three, a few none. A caption names every class on at
  least `NAMED_SHARE` of the pixels; one in four, like text on the web, leaves out the grounds or
  the objects.
  """

  def __init__(self, seed: int = 0, length: int = 10_000_000):
    """A source of `length` items; `seed` is 0 or more."""
    self._seed, self._length = seed, length

  def __len__(self) -> int:
    return self._length

  def __getitem__(self, index: int) -> dict[str, np.ndarray | str]:
    """{"image": uint8 [64,64,3] in RGB, "caption": str}; IndexError outside the source."""
    image, _, caption = self._draw(int(index))
    return {"image": image, "caption": caption}

  def _draw(self, index):
    """Image, label map and caption of one item; the label map is for tests only."""
    if not 0 <= index < self._length:
      raise IndexError(f"item {index} of a source of {self._length} items")
    rng = np.random.default_rng((self._seed, index))
    count = np.searchsorted((0.06, 0.56, 0.8), rng.random())  # none, one, two or three
    object_ids = rng.permutation(len(OBJECTS))[:count]
    image, label = compose(
      rng, VIEW_SIZE, VIEW_SIZE, object_ids, random_grounds(rng, 0.3), VIEW_DIAMETER
    )
    return image, label, _caption(rng, visible_classes(label))


def single_object_images(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
  """Images of one object on one ground, for zero-shot classification of the 24 objects.

  Args:
    n: number of images; every class occurs n // 24 times or once more.
    seed: 0 or more; the same seed gives the same images.

  Returns:
    Images, uint8 [n,64,64,3] in RGB, and class ids, int32 [n], in shuffled order.
  """
  rng = np.random.default_rng(seed)
  class_ids = rng.permutation(np.arange(n, dtype=np.int32) % len(OBJECTS))
  images = np.empty((n, VIEW_SIZE, VIEW_SIZE, 3), np.uint8)
  for i, class_id in enumerate(class_ids):
    grounds = random_grounds(rng, split_chance=0)
    images[i], _ = compose(rng, VIEW_SIZE, VIEW_SIZE, [class_id], grounds, VIEW_DIAMETER)
  return images, class_ids
