"""RPN on COCO-Stuff 164k, 171 classes, 15 of them unseen.

    python main.py --config=configs/coco_stuff.py:setting=zero_shot --workdir=runs/coco_stuff

Hardware: one accelerator with 80 GB, or several that share the batch. Not run: neither the weights
nor the data could be downloaded.
Published (ViT-B/16; pAcc / mIoU seen / unseen / hIoU in %):
  zero_shot     64.4 / 40.8 / 42.8 / 41.8
  transductive  69.3 / 40.6 / 61.2 / 48.8
  supervised    70.8 / 41.1 / 64.1 / 50.5

Prepare the data first: python -m data_pipelines.prepare coco_stuff --download --data_dir=data
(docs/data.md). CLIP's weights are fetched by their name (python -m rpn_jax weights).
Arguments: setting=zero_shot|transductive|supervised|annotation_free, preset=paper|released,
tuner=…, backbone=b16|l14, runlocal.
"""

from ml_collections import config_dict

from configs import common


def get_config(arg: str = "") -> config_dict.ConfigDict:
  c = common.benchmark(
    arg,
    "coco_stuff171",
    steps=80_000,
    deep_tokens=100,
    templates="zegclip15",
    settings=common.SETTINGS,
  )
  return c.lock()
