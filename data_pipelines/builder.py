"""What the builders of the benchmark data sets share: from raw files to checked records.

A builder lists its raw files (`examples`) and reads their labels; images, checks and storage are
the same for all. A record holds the image file, the label map in the *raw* numbering of the set's
vocabulary, so that one prepared set serves every way of counting its classes, and an id.
"""

import abc
import dataclasses
import io
import pathlib
from collections.abc import Callable, Sequence

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image, ImageOps

from data_pipelines import vocabularies
from rpn_jax.base.errors import InputError
from rpn_jax.base.pixels import check_size

_ORIENTATION = 0x0112  # EXIF tag


@dataclasses.dataclass(frozen=True)
class RawExample:
  """One image and its label, not yet read.

  Attributes:
    id: unique within the split.
    image: the picture file.
    label: the file that holds the label; errors name it.
    read_label: () -> uint8 or uint16 [H,W] in the vocabulary's raw numbering; None reads `label`
      as a picture file of ids (grey or palette).
  """

  id: str
  image: pathlib.Path
  label: pathlib.Path
  read_label: Callable[[], np.ndarray] | None = None


class SegmentationBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """A data set of images and label maps whose raw files the user has.

  Subclasses set the attributes and implement `examples`.

  Attributes:
    title: the set's name in print.
    vocabulary: name for `vocabularies.load`; its raw ids are the allowed label values.
    counts: published number of examples per split.
    obtain: where people get the raw files, by name of the page.
    licence: one line.
    raw_size: disk room of the raw files, as text.
    layout: the files expected below the manual directory, one per line.
    wide: labels need more than eight bits.
  """

  VERSION = tfds.core.Version("1.0.0")
  MANUAL_DOWNLOAD_INSTRUCTIONS = "Give the folder of the raw files; `layout` and `obtain` say more."
  title: str
  vocabulary: str
  counts: dict[str, int]
  obtain: str
  licence: str
  raw_size: str
  layout: str
  wide: bool = False

  @abc.abstractmethod
  def examples(self, manual_dir: pathlib.Path) -> dict[str, list[RawExample]]:
    """Split -> raw files in a fixed order. Opens index files only.

    Raises:
      InputError: a file or folder is missing; says which, where it belongs and where to get it.
    """

  def allowed(self) -> np.ndarray | None:
    """bool [65536], the label values that may occur; None allows all."""
    vocabulary = vocabularies.load(self.vocabulary)
    if vocabulary.unlisted == "ignore":
      return None
    table = np.zeros(65536, bool)
    table[[*vocabulary.ids, vocabulary.ignore]] = True
    return table

  def adjust(self, image: Image.Image, label: np.ndarray) -> tuple[Image.Image, np.ndarray] | None:
    """A change of both on the way in, such as a smaller size; None keeps the image file as is."""
    del image, label
    return None

  def read(self, raw: RawExample) -> dict:
    """The record of one raw example: image bytes, label uint8 or uint16 [H,W], id.

    Raises:
      InputError: an unreadable file, an image and a label of two sizes, a label out of range.
    """
    label = self._read_label(raw)
    image, encoded = _read_image(raw.image, label.shape, self.obtain)
    if (image.height, image.width) != label.shape:
      raise InputError(
        f"{raw.label}: expected a label of its image's size, {image.width}x{image.height} as in "
        f"{raw.image}, got {label.shape[1]}x{label.shape[0]}; check that the two belong together"
      )
    adjusted = self.adjust(image, label)
    if adjusted is not None:
      image, label = adjusted
      encoded = _encode(image)
    return {"image": encoded, "label": label, "id": raw.id}

  def _read_label(self, raw: RawExample) -> np.ndarray:
    try:
      label = read_index_image(raw.label) if raw.read_label is None else raw.read_label()
    except FileNotFoundError as error:
      raise InputError(
        f"{raw.label}: expected the label of {raw.image}, got no such file; {self.obtain}"
      ) from error
    except Exception as error:  # damage surfaces as a dozen kinds
      if isinstance(error, InputError):
        raise
      raise InputError(
        f"{raw.label}: expected a readable label file, got {_short(error)}; fetch it again"
      ) from error
    allowed = self.allowed_values
    if allowed is not None and not allowed[label].all():
      wrong = np.unique(label[~allowed[label]])
      listed = np.flatnonzero(allowed)
      raise InputError(
        f"{raw.label}: expected label values {_spans(listed)}, got "
        f"{', '.join(map(str, wrong[:5]))} on {int((~allowed[label]).sum())} pixels; check that "
        f"the file belongs to {self.title}"
      )
    return label if self.wide else label.astype(np.uint8)

  @property
  def allowed_values(self) -> np.ndarray | None:
    if not hasattr(self, "_allowed"):
      self._allowed = self.allowed()
    return self._allowed

  def encode(self, record: dict) -> dict:
    """A record as the features store it: eight-bit labels as PNG, wider ones as they are."""
    if self.wide:
      return {**record, "label": record["label"].astype(np.uint16)}
    file = io.BytesIO()
    Image.fromarray(record["label"]).save(file, "PNG")
    return {**record, "label": file.getvalue()}

  def _info(self) -> tfds.core.DatasetInfo:
    # TFDS reads uint16 pictures by OpenCV only; its compressed tensors need neither.
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


