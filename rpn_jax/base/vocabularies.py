"""The class names of published data sets, by name: for people, and for `data_pipelines`."""

import functools
import json
import pathlib
from typing import Any

from rpn_jax.base.errors import InputError

_FOLDER = pathlib.Path(__file__).parent.parent / "assets" / "vocabularies"
NAMES = (
  "voc20", "context59", "context60", "context459", "context459_spaced", "coco_stuff171",
  "cityscapes", "ade150", "ade847",
)  # fmt: skip


@functools.cache
def read(name: str) -> tuple[str, ...]:
  """The class names of one of NAMES in id order, as the data set writes them; see `load`."""
  return tuple(load(_FOLDER / f"{name}.json"))


def load(path: pathlib.Path) -> Any:
  """The content of a JSON file that comes with the code.

  Raises:
    InputError: a damaged file.
  """
  try:
    return json.loads(path.read_text(encoding="utf-8"))
  except (OSError, ValueError) as error:
    raise InputError(
      f"expected a JSON file of this package at {path}, got {type(error).__name__}; reinstall it"
    ) from error
