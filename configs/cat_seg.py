"""CAT-Seg, by the recipe of its official code: trained on COCO-Stuff, evaluated on six benchmarks.

    python main.py --config=configs/cat_seg.py --workdir=runs/cat_seg

Hardware: one accelerator with 80 GB, or several that share the batch of 4 (docs/method.md says what
fits where). Not run: neither the weights nor the data could be downloaded.
Published mIoU in % on A-847 / PC-459 / A-150 / PC-59 / PAS-20 / PAS-20b (over the classes that are
in the labels):
  ViT-B/16        12.0 / 19.0 / 31.8 / 57.5 / 94.6 / 77.3
  ViT-L/14@336px  16.0 / 23.8 / 37.9 / 63.3 / 97.0 / 82.5

Prepare the data first: python -m data_pipelines.prepare coco_stuff --download --data_dir=data
(docs/data.md). CLIP's weights are fetched by their name (python -m rpn_jax weights).
Arguments:

    backbone=b16|l14           ViT-B/16, or ViT-L/14 at 336 pixels
    data=coco_stuff171|voc20|context60|shapes    what it is trained on (shapes takes half an hour
                               on two CPU cores), or data of yours: folder, coco_json, labelme,
                               yolo_seg, voc_folder
    setting=supervised|zero_shot|transductive|annotation_free   which classes are labeled in
                               training; the paper has the first, and its scores need no penalty of
                               seen classes
    runlocal                   a few steps, to try things
"""

from ml_collections import config_dict

from configs import common, shapes
from rpn_jax import config

# Weights, side of what the tower sees, and the blocks whose output guides the decoder.
BACKBONES = {"b16": ("ViT-B/16", 384, (3, 7)), "l14": ("ViT-L/14@336px", 336, (7, 15))}
DATA = ("coco_stuff171", "voc20", "context60", *config.OWN_DATA, "shapes")
SETTINGS = ("supervised", "zero_shot", "transductive", "annotation_free")


def get_config(arg: str = "") -> config_dict.ConfigDict:
  args = common.parse_arg(
    arg, backbone=tuple(BACKBONES), data=DATA, setting=SETTINGS, runlocal=False
  )
  if args.data == "shapes":
    c = shapes.get_config(args.setting + (",runlocal" if args.runlocal else "")).unlock()
    recipe(c, window=64)
    c.cat_seg.update(
      resolution=64, width=64, window=4, appearance_width=64, text_width=64, pad_len=32,
      guidance_layers=(1, 3), guidance_widths=(64, 32), decoder_guidance_widths=(16, 8),
      decoder_widths=(32, 16),
    )  # fmt: skip
    # The tiny CLIP knows no other sentence; half of every name here is a color.
    c.templates, c.data.photometric = "single", False
    side = common.TINY_SHORT_SIDE
    c.data.scale = (4 * side, side)
    c.optimizer.base_lr = 1e-3  # for a run of a thousand steps
    return c.lock()
  c = config.defaults()
  c.data.name = args.data
  c.data.setting = args.setting
  c.data.batch_size = 4
  c.steps, c.eval_every = 80_000, 5_000
  recipe(c, window=384)
  c.clip, c.cat_seg.resolution, c.cat_seg.guidance_layers = BACKBONES[args.backbone]
  c.remat = "full"
  c.eval.sets = ("ade847", "context459", "ade150", "context59", "voc20", "voc20b")
  c.eval.naming = "catseg"
  if args.runlocal:
    c.steps, c.eval_every, c.log_every = 4, 4, 1
    c.data.batch_size, c.data.eval_images = 2, 4
  return c.lock()


def recipe(c: config_dict.ConfigDict, window: int) -> None:
  """Turns a segmentation run into one of CAT-Seg, in place.

  Args:
    c: unlocked.
    window: side of training crops and of the tiles of evaluation, pixels; 384 in the official code,
      to which all else is in proportion.
  """
  c.method = "cat_seg"
  c.templates, c.synonyms = "A photo of a {} in the scene", "first"
  c.loss.name = "bce"
  c.optimizer.update(
    schedule="cosine", base_lr=2e-4, min_lr=0.0, warmup_steps=0, weight_decay=1e-4, clip_norm=0.01,
    no_decay=r".*norm(_\d)?/(scale|bias)",
    groups=(("clip", r"(visual|text)/.*", 0.01), ("rest", r"(?!(visual|text)/).*", 1.0)),
  )  # fmt: skip
  stride = int(window * (1 - 0.333))
  square = window + stride
  c.data.update(
    recipe="detectron2", crop=window, scale=(round(1333 / 384 * window), window), ratio=(1.0, 1.0),
    short_side=square, long_side=4 * square,
  )  # fmt: skip
  c.eval.update(
    layout="square", square=square, crop=window, stride=stride, window_batch=5,
    seen_penalty=0.0,
  )  # fmt: skip
