"""ADE20K with 150 classes: the scene parsing benchmark (Zhou et al., 2017)."""

from data_pipelines.sources.builder import RawExample, SegmentationBuilder
from data_pipelines.sources.files import list_files

_SPLITS = {"train": "training", "val": "validation"}


class Ade150(SegmentationBuilder):
  """ADEChallengeData2016: label 0 is "other", k is class k − 1."""

  name = "ade150"
  title = "ADE20K-150"
  counts = {"train": 20210, "val": 2000}  # noqa: RUF012
  obtain = "ADEChallengeData2016.zip is on the page 'MIT Scene Parsing Benchmark'"
  license = "images: non-commercial research; annotations: BSD-3"
  raw_size = "1 GB"
  layout = """ADEChallengeData2016/images/{training,validation}/*.jpg
ADEChallengeData2016/annotations/{training,validation}/*.png"""

  def examples(self, manual_dir):
    root = manual_dir / "ADEChallengeData2016"
    splits = {}
    for split, folder in _SPLITS.items():
      images = list_files(root / "images" / folder, (".jpg",), f"the {folder} images", self.obtain)
      labels = root / "annotations" / folder
      splits[split] = [RawExample(p.stem, p, labels / f"{p.stem}.png") for p in images]
    return splits
