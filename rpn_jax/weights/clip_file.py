"""CLIP weights from the files people have to the parameter tree of `rpn_jax.models.clip`, and back.

This project's own format is safetensors whose keys are '/'-joined paths of the parameter tree; the
header says `format`, `version` and the architecture as JSON.
"""

import dataclasses
import functools
import json
import pathlib
import re
from collections.abc import Iterable, Mapping

import ml_collections
import numpy as np
from flax import traverse_util

from rpn_jax.base.errors import InputError
from rpn_jax.base.paths import expand
from rpn_jax.base.words import differences
from rpn_jax.models.clip import CLIPConfig
from rpn_jax.weights import authors, cat_seg, checkpoints, hub, prompts_file, publisher
from rpn_jax.weights.architecture import (
  Normalization,
  agreed,
  check_parameters,
  complete_config,
  fields_from_shapes,
  image_fields,
  normalization,
  without_images,
)
from rpn_jax.weights.arrays import (
  WeightsFile,
  fingerprint,
  float32,
  read_arrays,
  write_safetensors,
)
from rpn_jax.weights.names import OPENAI, clip_rules, from_hf, from_openclip, to_ours, unwrapped

FORMAT, VERSION = "rpn_jax.clip", "1"
# No tokenizer of a language is as small; models of tests are, and no text can be embedded by them.
_MAX_TINY_TOKENS = 1000
ASSETS = pathlib.Path(__file__).parent.parent / "assets"
# By the fingerprint of weights, whatever their file is called: what must be known of every result.
NOTES = {"153c41e55151530f": "its CLIP, shapes_clip, knows drawn shapes and no photographs"}


def find_weights(name, overrides: Mapping | None = None) -> pathlib.Path:
  """A path, `~` resolved, of the weights of a name; those of the hub are fetched if need be.

  Args:
    name: a path, the name of weights that ship with the package, a name in
      `checkpoints.CHECKPOINTS`, or hf://owner/name. What exists as a file or folder is used first.
    overrides: what a repository of the hub does not tell; see `load`.

  Raises:
    InputError: weights that cannot be fetched, or a path that is none and may be an address.
  """
  path, checkpoint = expand(name), checkpoints.find(name)
  if path.exists():
    if checkpoint:
      print(f"{name}: the local {path.resolve()} is used, not the published {checkpoint.name}")
  elif checkpoint:
    return hub.get(checkpoint, functools.partial(convert, overrides=overrides))
  elif str(path) == path.name and (ASSETS / path).exists():
    return ASSETS / path
  elif near := checkpoints.near_address(name):
    raise InputError(
      f"expected a file of CLIP weights, {path} does not exist: check the path, or did you mean "
      f"{near!r}?"
    )
  return path


def load_clip(name) -> tuple[CLIPConfig, dict]:
  """Architecture and parameters (`visual`, `text`, `logit_scale`) of a file or a name.

  Args:
    name: see `find_weights`.

  Raises:
    InputError: see `find_weights` and `load`.
  """
  return load(find_weights(name))


def with_normalization(
  config: ml_collections.ConfigDict, clip: CLIPConfig | None = None
) -> ml_collections.ConfigDict:
  """A config that says how images are normalized: as its weights were trained, if it does not.

  Data sets are opened with such a config.

  Args:
    config: of a segmentation run. It is not changed.
    clip: architecture of its weights; None reads what tells their normalization, and no array.

  Raises:
    InputError: see `find_weights`, and `publisher.read`.
  """
  missing = [name for name in Normalization._fields if config.data.get(name) is None]
  if not missing:
    return config
  if clip is None:
    told = _read_normalization(find_weights(config.clip))
  else:
    told = normalization(clip.mean, clip.std)
  complete = config.copy_and_resolve_references()
  with complete.unlocked():
    for name in missing:
      complete.data[name] = getattr(told, name)
  return complete


def _read_normalization(path: pathlib.Path) -> Normalization:
  file = read_arrays(path)
  _check_no_prompts(file)
  if file.metadata.get("format") == FORMAT:
    fields = _own_fields(file.metadata, str(file.path))
  else:
    fields = publisher.read(file, _has_hf_names(file.arrays)).fields
  images = image_fields(fields, str(file.path))
  return normalization(images["mean"], images["std"])


