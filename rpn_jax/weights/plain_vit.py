"""Encoders other than CLIP under RPN (Table 12): a plain ViT's weights beside CLIP's text tower.

    python -m rpn_jax convert_vit vit_base.safetensors ViT-B-16.safetensors vit_b16.safetensors

The first file is a ViT or MAE, safetensors with timm's or Hugging Face's names or MAE's own .pth;
the second is CLIP, converted; the third is written, and is used as
--config.clip=vit_b16.safetensors with the normalisation that the encoder was trained with. Heads of
classifiers and MAE's decoder are left out. A patch embedding with a bias becomes one without: the
bias is added to the position of every patch.
"""

import argparse
import dataclasses
import pathlib
import re
import sys
from collections.abc import Mapping

import numpy as np
from flax import traverse_util

from rpn_jax.base.errors import InputError
from rpn_jax.models.clip import CLIPConfig
from rpn_jax.weights import arrays, clip_file

# Hugging Face's names to timm's, in a block and around them.
HF = {
  "attention.output.dense": "attn.proj",
  "layernorm_before": "norm1",
  "layernorm_after": "norm2",
  "intermediate.dense": "mlp.fc1",
  "output.dense": "mlp.fc2",
}
HF_AROUND = {
  "embeddings.cls_token": "cls_token",
  "embeddings.position_embeddings": "pos_embed",
  "embeddings.patch_embeddings.projection.weight": "patch_embed.proj.weight",
  "embeddings.patch_embeddings.projection.bias": "patch_embed.proj.bias",
  "layernorm.weight": "norm.weight",
  "layernorm.bias": "norm.bias",
}
# Of other tasks: classifiers, MAE's decoder and mask token, HF's pooler.
UNUSED = re.compile(r"(head|fc_norm|pre_logits|decoder|mask_token|classifier|pooler)\b.*")
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
  """A state by timm's names, from theirs or Hugging Face's; what is of other tasks is left out."""
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
      name = f"blocks.{i}.{HF.get(part, part)}.{kind}"
    found[HF_AROUND.get(name, name)] = value
  for i, kind in {(i, kind) for i, _, kind in split}:
    parts = [split.get((i, part, kind)) for part in ("query", "key", "value")]
    if any(part is None for part in parts):
      raise InputError(f"layer {i}: expected query, key and value {kind}, one is missing")
    found[f"blocks.{i}.attn.qkv.{kind}"] = np.concatenate(parts)
  return found


def vision_tower(state: Mapping[str, np.ndarray], where: str) -> tuple[dict, dict]:
  """The tower's parameters and what they tell of its architecture, fields of CLIPConfig.

  Args:
    state: by timm's names; see `to_timm`.
    where: the file, for errors.

  Raises:
    InputError: an array is missing, unknown or misshapen.
  """
  left = dict(state)

  def take(name: str, *shape: int | None) -> np.ndarray:
    if name not in left:
      raise InputError(f"{where}: no array {name}; expected a plain ViT with timm's or HF's names")
    value = arrays.float32(left.pop(name), name, where)
    if len(shape) != value.ndim or any(w not in (None, n) for w, n in zip(shape, value.shape)):
      raise InputError(f"{where}: {name} has shape {value.shape}, expected {shape} (None: any)")
    return value

  kernel = take("patch_embed.proj.weight", None, 3, None, None)
  width, _, patch, _ = kernel.shape
  positions = take("pos_embed", 1, None, width)[0].copy()
  positions[1:] += take("patch_embed.proj.bias", width)
  side = round((len(positions) - 1) ** 0.5)
  if side**2 != len(positions) - 1 or kernel.shape[3] != patch or width % 64:
    raise InputError(
      f"{where}: expected square patches, a class token before a square grid and a width of whole "
      f"heads of 64, got patch {kernel.shape[2:]}, {len(positions)} positions, width {width}"
    )
  flat = {
    "patch_embed/kernel": kernel.transpose(2, 3, 1, 0),
    "position_embedding": positions,
    "class_embedding": take("cls_token", 1, 1, width)[0, 0],
    "ln_post/scale": take("norm.weight", width),
    "ln_post/bias": take("norm.bias", width),
  }
  layers = 0
  while f"blocks.{layers}.norm1.weight" in left:
    for theirs, (ours, product) in BLOCK.items():
      weight = take(f"blocks.{layers}.{theirs}.weight", *((None, None) if product else (width,)))
      flat[f"block_{layers}/{ours}/{'kernel' if product else 'scale'}"] = weight.T
      flat[f"block_{layers}/{ours}/bias"] = take(f"blocks.{layers}.{theirs}.bias", len(weight))
    layers += 1
  if left or not layers:
    raise InputError(
      f"{where}: {layers} blocks found, and unknown arrays such as {min(left, default='none')}; "
      "expected a plain ViT: class token, absolute positions, no layer scale, no registers"
    )
  fields = {
    "vision": "vit", "vision_width": width, "vision_layers": layers, "vision_heads": width // 64,
    "patch_size": patch, "image_size": side * patch,
  }  # fmt: skip
  return traverse_util.unflatten_dict(flat, sep="/"), fields


def join(state: Mapping[str, np.ndarray], where: str, clip: CLIPConfig, params: dict) -> tuple:
  """Config and parameters of a plain encoder beside a CLIP's text tower."""
  visual, fields = vision_tower(to_timm(state), where)
  return dataclasses.replace(clip, **fields), {**params, "visual": visual}


def main(arguments=None) -> int:
  parser = argparse.ArgumentParser(prog="rpn convert_vit", description=__doc__)
  parser.formatter_class = argparse.RawDescriptionHelpFormatter
  parser.add_argument("encoder", help="ViT or MAE: safetensors, or a PyTorch state dict")
  parser.add_argument("clip", help="CLIP, as any of its files: gives the text tower")
  parser.add_argument("destination", help="the safetensors file to write")
  args = parser.parse_args(arguments)
  try:
    path = pathlib.Path(args.encoder)
    _, state, _ = arrays.read_arrays(path)
    config, params = join(state, str(path), *clip_file.load(args.clip))
    clip_file.save(args.destination, config, params)
  except (InputError, OSError) as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  print(f"{clip_file.describe(config)}, plain vision transformer\nwrote {args.destination}")
  return 0
