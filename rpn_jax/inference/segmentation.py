"""The segmentation of one image: labels, scores, overlay, files."""

import dataclasses
import functools
import itertools
import math
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from rpn_jax.annotations import scores as score_files
from rpn_jax.annotations.collection import Collection
from rpn_jax.annotations.images import Labeled
from rpn_jax.annotations.options import ANNOTATIONS, DEFAULT_FORMS, parse_forms
from rpn_jax.base.errors import InputError
from rpn_jax.base.origins import FIELD, Occupied, Origin, check_free, origin_of
from rpn_jax.base.paths import expand, name_key, write_json
from rpn_jax.base.words import composed, split_synonyms
from rpn_jax.drawing.images import index_image, no_class_id, overlay_with_legend, save_png
from rpn_jax.drawing.legend import share_text
from rpn_jax.drawing.palette import class_colors
from rpn_jax.inference.decision import best_row
from rpn_jax.inference.refinement import Scores
from rpn_jax.models import Network

# Forms that are files of an image's own -> how their names end.
_ENDS = {
  "overlay": ("_overlay.png",),
  "labels": ("_labels.png",),
  "json": (".json",),
  "scores": ("_scores.png", "_scores.npz"),
}
# Bias of rows that only pad a program's shape: lower than any score.
FILLER_SCORE = -1e4


@dataclasses.dataclass(frozen=True)
class ClassScores:
  """The network's output for an image, from which label and score maps are merged.

  Attributes:
    network: defines the meaning of logits and scores.
    scores: of the image.
    size: (height, width) of the network's input image, pixels.
    class_of_row: class id of every row of the logits, -1 for background words.
    fillers: number of additional rows that only pad the program's shape.
  """

  network: Network
  scores: Scores
  size: tuple[int, int]
  class_of_row: np.ndarray
  fillers: int

  def best(self, size: tuple[int, int], bias: Mapping[int, float]) -> tuple:
    """Class ids (height, width) of the best rows and their probabilities; `bias`: see `rows`."""
    row, probability = self.scores.merge(
      best_row(self.network.probabilities), size, self._bias_of_rows(bias)
    )
    return self.class_of_row[row].astype(np.int32), np.clip(probability, 0, 1)

  def rows(self, bias: Mapping[int, float]) -> np.ndarray:
    """Probabilities (height, width, rows) at the network's resolution.

    Args:
      bias: class id -> emphasis, -1 to 1, which raises or lowers its scores.
    """
    merged = self.scores.merge(self.network.probabilities, self.size, self._bias_of_rows(bias))
    return np.clip(merged, 0, 1)

  def _bias_of_rows(self, bias: Mapping[int, float]) -> np.ndarray:
    rows = np.zeros(len(self.class_of_row) + self.fillers, np.float32)
    rows[len(self.class_of_row) :] = FILLER_SCORE
    for class_id, emphasis in bias.items():
      rows[np.flatnonzero(self.class_of_row == class_id)] = self.network.emphasis * emphasis
    return rows


def ends_of(forms: Sequence[str]) -> list[str]:
  """How the names of an image's own files end, in some forms."""
  return [end for form in forms for end in _ENDS.get(form, ())]


