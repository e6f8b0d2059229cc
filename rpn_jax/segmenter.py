"""Your picture, your words: `Segmenter.load(model)("photo.jpg", ["a cat", "grass"])`.

A model is the workdir of a training run, which is RPN with the run's prompts, or a file of CLIP
weights, or a name shipped with the package: both of the latter are read training-free.
"""

import difflib
import functools
import json
import pathlib
import re
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from rpn_jax import images, visualize
from rpn_jax.errors import InputError
from rpn_jax.experiment import Experiment, load_clip
from rpn_jax.logging import write_json
from rpn_jax.models.training_free import METHODS, SCALE
from rpn_jax.sliding import Reading, bucket
from rpn_jax.text_cache import SEPARATOR, check_names, expand

# Weights in rpn_jax/assets, with the templates that they were trained on.
SHIPPED = {"shapes_clip": ("shapes_clip.safetensors", "single")}
NOTE = {"shapes_clip": "it knows the embedded world of shapes only, not photographs"}
# Lowers the scores of rows that only fill a program's shape below all others.
NEVER = -1e4
# What an emphasis of 1 adds: half the range of a sigmoid, and as much as cosines usually differ.
EMPHASIS = {True: 0.5, False: 0.05}


def parse_names(names: str | Sequence[str | Sequence[str]]) -> tuple[str, ...]:
  """Class names, each with its synonyms behind commas as the vocabularies write them.

  Args:
    names: "cat | kitten, grass", with commas or line ends between classes and `|` between
      synonyms, or a list of names, in which a list stands for synonyms.

  Raises:
    InputError: no name, an empty or a repeated one.
  """
  if isinstance(names, str):
    names = [name.split("|") for name in re.split(r"[,\n]", names.strip().strip(","))]
  rows = [[name] if isinstance(name, str) else name for name in names]
  return check_names([SEPARATOR.join(part.strip() for part in row) for row in rows])


def prompt_of(name: str) -> str:
  """A name without its articles: the sentence around it brings its own."""
  parts = [re.sub(r"^(an?|the)\s+(?=\S)", "", part, flags=re.I) for part in name.split(SEPARATOR)]
  return SEPARATOR.join(parts)


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
    _check_adjustment(names, self.other, self.emphasis)

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
    return visualize.annotated(self.image, self.labels, self.names, alpha=alpha, palette=palette)

  def summary(self) -> dict:
    """What `save` writes as JSON."""
    colors = visualize.class_colors(self.names).tolist()
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
        "id": visualize.no_class(len(self.names)),
        "share": round(float((self.labels < 0).mean()), 6),
      },
      "emphasis": self.emphasis,
    }

  @property
  def _index(self) -> np.ndarray:
    """The labels as files have them: `visualize.no_class` where there is none."""
    return np.where(self.labels < 0, visualize.no_class(len(self.names)), self.labels)

  def mask(self, palette: str = "default"):
    """A PIL image of the class ids; `visualize.no_class` where there is none."""
    return visualize.index_picture(self._index, self.names, palette)

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
    written = visualize.save_prediction(
      directory, stem, self.image, self._index, self.names, **options
    )
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
      weights = load_clip(str(file))
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
    _check_adjustment(names, other, emphasis or {})  # before the network has run
    window, class_of_row, filled = self._window(names, words)
    c = self.experiment.config.data
    waiting = deque()

    def read():
      for picture in pictures:
        image = images.read(picture)
        inputs = images.to_network(image, c.short_side, c.mean, c.std)
        file = picture if isinstance(picture, (str, pathlib.Path)) else ""
        waiting.append((image, file, inputs.shape[:2]))
        yield inputs

    for reading in window.read(read()):
      yield self._result(
        reading, waiting.popleft(), names, class_of_row, filled, other=other, emphasis=emphasis
      )

  def _result(self, reading: Reading, picture, names, class_of_row, filled, **options):
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
    prompts = [prompt_of(name) for name in (*names, *background)]
    ids = [*range(len(names)), *[-1] * len(background)]
    rows, class_of_row = expand(prompts, ids, self.experiment.config.synonyms)
    text = jnp.asarray(self._text(rows))
    # Rows of a training-free method do not know of each other; those of RPN do.
    dense = self.experiment.config.dense
    independent = not (self.experiment.trainable or dense.denoise or dense.key_smoothing)
    filled = bucket(len(rows)) - len(rows) if independent else 0
    text = jnp.concatenate([text, *[text[:1]] * filled])
    window = self.experiment.segmenter(self._prompts, text)
    return window, np.array(class_of_row), filled

  def __repr__(self) -> str:
    return f"Segmenter({self.method})"


def _check_adjustment(names: Sequence[str], other: float, emphasis: Mapping) -> None:
  unknown = [name for name in emphasis if name not in names]
  if unknown:
    raise InputError(f"emphasis on {unknown[0]!r}: expected one of {', '.join(names)}")
  if not 0 <= other <= 1:
    raise InputError(f"expected an `other` threshold in [0, 1], got {other}")


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
        "mean": images.CLIP_MEAN,
        "std": images.CLIP_STD,
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
