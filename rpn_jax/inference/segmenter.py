"""Your image, your words: `Segmenter.load(model)("photo.jpg", ["a cat", "grass"])`.

A model is the workdir of a training run, what it exported, or the address of that on the hub, whose
prompts are used; or a file of CLIP weights or the name of shipped or public ones, which are used by
a training-free method.
"""

import dataclasses
import functools
import os
import pathlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any, NamedTuple, overload

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from rpn_jax import devices
from rpn_jax.base import pixels
from rpn_jax.base.colors import Color
from rpn_jax.base.errors import InputError
from rpn_jax.base.paths import expand
from rpn_jax.base.pictures import ImageSource, Picture
from rpn_jax.base.words import (
  Names,
  check_known,
  check_names,
  parse_names,
  split_synonyms,
  without_articles,
)
from rpn_jax.config.stored import clip_of, read_config
from rpn_jax.inference import strips
from rpn_jax.inference.predictor import Predictor
from rpn_jax.inference.process import check_process
from rpn_jax.inference.refinement import REFINEMENTS
from rpn_jax.inference.segmentation import ClassScores, Segmentation, checked_adjustment
from rpn_jax.inference.sliding import SlidingWindow
from rpn_jax.inference.smoothing import Smoothing
from rpn_jax.inference.sources import read_each
from rpn_jax.inference.views import round_up
from rpn_jax.models import NETWORKS, training_free
from rpn_jax.text.templates import check_distinct, embedding_keys
from rpn_jax.training.run import Run
from rpn_jax.weights import arrays, checkpoints, clip_file, exported, hub, prompts_file

# Training-free methods.
METHODS = training_free.METHODS
# Weights in rpn_jax/assets: name -> (file, templates they were trained with).
SHIPPED = {"shapes_clip": ("shapes_clip.safetensors", "single")}
# Trained prompts around one of these.
SHIPPED_PROMPTS = {"shapes": "shapes_prompts.safetensors"}

# Words for what surrounds things, by a name for all of them: those that SCLIP's code prompts for
# the background of VOC and of COCO's objects.
BACKGROUNDS = {
  "stuff": (
    "sky", "wall", "tree", "wood", "grass", "road", "sea", "river", "mountain", "sands", "desk",
    "bed", "building", "cloud", "lamp", "door", "window", "wardrobe", "ceiling", "shelf", "curtain",
    "stair", "floor", "hill", "rail", "fence",
  ),
}  # fmt: skip
# Compute types, and the choice between them.
TYPES = ("auto", "float32", "bfloat16")
# Rows of text that independent classes are filled up to; further ones are rounded up.
MIN_ROWS = 8


class LabeledBlock(NamedTuple):
  """A part of an image: its upper left corner in pixels, labels and confidence; `Segmentation`."""

  top: int
  left: int
  labels: np.ndarray
  confidence: np.ndarray


