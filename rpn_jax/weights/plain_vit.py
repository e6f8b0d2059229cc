"""Image encoders other than CLIP's (Table 12): a plain ViT's weights beside CLIP's text tower.

Reads arrays by the names of timm (which MAE's own files share) or Hugging Face's transformers.
Heads of classifiers and MAE's decoder are left out. A patch embedding with a bias becomes one
without: the bias is added to the position of every patch.
"""

import dataclasses
import re
from collections.abc import Mapping

import numpy as np
from flax import traverse_util

from rpn_jax.base.errors import InputError
from rpn_jax.models.clip import CLIPConfig
from rpn_jax.weights.architecture import usual_heads
from rpn_jax.weights.arrays import float32

# Hugging Face's names to timm's, in a block and outside of the blocks.
HF_BLOCK = {
  "attention.output.dense": "attn.proj",
  "layernorm_before": "norm1",
  "layernorm_after": "norm2",
  "intermediate.dense": "mlp.fc1",
  "output.dense": "mlp.fc2",
}
HF_OUTSIDE = {
  "embeddings.cls_token": "cls_token",
  "embeddings.position_embeddings": "pos_embed",
  "embeddings.patch_embeddings.projection.weight": "patch_embed.proj.weight",
  "embeddings.patch_embeddings.projection.bias": "patch_embed.proj.bias",
  "layernorm.weight": "norm.weight",
  "layernorm.bias": "norm.bias",
}
# For other tasks: classifiers, MAE's decoder and mask token, HF's pooler.
UNUSED = re.compile(r"(head|fc_norm|pre_logits|decoder(_\w+)?|mask_token|classifier|pooler)\b.*")
# timm's name in a block -> ours, whether it is a matrix product.
BLOCK = {
  "norm1": ("ln_1", False),
  "attn.qkv": ("attn/in_proj", True),
  "attn.proj": ("attn/out_proj", True),
  "norm2": ("ln_2", False),
  "mlp.fc1": ("mlp/c_fc", True),
  "mlp.fc2": ("mlp/c_proj", True),
}


def to_timm(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """A state by timm's names, from timm's or Hugging Face's; what other tasks need is left out.

  Raises:
    InputError: queries without keys or values.
  """
  found, split = {}, {}
  for name, value in state.items():
    name = name.removeprefix("module.").removeprefix("vit.")
    if UNUSED.match(name):
      continue
    block = re.fullmatch(r"encoder\.layer\.(\d+)\.(.+)\.(weight|bias)", name)
    if block:
      i, part, kind = block.groups()
      if part.startswith("attention.attention."):
        split[i, part.rpartition(".")[2], kind] = value
        continue
      name = f"blocks.{i}.{HF_BLOCK.get(part, part)}.{kind}"
    found[HF_OUTSIDE.get(name, name)] = value
  for i, kind in {(i, kind) for i, _, kind in split}:
    keys = [(i, part, kind) for part in ("query", "key", "value")]
    parts = [split[key] for key in keys if key in split]
    if len(parts) < 3:
      raise InputError(f"layer {i}: expected query, key and value {kind}, one is missing")
    found[f"blocks.{i}.attn.qkv.{kind}"] = np.concatenate(parts)
  return found


def vision_tower(
  state: Mapping[str, np.ndarray], where: str, heads: int | None = None
) -> tuple[dict, dict]:
  """The tower's parameters, and the fields of CLIPConfig that they tell.

  Args:
    state: by timm's names; see `to_timm`.
    where: the file, for messages.
    heads: of attention; None: those of the published models of the same size.

  Raises:
    InputError: an array is missing, unknown or misshapen, or heads that nothing tells.
  """
  remaining = dict(state)

  def take(name: str, *shape: int | None) -> np.ndarray:
    if name not in remaining:
      raise InputError(f"{where}: no array {name}; expected a plain ViT with timm's or HF's names")
    value = float32(remaining.pop(name), name, where)
    if len(shape) != value.ndim or any(w not in (None, n) for w, n in zip(shape, value.shape)):
      raise InputError(f"{where}: {name} has shape {value.shape}, expected {shape} (None: any)")
    return value

  kernel = take("patch_embed.proj.weight", None, 3, None, None)
  width, _, patch, _ = kernel.shape
  positions = take("pos_embed", 1, None, width)[0].copy()
  positions[1:] += take("patch_embed.proj.bias", width)
  side = round((len(positions) - 1) ** 0.5)
  if side**2 != len(positions) - 1 or kernel.shape[3] != patch:
    raise InputError(
      f"{where}: expected square patches and a class token before a square grid, got patch "
      f"{kernel.shape[2:]}, {len(positions)} positions"
    )
  flat = {
    "patch_embed/kernel": kernel.transpose(2, 3, 1, 0),
    "position_embedding": positions,
    "class_embedding": take("cls_token", 1, 1, width)[0, 0],
    "ln_post/scale": take("norm.weight", width),
    "ln_post/bias": take("norm.bias", width),
  }
  layers = 0
  while f"blocks.{layers}.norm1.weight" in remaining:
    for theirs, (ours, product) in BLOCK.items():
      weight = take(f"blocks.{layers}.{theirs}.weight", *((None, None) if product else (width,)))
      flat[f"block_{layers}/{ours}/{'kernel' if product else 'scale'}"] = weight.T
      flat[f"block_{layers}/{ours}/bias"] = take(f"blocks.{layers}.{theirs}.bias", len(weight))
    layers += 1
  if remaining or not layers:
    raise InputError(
      f"{where}: expected a plain ViT (class token, absolute positions, no layer scale, no "
      f"registers), got {layers} blocks and unknown arrays such as {min(remaining, default='none')}"
    )
  heads = heads or usual_heads("vision", width, layers)
  if heads is None or heads < 1 or width % heads:
    raise InputError(
      f"{where}: expected the number of attention heads of {layers} layers {width} wide, got "
      f"{heads}, and the file does not tell it: pass --heads=NUMBER to rpn convert_vit"
    )
  mlp = flat["block_0/mlp/c_fc/bias"].size
  fields = {
    "vision": "vit", "vision_width": width, "vision_layers": layers, "vision_heads": heads,
    "vision_mlp_width": None if mlp == 4 * width else mlp,
    "patch_size": patch, "image_size": side * patch,
    "mean": None, "std": None, "squash": False,  # those of the CLIP were of its own image tower
  }  # fmt: skip
  return traverse_util.unflatten_dict(flat, sep="/"), fields


def join(
  state: Mapping[str, np.ndarray],
  where: str,
  clip: CLIPConfig,
  params: Mapping,
  heads: int | None = None,
) -> tuple[CLIPConfig, dict]:
  """Config and parameters of a plain encoder beside a CLIP's text tower.

  Args:
    state: the encoder, by timm's or Hugging Face's names.
    where: its file, for messages.
    clip: architecture of the CLIP.
    params: its parameters.
    heads: of the encoder; see `vision_tower`.

  Raises:
    InputError: not a plain ViT, or heads that nothing tells.
  """
  visual, fields = vision_tower(to_timm(state), where, heads)
  return dataclasses.replace(clip, **fields), {**params, "visual": visual}
