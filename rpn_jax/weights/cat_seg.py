"""Checkpoints of the official CAT-Seg code (`cvlab-kaist/CAT-Seg`, CVPR version), both ways."""

import json
import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from rpn_jax.base.errors import InputError
from rpn_jax.base.words import differences
from rpn_jax.config import CATSegConfig
from rpn_jax.models import cost_aggregation
from rpn_jax.models.cat_seg import TUNED, CATSeg
from rpn_jax.models.clip import CLIPConfig
from rpn_jax.models.trained import THIRDS, join, split, thirds
from rpn_jax.weights import torch_archive
from rpn_jax.weights.architecture import (
  OPENAI_IMAGES,
  Normalization,
  check_parameters,
  complete_config,
  fields_from_shapes,
)
from rpn_jax.weights.arrays import float32, writing
from rpn_jax.weights.names import Naming, Rule, clip_rules, linear, norm, to_ours, to_theirs

_HEAD = "sem_seg_head.predictor."
_AGGREGATOR = f"{_HEAD}transformer."
NAMING = Naming(
  f"{_HEAD}clip_model.visual.", f"{_HEAD}clip_model.", f"{_HEAD}clip_model.logit_scale"
)
# The sentence of the official code.
TEMPLATE = "A photo of a {} in the scene"
# Tells such a file from others.
MARK = f"{_AGGREGATOR}conv1.weight"
# Names of version 1 (arXiv v1), whose guidance comes from a backbone of its own.
_VERSION_1 = re.compile(r"backbone\.")
# Computed from the sides of grid and window, which nothing else in a checkpoint tells.
_MASK = re.compile(r".*\.attn_mask")
WINDOW, GRID = 12, 24  # of the official code, in patches


def is_cat_seg(names: Any) -> bool:
  """Whether arrays have the names of the official CAT-Seg."""
  return MARK in names


def _conv(ours: str, theirs: str, bias: bool = True, layout: str = "conv") -> tuple[Rule, ...]:
  kernel = Rule(f"{ours}/kernel", f"{theirs}.weight", layout)
  return (kernel, Rule(f"{ours}/bias", f"{theirs}.bias")) if bias else (kernel,)


def prompt_rules(layers: int, padding: bool) -> list[Rule]:
  """The table of what is trained from nothing; ours are paths in the `prompts` collection.

  Args:
    layers: aggregation layers.
    padding: whether classes are filled up with learned tokens.
  """
  rules = [
    *_conv("cost_embed", "conv1"),
    *_conv("appearance_proj", "guidance_projection.0"),
    *linear("text_proj", "text_guidance_projection.0"),
    *_conv("decoder/head", "head"),
  ]
  for i in range(2):
    rules += _conv(f"decoder_proj_{i}", f"decoder_guidance_projection.{i}.0")
    ours, theirs = f"decoder/step_{i}", f"decoder{i + 1}"
    rules += _conv(f"{ours}/up", f"{theirs}.up", layout="transposed")
    for j in range(2):
      rules += _conv(f"{ours}/conv_{j}", f"{theirs}.conv.double_conv.{3 * j}", bias=False)
      rules += norm(f"{ours}/norm_{j}", f"{theirs}.conv.double_conv.{3 * j + 1}")
  for i in range(layers):
    ours, theirs = f"spatial_{i}", f"layers.{i}.swin_block"
    rules += norm(f"{ours}/guidance_norm", f"{theirs}.guidance_norm")
    for j in range(2):
      block, swin = f"{ours}/block_{j}", f"{theirs}.block_{j + 1}"
      rules += [
        *norm(f"{block}/norm_1", f"{swin}.norm1"),
        *norm(f"{block}/norm_2", f"{swin}.norm2"),
      ]
      for name, short in (("query", "q"), ("key", "k"), ("value", "v"), ("out", "proj")):
        rules += linear(f"{block}/{name}", f"{swin}.attn.{short}")
      rules += [
        *linear(f"{block}/fc_1", f"{swin}.mlp.fc1"),
        *linear(f"{block}/fc_2", f"{swin}.mlp.fc2"),
      ]
    ours, theirs = f"classes_{i}", f"layers.{i}.attention"
    rules += [
      *norm(f"{ours}/norm_1", f"{theirs}.norm1"),
      *norm(f"{ours}/norm_2", f"{theirs}.norm2"),
    ]
    for name in ("query", "key", "value"):
      rules += linear(f"{ours}/{name}", f"{theirs}.attention.{name[0]}")
    rules += [
      *linear(f"{ours}/fc_1", f"{theirs}.MLP.0"),
      *linear(f"{ours}/fc_2", f"{theirs}.MLP.2"),
    ]
    if padding:
      rules.append(Rule(f"{ours}/padding_token", f"{theirs}.padding_tokens"))
      rules.append(Rule(f"{ours}/padding_guidance", f"{theirs}.padding_guidance"))
  rules = [rule.under("", _AGGREGATOR) for rule in rules]
  for i in range(2):
    rules += _conv(f"upsample_{i}", f"upsample{i + 1}", layout="transposed")
  return rules


