"""A network ready for inference: weights, text encoder, image preparation, sliding window."""

import collections
import dataclasses
import functools
import os
import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import traverse_util
from jax.sharding import PartitionSpec as P

from rpn_jax.base import pixels
from rpn_jax.base.errors import InputError
from rpn_jax.base.words import check_known
from rpn_jax.config import check, check_whole_patches, notes_on_sizes
from rpn_jax.devices import AXIS, data_mesh, platform_of, put_batch
from rpn_jax.inference.decision import Decision
from rpn_jax.inference.process import check_process
from rpn_jax.inference.protocol import Protocol, protocol_of
from rpn_jax.inference.refinement import Refinement
from rpn_jax.inference.sliding import SlidingWindow
from rpn_jax.models import NETWORKS, Network, kernels, training_free
from rpn_jax.models.clip import CLIPConfig
from rpn_jax.models.prompts import count
from rpn_jax.models.trained import in_compute_type, init_prompts, join, prompt_shapes, split
from rpn_jax.text.embeddings import TextEncoder
from rpn_jax.text.templates import expand
from rpn_jax.training.run import Run
from rpn_jax.weights import arrays, clip_file, exported, prompts_file
from rpn_jax.weights.architecture import normalization

# Programs of networks that are kept, the most recently used: one for each number of text rows, and
# with the layout "image" for each shape of image.
KEPT_PROGRAMS = 32
# Lists of classes whose encoded text a predictor keeps, the most recently used.
KEPT_TEXTS = 8


@functools.lru_cache(KEPT_PROGRAMS)
def forward(
  network: Network,
  mesh: jax.sharding.Mesh,
  text_shape: tuple[int, ...],
  image_shape: tuple[int, ...],
) -> jax.stages.Wrapped:
  """The jitted network (variables, text, image) -> logits, for texts and images of one shape.

  Every device takes its part of the images, and all of the rest. Equal networks share a program.
  JAX frees it with its function, and so the one that was not used for the longest time.
  """
  del text_shape, image_shape
  apply = lambda variables, text, image: network.apply(variables, image, text)
  return _on_each(apply, mesh, (P(), P(), P(AXIS)), P(AXIS))


@functools.lru_cache(KEPT_PROGRAMS)
def encode_text(
  network: Network, mesh: jax.sharding.Mesh, text_shape: tuple[int, ...]
) -> jax.stages.Wrapped:
  """The jitted `network.encode_text` (variables, text) -> text; kept as `forward` is."""
  del text_shape
  encode = lambda variables, text: network.apply(variables, text, method="encode_text")
  return _on_each(encode, mesh, (P(), P()), P())


def _on_each(
  function: Callable, mesh: jax.sharding.Mesh, inputs: Any, output: Any
) -> jax.stages.Wrapped:
  # A map over the devices, since XLA cannot divide the kernels of TPUs among them.
  mapped = jax.shard_map(function, mesh=mesh, in_specs=inputs, out_specs=output, check_vma=False)
  return jax.jit(mapped)


class _ShapeEncoder(NamedTuple):
  """Stands in for a text encoder where only shapes matter."""

  embed_dim: int
  sentences: int

  def embed(self, names: Sequence[str]) -> np.ndarray:
    return np.zeros((len(names), self.embed_dim), np.float32)

  def tokens(self, names: Sequence[str]) -> np.ndarray:
    return np.zeros((len(names), self.sentences, 8), np.int32)


