"""CLIP weights from the files people have to the parameter tree of `rpn_jax.models.clip`.

    python -m rpn_jax.convert ViT-B-16.pt clip_b16.safetensors --dtype float16 --verify

Reads TorchScript archives, PyTorch state dicts and safetensors, whole or in shards with an index,
with the names of OpenAI, open_clip or Hugging Face's transformers, and this project's own files.
Where a model's config.json or open_clip_config.json is beside its weights it is read, too.

The authors' checkpoint of RPN becomes a file of prompts, and such a file becomes theirs:

    python -m rpn_jax.convert rpn_voc.pth rpn_voc.safetensors --clip clip_b16.safetensors
    python -m rpn_jax.convert rpn_voc.safetensors rpn_voc.pth
"""

import argparse
import collections
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax import traverse_util

from rpn_jax import torch_archive
from rpn_jax.errors import InputError
from rpn_jax.logging import table
from rpn_jax.models.clip import CLIP, CLIPConfig, resize_positions
from rpn_jax.text_cache import class_embeddings

FORMAT, VERSION = "rpn_jax.clip", "1"
OWN, SAFETENSORS, SHARDS = "rpn_jax safetensors", "safetensors", "shards with an index"

# --- Names ----------------------------------------------------------------------------------------

# How an array of theirs becomes ours: the order of its axes. PyTorch multiplies by the transpose.
LAYOUTS = {
  "same": None,
  "linear": (1, 0),  # (out, in) -> (in, out)
  "conv": (2, 3, 1, 0),  # (out, in, height, width) -> (height, width, in, out)
}


class Rule(NamedTuple):
  """One array: its path in our tree, its name in their file, how its axes change."""

  ours: str
  theirs: str
  layout: str = "same"

  def under(self, ours: str = "", theirs: str = "") -> "Rule":
    return Rule(ours + self.ours, theirs + self.theirs, self.layout)


def _norm(ours: str, theirs: str) -> tuple[Rule, ...]:
  return (Rule(f"{ours}/scale", f"{theirs}.weight"), Rule(f"{ours}/bias", f"{theirs}.bias"))


def _linear(ours: str, theirs: str, separator: str = ".") -> tuple[Rule, ...]:
  return (
    Rule(f"{ours}/kernel", f"{theirs}{separator}weight", "linear"),
    Rule(f"{ours}/bias", f"{theirs}{separator}bias"),
  )


# OpenAI's names, within a block and within a tower. `text_projection` and `proj` are bare matrices
# that multiply from the right, as ours do.
_BLOCK = (
  *_norm("ln_1", "ln_1"),
  *_linear("attn/in_proj", "attn.in_proj", "_"),
  *_linear("attn/out_proj", "attn.out_proj"),
  *_norm("ln_2", "ln_2"),
  *_linear("mlp/c_fc", "mlp.c_fc"),
  *_linear("mlp/c_proj", "mlp.c_proj"),
)
_VISION = (
  Rule("patch_embed/kernel", "conv1.weight", "conv"),
  Rule("class_embedding", "class_embedding"),
  Rule("position_embedding", "positional_embedding"),
  *_norm("ln_pre", "ln_pre"),
  *_norm("ln_post", "ln_post"),
  Rule("proj", "proj"),
)
_TEXT = (
  Rule("token_embedding", "token_embedding.weight"),
  Rule("position_embedding", "positional_embedding"),
  *_norm("ln_final", "ln_final"),
  Rule("projection", "text_projection"),
)

# The authors' trained arrays; ours are paths in the `prompts` collection.
_AUTHORS_PROMPTS = (
  Rule("deep_tokens", "backbone.deep_prompt_embeddings"),
  *_linear("prompt_proj", "backbone.prompt_proj"),
  *_norm("prompt_norm", "backbone.prompt_norm"),
  Rule("h", "prompt_proj"),
  *_linear("head/patch_proj", "decode_head.vis_proj_1"),
  *_norm("head/patch_norm", "decode_head.vis_norm_1"),
  *_linear("head/text_proj", "decode_head.cls_proj_1"),
  *_norm("head/text_norm", "decode_head.tex_norm_1"),
  *_linear("head/text_reduce", "decode_head.cls_proj"),
)
# In the release's state dict, but no computation of it reads them.
AUTHORS_UNUSED = ("prompt_norm.weight", "prompt_norm.bias")


