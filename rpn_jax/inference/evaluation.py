"""One pass over a data set: predictions, confusion matrix, scores."""

import contextlib
import dataclasses
import io
import itertools
import json
import pathlib
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from rpn_jax.base.buckets import Pace
from rpn_jax.base.console import progress
from rpn_jax.base.errors import InputError
from rpn_jax.base.paths import replacing
from rpn_jax.devices import devices_text
from rpn_jax.inference import metrics
from rpn_jax.inference.sliding import SlidingWindow

# How often an evaluation saves what it would resume from.
SAVE_SECONDS = 5.0


@dataclasses.dataclass
class Evaluation:
  """Result of one pass over a data set.

  Attributes:
    scores: those of `metrics.scores`, with the IoUs as `per_class` {name: IoU}.
    names: names of the C scored classes.
    untrained: ids of the unseen classes that were not trained on.
    confusion_CxC: pixel counts; rows are ground truth, columns prediction.
    kept: the first examples, each with its `prediction`, for figures.
  """

  scores: dict
  names: tuple[str, ...]
  untrained: tuple[int, ...]
  confusion_CxC: np.ndarray
  kept: list[dict]


class PartialEvaluation:
  """File with the confusion matrix so far, from which an interrupted evaluation resumes.

  Args:
    path: path of the file.
    identity: JSON-compatible identity of the evaluation; files with another one are ignored.
  """

  def __init__(self, path: pathlib.Path, identity: dict):
    self.path = path
    self.identity = json.dumps(identity, sort_keys=True)
    self._pace = Pace(SAVE_SECONDS)

  def load(self, classes: int, count: int) -> tuple[int, np.ndarray] | None:
    """Number of evaluated examples and their confusion matrix; None without a usable file.

    Args:
      classes: C, the side of the matrix.
      count: number of all examples.
    """
    try:
      content = io.BytesIO(self.path.read_bytes())
      with zipfile.ZipFile(content) as archive:
        # Compressed arrays can decompress to any size.
        if sum(info.file_size for info in archive.infolist()) > 8 * classes**2 + (1 << 20):
          return None
      with np.load(content, allow_pickle=False) as file:
        done, confusion = int(file["done"]), file["confusion"]
        fits = confusion.shape == (classes, classes) and confusion.dtype == np.int64
        if str(file["identity"]) == self.identity and fits and 0 <= done <= count:
          return done, confusion
    except Exception:  # damaged archives raise all kinds of errors; start over
      pass
    return None

  def save(self, done: int, confusion_CxC: np.ndarray, *, now: bool = False) -> None:
    """Writes the file, at most every SAVE_SECONDS unless `now`; a full disk is no error."""
    if not now and not self._pace.is_due():
      return
    # The file only matters if the evaluation is interrupted.
    with (
      contextlib.suppress(OSError),
      self._pace.measured(),
      replacing(self.path) as temporary,
      open(temporary, "wb") as file,
    ):
      np.savez_compressed(file, identity=self.identity, done=done, confusion=confusion_CxC)


def scored_names(names: Sequence[str], scored_as: Sequence[int]) -> tuple[str, ...]:
  """A name for every scored class; one that several prompted names share is "background"."""
  prompted = [
    [n for n, c in zip(names, scored_as, strict=True) if c == i] for i in range(max(scored_as) + 1)
  ]
  return tuple(group[0] if len(group) == 1 else "background" for group in prompted)


def evaluate(
  window: SlidingWindow,
  examples: Sequence[dict],
  data: Any,
  *,
  keep: int = 0,
  partial: PartialEvaluation | None = None,
) -> Evaluation:
  """Evaluates on `examples`, which the processes share.

  Args:
    window: images -> ids of the names in `data`.
    examples: sequence (with slices) of {image: (h, w, 3) float32, label: (H, W) int, id: str}.
    data: has the prompted `names`, the `scored_as` class of each (None: its own), the ids of
      `seen`, `unseen` and `trained` names, and `ignore`, the label of pixels without a class;
      may have `titles`, what the scored classes are called in place of their prompted names.
    keep: number of examples to return with their `prediction`, for figures.
    partial: file to resume from and to save to.

  Raises:
    InputError: a label that is not a scored class.
  """
  scored_as = np.arange(len(data.names)) if data.scored_as is None else np.asarray(data.scored_as)
  names = tuple(getattr(data, "titles", ())) or scored_names(data.names, scored_as.tolist())
  if jax.process_count() > 1:
    examples = examples[jax.process_index() :: jax.process_count()]
  done, confusion = 0, np.zeros((len(names), len(names)), np.int64)
  if partial and (loaded := partial.load(len(names), len(examples))):
    done, confusion = loaded
    if done < len(examples):
      print(f"{data.name}: resuming after image {done} of {len(examples)}", flush=True)
    else:
      print(f"{data.name}: all {done} images were counted before the interruption", flush=True)

  kept = []
  if done:  # the examples for figures are segmented again, but not counted again
    predicted = with_predictions(window, examples[: min(keep, done)])
    kept = [{**example, "prediction": scored_as[ids]} for example, ids in predicted]
    examples = examples[done:]
  bar = progress(examples, f"evaluate on {devices_text()}", "image", done)
  for example, ids in with_predictions(window, bar):
    prediction = scored_as[ids]
    if len(kept) < keep:
      kept.append({**example, "prediction": prediction})
    try:
      confusion += metrics.confusion_matrix(example["label"], prediction, len(names), data.ignore)
    except ValueError as error:
      raise InputError(f"{data.name}, example {example['id']}: {error}") from error
    done += 1
    if partial:
      partial.save(done, confusion)
  if partial:
    partial.save(done, confusion, now=True)

  confusion = sum_over_processes(confusion)
  seen, unseen = (sorted({int(scored_as[i]) for i in ids}) for ids in (data.seen, data.unseen))
  scores = metrics.scores(confusion, seen, unseen)
  scores["per_class"] = dict(zip(names, scores.pop("iou")))
  untrained = tuple(i for i in unseen if i not in scored_as[list(data.trained)])
  return Evaluation(scores, names, untrained, confusion, kept)


def with_predictions(
  window: SlidingWindow, examples: Iterable[dict]
) -> Iterator[tuple[dict, np.ndarray]]:
  """(example, predicted ids) of each example; windows of several examples share a call."""
  examples, inputs = itertools.tee(examples)
  return zip(examples, window.stream((e["image"], e["label"].shape) for e in inputs))


def sum_over_processes(confusion_CxC: np.ndarray) -> np.ndarray:
  """The sum of the matrices of all processes."""
  if jax.process_count() == 1:
    return confusion_CxC
  # As pairs of uint32: JAX would truncate int64 to int32, and there are billions of pixels.
  halves = multihost_utils.process_allgather(confusion_CxC.view(np.uint32))
  return np.ascontiguousarray(halves).view(np.int64).sum(0)
