"""Your image, your words: `Segmenter.load(model)("photo.jpg", ["a cat", "grass"])`.

A model is the workdir of a training run, whose network has the run's prompts, or a file of CLIP
weights or the name of shipped ones, which a training-free method reads.
"""

import functools
import os
import pathlib
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, overload

import jax.numpy as jnp
import numpy as np

from rpn_jax.base import pixels
from rpn_jax.base.errors import InputError
from rpn_jax.base.paths import expand
from rpn_jax.base.pixels import ImageSource
from rpn_jax.base.words import Names, check_known, check_names, parse_names, without_articles
from rpn_jax.inference.predictor import Predictor, open_run
from rpn_jax.inference.segmentation import ClassScores, Segmentation, check_adjustment
from rpn_jax.inference.sliding import SlidingWindow, round_up
from rpn_jax.models import training_free
from rpn_jax.training.run import Run, read_config

# What a CLIP as it is can be read by.
METHODS = training_free.METHODS
# Weights in rpn_jax/assets, with the templates that they were trained on.
SHIPPED = {"shapes_clip": ("shapes_clip.safetensors", "single")}
NOTE = {"shapes_clip": "it was trained on the shapes data set, not on photographs"}


class Segmenter:
  """Segments images into named classes; make one with `Segmenter.load`.

  Programs are compiled for rounded sizes, not for each image and list of words: images of similar
  sizes share them, and so do lists of as many words.

  Attributes:
    predictor: the network and all that an image needs.
    method: what it is, in words.
    step: of the checkpoint, 0 of a training-free method.
  """

  def __init__(self, predictor: Predictor, method: str, step: int = 0):
    self.predictor, self.method, self.step = predictor, method, step
    self._text_rows = functools.lru_cache(64)(predictor.text_rows)

  @classmethod
  def load(
    cls,
    model: str | os.PathLike = "shapes_clip",
    *,
    method: str | None = None,
    checkpoint: str = "last",
    templates: str | Sequence[str] | None = None,
    synonyms: str | None = None,
    clip: str | None = None,
  ) -> "Segmenter":
    """A segmenter from the workdir of a run, a file of CLIP weights, or a shipped name.

    Args:
      model: a folder, a file, or one of SHIPPED.
      method: None takes a run's trained network, and "sclip" where there are weights only; one of
        METHODS reads a CLIP as it is, that of a run too.
      checkpoint: of a run: "last", or "best", the one with the highest score in its evaluations.
      templates: sentences around a name, see `text.templates.template_sentences`; None takes the
        run's, or the 80 of ImageNet for weights.
      synonyms: how several words for a class are joined, see `text.templates`; None takes the
        run's.
      clip: where the CLIP weights of a run are now, if they have moved.

    Raises:
      InputError: no such model, or a damaged one.
    """
    if method is not None:
      check_known("method=", method, ("rpn", *METHODS))
    if checkpoint not in ("last", "best"):
      raise InputError(f'checkpoint must be "last" or "best", got {checkpoint!r}')
    path = expand(model)
    if path.is_dir():
      choices = {"templates": templates, "synonyms": synonyms, "clip": clip}
      return cls._of_run(path, method, checkpoint, choices)
    name = str(model)
    file: str | pathlib.Path
    if name in SHIPPED and not path.exists():
      file, own_templates = SHIPPED[name]
    elif path.is_file():
      file, own_templates, name = path, "imagenet80", path.stem
    else:
      raise InputError(
        f"model={name!r}: expected the workdir of a run, a file of CLIP weights, or one of "
        f"{', '.join(SHIPPED)}; nothing is there"
      )
    if method == "rpn":
      raise InputError(f"method='rpn' needs the workdir of a training run, got {model}")
    predictor = Predictor.from_weights(
      file,
      method=method or "sclip",
      templates=own_templates if templates is None else templates,
      synonyms=synonyms or "mean",
    )
    return cls(predictor, _training_free(predictor, name))

  @classmethod
  def _of_run(
    cls, workdir: pathlib.Path, method: str | None, checkpoint: str, choices: dict
  ) -> "Segmenter":
    config = read_config(workdir)
    if method in METHODS:
      config.method, config.dense.method = "training_free", method
    for field, value in choices.items():
      if value is not None:
        config[field] = value
    return cls.of_run(*open_run(config.lock(), workdir), checkpoint)

  @classmethod
  def of_run(cls, predictor: Predictor, run: Run, checkpoint: str = "last") -> "Segmenter":
    """A segmenter with the prompts that a run has trained.

    Args:
      predictor: of the run's config.
      run: whose checkpoints are read.
      checkpoint: "last" or "best".
    """
    restored = predictor.read_prompts(run)
    step, prompts = restored.get(checkpoint, restored["last"])  # the best may be the last
    if predictor.network.trainable:
      method = f"{type(predictor.network).__name__}, step {step} of {run.workdir}"
    else:
      method = _training_free(predictor, pathlib.Path(run.config.clip).stem)
    return cls(predictor.with_prompts(prompts), method, step)

  @overload
  def __call__(
    self, images: ImageSource, names: Names, *, other: float = ..., background: Names = ...,
    emphasis: Mapping[str, float] | None = ...,
  ) -> Segmentation: ...  # fmt: skip

  @overload
  def __call__(
    self, images: list | tuple, names: Names, *, other: float = ..., background: Names = ...,
    emphasis: Mapping[str, float] | None = ...,
  ) -> list[Segmentation]: ...  # fmt: skip

  def __call__(
    self, images: ImageSource | list | tuple, names: Names, *, other: float = 0.0,
    background: Names = (), emphasis: Mapping[str, float] | None = None,
  ) -> Segmentation | list[Segmentation]:  # fmt: skip
    """Segments one image, or a list of them.

    Args:
      images: a path, a PIL image or an array (H, W, 3) uint8; or a list of these.
      names: see `words.parse_names`; any words, trained on or not.
      other: pixels whose best score (0 to 1) is lower belong to no class.
      background: words that compete with the names, and whose pixels belong to no class.
      emphasis: {name: -1 … 1}: raises or lowers the scores of single names.

    Returns:
      A Segmentation, or a list of them.

    Raises:
      InputError: not an image, or not a name.
    """
    options: dict[str, Any] = {"other": other, "background": background, "emphasis": emphasis}
    if isinstance(images, (list, tuple)):
      return list(self.stream(images, names, **options))
    return next(self.stream([images], names, **options))

  def stream(
    self, images: Iterable[ImageSource], names: Names, *, other: float = 0.0,
    background: Names = (), emphasis: Mapping[str, float] | None = None,
  ) -> Iterator[Segmentation]:  # fmt: skip
    """Like a call with many images, one after another; windows of several share a pass."""
    names = parse_names(names)
    words = parse_names(background) if background else ()
    check_adjustment(names, other, emphasis or {})  # before the network has run
    window, class_of_row, fillers = self._window(names, words)
    pending: deque[tuple[np.ndarray, str | pathlib.Path, tuple[int, int]]] = deque()

    def read() -> Iterator[np.ndarray]:
      for source in images:
        image = pixels.read(source)
        inputs = self.predictor.prepare(image)
        file = source if isinstance(source, (str, pathlib.Path)) else ""
        pending.append((image, file, inputs.shape[:2]))
        yield inputs

    for logits in window.read(read()):
      image, file, size = pending.popleft()
      scores = ClassScores(self.predictor.network, logits, size, class_of_row, fillers)
      yield Segmentation(
        image, names, self.method, scores, file=file, other=other, emphasis=emphasis
      )

  def _window(
    self, names: tuple[str, ...], background: tuple[str, ...]
  ) -> tuple[SlidingWindow, np.ndarray, int]:
    """Sliding-window inference, the class of each of its rows, and how many rows are fillers."""
    check_names([*names, *background])
    prompts = [without_articles(name) for name in (*names, *background)]
    ids = [*range(len(names)), *[-1] * len(background)]
    text, class_of_row = self._text_rows(tuple(prompts), tuple(ids))
    count = len(class_of_row)
    fillers = round_up(count) - count if self.predictor.network.independent else 0
    text = jnp.concatenate([jnp.asarray(text), *[text[:1]] * fillers])
    return self.predictor.sliding_window(text), class_of_row, fillers

  def __repr__(self) -> str:
    return f"Segmenter({self.method})"


def _training_free(predictor: Predictor, name: str) -> str:
  method = f"training-free {predictor.network.title} on {name}, no trained prompts"
  return f"{method}; {NOTE[name]}" if name in NOTE else method