class Naming(NamedTuple):
  """Where a family of files keeps the two towers, and the name of the logit scale if it has one."""

  vision: str
  text: str
  logit_scale: str | None


# Hugging Face's names of the same arrays: (pattern, OpenAI's name, transposed). Queries, keys and
# values are three arrays there: `{}` is filled with q, k and v.
_HF_BLOCK = (
  (r"layer_norm(\d)\.(weight|bias)", r"ln_\1.\2"),
  (r"self_attn\.out_proj\.(weight|bias)", r"attn.out_proj.\1"),
  (r"self_attn\.([qkv])_proj\.(weight|bias)", r"attn.in_proj_\2/\1"),
  (r"mlp\.fc1\.(weight|bias)", r"mlp.c_fc.\1"),
  (r"mlp\.fc2\.(weight|bias)", r"mlp.c_proj.\1"),
)
_HF = (
  ("logit_scale", "logit_scale"),
  (r"visual_projection\.weight", "visual.proj/T"),
  (r"text_projection\.weight", "text_projection/T"),
  (r"vision_model\.embeddings\.class_embedding", "visual.class_embedding"),
  (r"vision_model\.embeddings\.patch_embedding\.weight", "visual.conv1.weight"),
  (r"vision_model\.embeddings\.position_embedding\.weight", "visual.positional_embedding"),
  (r"vision_model\.pre_layrnorm\.(weight|bias)", r"visual.ln_pre.\1"),  # their spelling
  (r"vision_model\.post_layernorm\.(weight|bias)", r"visual.ln_post.\1"),
  (r"text_model\.embeddings\.token_embedding\.weight", "token_embedding.weight"),
  (r"text_model\.embeddings\.position_embedding\.weight", "positional_embedding"),
  (r"text_model\.final_layer_norm\.(weight|bias)", r"ln_final.\1"),
  *(
    (rf"{tower}_model\.encoder\.layers\.(?P<n>\d+)\.{theirs}", (ours, prefix))
    for tower, prefix in (("vision", "visual."), ("text", ""))
    for theirs, ours in _HF_BLOCK
  ),
)


OPENAI = Naming("visual.", "", "logit_scale")
AUTHORS = Naming("backbone.", "text_encoder.", None)


def clip_rules(naming: Naming, vision_layers: int, text_layers: int) -> list[Rule]:
  """The full table of a CLIP model in one family of files."""
  rules = []
  for ours, theirs, tower, layers in (
    ("visual/", naming.vision, _VISION, vision_layers),
    ("text/", naming.text, _TEXT, text_layers),
  ):
    rules += [rule.under(ours, theirs) for rule in tower]
    for i in range(layers):
      rules += [
        rule.under(f"{ours}block_{i}/", f"{theirs}transformer.resblocks.{i}.") for rule in _BLOCK
      ]
  if naming.logit_scale:
    rules.append(Rule("logit_scale", naming.logit_scale))
  return rules