def convert(
  source: pathlib.Path,
  checkpoint: checkpoints.Checkpoint,
  destination: pathlib.Path,
  origin: Mapping[str, str],
  overrides: Mapping | None = None,
) -> None:
  """Writes a public checkpoint in this project's format, if it is what its row in the table says.

  At an address of one's own, a trained model is kept as it is.

  Args:
    source: the published file, or a folder with it.
    checkpoint: its row.
    destination: the file to write.
    origin: header entries that say where it is from.
    overrides: see `load`.

  Raises:
    InputError: another architecture, values that are not finite, or see `load` and `save`.
  """
  file, wanted, untold = read_arrays(source), checkpoint.config, {}
  if not checkpoint.listed and file.metadata.get("format") == prompts_file.FORMAT:
    content = prompts_file.load(file.path)
    return prompts_file.save(destination, content, {"name": checkpoint.name, **origin})
  if wanted and file.metadata.get("format") != FORMAT:
    told = publisher.read(file, _has_hf_names(file.arrays)).fields
    # Heads of width / 64 are found by size; a wrong file is then named by its other sizes.
    usual = {f"{t}_heads": getattr(wanted, f"{t}_width") // 64 for t in ("vision", "text")}
    needed = {name: getattr(wanted, name) for name in ("activation", *usual)}
    untold = {k: v for k, v in needed.items() if k not in told and v != usual.get(k)}
  # A fetched file is gone when a message about it is read; its address is not.
  where = None if checkpoint.listed else checkpoint.name
  _, config, params = parse(file, {**untold, **(overrides or {})}, where)
  # How images were normalized is told by the publisher's files alone.
  if wanted and (changed := differences(without_images(wanted), without_images(config))):
    raise InputError(
      f"expected {checkpoint.name} in {source}, got another architecture (expected -> got: "
      f"{'; '.join(changed)}): get the file from {checkpoint.page}"
    )
  header = {"name": checkpoint.name, "fingerprint": fingerprint(params), **origin}
  save(destination, config, params, metadata=header)


def load(path, overrides: Mapping | None = None) -> tuple[CLIPConfig, dict]:
  """CLIP weights of any file this module reads.

  Args:
    path: a TorchScript archive, a PyTorch state dict (zip format, bare or under `state_dict`),
      safetensors, the index of shards of these, or a folder with one of them; with the names of
      OpenAI, open_clip or transformers; or safetensors written by `save`.
    overrides: CLIPConfig fields that the file does not tell: `vision_heads`, `text_heads` (else
      those of published models of the same size) and `activation` ("quick_gelu" or "gelu"). Files
      written by `save`, scripted archives and configs beside the weights know them, traced
      archives the activation.

  Returns:
    The architecture, and the parameters as a nested dictionary of float32 arrays for
    `CLIP(config).apply({"params": ...})`.

  Raises:
    InputError: no such file, a damaged or foreign one, an array missing, unknown or misshapen, a
      model that computes something else, another tokenizer than CLIP's, heads or an activation
      that nothing tells, or that `overrides` contradict.
  """
  return parse(read_arrays(path), overrides)[1:]


def parse(
  file: WeightsFile, overrides: Mapping | None = None, where: str | None = None
) -> tuple[str, CLIPConfig, dict]:
  """The same as `load` for a file that is read already, and a description of its kind.

  Args:
    file: the weights.
    overrides: see `load`.
    where: what messages call the file; None for its path.
  """
  where, overrides = where or str(file.path), overrides or {}
  _check_no_prompts(file)
  if file.metadata.get("format") == FORMAT:
    kind = "rpn_jax safetensors"
    config = complete_config(_own_fields(file.metadata, where), overrides, where)
    views = file.arrays
  else:
    for paper, known in (("RPN", authors.is_authors), ("CAT-Seg", cat_seg.is_cat_seg)):
      if known(file.arrays):
        raise InputError(
          f"expected CLIP weights, {where} is a checkpoint of {paper}'s official code: convert its "
          f"file first, rpn convert {'FILE' if where != str(file.path) else where} "
          "PROMPTS.safetensors --clip=CLIP, and use PROMPTS.safetensors"
        )
    hf = _has_hf_names(file.arrays)
    kind = f"{file.kind} with the names of {'Hugging Face' if hf else 'OpenAI'}"
    # Before the arrays: a model of another kind is named by its config.
    told = publisher.read(file, hf)
    state = unwrapped(file.arrays, where)
    state = from_hf(state, where) if hf else from_openclip(state)
    fields = fields_from_shapes(state, OPENAI, where)
    if _MAX_TINY_TOKENS < fields["vocab_size"] != publisher.CLIP_TOKENS:
      raise InputError(
        f"expected the {publisher.CLIP_TOKENS} tokens of CLIP's tokenizer, got "
        f"{fields['vocab_size']} in {where}, which needs another tokenizer: use other weights"
      )
    fields = agreed(fields, told.fields, where, told.source)
    if "input_resolution" in state:  # an archive of OpenAI's, whose code has heads of 64 channels
      for tower in ("vision", "text"):
        if fields[f"{tower}_width"] % 64 == 0:
          fields.setdefault(f"{tower}_heads", fields[f"{tower}_width"] // 64)
    config = complete_config(fields, overrides, where)
    rules = clip_rules(OPENAI, config.vision_layers, config.text_layers)
    views = to_ours(rules, _without_extras(state, fields, where), where)
  # Shapes first: nothing is copied of a file that does not fit.
  check_parameters(config, views, where)
  flat = {name: float32(value, name, where) for name, value in views.items()}
  return kind, config, traverse_util.unflatten_dict(flat, sep="/")


def _check_no_prompts(file: WeightsFile) -> None:
  if file.metadata.get("format") == prompts_file.FORMAT:
    name = file.metadata.get("name", str(file.path))
    raise InputError(
      f"expected CLIP weights, {name} is a trained model, which names the CLIP that it needs: use "
      "it as --model= or --config.prompts="
    )


def _has_hf_names(names: Iterable[str]) -> bool:
  """Whether arrays have the names of Hugging Face's transformers, not OpenAI's."""
  return any(re.match(r"((module|_orig_mod)\.)*(vision|text)_model\.", name) for name in names)


def _own_fields(metadata: Mapping[str, str], where: str) -> dict:
  if metadata.get("version") != VERSION:
    raise InputError(
      f"expected version {VERSION} of this project's weights, got {metadata.get('version')!r} in "
      f"{where}: convert the original again"
    )
  try:
    return dict(json.loads(metadata["config"]))
  except (KeyError, TypeError, ValueError, RecursionError):
    raise InputError(
      f"expected a config in the metadata of {where}: convert the original again"
    ) from None


def _without_extras(state: Mapping[str, np.ndarray], fields: Mapping, where: str) -> dict:
  """The state without OpenAI's entries that are not weights, once they agree with the weights.

  These are three sizes and the text tower's causal mask.
  """
  sizes = {
    "input_resolution": fields["image_size"],
    "context_length": fields["context_length"],
    "vocab_size": fields["vocab_size"],
  }
  kept = {}
  for name, value in state.items():
    if name in sizes:
      if value.size != 1 or int(value.reshape(())) != sizes[name]:
        raise InputError(
          f"expected {name} {sizes[name]} as the weights have it, got "
          f"{value.ravel()[:3].tolist()} in {where}: the file is damaged"
        )
    elif name == "attn_mask" or re.fullmatch(r"transformer\..*\.attn_mask", name):
      length = fields["context_length"]
      if value.shape != (length, length) or not np.array_equal(
        np.isneginf(value.astype(np.float32)), np.triu(np.ones((length, length), bool), 1)
      ):
        raise InputError(f"expected a causal mask in {name!r} in {where}: the file is damaged")
    else:
      kept[name] = value
  return kept


def save(path, config: CLIPConfig, params, dtype=np.float32, metadata=None) -> None:
  """Writes CLIP weights in this project's format; readers see the old file or the new one.

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
  dtype = np.dtype(dtype)
  if dtype not in (np.float16, np.float32):
    raise InputError(f"expected dtype float16 or float32, got {dtype} for {path}: choose one")
  flat = {k: np.asarray(v) for k, v in traverse_util.flatten_dict(params, sep="/").items()}
  check_parameters(config, flat, f"the parameters for {path}")
  arrays = {}
  for name, value in flat.items():
    with np.errstate(over="ignore"):  # infinity is refused below, with the name
      arrays[name] = np.asarray(value, dtype if value.ndim > 1 else np.float32, order="C")
  # What is not told is left out, and then earlier versions of this package read the file too.
  fields = {k: v for k, v in dataclasses.asdict(config).items() if v not in (None, False)}
  header = {
    **(metadata or {}),
    "format": FORMAT,
    "version": VERSION,
    "config": json.dumps(fields),
  }
  write_safetensors(path, arrays, header)
