"""Annotations of many images in one folder."""

import json
import os
import pathlib
import threading
from collections.abc import Sequence
from typing import Any

from rpn_jax.annotations import coco, labelme, voc, yolo
from rpn_jax.annotations.images import Labeled
from rpn_jax.annotations.options import ANNOTATIONS, Options
from rpn_jax.annotations.regions import Instance, find_instances
from rpn_jax.annotations.sources import Sources
from rpn_jax.base import buckets
from rpn_jax.base.errors import InputError
from rpn_jax.base.origins import Origin, check_same, exists
from rpn_jax.base.paths import check_utf8, expand, relative_path, write_text
from rpn_jax.drawing.images import save_png


class Collection:
  """Writes the annotations of images as they come, and at the end what is about all of them.

  In the folder: `coco/annotations.json`; `labelme/<stem>.json`; `yolo/data.yaml`,
  `yolo/labels/<stem>.txt` and the images in `yolo/images`; `voc/class_names.txt`,
  `voc/SegmentationClass/<stem>.png` and the images in `voc/JPEGImages`; of both, `sources`. Every
  file is written atomically, COCO's by `finish` alone.

  Args:
    directory: created if missing.
    names: C class names.
    forms: of ANNOTATIONS; others are ignored.
    only: stem of the one image that it is for, after which COCO's file is called; None: many.
    **options: of `Options`.

  Raises:
    InputError: an option of another form or with a wrong value; more classes than VOC's files hold,
      or a name of several lines; annotations with other classes are in the folder.
  """

  def __init__(
    self,
    directory: str | os.PathLike,
    names: Sequence[str],
    forms: Sequence[str] = ANNOTATIONS,
    *,
    only: str | None = None,
    **options: Any,
  ):
    self._directory, self._names = expand(directory), tuple(names)
    self._forms = tuple(form for form in ANNOTATIONS if form in forms)
    self._options = Options(**options)
    self._options.check_used(forms)
    self._only, self._coco_path = only, self._directory / "coco" / f"{only or 'annotations'}.json"
    # Stem -> origin, size, annotations; not the pixels, which would fill the memory.
    self._coco: dict[str, tuple[Origin, tuple[int, int], list[dict]]] = {}
    self._lock = threading.Lock()
    # File -> its content, which says what the class ids of the files around it mean.
    self._class_files: dict[pathlib.Path, str] = {}
    self._sources: dict[str, Sources] = {}
    if "yolo" in self._forms:
      self._sources["yolo"] = Sources(self._directory / "yolo", "images", "labels/{}.txt")
      self._class_files[self._directory / "yolo" / "data.yaml"] = yolo.data_yaml(names)
    if "voc" in self._forms:
      folder = self._directory / "voc"
      self._sources["voc"] = Sources(folder, "JPEGImages", "SegmentationClass/{}.png")
      self._voc_table = voc.indices(names)
      listed = voc.class_names(names, self._voc_table)
      self._class_files[folder / "class_names.txt"] = listed
    for path, text in self._class_files.items():
      if path.exists() and path.read_text(encoding="utf-8") != text:
        raise InputError(
          f"{path}: expected the classes of this call, since other label files are there, got "
          f"others; remove {path.parent} or name another folder"
        )
    path = self._coco_path
    if "coco" in self._forms and exists(path) and coco.source_of(path) is None:
      raise InputError(
        f"{path}: expected no file but that of an earlier call, which would be replaced, got "
        "another; rename it, or name another folder"
      )

  def check(self, origin: Origin, stem: str) -> None:
    """Checks that `add` would replace no file of another image, or one that somebody has edited.

    Raises:
      Occupied: it would.
      InputError: the name of the image's file is no UTF-8.
    """
    if self._forms:
      check_utf8(origin.file)
    for sources in self._sources.values():
      sources.check(origin, stem)
    if "labelme" in self._forms and exists(path := self._labelme_path(stem)):
      check_same(path, labelme.source_of(path), origin, path.parent)
    if self._only and "coco" in self._forms and exists(path := self._coco_path):
      check_same(path, coco.source_of(path), origin, path.parent)

  def add(self, labeled: Labeled, stem: str) -> list[pathlib.Path]:
    """Writes what is about one image; several threads may do so at once.

    Args:
      labeled: the image.
      stem: of the names of its files.

    Returns:
      The paths written.

    Raises:
      InputError: see `check` and `Sources.add`; nothing was written of this image to that data set.
    """
    self.check(labeled.origin, stem)
    with self._lock:  # before the first label file, so that the class ids of none are unknown
      written = [_write(path, text) for path, text in self._class_files.items()]
      self._class_files = {}
    if "voc" in self._forms:
      folder, image = self._directory / "voc", voc.label_image(labeled.labels, self._voc_table)
      written += self._sources["voc"].add(labeled, stem)
      written.append(save_png(folder / "SegmentationClass" / f"{stem}.png", image))
    if self._forms == ("voc",):
      return written
    instances, options = find_instances(labeled.labels, self._options), self._options
    if "yolo" in self._forms:
      folder, text = self._directory / "yolo", yolo.rows(instances, labeled.size, options)
      written += self._sources["yolo"].add(labeled, stem)
      written.append(_write(folder / "labels" / f"{stem}.txt", text))
    if "labelme" in self._forms:
      written.append(self._add_labelme(labeled, stem, instances))
    if "coco" in self._forms:
      found = [coco.annotation(instance, labeled.size, options) for instance in instances]
      with self._lock:
        self._coco[stem] = (labeled.origin, labeled.size, found)
    return written

  def _labelme_path(self, stem: str) -> pathlib.Path:
    return self._directory / "labelme" / f"{stem}.json"

  def _add_labelme(
    self, labeled: Labeled, stem: str, instances: Sequence[Instance]
  ) -> pathlib.Path:
    path = self._labelme_path(stem)
    source = None if buckets.is_bucket(path) else labeled.plain_file()
    embedded = source is None
    image_path = relative_path(source, path.parent) if source else f"{stem}.png"
    content = labelme.document(
      instances, self._names, labeled.size, self._options, image_path,
      labeled.image if embedded else None, labeled.origin.name(path.parent),
    )  # fmt: skip
    return _write(path, json.dumps(content, ensure_ascii=False) + "\n")

  def finish(self) -> list[pathlib.Path]:
    """Writes what is about all images that were added; returns the paths."""
    if not self._coco:
      return []
    with self._lock:
      stems = sorted(self._coco)
      origins, sizes, annotations = zip(*(self._coco[stem] for stem in stems))
    images = [
      {"file_name": name, "width": width, "height": height}
      for name, (height, width) in zip(_file_names([o.file for o in origins], stems), sizes)
    ]
    source = origins[0].name(self._coco_path.parent) if self._only else ""
    content = coco.document(images, annotations, self._names, source)
    return [_write(self._coco_path, json.dumps(content, ensure_ascii=False) + "\n")]


def _file_names(files: Sequence[str | os.PathLike], stems: Sequence[str]) -> list[str]:
  """Paths of images from the folder that they have in common; of images without a file, a name."""
  paths = [expand(file).absolute() if str(file) else None for file in files]
  local = {path for path in paths if path and not buckets.is_bucket(path) and path.is_file()}
  common = os.path.commonpath([path.parent for path in local]) if local else ""
  return [
    path.relative_to(common).as_posix() if path in local else path.name if path else f"{stem}.png"
    for path, stem in zip(paths, stems)
  ]


def _write(path: pathlib.Path, text: str) -> pathlib.Path:
  path.parent.mkdir(parents=True, exist_ok=True)
  write_text(path, text)
  return path
