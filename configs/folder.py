"""RPN on your own images and masks.

    python -m data_pipelines.prepare folder --manual_dir=IMAGES --data_dir=data
    python main.py --config=configs/folder.py --config.data.variant=IMAGES --workdir=runs/mine

Hardware: one accelerator. Not run with OpenAI's weights, which could not be downloaded.

docs/data.md says what the folder has to look like. Arguments: setting=supervised|zero_shot|
transductive|annotation_free (the middle two need an unseen.txt), preset=paper|released, tuner=…,
backbone=b16|l14, runlocal.
"""

from ml_collections import config_dict

from configs import common


def get_config(arg: str = "") -> config_dict.ConfigDict:
  c = common.benchmark(
    arg,
    "folder",
    steps=5_000,  # a starting point; look at curves.png
    deep_tokens=10,
    templates="single",
    settings=("supervised", "zero_shot", "transductive", "annotation_free"),
  )
  c.data.batch_size = 2 if "runlocal" in arg else 8
  return c.lock()
