"""Checkpoints of a run: prompts, optimizer state and metadata, never the frozen tower.

A checkpoint is a folder `checkpoints/<step>`, written atomically. Its `meta` item holds checksums
of the other items and of itself, so that later damage on disk is detected.
"""

import contextlib
import errno
import gc
import hashlib
import json
import os
import pathlib
import shutil
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from rpn_jax.base.errors import InputError
from rpn_jax.base.words import differences
from rpn_jax.training.identity import check_identity
from rpn_jax.training.step import TrainState

# Format of the `meta` item. Format 1 had neither checksums nor a version field.
FORMAT_VERSION = 2

# Newest checkpoints that are kept, besides the best one. Two, in case the newest gets damaged.
KEPT_CHECKPOINTS = 2

# How long to retry removing the temporary folders of a failed save.
CLEANUP_SECONDS = 5


def digest(tree: Any) -> str:
  """SHA-256 over names, types, shapes and bytes of a tree of arrays."""
  total = hashlib.sha256()
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    value = np.asarray(leaf)
    total.update(f"{jax.tree_util.keystr(path)} {value.dtype} {value.shape}".encode())
    total.update(np.ascontiguousarray(value).tobytes())
  return total.hexdigest()


def _seal(meta: dict) -> str:
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


class DamagedCheckpoint(Exception):
  """The content of a checkpoint differs from what was saved."""


class _LatestAndBest:
  """Orbax preservation policy: keeps the newest checkpoints and the best one."""

  best_step: int | None = None

  def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
    del context
    newest = {info.step for info in checkpoints[-KEPT_CHECKPOINTS:]}
    return [info.step in newest or info.step == self.best_step for info in checkpoints]


