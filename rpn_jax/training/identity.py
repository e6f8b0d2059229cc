"""The identity of a run: the settings on which its checkpoints and its workdir must agree."""

import copy
import dataclasses
import json

import ml_collections

from rpn_jax.base.errors import InputError
from rpn_jax.base.words import differences
from rpn_jax.config import EVALUATION, FREE, Dense
from rpn_jax.models import NETWORKS

# Fields that configs of older checkpoints lack, with the value those were trained with.
ADDED_FIELDS = {
  "optimizer.clip_norm": 0.0,
  "optimizer.schedule": "poly",
  "optimizer.no_decay": "",
  "loss.skip_empty": False,
  "data.held_out": 0.0,
  "data.unseen": [],
  "model.oft_block": 16,
  "model.context_tokens": 4,
  "data.recipe": "mmsegmentation",
  "data.label_resize": "floor_nearest",
  "self_training.teacher": "sclip",
  "self_training.refresh": 0,
  "self_training.confidence": 0.0,
  # Training-free methods have had all but three of their settings since.
  **{
    f"dense.{name}": list(default) if isinstance(default, tuple) else default
    for name, default in dataclasses.asdict(Dense()).items()
    if name not in ("method", "denoise", "key_smoothing")
  },
}


def identity(
  config: ml_collections.ConfigDict, fingerprint: str, free: frozenset[str] = FREE | EVALUATION
) -> dict:
  """What must match for a checkpoint to belong to a run: CLIP's fingerprint and the config.

  Args:
    config: of the run.
    fingerprint: of CLIP's parameters.
    free: names of fields that are left out: those that may change on resuming or in evaluation.
  """

  def strip(tree: object) -> object:
    if isinstance(tree, dict):
      return {k: strip(v) for k, v in sorted(tree.items()) if k not in free}
    return tree

  # Through JSON, so that tuples and lists compare equal after a round trip.
  return json.loads(json.dumps({"clip": fingerprint, "config": strip(config.to_dict())}))


def _comparable(identity: dict) -> dict:
  """An identity without the settings of networks that the run does not have, which an earlier
  version may not know, and with the ADDED_FIELDS that it lacks."""
  identity = copy.deepcopy(identity)
  used = {identity["config"].get("method")}
  if identity["config"].get("data", {}).get("setting") == "annotation_free":
    used.add("training_free")  # the teacher
  for name, network in NETWORKS.items():
    if name not in used:
      identity["config"].pop(network.section, None)
  for path, value in ADDED_FIELDS.items():
    *sections, name = path.split(".")
    section = identity["config"]
    for key in sections:
      section = section.setdefault(key, {})
    section.setdefault(name, value)
  return identity


def check_identity(path: object, stored: dict, requested: dict) -> None:
  """Compares two identities; `stored` may be from an earlier version.

  Raises:
    InputError: they differ; the message has both values.
  """
  changed = differences(_comparable(stored), _comparable(requested))
  if changed:
    listed = "; ".join(changed[:3]) + (f"; {len(changed) - 3} more" if len(changed) > 3 else "")
    raise InputError(
      f"{path} was created with a different config (workdir -> requested): {listed}. Use a new "
      "--workdir or the original settings"
    )