def read_index_image(path: pathlib.Path) -> np.ndarray:
  """A picture file whose pixels are ids, uint8 or uint16 [H,W]; palettes give their indices.

  Raises:
    InputError: a colour picture.
  """
  with Image.open(path) as file:
    check_size(path, file.size)
    if file.mode not in ("L", "P", "1", "I;16", "I;16B", "I"):
      raise InputError(
        f"{path}: expected a label picture of one channel (grey or palette), got mode "
        f"{file.mode}; store class ids, not colours"
      )
    label = np.array(file)
  if label.dtype == np.int32 and (label.min(initial=0) < 0 or label.max(initial=0) > 65535):
    raise InputError(f"{path}: expected ids 0…65535, got {label.min()}…{label.max()}")
  return label.astype(np.uint8 if label.dtype in (np.uint8, bool) else np.uint16)


def need(path: pathlib.Path, what: str, obtain: str) -> pathlib.Path:
  """The path, if it is there.

  Raises:
    InputError: it is not; names it, what it is for and where to get it.
  """
  if not path.exists():
    raise InputError(f"{path}: expected {what}, got no such file or folder; {obtain}")
  return path


def listed(
  folder: pathlib.Path, suffixes: Sequence[str], what: str, obtain: str
) -> list[pathlib.Path]:
  """The folder's files with one of the (lower-case) suffixes, sorted by name.

  Raises:
    InputError: no such folder, or none of these files in it.
  """
  need(folder, what, obtain)
  files = sorted(p for p in folder.iterdir() if p.suffix.lower() in suffixes)
  if not files:
    raise InputError(f"{folder}: expected {what}, got no {' or '.join(suffixes)} file; {obtain}")
  return files


def _read_image(
  path: pathlib.Path, label_size: tuple[int, int], obtain: str
) -> tuple[Image.Image, bytes]:
  """The decoded RGB picture and a file of it that every decoder reads alike.

  Masks are drawn on the stored pixels or on the turned ones, depending on who made them: an EXIF
  rotation is followed only where the label's size asks for it.
  """
  try:
    data = path.read_bytes()
    with Image.open(io.BytesIO(data)) as file:
      check_size(path, file.size)
      mode, kind = file.mode, file.format
      turned = file.getexif().get(_ORIENTATION, 1) != 1
      file.load()  # a truncated file fails here
      image = file
      if turned and (file.height, file.width) != label_size:
        image = ImageOps.exif_transpose(file)
      image = image.convert("RGB")
  except FileNotFoundError as error:
    raise InputError(f"{path}: expected a picture, got no such file; {obtain}") from error
  except Exception as error:  # damage surfaces as a dozen kinds
    if isinstance(error, InputError):
      raise
    raise InputError(
      f"{path}: expected a readable picture, got {_short(error)}; fetch the file again"
    ) from error
  as_is = (kind == "JPEG" and mode in ("RGB", "L")) or (kind == "PNG" and mode == "RGB")
  # Some decoders turn by EXIF, others do not: no turned file is stored.
  return image, data if as_is and not turned else _encode(image)


def _encode(image: Image.Image) -> bytes:
  """A lossless file of an RGB picture."""
  file = io.BytesIO()
  image.save(file, "PNG", compress_level=3)
  return file.getvalue()


def _short(error: Exception) -> str:
  return f"{type(error).__name__} ({' '.join(str(error).split())})"


def _spans(values: np.ndarray) -> str:
  """`0…20, 255` for the sorted integers 0 to 20 and 255."""
  runs = np.split(values, np.flatnonzero(np.diff(values) > 1) + 1)
  return ", ".join(str(r[0]) if len(r) == 1 else f"{r[0]}…{r[-1]}" for r in runs)
