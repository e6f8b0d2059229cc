"""Checkpoints of the official RPN code (`liblacklucy/RPN`), both ways."""

import json
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from rpn_jax.base.errors import InputError
from rpn_jax.base.pixels import IMAGENET_MEAN, IMAGENET_STD
from rpn_jax.base.words import differences
from rpn_jax.models.clip import CLIPConfig, resize_positions
from rpn_jax.weights import torch_archive
from rpn_jax.weights.architecture import check_parameters, complete_config, fields_from_shapes
from rpn_jax.weights.arrays import float32, writing
from rpn_jax.weights.names import AUTHORS, AUTHORS_PROMPTS, clip_rules, to_ours, to_theirs

# In their state dict, but no computation reads them.
UNUSED = ("prompt_norm.weight", "prompt_norm.bias")


def is_authors(state: Mapping[str, np.ndarray]) -> bool:
  """Whether arrays have the names of the authors' segmentor, which no other one of mmseg has."""
  return "decode_head.vis_proj_1.weight" in state and "backbone.deep_prompt_embeddings" in state


def from_authors(state: Mapping[str, np.ndarray], where: str = "the authors' state") -> tuple:
  """Trees from the state dict of the authors' segmentor.

  Args:
    state: arrays by their names; entries in UNUSED are left out.
    where: the file it comes from, for messages.

  Returns:
    CLIP parameters (without the logit scale, which is not in such files) and the `prompts`
    collection of the preset `released`.

  Raises:
    InputError: an array is missing, unknown or misshapen.
  """
  fields = fields_from_shapes(state, AUTHORS, where)
  # Heads change no shape, and the state dict does not tell them.
  heads = {"vision_heads": 1, "text_heads": 1}
  config = complete_config(fields, {**heads, "activation": "quick_gelu"}, where)
  tower_rules = clip_rules(AUTHORS, config.vision_layers, config.text_layers)
  used = {name: value for name, value in state.items() if name not in UNUSED}
  flat = to_ours([*tower_rules, *AUTHORS_PROMPTS], used, where)
  flat = {name: float32(value, name, where) for name, value in flat.items()}
  clip = {rule.ours: flat[rule.ours] for rule in tower_rules}
  prompts = {rule.ours: flat[rule.ours] for rule in AUTHORS_PROMPTS}
  check_parameters(config, {**clip, "logit_scale": np.zeros((), np.float32)}, where)
  _check_prompts(config, prompts, where)
  return traverse_util.unflatten_dict(clip, sep="/"), traverse_util.unflatten_dict(prompts, sep="/")


def _check_prompts(config: CLIPConfig, prompts: Mapping[str, np.ndarray], where: str) -> None:
  layers, width, joint = config.vision_layers, config.vision_width, config.embed_dim
  # None: free, the number of deep tokens and of patch tokens.
  shapes: dict[str, tuple[int | None, ...]] = {
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
  for path, value in prompts.items():
    want = shapes.get(path, (joint,))
    if value.ndim != len(want) or any(w not in (None, n) for w, n in zip(want, value.shape)):
      raise InputError(
        f"expected {path} with shape {want} (None: any), got {value.shape} in {where}: "
        "the file is damaged or of another architecture"
      )


def model_fields(prompts: Mapping) -> dict:
  """The settings of `config.model` that the official code has for these prompts."""
  # h is stored on the token grid of a training crop.
  side = round(len(prompts["h"]) ** 0.5)
  return {
    "tuner": "rpn+vpt", "itp": "image_to_pixel", "apg": "parameter", "m2oe": "none",
    "rpm_layers": "all", "combine": "cat", "h_shared": True,
    "deep_tokens": prompts["deep_tokens"].shape[1], "h_grid": [side, side], "head": "released",
    "class_embedding_copies": 2,
  }  # fmt: skip


def settings(prompts: Mapping) -> dict:
  """The config of a run of the official code, as far as these prompts and the code tell it."""
  data = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}
  return {"model": model_fields(prompts), "data": data}


def other_settings(prompts: Mapping, model: Mapping) -> list[str]:
  """Settings of `config.model` that change what these prompts compute in the official code.

  Args:
    prompts: see `to_authors_prompts`, which says first if they have no names there.
    model: as far as it is known.

  Returns:
    Lines `field: official -> given`.

  Raises:
    InputError: see `to_authors_prompts`.
  """
  to_authors_prompts(prompts)
  official = model_fields(prompts)
  rows, side = len(prompts["h"]), official["h_grid"][0]
  given = {name: model[name] for name in official if model.get(name) is not None}
  lines = differences({name: official[name] for name in given}, json.loads(json.dumps(given)))
  return lines if side**2 == rows else [*lines, f"h: a square grid -> {rows} tokens"]


def check_same_clip(theirs: Mapping, clip: Mapping, where: str) -> None:
  """Compares the towers in a checkpoint of the authors with the CLIP they started from.

  Args:
    theirs: as `from_authors` gives them. The official code resizes the positions of the image
      tower; all else is CLIP's own.
    clip: the parameters.
    where: both files, for messages.

  Raises:
    InputError: an array differs.
  """
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


def to_authors_prompts(prompts: Mapping) -> dict[str, np.ndarray]:
  """The `prompts` tree of the preset `released`, or a tree shaped like it, by the authors' names.

  Raises:
    InputError: the tree is of another form (per-layer h, M2oE), which has no names there.
  """
  flat = traverse_util.flatten_dict(prompts, sep="/")
  if others := sorted({rule.ours for rule in AUTHORS_PROMPTS} ^ flat.keys()):
    raise InputError(
      "expected prompts of the parts that the official code has, as preset=released trains them, "
      f"got others: {', '.join(others[:4])}{', …' if len(others) > 4 else ''}"
    )
  return to_theirs(AUTHORS_PROMPTS, flat, "the prompts tree")


def save(path, prompts: Mapping, notes: Mapping[str, str]) -> int:
  """Writes prompts as mmcv writes the authors' checkpoints, without the frozen towers.

  Args:
    path: of the new .pth file.
    prompts: see `to_authors_prompts`.
    notes: stored beside the arrays.

  Returns:
    The number of arrays.

  Raises:
    InputError: the tree has no names there, or the path cannot be written.
  """
  state = to_authors_prompts(prompts)
  with writing(path) as temporary:
    torch_archive.write(temporary, state, notes)
  return len(state)
