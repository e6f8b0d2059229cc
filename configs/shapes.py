"""RPN on the embedded world of shapes: a few minutes on two CPU cores.

    python main.py --config=configs/shapes.py --workdir=runs/shapes

Arguments behind a colon pick a variant, e.g. `configs/shapes.py:preset=released`:

    preset=paper|released      which reading of RPN (docs/method.md)
    variant=rpn|no_rpm|vpt|lpm|training_free   what is trained
    runlocal                   a run of a few steps, to try things
"""

import ml_collections

from configs import common

SIDE = 96  # short side of the scenes, pixels
CROP = 64  # training crops and test windows, pixels: the size the tiny CLIP was trained at


def get_config(arg: str = "") -> ml_collections.ConfigDict:
  args = common.parse_arg(
    arg,
    preset=("paper", "released"),
    variant=("rpn", "no_rpm", "vpt", "lpm", "training_free"),
    runlocal=False,
  )
  c = ml_collections.ConfigDict()
  c.task = "segment"  # what main.py runs
  c.seed = 0  # of initial prompts, data order, augmentation, dropout and gate noise
  c.clip = "shapes_clip.safetensors"  # CLIP weights: a path, or a file shipped in rpn_jax/assets
  c.templates = (common.TEMPLATE,)  # sentences around a class name, averaged
  c.method = "training_free" if args.variant == "training_free" else "rpn"
  c.dtype = "float32"  # compute type of the tower: float32 or bfloat16; prompts stay float32
  c.remat = False  # recompute blocks in the backward pass: less memory, more time
  c.model = common.model(args.preset, deep_tokens=10, h_grid=(CROP // 8, CROP // 8))
  common.apply_variant(c.model, args.variant)

  c.steps = 8 if args.runlocal else 1000  # optimizer steps
  c.log_every = 10  # steps between logged losses
  c.eval_every = 4 if args.runlocal else 250  # steps between evaluations, each with a checkpoint

  c.loss = ml_collections.ConfigDict()
  c.loss.name = "sigmoid"  # "sigmoid" (focal and dice) or "softmax" (cross-entropy)
  c.loss.mask_ignored = False  # leave ignored pixels out of the focal loss; released: negatives

  c.optimizer = common.optimizer(c.get_ref("steps"))
  # The release's rates are for batches of 16 and 20,000 steps; this run is a fraction of that.
  c.optimizer.base_lr = 2e-4
  c.optimizer.warmup_steps = 50

  c.data = ml_collections.ConfigDict()
  c.data.name = "shapes"  # data set
  c.data.train_images = 64 if args.runlocal else 1600  # scenes drawn for training
  c.data.eval_images = 24 if args.runlocal else 120  # scenes drawn for evaluation
  c.data.data_dir = "data"  # prepared data sets live here
  c.data.setting = "zero_shot"  # unseen classes become "ignore" in training labels
  c.data.batch_size = 8  # images per step, over all devices
  c.data.crop = CROP  # side of training crops, pixels
  c.data.scale = (4 * SIDE, SIDE)  # limits of the long and the short side before random scaling
  c.data.ratio = (0.75, 1.5)  # range of the random scale (the benchmarks use 0.5 to 2)
  # The released distortion turns hues by up to 36 degrees, which makes orange red: here colours
  # are half of every class name.
  c.data.photometric = False  # distort brightness, contrast, saturation and hue
  c.data.short_side = SIDE  # short side of evaluated images, pixels
  c.data.mean, c.data.std = common.normalization(args.preset)
  c.data.threads = 2  # threads that read ahead
  c.data.workers = 0  # extra reader processes

  c.eval = ml_collections.ConfigDict()
  c.eval.crop = CROP  # side of the sliding window, pixels
  c.eval.stride = 48  # step of the sliding window, pixels
  c.eval.window_batch = 4  # windows per call of the network
  c.eval.seen_penalty = 0.1  # subtracted from the scores of seen classes where some are unseen
  return c.lock()
