"""Cityscapes: street scenes from a car, finely labeled (Cordts et al., 2016)."""

import functools
import pathlib

import numpy as np

from data_pipelines import vocabularies
from data_pipelines.sources.builder import RawExample, SegmentationBuilder
from data_pipelines.sources.files import read_index_image
from rpn_jax.base.errors import InputError
from rpn_jax.base.picture_files import list_images

_SPLITS = ("train", "val")
_IDS, _TRAIN_IDS = 34, 19  # of the files' two numberings
_IMAGE = "_leftImg8bit.png"


class Cityscapes(SegmentationBuilder):
  """Cityscapes, fine labels: label k is id k of 34, of which 19 are classes; 255 is no class.

  Labels that are there as train ids only, which the official tools make and mmsegmentation reads,
  are turned back into ids. The test images are left out: their published labels are placeholders.
  """

  name = "cityscapes"
  title = "Cityscapes"
  raw_ids = range(_IDS)
  counts = {"train": 2975, "val": 500}  # noqa: RUF012
  obtain = (
    "leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip are, after registering, on the page "
    "'Download – Cityscapes Dataset'"
  )
  license = "non-commercial research and teaching, no redistribution (the page has the terms)"
  raw_size = "12 GB"
  layout = """leftImg8bit/{train,val}/CITY/*_leftImg8bit.png
gtFine/{train,val}/CITY/*_gtFine_labelIds.png (or *_gtFine_labelTrainIds.png)"""

  def examples(self, manual_dir):
    images = self._folder(manual_dir, "leftImg8bit", "the images")
    labels = self._folder(manual_dir, "gtFine", "the fine labels")
    folders = {f.name for f in images.iterdir() if f.is_dir() and not f.name.startswith(".")}
    if others := sorted(folders - {*_SPLITS}):
      print(
        f"left out of {self.title}: {', '.join(others)} in {images}; only train and val have "
        "public labels of every pixel"
      )
    return {
      split: self._split(images / split, labels / split) for split in _SPLITS if split in folders
    }

  def _folder(self, manual_dir: pathlib.Path, name: str, what: str) -> pathlib.Path:
    """The folder of one of the archives; where it lies elsewhere, the error says where."""

    def fits(folder: pathlib.Path) -> bool:
      return any((folder / split).is_dir() for split in _SPLITS)

    folder = manual_dir / name
    if fits(folder):
      return folder
    places = [*sorted(manual_dir.glob(f"*/{name}")), manual_dir.parent / name]
    elsewhere = next(filter(fits, places), None)
    if manual_dir.name == name and fits(manual_dir):
      remedy = f"give the folder above, --manual_dir={manual_dir.parent}"
    else:
      remedy = f"there is {elsewhere}: move it here" if elsewhere else self.obtain
    raise InputError(f"{folder}: expected {what} in train and val, got no such folders; {remedy}")

  def _split(self, images: pathlib.Path, labels: pathlib.Path) -> list[RawExample]:
    files = list_images(images, suffixes=(".png",), recursive=True)
    files = [path for path in files if path.name.endswith(_IMAGE)]
    if not files:
      raise InputError(
        f"{images}: expected *{_IMAGE} files in folders of cities, got none; {self.obtain}"
      )
    return [self._example(path, labels / path.parent.relative_to(images)) for path in files]

  def _example(self, image: pathlib.Path, labels: pathlib.Path) -> RawExample:
    name = image.name.removesuffix(_IMAGE)
    ids, train_ids = (
      labels / f"{name}_gtFine_{kind}.png" for kind in ("labelIds", "labelTrainIds")
    )
    if ids.exists():
      return RawExample(name, image, ids, functools.partial(self._read_ids, ids))
    if train_ids.exists():
      return RawExample(name, image, train_ids, functools.partial(self._read_train_ids, train_ids))
    others = sorted(path.name for path in labels.glob(f"{name}_gtFine_*"))
    got = f"only {', '.join(others)}" if others else "no such file"
    raise InputError(f"{ids}: expected the label of {image}, got {got}; {self.obtain}")

  def _read_file(self, path: pathlib.Path) -> np.ndarray:
    try:
      return read_index_image(path, self._colors)
    except InputError as error:  # of *_color.png, for example
      raise InputError(f"{error}; gtFine_trainvaltest.zip has the ids in *_labelIds.png") from error

  def _read_ids(self, path: pathlib.Path) -> np.ndarray:
    label_HxW = self._read_file(path)
    values = np.flatnonzero(np.bincount(label_HxW.ravel()))
    # The official tools draw no polygon of id -1; who stored it as a byte has 255. Train ids have
    # many such pixels, and no value of 19 to 33.
    if values[-1] == vocabularies.IGNORE and (values[:-1] < _TRAIN_IDS).all():
      raise InputError(
        f"{path}: expected ids 0…{_IDS - 1}, got only 0…{_TRAIN_IDS - 1} and 255, which are train "
        "ids; call the file *_labelTrainIds.png, or fetch the one with ids again"
      )
    return label_HxW

  def _read_train_ids(self, path: pathlib.Path) -> np.ndarray:
    label_HxW = self._read_file(path)
    wrong = (label_HxW >= _TRAIN_IDS) & (label_HxW != vocabularies.IGNORE)
    if wrong.any():
      raise InputError(
        f"{path}: expected train ids 0…{_TRAIN_IDS - 1}, 255, got "
        f"{', '.join(map(str, np.unique(label_HxW[wrong])[:5]))} on {int(wrong.sum())} pixels; "
        f"{self.wrong_values_remedy(label_HxW)}"
      )
    id_of = np.full(256, vocabularies.IGNORE, np.uint8)
    for raw, train_id in self.classes.ids.items():
      id_of[train_id] = raw if train_id < _TRAIN_IDS else vocabularies.IGNORE
    return id_of[label_HxW]

  def wrong_values_remedy(self, values):
    if values.max() > vocabularies.IGNORE:
      return "these are instance ids; gtFine_trainvaltest.zip has the class ids in *_labelIds.png"
    return "fetch gtFine_trainvaltest.zip again"