class Segmenter:
  """Segments images into named classes; create one with `Segmenter.load`.

  Programs are compiled for rounded sizes, so that images of similar sizes and lists of about as
  many words share them.

  Attributes:
    predictor: the network and its inference protocol.
    method: description of the model.
    step: step of the checkpoint; 0 for training-free methods.
  """

  def __init__(self, predictor: Predictor, method: str, step: int = 0):
    self.predictor, self.method, self.step = predictor, method, step
    self._text_rows = functools.lru_cache(64)(self._distinct_rows)

  def __reduce__(self) -> tuple:
    """Pickled and copied without what it keeps of earlier words."""
    return Segmenter, (self.predictor, self.method, self.step)

  @classmethod
  def load(
    cls,
    model: str | os.PathLike = "shapes",
    *,
    method: str | None = None,
    checkpoint: str = "last",
    templates: str | Sequence[str] | None = None,
    synonyms: str | None = None,
    clip: str | None = None,
    dtype: str = "auto",
  ) -> "Segmenter":
    """Loads a segmenter from the workdir of a run, a file of prompts or CLIP weights, or a name.

    Args:
      model: a folder (the workdir of a run, or what its export wrote), a file, one of
        SHIPPED_PROMPTS or SHIPPED, the name of public weights, as "ViT-B/16", or "hf://owner/name",
        a trained model or CLIP weights of others: what is on the hub is fetched once, and so is the
        CLIP of a trained model (`weights.checkpoints`).
      method: None uses the trained network of a run, as its own name does, and for weights the best
        method without training for their tower (`training_free.default_method`); one of METHODS
        uses CLIP without training, also that of a run.
      checkpoint: for runs: "last", or "best", the one with the highest evaluation score.
      templates: sentences around a name, see `text.templates.template_sentences`; None uses those
        of the run, and ImageNet's 80 for weights.
      synonyms: how several words for a class are joined, see `text.templates`; None uses the run's
        setting, and "mean" for weights.
      clip: the CLIP weights of a run or of prompts, if they are not where they were in training.
      dtype: compute type: "float32", "bfloat16", or "auto", which is the faster one here, see
        `devices.fast_type`, whatever a run was trained in.

    Raises:
      InputError: no such model, or a damaged one.
    """
    if method is not None:
      check_known("method=", method, (*NETWORKS, *METHODS))
    if method == "training_free":
      raise InputError(f"method='training_free' leaves open which: name one, {', '.join(METHODS)}")
    if checkpoint not in ("last", "best"):
      raise InputError(f'checkpoint must be "last" or "best", got {checkpoint!r}')
    check_known("dtype=", dtype, TYPES)
    check_process()  # before anything is fetched
    path, name, own_templates = expand(model), str(model), "imagenet80"
    choices = {"templates": templates, "synonyms": synonyms, "clip": clip, "dtype": "float32"}
    prompts = _shipped_prompts(model) or exported.find_prompts(model)
    if path.is_dir() and not (hub.holds_weights(path) or prompts.is_file()):
      return cls._from_config(read_config(path), path, method, checkpoint, choices, dtype)
    if prompts_file.holds_prompts(prompts):
      config = prompts_file.config_of(prompts)
      if checkpoint != "last":
        raise InputError(f"checkpoint={checkpoint!r}: {name} has one only, its last: leave it out")
      if clip is None:
        exported.check_clip_is_found(config, prompts_file.load(prompts).clip, name)
      return cls._from_config(config, name, method, checkpoint, choices, dtype)
    file: str | pathlib.Path = path
    if name in SHIPPED and not path.exists():
      file, own_templates = SHIPPED[name]
    elif path.exists():
      name = path.stem
    elif public := checkpoints.find(model):
      name = public.name
    else:
      near = checkpoints.near_address(model)
      raise InputError(
        f"model={name!r}: expected the workdir of a run, a file of prompts or CLIP weights, or one "
        f"of {', '.join([*SHIPPED_PROMPTS, *SHIPPED, *checkpoints.CHECKPOINTS])}; nothing is there"
        + (f": did you mean {near!r}?" if near else "")
      )
    if method in NETWORKS:
      raise InputError(f"method={method!r} needs a training run or its prompts, got {model}")
    if checkpoint != "last":
      raise InputError(
        f"checkpoint={checkpoint!r} is for a training run, {model} is CLIP itself: leave it out"
      )
    if clip is not None:
      raise InputError(
        f"clip={clip!r} is for a trained model, {model} is CLIP itself: leave it out"
      )
    if file == path:  # fetched now, not before everything else was checked
      file = clip_file.find_weights(model)
    predictor = Predictor.from_weights(
      file,
      method=method,
      templates=own_templates if templates is None else templates,
      synonyms=synonyms or "mean",
    )
    return cls(_in_type(predictor, dtype), _training_free(predictor, name))

  @classmethod
  def _from_config(
    cls, config: ml_collections.ConfigDict, where: str | os.PathLike, method: str | None,
    checkpoint: str, choices: dict, dtype: str,
  ) -> "Segmenter":  # fmt: skip
    """The segmenter of a run's config; `where` is its workdir, or what its prompts are called."""
    chosen = config.copy_and_resolve_references().unlock()
    if method in METHODS:
      if checkpoint != "last":
        raise InputError(
          f"checkpoint={checkpoint!r} is for trained prompts, {method} uses none: leave it out"
        )
      chosen.method, chosen.dense.method = "training_free", method
    elif method not in (None, config.method):
      raise InputError(
        f"method={method!r}: expected {config.method!r}, which {where} was trained as, or one "
        f"without training: {', '.join(METHODS)}"
      )
    with chosen.ignore_type():  # templates are a name or several sentences
      chosen.update({field: value for field, value in choices.items() if value is not None})
    predictor = _in_type(Predictor.from_config(chosen.lock()), dtype)
    run = Run(config.lock(), where, predictor.encoder.fingerprint)
    return cls.from_run(predictor, run, checkpoint, str(where))

  @classmethod
  def from_run(
    cls, predictor: Predictor, run: Run, checkpoint: str = "last", name: str = ""
  ) -> "Segmenter":
    """A segmenter with the trained prompts of a run.

    Args:
      predictor: predictor of the run's config.
      run: the run whose checkpoints are read.
      checkpoint: "last" or "best".
      name: what the run is called, by default its workdir.
    """
    restored = predictor.read_prompts(run)
    step, prompts = restored.get(checkpoint, restored["last"])  # the best may be the last
    clip = pathlib.PurePath(run.config.clip).stem
    if predictor.network.trainable:
      # A tuner's word: a baseline says its own.
      title = predictor.network.title.replace("rpn", "RPN")
      method = _noted(f"{title}, step {step} of {name or run.workdir}", predictor)
    else:
      method = _training_free(predictor, clip)
    return cls(predictor.with_prompts(prompts), method, step)

  @overload
  def __call__(
    self, images: ImageSource, names: Names, *, other: float = ..., background: Names = ...,
    emphasis: Mapping[str, float] | None = ..., refine: str | None = ...,
    page: int | None = ..., matte: str | Color = ...,
  ) -> Segmentation: ...  # fmt: skip

  @overload
  def __call__(
    self, images: list | tuple, names: Names, *, other: float = ..., background: Names = ...,
    emphasis: Mapping[str, float] | None = ..., refine: str | None = ...,
    page: int | None = ..., matte: str | Color = ...,
  ) -> list[Segmentation]: ...  # fmt: skip

  def __call__(
    self, images: ImageSource | list | tuple, names: Names, *, other: float = 0.0,
    background: Names = (), emphasis: Mapping[str, float] | None = None,
    refine: str | None = None, page: int | None = None, matte: str | Color = "white",
  ) -> Segmentation | list[Segmentation]:  # fmt: skip
    """Segments one image, or a list of them.

    Args:
      images: a path, a PIL image or an array, see `pictures.load`; or a list of these.
      names: any words, trained on or not; see `words.parse_names`.
      other: threshold (0 to 1); pixels whose best score is lower belong to no class.
      background: words that compete with the names; their pixels belong to no class. "stuff" among
        them stands for the words of BACKGROUNDS, without those that are given themselves.
      emphasis: {name: -1 … 1}, raises or lowers the scores of a class.
      refine: "pamr" follows the edges of the image (PAMR, at the size of the image), "none" does
        not; None is what the model's protocol does.
      page: of files with several pages or frames, from 1; None takes the one that viewers show.
      matte: the color that transparent pixels lie on.

    Returns:
      A Segmentation, or a list of them.

    Raises:
      InputError: an invalid image or name, two names that CLIP cannot tell apart, or a threshold
        or emphasis out of its range.
    """
    options: dict[str, Any] = {
      "other": other, "background": background, "emphasis": emphasis, "refine": refine,
      "page": page, "matte": matte,
    }  # fmt: skip
    if isinstance(images, (list, tuple)):
      return list(self.stream(images, names, **options))
    return next(self.stream([images], names, **options))

  def stream(
    self, images: Iterable[ImageSource | Picture], names: Names, *, other: float = 0.0,
    background: Names = (), emphasis: Mapping[str, float] | None = None,
    refine: str | None = None, smooth: Smoothing | None = None, page: int | None = None,
    matte: str | Color = "white",
  ) -> Iterator[Segmentation]:  # fmt: skip
    """Like a call with many images, but lazily; windows of several images share a batch.

    An image may also be a `pictures.Picture`, which was read before. `smooth`: the images are the
    frames of a film, whose scores are averaged over time.

    Raises:
      InputError: see a call; one image in place of several.
    """
    names = parse_names(names)
    words = self._background_words(names, background)
    other, emphasis = checked_adjustment(names, other, emphasis)  # before the network runs
    if refine is not None:
      check_known("refine=", refine, REFINEMENTS)
    window, class_of_row, fillers = self._window(names, words, refine)
    pending: deque[tuple[Picture, str | pathlib.Path, tuple[int, int]]] = deque()
    failed: list[Exception] = []

    def inputs_of_images() -> Iterator[np.ndarray]:
      try:
        for picture, file in read_each(images, page, matte):
          inputs = self.predictor.prepare(picture.image)
          pending.append((picture, file, inputs.shape[:2]))
          yield inputs
      except Exception as error:  # told in its turn: images are read ahead of the results
        failed.append(error)

    for scored in window.scored(inputs_of_images(), smooth):
      picture, file, size = pending.popleft()
      scores = ClassScores(self.predictor.network, scored, size, class_of_row, fillers)
      yield Segmentation(
        picture.image, names, self.method, scores, file=file, other=other, emphasis=emphasis,
        notes=picture.texts, page=picture.page,
      )  # fmt: skip
    if failed:
      raise failed[0]

  def blocks(
    self, size: tuple[int, int], read: Callable[[int, int], np.ndarray], names: Names, *,
    other: float = 0.0, background: Names = (), refine: str | None = None,
  ) -> Iterator[LabeledBlock]:  # fmt: skip
    """Segments an image that is too large for memory, at its own resolution; see `strips.blocks`.

    The labels are those of a protocol that resizes the image to its own size.

    Args:
      size: (height, width), pixels.
      read: (first row, number of rows) -> these rows, uint8 (rows, width, 3).
      names: see `__call__`, as all others.
      other: see there.
      background: see there.
      refine: see there.

    Raises:
      InputError: a protocol that needs the whole image, or an invalid name.
    """
    names = parse_names(names)
    words = self._background_words(names, background)
    other, _ = checked_adjustment(names, other, None)
    window, class_of_row, fillers = self._window(names, words, refine)
    mean, std = self.predictor.protocol.mean, self.predictor.protocol.std

    def normalized(top: int, count: int) -> np.ndarray:
      return pixels.normalize(read(top, count), mean, std)

    for block in strips.blocks(window, size, normalized):
      scores = ClassScores(self.predictor.network, block.logits, block.size, class_of_row, fillers)
      label, probability = scores.best(block.size, {})
      label[probability < other] = -1
      yield LabeledBlock(block.top, block.left, label, probability)

  def _background_words(self, names: tuple[str, ...], background: Names) -> tuple[str, ...]:
    """Background words, with those of a list in its place unless they are given themselves."""
    if background is None or (isinstance(background, Sized) and not len(background)):
      return ()
    words = parse_names(background)
    mode = self.predictor.encoder.synonyms
    single = [word for word in words if word.casefold() not in BACKGROUNDS]
    # A synonym is given, too, where the class has one embedding of all.
    typed = [x for name in (*names, *single) for x in (name, *split_synonyms(name))]
    given = {key for x in typed for key in embedding_keys(x, mode)}
    found: dict[str, None] = {}  # in their order, each once
    for word in words:
      listed = BACKGROUNDS.get(word.casefold())
      own = [word] if listed is None else [x for x in listed if not embedding_keys(x, mode) & given]
      found |= dict.fromkeys(own)
    return tuple(found)

  def _window(
    self, names: tuple[str, ...], background: tuple[str, ...], refine: str | None
  ) -> tuple[SlidingWindow, np.ndarray, int]:
    """Sliding-window inference, the class id of each row, and the number of filler rows."""
    check_names([*names, *background])
    ids = [*range(len(names)), *[-1] * len(background)]
    text, class_of_row = self._text_rows((*names, *background), tuple(ids))
    count = len(class_of_row)
    fillers = 0
    if self.predictor.network.independent:
      fillers = max(MIN_ROWS, round_up(count)) - count
    # Joined by NumPy: JAX would compile and keep a program for every number of words.
    text = np.concatenate([text, *[text[:1]] * fillers])
    return self.predictor.sliding_window(text, refine=refine), class_of_row, fillers

  def _distinct_rows(self, typed: tuple[str, ...], ids: tuple[int, ...]) -> tuple:
    check_distinct(typed, self.predictor.encoder.synonyms)
    return self.predictor.text_rows([without_articles(name) for name in typed], ids)

  def __repr__(self) -> str:
    return f"Segmenter({self.method})"


