"""PASCAL Context with all its 459 categories (Mottaghi et al., 2014)."""

import functools

from data_pipelines.sources.builder import RawExample, SegmentationBuilder
from data_pipelines.sources.files import require
from data_pipelines.sources.pascal import read_matrix, read_names


class Context459(SegmentationBuilder):
  """PASCAL Context: label k is category k of labels.txt; no pixel is without one.

  The open-vocabulary benchmark is the val split alone; a train split is made if its list is there.
  """

  name = "context459"
  title = "PASCAL Context 459"
  counts = {"val": 5104}  # noqa: RUF012
  obtain = (
    "VOCtrainval_03-May-2010.tar is on the page 'Visual Object Classes Challenge 2010 (VOC2010)', "
    "trainval.tar.gz on 'PASCAL-Context Dataset', pascalcontext_val.txt in the data instructions "
    "of OVSeg and CAT-Seg"
  )
  license = "images: Flickr terms of use; annotations: research use, no license stated"
  raw_size = "1.5 GB"
  layout = """VOCdevkit/VOC2010/JPEGImages/*.jpg
VOCdevkit/VOC2010/trainval/*.mat
VOCdevkit/VOC2010/pascalcontext_val.txt (or ImageSets/SegmentationContext/val.txt)
VOCdevkit/VOC2010/ImageSets/SegmentationContext/train.txt (for a train split; may be missing)"""
  wide = True

  def examples(self, manual_dir):
    root = manual_dir / "VOCdevkit" / "VOC2010"
    images = require(root / "JPEGImages", "the images of VOC 2010", self.obtain)
    labels = require(root / "trainval", "the labels of PASCAL Context", self.obtain)
    converted = root / "ImageSets" / "SegmentationContext"
    # The list that OVSeg, CAT-Seg and FC-CLIP test on, or that of mmsegmentation's converter.
    # VOC's own ImageSets/Segmentation/val.txt is a shorter one, of other images.
    val, other = root / "pascalcontext_val.txt", converted / "val.txt"
    lists = {"val": other if other.exists() and not val.exists() else val}
    if (converted / "train.txt").exists():
      lists["train"] = converted / "train.txt"
    return {
      split: [
        RawExample(
          name,
          images / f"{name}.jpg",
          labels / f"{name}.mat",
          functools.partial(read_matrix, labels / f"{name}.mat", "LabelMap", self.obtain),
        )
        for name in read_names(names, f"the {split} list of PASCAL Context", self.obtain)
      ]
      for split, names in lists.items()
    }
