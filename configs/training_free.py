"""Segmentation and classification with CLIP as it is: nothing is trained.

    python main.py --config=configs/training_free.py:method=clearclip --workdir=runs/clearclip \\
      --mode=eval
    ... --mode=predict --image=FILE_OR_FOLDER --classes="red circle, sand"
    ... --mode=classify --image=FILE_OR_FOLDER --classes="red circle, sand"

Hardware: two CPU cores for shapes. Measured there (mIoU over all classes in %, docs/results.md):
  vanilla 6.2, maskclip 11.7, sclip 14.8, clearclip 8.3
Real data sets were not run: neither the weights nor the data could be downloaded.

Arguments behind the colon:

    method=maskclip|maskclip_released|vanilla|sclip|clearclip|naclip|naclip_kk|naclip_nonly|
           res_clip|sc_clip|gem|pearl   how the tower is read (docs/method.md)
    denoise, smooth            MaskCLIP's prompt denoising at 0.5, and its key smoothing
    data=shapes|crowds|voc20|voc20b|voc21|context59|context60|context459|coco_stuff171|
         ade150|ade847|folder  (folder: with --config.data.variant=NAME)
    backbone=b16|l14           for all data but the synthetic sets, shapes and crowds
    runlocal                   a few images

Real data sets are prepared as docs/data.md says and evaluated by SCLIP's protocol: short side 336,
windows of 224 pixels every 112, 80 sentences per class. `--config.eval.crop`,
`--config.eval.stride`, `--config.data.short_side` and `--config.templates` select others.
"""

from ml_collections import config_dict

from configs import common, shapes
from rpn_jax import config

DATA = (
  "shapes", "crowds", "voc20", "voc20b", "voc21", "context59", "context60", "context459",
  "coco_stuff171", "ade150", "ade847", "folder",
)  # fmt: skip
METHODS = (
  "maskclip", "maskclip_released", "vanilla", "sclip", "clearclip", "naclip", "naclip_kk",
  "naclip_nonly", "res_clip", "sc_clip", "gem", "pearl",
)  # fmt: skip


def get_config(arg: str = "") -> config_dict.ConfigDict:
  args = common.parse_arg(
    arg,
    method=METHODS,
    denoise=False,
    smooth=False,
    data=DATA,
    backbone=tuple(config.BACKBONES),
    runlocal=False,
  )
  if args.data in ("shapes", "crowds"):
    setting = "zero_shot" if args.data == "shapes" else "supervised"
    words = f"training_free,{setting}" + (",runlocal" if args.runlocal else "")
    c = shapes.get_config(words).unlock()
    c.data.name = args.data
  else:
    backbone = config.BACKBONES[args.backbone]
    patch = backbone.architecture["patch_size"]
    # Both towers were trained at 224 pixels, where no position embedding has to be resized.
    c = common.segmentation("paper", args.data, crop=224, patch=patch, deep_tokens=0)
    c.clip, c.method = backbone.title, "training_free"
    c.templates = "imagenet80"
    c.data.setting = "supervised"  # every class is scored alike
    c.data.short_side, c.eval.stride = 336, 112
    c.data.eval_images = 4 if args.runlocal else 0
  c.dense.method = args.method
  c.dense.denoise = 0.5 if args.denoise else 0.0
  c.dense.key_smoothing = args.smooth
  return c.lock()
