"""The architecture of CLIP weights: told by their shapes, their publisher, or a person.

`CLIPConfig` holds it. What a file declares is checked before anything is computed from it.
"""

import dataclasses
import functools
import re
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from rpn_jax.base.errors import InputError
from rpn_jax.models.clip import CLIP, CLIPConfig
from rpn_jax.weights import torch_archive
from rpn_jax.weights.arrays import WeightsFile, read_json
from rpn_jax.weights.names import Naming, check_same_names

# No published CLIP comes near; a file that declares more is damaged or hostile.
_MAX_SIZE = 1 << 20
_MAX_LAYERS = 128


def fields_from_shapes(state: Mapping[str, np.ndarray], naming: Naming, where: str) -> dict:
  """CLIPConfig fields that shapes tell: all but the heads and the activation.

  Args:
    state: arrays by the file's names.
    naming: of the file.
    where: the file, for messages.

  Raises:
    InputError: not a CLIP ViT.
  """

  def shape(name: str, rank: int) -> tuple[int, ...]:
    if name not in state:
      hint = " (a ResNet)" if f"{naming.vision}layer1.0.conv1.weight" in state else ""
      raise InputError(
        f"expected a CLIP ViT with OpenAI's names or this project's, {name!r} is missing in "
        f"{where}, which has {sorted(state)[:2]}{hint}: use a ViT file of OpenAI or open_clip"
      )
    if len(state[name].shape) != rank or not all(state[name].shape):
      raise InputError(
        f"not a CLIP ViT checkpoint: expected {name!r} with {rank} axes, got shape "
        f"{state[name].shape} in {where}; use another file"
      )
    return state[name].shape

  def layers(tower: str) -> int:
    block = re.compile(re.escape(f"{tower}transformer.resblocks.") + r"(\d+)\.")
    return len({match[1] for match in map(block.match, state) if match})

  vision_width, _, _, patch = shape(f"{naming.vision}conv1.weight", 4)
  rows, _ = shape(f"{naming.vision}positional_embedding", 2)
  context, text_width = shape(f"{naming.text}positional_embedding", 2)
  side = round((rows - 1) ** 0.5)
  if side < 1 or side * side != rows - 1:
    raise InputError(
      f"expected positions for a class token and a square grid, got {rows} rows in {where}: "
      "use a model trained on square images"
    )
  return {
    "embed_dim": shape(f"{naming.text}text_projection", 2)[1],
    "image_size": side * patch,
    "patch_size": patch,
    "vision_width": vision_width,
    "vision_layers": layers(naming.vision),
    "text_width": text_width,
    "text_layers": layers(naming.text),
    "context_length": context,
    "vocab_size": shape(f"{naming.text}token_embedding.weight", 2)[0],
  }


def fields_from_publisher(file: WeightsFile, hf: bool) -> dict:
  """CLIPConfig fields that no shape tells, from TorchScript code or the config beside the weights.

  Args:
    file: the weights.
    hf: whether they have the names of Hugging Face's transformers.

  Returns:
    Heads and activation, as far as they are told; {} where nothing tells them.

  Raises:
    InputError: a config that this project's CLIP cannot follow.
  """
  if file.kind == torch_archive.TORCHSCRIPT:
    activation = torch_archive.activation(file.path)
    return {"activation": activation} if activation else {}
  beside = file.path.parent / ("config.json" if hf else "open_clip_config.json")
  if not beside.is_file():
    return {}
  content = read_json(beside)
  try:
    return _fields_from_hf(content) if hf else _fields_from_openclip(content)
  except (TypeError, AttributeError, ValueError, ArithmeticError) as error:
    raise InputError(f"expected the config of a CLIP model in {beside}, {error}") from None


def _fields_from_hf(content: Mapping) -> dict:
  # Fields that are left out have these values there (CLIPVisionConfig, CLIPTextConfig).
  vision, text = (content.get(f"{tower}_config") or {} for tower in ("vision", "text"))
  activations = {x.get("hidden_act", "quick_gelu") for x in (vision, text)}
  if len(activations) > 1:
    raise ValueError(f"its towers have the activations {sorted(map(str, activations))}")
  for tower in (vision, text):
    if tower.get("layer_norm_eps", 1e-5) != 1e-5:
      raise ValueError(f"its layer_norm_eps is {tower['layer_norm_eps']}, CLIP's is 1e-05")
  return {
    "activation": activations.pop(),
    "vision_heads": vision.get("num_attention_heads", 12),
    "text_heads": text.get("num_attention_heads", 8),
  }


