"""RPN on the synthetic shapes data set: a few minutes on two CPU cores.

    python main.py --config=configs/shapes.py --workdir=runs/shapes

Hardware: two CPU cores. Measured on an AMD EPYC (mIoU seen / unseen / hIoU in %, three seeds, as in
docs/results.md):
  preset=paper      47.4 / 42.4 / 44.8
  preset=released   46.4 / 38.9 / 42.3

Arguments behind a colon pick a variant, e.g. `configs/shapes.py:preset=released`:

    preset=paper|released      which reading of RPN (docs/method.md)
    setting=zero_shot|transductive|supervised|annotation_free   which classes are labeled in
                               training: the last reads no labels but trains on what CLIP predicts
    tuner=…                    what adapts the tower: rpn, vpt, rpn+vpt, lpm (only the head),
                               bitfit, adapter, ssf, lora, lst, full; or training_free
    open_vocab                 all classes are labeled in training (none with annotation_free);
                               --mode=eval then evaluates on this data set and on a second one with
                               other scenes and names
    runlocal                   a run of a few steps, to try things
"""

from ml_collections import config_dict

from configs import common

SIDE = 96  # short side of the scenes, pixels
CROP = 64  # training crops and test windows, pixels: the size the tiny CLIP was trained at


def get_config(arg: str = "") -> config_dict.ConfigDict:
  args = common.parse_arg(
    arg,
    setting=common.SETTINGS,
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
  c.data.setting = args.setting
  if args.open_vocab and args.setting != "annotation_free":
    c.data.setting = "supervised"
  c.eval.sets = ("shapes", "crowds") if args.open_vocab else ()
  c.steps = 8 if args.runlocal else 1000
  c.eval_every = 4 if args.runlocal else 250
  # The default rates are for batches of 16 and 20,000 steps; this run is a fraction of that.
  c.optimizer.base_lr = 2e-4
  c.optimizer.warmup_steps = 50
  c.data.train_images = 64 if args.runlocal else 1600  # scenes drawn for training
  c.data.eval_images = 24 if args.runlocal else 120  # scenes drawn for evaluation
  c.data.batch_size = 8
  c.data.scale = (4 * SIDE, SIDE)
  c.data.ratio = (0.75, 1.5)
  # Photometric distortion turns hues by up to 36 degrees, which makes orange red: here colors are
  # half of every class name.
  c.data.photometric = False
  c.data.short_side = SIDE
  c.data.threads = 2
  c.eval.stride = 48
  return c.lock()
