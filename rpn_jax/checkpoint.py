"""Checkpoints of a run: prompts, optimizer state and meta, never the frozen tower."""

import json
import pathlib

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from rpn_jax.errors import InputError
from rpn_jax.step import TrainState

# Config fields that may differ between a run and its continuation: they change neither what is
# trained nor in which order.
FREE_FIELDS = (
  "log_every", "eval_every", "data_dir", "workers", "threads", "parallel", "shard_state", "remat"
)  # fmt: skip
# Nor do these, although they change scores: a trained run may be evaluated in many ways.
EVALUATION_FIELDS = ("eval", "short_side", "eval_images")


def identity(config, fingerprint: str) -> dict:
  """What has to be equal for a checkpoint to belong to a run: tower and config."""
  free = (*FREE_FIELDS, *EVALUATION_FIELDS)

  def strip(tree):
    if isinstance(tree, dict):
      return {k: strip(v) for k, v in sorted(tree.items()) if k not in free}
    return tree

  # Through JSON, so that tuples and lists compare equal after a round trip.
  return json.loads(json.dumps({"clip": fingerprint, "config": strip(config.to_dict())}))


def differences(old, new, path="") -> list[str]:
  """Readable lines `path: old value -> new value`."""
  if isinstance(old, dict) and isinstance(new, dict):
    keys = sorted(old.keys() | new.keys())
    lines = [differences(old.get(k), new.get(k), f"{path}.{k}" if path else k) for k in keys]
    return [line for part in lines for line in part]
  return [] if old == new else [f"{path}: {old} -> {new}"]


def other_run(path, changed: list[str]) -> InputError:
  """The error for files of another run, with what differs."""
  shown = "; ".join(changed[:3]) + (f"; {len(changed) - 3} more" if len(changed) > 3 else "")
  return InputError(
    f"{path} belongs to another run (there -> asked for: {shown}): "
    "use another --workdir, or the old settings"
  )


class Checkpoints:
  """The checkpoints under `workdir/checkpoints`: the latest and the best by one metric.

  Args:
    workdir: of the run.
    identity: see `identity`; stored with every checkpoint and compared before a restore.
    metric: name of the metric that ranks checkpoints, higher is better.
  """

  def __init__(self, workdir: pathlib.Path, identity: dict, metric: str):
    self.identity = identity
    self.directory = (pathlib.Path(workdir) / "checkpoints").absolute()
    policies = checkpoint_managers
    keep = policies.AnyPreservationPolicy(
      [
        policies.LatestN(1),
        policies.BestN(
          get_metric_fn=lambda m: m[metric], n=1, keep_checkpoints_without_metrics=False
        ),
      ]
    )
    self.manager = ocp.CheckpointManager(
      self.directory,
      item_names=("prompts", "opt_state", "meta"),
      options=ocp.CheckpointManagerOptions(
        preservation_policy=keep, enable_async_checkpointing=True, create=True
      ),
    )

  def latest_step(self) -> int | None:
    return self.manager.latest_step()

  def save(self, state: TrainState, metrics: dict, meta: dict) -> None:
    """Saves a state of numpy arrays in the background; every process must call it.

    `metrics` must hold the ranking metric.
    """
    step = int(state.step)
    self.manager.save(
      step,
      args=ocp.args.Composite(
        prompts=ocp.args.StandardSave(state.prompts),
        opt_state=ocp.args.StandardSave(state.opt_state),
        meta=ocp.args.JsonSave({"step": step, "identity": self.identity, **meta}),
      ),
      metrics=metrics,
    )

  def meta(self, step: int) -> dict:
    """The JSON item of a checkpoint, after checking that it belongs to this run."""
    args = ocp.args.Composite(meta=ocp.args.JsonRestore())
    meta = self.manager.restore(step, args=args)["meta"]
    changed = differences(meta["identity"], self.identity)
    if changed:
      raise other_run(self.directory, changed)
    return meta

  def restore(self, step: int, like: TrainState) -> TrainState:
    """The state at `step` as numpy, with the shapes and types of `like`."""
    like = jax.device_get(like)
    items = self.manager.restore(
      step,
      args=ocp.args.Composite(
        prompts=ocp.args.StandardRestore(like.prompts),
        opt_state=ocp.args.StandardRestore(like.opt_state),
      ),
    )
    return TrainState(np.int32(step), items["prompts"], items["opt_state"])

  def restore_prompts(self, step: int, like: dict) -> dict:
    """Only the prompts, for evaluation and prediction."""
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), like)
    args = ocp.args.Composite(prompts=ocp.args.StandardRestore(abstract))
    return self.manager.restore(step, args=args)["prompts"]

  def close(self) -> None:
    """Waits for a save under way; a second call does nothing."""
    self.manager.wait_until_finished()
    self.manager.close()