def _in_type(predictor: Predictor, dtype: str) -> Predictor:
  """The same predictor in one of TYPES."""
  if dtype == "auto":
    dtype = devices.fast_type(jax.local_devices()[0], predictor.clip_parameters)
  network = predictor.network.clone(dtype=jnp.dtype(dtype))
  return dataclasses.replace(predictor, network=network)


def _training_free(predictor: Predictor, clip: str) -> str:
  title = f"training-free {predictor.network.title} on {clip}, no trained prompts"
  return _noted(title, predictor)


def _noted(method: str, predictor: Predictor) -> str:
  return "; ".join(filter(None, [method, predictor.note]))


def _shipped_prompts(model: str | os.PathLike) -> pathlib.Path | None:
  if str(model) in SHIPPED_PROMPTS and not expand(model).exists():
    return clip_file.ASSETS / SHIPPED_PROMPTS[str(model)]
  return None


def note_of(model: str | os.PathLike) -> str:
  """What must be known of a model's results, before it is loaded; "" if nothing is known to be.

  Args:
    model: see `Segmenter.load`; files of weights are not opened for this.
  """
  path, name = expand(model), str(model)
  prompts = _shipped_prompts(model) or exported.here(model)
  if path.is_dir() and not prompts.is_file():
    return clip_file.NOTES.get(clip_of(path), "")
  if not path.exists() and name in SHIPPED:
    fingerprint = arrays.fingerprint(clip_file.load_clip(SHIPPED[name][0])[1])
    return clip_file.NOTES.get(fingerprint, "")
  if prompts_file.holds_prompts(prompts):
    return clip_file.NOTES.get(prompts_file.load(prompts).clip, "")
  return ""