class Segmentation:
  """The segmentation of one image. Maps are computed when first accessed.

  Attributes:
    image: (H, W, 3) uint8.
    names: C class names.
    method: description of the model.
    class_scores: the network's output.
    file: path of the image, or "".
    other: threshold; pixels whose best score is lower belong to no class.
    emphasis: {name: -1 … 1}, raises or lowers the scores of a class.
    notes: what had to be decided when the image was read, see `pictures.load`.
    page: of a file with several pages, see `pictures.Picture`.
  """

  def __init__(
    self,
    image: np.ndarray,
    names: Sequence[str],
    method: str,
    class_scores: ClassScores,
    *,
    file: str | pathlib.Path = "",
    other: float = 0.0,
    emphasis: Mapping[str, float] | None = None,
    notes: Sequence[str] = (),
    page: int = 0,
  ):
    self.notes, self.page = tuple(notes), page
    self.image, self.names, self.method, self.file = image, names, method, file
    self.class_scores = class_scores
    self.other, self.emphasis = checked_adjustment(names, other, emphasis)

  def adjusted(
    self, *, other: float | None = None, emphasis: Mapping | None = None
  ) -> "Segmentation":
    """The same image with another threshold or emphasis; the network does not run again."""
    return Segmentation(
      self.image,
      self.names,
      self.method,
      self.class_scores,
      file=self.file,
      other=self.other if other is None else other,
      emphasis=self.emphasis if emphasis is None else emphasis,
      notes=self.notes,
      page=self.page,
    )

  @property
  def nbytes(self) -> int:
    """What the image and its scores hold in memory."""
    return self.image.nbytes + self.class_scores.scores.nbytes

  @property
  def _bias(self) -> dict[int, float]:
    return {self.names.index(name): value for name, value in self.emphasis.items()}

  @functools.cached_property
  def _best(self) -> tuple[np.ndarray, np.ndarray]:
    label, probability = self.class_scores.best(self.image.shape[:2], self._bias)
    return np.where(probability < self.other, -1, label), probability

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
    """Scores (h, w, C) float32 in [0, 1] at the resolution of the network's input.

    That is smaller or larger than `labels`, (H, W) as the image, where `prepare` resizes the image.
    Independent sigmoids for a trained network, unless its loss was softmax; a softmax over all
    words for training-free methods.
    """
    scores = self.class_scores.rows(self._bias)
    rows = [np.flatnonzero(self.class_scores.class_of_row == i) for i in range(len(self.names))]
    return np.stack([scores[..., i].max(-1) for i in rows], -1)

  def shares(self) -> dict[str, float]:
    """Name -> fraction of pixels, largest first; classes without pixels are left out."""
    counts = np.bincount(self.labels[self.labels >= 0], minlength=len(self.names))
    order = np.argsort(-counts, kind="stable").tolist()
    return {self.names[i]: float(counts[i] / self.labels.size) for i in order if counts[i]}

  @functools.cached_property
  def _mean_scores(self) -> dict[int, float]:
    """Class id -> mean confidence over its pixels."""
    ids = self.labels.ravel() + 1  # 0: no class
    counts = np.bincount(ids)
    sums = np.bincount(ids, self.confidence.ravel())
    return {i - 1: float(sums[i] / counts[i]) for i in np.flatnonzero(counts).tolist() if i}

  def overlay(self, alpha: float = 0.55, palette: str = "default") -> Image.Image:
    """The image with its classes in color and a legend by area, as a PIL image.

    Args:
      alpha: opacity of the colors, 0 to 1.
      palette: "default" or "colorblind".
    """
    return overlay_with_legend(self.image, self.labels, self.names, alpha=alpha, palette=palette)

  def summary(self, palette: str = "default") -> dict:
    """The content of the JSON file that `save` writes, with the colors of a palette."""
    colors = class_colors(self.names, palette).tolist()
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
      **({"page": self.page} if self.page else {}),
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
      "read": list(self.notes),
    }

  def mask(self, palette: str = "default") -> Image.Image:
    """A PIL image of the class ids; `no_class_id` for pixels without a class."""
    index = np.where(self.labels < 0, no_class_id(len(self.names)), self.labels)
    return index_image(index, self.names, palette)

  def save(
    self,
    directory: str | os.PathLike,
    stem: str | None = None,
    *,
    save: str | Sequence[str] = DEFAULT_FORMS,
    alpha: float = 0.55,
    palette: str = "default",
    collection: Collection | None = None,
    **options: Any,
  ) -> list[pathlib.Path]:
    """Writes the forms that are asked for, docs/masks.md.

    These are "overlay" (`<stem>_overlay.png`), "labels" (`<stem>_labels.png`), "json"
    (`<stem>.json`), "scores" (`<stem>_scores.npz` and `.png`), and in folders of their names
    "coco" (`coco/<stem>.json`), "labelme", "yolo" and "voc", see `annotations.Collection`.

    Args:
      directory: created if missing.
      stem: start of the file names, whose files are replaced, but for those of `Collection.check`;
        None uses that of the image's file, or `picture`, with a number where that is taken.
      save: forms, as a list or as "overlay,coco".
      alpha, palette: of `overlay`; the palette is that of the labels and the JSON, too.
      collection: of many images, which gets the annotations in place of one for this image alone;
        its `finish` writes what is about all of them.
      **options: of `annotations.options.Options`.

    Returns:
      The paths.

    Raises:
      Occupied: of the image's file, but not of this image, there are such files.
      InputError: an unknown form, or see `Collection` and its `add`.
    """
    forms, directory = parse_forms(save), expand(directory)
    alone = functools.partial(Collection, directory, self.names, forms, **options)
    if stem is None:
      check = lambda stem: alone(only=stem).check(self.origin, stem)
      stem = self.free_stem(directory, forms, check)
    own = collection or alone(only=stem)
    source, written, annotated = self.origin.name(directory), [], []
    # First, since it may be refused.
    if {*forms} & {*ANNOTATIONS}:
      annotated = own.add(Labeled(self.image, self.labels, self.file, self.page), stem)
    if "overlay" in forms:
      overlay = self.overlay(alpha, palette)
      written.append(save_png(directory / f"{stem}_overlay.png", overlay, source))
    if "labels" in forms:
      written.append(save_png(directory / f"{stem}_labels.png", self.mask(palette), source))
    if "json" in forms:
      written.append(directory / f"{stem}.json")
      written[-1].parent.mkdir(parents=True, exist_ok=True)
      write_json(written[-1], {**self.summary(palette), FIELD: source})
    if "scores" in forms:
      written += score_files.save(directory, stem, self.image, self.scores, self.names, source)
    return written + annotated + ([] if collection else own.finish())

  @functools.cached_property
  def origin(self) -> Origin:
    """Which image it is of."""
    return origin_of(self.image, self.file, self.page)

  def free_stem(
    self,
    directory: pathlib.Path,
    forms: Sequence[str],
    check: Callable[[str], None],
    default: str = "picture",
  ) -> str:
    """The start of the names of this image's files; see `save`.

    Args:
      directory: of all results.
      forms: see `save`.
      check: refuses a stem by Occupied, for what is in folders of forms.
      default: of an image without a name.

    Raises:
      Occupied: see `save`.
    """
    name = pathlib.PurePath(self.file).stem or default
    for number in itertools.count(1):
      stem = name if number == 1 else f"{name}_{number}"
      try:
        check(stem)
        check_free(self.origin, directory, stem, ends_of(forms))
        return stem
      except Occupied:
        if not self.origin.digest:
          raise
    raise AssertionError

  def __repr__(self) -> str:
    height, width = self.labels.shape
    shown = [(" | ".join(split_synonyms(name)), share) for name, share in self.shares().items()]
    if rest := float((self.labels < 0).mean()):
      shown.append(("other", rest))
    shares = ", ".join(f"{name} {share_text(share)}" for name, share in shown)
    return f"Segmentation({width} x {height}: {shares}; {self.method})"

  def _repr_png_(self) -> bytes:
    import io

    file = io.BytesIO()
    self.overlay().save(file, format="PNG")
    return file.getvalue()


