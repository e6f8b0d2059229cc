"""CLIP weights from the files people have to the parameter tree of `rpn_jax.models.clip`.

    python -m rpn_jax.convert ViT-B-16.pt clip_b16.safetensors --dtype float16

Reads OpenAI's TorchScript archives, PyTorch state dicts, safetensors with OpenAI's names (as
open_clip writes them) and this project's own safetensors; also the names of the authors' release.
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
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax import traverse_util

from rpn_jax import torch_archive
from rpn_jax.errors import InputError
from rpn_jax.models.clip import CLIP, CLIPConfig

FORMAT, VERSION = "rpn_jax.clip", "1"
OWN, SAFETENSORS = "rpn_jax safetensors", "safetensors with OpenAI's names"

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
    flat[rule.ours] = _float32(np.transpose(value, axes) if axes else value, rule.theirs, where)
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


def _float32(value: np.ndarray, name: str, where: str) -> np.ndarray:
  if value.dtype not in (np.float16, np.float32, jnp.bfloat16):
    raise InputError(
      f"expected float16, bfloat16 or float32 weights, {name!r} is {value.dtype} in {where}: "
      "save it with one of these types"
    )
  return np.ascontiguousarray(value, np.float32).reshape(value.shape)


# --- Architecture ---------------------------------------------------------------------------------

# No published CLIP comes near; a file that declares more is damaged or hostile.
_MAX_FIELD = 1 << 20


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
  fields = {**fields, **overrides}
  for tower in ("vision", "text"):
    width, heads = fields.get(f"{tower}_width"), f"{tower}_heads"
    if heads not in fields and isinstance(width, int):
      if width < 64:
        raise InputError(
          f"expected a {tower} tower at least 64 wide, got {width} in {where}: its number of heads "
          f"is not in the file, pass {heads}"
        )
      fields[heads] = width // 64
  fields.setdefault("activation", "quick_gelu")
  if set(fields) != set(names):
    wrong = sorted(set(fields) ^ set(names))
    raise InputError(f"expected the config fields {names}, {wrong} missing or unknown in {where}")
  for name in names:
    value = fields[name]
    if name != "activation" and not (type(value) is int and 0 < value <= _MAX_FIELD):
      raise InputError(
        f"expected an integer from 1 to {_MAX_FIELD} for {name}, got {value!r} in {where}: "
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
  tree = jax.eval_shape(CLIP(config).init, jax.random.key(0), image, tokens)["params"]
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


def _read_safetensors(path: pathlib.Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
  try:
    with safetensors.safe_open(path, "numpy") as file:
      metadata = file.metadata() or {}
    # `safe_open` cannot give bfloat16 to NumPy; the raw bytes it can.
    entries = safetensors.deserialize(path.read_bytes())
  except safetensors.SafetensorError as error:
    reason = " ".join(str(error).split())[:100]
    raise InputError(
      f"expected a safetensors or PyTorch zip file, {path} is neither or is damaged ({reason}): "
      "get it again"
    ) from None
  state = {}
  for name, entry in entries:
    if entry["dtype"] not in _SAFETENSORS_TYPES:
      raise InputError(
        f"expected float weights, {name!r} is {entry['dtype']} in {path}: use another file"
      )
    dtype = np.dtype(_SAFETENSORS_TYPES[entry["dtype"]])
    state[name] = np.frombuffer(entry["data"], dtype).reshape(entry["shape"])
  return state, metadata


def _read(path: pathlib.Path) -> tuple[str, dict[str, np.ndarray], dict[str, str]]:
  """Kind of file, arrays by name, metadata. The content decides, not the file's name."""
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
  if head[8:] != b"{":
    raise InputError(
      f"expected CLIP weights (PyTorch zip or safetensors), {path} begins with {head[:4]!r} and is "
      "neither: check the path and the download"
    )
  state, metadata = _read_safetensors(path)
  return OWN if metadata.get("format") == FORMAT else SAFETENSORS, state, metadata


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


