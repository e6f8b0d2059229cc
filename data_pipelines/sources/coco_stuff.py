"""COCO-Stuff 164k: COCO 2017 with things and stuff labeled (Caesar et al., 2018)."""

from data_pipelines.sources.builder import RawExample, SegmentationBuilder
from data_pipelines.sources.files import list_files, require


class CocoStuff(SegmentationBuilder):
  """COCO-Stuff: label k is slot k of 182, of which 171 are classes; 255 is no class.

  A split whose images are not there is left out: the validation images alone are a small download.
  """

  name = "coco_stuff"
  title = "COCO-Stuff 164k"
  vocabulary = "coco_stuff171"
  raw_ids = range(182)  # slots of the files' numbering; 171 are in use
  counts = {"train": 118287, "val": 5000}  # noqa: RUF012
  obtain = (
    "train2017.zip and val2017.zip are on the page 'COCO - Common Objects in Context', "
    "stuffthingmaps_trainval2017.zip on 'COCO-Stuff dataset'"
  )
  license = "images: Flickr terms of use; annotations: CC BY 4.0"
  raw_size = "20 GB (val alone: 1.7 GB)"
  layout = """images/{train,val}2017/*.jpg
stuffthingmaps_trainval2017/{train,val}2017/*.png"""

  def examples(self, manual_dir):
    images = require(manual_dir / "images", "a folder with train2017 and val2017", self.obtain)
    labels = manual_dir / "stuffthingmaps_trainval2017"
    present = [s for s in ("train", "val") if (images / f"{s}2017").is_dir()]
    splits = {}
    for split in present or ["train"]:  # without any, the error is about the first
      files = list_files(images / f"{split}2017", (".jpg",), f"the {split} images", self.obtain)
      here = require(labels / f"{split}2017", f"the {split} labels", self.obtain)
      splits[split] = [RawExample(p.stem, p, here / f"{p.stem}.png") for p in files]
    return splits
