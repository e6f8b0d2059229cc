"""RPN on the embedded world of shapes: a few minutes on two CPU cores.

    python main.py --config=configs/shapes.py --workdir=runs/shapes

Arguments behind a colon pick a variant, e.g. `configs/shapes.py:preset=released`:

    preset=paper|released      which reading of RPN (docs/method.md)
    setting=zero_shot|transductive|supervised   which classes are labelled in training
    tuner=…                        what adapts the tower: rpn, vpt, rpn+vpt, lpm (only the head),
                                   bitfit, adapter, ssf, lora, lst, full; or training_free
    open_vocab                 all classes are labelled in training; --mode=eval then goes through
                               this world and a second one, whose scenes and names are others
    runlocal                   a run of a few steps, to try things
"""

import ml_collections

from configs import common

SIDE = 96  # short side of the scenes, pixels
CROP = 64  # training crops and test windows, pixels: the size the tiny CLIP was trained at


def get_config(arg: str = "") -> ml_collections.ConfigDict:
  args = common.parse_arg(
    arg,
    setting=("zero_shot", "transductive", "supervised"),
    preset=("paper", "released"),
    tuner=("", *common.TUNERS, "training_free"),
    open_vocab=False,
    runlocal=False,
  )
  c = common.segmentation(args.preset, "shapes", crop=CROP, patch=8, deep_tokens=10)
  c.clip = "shapes_clip.safetensors"  # shipped
  if args.tuner == "training_free":
    c.method = "training_free"
  elif args.tuner:
    c.model.tuner = args.tuner
  c.data.setting = "supervised" if args.open_vocab else args.setting
  c.eval.sets = ("shapes", "crowds") if args.open_vocab else ()
  c.steps = 8 if args.runlocal else 1000
  c.eval_every = 4 if args.runlocal else 250
  # The release's rates are for batches of 16 and 20,000 steps; this run is a fraction of that.
  c.optimizer.base_lr = 2e-4
  c.optimizer.warmup_steps = 50
  c.data.train_images = 64 if args.runlocal else 1600  # scenes drawn for training
  c.data.eval_images = 24 if args.runlocal else 120  # scenes drawn for evaluation
  c.data.batch_size = 8
  c.data.scale = (4 * SIDE, SIDE)
  c.data.ratio = (0.75, 1.5)
  # The released distortion turns hues by up to 36 degrees, which makes orange red: here colours
  # are half of every class name.
  c.data.photometric = False
  c.data.short_side = SIDE
  c.data.threads = 2
  c.eval.stride = 48
  return c.lock()
