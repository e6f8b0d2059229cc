"""Batches for training and single examples for evaluation, on grain's random-access data sets.

A source is any object with `len(source)` and `source[i]` that yields
`{'image': uint8 [H,W,3], 'label': uint8 or uint16 [H,W], 'id': str}`. Image and label may also be
encoded files as bytes; they are then decoded here, as prediction does but without color profiles,
and a damaged file is named. An array of one channel is gray, one of four is taken for CMYK.
Example i of the stream depends on (seed, i) only, never on threads, workers or process count.
"""

import functools
import io
from collections.abc import Callable, Iterator
from typing import Any

import grain
import numpy as np
from PIL import Image

from data_pipelines.sources.files import check_label_format
from data_pipelines.workers import read_in_processes
from rpn_jax.base import exif, pictures
from rpn_jax.base.errors import InputError
from rpn_jax.base.pictures import check_size

Example = dict[str, Any]
_READY = 4  # batches, or examples of an evaluation, that are held ready


def check_example(example: Example, where: str = "") -> Example:
  """Decodes, converts and checks one example of a source.

  Args:
    example: as described at the top of the module.
    where: position in the source, used while the example has no id.

  Returns:
    image uint8 [H,W,3], label unsigned or signed integers [H,W] (if given), id str.

  Raises:
    InputError: an undecodable or misshapen image or label, or two that differ in size.
  """
  if "image" not in example:
    raise InputError(f"{where or 'example'}: expected keys image, label, id, got {sorted(example)}")
  name = example.get("id", where)
  name = name.decode() if isinstance(name, bytes) else str(name)
  checked = {"image": _to_rgb(_decode(example["image"], name, "image"), name), "id": name}
  if "label" in example:
    label = _decode(example["label"], name, "label")
    if label.ndim == 3 and label.shape[-1] == 1:
      label = label[..., 0]
    if label.ndim != 2 or label.dtype.kind not in "ui":
      raise InputError(
        f"example {name}: expected a label of integers [H,W], got {label.dtype} "
        f"{list(label.shape)}; store class ids, one channel"
      )
    if label.shape != checked["image"].shape[:2]:
      raise InputError(
        f"example {name}: expected label and image of one size, got label {_size(label)} and "
        f"image {_size(checked['image'])}; check that the two files belong together"
      )
    checked["label"] = label
  return checked


def _size(array: np.ndarray) -> str:
  return f"{array.shape[0]}x{array.shape[1]}"


def _decode(value, name: str, what: str) -> np.ndarray:
  """Encoded bytes -> array; arrays pass through."""
  if not isinstance(value, bytes):
    return np.asarray(value)
  try:
    if what == "image":
      return pictures.load(io.BytesIO(value), profiles=False, name=f"example {name}").image
    with Image.open(io.BytesIO(value)) as file:
      check_size(f"example {name}", file.size)
      check_label_format(f"example {name}", file)
      return np.array(exif.upright(file))
  except InputError:
    raise
  except Exception as error:  # Pillow raises a dozen kinds on damaged files
    raise InputError(
      f"example {name}: expected a readable {what} file, got {len(value)} bytes that do not "
      f"decode ({error}); fetch the file again"
    ) from error


def _to_rgb(image: np.ndarray, name: str) -> np.ndarray:
  """uint8 [H,W], [H,W,1], [H,W,3] or CMYK [H,W,4] -> uint8 [H,W,3]."""
  channels = image.shape[-1] if image.ndim == 3 else 1
  if image.dtype != np.uint8 or image.ndim not in (2, 3) or channels not in (1, 3, 4):
    raise InputError(
      f"example {name}: expected an image uint8 [H,W,3] (or gray, or CMYK), got {image.dtype} "
      f"{list(image.shape)}; convert it in the source"
    )
  if not image.size:
    raise InputError(f"example {name}: expected pixels, got an empty image {list(image.shape)}")
  if channels == 4:
    return np.array(Image.fromarray(image, "CMYK").convert("RGB"))
  if channels == 1:
    return np.repeat(image.reshape(*image.shape[:2], 1), 3, axis=2)
  return image


class _CheckedSource:
  """A source whose failures name the example."""

  def __init__(self, source):
    self.source = source

  def __len__(self) -> int:
    return len(self.source)

  def __getitem__(self, index: int) -> Example:
    where = f"number {index}"
    try:
      example = self.source[index]
    except InputError:
      raise
    # The source decodes by any library it likes: any exception means a bad record.
    except Exception as error:
      raise InputError(
        f"example {where}: expected a readable record, got {type(error).__name__}: "
        f"{' '.join(str(error).split())}; prepare the data set again"
      ) from error
    return check_example(example, where)

  def __repr__(self) -> str:
    # grain prints the source, and a list of arrays would fill the screen.
    return f"{type(self.source).__name__}({len(self)} examples)"


class _ProcessSlice:
  """One process's part of a stream: its contiguous rows of every global batch.

  Rows in place of strides make the global array of a batch the same for any number of processes,
  once each has placed its part.
  """

  def __init__(self, stream, batch_size: int, index: int, count: int):
    self.stream = stream
    self.batch_size = batch_size
    self.rows = batch_size // count
    self.offset = index * self.rows

  def __len__(self) -> int:
    return len(self.stream) // self.batch_size * self.rows

  def __getitem__(self, index: int) -> Example:
    batch, row = divmod(index, self.rows)
    return self.stream[batch * self.batch_size + self.offset + row]

  def __repr__(self) -> str:
    return f"_ProcessSlice(rows {self.offset}…{self.offset + self.rows - 1} of {self.batch_size})"


