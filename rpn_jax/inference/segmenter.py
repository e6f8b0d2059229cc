"""Your picture, your words: `Segmenter.load(model)("photo.jpg", ["a cat", "grass"])`.

A model is the workdir of a training run, which is RPN with the run's prompts, or a file of CLIP
weights, or a name shipped with the package: both of the latter are read training-free.
"""

import difflib
import functools
import json
import pathlib
from collections import deque
from collections.abc import Iterable, Iterator, Sequence

import jax.numpy as jnp
import ml_collections
import numpy as np

from rpn_jax.base import pixels
from rpn_jax.base.errors import InputError
from rpn_jax.base.words import check_names, parse_names, without_articles
from rpn_jax.inference.predictor import Experiment
from rpn_jax.inference.segmentation import Segmentation, check_adjustment
from rpn_jax.inference.sliding import WindowLogits, round_up
from rpn_jax.models.training_free import METHODS
from rpn_jax.text.templates import expand
from rpn_jax.weights import clip_file

# Weights in rpn_jax/assets, with the templates that they were trained on.
SHIPPED = {"shapes_clip": ("shapes_clip.safetensors", "single")}
NOTE = {"shapes_clip": "it knows the embedded world of shapes only, not photographs"}


class Segmenter:
  """Segments pictures into named classes; make one with `Segmenter.load`.

  Programs are compiled for classes of sizes, not for each picture and list of words: pictures of
  similar sizes share them, and so do lists of as many words.

  Attributes:
    method: what it is, in words.
    experiment: the model and its config.
    step: of the checkpoint, 0 of a training-free method.
  """

  def __init__(self, experiment: Experiment, step: int, prompts: dict, name: str = ""):
    self.experiment, self.step, self._prompts = experiment, step, prompts
    config = experiment.config
    name = name or pathlib.Path(config.clip).stem
    if experiment.trainable:
      self.method = f"RPN, step {step} of {experiment.workdir}"
    else:
      self.method = f"training-free {config.dense.method} on {name}, no trained prompts"
      self.method += f"; {NOTE[name]}" if name in NOTE else ""
    self._text = functools.lru_cache(64)(experiment.text)

  @classmethod
  def load(
    cls,
    model="shapes_clip",
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
      method: None takes a run's trained prompts, and "sclip" where there are weights only; one of
        vanilla, maskclip, sclip and clearclip reads a CLIP as it is, that of a run too.
      checkpoint: of a run: "last", or "best", the one with the highest score in its evaluations.
      templates: sentences around a name, see `text_cache.template_sentences`; None takes the run's,
        or the 80 of ImageNet for weights.
      synonyms: how several words for a class are joined, see `text_cache`; None takes the run's.
      clip: where the CLIP weights of a run are now, if they have moved.

    Raises:
      InputError: no such model, or a damaged one.
    """
    if method not in (None, "rpn", *METHODS):
      near = difflib.get_close_matches(str(method), METHODS, 1, 0.0)[0]
      raise InputError(
        f"method={method!r} is not known; did you mean {near!r}? Known: rpn, {', '.join(METHODS)}"
      )
    if checkpoint not in ("last", "best"):
      raise InputError(f'checkpoint must be "last" or "best", got {checkpoint!r}')
    path = pathlib.Path(model).expanduser()
    name = str(model) if str(model) in SHIPPED and not path.exists() else path.stem
    weights = None
    if path.is_dir():
      config = _config_of_run(path)
    elif name in SHIPPED or path.is_file():
      if method == "rpn":
        raise InputError(f"method='rpn' needs the workdir of a training run, got {model}")
      file, own_templates = SHIPPED[name] if name == str(model) else (path, "imagenet80")
      weights = clip_file.load_clip(file)
      config = _config_of_weights(str(file), weights[0].image_size, own_templates)
    else:
      raise InputError(
        f"model={str(model)!r}: expected the workdir of a run, a file of CLIP weights, or one of "
        f"{', '.join(SHIPPED)}; nothing is there"
      )
    if method in METHODS:
      config.method, config.dense.method = "training_free", method
    for field, value in (("templates", templates), ("synonyms", synonyms), ("clip", clip)):
      if value is not None:
        config[field] = value
    experiment = Experiment(config.lock(), path if path.is_dir() else ".", weights)
    restored = experiment.restored()
    step, prompts = restored.get(checkpoint, restored["last"])  # the best may be the last
    return cls(experiment, step, prompts, "" if path.is_dir() else name)

  def __call__(self, pictures, names, *, other: float = 0.0, background=(), emphasis=None):
    """Segments one picture, or a list of them.

    Args:
      pictures: a path, a PIL image or an array (H, W, 3) uint8; or a list of these.
      names: see `parse_names`; any words, trained on or not.
      other: pixels whose best score (0 to 1) is lower belong to no class.
      background: words that compete with the names, and whose pixels belong to no class.
      emphasis: {name: -1 … 1}: raises or lowers the scores of single names.

    Returns:
      A Segmentation, or a list of them.

    Raises:
      InputError: what is no picture, or no name.
    """
    several = isinstance(pictures, (list, tuple))
    options = {"other": other, "background": background, "emphasis": emphasis}
    results = list(self.stream(pictures if several else [pictures], names, **options))
    return results if several else results[0]

  def stream(
    self, pictures: Iterable, names, *, other: float = 0.0, background=(), emphasis=None
  ) -> Iterator[Segmentation]:
    """As a call with many pictures, one after another; windows of several share a pass."""
    names = parse_names(names)
    words = parse_names(background) if background else ()
    check_adjustment(names, other, emphasis or {})  # before the network has run
    window, class_of_row, filled = self._window(names, words)
    c = self.experiment.config.data
    waiting = deque()

    def read():
      for picture in pictures:
        image = pixels.read(picture)
        inputs = pixels.to_network(image, c.short_side, c.mean, c.std)
        file = picture if isinstance(picture, (str, pathlib.Path)) else ""
        waiting.append((image, file, inputs.shape[:2]))
        yield inputs

    for reading in window.read(read()):
      yield self._result(
        reading, waiting.popleft(), names, class_of_row, filled, other=other, emphasis=emphasis
      )

  def _result(self, reading: WindowLogits, picture, names, class_of_row, filled, **options):
    image, file, size = picture
    return Segmentation(
      image,
      names,
      self.method,
      file=file,
      trainable=self.experiment.trainable,
      reading=reading,
      size=size,
      class_of_row=class_of_row,
      filled=filled,
      **options,
    )

  def _window(self, names: tuple[str, ...], background: tuple[str, ...]):
    """Sliding-window inference, the class of each of its rows, and how many rows only fill it."""
    check_names([*names, *background])
    prompts = [without_articles(name) for name in (*names, *background)]
    ids = [*range(len(names)), *[-1] * len(background)]
    rows, class_of_row = expand(prompts, ids, self.experiment.config.synonyms)
    text = jnp.asarray(self._text(rows))
    # Rows of a training-free method do not know of each other; those of RPN do.
    dense = self.experiment.config.dense
    independent = not (self.experiment.trainable or dense.denoise or dense.key_smoothing)
    filled = round_up(len(rows)) - len(rows) if independent else 0
    text = jnp.concatenate([text, *[text[:1]] * filled])
    window = self.experiment.segmenter(self._prompts, text)
    return window, np.array(class_of_row), filled

  def __repr__(self) -> str:
    return f"Segmenter({self.method})"


def _config_of_run(workdir: pathlib.Path) -> ml_collections.ConfigDict:
  """The config that a run wrote to its workdir, unlocked."""
  path = workdir / "config.json"
  if not path.exists():
    raise InputError(f"{workdir}: expected the workdir of a run, with a config.json; train first")
  try:
    config = json.loads(path.read_text())["config"]
    _ = config["eval"]["crop"], config["data"]["short_side"], config["method"]
  except (ValueError, KeyError, TypeError):
    raise InputError(
      f"{path}: expected the whole config of a segmentation run; repeat the run with this version"
    ) from None
  return ml_collections.ConfigDict(_with_tuples(config))


def _with_tuples(value):
  """JSON has lists only; modules hash their fields."""
  if isinstance(value, dict):
    return {k: _with_tuples(v) for k, v in value.items()}
  return tuple(map(_with_tuples, value)) if isinstance(value, list) else value


def _config_of_weights(clip: str, side: int, templates: str) -> ml_collections.ConfigDict:
  """How weights alone are used: SCLIP's protocol, in proportion to the tower's own input.

  At 224 pixels this is short side 336 and windows of 224 every 112 pixels.
  """
  return ml_collections.ConfigDict(
    {
      "clip": clip,
      "method": "training_free",
      "dense": {"method": "sclip", "denoise": 0.0, "key_smoothing": False},
      "templates": templates,
      "synonyms": "mean",
      "dtype": "float32",
      "seed": 0,
      "data": {
        "crop": side,
        "short_side": side * 3 // 2,
        "mean": pixels.CLIP_MEAN,
        "std": pixels.CLIP_STD,
      },
      "eval": {
        "crop": side,
        "stride": side // 2,
        "window_batch": 4,
        "seen_penalty": 0.0,
        "scales": (1.0,),
        "flip": False,
      },
    }
  )
