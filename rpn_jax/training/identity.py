"""The identity of a run: the settings in which its checkpoints and its workdir must agree."""

import copy
import json

import ml_collections

from rpn_jax.base.errors import InputError
from rpn_jax.base.words import differences
from rpn_jax.config import EVALUATION, FREE

# Fields that the config of an older checkpoint lacks, with the value it was trained under.
ADDED_FIELDS = {"optimizer.clip_norm": 0.0}


def identity(config: ml_collections.ConfigDict, fingerprint: str) -> dict:
  """What must be equal for a checkpoint to belong to a run: CLIP's fingerprint and the config."""
  # A run may be resumed with others of the first, and be evaluated in many ways.
  free = FREE | EVALUATION

  def strip(tree: object) -> object:
    if isinstance(tree, dict):
      return {k: strip(v) for k, v in sorted(tree.items()) if k not in free}
    return tree

  # Through JSON, so that tuples and lists compare equal after a round trip.
  return json.loads(json.dumps({"clip": fingerprint, "config": strip(config.to_dict())}))


def completed(identity: dict) -> dict:
  """An identity, also one that an earlier version wrote, with the fields added since."""
  identity = copy.deepcopy(identity)
  for path, value in ADDED_FIELDS.items():
    *sections, name = path.split(".")
    section = identity["config"]
    for key in sections:
      section = section.setdefault(key, {})
    section.setdefault(name, value)
  return identity


def mismatch(path: object, changed: list[str]) -> InputError:
  """The error for files that were created with another config, with what differs."""
  shown = "; ".join(changed[:3]) + (f"; {len(changed) - 3} more" if len(changed) > 3 else "")
  return InputError(
    f"{path} was created with a different config (workdir -> requested): {shown}. Use a new "
    "--workdir or the original settings"
  )


def check_identity(path: object, stored: dict, wanted: dict) -> None:
  """Compares two identities, also one that an earlier version wrote.

  Raises:
    InputError: with both values of what differs.
  """
  changed = differences(completed(stored), completed(wanted))
  if changed:
    raise mismatch(path, changed)