def tower_rules(config: CLIPConfig) -> list[Rule]:
  """The table of CLIP's towers, with the thirds of input projections apart."""
  rules = []
  for rule in clip_rules(NAMING, config.vision_layers, config.text_layers):
    if not rule.ours.endswith("/in_proj/kernel"):
      rules.append(rule)
      continue
    ours, theirs = rule.ours.removesuffix("kernel"), rule.theirs.removesuffix("in_proj_weight")
    rules += [Rule(ours + third, f"{theirs}{third[0]}_proj_weight", "linear") for third in THIRDS]
  return rules


class Official(NamedTuple):
  """What a checkpoint of the official code holds.

  Attributes:
    clip: architecture of the towers.
    params: their parameters, with the thirds of input projections apart.
    prompts: the `prompts` collection.
    fields: of `CATSegConfig`, as far as the shapes tell them.
    epsilon: relative spacing of the coarsest type that values were stored in.
    assumed: what nothing in the checkpoint tells, and what it was taken as; "" if all is told.
  """

  clip: CLIPConfig
  params: dict
  prompts: dict
  fields: dict
  epsilon: float
  assumed: str = ""


def from_official(
  state: Mapping[str, np.ndarray], where: str, heads: Mapping[str, int] | None = None
) -> Official:
  """Trees from a state dict of the official code.

  Args:
    state: arrays by their names.
    where: the file it comes from, for messages.
    heads: of the towers (vision_heads, text_heads); the official code has width / 64.

  Raises:
    InputError: an array is missing, unknown or misshapen, the masks of windows are of no grid, or
      the checkpoint is one of version 1.
  """
  if any(map(_VERSION_1.match, state)):
    raise InputError(
      f"expected a checkpoint of CAT-Seg's CVPR version, {where} has a backbone beside CLIP, as "
      "those of arXiv version 1 have: get model_base.pth or model_large.pth"
    )
  masks = {name: state[name] for name in state if _MASK.fullmatch(name)}
  state = {name: value for name, value in state.items() if name not in masks}
  told = fields_from_shapes(state, NAMING, where)
  usual = {f"{tower}_heads": max(1, told[f"{tower}_width"] // 64) for tower in ("vision", "text")}
  overrides = {**usual, **(heads or {}), "activation": "quick_gelu"}
  clip = complete_config(told, overrides, where)
  window, grid = _window_and_grid(masks, where) if masks else (WINDOW, GRID)
  fields = _fields(state, clip, window, grid, where)
  prompted = prompt_rules(fields["layers"], bool(fields["pad_len"]))
  towers = tower_rules(clip)
  flat = to_ours([*towers, *prompted], state, where)
  stored = {value.dtype for value in flat.values()}
  flat = {name: float32(value, name, where) for name, value in flat.items()}
  epsilon = max(float(jnp.finfo(dtype).eps) for dtype in stored)
  params = traverse_util.unflatten_dict({rule.ours: flat[rule.ours] for rule in towers}, sep="/")
  prompts = {rule.ours: flat[rule.ours] for rule in prompted}
  for name, value in prompts.items():
    if "/padding_" in name:  # theirs have two axes more
      prompts[name] = value.reshape(-1)
  params = join(params, {})["params"]
  check_parameters(clip, traverse_util.flatten_dict(params, sep="/"), where)
  assumed = (
    f"no attn_mask in it, so windows of {window} in a grid of {grid} x {grid} patches are assumed, "
    "the official code's; trained with others, its segmentations are wrong"
  )
  prompts = traverse_util.unflatten_dict(prompts, sep="/")
  return Official(clip, params, prompts, fields, epsilon, "" if masks else assumed)


def _window_and_grid(masks: Mapping[str, np.ndarray], where: str) -> tuple[int, int]:
  """Sides of the windows and of the grid, in patches, that the masks were computed from."""
  name, mask = next(iter(masks.items()))
  count, tokens = np.shape(mask)[:2] if np.ndim(mask) == 3 else (0, 0)
  windows, window = math.isqrt(count), math.isqrt(tokens)
  for grid in range(windows * window, (windows - 1) * window, -1):  # the last may be filled up
    *_, want = cost_aggregation.window_layout(grid, grid, window, window // 2)
    if want is not None and all(np.array_equal(x, want) for x in masks.values()):
      return window, grid
  shapes = " and ".join(map(str, sorted({np.shape(x) for x in masks.values()})))
  raise InputError(
    f"expected attn_mask of a square grid, the same in all layers, in {where}; {name!r} or another "
    f"layer's is of none, got shape {shapes}: get the whole file again"
  )


def _fields(state: Mapping, clip: CLIPConfig, window: int, grid: int, where: str) -> dict:
  """The fields of `CATSegConfig` that shapes tell; others are the official code's."""

  def shape(name: str, rank: int) -> tuple[int, ...]:
    got = np.shape(state[name]) if name in state else None
    if got is None or len(got) != rank:
      raise InputError(
        f"expected {name!r} with {rank} axes in a checkpoint of CAT-Seg, got "
        f"{'nothing' if got is None else f'shape {got}'} in {where}: get the whole file again"
      )
    return got

  aggregator = lambda name, rank=4: shape(_AGGREGATOR + name, rank)
  layer = re.compile(re.escape(f"{_AGGREGATOR}layers.") + r"(\d+)\.")
  width, prompts, _, _ = aggregator("conv1.weight")
  third = clip.vision_layers // 3
  pairs = {
    "guidance_widths": [shape(f"upsample{i}.weight", 4)[1] for i in (1, 2)],
    "decoder_guidance_widths": [
      aggregator(f"decoder_guidance_projection.{i}.0.weight")[0] for i in (0, 1)
    ],
    "decoder_widths": [aggregator(f"decoder{i}.conv.double_conv.0.weight")[0] for i in (1, 2)],
    "guidance_layers": [max(third - 1, 0), max(2 * third - 1, 0)],
  }
  padding = f"{_AGGREGATOR}layers.0.attention.padding_tokens" in state
  return {
    "resolution": grid * clip.patch_size,
    "width": width,
    "prompts": prompts,
    "layers": len({match[1] for match in map(layer.match, state) if match}),
    "window": window,
    "appearance_width": aggregator("guidance_projection.0.weight")[0],
    "text_width": aggregator("text_guidance_projection.0.weight", 2)[0],
    "pad_len": 256 if padding else 0,
    **{name: tuple(values) for name, values in pairs.items()},
  }


def to_official(
  clip: CLIPConfig, params: Mapping, prompts: Mapping, *, grid: int, window: int
) -> dict[str, np.ndarray]:
  """The state dict of the official code; the inverse of `from_official`.

  Args:
    clip: architecture of the towers.
    params: all of CLIP's parameters.
    prompts: the `prompts` collection of a CAT-Seg.
    grid: side of the patch grid that it segments.
    window: side of the windows of spatial aggregation.

  Raises:
    InputError: the prompts have no names there.
  """
  towers = tower_rules(clip)
  layers = sum(name.startswith("spatial_") for name in prompts)
  padding = "padding_token" in prompts.get("classes_0", {})
  flat = _apart({**params, **prompts})
  state = to_theirs([*towers, *prompt_rules(layers, padding)], flat, "the trained CAT-Seg")
  for name, value in state.items():
    if ".padding_" in name:
      state[name] = value.reshape(1, 1, -1)
  *_, mask = cost_aggregation.window_layout(grid, grid, window, window // 2)
  if mask is not None:
    names = [f"{_AGGREGATOR}layers.{i}.swin_block.block_2.attn_mask" for i in range(layers)]
    state |= dict.fromkeys(names, mask)
  return state


def trained_part(official: Official, clip: Mapping, where: str) -> tuple[dict, dict]:
  """What was trained of CLIP, and the fields of `CATSegConfig` that say so.

  Args:
    official: of a checkpoint.
    clip: parameters of the CLIP that it started from.
    where: both files, for messages.

  Raises:
    InputError: the towers differ in what no setting trains.
  """
  changed = set()
  before, after = (_apart(tree) for tree in (clip, official.params))
  for name, value in after.items():
    want = np.shape(before[name]) if name in before else "no such array"
    if want != np.shape(value):
      raise InputError(
        f"expected one CLIP in {where}, {name} has shape {np.shape(value)} in the first, {want} in "
        "the second: pass the weights that were trained around (ViT-L/14@336px of model_large.pth)"
      )
    # A checkpoint of float32 holds OpenAI's float16 exactly; one of a coarser type rounds them.
    if not np.allclose(before[name], value, rtol=max(1e-5, official.epsilon), atol=1e-4):
      changed.add(name)
  for positions in (False, True):
    for tuned in TUNED:
      network = CATSeg(
        official.clip, CATSegConfig(**official.fields, tuned=tuned, tuned_positions=positions)
      )
      if all(re.fullmatch(network.trained, name) for name in changed):
        tree, _ = split(official.params, network.trained)
        return tree, {"tuned": tuned, "tuned_positions": positions}
  raise InputError(
    f"expected one CLIP in {where}, {min(changed)} differs, which CAT-Seg does not train: pass the "
    "weights that were trained around"
  )


def other_towers(official: Official, clip: CLIPConfig) -> list[str]:
  """What no array tells of towers, where a CLIP has it otherwise than the official code."""
  names = ("vision_heads", "text_heads", "activation")
  was, asked = ({name: getattr(c, name) for name in names} for c in (official.clip, clip))
  return differences(was, asked, "clip")


def unwritten(official: Official, clip: CLIPConfig, config: Mapping) -> list[str]:
  """Settings of a run that its checkpoint for the official code does not hold, as lines.

  Args:
    official: what such a checkpoint is read as.
    clip: architecture of the run's CLIP.
    config: of the run, as nested dictionaries.
  """
  return [*other_towers(official, clip), *_other_settings(official, config)]


def _other_settings(official: Official, config: Mapping) -> list[str]:
  read = {**settings(official, {}), "cat_seg": vars(CATSegConfig(**official.fields))}
  kept = ("cat_seg", "templates", "synonyms", "data")
  was, asked = (json.loads(json.dumps({k: tree.get(k) for k in kept})) for tree in (read, config))
  was["data"] = {name: was["data"][name] for name in Normalization._fields}
  # Files of earlier versions leave it to the CLIP.
  asked["data"] = {name: asked["data"][name] or value for name, value in was["data"].items()}
  for name in ("tuned", "tuned_positions", "tuned_unused_query"):  # only training knows them
    was["cat_seg"].pop(name), asked["cat_seg"].pop(name, None)
  return differences(was, {**asked, "cat_seg": {**was["cat_seg"], **asked["cat_seg"]}})


def _apart(tree: Mapping) -> dict[str, Any]:
  """Parameters by their paths, input projections as thirds."""
  flat = traverse_util.flatten_dict(tree, sep="/")
  return {name: y for path, x in flat.items() for name, y in (thirds(path, x) or {path: x}).items()}


def settings(official: Official, tuned: Mapping) -> dict:
  """The config of a segmentation run with the official protocol, as far as it is not the default.

  Args:
    official: of a checkpoint.
    tuned: fields of `CATSegConfig` that say what was trained.
  """
  windows = CATSeg.windows(official.clip)._asdict()
  of_data = {name: windows.pop(name) for name in ("short_side", "long_side")}
  of_data["recipe"] = windows.pop("resize")
  of_data |= OPENAI_IMAGES._asdict()
  return {
    "method": "cat_seg",
    "cat_seg": {**official.fields, **tuned},
    "templates": TEMPLATE,
    "synonyms": "first",
    "loss": {"name": "bce"},
    "data": of_data,
    "eval": {**windows, "seen_penalty": 0.0},
  }


def save(
  path: Any, clip: CLIPConfig, params: Mapping, tree: Mapping, fields: Any, notes: Mapping[str, str]
) -> dict[str, np.ndarray]:
  """Writes a trained CAT-Seg as detectron2 writes the official code's, with the whole CLIP.

  Args:
    path: of the new file.
    clip: architecture of the towers.
    params: CLIP's parameters, as they were before.
    tree: what was trained.
    fields: of `CATSegConfig`.
    notes: stored beside the arrays.

  Returns:
    The arrays, by the official names.

  Raises:
    InputError: the tree has no names there, or the path cannot be written.
  """
  variables = join(params, tree)
  grid = fields.resolution // clip.patch_size
  state = to_official(
    clip, variables["params"], variables["prompts"], grid=grid, window=fields.window
  )
  with writing(path) as temporary:
    torch_archive.write(temporary, state, notes, "model")
  return state
