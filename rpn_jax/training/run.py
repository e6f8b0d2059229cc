"""A training run on disk: its workdir, the config it was created with, its checkpoints."""

import contextlib
import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import ml_collections

from rpn_jax.base.errors import InputError
from rpn_jax.base.paths import locked, write_json
from rpn_jax.training.checkpoint import Checkpoints
from rpn_jax.training.identity import check_identity, identity

CONFIG = "config.json"
# The best scores so far; evaluations read it, during the run and after it.
BEST = "best.json"
LOCK = ".lock"


@contextlib.contextmanager
def held_workdir(workdir: pathlib.Path) -> Iterator[None]:
  """Locks a workdir; the first process does so on behalf of all processes of a run.

  Raises:
    InputError: the workdir is locked by another run, whose process is named, or not writable.
  """
  if jax.process_index():
    yield
    return
  path = workdir / LOCK
  with contextlib.ExitStack() as stack:
    try:
      workdir.mkdir(parents=True, exist_ok=True)
      stack.enter_context(locked(path, str(workdir), "use another --workdir"))
    except OSError as error:
      raise InputError(
        f"expected a writable workdir, but {path} cannot be opened ({error.strerror}): use another "
        "--workdir"
      ) from error
    yield


class Run:
  """A training run and its workdir.

  Attributes:
    workdir: directory of the run, created by `claim`.
    config: the locked config.
    fingerprint: fingerprint of the CLIP weights.
    identity: see `identity.identity`.
  """

  def __init__(
    self, config: ml_collections.ConfigDict, workdir: str | os.PathLike, fingerprint: str
  ):
    self.workdir = pathlib.Path(workdir)
    self.config = config
    self.fingerprint = fingerprint
    self.identity = identity(config, fingerprint)

  def claim(self) -> None:
    """Writes `config.json`, or checks that the one in the workdir belongs to this run.

    Raises:
      InputError: the workdir was created with a different config.
    """
    path = self.workdir / CONFIG
    if not path.exists():
      self.workdir.mkdir(parents=True, exist_ok=True)
      write_json(path, {"clip": self.fingerprint, "config": self.config.to_dict()})
      return
    try:
      stored = json.loads(path.read_text())
      config = ml_collections.ConfigDict(dict(stored["config"].items()))
      stored = identity(config, stored["clip"])
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
      raise InputError(
        f"expected the config of a run in {path}, got something else: delete that file if the "
        "workdir belongs to this run"
      ) from None
    check_identity(self.workdir, stored, self.identity)

  def checkpoints(self, *, read_only: bool = False) -> Checkpoints:
    """The checkpoints of the workdir."""
    return Checkpoints(self.workdir, self.identity, read_only=read_only)

  def read(self, like: dict) -> dict[str, tuple[int, dict]]:
    """Step and prompts of the "last" and the "best" checkpoint; see `Checkpoints.read`.

    Args:
      like: shapes and types of the prompts.

    Raises:
      InputError: there are no checkpoints, or they belong to another run.
    """
    if not (self.workdir / "checkpoints").is_dir():
      raise InputError(f"no checkpoints in {self.workdir}: train first, with the same --workdir")
    with contextlib.closing(self.checkpoints(read_only=True)) as checkpoints:
      return checkpoints.read(like, self._best_step())

  def _best_step(self) -> int | None:
    """The step of the best evaluation according to `best.json`; None if it is unreadable."""
    try:
      return json.loads((self.workdir / BEST).read_text())["best"]["step"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
      return None


def read_config(workdir: pathlib.Path) -> ml_collections.ConfigDict:
  """The config that a run wrote to its workdir, unlocked.

  Raises:
    InputError: the folder is not the workdir of a run, or its config is incomplete.
  """
  path = workdir / CONFIG
  if not path.exists():
    raise InputError(f"{workdir}: expected the workdir of a run, with a {CONFIG}; train first")
  try:
    config = json.loads(path.read_text())["config"]
    _ = config["eval"]["crop"], config["data"]["short_side"], config["method"]
  except (ValueError, KeyError, TypeError):
    raise InputError(
      f"{path}: expected the whole config of a segmentation run; repeat the run with this version"
    ) from None
  return ml_collections.ConfigDict(_with_tuples(config))


def _with_tuples(value: Any) -> Any:
  """Turns the lists of JSON back into tuples, which modules can hash."""
  if isinstance(value, Mapping):
    return {k: _with_tuples(v) for k, v in value.items()}
  return tuple(map(_with_tuples, value)) if isinstance(value, list) else value
