"""Where the raw files of published data sets are: one table of addresses, sizes and checksums.

No row was ever fetched where this was written, which reached none of these hosts. The facts are
from pages of other projects, read in stored copies in November 2026:

- Addresses: docs/en/user_guides/2_dataset_prepare.md of open-mmlab/mmsegmentation (03df0bb),
  datasets/README.md of cvlab-kaist/CAT-Seg (3709783), README.md of nightrome/cocostuff (03a2b2b).
  SBD is at www2.eecs.berkeley.edu (torchvision's sbd.py; mmsegmentation, issue 3657: the address
  without the 2 answers "Permission denied"). The copy of trainval_merged.json at web.archive.org
  and of the labels of Context at cs.stanford.edu are second addresses: the first host of the one is
  said to be gone, the second of the other came and went (CAT-Seg, issue 9). pascalcontext_val.txt
  is on no page but in CAT-Seg, issue 47.
- Bytes and SHA-256 of VOC 2012 (url_checksums/voc.txt) and COCO (lvis/checksums.tsv):
  TensorFlow Datasets 4.9. Bytes of SBD: a log in pytorch/vision, issue 8471.
- MD5 of VOC 2010 and SBD: voc.py and sbd.py of pytorch/vision (00654a1, 0a82d54); of ADE20K: the
  loaders of six public repositories, which agree; of trainval_merged.json: those of three.
- Sizes that no page tells in bytes are those of the pages in MB, or guesses on the high side:
  trainval_merged.json, ADE20K_2021_17_01.zip, and all of what is unpacked.
"""

import dataclasses

from rpn_jax.base.transfer import MB


@dataclasses.dataclass(frozen=True)
class File:
  """A file that a publisher offers.

  Attributes:
    name: of the file.
    urls: where a program may fetch it, in the order of preference; () where people must log in.
    page: where people find it.
    holds: patterns of the files that are taken out of it, from the folder of the raw files; for a
      file that is no archive its place.
    bytes: its exact size, if published.
    about: its size as far as known; for plans only.
    checksum: SHA-256 or MD5, if published; else that of the first download is compared later.
    into: what comes before the names in the archive.
    unpacked: bytes that the files of `holds` take, an estimate.
  """

  name: str
  urls: tuple[str, ...]
  page: str
  holds: tuple[str, ...]
  bytes: int | None = None
  about: int = 0
  checksum: str = ""
  into: str = ""
  unpacked: int = 0

  @property
  def size(self) -> int:
    """Bytes, as far as known."""
    return self.about if self.bytes is None else self.bytes

  @property
  def is_archive(self) -> bool:
    """Whether files are taken out of it."""
    return self.name.endswith((".zip", ".tar", ".tgz", ".tar.gz"))


_OXFORD = "http://host.robots.ox.ac.uk/pascal/VOC/"
_VOC = "VOCdevkit/VOC2012/"
_CONTEXT = "VOCdevkit/VOC2010/"
_MERGED = "https://codalabuser.blob.core.windows.net/public/trainval_merged.json"
_SBD = (
  "https://www2.eecs.berkeley.edu/Research/Projects/CS/vision/grouping/semantic_contours/"
  "benchmark.tgz"
)
_COCO = "http://images.cocodataset.org/zips/"
_MAPS = "stuffthingmaps_trainval2017"

_VOC2010 = File(
  "VOCtrainval_03-May-2010.tar",
  (f"{_OXFORD}voc2010/VOCtrainval_03-May-2010.tar",),
  f"{_OXFORD}voc2010/",
  (f"{_CONTEXT}JPEGImages/*.jpg",),
  about=1_400 * MB, checksum="da459979d0c395079b5c75ee67908abb", unpacked=1_400 * MB,
)  # fmt: skip

