"""RPN on PASCAL VOC 2012 with SBD, 20 classes, 5 of them unseen.

    python main.py --config=configs/voc.py:setting=zero_shot --workdir=runs/voc

Hardware: one accelerator with 80 GB, or several that share the batch. Not run: neither the weights
nor the data could be downloaded.
Published (ViT-B/16; pAcc / mIoU seen / unseen / hIoU in %):
  zero_shot     95.8 / 93.1 / 84.6 / 88.6
  transductive  97.1 / 93.1 / 93.6 / 93.3
  supervised    97.2 / 94.0 / 94.6 / 94.3

Prepare the data first: python -m data_pipelines.prepare voc --download --data_dir=data
(docs/data.md). CLIP's weights are fetched by their name (python -m rpn_jax weights).
Arguments: setting=zero_shot|transductive|supervised|annotation_free, preset=paper|released,
tuner=…, backbone=b16|l14, runlocal.
"""

from ml_collections import config_dict

from configs import common


def get_config(arg: str = "") -> config_dict.ConfigDict:
  c = common.benchmark(
    arg,
    "voc20",
    steps=20_000,
    deep_tokens=10,
    templates="single",
    settings=common.SETTINGS,
  )
  return c.lock()
