"""Segmentation and classification with CLIP as it is: nothing is trained.

    python main.py --config=configs/training_free.py:method=naclip --workdir=runs/naclip --mode=eval
    ... --mode=predict --image=FILE_OR_FOLDER --classes="red circle, sand"
    ... --mode=classify --image=FILE_OR_FOLDER --classes="red circle, sand"

All eight usual data sets, each by the protocol of the method's own code, beside published scores:

    python main.py --config=configs/training_free.py:method=naclip,set=all --workdir=runs/all \\
      --mode=eval

Hardware: two CPU cores for shapes. Measured there (mIoU over all classes in %, docs/results.md):
  vanilla 6.2, maskclip 11.7, sclip 14.8, clearclip 8.3, naclip 9.5, res_clip 8.7, sc_clip 15.3,
  gem 8.6, pearl 9.2
Real data sets were not run: neither the weights nor the data could be downloaded.

Arguments behind the colon:

    method=METHOD              how the tower's last blocks are read (docs/method.md)
    protocol=PROTOCOL          whose sizes, thresholds and names: by default those of the method's
                               own code (rpn_jax/config/protocols.py)
    set=shapes|crowds|all|voc20|voc20b|voc21|context59|context60|context459|coco_stuff171|
        coco_object|cityscapes|ade150|ade847|folder|coco_json|labelme|yolo_seg|
        voc_folder             (the last five with --config.data.variant=NAME)
    backbone=b16|l14           for all sets but the synthetic ones, shapes and crowds
    denoise, smooth            MaskCLIP's prompt denoising at 0.5, and its key smoothing
    pamr                       refine the scores by the edges of the image
    runlocal                   a few images

Real data sets are prepared as docs/data.md says. Sets that a protocol says nothing about, such as
ade847, are evaluated as it evaluates context59.
"""

from ml_collections import config_dict

from configs import common, shapes
from rpn_jax import config
from rpn_jax.config import protocols

SYNTHETIC = ("shapes", "crowds")
DATA = (
  *SYNTHETIC, "all", *protocols.SETS, "voc20b", "context459", "ade847", *config.OWN_DATA,
)  # fmt: skip
# Method -> the protocol of its own code, or of the code that reran it.
METHODS = {
  "maskclip": "clearclip",
  "maskclip_released": "maskclip",
  "vanilla": "clearclip",
  "sclip": "sclip",
  "clearclip": "clearclip",
  "naclip": "naclip",
  "naclip_kk": "naclip",
  "naclip_nonly": "naclip",
  "sc_clip": "sc_clip",
  "res_clip": "res_clip",
  "gem": "clearclip",
  "pearl": "pearl",
}


def get_config(arg: str = "") -> config_dict.ConfigDict:
  args = common.parse_arg(
    arg,
    method=tuple(METHODS),
    protocol=("", *protocols.PROTOCOLS),
    denoise=False,
    smooth=False,
    pamr=False,
    set=DATA,
    backbone=tuple(config.BACKBONES),
    runlocal=False,
  )
  if args.set in SYNTHETIC:
    setting = "zero_shot" if args.set == "shapes" else "supervised"
    words = f"training_free,{setting}" + (",runlocal" if args.runlocal else "")
    c = shapes.get_config(words).unlock()
    c.data.name = args.set
  else:
    backbone = config.BACKBONES[args.backbone]
    patch = backbone.architecture["patch_size"]
    protocol = args.protocol or METHODS[args.method]
    rows = protocols.PROTOCOLS[protocol]
    sets = tuple(rows) if args.set == "all" else (args.set,)
    # Both towers were trained at 224 pixels, where no position embedding has to be resized.
    c = common.segmentation("paper", sets[0], crop=224, patch=patch, deep_tokens=0)
    c.clip, c.method = backbone.title, "training_free"
    c.templates, c.synonyms = "imagenet80", "max"
    c.data.setting = "supervised"  # every class is scored alike
    c.data.eval_images = 4 if args.runlocal else 0
    c.eval.sets = sets
    protocols.apply(c, protocol, sets[0] if sets[0] in rows else "context59")
    if sets[0] not in rows:
      c.eval.naming = "dataset"
    c.eval.protocol = protocol if args.set == "all" else ""
  c.dense.method = args.method
  c.dense.denoise = 0.5 if args.denoise else 0.0
  c.dense.key_smoothing = args.smooth
  if args.pamr:
    c.eval.refine = "pamr"
  return c.lock()