class Checkpoints:
  """The checkpoints under `workdir/checkpoints`: the newest two, and the best.

  Args:
    workdir: directory of the run.
    identity: see `training.identity`; stored in every checkpoint and compared before a restore.
    read_only: create, move or delete nothing, as in evaluation and prediction, which may happen
      while a run is training in the workdir.
  """

  def __init__(self, workdir: pathlib.Path, identity: dict, *, read_only: bool = False):
    self.identity = identity
    self.directory = (pathlib.Path(workdir) / "checkpoints").absolute()
    self._policy = _LatestAndBest()
    import orbax.checkpoint as ocp  # takes a second, so only where it is needed

    with _quiet():
      options = ocp.CheckpointManagerOptions(
        preservation_policy=self._policy,
        # A save takes a fraction of a second (docs/reliability.md); its failure shows at once.
        enable_async_checkpointing=False,
        lightweight_initialize=True,
        create=not read_only,
        read_only=read_only,
      )
      self.manager = ocp.CheckpointManager(
        self.directory, item_names=("prompts", "opt_state", "meta"), options=options
      )

  def steps(self) -> list[int]:
    """Steps of the checkpoints on disk, newest first."""
    while True:
      try:
        self.manager.reload()
        return sorted(self.manager.all_steps(), reverse=True)
      except FileNotFoundError:  # a running job deleted one in the meantime
        if not self.directory.is_dir():
          raise

  def save(self, state: TrainState, best: dict | None) -> bool:
    """Saves a state of numpy arrays; every process must call it.

    Args:
      state: the state of a step that has no checkpoint yet.
      best: the best scores so far, with their `step`, whose checkpoint is kept.

    Returns:
      Whether it was saved. If the disk is full, read-only or gone, a line is printed and the
      existing checkpoints are left untouched.
    """
    step = int(state.step)
    self._policy.best_step = best["step"] if best else None
    meta = {
      "version": FORMAT_VERSION,
      "step": step,
      "identity": self.identity,
      "best": best,
      "skipped": [int(state.skipped), int(state.consecutive_skips)],
      "checksums": {"prompts": digest(state.prompts), "opt_state": digest(state.opt_state)},
    }
    # The round trip through JSON makes it equal to what will be read back.
    meta["seal"] = _seal(json.loads(json.dumps(meta)))
    reason = self._out_of_space(state)
    if reason is None:
      import orbax.checkpoint as ocp

      args = ocp.args.Composite(
        prompts=ocp.args.StandardSave(state.prompts),
        opt_state=ocp.args.StandardSave(state.opt_state),
        meta=ocp.args.JsonSave(meta),
      )
      with _quiet():
        try:
          self.manager.save(step, args=args)
          return True
        except (OSError, ValueError, RuntimeError) as error:  # tensorstore: any failed write
          reason = _reason(error)
        self._remove_leftovers()
        gc.collect()  # while quiet; see `_quiet`
    steps = self.steps()
    last = f"the last good one is of step {steps[0]}" if steps else "there is none yet"
    _report(f"step {step}: no checkpoint written to {self.directory} ({reason}); {last}")
    return False

  def _out_of_space(self, state: TrainState) -> str | None:
    """Why a checkpoint would not fit on the disk, or None; agrees in all processes.

    Several processes save together, and one that failed halfway would leave the others waiting, so
    the first process allocates a file of the same size beforehand.
    """
    if jax.process_count() == 1:
      return None
    error_number = 0
    if jax.process_index() == 0:
      probe = self.directory / ".room"
      try:
        with open(probe, "wb") as file:
          os.posix_fallocate(file.fileno(), 0, 2 * sum(x.nbytes for x in jax.tree.leaves(state)))
      except OSError as error:
        error_number = error.errno or errno.EIO
      finally:
        probe.unlink(missing_ok=True)
    error_number = int(multihost_utils.broadcast_one_to_all(np.int32(error_number)))
    return os.strerror(error_number) if error_number else None

  def _remove_leftovers(self) -> None:
    """Removes the temporary folders of a failed save, which take up space."""
    if jax.process_index() == 0:
      deadline = time.monotonic() + CLEANUP_SECONDS
      pattern = "*.orbax-checkpoint-tmp*"
      while (leftovers := list(self.directory.glob(pattern))) and time.monotonic() < deadline:
        for leftover in leftovers:
          shutil.rmtree(leftover, ignore_errors=True)
        # Threads of the failed save may still be writing and recreate the folder.
        time.sleep(0.1)

  def resume(self, like: TrainState) -> tuple[TrainState, dict | None] | None:
    """The newest intact state, as numpy, and the best scores so far; None for a new run.

    A damaged checkpoint is reported and renamed to `<step>.damaged`, and the one before it is used.

    Raises:
      InputError: the checkpoints belong to another run, or none of them is intact.
    """
    self._remove_leftovers()
    like = jax.device_get(like)
    wanted = {"prompts": like.prompts, "opt_state": like.opt_state}
    steps = self.steps()
    for step in steps:
      if (intact := self._intact(step, wanted)) is None:
        self._set_aside(step)
        continue
      self.manager.reload()
      meta, items = intact
      skipped, consecutive = map(np.int32, meta["skipped"])
      state = TrainState(np.int32(step), items["prompts"], items["opt_state"], skipped, consecutive)
      return state, meta["best"]
    if steps:
      raise InputError(
        f"no intact checkpoint in {self.directory}: those of steps {steps[::-1]} are damaged; "
        "start over with a new --workdir"
      )
    return None

  def _set_aside(self, step: int) -> None:
    if jax.process_index() == 0:
      target = self.directory / f"{step}.damaged"
      shutil.rmtree(target, ignore_errors=True)
      os.rename(self.directory / str(step), target)
    if jax.process_count() > 1:
      multihost_utils.sync_global_devices("damaged checkpoint set aside")

  def read(self, like: dict, best_step: int | None = None) -> dict[str, tuple[int, dict]]:
    """Step and prompts of the newest intact checkpoint, "last", and of the "best" one.

    "best" is missing if it is the newest one or no longer exists.

    Args:
      like: shapes and types of the prompts.
      best_step: step of the best checkpoint, if known; otherwise the newest one names it.

    Raises:
      InputError: the checkpoints belong to another run, or none of them is intact.
    """
    wanted = {"prompts": jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), like)}
    seen: list[int] = []
    # Retried in case a running job replaced all of them in the meantime.
    while (steps := self.steps()) != seen:
      seen = steps
      for step in steps:
        if (intact := self._intact(step, wanted)) is None:
          continue
        meta, items = intact
        found = {"last": (step, items["prompts"])}
        if best_step not in steps and meta["best"]:
          best_step = meta["best"]["step"]
        # With ties for the best score, a different one may have been kept.
        if best_step in steps and best_step < step and (best := self._intact(best_step, wanted)):
          found["best"] = (best_step, best[1]["prompts"])
        return found
    what = f"those of steps {seen[::-1]} are damaged" if seen else "train first"
    raise InputError(f"no complete checkpoint in {self.directory}: {what}")

  def _intact(self, step: int, like: dict) -> tuple[dict, dict] | None:
    """Metadata and the requested items of a checkpoint; None, with a warning, if damaged."""
    try:
      meta = self._meta(step)
      return meta, self._items(step, meta, like)
    except DamagedCheckpoint as error:
      if (self.directory / str(step)).is_dir():  # a running job deletes old ones
        _report(f"the checkpoint of step {step} is damaged ({error}): using the one before it")
      return None

  def _meta(self, step: int) -> dict:
    """The `meta` item of a checkpoint, checked to be intact and from this run."""
    import orbax.checkpoint as ocp

    args = ocp.args.Composite(meta=ocp.args.JsonRestore())
    meta = self._restore(step, args)["meta"]
    if not isinstance(meta, dict) or meta.get("seal", _seal(meta)) != _seal(meta):
      raise DamagedCheckpoint("the checksum of its metadata does not match")
    if "version" in meta and "seal" not in meta:
      raise DamagedCheckpoint("the checksum of its metadata is missing")
    try:
      meta = upgrade(meta, self.directory)
      stored = meta["identity"]
      _ = stored["config"], meta["best"]
    except (KeyError, TypeError) as error:
      raise DamagedCheckpoint(f"its metadata is incomplete: {_reason(error)}") from error
    check_identity(self.directory, stored, self.identity)
    return meta

  def _items(self, step: int, meta: dict, like: dict) -> dict:
    """The items named in `like`, checked against its shapes and their checksums."""
    import orbax.checkpoint as ocp

    args = {name: ocp.args.StandardRestore(tree) for name, tree in like.items()}
    items = self._restore(step, ocp.args.Composite(**args))
    for name, tree in like.items():
      _check_shapes(tree, items[name], self.directory / str(step) / name)
      checksum = meta["checksums"].get(name)
      if checksum is not None and digest(jax.device_get(items[name])) != checksum:
        raise DamagedCheckpoint(f"the checksum of its {name} does not match")
    return {name: items[name] for name in like}

  def _restore(self, step: int, args: Any) -> Any:
    with _quiet():
      try:
        return self.manager.restore(step, args=args)
      except Exception as error:  # damaged files raise all kinds of errors
        reason = _reason(error)
      gc.collect()  # while quiet; see `_quiet`
    raise DamagedCheckpoint(reason)

  def close(self) -> None:
    """Closes the manager; a second call does nothing."""
    self.manager.close()


