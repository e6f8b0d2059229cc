"""Forked processes, in which JAX would wait forever."""

import os

from rpn_jax.base.errors import InputError

# The process that uses JAX for inference, or that this one was forked from.
_owner: int | None = None


def check_not_forked() -> None:
  """Refuses to use JAX in a process that was forked from one that has used it for inference.

  A fork does not copy JAX's threads, so that the first call would wait for them without a word.

  Raises:
    InputError: this is such a process.
  """
  global _owner
  if _owner is None:
    _owner = os.getpid()
  if _owner != os.getpid():
    raise InputError(
      f"process {os.getpid()} was forked from {_owner}, which had loaded a model; JAX does not "
      'work in it: start processes with multiprocessing.get_context("spawn"), or load the model '
      "only after the fork"
    )
