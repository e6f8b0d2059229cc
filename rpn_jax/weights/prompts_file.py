"""Trained prompts as one file: safetensors that need nothing but CLIP beside them.

Keys are '/'-joined paths of the `prompts` collection. The header tells what they were trained as:
the config, the class names, and the fingerprint of the CLIP weights around them.
"""

import json
import pathlib
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import safetensors.numpy
from flax import traverse_util

from rpn_jax.base.errors import InputError
from rpn_jax.base.words import differences
from rpn_jax.weights import arrays
from rpn_jax.weights.arrays import written

FORMAT, VERSION = "rpn_jax.prompts", "1"
NAME = "prompts.safetensors"
# Config fields that prompts depend on when they predict. `data` has the normalisation.
FIELDS = ("model", "templates", "synonyms", "data.mean", "data.std")


class Prompts(NamedTuple):
  """What a file holds.

  Attributes:
    prompts: the collection, float32.
    clip: fingerprint of the CLIP weights, "" if the file does not know it.
    config: the fields of the run's config; of the authors' checkpoints only those of FIELDS.
    names: class names, empty if the file does not know them.
    step: steps trained, 0 if the file does not know them.
  """

  prompts: dict
  clip: str
  config: dict
  names: tuple[str, ...]
  step: int


def save(path, content: Prompts) -> None:
  """Writes a file of prompts, whole or not at all.

  Raises:
    InputError: numbers that are not finite, or a place that cannot be written to.
  """
  path = pathlib.Path(path)
  flat = traverse_util.flatten_dict(content.prompts, sep="/")
  arrays = {name: np.ascontiguousarray(value, np.float32) for name, value in flat.items()}
  for name, value in arrays.items():
    if not np.isfinite(value).all():
      raise InputError(f"expected finite prompts for {path}, {name} has infinity or NaN: refused")
  header = {
    "format": FORMAT,
    "version": VERSION,
    "clip": content.clip,
    "config": json.dumps(content.config),
    "names": json.dumps(list(content.names), ensure_ascii=False),
    "step": str(content.step),
  }
  with written(path) as temporary:
    safetensors.numpy.save_file(arrays, temporary, header)


def load(path) -> Prompts:
  """Reads what `save` wrote.

  Raises:
    InputError: another or a damaged file.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise InputError(f"expected a file of prompts, {path} is no file: check the path")
  state, header = arrays.read_safetensors(path)
  if header.get("format") != FORMAT:
    raise InputError(
      f"expected a file of prompts, {path} is of another kind: make one with --mode=export or "
      "python -m rpn_jax convert"
    )
  if header.get("version") != VERSION:
    raise InputError(
      f"expected version {VERSION} of prompts, got {header.get('version')!r} in {path}: update "
      "rpn_jax"
    )
  try:
    config, names = json.loads(header["config"]), json.loads(header["names"])
    step, clip = int(header["step"]), header["clip"]
    if not isinstance(config, dict) or not all(isinstance(name, str) for name in names):
      raise ValueError
  except (KeyError, TypeError, ValueError, RecursionError):
    raise InputError(f"expected config and names in the header of {path}: get it again") from None
  flat = {name: arrays.float32(value, name, str(path)) for name, value in state.items()}
  for name, value in flat.items():
    if not np.isfinite(value).all():
      raise InputError(f"expected finite prompts, {name} has infinity or NaN in {path}: refused")
  try:
    tree = traverse_util.unflatten_dict(flat, sep="/")
  except (TypeError, AttributeError, ValueError):  # a name that is also the start of another
    raise InputError(
      f"expected a tree of prompts in {path}, its names clash: get it again"
    ) from None
  return Prompts(tree, clip, config, tuple(names), step)


def check(content: Prompts, path, config: Mapping, fingerprint: str, like: Mapping) -> None:
  """Compares a file with the network that shall use it.

  Args:
    content: of the file.
    path: of the file, for messages.
    config: of the command, as nested dictionaries.
    fingerprint: of its CLIP weights.
    like: the collection of its network, arrays or shapes.

  Raises:
    InputError: with both values of what differs.
  """
  if content.clip and content.clip != fingerprint:
    raise InputError(
      f"{path} was trained around the CLIP weights {content.clip}, config.clip has {fingerprint}: "
      "use the same weights"
    )
  there, here = (
    json.loads(json.dumps({field: _at(tree, field) for field in FIELDS}))
    for tree in (content.config, config)
  )
  if changed := differences(there, _told_in(there, here)):
    raise InputError(
      f"{path} was trained with other settings (there -> asked for: {'; '.join(changed[:3])}): "
      "use the config it was trained with"
    )
  shapes = lambda tree: {
    name: tuple(np.shape(leaf)) for name, leaf in traverse_util.flatten_dict(tree, sep="/").items()
  }
  if changed := differences(shapes(content.prompts), shapes(like)):
    raise InputError(
      f"{path} has other arrays than this network (there -> here: {'; '.join(changed[:3])}): use "
      "the config it was trained with"
    )


def _told_in(there, here):
  """What `there` says something about; a file of another origin or version may not know a field."""
  if isinstance(there, dict) and isinstance(here, dict):
    return {key: _told_in(value, here.get(key)) for key, value in there.items()}
  return None if there is None else here


def _at(tree: Mapping, field: str):
  for key in field.split("."):
    tree = tree.get(key) if isinstance(tree, Mapping) else None
  return tree
