"""Checkpoints of a run: prompts, optimizer state and metadata, never the frozen tower.

A checkpoint is a folder `checkpoints/<step>`, which Orbax writes atomically. Its `meta` item holds
checksums of the other items and of itself, so that later damage on disk is detected. What cannot be
read at the moment is not damaged: it stops the run and is left as it is (see
`training.unreadable`). Reading is done without Orbax, for the reason given in
`training.stored_trees`.
"""

import contextlib
import errno
import gc
import json
import os
import pathlib
import shutil
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from rpn_jax.base.errors import InputError
from rpn_jax.base.paths import expand
from rpn_jax.training.checkpoint_format import FORMAT_VERSION, seal, upgrade
from rpn_jax.training.identity import check_identity
from rpn_jax.training.step import TrainState
from rpn_jax.training.stored_trees import check_shapes, check_types, digest, read_tree
from rpn_jax.training.together import together
from rpn_jax.training.unreadable import (
  DamagedCheckpoint,
  quiet,
  read_files,
  reason_of,
  system_error,
)

# Newest checkpoints that are kept, besides the best one. Two, in case the newest gets damaged.
KEPT_CHECKPOINTS = 2

# Checkpoints that several processes look at, the newest first: more than are ever kept.
MAX_STEPS = 64

# How long to retry removing the temporary folders of a failed save.
CLEANUP_SECONDS = 5


def handlers(**options: Any) -> dict[str, Any]:
  """Orbax's handler of each item, so that a new process knows the types of what another saved."""
  import orbax.checkpoint as ocp

  return {
    "prompts": ocp.StandardCheckpointHandler(**options),
    "opt_state": ocp.StandardCheckpointHandler(**options),
    "meta": ocp.JsonCheckpointHandler(**options),
  }


