"""RPN on your own images and masks.

    python -m data_pipelines.prepare folder --manual_dir=IMAGES --data_dir=data
    python main.py --config=configs/folder.py --config.data.variant=IMAGES --workdir=runs/mine

Hardware: one accelerator; two CPU cores with backbone=shapes. Not run with OpenAI's weights, which
could not be downloaded.

docs/data.md says what the folder has to look like. Annotations as COCO, labelme, YOLO or VOC have
them are prepared as coco_json, labelme, yolo_seg or voc_folder, and named to this config beside the
variant: --config.data.name=coco_json. Arguments behind the colon:

    backbone=b16|l14|shapes    OpenAI's ViT-B/16 or ViT-L/14, fetched by their names, or the tiny
                               CLIP that is shipped, which knows drawn shapes and no photographs;
                               each with sizes, length, rates and warm-up that fit it
    setting=supervised|zero_shot|transductive|annotation_free   which classes are labeled in
                               training; zero_shot and transductive need an unseen.txt
    preset=paper|released, tuner=…, runlocal
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
    backbones=("b16", "l14", "shapes"),
  )
  c.data.batch_size = 2 if "runlocal" in arg else 8
  return c.lock()
