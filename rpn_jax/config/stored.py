"""Configs that an earlier command wrote: in the workdir of a run, and beside its prompts."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from ml_collections import config_dict

from rpn_jax.base.errors import InputError
from rpn_jax.base.fields import with_tuples
from rpn_jax.config import defaults

# In the workdir of a run: every setting it was created with.
CONFIG = "config.json"


def completed(stored: Mapping[str, Any]) -> config_dict.ConfigDict:
  """The config of a segmentation run from JSON, unlocked.

  Fields that were not stored, since an earlier version did not know them, have their defaults.

  Raises:
    KeyError, TypeError, ValueError, AttributeError: something else was stored.
  """
  config = defaults().unlock()
  with config.ignore_type():
    config.update(with_tuples(stored))
  return config


def read_config(workdir: pathlib.Path) -> config_dict.ConfigDict:
  """The config that a run wrote to its workdir, unlocked.

  Raises:
    InputError: the folder is not the workdir of a run, or its config is incomplete.
  """
  path = workdir / CONFIG
  if not path.exists():
    raise InputError(f"{workdir}: expected the workdir of a run, with a {CONFIG}; train first")
  try:
    config = json.loads(path.read_text(encoding="utf-8"))["config"]
    _ = config["eval"]["crop"], config["data"]["short_side"], config["method"]
    return completed(config)
  except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
    raise InputError(
      f"{path}: expected the whole config of a segmentation run; repeat the run with this version"
    ) from None


def scored_set(config: Mapping[str, Any], file: str) -> str:
  """The data set that stored scores of a single one are of.

  Training scores its own in metrics.json, --mode=eval writes those of `eval.sets` to eval.json, or
  to metrics.json where nothing is trained.

  Args:
    config: that the file says.
    file: its name.
  """
  sets = config.get("eval", {}).get("sets")
  by_training = file == "metrics.json" and config.get("method") != "training_free"
  return sets[0] if sets and not by_training else config["data"]["name"]


def clip_of(workdir: pathlib.Path) -> str:
  """The fingerprint of a run's CLIP weights; "" where its config does not tell."""
  try:
    return str(json.loads((workdir / CONFIG).read_text(encoding="utf-8"))["clip"])
  except (OSError, ValueError, KeyError, TypeError, RecursionError):
    return ""