class LatestAndBest:
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
    self.directory = (expand(workdir) / "checkpoints").absolute()
    self._policy = LatestAndBest()
    import orbax.checkpoint as ocp  # takes a second, so only where it is needed

    with quiet():
      options = ocp.CheckpointManagerOptions(
        preservation_policy=self._policy,
        # A save takes a fraction of a second (docs/reliability.md); its failure shows at once.
        enable_async_checkpointing=False,
        lightweight_initialize=True,
        create=not read_only,
        read_only=read_only,
      )
      self.manager = ocp.CheckpointManager(
        self.directory, item_handlers=handlers(), options=options
      )

  def steps(self) -> list[int]:
    """Steps of the checkpoints on disk, newest first: folders appear by one rename, complete.

    Raises:
      OSError: the folder cannot be listed.
    """
    found = [int(x.name) for x in self._folders() if x.name.isdecimal() and x.is_dir()]
    return sorted(found, reverse=True)

  def _candidates(self) -> list[int]:
    """Steps at which a checkpoint may be found, newest first."""
    return self.steps()

  def _folders(self) -> list[pathlib.Path]:
    """What is in the folder of the checkpoints."""
    return list(self.directory.iterdir())

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
    meta["seal"] = seal(json.loads(json.dumps(meta)))
    reason = self._out_of_space(state)
    if reason is None:
      import orbax.checkpoint as ocp

      args = ocp.args.Composite(
        prompts=ocp.args.StandardSave(state.prompts),
        opt_state=ocp.args.StandardSave(state.opt_state),
        meta=ocp.args.JsonSave(meta),
      )
      with quiet():
        try:
          self._write(step, args)
          return True
        except (OSError, ValueError, RuntimeError) as error:  # tensorstore: any failed write
          reason = reason_of(error)
        self._remove_leftovers()
        gc.collect()  # while quiet; see `quiet`
    try:
      steps = self.steps()
      last = f"the last good one is of step {steps[0]}" if steps else "there is none yet"
    except OSError as error:
      last = f"the folder cannot be listed: {reason_of(error)}"
    _report(f"step {step}: no checkpoint written to {self.directory} ({reason}); {last}")
    return False

  def _write(self, step: int, args: Any) -> None:
    """Writes a checkpoint, which is there from one moment to the next, and removes old ones."""
    self.manager.save(step, args=args)

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

    Damaged checkpoints that are newer are renamed to `<step>.damaged`, which is reported. Several
    processes agree on what is damaged.

    Raises:
      InputError: a checkpoint cannot be read at the moment, all of them are damaged, or they belong
        to another run. All are left as they are. In all processes, if in one.
      OSError: the folder cannot be listed, or what is damaged not renamed; in all processes, too.
    """
    like = jax.device_get(like)
    wanted = {"prompts": like.prompts, "opt_state": like.opt_state}
    damaged: dict[int, str] = {}
    for step in self._agreed_steps():
      try:
        meta, items = together(self._intact, step, wanted)
      except DamagedCheckpoint as error:
        damaged[step] = str(error)
        continue
      # Only now: that an older one is intact shows that it is not all reading that fails.
      for other, reason in damaged.items():
        name = self._set_aside(other)
        _report(f"the checkpoint of step {other} is damaged ({reason}): renamed to {name}, using "
                f"that of step {step}")  # fmt: skip
      self._remove_leftovers()
      self._settle(step)
      skipped, consecutive = map(np.int32, meta["skipped"])
      state = TrainState(np.int32(step), items["prompts"], items["opt_state"], skipped, consecutive)
      return state, meta["best"]
    if damaged:
      self._refuse(damaged)
    together(self._check_none_aside)
    self._remove_leftovers()
    return None

  def _settle(self, step: int) -> None:
    """Called once the step to resume at is known."""
    del step
    with quiet():
      self.manager.reload()

  def _refuse(self, damaged: dict[int, str]) -> None:
    """Called where no checkpoint is intact."""
    raise InputError(
      f"no intact checkpoint in {self.directory}: {_listed(damaged)}, and left as they are; "
      "start over with --restart or a new --workdir"
    )

  def _agreed_steps(self) -> list[int]:
    """`steps` of the first process, since file systems may show the others an earlier state."""
    steps = together(self._candidates)
    if jax.process_count() > 1:
      padded = np.full(MAX_STEPS, -1, np.int32)
      padded[: len(steps)] = steps[:MAX_STEPS]
      steps = [int(x) for x in multihost_utils.broadcast_one_to_all(padded) if x >= 0]
    return steps

  def _check_none_aside(self) -> None:
    aside = sorted(path.name for path in self._folders() if ".damaged" in path.name)
    if aside:
      raise InputError(
        f"{self.directory} has only checkpoints that were set aside: {', '.join(aside)}; rename "
        "one to its step to have it checked again, or start over with --restart"
      )

  def _set_aside(self, step: int) -> str:
    """Renames a damaged checkpoint in the first process; returns its new name."""
    name = self._free_name(self._aside_name(step))
    if jax.process_count() > 1:
      multihost_utils.sync_global_devices("damaged checkpoint named")

    def rename() -> None:
      if jax.process_index() == 0:
        (self.directory / str(step)).rename(self.directory / name)

    together(rename)
    return name

  def _aside_name(self, step: int) -> str:
    return f"{step}.damaged"

  def _free_name(self, wanted: str) -> str:
    """The name, with a number behind it if what has it is of an earlier time and worth keeping."""
    name, count = wanted, 1
    while (self.directory / name).exists():
      count += 1
      name = f"{wanted}{count}"
    return name

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
    damaged: dict[int, str] = {}
    # Retried in case a running job replaced all of them in the meantime.
    while (steps := self._candidates()) != seen:
      seen, damaged = steps, {}
      for step in steps:
        if (intact := self._intact_or_none(step, wanted, damaged)) is None:
          continue
        for other, reason in damaged.items():
          _report(
            f"the checkpoint of step {other} is damaged ({reason}): using that of step {step}"
          )
        meta, items = intact
        found = {"last": (step, items["prompts"])}
        if best_step not in steps and meta["best"]:
          best_step = meta["best"]["step"]
        # With ties for the best score, a different one may have been kept.
        if best_step in steps and best_step < step:
          if best := self._intact_or_none(best_step, wanted, damaged):
            found["best"] = (best_step, best[1]["prompts"])
          elif best_step in damaged:
            _report(f"the best checkpoint, of step {best_step}, is damaged ({damaged[best_step]})")
        return found
    what = _listed(damaged) if damaged else "train first"
    raise InputError(f"no complete checkpoint in {self.directory}: {what}")

  def _intact_or_none(
    self, step: int, like: dict, damaged: dict[int, str]
  ) -> tuple[dict, dict] | None:
    """`_intact`; None if it is not, with an entry in `damaged` unless a running job deleted it."""
    try:
      return self._intact(step, like)
    except DamagedCheckpoint as error:
      if self._is_complete(step):
        damaged[step] = str(error)
      return None

  def _is_complete(self, step: int) -> bool:
    """Whether a checkpoint is there, intact or not."""
    return (self.directory / str(step)).is_dir()

  @contextlib.contextmanager
  def _local(self, step: int) -> Iterator[pathlib.Path]:
    """The folder of a checkpoint on a disk."""
    yield self.directory / str(step)

  def _intact(self, step: int, like: dict) -> tuple[dict, dict]:
    """Metadata and the items named in `like` of a checkpoint.

    Raises:
      DamagedCheckpoint: it fails a checksum or cannot be parsed.
      InputError: it cannot be read at the moment, or belongs to another run.
    """
    folder = self.directory / str(step)  # as people know it
    with self._reading(step), self._local(step) as local:
      read_files(local)
      meta = self._checked_meta(json.loads((local / "meta" / "metadata").read_bytes()))
      if meta.get("step", step) != step:
        raise DamagedCheckpoint(f"it is that of step {meta['step']}; its folder was renamed")
      items = {name: read_tree(local / name, tree) for name, tree in like.items()}
    for name, tree in like.items():
      check_shapes(tree, items[name], folder / name)
      checksum = meta["checksums"].get(name)
      if checksum is not None and digest(items[name]) != checksum:
        raise DamagedCheckpoint(f"the checksum of its {name} does not match")
      check_types(items[name], tree, folder / name)
    return meta, items

  @contextlib.contextmanager
  def _reading(self, step: int) -> Iterator[None]:
    """Sorts what can go wrong in reading a checkpoint into the two errors of `_intact`."""
    folder = self.directory / str(step)
    try:
      yield
    except (DamagedCheckpoint, InputError):
      raise
    except FileNotFoundError as error:
      raise DamagedCheckpoint("a file is missing") from error
    except Exception as error:  # damaged files raise all kinds of errors
      refused = system_error(error)
      if isinstance(error, OSError):
        refused = f"{error.strerror}: {error.filename or folder}"
      if refused is None:
        raise DamagedCheckpoint(reason_of(error)) from error
      raise InputError(
        f"the checkpoint of step {step} in {self.directory} cannot be read ({refused}); it may be "
        "intact and was left as it is: mend the cause and run the same command again"
      ) from error

  def _checked_meta(self, meta: Any) -> dict:
    """A `meta` item in the current format, checked to be intact and from this run."""
    if not isinstance(meta, dict) or meta.get("seal", seal(meta)) != seal(meta):
      raise DamagedCheckpoint("the checksum of its metadata does not match")
    if "version" in meta and "seal" not in meta:
      raise DamagedCheckpoint("the checksum of its metadata is missing")
    try:
      meta = upgrade(meta, self.directory)
      stored = meta["identity"]
      _ = stored["config"], meta["best"]
    except (KeyError, TypeError) as error:
      raise DamagedCheckpoint(f"its metadata is incomplete: {reason_of(error)}") from error
    check_identity(self.directory, stored, self.identity)
    return meta

  def close(self) -> None:
    """Closes the manager; a second call does nothing."""
    self.manager.close()


def _report(line: str) -> None:
  print(line, flush=True)


def _listed(damaged: dict[int, str]) -> str:
  newest = max(damaged)
  return f"those of steps {sorted(damaged)} are damaged (step {newest}: {damaged[newest]})"
