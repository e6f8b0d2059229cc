"""Trained models to pass on: a folder of `--mode=export`, or hf://owner/name with its content."""

import contextlib
import os
import pathlib
from collections.abc import Mapping

from rpn_jax.base.errors import InputError
from rpn_jax.base.fields import declared, spec
from rpn_jax.base.paths import expand
from rpn_jax.config import Run
from rpn_jax.config.stored import CONFIG
from rpn_jax.models.clip import CLIPConfig
from rpn_jax.weights import checkpoints, clip_file, hub, prompts_file
from rpn_jax.weights.architecture import without_images
from rpn_jax.weights.arrays import read_arrays
from rpn_jax.weights.checkpoints import PROMPTS, Checkpoint

# What an exported folder holds, beside PROMPTS.
CARD, PICTURE = "README.md", "segmentation.png"
FILES = (PROMPTS, CARD, PICTURE)
# What the card calls its own address until it has one.
ADDRESS = "hf://OWNER/NAME"


def find_prompts(name: str | os.PathLike) -> pathlib.Path:
  """A path of trained prompts: a file, that of an exported folder, or that of hf://owner/name.

  An address is fetched if need be. There may be CLIP weights instead, and no file under another
  name: `prompts_file.holds_prompts` tells.

  Raises:
    InputError: an address that cannot be fetched.
  """
  path = expand(name)
  if path.is_dir() and not (path / CONFIG).exists():
    return path / PROMPTS
  if checkpoint := _address(name):
    return hub.get(checkpoint, clip_file.convert)
  return path


def here(name: str | os.PathLike) -> pathlib.Path:
  """The path that `find_prompts` gives, without fetching anything: it may not exist."""
  checkpoint = _address(name)
  return hub.cached(checkpoint) if checkpoint else find_prompts(name)


def load_prompts(name: str | os.PathLike) -> prompts_file.Prompts:
  """What `find_prompts` finds, read.

  Raises:
    InputError: see `find_prompts` and `prompts_file.load`.
  """
  path = find_prompts(name)
  if _address(name) and not prompts_file.holds_prompts(path):
    raise InputError(
      f"expected trained prompts, {name} holds CLIP weights: use it as --config.clip="
    )
  return prompts_file.load(path)


def check_clip_is_found(config: Mapping, fingerprint: str, name: str | os.PathLike) -> None:
  """Called before the CLIP of a file of prompts is loaded.

  Args:
    config: of the file.
    fingerprint: of its CLIP.
    name: of the file, for messages; where it came from an address, no path in it is followed.

  Raises:
    InputError: its CLIP is neither public nor here.
  """
  clip = config["clip"]
  if not clip:  # as of the authors' checkpoints
    raise InputError(
      f"{name} does not name the CLIP weights that it needs (fingerprint {fingerprint}): name "
      "their file, rpn segment --clip=FILE or Segmenter.load(…, clip=FILE)"
    )
  if (is_portable(clip) or not _address(name)) and (is_public(clip) or expand(clip).exists()):
    return
  raise InputError(
    f"{name} needs the CLIP weights {clip} (fingerprint {fingerprint}), which are not public and "
    "not here: name their file, rpn segment --clip=FILE or Segmenter.load(…, clip=FILE), or put "
    "it under that name into the folder where the command runs"
  )


def is_public(clip: str) -> bool:
  """Whether CLIP weights have a public name, or come with the package."""
  with contextlib.suppress(InputError):  # nearly a public name
    return bool(checkpoints.find(clip)) or (
      is_portable(clip) and (clip_file.ASSETS / clip).exists()
    )
  return False


def is_portable(clip: str) -> bool:
  """Whether `config.clip` means the same on every machine, or is at least no path of one."""
  with contextlib.suppress(InputError):
    return checkpoints.find(clip) is not None or os.path.basename(clip) == clip != ""
  return False


def portable_clip(clip: str, architecture: CLIPConfig) -> str:
  """What to call CLIP weights where they are passed on: their public name, or that of their file.

  A file has a public name if it was fetched by it. One that is called like published weights of its
  architecture is taken for these; whoever loads a model compares the fingerprint.

  Args:
    clip: `config.clip`.
    architecture: of the weights.
  """
  path = expand(clip)
  if not path.exists():
    found = checkpoints.find(clip)
    return found.name if found else clip
  if name := read_arrays(path).metadata.get("name"):
    return name
  with contextlib.suppress(InputError):  # nearly a public name
    row = checkpoints.find(path.stem)
    if row and row.config and without_images(row.config) == without_images(architecture):
      return row.name
  return path.name


def portable(config: Mapping, clip: str) -> dict:
  """The config of a run, as nested dictionaries, without paths of this machine.

  Args:
    config: as nested dictionaries.
    clip: see `portable_clip`.
  """
  paths = [path for path, f in declared(Run).items() if spec(f).is_path]
  return {**_without(config, paths), "clip": clip}


def holds_paths(config: Mapping) -> bool:
  """Whether a config has paths of a machine."""
  return config != portable(config, config.get("clip", "")) or not is_portable(config["clip"])


def _without(tree: Mapping, paths: list[str], above: str = "") -> dict:
  return {
    key: _without(value, paths, f"{above}{key}.") if isinstance(value, Mapping) else value
    for key, value in tree.items()
    if above + key not in paths
  }


def _address(name: str | os.PathLike) -> Checkpoint | None:
  found = None if expand(name).exists() else checkpoints.find(name)
  return found if found and not found.listed else None
