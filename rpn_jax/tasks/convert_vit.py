"""Image encoders other than CLIP's (Table 12): a plain ViT's weights beside CLIP's text tower.

    python -m rpn_jax convert_vit vit_base.safetensors ViT-B-16.safetensors vit_b16.safetensors

The first file is a ViT or MAE, safetensors with timm's or Hugging Face's names or MAE's own .pth;
the second is CLIP, whose text tower is taken; the third is written, and is used as
--config.clip=vit_b16.safetensors with the normalization that the encoder was trained with.
"""

import argparse

from rpn_jax.base import paths
from rpn_jax.base.console import run_command
from rpn_jax.weights import clip_file, plain_vit
from rpn_jax.weights.architecture import describe
from rpn_jax.weights.arrays import read_arrays


def main(arguments=None) -> int:
  parser = argparse.ArgumentParser(
    prog="rpn convert_vit",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument(
    "encoder", type=paths.expand, help="ViT or MAE: safetensors, or a PyTorch state dict"
  )
  parser.add_argument("clip", help="CLIP weights of any form, or the name of shipped ones")
  parser.add_argument("destination", type=paths.expand, help="the safetensors file to write")
  parser.add_argument("--heads", type=int, help="attention heads, if no published ViT is as large")
  args = parser.parse_args(arguments)
  return run_command(lambda: convert(args.encoder, args.clip, args.destination, args.heads))


def convert(encoder, clip, destination, heads: int | None = None) -> None:
  """Writes weights with the image tower of `encoder` and the text tower of `clip`.

  Raises:
    InputError: a file that cannot be read or written, or one that is not a plain ViT.
  """
  file = read_arrays(encoder)
  config, params = plain_vit.join(file.arrays, str(file.path), *clip_file.load_clip(clip), heads)
  clip_file.save(destination, config, params)
  print(f"{describe(config)}, plain vision transformer\nwrote {destination}")