def _from_hf(state: Mapping[str, np.ndarray], where: str) -> dict[str, np.ndarray]:
  """The state of a `CLIPModel` of transformers by OpenAI's names.

  Raises:
    InputError: a name that is not one of theirs, or queries, keys and values that do not fit.
  """
  renamed = {}
  for name, value in state.items():
    if name.endswith("embeddings.position_ids"):  # 0, 1, 2, … in older files
      continue
    new = _hf_name(name)
    if new is None:
      raise InputError(
        f"expected the arrays of a CLIPModel of transformers, {name!r} is unknown in {where}: use "
        "the complete, unchanged file of such a model"
      )
    if new.endswith("/T"):
      if value.ndim != 2:
        raise InputError(
          f"expected {name!r} with 2 axes, got shape {value.shape} in {where}: the file is damaged"
        )
      new, value = new.removesuffix("/T"), value.T
    renamed[new] = value
  joined = {}
  for name, value in renamed.items():
    base, slash, part = name.rpartition("/")
    if not slash:
      joined[name] = value
    elif part == "q":
      parts = [renamed.get(f"{base}/{letter}") for letter in "qkv"]
      if any(x is None or x.shape != value.shape or not x.ndim for x in parts):
        raise InputError(
          f"expected queries, keys and values of one shape for {base!r} in {where}: the file is "
          "damaged"
        )
      joined[base] = np.concatenate(parts)
  return joined


def _hf_name(name: str) -> str | None:
  for pattern, new in _HF:
    if match := re.fullmatch(pattern, name):
      if isinstance(new, str):
        return match.expand(new)
      # The groups of a block's own pattern follow the layer's number.
      block, prefix = new
      block = re.sub(r"\\(\d)", lambda m: match[1 + int(m[1])], block)
      return f"{prefix}transformer.resblocks.{match['n']}.{block}"
  return None