def save_results(
  results: Iterable[Segmentation],
  directory: str | os.PathLike,
  *,
  save: str | Sequence[str] = DEFAULT_FORMS,
  alpha: float = 0.55,
  palette: str = "default",
  **options: Any,
) -> list[pathlib.Path]:
  """Saves many results of one list of names, with one COCO file for all of them.

  Args:
    results: one at a time is needed, as `Segmenter.stream` gives them.
    directory, save, alpha, palette, **options: see `Segmentation.save`.

  Returns:
    The paths.

  Raises:
    InputError: two results whose files would have the same name, or other names than those of the
      first one; see also `Segmentation.save`.
  """
  forms = parse_forms(save)
  collection: Collection | None = None
  stems: set[str] = set()
  written: list[pathlib.Path] = []
  try:
    for result in results:
      if collection is None:
        names = result.names
        collection = Collection(directory, names, forms, **options)
      stem = pathlib.PurePath(result.file).stem or f"picture_{len(stems)}"
      if result.names != names:
        raise InputError(
          f"{stem}: expected a result with the names of the first one, {', '.join(names)}, got "
          f"{', '.join(result.names)}; save it to another folder"
        )
      if (key := name_key(stem)) in stems:
        raise InputError(
          f"{result.file}: expected images with different names, got {stem} twice; rename one"
        )
      stems.add(key)
      check = functools.partial(collection.check, result.origin)
      stem = result.free_stem(expand(directory), forms, check, stem)
      written += result.save(
        directory, stem, save=forms, alpha=alpha, palette=palette, collection=collection
      )
  finally:
    written += collection.finish() if collection else []
  return written


def checked_adjustment(
  names: Sequence[str], other: float, emphasis: Mapping[str, float] | None
) -> tuple[float, dict[str, float]]:
  """Threshold and emphasis as Python's floats, which JSON takes; the names are in NFC.

  Raises:
    InputError: a threshold outside [0, 1], an emphasis on an unknown name or outside [-1, 1].
  """
  threshold = _within("an `other` threshold", other, 0, 1)
  if not isinstance(emphasis, Mapping | None):
    raise InputError(
      f"expected an emphasis by name, as in {{{names[0]!r}: 0.5}}, got {type(emphasis).__name__}"
    )
  found = {}
  for name, value in (emphasis or {}).items():
    known = composed(name) if isinstance(name, str) else name
    if known not in names:
      raise InputError(f"emphasis on {name!r}: expected one of {', '.join(names)}")
    found[known] = _within(f"an emphasis on {name!r}", value, -1, 1)
  return threshold, found


def _within(what: str, value: Any, low: int, high: int) -> float:
  """A number of any library as a float."""
  try:
    number = math.nan if isinstance(value, str | bytes) else float(value)
  except (TypeError, ValueError, OverflowError):
    number = math.nan
  if not low <= number <= high:
    shown = repr(value) if isinstance(value, str | bytes) else value
    raise InputError(f"expected {what} in [{low}, {high}], got {shown}")
  return number
