"""A training run on disk: its workdir, the config it was created with, its checkpoints."""

import contextlib
import json
import os
import pathlib
import time
from collections.abc import Iterator
from typing import Any

import jax
import ml_collections
import numpy as np
from jax.experimental import multihost_utils

from rpn_jax.base.buckets import is_bucket
from rpn_jax.base.console import WORKDIR_FILES
from rpn_jax.base.errors import InputError
from rpn_jax.base.paths import check_renames, expand, is_gcsfuse, locked, write_json
from rpn_jax.base.words import differences
from rpn_jax.config.stored import CONFIG
from rpn_jax.training.bucket_checkpoints import BucketCheckpoints
from rpn_jax.training.checkpoint import Checkpoints
from rpn_jax.training.identity import check_identity, identity
from rpn_jax.training.metric_log import METRICS, read_history

# The best scores so far; evaluations read it, during the run and after it.
BEST = "best.json"
LOCK = ".lock"


@contextlib.contextmanager
def held_workdir(workdir: pathlib.Path) -> Iterator[None]:
  """Locks a workdir; the first process does so on behalf of all processes of a run.

  Raises:
    InputError: the workdir is locked by another run, whose process is named, not writable, or on a
      file system that cannot hold checkpoints.
  """
  if jax.process_index():
    yield
    return
  path = workdir / LOCK
  with contextlib.ExitStack() as stack:
    try:
      workdir.mkdir(parents=True, exist_ok=True)
      stack.enter_context(locked(path, str(workdir), "use another --workdir"))
      if not is_bucket(workdir):
        _check_file_system(workdir)
    except OSError as error:
      raise InputError(
        f"expected a writable workdir, but {path} cannot be opened ({error.strerror}): use another "
        "--workdir"
      ) from error
    yield


def _check_file_system(workdir: pathlib.Path) -> None:
  """Says what a folder does not promise that only looks like one of a disk.

  Raises:
    InputError: no checkpoint can be saved there.
  """
  check_renames(workdir)
  if is_gcsfuse(workdir):
    print(
      f"note: {workdir} is in a bucket that gcsfuse shows: another machine is not locked out, a "
      "checkpoint may appear file by file, and curves may be lost with this machine; "
      "--workdir=gs://BUCKET/NAME has none of this",
      flush=True,
    )