def _for_training(transform: Callable, example: Example, rng: np.random.Generator) -> Example:
  if "label" not in example:
    raise InputError(f"example {example['id']}: expected a label to train on, got none")
  example = transform(example, rng)
  return {"image": example["image"], "label": example["label"]}  # strings cannot be batched


def train_batches(
  source,
  transform: Callable[[Example, np.random.Generator], Example],
  *,
  batch_size: int,
  seed: int,
  start_step: int = 0,
  shard: tuple[int, int] = (0, 1),
  num_threads: int = 4,
  workers: int = 0,
) -> Iterator[dict[str, np.ndarray]]:
  """An endless stream of training batches, reshuffled in every epoch.

  Batch k is a function of (source, transform, seed, batch_size, k): starting at `start_step`
  continues a run exactly, with any number of threads, workers or processes. A batch may lie in two
  epochs, so that none leaves an example out.

  Args:
    source: random access, see the top of the module; picklable if workers > 0.
    transform: (example, rng) -> image and label of one fixed size, e.g. `train_transform(…)`.
    batch_size: examples per step over all processes.
    seed: of order and augmentation.
    start_step: steps already done.
    shard: (index, count) of this process.
    num_threads: threads that each build a whole batch; 0 builds in the caller's thread.
    workers: extra processes (spawned; absl flags must be parsed), which end with this one and pass
      batches through shared memory, if there is enough; 0 uses threads only.

  Returns:
    An iterator of {'image': float32 [B/count,H,W,3], 'label': int32 [B/count,H,W]}; it has
    `close()`, to be called when workers > 0.

  Raises:
    InputError: fewer examples than one batch, a batch that the processes cannot share evenly, or,
      while iterating, a bad example or the end of a reader process.
  """
  index, count = shard
  if not 0 <= index < count:
    raise InputError(f"expected a shard (index, count) with 0 <= index < count, got {shard}")
  if batch_size < 1 or batch_size % count:
    raise InputError(
      f"expected a batch size divisible by the {count} processes, got {batch_size}; "
      f"use a multiple of {count}"
    )
  if len(source) < batch_size:
    raise InputError(
      f"expected at least one batch of {batch_size} examples, got a source of {len(source)}; "
      "lower the batch size or check that the data set was prepared completely"
    )
  stream = _in_order(_CheckedSource(source), seed)
  # Augmentation comes before slicing: its seed is the position in the global stream.
  stream = stream.random_map(functools.partial(_for_training, transform))
  part = grain.MapDataset.source(_ProcessSlice(stream, batch_size, index, count))
  batches = part.batch(batch_size // count, drop_remainder=True)[start_step:]
  iterator = batches.to_iter_dataset(grain.ReadOptions(num_threads, max(_READY, num_threads)))
  if workers:
    rows = batch_size // count
    example = part[start_step * rows]  # its size is known to the transform only
    batch_bytes = rows * sum(value.nbytes for value in example.values())
    return read_in_processes(iterator, workers, _READY, batch_bytes)
  return iter(iterator)


def _in_order(source, seed: int):
  """The endless stream of examples, reshuffled in every epoch."""
  return grain.MapDataset.source(source).seed(seed).shuffle().repeat(None)


def train_indices(count: int, *, batch_size: int, seed: int, step: int) -> list[int]:
  """Which examples of a source of `count` make up batch `step` of `train_batches`."""
  stream = _in_order(range(count), seed)
  return [stream[i] for i in range(step * batch_size, (step + 1) * batch_size)]


class EvalExamples:
  """See `eval_examples`; a slice is a sequence of the same kind."""

  def __init__(self, dataset):
    self._dataset = dataset

  def __len__(self) -> int:
    return len(self._dataset)

  def __getitem__(self, index):
    if isinstance(index, slice):
      return EvalExamples(self._dataset[index])
    # grain would start over beyond the end.
    if not 0 <= index < len(self):
      raise IndexError(f"expected an index in 0…{len(self) - 1}, got {index}")
    return self._dataset[index]

  def __iter__(self) -> Iterator[Example]:
    if not len(self):
      return iter(())
    return iter(self._dataset.to_iter_dataset(grain.ReadOptions(2, _READY)))


def eval_examples(source, transform: Callable[..., Example], *, limit: int = 0) -> EvalExamples:
  """Every example of a source once, in order, for evaluation.

  Args:
    source: random access, see the top of the module.
    transform: example -> example, e.g. `eval_transform(512)`.
    limit: stop after the source's first examples; 0 takes all.

  Returns:
    A sequence (len, [i], slices, iteration) of {'image': float32 [h,w,3], 'label': int32 [H,W],
    'id': str}. Sizes differ between examples.

  Raises:
    InputError: a source without examples or, when reached, a bad example.
  """
  if not len(source):
    raise InputError("expected examples to evaluate on, got an empty source; check the split")
  dataset = grain.MapDataset.source(_CheckedSource(source)).map(transform)
  dataset = dataset[: limit or len(source)]
  return EvalExamples(dataset)
