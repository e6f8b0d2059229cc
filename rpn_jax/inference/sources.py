"""The images that somebody gave a segmenter, read one after another."""

import os
import pathlib
from collections.abc import Iterable, Iterator, Sized
from typing import Any

from PIL import Image

from rpn_jax.base import pictures
from rpn_jax.base.colors import Color
from rpn_jax.base.errors import InputError
from rpn_jax.base.pictures import ImageSource, Picture, Told


def read_each(
  images: Iterable[ImageSource | Picture], page: int | None, matte: str | Color
) -> Iterator[tuple[Picture, str | pathlib.Path]]:
  """Each image, and the path of its file, "" without one; what was decided is told.

  Args:
    images: see `pictures.load`; those that were read before are handed on.
    page: see there.
    matte: see there.

  Raises:
    InputError: one image in place of several, or see `pictures.load`; an image without a name is
      told by its place, from 1.
  """
  _check_several(images)
  told = Told()
  count = len(images) if isinstance(images, Sized) else None
  alone, of = count == 1, "" if count is None else " of the list"
  for number, source in enumerate(images, 1):
    file = _file_of(source)
    if isinstance(source, Picture):
      yield source, file
      continue
    where = "the image" if alone else f"image {number}{of}"
    try:
      picture = pictures.load(source, page=page, matte=matte)
    except InputError as error:
      if file or alone:
        raise
      raise InputError(f"{where}: {str(error).removeprefix('the image: ')}") from error
    told(file or where, picture.notes)
    yield picture, file


def _check_several(images: Any) -> None:
  """Raises an InputError for one image, over whose rows, letters or bytes one would go."""
  shape = getattr(images, "shape", None)
  if (
    isinstance(images, str | os.PathLike | bytes | bytearray | memoryview | Image.Image | Picture)
    or hasattr(images, "read")
    or (shape is not None and (len(shape) < 3 or (len(shape) == 3 and shape[2] in (3, 4))))
  ):
    got = type(images).__name__ if shape is None else f"an array {tuple(shape)}"
    raise InputError(
      f"expected several images, got one image ({got}): call the segmenter with it, or give [image]"
    )


def _file_of(image: Any) -> str | pathlib.Path:
  """The path of an image of any kind, of an open file its name; "" if there is none."""
  if isinstance(image, (str, os.PathLike)):
    return image if isinstance(image, pathlib.Path) else os.fsdecode(image)
  name = getattr(image, "name", None)
  if not isinstance(name, str):  # such as a number
    return ""
  try:  # a stream in memory may be called like a file that is another image
    same = os.path.samestat(os.fstat(image.fileno()), os.stat(name))
  except FileNotFoundError:
    same = True
  except (OSError, AttributeError):
    same = not os.path.exists(name)
  return name if same else ""