# By the name that `prepare` has for the set.
TABLE: dict[str, tuple[File, ...]] = {
  "voc": (
    File(
      "VOCtrainval_11-May-2012.tar",
      (f"{_OXFORD}voc2012/VOCtrainval_11-May-2012.tar",),
      f"{_OXFORD}voc2012/",
      (
        f"{_VOC}JPEGImages/*.jpg",
        f"{_VOC}SegmentationClass/*.png",
        f"{_VOC}ImageSets/Segmentation/*.txt",
      ),
      bytes=1_999_639_040, unpacked=2_000 * MB,
      checksum="e14f763270cf193d0b5f74b169f44157a4b0c6efa708f4dd0ff78ee691763bcb",
    ),
    File(
      "benchmark.tgz",
      (_SBD,),
      _SBD,
      (
        "benchmark_RELEASE/dataset/cls/*.mat",
        "benchmark_RELEASE/dataset/train.txt",
        "benchmark_RELEASE/dataset/val.txt",
      ),
      bytes=1_419_539_633, checksum="82b4d87ceb2ed10f6038a1cba92111cb", unpacked=300 * MB,
    ),
  ),
  "context": (
    _VOC2010,
    File(
      "trainval_merged.json",
      (_MERGED, f"http://web.archive.org/web/20251122105902id_/{_MERGED}"),
      _MERGED,
      (f"{_CONTEXT}trainval_merged.json",),
      about=700 * MB, checksum="3c2d0c0656b7be9eb61928ffe885d8ce", unpacked=700 * MB,
    ),
  ),
  "context459": (
    _VOC2010,
    File(
      "trainval.tar.gz",
      (
        "https://roozbehm.info/pascal-context/trainval.tar.gz",
        "https://cs.stanford.edu/~roozbeh/pascal-context/trainval.tar.gz",
      ),
      "https://cs.stanford.edu/~roozbeh/pascal-context/",
      (f"{_CONTEXT}trainval/*.mat",),
      about=31 * MB, into=_CONTEXT, unpacked=60 * MB,
    ),
    File(
      "pascalcontext_val.txt",
      ("https://drive.google.com/uc?export=download&id=1BCbiOKtLvozjVnlTJX51koIveUZHCcUh",),
      "https://drive.google.com/file/d/1BCbiOKtLvozjVnlTJX51koIveUZHCcUh/view",
      (f"{_CONTEXT}pascalcontext_val.txt",),
      about=MB, unpacked=MB,
    ),
  ),
  "coco_stuff": (
    File(
      "train2017.zip", (f"{_COCO}train2017.zip",), "https://cocodataset.org/#download",
      ("images/train2017/*.jpg",),
      bytes=19_336_861_798, into="images/", unpacked=19_600 * MB,
      checksum="69a8bb58ea5f8f99d24875f21416de2e9ded3178e903f1f7603e283b9e06d929",
    ),
    File(
      "val2017.zip", (f"{_COCO}val2017.zip",), "https://cocodataset.org/#download",
      ("images/val2017/*.jpg",),
      bytes=815_585_330, into="images/", unpacked=830 * MB,
      checksum="4f7e2ccb2866ec5041993c9cf2a952bbed69647b115d0f74da7ce8f4bef82f05",
    ),
    File(
      f"{_MAPS}.zip",
      (f"http://calvin.inf.ed.ac.uk/wp-content/uploads/data/cocostuffdataset/{_MAPS}.zip",),
      "https://github.com/nightrome/cocostuff#downloads",
      (f"{_MAPS}/train2017/*.png", f"{_MAPS}/val2017/*.png"),
      about=692 * MB, into=f"{_MAPS}/", unpacked=1_000 * MB,
    ),
  ),
  "ade150": (
    File(
      "ADEChallengeData2016.zip",
      ("http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip",),
      "http://sceneparsing.csail.mit.edu/",
      tuple(
        f"ADEChallengeData2016/{kind}/{split}/*.{suffix}"
        for kind, suffix in (("images", "jpg"), ("annotations", "png"))
        for split in ("training", "validation")
      ),
      about=970 * MB, checksum="7328b3957e407ddae1d3cbf487f149ef", unpacked=1_000 * MB,
    ),
  ),
  "ade847": (
    File(
      "ADE20K_2021_17_01.zip", (), "https://groups.csail.mit.edu/vision/datasets/ADE20K/",
      tuple(
        f"ADE20K_2021_17_01/images/ADE/{split}/{files}"
        for split in ("training", "validation")
        for files in ("*.jpg", "*_seg.png")
      ),
      about=6_000 * MB, unpacked=6_000 * MB,
    ),
  ),
  "cityscapes": (
    File(
      "leftImg8bit_trainvaltest.zip", (), "https://www.cityscapes-dataset.com/downloads/",
      ("leftImg8bit/train/*.png", "leftImg8bit/val/*.png"),
      about=11_700 * MB, unpacked=8_500 * MB,
    ),
    File(
      "gtFine_trainvaltest.zip", (), "https://www.cityscapes-dataset.com/downloads/",
      ("gtFine/train/*_labelIds.png", "gtFine/val/*_labelIds.png"),
      about=260 * MB, unpacked=260 * MB,
    ),
  ),
}  # fmt: skip