def classes_of(data: Any) -> dict[str, list[str]]:
  """The class names of a data set, and which of them are prompted in training, for `config.json`.

  Args:
    data: has `names` and `trained`.
  """
  return {"names": [*data.names], "trained": [data.names[i] for i in data.trained]}


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
    self.workdir = expand(workdir)
    self.config = config
    self.fingerprint = fingerprint
    self.identity = identity(config, fingerprint)
    self._lock: bytes | None = None  # what the lock file holds during the run

  def claim(self, classes: dict[str, list[str]] | None = None) -> None:
    """Writes `config.json`, or checks that the one in the workdir belongs to this run.

    Args:
      classes: of `classes_of`, if the run is to be trained on them.

    Raises:
      InputError: the workdir was created with a different config, or trained on other classes.
    """
    self._lock = _content(self.workdir / LOCK)
    path = self.workdir / CONFIG
    if not path.exists():
      self.workdir.mkdir(parents=True, exist_ok=True)
      content = {"clip": self.fingerprint, "config": self.config.to_dict()}
      write_json(path, content | ({"classes": classes} if classes else {}))
      return
    try:
      stored = json.loads(path.read_text(encoding="utf-8"))
      config = ml_collections.ConfigDict(dict(stored["config"].items()))
      stored = identity(config, stored["clip"])
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
      raise InputError(
        f"expected the config of a run in {path}, got something else: delete that file if the "
        "workdir belongs to this run"
      ) from None
    check_identity(self.workdir, stored, self.identity)
    if classes:
      self.check_classes(classes)

  def stored_classes(self) -> dict[str, list[str]]:
    """What `classes_of` gave when the run began; {} of runs of version 0.2.0 and of no run."""
    try:
      stored = json.loads((self.workdir / CONFIG).read_text(encoding="utf-8"))["classes"]
      return {group: list(names) for group, names in stored.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
      return {}

  def check_classes(self, classes: dict[str, list[str]]) -> None:
    """Compares class names with those that the run was trained on, if it says which these were.

    Args:
      classes: of `classes_of`, or some entries of it.

    Raises:
      InputError: they differ; the message has the first ones.
    """
    stored = self.stored_classes()
    for group in (group for group in classes if group in stored):
      old, new = (dict(enumerate(names, 1)) for names in (stored[group], classes[group]))
      if changed := differences(old, new, group):
        listed = "; ".join(changed[:3]) + (f"; {len(changed) - 3} more" if changed[3:] else "")
        raise InputError(
          f"{self.workdir} was trained on other class names (workdir -> data set): {listed}. Use a "
          "new --workdir, or prepare the data set with the names of the run"
        )

  def restart(self) -> None:
    """Moves what an earlier run left in the workdir into a folder `replaced-<time>` there.

    Every process calls it, before `claim`.
    """
    if jax.process_index() == 0:
      names = [name for name in WORKDIR_FILES if (self.workdir / name).exists()]
      names += [path.name for path in self.workdir.glob("*.partial.npz")]
      if names:
        target = self.workdir / time.strftime("replaced-%Y%m%d-%H%M%S")
        target.mkdir()
        for name in names:
          (self.workdir / name).rename(target / name)
        print(f"restart: moved {', '.join(names)} to {target}; nothing reads that folder: delete "
              "it to free its space", flush=True)  # fmt: skip
    if jax.process_count() > 1:
      multihost_utils.sync_global_devices("workdir emptied for a restart")

  def check_new(self) -> None:
    """Called where there is no checkpoint, so that a run that had some is not repeated unasked.

    Raises:
      InputError: the curves go beyond the step of the first checkpoint.
    """
    c = self.config
    first = min(n for n in (c.save_every or c.steps, c.eval_every, c.steps))
    history = read_history(self.workdir / METRICS)
    last = max((points[-1][0] for points in history.values()), default=0)
    if last > first:
      raise InputError(
        f"{self.workdir} has curves up to step {last} and no checkpoint, though the first is due "
        f"at step {first}: put its checkpoints back, or start over with --restart"
      )

  def check_workdir(self, step: int) -> None:
    """Called now and then during a run, which would not notice otherwise: its files are open.

    Raises:
      InputError: in all processes, if the workdir was removed, renamed or emptied since `claim`.
    """
    missing, lock = [], _content(self.workdir / LOCK)
    # A bucket that cannot be reached now tells nothing, and asking takes half a minute.
    if not (lock == b"" and is_bucket(self.workdir)):
      missing = [name for name in (CONFIG, METRICS) if _content(self.workdir / name, 0) is None]
      if lock != self._lock:  # whoever took the lock left another content
        missing.insert(0, LOCK)
    gone = bool(missing)
    if jax.process_count() > 1:
      gone = bool(multihost_utils.broadcast_one_to_all(np.int32(gone)))
    if gone:
      raise InputError(
        f"{self.workdir} was removed, renamed or emptied during the run ({', '.join(missing)} of "
        f"this run is gone): stopped at step {step} without a checkpoint of it; put the folder "
        "back and run the same command again, which resumes from its last checkpoint if it has one"
      )

  def checkpoints(self, *, read_only: bool = False) -> Checkpoints:
    """The checkpoints of the workdir."""
    kind = BucketCheckpoints if is_bucket(self.workdir) else Checkpoints
    return kind(self.workdir, self.identity, read_only=read_only)

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
      return json.loads((self.workdir / BEST).read_text(encoding="utf-8"))["best"]["step"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
      return None


def _content(path: pathlib.Path, size: int = 200) -> bytes | None:
  """The first bytes of a file; None if there is none. One that cannot be read has no bytes."""
  try:
    with path.open("rb") as file:
      return file.read(size)
  except (FileNotFoundError, NotADirectoryError):
    return None
  except OSError:
    return b""


def clip_of(workdir: pathlib.Path) -> str:
  """The fingerprint of a run's CLIP weights; "" where its config does not tell."""
  try:
    return str(json.loads((workdir / CONFIG).read_text(encoding="utf-8"))["clip"])
  except (OSError, ValueError, KeyError, TypeError, RecursionError):
    return ""
