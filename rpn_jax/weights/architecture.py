"""The architecture of CLIP weights: told by their shapes, their publisher, or a person.

`CLIPConfig` holds it. What a file declares is checked before anything is computed from it.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from rpn_jax.base import pixels
from rpn_jax.base.errors import InputError
from rpn_jax.models.clip import CLIPConfig
from rpn_jax.weights.names import Naming, check_same_names, other_model

# No published CLIP comes near; a file that declares more is damaged or hostile.
_MAX_SIZE = 1 << 20
_MAX_LAYERS = 128


# Fields of CLIPConfig that no shape and no code depends on.
IMAGE_FIELDS = ("mean", "std", "squash")


def without_images(config: CLIPConfig) -> dict:
  """The fields but IMAGE_FIELDS, by name."""
  return {name: value for name, value in vars(config).items() if name not in IMAGE_FIELDS}


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
      raise InputError(
        f"expected a CLIP ViT with OpenAI's names or this project's, {name!r} is missing in "
        f"{where}, which has {sorted(state)[:2]}{other_model(state)}: use a ViT file of OpenAI or "
        "open_clip"
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
  blocks = {}
  if layers(naming.vision):
    name = f"{naming.vision}transformer.resblocks.0.mlp.c_fc.weight"
    blocks = {"vision_mlp_width": shape(name, 2)[0]}
  return {
    "embed_dim": shape(f"{naming.text}text_projection", 2)[1],
    "image_size": side * patch,
    "patch_size": patch,
    "vision_width": vision_width,
    "vision_layers": layers(naming.vision),
    **blocks,
    "text_width": text_width,
    "text_layers": layers(naming.text),
    "context_length": context,
    "vocab_size": shape(f"{naming.text}token_embedding.weight", 2)[0],
  }


def agreed(fields: Mapping, claims: Mapping, where: str, source: str) -> dict:
  """Fields together with those of another source, which must not contradict them.

  Args:
    fields: of CLIPConfig.
    claims: more of them.
    where: what tells the first, for messages.
    source: what tells the second, for messages.

  Raises:
    InputError: two values for a field.
  """
  for name, value in claims.items():
    if name in fields and fields[name] != value:
      raise InputError(
        f"expected {name} {fields[name]!r} as in {where}, got {value!r} from {source}: use the one "
        "that belongs to the weights"
      )
  return {**fields, **claims}


# (width, layers) of the published towers whose heads are not 64 wide.
_WIDE_HEADS = {
  "vision": {(1280, 32): 16, (1408, 40): 16, (1664, 48): 16, (1792, 56): 16},
  "text": {},
}
_HEADS_OF_64 = {
  "vision": (192, 384, 512, 640, 768, 896, 1024),
  "text": (256, 384, 512, 640, 768, 1024, 1280),
}


def usual_heads(tower: str, width: int, layers: int) -> int | None:
  """Heads of the published towers ("vision", "text") of a size; None where there is none.

  Source: OpenAI's models, the model configs of open_clip 3.3, and ViT's own (Dosovitskiy et al.,
  2021; Zhai et al., 2022), whose towers CLIP's are.
  """
  if width in _HEADS_OF_64[tower]:
    return width // 64
  return _WIDE_HEADS[tower].get((width, layers))


def complete_config(fields: Mapping, overrides: Mapping, where: str) -> CLIPConfig:
  """A checked CLIPConfig from fields that a file tells and fields that a person gave.

  Heads that nobody gave are those of the published models of the same size.

  Raises:
    InputError: a field is missing, unknown or impossible.
  """
  names = [field.name for field in dataclasses.fields(CLIPConfig)]
  # Every format but our own is CLIP's, and our own did not always say so.
  fields = agreed({"vision": "clip", **fields}, overrides, where, "what was passed")
  images = {name: fields.pop(name, None) for name in IMAGE_FIELDS}
  # Four times the tower's width is not told, and an earlier version reads the converted file.
  mlp = fields.pop("vision_mlp_width", None)
  wide = {"vision_mlp_width": mlp} if mlp and mlp != 4 * fields.get("vision_width", 0) else {}
  names = [name for name in names if name not in {*images, "vision_mlp_width"}]
  for tower in ("vision", "text"):
    width, layers = (fields.get(f"{tower}_{size}") for size in ("width", "layers"))
    if f"{tower}_heads" not in fields and isinstance(width, int) and isinstance(layers, int):
      heads = usual_heads(tower, width, layers)
      if heads is None:
        raise InputError(
          f"the heads of the {tower} tower, {layers} layers {width} wide, are unknown, {where} "
          f"does not tell them: convert it (rpn convert) with --{tower}_heads=NUMBER"
        )
      fields[f"{tower}_heads"] = heads
  if set(names) - set(fields) == {"activation"}:
    raise InputError(
      f"the activation is unknown, {where} does not tell it: convert it (rpn convert) with "
      "--activation=quick_gelu (OpenAI's models, and those of open_clip that say quickgelu) or "
      "--activation=gelu"
    )
  if set(fields) != set(names):
    wrong = sorted(set(fields) ^ set(names))
    raise InputError(f"expected the config fields {names}, {wrong} missing or unknown in {where}")
  names += wide
  fields |= wide
  for name in names:
    value = fields[name]
    maximum = _MAX_LAYERS if name.endswith("_layers") else _MAX_SIZE
    is_size = type(value) is int and 0 < value <= maximum
    if name not in ("activation", "vision") and not is_size:
      raise InputError(
        f"expected an integer from 1 to {maximum} for {name}, got {value!r} in {where}: correct it"
      )
  try:
    config = CLIPConfig(**fields, **image_fields(images, where))
  except (TypeError, ValueError) as error:
    raise InputError(f"{error} in {where}: correct it") from None
  for tower in ("vision", "text"):
    width, heads = fields[f"{tower}_width"], fields[f"{tower}_heads"]
    if width % heads:
      raise InputError(
        f"expected {tower}_heads that divide the width {width}, got {heads} in {where}: correct it"
      )
  return config


def image_fields(fields: Mapping, where: str) -> dict[str, Any]:
  """The checked IMAGE_FIELDS among fields of CLIPConfig; what is not told is None, or False.

  Raises:
    InputError: a value that cannot be one.
  """
  found: dict[str, Any] = {}
  for name in ("mean", "std"):
    value = fields.get(name)
    if value is not None:
      fits = isinstance(value, (list, tuple)) and len(value) == 3
      if not fits or not all(type(x) in (int, float) and math.isfinite(x) for x in value):
        raise InputError(f"expected three numbers for {name}, got {value!r} in {where}: correct it")
      if name == "std" and min(value) <= 0:
        raise InputError(f"expected std above 0, got {value!r} in {where}: correct it")
      value = tuple(map(float, value))
    found[name] = value
  if fields.get("squash") not in (None, False, True):
    raise InputError(f"expected true or false for squash, got {fields['squash']!r} in {where}")
  return {**found, "squash": bool(fields.get("squash"))}


class Normalization(NamedTuple):
  """What images are normalized by, per channel, for values in [0, 1]."""

  mean: tuple[float, ...]
  std: tuple[float, ...]


OPENAI_IMAGES = Normalization(pixels.CLIP_MEAN, pixels.CLIP_STD)


def normalization(mean: tuple[float, ...] | None, std: tuple[float, ...] | None) -> Normalization:
  """Mean and std of the images that weights were trained on; OpenAI's where they do not tell.

  OpenAI's in other digits are OpenAI's: a run is told from another by its numbers.
  """
  told = Normalization(mean or OPENAI_IMAGES.mean, std or OPENAI_IMAGES.std)
  return OPENAI_IMAGES if np.allclose(told, OPENAI_IMAGES, atol=1e-4, rtol=0) else told


def expected_shapes(config: CLIPConfig) -> dict[str, tuple[int, ...]]:
  """{'/'-joined path: shape} of the parameters of `models.clip.CLIP`.

  Written down, since to trace the model for them takes half a second, and longer with its layers.
  """
  c = config
  shapes: dict[str, tuple[int, ...]] = {"logit_scale": ()}

  def norm(path: str, width: int) -> None:
    shapes.update({f"{path}/scale": (width,), f"{path}/bias": (width,)})

  def dense(path: str, inputs: int, outputs: int) -> None:
    shapes.update({f"{path}/kernel": (inputs, outputs), f"{path}/bias": (outputs,)})

  def blocks(tower: str, layers: int, width: int, hidden: int) -> None:
    for path in (f"{tower}/block_{i}" for i in range(layers)):
      norm(f"{path}/ln_1", width)
      dense(f"{path}/attn/in_proj", width, 3 * width)
      dense(f"{path}/attn/out_proj", width, width)
      norm(f"{path}/ln_2", width)
      dense(f"{path}/mlp/c_fc", width, hidden)
      dense(f"{path}/mlp/c_proj", hidden, width)

  width, plain = c.vision_width, c.vision == "vit"
  shapes["visual/patch_embed/kernel"] = (c.patch_size, c.patch_size, 3, width)
  shapes["visual/class_embedding"] = (width,)
  shapes["visual/position_embedding"] = (1 + c.grid**2, width)
  if not plain:
    norm("visual/ln_pre", width)
    shapes["visual/proj"] = (width, c.embed_dim)
  blocks("visual", c.vision_layers, width, c.vision_mlp_width or 4 * width)
  norm("visual/ln_post", width)

  width = c.text_width
  shapes["text/token_embedding"] = (c.vocab_size, width)
  shapes["text/position_embedding"] = (c.context_length, width)
  blocks("text", c.text_layers, width, 4 * width)
  norm("text/ln_final", width)
  shapes["text/projection"] = (width, c.embed_dim)
  return shapes


def check_parameters(config: CLIPConfig, flat: Mapping[str, Any], where: str) -> None:
  """Compares arrays by '/'-joined path with the parameters of the model.

  Raises:
    InputError: an array is missing, unknown or misshapen.
  """
  # Before the shapes are listed: a declared number of layers costs time.
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
  images = normalization(c.mean, c.std)
  mlps = f", MLPs of {c.vision_mlp_width}" if c.vision_mlp_width else ""
  normalized = f"mean {images.mean}, std {images.std}"
  if images == OPENAI_IMAGES:
    normalized = "OpenAI's mean and std" + (" for want of others" if c.mean is None else "")
  return (
    f"image {c.image_size} px, patch {c.patch_size}, vision {c.vision_layers} x {c.vision_width} "
    f"({c.vision_heads} heads{mlps}), "
    f"text {c.text_layers} x {c.text_width} ({c.text_heads} heads), "
    f"context {c.context_length}, vocabulary {c.vocab_size}, joint {c.embed_dim}, {c.activation}, "
    f"images {'squashed' if c.squash else 'cropped'} to a square, {normalized}"
  )
