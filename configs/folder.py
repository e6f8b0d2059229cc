"""RPN on your own pictures and masks.

    python -m data_pipelines.prepare folder --manual_dir=PICTURES --data_dir=data
    python main.py --config=configs/folder.py --config.data.variant=PICTURES --workdir=runs/mine

docs/data.md says how the folder has to look. Arguments: setting=supervised|zero_shot|transductive
(the last two need an unseen.txt), preset=paper|released, backbone=b16|l14, runlocal.
"""

import ml_collections

from configs import common


def get_config(arg: str = "") -> ml_collections.ConfigDict:
  c = common.benchmark(
    arg,
    "folder",
    steps=5_000,  # a starting point; look at curves.png
    deep_tokens=10,
    templates="single",
    settings=("supervised", "zero_shot", "transductive"),
  )
  c.data.batch_size = 2 if "runlocal" in arg else 8
  return c.lock()
