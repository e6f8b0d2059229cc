"""Data sets, transforms and input pipelines: no JAX, and of `rpn_jax` only its room `base`.

Below is the table of the data sets that come with the project; `register` adds one of your own.
"""

from data_pipelines.registry import DATA_SETS, register
from data_pipelines.vocabularies import ClassFiles

__all__ = ["DATA_SETS", "register"]

register(
  "voc20",
  "data_pipelines.sources.voc:Voc",
  ClassFiles("voc20", 20, split="voc_split"),
  prepared="voc",
)
# PAS-20b: 20 classes and a background that is prompted with 39 names of PASCAL Context.
register(
  "voc20b",
  "data_pipelines.sources.voc:Voc",
  ClassFiles("voc20b_catseg", 59, zero=20, scored=20),
  prepared="voc",
)
# PAS-21: the background is a class like the others, prompted with that word.
register(
  "voc21",
  "data_pipelines.sources.voc:Voc",
  ClassFiles("voc20", 21, zero=0, background=True),
  prepared="voc",
)
register(
  "context59",
  "data_pipelines.sources.context:Context",
  ClassFiles("context59", 59, ids="context459id_to_59train"),
  prepared="context",
)
register(
  "context60",
  "data_pipelines.sources.context:Context",
  ClassFiles(
    "context60", 60, split="context_split", ids="context459id_to_59train", zero=0, shift=1
  ),
  prepared="context",
)
register(
  "context459",
  "data_pipelines.sources.context459:Context459",
  ClassFiles("context459", 459, spaced="context459_spaced"),
)
register(
  "coco_stuff171",
  "data_pipelines.sources.coco_stuff:CocoStuff",
  ClassFiles("coco_stuff171", 171, split="coco_split", ids="coco_stuff_raw_to_train"),
  prepared="coco_stuff",
)
# COCO-Object: the 80 things, and a background that all stuff belongs to.
register(
  "coco_object",
  "data_pipelines.sources.coco_stuff:CocoStuff",
  ClassFiles(
    "coco_stuff171", 81, ids="coco_stuff_raw_to_train", shift=1, first=80, background=True
  ),
  prepared="coco_stuff",
)
register("ade150", "data_pipelines.sources.ade150:Ade150", ClassFiles("ade150", 150))
register(
  "ade847",
  "data_pipelines.sources.ade847:Ade847",
  ClassFiles("ade847", 847, ids="ade847_objectid_to_train"),
)
register(
  "cityscapes",
  "data_pipelines.sources.cityscapes:Cityscapes",
  ClassFiles("cityscapes", 19, ids="cityscapes_id_to_train"),
)
# Your own data: each folder is prepared under a name, config.data.variant.
register("folder", "data_pipelines.sources.folder:Folder")
register("coco_json", "data_pipelines.sources.coco_json:CocoJson")
register("labelme", "data_pipelines.sources.labelme:Labelme")
register("yolo_seg", "data_pipelines.sources.yolo_seg:YoloSeg")
register("voc_folder", "data_pipelines.sources.voc_folder:VocFolder")
# Drawn when first used.
register(
  "shapes",
  classes="data_pipelines.shapes:VOCABULARY",
  source="data_pipelines.shapes:open_shapes",
)
register(
  "crowds",
  classes="data_pipelines.shapes:CROWDS_VOCABULARY",
  source="data_pipelines.shapes:open_crowds",
  prepared="shapes",
)
