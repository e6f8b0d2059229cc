"""PASCAL VOC 2012 with the training labels of SBD (Everingham et al.; Hariharan et al., 2011)."""

import functools
import pathlib

from data_pipelines.sources.builder import RawExample, SegmentationBuilder
from data_pipelines.sources.files import list_files, require
from data_pipelines.sources.pascal import read_matrix, read_names
from rpn_jax.base.errors import InputError

# Where people unpack SBD: a folder with cls/*.mat, train.txt and val.txt.
_SBD = ("VOCdevkit/VOCaug/dataset", "VOCaug/dataset", "benchmark_RELEASE/dataset", "sbd")


class Voc(SegmentationBuilder):
  """VOC 2012 + SBD: label 0 is the background, k is class k − 1, 255 is no class.

  The 10,582 training images are the 1,464 of VOC and those 9,118 of SBD's 11,355 (8,498 + 2,857)
  that VOC uses neither for training nor for validation. VOC's own label wins over SBD's.
  """

  name = "voc"
  title = "PASCAL VOC 2012 + SBD"
  vocabulary = "voc20"
  counts = {"train": 10582, "val": 1449}  # noqa: RUF012
  obtain = (
    "VOCtrainval_11-May-2012.tar is on the page 'Visual Object Classes Challenge 2012 (VOC2012)', "
    "benchmark.tgz (SBD) on 'Semantic Boundaries Dataset and Benchmark'"
  )
  license = "images: Flickr terms of use; annotations: research use, no license stated"
  raw_size = "3.5 GB"
  layout = """VOCdevkit/VOC2012/JPEGImages/*.jpg
VOCdevkit/VOC2012/SegmentationClass/*.png
VOCdevkit/VOC2012/ImageSets/Segmentation/{train,val}.txt
benchmark_RELEASE/dataset/cls/*.mat (also below sbd, VOCaug/dataset or VOCdevkit/VOCaug/dataset)
benchmark_RELEASE/dataset/{train,val}.txt
or, in place of SBD's files, as converted by others:
VOCdevkit/VOC2012/SegmentationClassAug/*.png
VOCdevkit/VOC2012/ImageSets/Segmentation/trainaug.txt (may be missing)"""

  def examples(self, manual_dir):
    root = manual_dir / "VOCdevkit" / "VOC2012"
    images = require(root / "JPEGImages", "the images of VOC 2012", self.obtain)
    own, converted = root / "SegmentationClass", root / "SegmentationClassAug"
    sbd = next((manual_dir / f for f in _SBD if (manual_dir / f / "cls").is_dir()), None)
    if not converted.is_dir():
      require(own, "the labels of VOC 2012", self.obtain)
      if sbd is None:
        raise InputError(
          f"{converted}: expected SBD's labels here as .png files or as cls/*.mat in one of "
          f"{', '.join(_SBD)} below {manual_dir}, got neither; {self.obtain}"
        )
    train, val = self._names(root / "ImageSets" / "Segmentation", sbd, converted)

    def train_example(name: str) -> RawExample:
      label, read = own / f"{name}.png", None
      if not label.exists() and converted.is_dir():
        label = converted / f"{name}.png"
      elif not label.exists():
        label = sbd / "cls" / f"{name}.mat"
        read = functools.partial(read_matrix, label, "GTcls.Segmentation", self.obtain)
      return RawExample(name, images / f"{name}.jpg", label, read)

    # Never SBD's .mat files: scores would be against other labels than everyone's.
    val_labels = own if own.is_dir() else converted
    return {
      "train": [train_example(n) for n in train],
      "val": [RawExample(n, images / f"{n}.jpg", val_labels / f"{n}.png") for n in val],
    }

  def _names(
    self, lists: pathlib.Path, sbd: pathlib.Path | None, converted: pathlib.Path
  ) -> tuple[list[str], list[str]]:
    """The names of both splits."""
    val = read_names(lists / "val.txt", "VOC's validation list", self.obtain)
    ready = lists / "trainaug.txt"
    if ready.exists():
      train = read_names(ready, "the list of the training images of VOC and SBD", self.obtain)
      both = sorted(set(train) & set(val))
      if both:
        raise InputError(
          f"{ready}: expected no validation image, got {len(both)} of val.txt such as {both[0]}; "
          "use the list of 10,582 names"
        )
      return train, val
    names = set(read_names(lists / "train.txt", "VOC's training list", self.obtain))
    if sbd is None:  # the archive of these labels that most people have comes without a list
      files = list_files(converted, (".png",), "SBD's labels", self.obtain)
      names.update(path.stem for path in files)
      print(f"{ready}: not there, all images of {converted.name} but val.txt's are for training")
    for file in ("train.txt", "val.txt") if sbd else ():
      names.update(read_names(sbd / file, "a list of SBD", self.obtain))
    return sorted(names - set(val)), val
