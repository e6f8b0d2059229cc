"""CLIP weights from the files people have to the parameter tree of `rpn_jax.models.clip`."""

import dataclasses
import functools
import json
import pathlib
import re
from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax import traverse_util

from rpn_jax.base.errors import InputError
from rpn_jax.models.clip import CLIP, CLIPConfig
from rpn_jax.weights import torch_archive
from rpn_jax.weights.arrays import (
  FORMAT,
  OWN,
  VERSION,
  float32,
  read_arrays,
  read_json,
  written,
)
from rpn_jax.weights.names import (
  OPENAI,
  Naming,
  clip_rules,
  from_hf,
  plain_openclip,
  same_names,
  to_ours,
)

# --- Architecture ---------------------------------------------------------------------------------

# No published CLIP comes near; a file that declares more is damaged or hostile.
_MAX_FIELD = 1 << 20
_MAX_LAYERS = 128


def read_architecture(state: Mapping[str, np.ndarray], naming: Naming, where: str) -> dict:
  """CLIPConfig fields that the shapes tell: all but the heads and the activation."""

  def shape(name: str, rank: int) -> tuple[int, ...]:
    if name not in state:
      hint = " (a ResNet)" if f"{naming.vision}layer1.0.conv1.weight" in state else ""
      raise InputError(
        f"expected a CLIP ViT with OpenAI's names or this project's, {name!r} is missing in "
        f"{where}, which has {sorted(state)[:2]}{hint}: use a ViT file of OpenAI or open_clip"
      )
    if len(state[name].shape) != rank or not all(state[name].shape):
      raise InputError(
        f"expected {name!r} with {rank} axes, got shape {state[name].shape} in {where}: "
        "this is no CLIP ViT, use another file"
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


def make_config(fields: Mapping, overrides: Mapping, where: str) -> CLIPConfig:
  """A checked CLIPConfig from fields that are known and fields that a person gave.

  Heads that nobody gave are width / 64, OpenAI's rule.
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
      f"expected to be told the activation, {where} does not tell it: pass --activation=quick_gelu "
      "(OpenAI's models, and those of open_clip that say quickgelu) or --activation=gelu"
    )
  if set(fields) != set(names):
    wrong = sorted(set(fields) ^ set(names))
    raise InputError(f"expected the config fields {names}, {wrong} missing or unknown in {where}")
  for name in names:
    value = fields[name]
    most = _MAX_LAYERS if name.endswith("_layers") else _MAX_FIELD
    is_size = type(value) is int and 0 < value <= most
    if name not in ("activation", "vision") and not is_size:
      raise InputError(
        f"expected an integer from 1 to {most} for {name}, got {value!r} in {where}: correct it"
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


def _check_layers(config: CLIPConfig, flat: Iterable[str], where: str) -> None:
  """Before the model is asked for its shapes: a declared number of layers costs time."""
  for branch, declared in (("visual", config.vision_layers), ("text", config.text_layers)):
    found = len({path.split("/")[1] for path in flat if path.startswith(f"{branch}/block_")})
    if found != declared:
      raise InputError(
        f"expected {declared} {branch} layers as configured, got {found} in {where}: "
        "use the complete file or correct the config"
      )


def check_tree(config: CLIPConfig, flat: Mapping[str, np.ndarray], where: str) -> None:
  """Names and shapes of our flat arrays against the model."""
  _check_layers(config, flat, where)
  shapes = expected_shapes(config)
  same_names(set(shapes), flat, where)
  for path, shape in shapes.items():
    if np.shape(flat[path]) != shape:
      raise InputError(
        f"expected {path} with shape {shape}, got {np.shape(flat[path])} in {where}: "
        "the file is damaged or of another architecture"
      )


def _told(path: pathlib.Path, kind: str, hf: bool) -> dict:
  """CLIPConfig fields that no shape tells, from the files of the model's publisher.

  Raises:
    InputError: a config that this project's CLIP cannot follow.
  """
  if kind == torch_archive.TORCHSCRIPT:
    activation = torch_archive.activation(path)
    return {"activation": activation} if activation else {}
  folder = path if path.is_dir() else path.parent
  beside = folder / ("config.json" if hf else "open_clip_config.json")
  if not beside.is_file():
    return {}
  content = read_json(beside)
  try:
    return _told_by_hf(content) if hf else _told_by_openclip(content)
  except (TypeError, AttributeError, ValueError, ArithmeticError) as error:
    raise InputError(f"expected the config of a CLIP model in {beside}, {error}") from None


def _told_by_hf(content: Mapping) -> dict:
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


def _told_by_openclip(content: Mapping) -> dict:
  model = content.get("model_cfg", content)
  vision = model.get("vision_cfg") or {}
  if "timm_model_name" in vision:
    raise ValueError(f"its image tower is {vision['timm_model_name']}, not CLIP's")
  fields = {"activation": "quick_gelu" if model.get("quick_gelu") else "gelu"}
  if heads := (model.get("text_cfg") or {}).get("heads"):
    fields["text_heads"] = heads
  if width := vision.get("width"):
    fields["vision_heads"] = int(width) // int(vision.get("head_width", 64))
  return fields


def _drop_extras(state: Mapping[str, np.ndarray], fields: Mapping, where: str) -> dict:
  """The state without OpenAI's entries that are no weights, once they agree with the weights.

  These are three numbers and the text tower's causal mask.
  """
  numbers = {
    "input_resolution": fields["image_size"],
    "context_length": fields["context_length"],
    "vocab_size": fields["vocab_size"],
  }
  kept = {}
  for name, value in state.items():
    if name in numbers:
      if value.size != 1 or int(value.reshape(())) != numbers[name]:
        raise InputError(
          f"expected {name} {numbers[name]} as the weights have it, got "
          f"{value.ravel()[:3].tolist()} in {where}: the file is damaged"
        )
    elif name.startswith("transformer.") and name.endswith(".attn_mask"):
      length = fields["context_length"]
      if value.shape != (length, length) or not np.array_equal(
        np.isneginf(value.astype(np.float32)), np.triu(np.ones((length, length), bool), 1)
      ):
        raise InputError(f"expected a causal mask in {name!r} in {where}: the file is damaged")
    else:
      kept[name] = value
  return kept


def load_with_kind(path, overrides: Mapping | None, read=None) -> tuple[str, CLIPConfig, dict]:
  path, overrides = pathlib.Path(path), dict(overrides or {})
  kind, state, metadata = read or read_arrays(path)
  where = str(path)
  if kind == OWN:
    if metadata.get("version") != VERSION:
      raise InputError(
        f"expected version {VERSION} of this project's weights, got {metadata.get('version')!r} in "
        f"{where}: convert the original again"
      )
    try:
      fields = dict(json.loads(metadata["config"]))
    except (KeyError, TypeError, ValueError, RecursionError):
      raise InputError(
        f"expected a config in the metadata of {where}: convert the original again"
      ) from None
    config = make_config(fields, overrides, where)
    flat = {name: float32(value, name, where) for name, value in state.items()}
  else:
    hf = any(name.startswith("vision_model.") for name in state)
    told = _told(path, kind, hf)
    state = from_hf(state, where) if hf else plain_openclip(state)
    fields = read_architecture(state, OPENAI, where)
    config = make_config({**fields, **told}, overrides, where)
    kind = f"{kind} with the names of {'Hugging Face' if hf else 'OpenAI'}"
    state = _drop_extras(state, fields, where)
    flat = to_ours(clip_rules(OPENAI, fields["vision_layers"], fields["text_layers"]), state, where)
  check_tree(config, flat, where)
  return kind, config, traverse_util.unflatten_dict(flat, sep="/")


def load(path, config: Mapping | None = None) -> tuple[CLIPConfig, dict]:
  """CLIP weights of any file this module reads.

  Args:
    path: a TorchScript archive, a PyTorch state dict (zip format, bare or under `state_dict`),
      safetensors, the index of shards of these, or a folder with one of them; with the names of
      OpenAI, open_clip or transformers; or safetensors written by `save`.
    config: CLIPConfig fields that the file does not tell or that it tells wrongly: `vision_heads`,
      `text_heads` (else width / 64) and `activation` ("quick_gelu" or "gelu"). Files written by
      `save` know them, TorchScript archives and a config beside the weights the activation.

  Returns:
    The architecture, and the parameters as a nested dictionary of float32 arrays for
    `CLIP(config).apply({"params": ...})`.

  Raises:
    InputError: no such file, a damaged or foreign one, an array missing, unknown or misshapen, or
      an activation that nothing tells.
  """
  return load_with_kind(path, config)[1:]


# --- Writing --------------------------------------------------------------------------------------


def save(path, config: CLIPConfig, params, dtype=np.float32, metadata=None) -> None:
  """Writes CLIP weights as this project's safetensors.

  Keys are '/'-joined tree paths; the header says `format`, `version` and the config as JSON. The
  file appears whole or not at all.

  Args:
    path: of the new file; an old one is replaced.
    config: the architecture.
    params: the parameter tree.
    dtype: float16 or float32. Vectors (norms, biases) and the logit scale stay float32, since they
      are small and matter most.
    metadata: more header entries, strings by strings.

  Raises:
    InputError: the tree does not fit the config, a weight overflows float16, or the path cannot
      be written.
  """
  path, dtype = pathlib.Path(path), np.dtype(dtype)
  if dtype not in (np.float16, np.float32):
    raise InputError(f"expected dtype float16 or float32, got {dtype} for {path}: choose one")
  flat = {k: np.asarray(v) for k, v in traverse_util.flatten_dict(params, sep="/").items()}
  check_tree(config, flat, f"the parameters for {path}")
  arrays = {}
  for name, value in flat.items():
    with np.errstate(over="ignore"):
      arrays[name] = np.ascontiguousarray(value, dtype if value.ndim > 1 else np.float32)
    arrays[name] = arrays[name].reshape(value.shape)
    if not np.isfinite(arrays[name]).all():
      raise InputError(
        f"expected finite numbers in {name}, got infinity or NaN as {arrays[name].dtype} for "
        f"{path}: use float32 or check the weights"
      )
  header = {
    **(metadata or {}),
    "format": FORMAT,
    "version": VERSION,
    "config": json.dumps(dataclasses.asdict(config)),
  }
  with written(path) as temporary:
    safetensors.numpy.save_file(arrays, temporary, header)


# --- Command line ---------------------------------------------------------------------------------


def describe(config: CLIPConfig) -> str:
  """One line on an architecture."""
  c = config
  return (
    f"image {c.image_size} px, patch {c.patch_size}, vision {c.vision_layers} x {c.vision_width} "
    f"({c.vision_heads} heads), text {c.text_layers} x {c.text_width} ({c.text_heads} heads), "
    f"context {c.context_length}, vocabulary {c.vocab_size}, joint {c.embed_dim}, {c.activation}"
  )
