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
                               bitfit, adapter, ssf, lora, dora, oft, lst, full; of the text
                               tower coop, maple, text_lora; or training_free
    open_vocab                 all classes are labeled in training (none with annotation_free);
                               --mode=eval then evaluates on this data set and on a second one with
                               other scenes and names
    runlocal                   a run of a few steps, to try things
"""

from ml_collections import config_dict

from configs import common


def get_config(arg: str = "") -> config_dict.ConfigDict:
  args = common.parse_arg(
    arg,
    setting=common.SETTINGS,
    preset=("paper", "released"),
    tuner=("", *common.TUNERS, "training_free"),
    open_vocab=False,
    runlocal=False,
  )
  c = common.segmentation(
    args.preset, "shapes", crop=common.TINY_CROP, patch=common.TINY_PATCH, deep_tokens=10
  )
  common.tiny_clip(c)
  if args.tuner == "training_free":
    c.method = "training_free"
  elif args.tuner:
    c.model.tuner = args.tuner
  c.data.setting = args.setting
  if args.open_vocab and args.setting != "annotation_free":
    c.data.setting = "supervised"
  c.eval.sets = ("shapes", "crowds") if args.open_vocab else ()
  if args.runlocal:
    c.steps, c.eval_every = 8, 4
  c.data.train_images = 64 if args.runlocal else 1600  # scenes drawn for training
  c.data.eval_images = 24 if args.runlocal else 120  # scenes drawn for evaluation
  return c.lock()
