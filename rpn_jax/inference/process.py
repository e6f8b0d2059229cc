"""What a process must be like for inference to work in it."""

import os

import jax.numpy as jnp

from rpn_jax.base.errors import InputError

# The process that uses JAX for inference, or that this one was forked from.
_owner: int | None = None


def check_process() -> None:
  """Refuses to compute in a process in which JAX would wait forever, or compute in other types.

  A fork does not copy JAX's threads: the first call would wait for them without a word.

  Raises:
    InputError: the process was forked from one that had used JAX for inference, or JAX's 64-bit
      types are on.
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
  if jnp.result_type(float) != jnp.float32:
    raise InputError(
      "expected JAX's 32-bit types, but JAX_ENABLE_X64 is set: unset it, or wrap the call in "
      "`with jax.enable_x64(False):`"
    )