def _fields_from_openclip(content: Mapping) -> dict:
  model = content.get("model_cfg", content)
  vision = model.get("vision_cfg") or {}
  if "timm_model_name" in vision:
    raise ValueError(f"its image tower is {vision['timm_model_name']}, not CLIP's")
  fields: dict[str, str | int] = {"activation": "quick_gelu" if model.get("quick_gelu") else "gelu"}
  if heads := (model.get("text_cfg") or {}).get("heads"):
    fields["text_heads"] = heads
  if width := vision.get("width"):
    fields["vision_heads"] = int(width) // int(vision.get("head_width", 64))
  return fields


def complete_config(fields: Mapping, overrides: Mapping, where: str) -> CLIPConfig:
  """A checked CLIPConfig from fields that a file tells and fields that a person gave.

  Heads that nobody gave are width / 64, OpenAI's rule.

  Raises:
    InputError: a field is missing, unknown or impossible.
  """
  names = [field.name for field in dataclasses.fields(CLIPConfig)]
  # Every format but our own is CLIP's, and our own did not always say so.
  fields = {"vision": "clip", **fields, **overrides}
  for tower in ("vision", "text"):
    width, heads = fields.get(f"{tower}_width"), f"{tower}_heads"
    if heads not in fields and isinstance(width, int):
      if width < 64:
        raise InputError(
          f"expected a {tower} tower at least 64 wide, got {width} in {where}: its number of heads "
          f"is not in the file, pass {heads}"
        )
      fields[heads] = width // 64
  if set(names) - set(fields) == {"activation"}:
    raise InputError(
      f"the activation is unknown, {where} does not tell it: pass --activation=quick_gelu "
      "(OpenAI's models, and those of open_clip that say quickgelu) or --activation=gelu"
    )
  if set(fields) != set(names):
    wrong = sorted(set(fields) ^ set(names))
    raise InputError(f"expected the config fields {names}, {wrong} missing or unknown in {where}")
  for name in names:
    value = fields[name]
    maximum = _MAX_LAYERS if name.endswith("_layers") else _MAX_SIZE
    is_size = type(value) is int and 0 < value <= maximum
    if name not in ("activation", "vision") and not is_size:
      raise InputError(
        f"expected an integer from 1 to {maximum} for {name}, got {value!r} in {where}: correct it"
      )
  try:
    config = CLIPConfig(**fields)
  except (TypeError, ValueError) as error:
    raise InputError(f"{error} in {where}: correct it") from None
  for tower in ("vision", "text"):
    width, heads = fields[f"{tower}_width"], fields[f"{tower}_heads"]
    if width % heads:
      raise InputError(
        f"expected {tower}_heads that divide the width {width}, got {heads} in {where}: correct it"
      )
  return config


@functools.cache
def expected_shapes(config: CLIPConfig) -> dict[str, tuple[int, ...]]:
  """{'/'-joined path: shape} of the model's parameters, asked from the model itself."""
  image = jax.ShapeDtypeStruct((1, config.image_size, config.image_size, 3), jnp.float32)
  tokens = jax.ShapeDtypeStruct((1, config.context_length), jnp.int32)
  init = functools.partial(CLIP(config).init, method="encode")
  tree = jax.eval_shape(init, jax.random.key(0), image, tokens)["params"]
  return {path: leaf.shape for path, leaf in traverse_util.flatten_dict(tree, sep="/").items()}


def check_parameters(config: CLIPConfig, flat: Mapping[str, np.ndarray], where: str) -> None:
  """Compares arrays by '/'-joined path with the parameters of the model.

  Raises:
    InputError: an array is missing, unknown or misshapen.
  """
  # Before the model is asked for its shapes: a declared number of layers costs time.
  for branch, declared in (("visual", config.vision_layers), ("text", config.text_layers)):
    found = len({path.split("/")[1] for path in flat if path.startswith(f"{branch}/block_")})
    if found != declared:
      raise InputError(
        f"expected {declared} {branch} layers as configured, got {found} in {where}: "
        "use the complete file or correct the config"
      )
  shapes = expected_shapes(config)
  check_same_names(set(shapes), flat, where)
  for path, shape in shapes.items():
    if np.shape(flat[path]) != shape:
      raise InputError(
        f"expected {path} with shape {shape}, got {np.shape(flat[path])} in {where}: "
        "the file is damaged or of another architecture"
      )


def describe(config: CLIPConfig) -> str:
  """One line on an architecture."""
  c = config
  return (
    f"image {c.image_size} px, patch {c.patch_size}, vision {c.vision_layers} x {c.vision_width} "
    f"({c.vision_heads} heads), text {c.text_layers} x {c.text_width} ({c.text_heads} heads), "
    f"context {c.context_length}, vocabulary {c.vocab_size}, joint {c.embed_dim}, {c.activation}"
  )
