"""Miniature raw files of the published sets, packed as their publishers pack them.

contents, painted = make("voc", folder)
monkeypatch.setitem(addresses.TABLE, "voc", rows("voc", contents, server.url))
"""

import dataclasses
import hashlib
import io
import pathlib
import tarfile
import zipfile
from collections.abc import Callable

from data_pipelines import addresses
from tests.data_pipelines import raw_ade_coco, raw_pascal

_MAKERS = {
  "voc": raw_pascal.voc,
  "context": raw_pascal.context,
  "context459": raw_pascal.context459,
  "coco_stuff": raw_ade_coco.coco_stuff,
  "ade150": raw_ade_coco.ade150,
  "ade847": raw_ade_coco.ade847,
  "cityscapes": raw_ade_coco.cityscapes,
}
# Archive -> the folder that its names count from, and what of it is packed.
_LAYOUTS = {
  "VOCtrainval_11-May-2012.tar": (".", "VOCdevkit/VOC2012"),
  "benchmark.tgz": (".", "benchmark_RELEASE"),
  "VOCtrainval_03-May-2010.tar": (".", "VOCdevkit/VOC2010/JPEGImages"),
  "trainval_merged.json": ("VOCdevkit/VOC2010", "trainval_merged.json"),
  "trainval.tar.gz": ("VOCdevkit/VOC2010", "trainval"),
  "pascalcontext_val.txt": ("VOCdevkit/VOC2010", "pascalcontext_val.txt"),
  "train2017.zip": ("images", "train2017"),
  "val2017.zip": ("images", "val2017"),
  "stuffthingmaps_trainval2017.zip": ("stuffthingmaps_trainval2017", "."),
  "ADEChallengeData2016.zip": (".", "ADEChallengeData2016"),
  "ADE20K_2021_17_01.zip": (".", "ADE20K_2021_17_01"),
  "leftImg8bit_trainvaltest.zip": (".", "leftImg8bit"),
  "gtFine_trainvaltest.zip": (".", "gtFine"),
}
# What archives have beside the files that are read.
_BESIDE = {
  "VOCtrainval_11-May-2012.tar": ["VOCdevkit/VOC2012/Annotations/2007_000001.xml"],
  "benchmark.tgz": [
    "benchmark_RELEASE/dataset/img/2008_000010.jpg",
    "benchmark_RELEASE/dataset/inst/2008_000010.mat",
    "benchmark_RELEASE/dataset/cls/._2008_000010.mat",
  ],
  "ADEChallengeData2016.zip": ["ADEChallengeData2016/objectInfo150.txt"],
}


def make(name: str, folder: pathlib.Path) -> tuple[dict[str, bytes], dict]:
  """The archives of a set, and split -> name -> label."""
  painted = _MAKERS[name](folder)
  return {file.name: _pack(file.name, folder) for file in addresses.TABLE[name]}, painted


def rows(
  name: str, contents: dict[str, bytes], url: Callable[[str], str] | None = None
) -> tuple[addresses.File, ...]:
  """The table's rows with the sizes and checksums of these files where it has any, and `url`."""
  changed = []
  for file in addresses.TABLE[name]:
    content = contents[file.name]
    facts: dict = {"about": len(content), "unpacked": 2 * len(content)}
    if file.bytes is not None:
      facts["bytes"] = len(content)
    if file.checksum:
      kind = {32: "md5", 64: "sha256"}[len(file.checksum)]
      facts["checksum"] = hashlib.new(kind, content).hexdigest()
    if url and file.urls:
      facts["urls"] = (url(file.name),)
    changed.append(dataclasses.replace(file, **facts))
  return tuple(changed)


def tar(members: dict[str, bytes | tarfile.TarInfo], compressed: bool = False) -> bytes:
  """A tar archive of files, or of headers as they are."""
  out = io.BytesIO()
  with tarfile.open(fileobj=out, mode="w:gz" if compressed else "w") as archive:
    for name, content in members.items():
      info = content if isinstance(content, tarfile.TarInfo) else tarfile.TarInfo(name)
      if isinstance(content, bytes):
        info.size = len(content)
        archive.addfile(info, io.BytesIO(content))
      else:
        archive.addfile(info)
  return out.getvalue()


def zipped(members: dict[str, bytes]) -> bytes:
  """A zip archive of files; a name that ends in a slash is a folder."""
  out = io.BytesIO()
  with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
    for name, content in members.items():
      archive.writestr(name, content)
  return out.getvalue()


def _pack(name: str, folder: pathlib.Path) -> bytes:
  base, packed = _LAYOUTS[name]
  root = folder / base
  if (root / packed).is_file():
    return (root / packed).read_bytes()
  files = sorted(path for path in (root / packed).rglob("*") if path.is_file())
  members = {path.relative_to(root).as_posix(): path.read_bytes() for path in files}
  members |= dict.fromkeys(_BESIDE.get(name, []), b"beside")
  return zipped(members) if name.endswith(".zip") else tar(members, name.endswith("gz"))
