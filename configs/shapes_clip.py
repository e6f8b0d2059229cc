"""Pre-training of the tiny CLIP of the shapes data set, on image-caption pairs only.

    python main.py --config=configs/shapes_clip.py --workdir=runs/shapes_clip

Hardware: two CPU cores, 30 minutes on an AMD EPYC. Zero-shot accuracy on single objects: 93.5 %.

The weights are shipped in `rpn_jax/assets/`, with a record of their training beside them.

A word behind the colon makes one of a family of towers, each with one change of the first
(docs/study.md). Hours of one core of an AMD EPYC with AVX-512: whole 0.9, deep 0.8, wide 0.5,
long 1.6, crowded 0.65 with the core to itself.

    base       the tower that is shipped
    whole      no patches are dropped: what dropping them does to patches, which must then make do
               without their neighbors
    deep       12 vision layers in place of 6: each mixes the patches once more
    wide       vision width 192 in place of 128, in heads of the same width: more room for both
               what is under a patch and what is around it
    long       4500 steps in place of 1500: a global embedding that is trained further
    crowded    scenes of 96 pixels with three to eight objects, all of them named, in place of
               views of 64 with up to three: a caption that is true of many places
    runlocal   a few steps, to try things
"""

from ml_collections import config_dict

from configs import common
from rpn_jax import config

# Tower -> the fields that it changes of `base`.
TOWERS: dict[str, dict] = {
  "base": {},
  "whole": {"kept_patches": 1.0},
  "deep": {"clip.vision_layers": 12},
  "wide": {"clip.vision_width": 192, "clip.vision_heads": 6},
  "long": {"steps": 4500},
  # The longest caption of eight objects and two grounds has 40 tokens.
  "crowded": {"scenes": "crowded", "clip.image_size": 96, "caption_tokens": 40},
}


def get_config(arg: str = "") -> config_dict.ConfigDict:
  args = common.parse_arg(arg, tower=tuple(TOWERS), runlocal=False)
  c = config.section(config.Pretrain)
  c.warmup_steps = config.warmup(c, config.Pretrain.warmup_steps)
  c.unmasked_steps = config.warmup(c, config.Pretrain.unmasked_steps)
  c.clip = config_dict.ConfigDict(
    {
      "embed_dim": 64,
      "image_size": 64,
      "patch_size": 8,
      "vision_width": 128,
      "vision_layers": 6,
      "vision_heads": 4,
      # Text width 48 keeps the 49408 token embeddings under 5 MB in float16.
      "text_width": 48,
      "text_layers": 3,
      "text_heads": 3,
      "context_length": 77,
      "vocab_size": 49408,
      "activation": "quick_gelu",
    }
  )
  c.update_from_flattened_dict(TOWERS[args.tower])
  if args.runlocal:
    c.steps, c.unmasked_steps, c.warmup_steps = 4, 2, 2
    c.batch_size, c.eval_every, c.test_images = 8, 2, 96
  return c.lock()
