"""RPN on PASCAL Context, 60 classes with the background, 10 of them unseen.

    python main.py --config=configs/context.py:setting=zero_shot --workdir=runs/context

Hardware: one accelerator with 80 GB, or several that share the batch. Not run: neither the weights
nor the data could be downloaded.
Published (ViT-B/16; pAcc / mIoU seen / unseen / hIoU in %):
  zero_shot     76.4 / 47.7 / 58.7 / 52.6
  transductive  78.3 / 48.1 / 70.8 / 57.3
  supervised    78.7 / 48.5 / 80.1 / 60.4

Prepare the data first: python -m data_pipelines.prepare context --download --data_dir=data
(docs/data.md). CLIP's weights are fetched by their name (python -m rpn_jax weights).
Arguments: setting=zero_shot|transductive|supervised|annotation_free, preset=paper|released,
tuner=…, backbone=b16|l14, runlocal.
"""

from ml_collections import config_dict

from configs import common


def get_config(arg: str = "") -> config_dict.ConfigDict:
  c = common.benchmark(
    arg,
    "context60",
    steps=40_000,
    deep_tokens=10,  # the official code has no recipe for this set; this is its number for VOC
    templates="zegclip15",
    settings=common.SETTINGS,
  )
  return c.lock()