def _load(path, overrides: Mapping | None) -> tuple[str, CLIPConfig, dict]:
  path, overrides = pathlib.Path(path), dict(overrides or {})
  kind, state, metadata = _read(path)
  where = str(path)
  if kind == OWN:
    if metadata.get("version") != VERSION:
      raise InputError(
        f"expected version {VERSION} of this project's weights, got {metadata.get('version')!r} in "
        f"{where}: convert the original again"
      )
    try:
      fields = dict(json.loads(metadata["config"]))
    except (KeyError, TypeError, ValueError):
      raise InputError(
        f"expected a config in the metadata of {where}: convert the original again"
      ) from None
    config = _config(fields, overrides, where)
    flat = {name: _float32(value, name, where) for name, value in state.items()}
  else:
    fields = _read_architecture(state, OPENAI, where)
    config = _config(fields, overrides, where)
    state = _drop_extras(state, fields, where)
    flat = _to_ours(
      clip_rules(OPENAI, fields["vision_layers"], fields["text_layers"]), state, where
    )
  _check(config, flat, where)
  return kind, config, traverse_util.unflatten_dict(flat, sep="/")


def load(path, config: Mapping | None = None) -> tuple[CLIPConfig, dict]:
  """CLIP weights of any file this module reads.

  Args:
    path: a TorchScript archive, a PyTorch state dict (zip format, bare or under `state_dict`) or
      safetensors, with OpenAI's names; or safetensors written by `save`.
    config: CLIPConfig fields that the file does not tell or that it tells wrongly: `vision_heads`,
      `text_heads` (else width / 64) and `activation` (else "quick_gelu"; some of open_clip's
      models have "gelu"). Files written by `save` know them.

  Returns:
    The architecture, and the parameters as a nested dictionary of float32 arrays for
    `CLIP(config).apply({"params": ...})`.

  Raises:
    InputError: no such file, a damaged or foreign one, an array missing, unknown or misshapen.
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
  _write_atomically(path, safetensors.numpy.save(arrays, header))


def _write_atomically(path: pathlib.Path, content: bytes) -> None:
  temporary = None
  try:
    # In the same folder, for os.replace cannot cross file systems.
    with tempfile.NamedTemporaryFile(
      dir=path.parent, prefix=f".{path.name}.", delete=False
    ) as file:
      temporary = file.name
      file.write(content)
    # A temporary file is private; a result has the permissions of any new file.
    mask = os.umask(0)
    os.umask(mask)
    os.chmod(temporary, 0o666 & ~mask)
    os.replace(temporary, path)
  except OSError as error:
    raise InputError(
      f"expected a writable place, cannot write {path} ({error.strerror}): check the folder"
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
  config = _config(fields, {"vision_heads": 1, "text_heads": 1}, where)
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


def main(arguments=None) -> int:
  parser = argparse.ArgumentParser(prog="python -m rpn_jax.convert", description=__doc__)
  parser.formatter_class = argparse.RawDescriptionHelpFormatter
  parser.add_argument("source", help="TorchScript archive, PyTorch state dict or safetensors")
  parser.add_argument("destination", help="the safetensors file to write")
  parser.add_argument("--dtype", choices=("float16", "float32"), default="float32")
  parser.add_argument("--activation", help="quick_gelu (assumed) or gelu, if the file is not ours")
  parser.add_argument("--vision_heads", type=int, help="if not width / 64")
  parser.add_argument("--text_heads", type=int, help="if not width / 64")
  args = parser.parse_args(arguments)
  given = {
    name: value
    for name in ("activation", "vision_heads", "text_heads")
    if (value := getattr(args, name)) is not None
  }
  try:
    kind, config, params = _load(args.source, given)
    save(args.destination, config, params, args.dtype, {"source": kind})
  except InputError as error:
    print(error, file=sys.stderr)
    return 2
  count = sum(value.size for value in jax.tree.leaves(params))
  assumed = "" if kind == OWN or "activation" in given else " (assumed: the file does not tell)"
  print(f"{args.source}: {kind}")
  print(f"{describe(config)}{assumed}")
  print(f"{count:,} parameters, fingerprint {fingerprint(params)}")
  print(f"wrote {args.destination} ({args.dtype})")
  return 0


if __name__ == "__main__":
  sys.exit(main())
