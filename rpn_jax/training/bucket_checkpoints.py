"""Checkpoints of a run whose workdir is in a bucket, where no folder can be renamed.

A checkpoint is written to a local disk by Orbax, copied by the first process, and counts as there
once its last object is, Orbax's commit mark. Reading copies it to a disk, too: formats and checks
are those of `training.checkpoint`.

What has no mark is the rest of a save that was cut off, or was copied here by other means, such as
`gcloud storage cp`: it is used if all checksums hold, else put aside, and never deleted.
"""

import contextlib
import errno
import os
import pathlib
import tempfile
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import jax

from rpn_jax.base import buckets
from rpn_jax.devices import wait_for_all
from rpn_jax.training.checkpoint import Checkpoints, LatestAndBest, handlers
from rpn_jax.training.step import TrainState
from rpn_jax.training.together import together
from rpn_jax.training.unreadable import DamagedCheckpoint, reason_of

# Orbax's name.
MARK = "commit_success.txt"
# How long the other processes wait for the first one to copy a checkpoint.
UPLOAD_SECONDS = 1800


class BucketCheckpoints(Checkpoints):
  """See `Checkpoints`, which has the arguments."""

  def __init__(self, workdir: pathlib.Path, identity: dict, *, read_only: bool = False):
    self.identity = identity
    self.directory = workdir / "checkpoints"
    self._policy = LatestAndBest()
    self._begun: set[int] = set()  # by this process, and not finished
    self._saves = 0
    del read_only  # only `save` and `resume` write

  def steps(self) -> list[int]:
    """Steps of the checkpoints in the bucket that have a mark, newest first.

    Raises:
      OSError: the folder cannot be listed.
    """
    return [step for step in self._candidates() if self._is_complete(step)]

  def _candidates(self) -> list[int]:
    return sorted(
      {int(path.name) for path in self._folders() if path.name.isdecimal()}, reverse=True
    )

  def _folders(self) -> list[pathlib.Path]:
    try:
      return list(self.directory.iterdir())
    except FileNotFoundError:
      return []

  def _write(self, step: int, args: Any) -> None:
    """Writes a checkpoint in the first process; an error is raised in all of them."""
    self._saves += 1

    def write() -> None:
      try:
        if jax.process_index() == 0:
          self._write_alone(step, args)
      finally:
        wait_for_all(f"the copy of checkpoint {step}", UPLOAD_SECONDS)

    together(write)

  def _write_alone(self, step: int, args: Any) -> None:
    import orbax.checkpoint as ocp

    alone: dict[str, Any] = {}
    if jax.process_count() > 1:
      alone["multiprocessing_options"] = ocp.options.MultiprocessingOptions(
        primary_host=0, active_processes={0}, barrier_sync_key_prefix=f"save{self._saves}"
      )
    handler = ocp.CompositeCheckpointHandler(
      composite_options=ocp.CompositeOptions(**alone), **handlers(**alone)
    )
    target = self.directory / str(step)
    self._make_room(step)
    with tempfile.TemporaryDirectory(prefix="rpn_checkpoint_") as folder:
      local = pathlib.Path(folder, str(step))
      with contextlib.closing(ocp.Checkpointer(handler, **alone)) as checkpointer:
        try:
          checkpointer.save(local, args=args)
        except (ValueError, RuntimeError) as error:  # as where the local disk is full
          raise OSError(errno.EIO, f"{reason_of(error)}: {folder}") from error
      self._begun.add(step)
      # Orbax marks what is on a disk, too.
      files = [path for path in local.rglob("*") if path.is_file() and path != local / MARK]
      # What says that the others are there goes last.
      for last in (False, True):
        wave = [path for path in files if (path.parent.name == "meta") == last]
        buckets.each(
          lambda path: buckets.upload(path, target / path.relative_to(local).as_posix()), wave
        )
    (target / MARK).write_text(f"Checkpoint commit was successful to {target}")
    self._begun.discard(step)
    with contextlib.suppress(OSError):  # next time
      self._remove_old()

  def _make_room(self, step: int) -> None:
    """Clears the name of a step from what is there and no checkpoint."""
    target = self.directory / str(step)
    if step in self._begun:
      _remove(target)
    elif target.exists():
      name = self._free_name(f"{step}.incomplete")
      target.rename(self.directory / name)
      print(f"what was in {target} has no commit mark: renamed to {name}", flush=True)

  def _remove_old(self) -> None:
    """Removes checkpoints that are neither new nor the best, and rests of own saves that failed."""
    for step in sorted(self._begun):
      if not self._is_complete(step):
        _remove(self.directory / str(step))
      self._begun.discard(step)
    complete = [SimpleNamespace(step=step) for step in reversed(self.steps())]
    for info, kept in zip(complete, self._policy.should_preserve(complete, context=None)):
      if not kept:
        _remove(self.directory / str(info.step))

  def _out_of_space(self, state: TrainState) -> str | None:
    return None

  def _remove_leftovers(self) -> None:
    pass

  def _settle(self, step: int) -> None:
    """Marks the step to resume at, if it was copied here without its mark."""

    def mark() -> None:
      if jax.process_index() == 0 and not self._is_complete(step):
        (self.directory / str(step) / MARK).write_text("found intact")

    together(mark)

  def _refuse(self, damaged: dict[int, str]) -> None:
    """What a first save left that was cut off is put aside: the run is as new as on a disk."""
    if any(self._is_complete(step) or self._holds_meta(step) for step in damaged):
      super()._refuse(damaged)
    for step in damaged:
      name = self._set_aside(step)
      print(f"the save of step {step} was cut off: renamed to {name}, beginning anew", flush=True)

  def _holds_meta(self, step: int) -> bool:
    return (self.directory / str(step) / "meta" / "metadata").exists()

  def _aside_name(self, step: int) -> str:
    return f"{step}.{'damaged' if self._is_complete(step) else 'incomplete'}"

  def _is_complete(self, step: int) -> bool:
    return (self.directory / str(step) / MARK).exists()

  @contextlib.contextmanager
  def _local(self, step: int) -> Iterator[pathlib.Path]:
    """A copy of a checkpoint on a disk."""
    source = self.directory / str(step)
    if not self._holds_meta(step):  # the last but one that is written
      raise DamagedCheckpoint("its save was cut off")
    with tempfile.TemporaryDirectory(prefix="rpn_checkpoint_") as folder:
      local = pathlib.Path(folder, str(step))
      found = [path for path, _ in buckets.walk(source)]

      def fetch(path: pathlib.Path) -> None:
        target = local / os.fspath(path).removeprefix(f"{os.fspath(source)}/")
        target.parent.mkdir(parents=True, exist_ok=True)
        buckets.download(path, target)

      buckets.each(fetch, found)
      yield local

  def close(self) -> None:
    """Nothing is open."""


def _remove(folder: pathlib.Path) -> None:
  """Removes a checkpoint, its mark first, so that half of one is never taken for a whole."""
  (folder / MARK).unlink(missing_ok=True)
  buckets.each(
    lambda path: path.unlink(missing_ok=True), [path for path, _ in buckets.walk(folder)]
  )
