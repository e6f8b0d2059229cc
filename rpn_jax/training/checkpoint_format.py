"""The `meta` item of a checkpoint: its checksum, its format, and those of earlier versions."""

import hashlib
import json

from rpn_jax.base.errors import InputError

# Format of the `meta` item. Format 1 had neither checksums nor a version field.
FORMAT_VERSION = 2


def seal(meta: dict) -> str:
  """SHA-256 of the `meta` item without its `seal` entry."""
  content = {k: v for k, v in meta.items() if k != "seal"}
  return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _upgrade_from_1(meta: dict) -> dict:
  return {**meta, "version": 2, "checksums": {}, "skipped": [0, 0]}


# Format -> function from its `meta` item to that of the next format.
UPGRADES = {1: _upgrade_from_1}


def upgrade(meta: dict, where: object) -> dict:
  """Converts a `meta` item to the current format.

  Raises:
    InputError: it was written by a later version of rpn_jax.
  """
  meta = {"version": 1, **meta}
  if meta["version"] > FORMAT_VERSION:
    raise InputError(
      f"{where} has checkpoints of format {meta['version']}, this version of rpn_jax reads up to "
      f"{FORMAT_VERSION}: update rpn_jax"
    )
  while meta["version"] < FORMAT_VERSION:
    meta = UPGRADES[meta["version"]](meta)
  return meta
