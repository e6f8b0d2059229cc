"""Pre-training of the tiny CLIP of the embedded world, on image-caption pairs only.

    python main.py --config=configs/shapes_clip.py --workdir=runs/shapes_clip

Two CPU cores. The weights it made are shipped in `rpn_jax/assets/`, their record beside them.
"""

import ml_collections

from configs import common


def get_config(arg: str = "") -> ml_collections.ConfigDict:
  args = common.parse_arg(arg, runlocal=False)
  c = ml_collections.ConfigDict()
  c.task = "pretrain"  # what main.py runs
  c.seed = 0  # of the initial parameters and of the drawn pictures
  c.steps = 4 if args.runlocal else 1500  # optimizer steps
  c.batch_size = 8 if args.runlocal else 128  # image-caption pairs per step
  c.kept_patches = 0.5  # share of random patches the tower sees, until the last steps
  c.unmasked_steps = 2 if args.runlocal else 200  # last steps, which see every patch
  c.learning_rate = 1e-3  # peak of the cosine schedule
  c.warmup_steps = 2 if args.runlocal else 100  # linear, from 0
  c.weight_decay = 0.05  # decoupled, on matrices only
  c.template = common.TEMPLATE  # sentence for zero-shot classification in the test
  c.mean, c.std = common.CLIP_MEAN, common.CLIP_STD  # image normalisation, per channel, in [0, 1]
  c.caption_tokens = 32  # columns of the token batch; attention is causal, padding is only cost
  c.log_every = 10  # steps
  c.eval_every = 2 if args.runlocal else 150  # steps
  c.test_images = 96 if args.runlocal else 480  # single-object images of the zero-shot test
  c.clip = ml_collections.ConfigDict()  # the architecture: see CLIPConfig
  c.clip.update(
    embed_dim=64,
    image_size=64,
    patch_size=8,
    vision_width=128,
    vision_layers=6,
    vision_heads=4,
    # Text width 48 keeps the 49408 token embeddings under 5 MB in float16.
    text_width=48,
    text_layers=3,
    text_heads=3,
    context_length=77,
    vocab_size=49408,
    activation="quick_gelu",
  )
  return c.lock()
