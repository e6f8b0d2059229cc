"""Trained prompts as one file: safetensors that need nothing but CLIP beside them.

Keys are '/'-joined paths of the `prompts` collection. The header tells how they were trained: the
config, the class names, and the fingerprint of the CLIP weights around them.
"""

import contextlib
import hashlib
import itertools
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import NamedTuple

import ml_collections
import numpy as np
from flax import traverse_util

from rpn_jax.base.errors import InputError
from rpn_jax.base.paths import cache_dir, on_disk
from rpn_jax.base.words import differences
from rpn_jax.config import EVALUATION
from rpn_jax.config.stored import completed
from rpn_jax.models import NETWORKS
from rpn_jax.weights.arrays import fingerprint, float32, read_safetensors, write_safetensors

FORMAT, VERSION = "rpn_jax.prompts", "1"
# Part of every note on disk: raise it when the arrays of a network change.
NOTE_VERSION = 1
# Config fields that prompts depend on when they predict, beside the section of their network; those
# of `data` are the normalization.
FIELDS = ("method", "templates", "synonyms", "loss.name", "data.mean", "data.std")

_MAX_DEPTH = 64


class Prompts(NamedTuple):
  """What a file of prompts holds.

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


def save(path, content: Prompts, metadata: Mapping[str, str] | None = None) -> None:
  """Writes a file of prompts; readers see the old file or the new one.

  Args:
    path: of the new file; an old one is replaced.
    content: of it.
    metadata: more header entries.

  Raises:
    InputError: numbers that are not finite, or a path that cannot be written.
  """
  flat = traverse_util.flatten_dict(content.prompts, sep="/")
  arrays = {name: np.asarray(value, np.float32, order="C") for name, value in flat.items()}
  header = {
    **(metadata or {}),
    "format": FORMAT,
    "version": VERSION,
    "checksum": fingerprint(arrays),
    "clip": content.clip,
    "config": json.dumps(content.config),
    "names": json.dumps(list(content.names), ensure_ascii=False),
    "step": str(content.step),
  }
  write_safetensors(path, arrays, header)


def holds_prompts(path: pathlib.Path) -> bool:
  """Whether a path is a file of prompts, by its header.

  Raises:
    InputError: a damaged safetensors file.
  """
  path = on_disk(path)
  if not path.is_file():
    return False
  with path.open("rb") as file:
    if file.read(9)[8:] != b"{":  # where the header of safetensors begins
      return False
  return read_safetensors(path)[1].get("format") == FORMAT


def config_of(path: pathlib.Path) -> ml_collections.ConfigDict:
  """The config that a file of prompts was trained with, unlocked, and set to read this file.

  Fields that the file does not know, as those of the authors' checkpoints, have their defaults.

  Raises:
    InputError: see `load`; or a config that is not one of a segmentation run.
  """
  stored = load(path).config
  try:
    config = completed(stored)
  except (KeyError, TypeError, ValueError, AttributeError):
    raise InputError(
      f"expected the config of a segmentation run in {path}: export it again"
    ) from None
  config.prompts = str(path)
  return config


def load(path) -> Prompts:
  """Reads what `save` wrote.

  Raises:
    InputError: no such file, another kind of file, or a damaged one.
  """
  path = on_disk(path)
  if not path.is_file():
    raise InputError(f"expected a file of prompts, {path} does not exist: check the path")
  state, header = read_safetensors(path)
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
  flat = {name: float32(value, name, str(path)) for name, value in state.items()}
  if header.get("checksum", "") not in ("", fingerprint(flat)):  # earlier versions wrote none
    raise InputError(f"{path} is damaged: its values differ from their checksum; get it again")
  # In this order a name that is also the start of others stands directly before one of them.
  keys = sorted(name.split("/") for name in flat)
  if any(b[: len(a)] == a for a, b in itertools.pairwise(keys)):
    raise InputError(f"expected a tree of prompts in {path}, its names clash: get it again")
  if max(map(len, keys), default=0) > _MAX_DEPTH:
    raise InputError(
      f"expected names of at most {_MAX_DEPTH} parts in {path}, one has more: get it again"
    )
  tree = traverse_util.unflatten_dict(flat, sep="/")
  return Prompts(tree, clip, config, tuple(names), step)


def check(content: Prompts, path, config: Mapping, clip: str, like: Callable[[], Mapping]) -> None:
  """Compares a file with the network that is to use it.

  That the arrays fit is noted on disk: the network has to be traced for its shapes, which takes as
  long as to segment an image with a small one.

  Args:
    content: of the file.
    path: of the file, for messages.
    config: of the command, as nested dictionaries.
    clip: fingerprint of its CLIP weights.
    like: gives the collection of its network, arrays or shapes.

  Raises:
    InputError: with both values of what differs.
  """
  if content.clip and content.clip != clip:
    raise InputError(
      f"{path} was trained around the CLIP weights {content.clip}, config.clip has {clip} "
      f"({config.get('clip')}): name the file of the same weights, by --clip= or --config.clip="
    )
  fields = (NETWORKS[config["method"]].section, *FIELDS)
  trained, requested = (
    # Through JSON, so that tuples and lists compare equal.
    json.loads(json.dumps({field: _lookup(tree, field) for field in fields}))
    for tree in (content.config, config)
  )
  if changed := differences(trained, _where_known(trained, requested)):
    raise InputError(
      f"{path} was trained with other settings (file -> requested: {'; '.join(changed[:3])}): "
      "use the config it was trained with"
    )
  note = _note(content, config, clip)
  if note and note.exists():
    return
  if changed := differences(_shapes(content.prompts), _shapes(like())):
    raise InputError(
      f"{path} has other arrays than this network (file -> network: {'; '.join(changed[:3])}): use "
      "the config it was trained with"
    )
  if note:
    with contextlib.suppress(OSError):
      note.parent.mkdir(exist_ok=True)
      note.touch()


def _note(content: Prompts, config: Mapping, clip: str) -> pathlib.Path | None:
  """Where is noted that these arrays fit the network of a config; None where nothing is kept."""
  if not (folder := cache_dir()):
    return None
  method = config["method"]
  settings = (method, config.get(NETWORKS[method].section), _lookup(config, "data.crop"))
  key = json.dumps([NOTE_VERSION, fingerprint(content.prompts), clip, settings], default=str)
  return folder / "prompts" / hashlib.sha256(key.encode()).hexdigest()[:32]


def _shapes(tree: Mapping) -> dict[str, tuple[int, ...]]:
  flat = traverse_util.flatten_dict(tree, sep="/")
  return {name: tuple(np.shape(leaf)) for name, leaf in flat.items()}


def _where_known(trained, requested):
  """What is requested of the fields that a file knows: one of another origin or version may not
  know all of them."""
  if isinstance(trained, dict) and isinstance(requested, dict):
    return {
      key: value if key in EVALUATION else _where_known(value, requested.get(key))
      for key, value in trained.items()
    }
  return None if trained is None else requested


def _lookup(tree: Mapping, field: str) -> object:
  value: object = tree
  for key in field.split("."):
    value = value.get(key) if isinstance(value, Mapping) else None
  return value