def _plain_openclip(state: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
  """Without what open_clip puts before OpenAI's names in training and in its newer models."""
  for prefix in ("module.", "_orig_mod."):
    if state and all(name.startswith(prefix) for name in state):
      state = {name.removeprefix(prefix): value for name, value in state.items()}
  if "text.text_projection" in state:
    state = {name.removeprefix("text."): value for name, value in state.items()}
  return state


def _to_ours(rules: Iterable[Rule], state: Mapping[str, np.ndarray], where: str) -> dict:
  """Our flat arrays from theirs: every name on both sides used exactly once.

  Raises:
    InputError: a name is missing or unknown, or an array has another rank than its rule needs.
  """
  rules = list(rules)
  _same_names({rule.theirs for rule in rules}, state, where)
  flat = {}
  for rule in rules:
    value, axes = np.asarray(state[rule.theirs]), LAYOUTS[rule.layout]
    if axes and value.ndim != len(axes):
      raise InputError(
        f"expected {rule.theirs!r} with {len(axes)} axes, got shape {value.shape} in {where}: "
        "this is no CLIP ViT, use another file"
      )
    flat[rule.ours] = float32(np.transpose(value, axes) if axes else value, rule.theirs, where)
  return flat


def _to_theirs(rules: Iterable[Rule], flat: Mapping[str, np.ndarray], where: str) -> dict:
  """The inverse of `_to_ours`, types unchanged."""
  rules = list(rules)
  _same_names({rule.ours for rule in rules}, flat, where)
  state = {}
  for rule in rules:
    value, axes = np.asarray(flat[rule.ours]), LAYOUTS[rule.layout]
    state[rule.theirs] = np.transpose(value, np.argsort(axes)) if axes else value
  return state


def _same_names(wanted: set[str], got: Iterable[str], where: str) -> None:
  for what, names in (("missing", wanted - set(got)), ("unknown", set(got) - wanted)):
    if names:
      first = sorted(names)[0]
      more = f" and {len(names) - 1} more" if len(names) > 1 else ""
      raise InputError(
        f"expected the {len(wanted)} arrays of a CLIP ViT, {first!r}{more} {what} in {where}: "
        "use the complete, unchanged file of such a model"
      )


def float32(value: np.ndarray, name: str, where: str) -> np.ndarray:
  """A float32 copy of weights, or an InputError that names them."""
  if value.dtype not in (np.float16, np.float32, jnp.bfloat16):
    raise InputError(
      f"expected float16, bfloat16 or float32 weights, {name!r} is {value.dtype} in {where}: "
      "save it with one of these types"
    )
  return np.array(value, np.float32, order="C")


# --- Architecture ---------------------------------------------------------------------------------

# No published CLIP comes near; a file that declares more is damaged or hostile.
_MAX_FIELD = 1 << 20
_MAX_LAYERS = 128


def _read_architecture(state: Mapping[str, np.ndarray], naming: Naming, where: str) -> dict:
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


def _config(fields: Mapping, overrides: Mapping, where: str) -> CLIPConfig:
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
        f"expected an integer from 1 to {most} for {name}, got {value!r} in {where}: "
        "correct it"
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


def _check(config: CLIPConfig, flat: Mapping[str, np.ndarray], where: str) -> None:
  """Names and shapes of our flat arrays against the model."""
  _check_layers(config, flat, where)
  shapes = expected_shapes(config)
  _same_names(set(shapes), flat, where)
  for path, shape in shapes.items():
    if np.shape(flat[path]) != shape:
      raise InputError(
        f"expected {path} with shape {shape}, got {np.shape(flat[path])} in {where}: "
        "the file is damaged or of another architecture"
      )


# --- Reading --------------------------------------------------------------------------------------

_SAFETENSORS_TYPES = {
  "F16": np.float16,
  "BF16": jnp.bfloat16,
  "F32": np.float32,
  "F64": np.float64,
  "I32": np.int32,
  "I64": np.int64,
}
# Of a JSON file beside weights; the largest index known has 100 kB.
_MAX_JSON_BYTES = 8 << 20
_MAX_SHARDS = 1000
_MAX_HEADER_BYTES = 16 << 20
# What a folder of a published model holds, in the order of preference.
_IN_FOLDER = (
  "model.safetensors", "model.safetensors.index.json", "open_clip_model.safetensors",
  "pytorch_model.bin", "pytorch_model.bin.index.json", "open_clip_pytorch_model.bin",
)  # fmt: skip


def read_safetensors(path: pathlib.Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
  """Views of the file, and its metadata; nothing is read before it is needed."""
  with path.open("rb") as file:
    if int.from_bytes(file.read(8), "little") > _MAX_HEADER_BYTES:
      raise InputError(
        f"expected a safetensors or PyTorch zip file, {path} is neither or is damaged (its header "
        f"would be larger than {_MAX_HEADER_BYTES >> 20} MiB): get it again"
      )
  try:
    # Checks the header: offsets within the file, in order, as long as the shapes say.
    with safetensors.safe_open(path, "numpy") as file:
      metadata = file.metadata() or {}
      names = list(file.keys())
  except safetensors.SafetensorError as error:
    reason = " ".join(str(error).split())[:100]
    raise InputError(
      f"expected a safetensors or PyTorch zip file, {path} is neither or is damaged ({reason}): "
      "get it again"
    ) from None
  except OSError as error:
    raise InputError(f"{path} cannot be read ({error.strerror}): check the file") from None
  # The library cannot give bfloat16 to NumPy; the raw bytes can.
  content = np.memmap(path, np.uint8, "r")
  start = 8 + int.from_bytes(content[:8].tobytes(), "little")
  header = json.loads(content[8:start].tobytes())
  state = {}
  for name in names:
    entry = header[name]
    if entry["dtype"] not in _SAFETENSORS_TYPES:
      raise InputError(
        f"expected float weights, {name!r} is {entry['dtype']} in {path}: use another file"
      )
    begin, end = (start + offset for offset in entry["data_offsets"])
    data = content[begin:end] if begin < end else np.empty(0, np.uint8)
    dtype = np.dtype(_SAFETENSORS_TYPES[entry["dtype"]])
    if begin % dtype.itemsize:  # such a header is allowed, and cannot be a view
      data = data.copy()
    state[name] = data.view(dtype).reshape(entry["shape"])
  return state, metadata


def _read_json(path: pathlib.Path) -> dict:
  try:
    if path.stat().st_size > _MAX_JSON_BYTES:
      raise InputError(f"expected JSON of at most {_MAX_JSON_BYTES >> 20} MiB, {path} is larger")
    content = json.loads(path.read_bytes())
  except (OSError, ValueError, RecursionError) as error:
    if isinstance(error, InputError):
      raise
    raise InputError(f"expected JSON in {path}, it cannot be read: get it again") from None
  if not isinstance(content, dict):
    raise InputError(f"expected a JSON object in {path}, got something else: get it again")
  return content


def _read_shards(index: pathlib.Path) -> dict[str, np.ndarray]:
  """The arrays of all files that an index names, each where the index says it is."""
  places = _read_json(index).get("weight_map")
  if not isinstance(places, dict) or not all(isinstance(x, str) for x in places.values()):
    raise InputError(f"expected an index with a weight_map in {index}: use the model's own index")
  files = sorted(set(places.values()))
  if len(files) > _MAX_SHARDS:
    raise InputError(f"expected at most {_MAX_SHARDS} shards, {index} names {len(files)}")
  state = {}
  for file in files:
    # A path would lead out of the folder.
    if file != os.path.basename(file) or file in ("", ".", ".."):
      raise InputError(f"expected file names in {index}, got the path {file[:60]!r}: refused")
    _, shard, _ = read_arrays(index.parent / file)
    told = {name for name, place in places.items() if place == file}
    if told != set(shard):
      raise InputError(
        f"expected in {index.parent / file} the {len(told)} arrays that {index.name} says, got "
        f"{len(shard)}, {sorted(told ^ set(shard))[0]!r} differs: get both again"
      )
    state.update(shard)
  return state


def read_arrays(path: pathlib.Path) -> tuple[str, dict[str, np.ndarray], dict[str, str]]:
  """Kind of file, arrays by name, metadata. The content decides, not the file's name."""
  if path.is_dir():
    found = next((path / name for name in _IN_FOLDER if (path / name).is_file()), None)
    if found is None:
      raise InputError(
        f"expected a file of CLIP weights, {path} is no file and holds none of "
        f"{', '.join(_IN_FOLDER)}: check the path"
      )
    path = found
  if not path.is_file():
    raise InputError(f"expected a file of CLIP weights, {path} is no file: check the path")
  with path.open("rb") as file:
    head = file.read(9)
  if head.startswith(b"PK"):
    return *torch_archive.read(path), {}
  if head[:2] == b"\x80\x02":
    raise InputError(
      f"expected a PyTorch zip file, {path} has the format before PyTorch 1.6: "
      "load and save it once with a newer PyTorch"
    )
  if path.name.endswith(".index.json"):
    return SHARDS, _read_shards(path), {}
  if head[8:] != b"{":
    raise InputError(
      f"expected CLIP weights (PyTorch zip or safetensors), {path} begins with {head[:4]!r} and is "
      "neither: check the path and the download"
    )
  state, metadata = read_safetensors(path)
  return OWN if metadata.get("format") == FORMAT else SAFETENSORS, state, metadata


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
  content = _read_json(beside)
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


def _load(path, overrides: Mapping | None, read=None) -> tuple[str, CLIPConfig, dict]:
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
    config = _config(fields, overrides, where)
    flat = {name: float32(value, name, where) for name, value in state.items()}
  else:
    hf = any(name.startswith("vision_model.") for name in state)
    told = _told(path, kind, hf)
    state = _from_hf(state, where) if hf else _plain_openclip(state)
    fields = _read_architecture(state, OPENAI, where)
    config = _config({**fields, **told}, overrides, where)
    kind = f"{kind} with the names of {'Hugging Face' if hf else 'OpenAI'}"
    state = _drop_extras(state, fields, where)
    flat = _to_ours(
      clip_rules(OPENAI, fields["vision_layers"], fields["text_layers"]), state, where
    )
  _check(config, flat, where)
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
  return _load(path, config)[1:]


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
  _check(config, flat, f"the parameters for {path}")
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
  write_atomically(path, lambda file: safetensors.numpy.save_file(arrays, file, header))


def write_atomically(path: pathlib.Path, write: Callable[[str], None]) -> None:
  """Lets `write` make a file of another name, which then gets this one.

  Raises:
    InputError: a place that cannot be written to.
  """
  temporary = None
  try:
    # In the same folder, for os.replace cannot cross file systems.
    with tempfile.NamedTemporaryFile(
      dir=path.parent, prefix=f".{path.name}.", delete=False
    ) as file:
      temporary = file.name
    write(temporary)
    # A temporary file is private; a result has the permissions of any new file.
    mask = os.umask(0)
    os.umask(mask)
    os.chmod(temporary, 0o666 & ~mask)
    os.replace(temporary, path)
  except (OSError, safetensors.SafetensorError) as error:
    reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:100]
    raise InputError(
      f"expected a writable place, cannot write {path} ({reason}): check the folder and its room"
    ) from None
  finally:
    if temporary and os.path.exists(temporary):
      os.unlink(temporary)


def fingerprint(params) -> str:
  """16 hex digits that identify weights: of SHA-256 over sorted names, shapes and float32 bytes."""
  digest = hashlib.sha256()
  for name, value in sorted(traverse_util.flatten_dict(params, sep="/").items()):
    value = np.ascontiguousarray(value, "<f4").reshape(np.shape(value))
    digest.update(f"{name}{value.shape}".encode())
    digest.update(value.tobytes())
  return digest.hexdigest()[:16]


# --- The authors' release -------------------------------------------------------------------------


def from_authors(state: Mapping[str, np.ndarray], where: str = "the authors' state") -> tuple:
  """Trees from the state dict of the authors' segmentor (`liblacklucy/RPN`).

  Args:
    state: arrays by the release's names; entries in AUTHORS_UNUSED are left out.
    where: the file it comes from, for messages.

  Returns:
    CLIP parameters (without the logit scale, which the release does not keep) and the `prompts`
    collection of the released form.

  Raises:
    InputError: an array is missing, unknown or misshapen.
  """
  fields = _read_architecture(state, AUTHORS, where)
  # Heads change no shape, and the release's state dict does not tell them.
  heads = {"vision_heads": 1, "text_heads": 1}
  config = _config(fields, {**heads, "activation": "quick_gelu"}, where)
  rules = clip_rules(AUTHORS, config.vision_layers, config.text_layers)
  split = len(rules)
  rules += _AUTHORS_PROMPTS
  used = {name: value for name, value in state.items() if name not in AUTHORS_UNUSED}
  flat = _to_ours(rules, used, where)
  clip = {rule.ours: flat[rule.ours] for rule in rules[:split]}
  prompts = {rule.ours: flat[rule.ours] for rule in rules[split:]}
  _check(config, {**clip, "logit_scale": np.float32(0)}, where)
  _check_released_prompts(config, prompts, where)
  unflatten = traverse_util.unflatten_dict
  return unflatten(clip, sep="/"), unflatten(prompts, sep="/")


def _check_released_prompts(config: CLIPConfig, prompts: Mapping, where: str) -> None:
  layers, width, joint = config.vision_layers, config.vision_width, config.embed_dim
  # None: free, the number of deep tokens and of patch tokens.
  shapes = collections.defaultdict(lambda: (joint,))
  shapes.update(
    {
      "deep_tokens": (layers, None, width),
      "h": (None, width),
      "prompt_proj/kernel": (width, width),
      "prompt_proj/bias": (width,),
      "prompt_norm/scale": (width,),
      "prompt_norm/bias": (width,),
      "head/patch_proj/kernel": (joint, joint),
      "head/text_proj/kernel": (joint, joint),
      "head/text_reduce/kernel": (2 * joint, joint),
    }
  )
  for path, value in prompts.items():
    want = shapes[path]
    if value.ndim != len(want) or any(w not in (None, n) for w, n in zip(want, value.shape)):
      raise InputError(
        f"expected {path} with shape {want} (None: any), got {value.shape} in {where}: "
        "the file is damaged or of another architecture"
      )


def to_authors_prompts(prompts) -> dict[str, np.ndarray]:
  """The `prompts` tree of the released form, or a tree shaped like it, by the authors' names.

  Raises:
    InputError: the tree is of another form (per-layer h, M2oE), which has no names there.
  """
  flat = traverse_util.flatten_dict(prompts, sep="/")
  return _to_theirs(_AUTHORS_PROMPTS, flat, "the prompts tree")


# --- Command line ---------------------------------------------------------------------------------


def describe(config: CLIPConfig) -> str:
  """One line on an architecture."""
  c = config
  return (
    f"image {c.image_size} px, patch {c.patch_size}, vision {c.vision_layers} x {c.vision_width} "
    f"({c.vision_heads} heads), text {c.text_layers} x {c.text_width} ({c.text_heads} heads), "
    f"context {c.context_length}, vocabulary {c.vocab_size}, joint {c.embed_dim}, {c.activation}"
  )


# SHA-256 of OpenAI's published files; they are part of the addresses these are downloaded from.
PUBLISHED = {
  "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af": "ViT-B/32",
  "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f": "ViT-B/16",
  "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836": "ViT-L/14",
  "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02": "ViT-L/14@336px",
}
# In a trained CLIP the first two are closer to each other than the first and the third.
TRIPLES = (
  ("a photo of a cat", "a photo of a kitten", "a photo of a truck"),
  ("a photo of a car", "a photo of an automobile", "a photo of a banana"),
  ("a photo of the sea", "a photo of the ocean", "a photo of a desk"),
  ("a photo of a sofa", "a photo of a couch", "a photo of a horse"),
  ("a photo of a tree", "a photo of a forest", "a photo of a computer"),
  ("a photo of a person", "a photo of a woman", "a photo of a bridge"),
)


def sha256(path: pathlib.Path) -> str:
  with open(path, "rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def verification(source: pathlib.Path, config: CLIPConfig, params) -> str:
  """What `--verify` prints: the checksum, and similarities of texts."""
  lines = []
  if source.is_file():
    digest = sha256(source)
    known = PUBLISHED.get(digest)
    lines.append(f"sha256 {digest}: " + (f"OpenAI's {known}" if known else "no file of OpenAI's"))
  texts = list(dict.fromkeys(text for triple in TRIPLES for text in triple))
  try:
    embedding = dict(zip(texts, class_embeddings(config, params, texts, "{}", synonyms="joined")))
  except InputError as error:
    return "\n".join([*lines, f"no similarities of texts: {error}"])
  rows, right = [], 0
  for text, near, far in TRIPLES:
    close, distant = (float(embedding[text] @ embedding[other]) for other in (near, far))
    right += close > distant
    rows.append([text, near, f"{close:.3f}", far, f"{distant:.3f}"])
  lines.append(table(rows, ["text", "near", "cosine", "far", "cosine"]))
  lines.append(
    f"{right} of {len(TRIPLES)} in order"
    + ("" if right == len(TRIPLES) else ": a CLIP trained on photographs has all of them")
  )
  return "\n".join(lines)


def main(arguments=None) -> int:
  parser = argparse.ArgumentParser(prog="python -m rpn_jax.convert", description=__doc__)
  parser.formatter_class = argparse.RawDescriptionHelpFormatter
  parser.add_argument("source", help="weights of CLIP, prompts, or the authors' checkpoint")
  parser.add_argument("destination", help="the safetensors (or, of prompts, .pth) file to write")
  parser.add_argument("--dtype", choices=("float16", "float32"), default="float32")
  parser.add_argument(
    "--activation", choices=("quick_gelu", "gelu"), help="if neither file nor config tell it"
  )
  parser.add_argument("--vision_heads", type=int, help="if not width / 64")
  parser.add_argument("--text_heads", type=int, help="if not width / 64")
  parser.add_argument("--verify", action="store_true", help="checksum, and similarities of texts")
  parser.add_argument("--clip", help="with the authors' checkpoint: the CLIP it was trained around")
  args = parser.parse_args(arguments)
  source, destination = pathlib.Path(args.source), pathlib.Path(args.destination)
  given = {
    name: value
    for name in ("activation", "vision_heads", "text_heads")
    if (value := getattr(args, name)) is not None
  }
  try:
    read = read_arrays(source)
    if any(name.startswith("decode_head.") for name in read[1]):
      lines = _authors_to_prompts(source, read[1], destination, args.clip)
    elif read[2].get("format") == "rpn_jax.prompts":
      lines = _prompts_to_authors(source, destination)
    else:
      kind, config, params = _load(source, given, read)
      save(destination, config, params, args.dtype, {"source": kind})
      count = sum(value.size for value in jax.tree.leaves(params))
      lines = [f"{source}: {kind}", describe(config)]
      lines.append(f"{count:,} parameters, fingerprint {fingerprint(params)}")
      if args.verify:
        lines.append(verification(source, config, params))
      lines.append(f"wrote {destination} ({args.dtype})")
  except InputError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  print("\n".join(lines))
  return 0


def _authors_to_prompts(source, state: Mapping, destination, clip_path: str | None) -> list[str]:
  from rpn_jax import prompts_file  # which is written with this module

  if clip_path is None:
    raise InputError(
      f"{source} is a checkpoint of the authors' RPN: pass --clip=FILE, the CLIP weights it was "
      "trained around, which are compared with the ones in it"
    )
  theirs, prompts = from_authors(state, str(source))
  _, clip = load(clip_path)
  _same_towers(theirs, clip, f"{source} and {clip_path}")
  side = round(len(prompts["h"]) ** 0.5)
  # The release's settings; h is stored on the token grid of a training crop.
  model = {
    "tuner": "rpn+vpt", "itp": "image_to_pixel", "apg": "parameter", "m2oe": "none",
    "rpm_layers": "all", "combine": "cat", "h_shared": True,
    "deep_tokens": prompts["deep_tokens"].shape[1], "h_grid": [side, side], "head": "released",
    "class_embedding_copies": 2,
  }  # fmt: skip
  content = prompts_file.Prompts(prompts, fingerprint(clip), {"model": model}, (), 0)
  prompts_file.save(destination, content)
  count = sum(value.size for value in jax.tree.leaves(prompts))
  return [
    f"{source}: the authors' checkpoint, its CLIP is that of {clip_path}",
    f"wrote {count:,} parameters to {destination}; predict with the preset released and "
    f"--config.prompts={destination}",
  ]


def _same_towers(theirs: Mapping, clip: Mapping, where: str) -> None:
  """The release resizes the positions of its image tower; all else is CLIP's own."""
  theirs, clip = (traverse_util.flatten_dict(tree, sep="/") for tree in (theirs, clip))
  for name, value in theirs.items():
    want = clip.get(name)
    if name == "visual/position_embedding" and want is not None and want.shape != value.shape:
      side = round((len(value) - 1) ** 0.5)
      want = np.asarray(resize_positions(jnp.asarray(want), side, side))
    # OpenAI's weights are float16, which a checkpoint of float32 holds exactly.
    if want is None or want.shape != value.shape or not np.allclose(want, value, atol=1e-4):
      raise InputError(
        f"expected one CLIP in {where}, {name} differs: pass the weights that were trained around"
      )


def _prompts_to_authors(source, destination) -> list[str]:
  from rpn_jax import prompts_file

  content = prompts_file.load(source)
  state = to_authors_prompts(content.prompts)
  meta = {"clip": content.clip, "step": str(content.step), "written_by": "rpn_jax"}
  write_atomically(destination, lambda file: torch_archive.write(file, state, meta))
  return [
    f"wrote {len(state)} arrays by the authors' names to {destination}: load them over a model "
    "with CLIP's weights, not strictly, for the frozen towers are not in it"
  ]


if __name__ == "__main__":
  sys.exit(main())