def _check_shapes(want: Any, got: Any, where: object) -> None:
  """Compares shapes, since Orbax silently restores arrays of other shapes than requested."""
  shapes = lambda tree: {
    jax.tree_util.keystr(path): np.shape(leaf)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }
  if changed := differences(shapes(got), shapes(want)):
    raise InputError(
      f"{where} has other shapes than this network (checkpoint -> network: {changed[0]}): use the "
      "version of rpn_jax that wrote it, or a new --workdir"
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """Silences Orbax: its log, and its coroutines, which warn when collected after a failure.

  Failures are reported in one line instead. Collect garbage in the block once the error is gone:
  its traceback keeps the coroutines alive.
  """
  verbosity, hook = logging.get_verbosity(), sys.unraisablehook
  logging.set_verbosity(logging.FATAL)
  sys.unraisablehook = lambda _: None
  try:
    with warnings.catch_warnings():
      warnings.simplefilter("ignore", RuntimeWarning)
      yield
  finally:
    sys.unraisablehook = hook
    logging.set_verbosity(verbosity)


def _report(line: str) -> None:
  print(line, flush=True)


def _reason(error: BaseException) -> str:
  """A short reason from an error: the messages of tensorstore are pages long."""
  if isinstance(error, OSError) and error.strerror:
    return error.strerror
  text = " ".join(str(error).split())
  for code in (errno.ENOSPC, errno.EROFS, errno.EFBIG, errno.EDQUOT, errno.EACCES, errno.EIO):
    if os.strerror(code).lower() in text.lower():
      return os.strerror(code)
  return f"{type(error).__name__}: {text[:120]}"
