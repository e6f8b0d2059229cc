"""From the raw files of a data set to checked records: the base class of all builders.

A builder lists its raw files (`examples`) and says how their labels are read; reading images,
checks and storage are the same for all. A record holds the image file, the label map in the *raw*
numbering of the set's label files, so that one prepared set serves every way of counting its
classes, and an id.
"""

import abc
import dataclasses
import functools
import io
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from data_pipelines import vocabularies
from data_pipelines.sources.files import COLORS_REMEDY, Colors, read_index_image
from rpn_jax.base import pictures
from rpn_jax.base.colors import Note
from rpn_jax.base.errors import InputError

# What `prepare` can be told of raw files besides where they are.
OPTIONS = ("values", "background")
_LISTED = 5  # of files in a message


class Painted(NamedTuple):
  """A label map that annotations were painted on.

  Attributes:
    label: uint8 or uint16 [H,W].
    empty: number of annotations that no pixel's center is in.
  """

  label: np.ndarray
  empty: int


@dataclasses.dataclass(frozen=True)
class RawExample:
  """One image and its label, not yet read.

  Attributes:
    id: unique within the split.
    image: the image file.
    label: the file that holds the label; errors name it.
    read_label: () -> uint8 or uint16 [H,W] in the raw numbering, or `Painted`; None reads `label`
      as an image file of ids (gray or palette).
    read_image: () -> bytes of an image file; None reads `image`.
  """

  id: str
  image: pathlib.Path
  label: pathlib.Path
  read_label: Callable[[], np.ndarray | Painted] | None = None
  read_image: Callable[[], bytes] | None = None


class SegmentationBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """A data set of images and label maps whose raw files the user has.

  Subclasses set the attributes and implement `examples`.

  Attributes:
    name: for `prepare`; by default the name of the class in snake_case.
    title: the set's name in print.
    vocabulary: the registered set whose raw ids may occur in the labels; by default `name`.
    own_classes: the class names come with the raw files: `examples` sets `classes`, and every
      folder of raw files is prepared under a name of its own. Color profiles of images count.
    names_from: where the names of such classes stand, for messages.
    class_files: the files, besides labels, that say which class a label is; edits of them are
      noticed. `examples` sets it; there may be no such file.
    options: those of `OPTIONS` that the builder takes.
    values: the mask value of every name, as given to `prepare`; None for positions.
    background: the class of pixels without annotation, as given to `prepare`; None for no class.
    allow_partial: whether what lacks its image or its label is left out, as given to `prepare`.
    counts: published number of examples per split.
    obtain: where people get the raw files, by name of the page.
    license: one line.
    raw_size: disk space of the raw files, as text.
    layout: the files expected below the manual directory, one per line.
    raw_ids: the values of label files but that of no class; None: those that are classes, or all
      where others are ignored.
    wide: labels need more than eight bits.
    by_color: masks are read by their colors, not by values; after `examples`.
    colors_remedy: what to do about a label image of colors, for the message.
  """

  VERSION = tfds.core.Version("1.0.0")
  MANUAL_DOWNLOAD_INSTRUCTIONS = "Give the folder of the raw files; `layout` and `obtain` say more."
  title: str
  vocabulary: str = ""
  own_classes: bool = False
  names_from: str = "names.txt"
  class_files: Sequence[pathlib.Path] = ()
  options: tuple[str, ...] = ()
  values: tuple[int, ...] | None = None
  background: str | None = None
  allow_partial: bool = False
  counts: dict[str, int]
  obtain: str
  license: str
  raw_size: str
  layout: str
  raw_ids: Sequence[int] | None = None
  wide: bool = False
  by_color: bool = False
  colors_remedy: str = COLORS_REMEDY

  def __init_subclass__(cls, **kwargs):
    # TFDS's own table of data sets is not used, and would refuse a class that is defined twice.
    super().__init_subclass__(skip_registration=True, **kwargs)
    # TFDS would look the file up by importlib_resources, which it uses but does not install.
    file = getattr(sys.modules[cls.__module__], "__file__", None)  # none in a notebook
    cls.code_path = pathlib.Path(file or ".")

  @abc.abstractmethod
  def examples(self, manual_dir: pathlib.Path) -> dict[str, list[RawExample]]:
    """Split -> raw files in a fixed order. Opens index files only.

    Raises:
      InputError: a file or folder is missing; says which, where it belongs and where to get it.
    """

  @functools.cached_property
  def classes(self) -> vocabularies.Vocabulary:
    """The classes of the labels."""
    return vocabularies.load(self.vocabulary or self.name)

  def allowed(self) -> np.ndarray | None:
    """bool [65536], the label values that may occur; None allows all."""
    if self.raw_ids is None and self.classes.unlisted == "ignore":
      return None
    table = np.zeros(65536, bool)
    table[[*(self.raw_ids or self.classes.ids), self.classes.ignore]] = True
    return table

  def wrong_values_remedy(self, values: np.ndarray) -> str:
    """What to do about a label file with these values, some of which are not allowed."""
    del values
    return f"check that the file belongs to {self.title}"

  def adjust(self, image: np.ndarray, label: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """A change of image and label on the way in, such as a smaller size; None for no change.

    Args:
      image: uint8 [H,W,3].
      label: uint8 or uint16 [H,W].
    """
    del image, label
    return None

  def leave_out(self, missing: Sequence[str]) -> None:
    """Images that have a label, or labels of images, that are not there.

    Args:
      missing: a line for each, of what was expected and got.

    Raises:
      InputError: there are some, and `allow_partial` is not given.
    """
    if not missing:
      return
    more = f"; the same for {len(missing) - 1} more" if len(missing) > 1 else ""
    others = [line.partition(": ")[0] for line in missing[1:_LISTED]]
    more += f": {', '.join(others)}{', …' * (len(missing) > _LISTED)}" if others else ""
    if not self.allow_partial:
      raise InputError(f"{missing[0]}; {self.obtain}; --allow_partial takes what is there{more}")
    print(f"left out: {missing[0]}{more}", flush=True)

  def read(self, raw: RawExample) -> dict:
    """The record of one raw example.

    Returns:
      {"image": bytes of a JPEG or PNG file, "label": uint8 or uint16 [H,W], "id": str, "exif": what
      was done with an image that its EXIF data turns or mirrors, see `_read_image`, "empty": see
      `Painted`}.

    Raises:
      InputError: an unreadable file, an image and a label of two sizes, a label out of range.
    """
    label_HxW, empty = self._read_label(raw)
    image_HxWx3, encoded, exif, notes = _read_image(
      raw, label_HxW.shape, self.obtain, self.own_classes
    )
    self._told(raw.image, notes)
    height, width = image_HxWx3.shape[:2]
    if (height, width) != label_HxW.shape:
      raise InputError(
        f"{raw.label}: expected a label of its image's size, {width}x{height} as in {raw.image}, "
        f"got {label_HxW.shape[1]}x{label_HxW.shape[0]}; check that the two belong together"
      )
    adjusted = self.adjust(image_HxWx3, label_HxW)
    if adjusted is not None:
      image_HxWx3, label_HxW = adjusted
      encoded = _png(image_HxWx3, level=3)
    return {"image": encoded, "label": label_HxW, "id": raw.id, "exif": exif, "empty": empty}

  def _read_label(self, raw: RawExample) -> Painted:
    empty = 0
    try:
      if raw.read_label is None:
        label_HxW = read_index_image(raw.label, self._colors, self.colors_remedy)
      else:
        label_HxW = raw.read_label()
        if isinstance(label_HxW, Painted):
          label_HxW, empty = label_HxW
    except FileNotFoundError as error:
      raise InputError(
        f"{raw.label}: expected the label of {raw.image}, got no such file; {self.obtain}"
      ) from error
    except InputError:
      raise
    except Exception as error:  # damage surfaces as a dozen kinds
      raise InputError(
        f"{raw.label}: expected a readable label file, got {pictures.damage(error)}; replace it"
      ) from error
    allowed = self._allowed_values
    if allowed is not None and not allowed[label_HxW].all():
      values = np.unique(label_HxW)
      wrong = values[~allowed[values]]
      raise InputError(
        f"{raw.label}: expected label values {_spans(np.flatnonzero(allowed))}, got "
        f"{', '.join(map(str, wrong[:5]))} on {int((~allowed[label_HxW]).sum())} pixels; "
        f"{self.wrong_values_remedy(values)}"
      )
    return Painted(label_HxW if self.wide else label_HxW.astype(np.uint8), empty)

  @functools.cached_property
  def _told(self) -> pictures.Told:
    return pictures.Told()

  @functools.cached_property
  def _colors(self) -> Colors:
    return Colors()

  @functools.cached_property
  def _allowed_values(self) -> np.ndarray | None:
    return self.allowed()

  def encode(self, record: dict) -> dict:
    """A record as the features store it: eight-bit labels as PNG, wider ones as they are."""
    label = record["label"]
    label = label.astype(np.uint16) if self.wide else _png(label)
    return {"image": record["image"], "label": label, "id": record["id"]}

  def _info(self) -> tfds.core.DatasetInfo:
    # TFDS reads uint16 images by OpenCV only; its compressed tensors need neither.
    wide = tfds.features.Tensor(shape=(None, None), dtype=np.uint16, encoding="zlib")
    narrow = tfds.features.Image(shape=(None, None, 1), dtype=np.uint8, encoding_format="png")
    features = {
      "image": tfds.features.Image(shape=(None, None, 3)),
      "label": wide if self.wide else narrow,
      "id": tfds.features.Text(),
    }
    return tfds.core.DatasetInfo(
      builder=self,
      description=f"{self.title}: images and label maps in the numbering of its raw files.",
      features=tfds.features.FeaturesDict(features),
    )

  def _split_generators(self, dl_manager):
    splits = self.examples(pathlib.Path(dl_manager.manual_dir))
    return {split: self._generate_examples(raws) for split, raws in splits.items()}

  def _generate_examples(self, raws: Sequence[RawExample]):
    for raw in raws:
      yield raw.id, self.encode(self.read(raw))


def _read_image(
  raw: RawExample, label_size: tuple[int, int], obtain: str, own: bool
) -> tuple[np.ndarray, bytes, str, tuple[Note, ...]]:
  """An image, a file of it that every decoder reads alike, and what was done about it.

  People who draw masks see the image upright, as its EXIF data says, and so do networks that
  predict on it. A mask of the size that only the stored pixels have was made from those. ICC
  profiles count in images of one's own, as in prediction, and not in published sets, whose scores
  were measured on the stored values.

  Returns:
    uint8 [H,W,3]; bytes; "upright", "stored", or "" for an image that no EXIF data turns; notes.
  """
  path = raw.image
  try:
    data = path.read_bytes() if raw.read_image is None else raw.read_image()
  except FileNotFoundError as error:
    raise InputError(f"{path}: expected an image, got no such file; {obtain}") from error
  except OSError as error:
    raise InputError(f"{path}: expected a readable image, got {pictures.damage(error)}") from error
  read = functools.partial(pictures.load, profiles=own, name=path)
  picture = read(io.BytesIO(data))
  exif = "upright" if picture.orientation in range(2, 9) else ""
  if exif and picture.image.shape[:2] != label_size == picture.stored_size:
    exif, picture = "stored", read(io.BytesIO(data), upright=False)
  kind = (picture.format, picture.mode)
  portable = kind in (("JPEG", "RGB"), ("JPEG", "L"), ("PNG", "RGB")) and not picture.notes
  # Some decoders turn by EXIF, others do not: no file with such data is stored.
  encoded = data if portable and picture.orientation == 1 else _png(picture.image, level=3)
  return picture.image, encoded, exif, picture.notes


def _png(array: np.ndarray, level: int = 6) -> bytes:
  """A lossless file of an RGB image or of a label of eight bits."""
  file = io.BytesIO()
  Image.fromarray(array).save(file, "PNG", compress_level=level)
  return file.getvalue()


def _spans(values: np.ndarray) -> str:
  """`0…20, 255` for the sorted integers 0 to 20 and 255."""
  runs = np.split(values, np.flatnonzero(np.diff(values) > 1) + 1)
  return ", ".join(str(r[0]) if len(r) == 1 else f"{r[0]}…{r[-1]}" for r in runs)
