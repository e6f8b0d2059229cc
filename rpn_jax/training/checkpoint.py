"""Checkpoints of a run: prompts, optimizer state and meta, never the frozen tower.

A checkpoint is a folder `checkpoints/<step>` that appears whole or not at all. Its meta holds
checksums of everything in it, so that what a disk has damaged later is noticed.
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

# Format of the meta item. Format 1 had no checksums and did not state its version.
FORMAT_VERSION = 2

# Complete checkpoints kept besides the best: should a disk damage the newest, the one before it is
# there.
KEPT_CHECKPOINTS = 2

CLEANUP_SECONDS = 5  # to try to remove what a failed save left


def digest(tree: Any) -> str:
  """SHA-256 over names, types, shapes and bytes of a tree of arrays."""
  total = hashlib.sha256()
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    value = np.asarray(leaf)
    total.update(f"{jax.tree_util.keystr(path)} {value.dtype} {value.shape}".encode())
    total.update(np.ascontiguousarray(value).tobytes())
  return total.hexdigest()


def _seal(meta: dict) -> str:
  """SHA-256 of the meta item without its own entry."""
  content = {k: v for k, v in meta.items() if k != "seal"}
  return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _from_1(meta: dict) -> dict:
  return {**meta, "version": 2, "checksums": {}, "skipped": [0, 0]}


UPGRADES = {1: _from_1}


def upgraded(meta: dict, where: object) -> dict:
  """The meta item as this version writes it.

  Raises:
    InputError: a later version of this project wrote it.
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


class Damaged(Exception):
  """A checkpoint that is not what was saved."""


class _LatestAndBest:
  """Keeps the newest checkpoints and the best one, in orbax's terms."""

  best_step: int | None = None

  def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
    del context
    newest = {info.step for info in checkpoints[-KEPT_CHECKPOINTS:]}
    return [info.step in newest or info.step == self.best_step for info in checkpoints]