@dataclasses.dataclass(eq=False, repr=False)
class Predictor:
  """A network with its weights, text encoder and inference protocol.

  Attributes:
    network: the network in the form it is trained in.
    params: the CLIP towers it uses, on the devices.
    prompts: the trained parameters; {} for a training-free network.
    encoder: class names -> embeddings; its config is `clip`, the architecture of the towers.
    protocol: the inference protocol.

  Raises:
    InputError: the window size is not a multiple of the patch size, or `check_process` refuses the
      process, here and in every method that computes.
  """

  network: Network
  params: dict
  prompts: dict
  encoder: TextEncoder
  protocol: Protocol

  def __post_init__(self) -> None:
    check_process()
    self.clip = self.encoder.config
    if self.protocol.layout != "image":
      multiple, crop = self.network.input_multiple, self.protocol.crop
      check_whole_patches("config.eval.crop", crop, "the CLIP weights", multiple)
    self._encoded: collections.OrderedDict[Hashable, jax.Array] = collections.OrderedDict()

  def __reduce__(self) -> tuple:
    """Pickled and copied without what it keeps of earlier words, and of where its weights lie."""
    return Predictor, (self.network, self.params, self.prompts, self.encoder, self.protocol)

  @classmethod
  def from_config(cls, config: ml_collections.ConfigDict) -> "Predictor":
    """The predictor of a run's config, still without prompts; see `with_prompts`.

    Args:
      config: config of a segmentation run.

    Raises:
      InputError: an invalid config value, or weights that cannot be read or do not fit.
    """
    check(config)
    clip, params = clip_file.load_clip(config.clip)
    config = clip_file.with_normalization(config, clip)
    network, protocol = make_network(config, clip), protocol_of(config)
    return cls._assemble(network, clip, params, config.templates, config.synonyms, protocol)

  def for_config(self, config: ml_collections.ConfigDict) -> "Predictor":
    """The same weights and words, with the settings of the network and the protocol of a config."""
    check(config)
    config = clip_file.with_normalization(config, self.clip)
    network = make_network(config, self.clip)
    return dataclasses.replace(self, network=network, protocol=protocol_of(config))

  @classmethod
  def from_weights(
    cls,
    path: str | os.PathLike,
    *,
    method: str | None = None,
    templates: str | Sequence[str] = "imagenet80",
    synonyms: str = "mean",
    dtype: str = "float32",
  ) -> "Predictor":
    """CLIP weights with a training-free method and the inference protocol of that method.

    Args:
      path: file of CLIP weights, or the name of shipped ones.
      method: one of `models.training_free.METHODS`; None is that of `default_method`.
      templates: see `text.templates`.
      synonyms: see `text.templates`.
      dtype: compute type, float32 or bfloat16.
    """
    clip, params = clip_file.load_clip(path)
    settings = {"method": method or training_free.default_method(clip)}
    network = _create("training_free", clip, settings, str(path), dtype=jnp.dtype(dtype))
    protocol = Protocol(
      **network.windows(clip)._asdict(),
      **normalization(clip.mean, clip.std)._asdict(),
    )
    return cls._assemble(network, clip, params, templates, synonyms, protocol)

  @classmethod
  def _assemble(
    cls,
    network: Network,
    clip: CLIPConfig,
    params: dict,
    templates: str | Sequence[str],
    synonyms: str,
    protocol: Protocol,
  ) -> "Predictor":
    """A predictor without prompts around the parameters of both towers."""
    encoder = TextEncoder(clip, params, templates, synonyms, arrays.fingerprint(params))
    towers = jax.device_put({name: params[name] for name in network.towers})
    return cls(network, towers, {}, encoder, protocol)

  def with_prompts(self, prompts: dict) -> "Predictor":
    """The same predictor with other prompts."""
    return dataclasses.replace(self, prompts=prompts)

  def read_prompts(self, run: Run) -> dict[str, tuple[int, dict]]:
    """Step and prompts of a run's newest checkpoint, "last", and of the "best" one.

    "best" is missing if it is the newest one, or with a file of prompts (config.prompts). A
    training-free network has step 0 and no prompts.

    Raises:
      InputError: there is no checkpoint, it belongs to another run, or it has values that are NaN
        or infinite.
    """
    if not self.network.trainable:
      return {"last": (0, {})}
    crop = run.config.data.crop
    if path := run.config.prompts:
      content, like = exported.load_prompts(path), lambda: self.prompt_shapes(crop)
      prompts_file.check(content, path, run.config.to_dict(), run.fingerprint, like)
      return {"last": (content.step, content.prompts)}
    restored = run.read(self.prompt_shapes(crop))
    for step, prompts in restored.values():
      for name, value in traverse_util.flatten_dict(prompts, sep="/").items():
        if wrong := int(np.size(value) - np.isfinite(value).sum()):
          raise InputError(
            f"expected finite prompts, {wrong:,} of the {np.size(value):,} values of {name!r} are "
            f"NaN or infinite in the checkpoint of step {step} in {run.workdir}: train again, or "
            "remove that checkpoint to use the one before it"
          )
    return restored

  @property
  def frozen(self) -> dict:
    """The part of the towers that is not trained, as a training step takes it."""
    return in_compute_type(split(self.params, self.network.trained)[1], self.network.dtype)

  @property
  def note(self) -> str:
    """What must be known of every result of these CLIP weights; "" for most."""
    return clip_file.NOTES.get(self.encoder.fingerprint, "")

  @property
  def clip_parameters(self) -> int:
    """Number of parameters of the whole CLIP, both towers."""
    return count(self.encoder.params)

  def init_prompts(self, text: Any, key: jax.Array, crop: int) -> dict:
    """Initial values of the trained parameters; see `models.trained.init_prompts`."""
    return init_prompts(self.network, self.params, text, key, crop)

  def prompt_shapes(self, crop: int) -> dict:
    """Shapes and types of the trained parameters, for training crops of a side in pixels."""
    # No shape depends on the classes.
    text = self._text_input(_ShapeEncoder(self.clip.embed_dim, self.encoder.sentences), ("",))
    return prompt_shapes(self.network, self.params, text, crop)

  def prepare(self, image_HxWx3: np.ndarray) -> np.ndarray:
    """Resizes and normalizes an RGB image (uint8) for the network: float32."""
    p = self.protocol
    return pixels.to_network(
      image_HxWx3, p.short_side, p.mean, p.std, long_side=p.long_side, library=p.resize
    )

  def for_data(self, data: Any) -> SlidingWindow:
    """Sliding-window inference with the class names of a data set, for its evaluation.

    The scores of `data.penalized` are lowered, except with a training-free network, for which no
    class is seen.
    """
    text, class_of_row = self.text_rows(data.names)
    penalized = set(data.penalized) if self.network.trainable else set()
    penalized_rows = [row for row, class_id in enumerate(class_of_row) if class_id in penalized]
    return self.sliding_window(text, penalized_rows, class_of_row)

  def text_rows(
    self, names: Sequence[str], class_ids: Sequence[int] | None = None
  ) -> tuple[Any, np.ndarray]:
    """The network's text input for class names, and the class id of each of its rows.

    If the encoder's synonyms are "max", a class has a row for every synonym.

    Args:
      names: C class names, synonyms joined by `words.SEPARATOR`.
      class_ids: ids of the names; None counts from 0.
    """
    check_process()
    ids = range(len(names)) if class_ids is None else class_ids
    prompted, class_of_row = expand(names, ids, self.encoder.synonyms)
    return self._text_input(self.encoder, prompted), np.array(class_of_row)

  def training_text(self, names: Sequence[str]) -> Any:
    """The network's text input for the classes of a training set, a row for each.

    Raises:
      InputError: names or templates that the network cannot be trained with.
    """
    return self._text_input(self.encoder, names)

  def _text_input(self, encoder: Any, names: Sequence[str]) -> Any:
    try:
      return self.network.text_input(encoder, names)
    except InputError:
      raise
    except ValueError as error:
      raise _setting_error(self.network.section, error) from None

  def sliding_window(
    self,
    text: Any,
    penalized: Sequence[int] = (),
    class_of_row: Sequence[int] | np.ndarray | None = None,
    refine: str | None = None,
  ) -> SlidingWindow:
    """Sliding-window inference on all local devices.

    Args:
      text: `network.text_input` of C names.
      penalized: rows of `text` whose scores are lowered.
      class_of_row: class id of every row, if several belong to one class.
      refine: another refinement than that of the protocol.
    """
    check_process()
    mesh, (network, variables) = data_mesh(), self._variables
    replicated = jax.sharding.NamedSharding(mesh, P())
    text = jax.device_put(self._encode(network, mesh, variables, text), replicated)

    def logits(windows: np.ndarray) -> jax.Array:
      apply = forward(network, mesh, text.shape, windows.shape)
      try:
        scores = apply(variables, text, put_batch(windows, mesh))
      except ValueError as error:  # windows that a network cannot take, while it is traced
        raise _setting_error(network.section, error) from error
      # Windows are merged on one device, which takes a fraction of the network's time.
      return jax.device_put(scores, mesh.devices[0])

    p = self.protocol
    # Images of their own shapes rarely share a call.
    window_batch = 1 if p.layout == "image" else p.window_batch
    return SlidingWindow(
      logits,
      len(text),
      layout=p.layout,
      crop=p.crop,
      stride=p.stride,
      square=p.square,
      keep_padding=p.keep_padding,
      multiple=network.input_multiple,
      window_batch=-(-window_batch // mesh.size) * mesh.size,
      penalty=p.seen_penalty,
      penalized=penalized,
      activation=network.scores,
      probabilities=network.probabilities,
      decision=Decision(p.threshold, p.area_threshold),
      refinement=Refinement(refine or p.refine, p.pamr_steps, tuple(p.pamr_dilations)),
      scales=p.scales,
      flip=p.flip,
      class_of_row=class_of_row,
    )

  @functools.cached_property
  def _variables(self) -> tuple[Network, dict]:
    """The network as it is used, and its variables in their compute type, on all local devices."""
    network, params, prompts = self.network.merged(self.params, self.prompts)
    joined = join(params, prompts)
    joined["params"] = in_compute_type(joined["params"], network.dtype)
    return network, jax.device_put(joined, jax.sharding.NamedSharding(data_mesh(), P()))

  def _encode(
    self, network: Network, mesh: jax.sharding.Mesh, variables: dict, text: Any
  ) -> jax.Array | np.ndarray:
    """`network.encode_text`; results of a text tower, as costly as an image's, are kept."""
    text = np.asarray(text)
    if "text" not in network.towers:
      return text
    key = text.shape, text.tobytes()
    if key not in self._encoded:
      self._encoded[key] = encode_text(network, mesh, text.shape)(variables, text)
      if len(self._encoded) > KEPT_TEXTS:
        self._encoded.popitem(last=False)
    self._encoded.move_to_end(key)
    return self._encoded[key]


def open_run(
  config: ml_collections.ConfigDict, workdir: str | os.PathLike
) -> tuple[Predictor, Run]:
  """The predictor of a config, still without prompts, and the run in a workdir.

  The run's config says how images are normalized, where the given one leaves it to the weights. A
  line says it where crops are far from what the tower was trained at.

  Raises:
    InputError: what `Predictor.from_config` refuses, or a crop that is not of whole patches.
  """
  predictor = Predictor.from_config(config)
  if predictor.network.trainable:  # whose prompts are made for crops of that size
    multiple = predictor.network.input_multiple
    check_whole_patches("config.data.crop", config.data.crop, config.clip, multiple)
  for note in _notes_on_sizes(config, predictor.network):
    print(note, flush=True)
  config = clip_file.with_normalization(config, predictor.clip)
  return predictor, Run(config, workdir, predictor.encoder.fingerprint)


def _notes_on_sizes(config: ml_collections.ConfigDict, network: Network) -> list[str]:
  """`config.notes_on_sizes` of a run, whose network does not resize its input itself."""
  if network.input_multiple != network.clip.patch_size:
    return []
  sides = {config.data.crop: "config.data.crop"} if network.trainable else {}
  if config.eval.layout != "image":  # whose windows are images
    sides.setdefault(config.eval.crop, "config.eval.crop")
  return notes_on_sizes(sides, config.clip, network.clip.image_size)


def make_network(
  config: ml_collections.ConfigDict, clip: CLIPConfig, platform: str = ""
) -> Network:
  """The network of a config for a CLIP architecture, with the kernels of a platform.

  Args:
    config: of a segmentation run.
    clip: the architecture.
    platform: as in `kernels.for_platform`; by default that of the local devices.

  Raises:
    InputError: settings or weights that the network does not support.
  """
  check_known("config.method=", config.method, NETWORKS)
  cls = NETWORKS[config.method]
  return _create(
    config.method,
    clip,
    config[cls.section].to_dict(),
    config.clip,
    platform,
    loss=config.loss.name,
    dtype=jnp.dtype(config.dtype),
    remat=config.remat,
  )


def _create(
  method: str, clip: CLIPConfig, settings: Mapping, where: str, platform: str = "", **options: Any
) -> Network:
  cls = NETWORKS[method]
  platform = platform or platform_of(data_mesh())
  try:
    return cls.create(clip, settings, kernels=kernels.for_platform(platform), **options)
  except ValueError as error:
    raise _setting_error(cls.section, error, where) from None


def _setting_error(section: str, error: ValueError, clip: str = "") -> InputError:
  """What a network says about its settings; it may begin with one, as in "width=3: expected"."""
  if re.match(r"\w+[=:]", str(error)):
    return InputError(f"config.{section}.{error}" + (f" (config.clip={clip})" if clip else ""))
  return InputError(f"config.{section}" + (f" with {clip}" if clip else "") + f": {error}")
