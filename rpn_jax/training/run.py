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
from rpn_jax.base.console import workdir_files
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


def classes_of(data: Any) -> dict[str, Any]:
  """What `config.json` says of a data set.

  Args:
    data: has `names` and `trained`, and `contents` where it knows what identifies its images.

  Returns:
    "names" of the classes, those that are prompted in training as "trained", and "contents", what
    identifies the images of every split; {} where that is not known.

  Raises:
    InputError: the data set is not prepared.
  """
  trained = [data.names[i] for i in data.trained]
  return {"names": [*data.names], "trained": trained, "contents": getattr(data, "contents", dict)()}


def _changed_contents(old: dict[str, dict], new: dict[str, dict]) -> str:
  """What is different in the images of a data set, in words; "" if nothing is known to be."""
  found = []
  for split in dict.fromkeys([*old, *new]) if old and new else ():
    then, now = old.get(split, {}), new.get(split, {})
    counts = [f"{images.get('images', 0):,}" for images in (then, now)]
    # Sets that earlier versions prepared have no checksum.
    key = "sha256" if "sha256" in then and "sha256" in now else "bytes"
    if counts[0] != counts[1]:
      found.append(f"{split}: {' -> '.join(counts)} images")
    elif then.get(key) != now.get(key):
      found.append(f"{split}: other images or labels")
  return "; ".join(found)


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

  def claim(self, classes: dict[str, Any] | None = None) -> None:
    """Writes `config.json`, or checks that the one in the workdir belongs to this run.

    Args:
      classes: of `classes_of`, if the run is to be trained on them.

    Raises:
      InputError: the workdir was created with a different config, or trained on other classes, or
        on other images than the data set has now.
    """
    self._lock = _content(self.workdir / LOCK)
    path = self.workdir / CONFIG
    if not path.exists():
      self.workdir.mkdir(parents=True, exist_ok=True)
      content = {"clip": self.fingerprint, "config": self.config.to_dict()}
      self._write(content | ({"classes": classes} if classes else {}))
      return
    try:
      content = json.loads(path.read_text(encoding="utf-8"))
      config = ml_collections.ConfigDict(dict(content["config"].items()))
      stored = identity(config, content["clip"])
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
      raise InputError(
        f"expected the config of a run in {path}, got something else: delete that file if the "
        "workdir belongs to this run"
      ) from None
    check_identity(self.workdir, stored, self.identity)
    if classes:
      self._check_names(classes)
      changed = self._changed_contents(classes)
      begun = (self.workdir / "checkpoints").is_dir()
      if changed and begun:
        raise InputError(
          f"{self.workdir} was trained on other images than the data set has now (workdir -> "
          f"data set): {changed}. Use a new --workdir (--restart begins anew in this one), or "
          "prepare the data set as it was"
        )
      # Before a run begins, its data set may be put right, and an evaluation may have claimed it.
      if changed or not (begun or content.get("classes")):
        self._write(content | {"classes": classes})

  def _write(self, content: dict[str, Any]) -> None:
    """Writes `config.json`, in the first process, on behalf of all."""
    if not jax.process_index():
      write_json(self.workdir / CONFIG, content)

  def stored_classes(self) -> dict[str, Any]:
    """What `classes_of` gave when the run began; {} of runs of version 0.2.0 and of no run."""
    try:
      stored = dict(json.loads((self.workdir / CONFIG).read_text(encoding="utf-8"))["classes"])
      contents = {split: dict(images) for split, images in stored.pop("contents", {}).items()}
      return {group: list(names) for group, names in stored.items()} | {"contents": contents}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
      return {}

  def check_classes(self, classes: dict[str, Any]) -> None:
    """Compares a data set with the one that the run was trained on, if it says what that was.

    Other images are told: they may be what is to be evaluated on.

    Args:
      classes: of `classes_of`, or some entries of it.

    Raises:
      InputError: class names differ; the message has the first ones.
    """
    self._check_names(classes)
    changed = self._changed_contents(classes)
    if changed and jax.process_index() == 0:
      print(
        f"note: {self.workdir} was trained on other images than the data set has now (workdir -> "
        f"data set): {changed}; scores do not compare with earlier ones, and may be of images that "
        "were trained on",
        flush=True,
      )

  def _changed_contents(self, classes: dict[str, Any]) -> str:
    stored = self.stored_classes().get("contents", {})
    return _changed_contents(stored, classes.get("contents", {}))

  def _check_names(self, classes: dict[str, Any]) -> None:
    stored = self.stored_classes()
    for group in ("names", "trained"):
      if group not in stored or group not in classes:
        continue
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
      names = [*workdir_files(self.workdir)]
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
