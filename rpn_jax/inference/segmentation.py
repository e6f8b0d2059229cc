"""The result for one image: labels, scores, overlay, files."""

import functools
import pathlib
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from rpn_jax.base.errors import InputError
from rpn_jax.base.paths import write_json
from rpn_jax.drawing.images import index_image, no_class_id, overlay_with_legend, save_prediction
from rpn_jax.drawing.palette import class_colors
from rpn_jax.models.training_free import SCALE

# Lowers the scores of rows that only fill a program's shape below all others.
NEVER = -1e4
# What an emphasis of 1 adds: half the range of a sigmoid, and as much as cosines usually differ.
EMPHASIS = {True: 0.5, False: 0.05}


# Each one object for all calls, since it is part of a program's key.


def _sigmoid_probabilities(scores):
  return scores


def _cosine_probabilities(scores):
  return jax.nn.softmax(SCALE * scores, axis=-1)


def _sigmoid_best(scores):
  return scores.argmax(-1), scores.max(-1)


def _cosine_best(scores):
  return scores.argmax(-1), _cosine_probabilities(scores).max(-1)


class Segmentation:
  """One segmented picture. Maps are computed when they are first asked for.

  Attributes:
    image: (H, W, 3) uint8.
    names: C class names.
    method: what made it, in words.
    file: path of the picture, or "".
    other: pixels whose best score is lower belong to no class.
    emphasis: {name: -1 … 1}, what was added to scores.
  """

  def __init__(
    self, image, names, method, *, file="", other=0.0, emphasis=None, trainable, reading, size,
    class_of_row, filled,
  ):  # fmt: skip
    self.image, self.names, self.method, self.file = image, names, method, file
    self.other, self.emphasis = float(other), dict(emphasis or {})
    self._trainable, self._reading, self._size = trainable, reading, size
    self._class_of_row, self._filled = class_of_row, filled
    check_adjustment(names, self.other, self.emphasis)

  def adjusted(self, *, other: float | None = None, emphasis: Mapping | None = None):
    """The same picture with another threshold or emphasis; the network does not run again."""
    return Segmentation(
      self.image,
      self.names,
      self.method,
      file=self.file,
      other=self.other if other is None else other,
      emphasis=self.emphasis if emphasis is None else emphasis,
      trainable=self._trainable,
      reading=self._reading,
      size=self._size,
      class_of_row=self._class_of_row,
      filled=self._filled,
    )

  @property
  def _bias(self) -> np.ndarray:
    bias = np.zeros(len(self._class_of_row) + self._filled, np.float32)
    bias[len(self._class_of_row) :] = NEVER
    for name, value in self.emphasis.items():
      rows = np.flatnonzero(self._class_of_row == self.names.index(name))
      bias[rows] = EMPHASIS[self._trainable] * value
    return bias

  @functools.cached_property
  def _best(self) -> tuple[np.ndarray, np.ndarray]:
    output = _sigmoid_best if self._trainable else _cosine_best
    row, score = self._reading.merge(output, self.image.shape[:2], self._bias)
    label = self._class_of_row[row].astype(np.int32)
    return np.where(score < self.other, -1, label), np.clip(score, 0, 1)

  @property
  def labels(self) -> np.ndarray:
    """Class ids (H, W) int32; -1 where a background word or `other` won."""
    return self._best[0]

  @property
  def confidence(self) -> np.ndarray:
    """The best score (H, W) float32 in [0, 1]."""
    return self._best[1]

  @functools.cached_property
  def scores(self) -> np.ndarray:
    """Scores (h, w, C) float32 in [0, 1] at the resolution that the network worked at.

    Of RPN independent sigmoids; of training-free methods a softmax over all words.
    """
    output = _sigmoid_probabilities if self._trainable else _cosine_probabilities
    rows = np.clip(self._reading.merge(output, self._size, self._bias), 0, 1)
    own = [np.flatnonzero(self._class_of_row == i) for i in range(len(self.names))]
    return np.stack([rows[..., i].max(-1) for i in own], -1)

  def shares(self) -> dict[str, float]:
    """Name -> share of the pixels, the largest first; classes without pixels are left out."""
    counts = np.bincount(self.labels[self.labels >= 0], minlength=len(self.names))
    order = np.argsort(-counts, kind="stable")
    return {self.names[i]: float(counts[i] / self.labels.size) for i in order if counts[i]}

  @functools.cached_property
  def _mean_scores(self) -> dict[int, float]:
    """Id -> best score, the mean over the class's pixels: a pass over the picture for each."""
    ids = np.unique(self.labels[self.labels >= 0]).tolist()
    return {i: float(self.confidence[self.labels == i].mean()) for i in ids}

  def overlay(self, alpha: float = 0.55, palette: str = "default"):
    """A PIL image of the picture under the colours of its classes, with a legend by area.

    Args:
      alpha: weight of the colours, 0 to 1.
      palette: "default" or "colorblind".
    """
    return overlay_with_legend(self.image, self.labels, self.names, alpha=alpha, palette=palette)

  def summary(self) -> dict:
    """What `save` writes as JSON."""
    colors = class_colors(self.names).tolist()
    rows = []
    for name, share in self.shares().items():
      i = self.names.index(name)
      rows.append(
        {"name": name, "id": i, "share": round(share, 6), "score": round(self._mean_scores[i], 4),
         "color": colors[i]}
      )  # fmt: skip
    height, width = self.labels.shape
    return {
      "image": str(self.file),
      "width": width,
      "height": height,
      "method": self.method,
      "names": list(self.names),
      "classes": rows,
      "other": {
        "threshold": self.other,
        "id": no_class_id(len(self.names)),
        "share": round(float((self.labels < 0).mean()), 6),
      },
      "emphasis": self.emphasis,
    }

  @property
  def _index(self) -> np.ndarray:
    """The labels as files have them: `no_class_id` where there is none."""
    return np.where(self.labels < 0, no_class_id(len(self.names)), self.labels)

  def mask(self, palette: str = "default"):
    """A PIL image of the class ids; `no_class_id` where there is none."""
    return index_image(self._index, self.names, palette)

  def save(self, directory, stem: str | None = None, **options) -> list[pathlib.Path]:
    """Writes `<stem>_overlay.png`, `<stem>_labels.png` and `<stem>.json`.

    Args:
      directory: made if it is missing.
      stem: beginning of the file names; None takes that of the picture's file.
      **options: of `overlay`.

    Returns:
      The paths, in this order.
    """
    stem = stem or pathlib.Path(self.file).stem or "picture"
    written = save_prediction(directory, stem, self.image, self._index, self.names, **options)
    path = pathlib.Path(directory) / f"{stem}.json"
    write_json(path, self.summary())
    return [*written, path]

  def __repr__(self) -> str:
    height, width = self.labels.shape
    shares = ", ".join(f"{name} {100 * share:.1f} %" for name, share in self.shares().items())
    rest = 100 * float((self.labels < 0).mean())
    shares += f", other {rest:.1f} %" if rest else ""
    return f"Segmentation({width} x {height}: {shares}; {self.method})"

  def _repr_png_(self) -> bytes:
    import io

    file = io.BytesIO()
    self.overlay().save(file, format="PNG")
    return file.getvalue()


def check_adjustment(names: Sequence[str], other: float, emphasis: Mapping) -> None:
  unknown = [name for name in emphasis if name not in names]
  if unknown:
    raise InputError(f"emphasis on {unknown[0]!r}: expected one of {', '.join(names)}")
  if not 0 <= other <= 1:
    raise InputError(f"expected an `other` threshold in [0, 1], got {other}")
