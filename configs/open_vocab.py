"""RPN for the open vocabulary: trained on all of COCO-Stuff, evaluated on other sets.

    python main.py --config=configs/open_vocab.py --workdir=runs/open_vocab

Hardware: one accelerator with 80 GB, or several that share the batch. Not run: neither the weights
nor the data could be downloaded.
Published mIoU in % on A-847 / PC-459 / A-150 / PC-59 / PAS-20 (the paper does not say over which
classes; both averages are reported here):
  ViT-B/16      11.4 / 17.3 / 31.5 / 57.1 / 95.2
  ViT-L/14      14.9 / 22.1 / 36.4 / 61.9 / 96.6

Prepare the data first: python -m data_pipelines.prepare coco_stuff --download --data_dir=data
(docs/data.md). CLIP's weights are fetched by their name (python -m rpn_jax weights).
Arguments: preset=paper|released, tuner=…, backbone=b16|l14, runlocal.
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
    settings=("supervised",),
  )
  # With --mode=eval all of these are evaluated; every one has to be prepared.
  c.eval.sets = ("ade847", "context459", "ade150", "context59", "voc20", "voc20b", "voc21")
  return c.lock()