class Checkpoints:
  """The checkpoints under `workdir/checkpoints`: the newest two, and the best.

  Args:
    workdir: of the run.
    identity: see `identity`; stored with every checkpoint and compared before a restore.
    read_only: for evaluation and prediction, also while a run goes on in the workdir: nothing is
      made, moved or deleted.
  """

  def __init__(self, workdir: pathlib.Path, identity: dict, *, read_only: bool = False):
    self.identity = identity
    self.directory = (pathlib.Path(workdir) / "checkpoints").absolute()
    self.read_only = read_only
    self._policy = _LatestAndBest()
    import orbax.checkpoint as ocp  # takes a second, which commands without checkpoints save

    with _quiet():
      options = ocp.CheckpointManagerOptions(
        preservation_policy=self._policy,
        # A save takes a fraction of a second (docs/reliability.md); its failure is noticed at once.
        enable_async_checkpointing=False,
        lightweight_initialize=True,
        create=not read_only,
        read_only=read_only,
      )
      self.manager = ocp.CheckpointManager(
        self.directory, item_names=("prompts", "opt_state", "meta"), options=options
      )

  def steps(self) -> list[int]:
    """Of all checkpoints, the newest first, as the disk has them now."""
    while True:
      try:
        self.manager.reload()
        return sorted(self.manager.all_steps(), reverse=True)
      except FileNotFoundError:  # a run that goes on has deleted one while it was looked at
        if not self.directory.is_dir():
          raise

  def save(self, state: TrainState, best: dict | None) -> bool:
    """Saves a state of numpy arrays; every process must call it.

    Args:
      state: of a step that has no checkpoint yet.
      best: the best scores so far, with their `step`, whose checkpoint is kept.

    Returns:
      Whether it was saved. Where the disk is full, read-only or gone, a line says so, and the
      checkpoints that are there stay as they are.
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
    # Through JSON, as it will be read.
    meta["seal"] = _seal(json.loads(json.dumps(meta)))
    reason = self._without_room(state)
    if reason is None:
      import orbax.checkpoint as ocp

      args = ocp.args.Composite(
        prompts=ocp.args.StandardSave(state.prompts),
        opt_state=ocp.args.StandardSave(state.opt_state),
        meta=ocp.args.JsonSave(meta),
      )
      try:
        with _quiet():
          self.manager.save(step, args=args)
        return True
      except (OSError, ValueError, RuntimeError) as error:  # tensorstore's, for any failed write
        reason = _reason(error)
    self._clean()
    last = self.steps()
    kept = f"the last good one is of step {last[0]}" if last else "there is none yet"
    _tell(f"step {step}: no checkpoint written to {self.directory} ({reason}); {kept}")
    return False

  def _without_room(self, state: TrainState) -> str | None:
    """Why a checkpoint would not fit, or None; the same in all processes.

    Several processes save together, and one that fails half-way would leave the others waiting:
    so the first one tries beforehand with a file of the same size.
    """
    if jax.process_count() == 1:
      return None
    number = 0
    if jax.process_index() == 0:
      probe = self.directory / ".room"
      try:
        with open(probe, "wb") as file:
          os.posix_fallocate(file.fileno(), 0, 2 * sum(x.nbytes for x in jax.tree.leaves(state)))
      except OSError as error:
        number = error.errno or errno.EIO
      finally:
        probe.unlink(missing_ok=True)
    number = int(multihost_utils.broadcast_one_to_all(np.int32(number)))
    return os.strerror(number) if number else None

  def _clean(self) -> None:
    """Removes what a failed save left, which would take the room of the next."""
    if jax.process_index() == 0:
      until = time.monotonic() + CLEANUP_SECONDS
      pattern = "*.orbax-checkpoint-tmp*"
      while (leftovers := list(self.directory.glob(pattern))) and time.monotonic() < until:
        for leftover in leftovers:
          shutil.rmtree(leftover, ignore_errors=True)
        # Threads of the save may still be writing, and make the folder again.
        time.sleep(0.1)

  def resume(self, like: TrainState) -> tuple[TrainState, dict | None] | None:
    """The newest intact state, as numpy, and the best scores so far; None for a new run.

    A damaged checkpoint is reported and put aside as `<step>.damaged`; the one before it is taken.

    Raises:
      InputError: the checkpoints belong to another run, or none of them is intact.
    """
    self._clean()
    like = jax.device_get(like)
    wanted = {"prompts": like.prompts, "opt_state": like.opt_state}
    steps = self.steps()
    for step in steps:
      if (intact := self._intact(step, wanted)) is None:
        self._put_aside(step)
        continue
      self.manager.reload()
      meta, items = intact
      skipped, consecutive = map(np.int32, meta["skipped"])
      state = TrainState(np.int32(step), items["prompts"], items["opt_state"], skipped, consecutive)
      return state, meta["best"]
    if steps:
      raise InputError(
        f"no intact checkpoint in {self.directory}: those of the steps {steps[::-1]} are damaged; "
        "start over with another --workdir"
      )
    return None

  def _put_aside(self, step: int) -> None:
    if jax.process_index() == 0:
      place = self.directory / f"{step}.damaged"
      shutil.rmtree(place, ignore_errors=True)
      os.rename(self.directory / str(step), place)
    if jax.process_count() > 1:
      multihost_utils.sync_global_devices("damaged checkpoint put aside")

  def read(self, like: dict, best_step: int | None = None) -> dict[str, tuple[int, dict]]:
    """Step and prompts of the newest intact checkpoint, "last", and of the "best" one.

    There is no "best" where it is the newest, or where it is gone.

    Args:
      like: the prompts' shapes and types.
      best_step: of the best one, if that is known better than the newest checkpoint knows it.

    Raises:
      InputError: the checkpoints belong to another run, or there is none intact.
    """
    wanted = {"prompts": jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), like)}
    seen: list[int] = []
    # Again, should a run that goes on have replaced all of them in the meantime.
    while (steps := self.steps()) != seen:
      seen = steps
      for step in steps:
        if (intact := self._intact(step, wanted)) is None:
          continue
        meta, items = intact
        found = {"last": (step, items["prompts"])}
        if best_step not in steps and meta["best"]:
          best_step = meta["best"]["step"]
        # Of several checkpoints with the best score another one may have been kept.
        if best_step in steps and best_step < step and (best := self._intact(best_step, wanted)):
          found["best"] = (best_step, best[1]["prompts"])
        return found
    what = f"those of the steps {seen[::-1]} are damaged" if seen else "train first"
    raise InputError(f"no complete checkpoint in {self.directory}: {what}")

  def _intact(self, step: int, like: dict) -> tuple[dict, dict] | None:
    """Meta and the named items of a checkpoint; None, with a line, if it is damaged."""
    try:
      meta = self._meta(step)
      return meta, self._items(step, meta, like)
    except Damaged as error:
      if (self.directory / str(step)).is_dir():  # a run that goes on deletes old ones
        _tell(f"the checkpoint of step {step} is damaged ({error}): taking the one before it")
      return None

  def _meta(self, step: int) -> dict:
    """The JSON item of a checkpoint, checked to be intact and of this run."""
    import orbax.checkpoint as ocp

    args = ocp.args.Composite(meta=ocp.args.JsonRestore())
    meta = self._restore(step, args)["meta"]
    if not isinstance(meta, dict) or meta.get("seal", _seal(meta)) != _seal(meta):
      raise Damaged("its meta does not have the checksum it was saved with")
    if "version" in meta and "seal" not in meta:
      raise Damaged("its meta has lost its checksum")
    try:
      meta = upgraded(meta, self.directory)
      stored = meta["identity"]
      _ = stored["config"], meta["best"]
    except (KeyError, TypeError) as error:
      raise Damaged(f"its meta is incomplete: {_reason(error)}") from error
    check_identity(self.directory, stored, self.identity)
    return meta

  def _items(self, step: int, meta: dict, like: dict) -> dict:
    """The named items with the shapes and types of `like`, checked against their checksums."""
    import orbax.checkpoint as ocp

    args = {name: ocp.args.StandardRestore(tree) for name, tree in like.items()}
    items = self._restore(step, ocp.args.Composite(**args))
    for name, tree in like.items():
      _same_shapes(tree, items[name], self.directory / str(step) / name)
      checksum = meta["checksums"].get(name)
      if checksum is not None and digest(jax.device_get(items[name])) != checksum:
        raise Damaged(f"its {name} do not have the checksum they were saved with")
    return {name: items[name] for name in like}

  def _restore(self, step: int, args: Any) -> Any:
    with _quiet():
      try:
        return self.manager.restore(step, args=args)
      except Exception as error:  # damaged files raise all kinds of errors
        raise Damaged(_reason(error)) from None

  def close(self) -> None:
    """Ends the manager; a second call does nothing."""
    self.manager.close()


def _same_shapes(want: Any, got: Any, where: object) -> None:
  """Orbax takes another shape than it was asked for without a word."""
  shapes = lambda tree: {
    jax.tree_util.keystr(path): np.shape(leaf)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }
  if changed := differences(shapes(got), shapes(want)):
    raise InputError(
      f"{where} has other shapes than this network (there -> here: {changed[0]}): use the version "
      "of rpn_jax that wrote it, or another --workdir"
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """What is damaged is told in one line, not in orbax's pages and its coroutines' last words."""
  verbosity, hook = logging.get_verbosity(), sys.unraisablehook
  logging.set_verbosity(logging.FATAL)
  sys.unraisablehook = lambda _: None
  try:
    with warnings.catch_warnings():
      warnings.simplefilter("ignore", RuntimeWarning)
      try:
        yield
      except Exception:
        gc.collect()
        raise
  finally:
    sys.unraisablehook = hook
    logging.set_verbosity(verbosity)


def _tell(line: str) -> None:
  print(line, flush=True)


def _reason(error: BaseException) -> str:
  """The first words of an error: those of tensorstore go on for pages."""
  if isinstance(error, OSError) and error.strerror:
    return error.strerror
  text = " ".join(str(error).split())
  for number in (errno.ENOSPC, errno.EROFS, errno.EFBIG, errno.EDQUOT, errno.EACCES, errno.EIO):
    if os.strerror(number).lower() in text.lower():
      return os.strerror(number)
  return f"{type(error).__name__}: {text[:120]}"
