"""What a run is: the settings that its checkpoints and its workdir must agree in."""

import copy
import json

from rpn_jax.base.errors import InputError
from rpn_jax.base.words import differences

# Fields that the config of an older checkpoint lacks, with the value it was trained under.
ADDED_FIELDS = {"optimizer.clip_norm": 0.0}

# Config fields that may differ between a run and its continuation: they change neither what is
# trained nor in which order.
FREE_FIELDS = (
  "log_every", "eval_every", "save_every", "max_skipped", "data_dir", "workers", "threads",
  "parallel", "shard_state", "remat",
)  # fmt: skip
# Nor do these, although they change scores: a trained run may be evaluated in many ways.
EVALUATION_FIELDS = ("eval", "short_side", "eval_images", "prompts")


def identity(config, fingerprint: str) -> dict:
  """What has to be equal for a checkpoint to belong to a run: tower and config."""
  free = (*FREE_FIELDS, *EVALUATION_FIELDS)

  def strip(tree):
    if isinstance(tree, dict):
      return {k: strip(v) for k, v in sorted(tree.items()) if k not in free}
    return tree

  # Through JSON, so that tuples and lists compare equal after a round trip.
  return json.loads(json.dumps({"clip": fingerprint, "config": strip(config.to_dict())}))


def completed(identity: dict) -> dict:
  """An identity that an earlier version of this project wrote, with the fields it did not have."""
  identity = copy.deepcopy(identity)
  for path, value in ADDED_FIELDS.items():
    *sections, name = path.split(".")
    section = identity["config"]
    for key in sections:
      section = section.setdefault(key, {})
    section.setdefault(name, value)
  return identity


def other_run(path, changed: list[str]) -> InputError:
  """The error for files of another run, with what differs."""
  shown = "; ".join(changed[:3]) + (f"; {len(changed) - 3} more" if len(changed) > 3 else "")
  return InputError(
    f"{path} belongs to another run (there -> asked for: {shown}): "
    "use another --workdir, or the old settings"
  )


def check_identity(path, stored: dict, wanted: dict) -> None:
  """Raises an InputError with both values of what differs."""
  changed = differences(completed(stored), completed(wanted))
  if changed:
    raise other_run(path, changed)
