"""A small training state, and checkpoints of it."""

import contextlib

import jax
import numpy as np

from rpn_jax.training.checkpoint import Checkpoints
from rpn_jax.training.step import TrainState

IDENTITY = {"clip": "0" * 16, "config": {"seed": 0, "optimizer": {"clip_norm": 0.0}}}


def state_at(step: int, size: int = 40) -> TrainState:
  rng = np.random.default_rng(step)
  prompts = {"h": rng.normal(size=(size, 8)).astype(np.float32), "head": {"b": np.ones(4, "f")}}
  moments = jax.tree.map(lambda x: x * 2, prompts)
  return TrainState(np.int32(step), prompts, {"mu": moments, "count": np.int32(step)},
                    np.int32(3), np.int32(1))  # fmt: skip


LIKE = state_at(0)


def opened(workdir, **changes) -> contextlib.closing:
  return contextlib.closing(Checkpoints(workdir, {**IDENTITY, **changes}))


def reading(workdir):
  return contextlib.closing(Checkpoints(workdir, IDENTITY, read_only=True))


def same(got: TrainState, step: int):
  want = state_at(step)
  jax.tree.map(np.testing.assert_array_equal, got, want)
  assert jax.tree.structure(got) == jax.tree.structure(want)


def folders(workdir) -> list[str]:
  return sorted(p.name for p in (workdir / "checkpoints").iterdir())
