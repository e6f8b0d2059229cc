"""One pass over a data set: predictions, a confusion matrix, scores."""

import contextlib
import dataclasses
import itertools
import json
import pathlib
import time
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from rpn_jax.base.console import progress
from rpn_jax.base.errors import InputError
from rpn_jax.base.paths import replacing
from rpn_jax.devices import devices_text
from rpn_jax.inference import metrics
from rpn_jax.inference.sliding import SlidingWindow

# Between the files that an interrupted evaluation resumes from.
SAVE_SECONDS = 5.0


@dataclasses.dataclass
class Evaluation:
  """One pass over a data set.

  Attributes:
    scores: of `metrics.scores`, with `per_class` {name: IoU} for the list of IoUs.
    names: of the C scored classes.
    untrained: class ids, of the unseen ones.
    confusion_CxC: pixels, rows truth, columns prediction.
    kept: the first examples, each with its `prediction`, for pictures.
  """

  scores: dict
  names: tuple[str, ...]
  untrained: tuple[int, ...]
  confusion_CxC: np.ndarray
  kept: list[dict]


class Partial:
  """What an evaluation has counted so far, on disk, for one that is interrupted to continue.

  Args:
    path: of the file.
    identity: JSON; a file with another one is of another evaluation and does not count.
  """

  def __init__(self, path: pathlib.Path, identity: dict):
    self.path = path
    self.identity = json.dumps(identity, sort_keys=True)
    self.saved = time.monotonic()

  def load(self, classes: int, count: int) -> tuple[int, np.ndarray] | None:
    """Number of examples and their confusion matrix; None where there is nothing to continue.

    Args:
      classes: side of the matrix.
      count: of all examples.
    """
    try:
      with zipfile.ZipFile(self.path) as archive:
        # Compressed arrays can unfold to any size.
        if sum(info.file_size for info in archive.infolist()) > 8 * classes**2 + (1 << 20):
          return None
      with np.load(self.path, allow_pickle=False) as file:
        done, confusion = int(file["done"]), file["confusion"]
        fits = confusion.shape == (classes, classes) and confusion.dtype == np.int64
        if str(file["identity"]) == self.identity and fits and 0 <= done <= count:
          return done, confusion
    except Exception:  # a damaged archive raises all kinds of errors, and each means: begin again
      pass
    return None

  def save(self, done: int, confusion_CxC: np.ndarray, *, now: bool = False) -> None:
    """Writes the file if the last time was SAVE_SECONDS seconds ago, and if the disk allows it."""
    if not now and time.monotonic() - self.saved < SAVE_SECONDS:
      return
    self.saved = time.monotonic()
    # Only an interruption would need it: a full disk does not matter.
    with (
      contextlib.suppress(OSError),
      replacing(self.path) as temporary,
      open(temporary, "wb") as file,
    ):
      np.savez_compressed(file, identity=self.identity, done=done, confusion=confusion_CxC)


def scored_names(names: Sequence[str], scored_as: Sequence[int]) -> tuple[str, ...]:
  """A name for every scored class: "background" for the one that several names stand for."""
  members = [
    [n for n, c in zip(names, scored_as, strict=True) if c == i] for i in range(max(scored_as) + 1)
  ]
  return tuple(m[0] if len(m) == 1 else "background" for m in members)


def evaluate(
  segmenter: SlidingWindow,
  examples: Sequence[dict],
  data: Any,
  *,
  keep: int = 0,
  partial: Partial | None = None,
) -> Evaluation:
  """Scores of one pass over `examples`, shared out among the processes.

  Args:
    segmenter: images -> ids of the names in `data`.
    examples: sequence (with slices) of {image: (h, w, 3) float32, label: (H, W) int, id: str}.
    data: `names` that are prompted, the `scored_as` class of each (None: its own), ids of `seen`,
      `unseen` and `trained` names, and `ignore`, the label of pixels without a class.
    keep: how many examples to return with their `prediction`, for pictures.
    partial: where to continue from and what to write on the way.

  Raises:
    InputError: a label that is no scored class.
  """
  scored_as = np.arange(len(data.names)) if data.scored_as is None else np.asarray(data.scored_as)
  names = scored_names(data.names, scored_as.tolist())
  examples = examples[jax.process_index() :: jax.process_count()] if several() else examples
  done, confusion = 0, np.zeros((len(names), len(names)), np.int64)
  if partial and (loaded := partial.load(len(names), len(examples))):
    done, confusion = loaded
    print(f"{data.name}: continuing at image {done} of {len(examples)}", flush=True)

  kept = []
  if done:  # what was counted before is segmented again only to be shown
    before = segmented(segmenter, examples[: min(keep, done)])
    kept = [{**example, "prediction": scored_as[rows]} for example, rows in before]
    examples = examples[done:]
  shown = progress(examples, f"evaluate on {devices_text()}", "image")
  for example, rows in segmented(segmenter, shown):
    prediction = scored_as[rows]
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

  confusion = over_processes(confusion)
  seen, unseen = (sorted({int(scored_as[i]) for i in ids}) for ids in (data.seen, data.unseen))
  scores = metrics.scores(confusion, seen, unseen)
  scores["per_class"] = dict(zip(names, scores.pop("iou")))
  untrained = tuple(i for i in unseen if i not in scored_as[list(data.trained)])
  return Evaluation(scores, names, untrained, confusion, kept)


def segmented(
  segmenter: SlidingWindow, examples: Iterable[dict]
) -> Iterator[tuple[dict, np.ndarray]]:
  """(example, prediction) of each, where the segmenter may take several at a time."""
  examples, again = itertools.tee(examples)
  return zip(examples, segmenter.stream((e["image"], e["label"].shape) for e in again))


def several() -> bool:
  return jax.process_count() > 1


def over_processes(confusion_CxC: np.ndarray) -> np.ndarray:
  """The sum of all processes' matrices."""
  if not several():
    return confusion_CxC
  # As halves of 64-bit numbers: JAX would make int32 of them, and pixels are billions.
  halves = multihost_utils.process_allgather(confusion_CxC.view(np.uint32))
  return np.ascontiguousarray(halves).view(np.int64).sum(0)
