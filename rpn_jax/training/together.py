"""Several processes of a run that do the same and must agree on how it ended."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from rpn_jax.base.errors import InputError
from rpn_jax.training.unreadable import DamagedCheckpoint

# What may end the same call in all processes, the worst last: the one that is reported.
AGREED_ERRORS = (DamagedCheckpoint, OSError, InputError)

# Bytes of an error's message that reach the other processes.
MESSAGE_BYTES = 2048


def together(action: Callable[..., Any], *args: Any) -> Any:
  """The result of an action that succeeds in all processes of a run, or the same error in all."""
  if jax.process_count() == 1:
    return action(*args)
  error: Exception | None = None
  result, mine = None, np.zeros(1 + MESSAGE_BYTES, np.uint8)
  try:
    result = action(*args)
  except AGREED_ERRORS as raised:
    error, text = raised, str(raised).encode()[:MESSAGE_BYTES]
    mine[0] = 1 + next(i for i, kind in enumerate(AGREED_ERRORS) if isinstance(raised, kind))
    mine[1 : 1 + len(text)] = np.frombuffer(text, np.uint8)
  everyone = multihost_utils.process_allgather(mine)
  process = int(np.argmax(everyone[:, 0]))
  kind, text = everyone[process, 0], bytes(everyone[process, 1:]).rstrip(b"\0")
  if kind:
    message = f"process {process}: {text.decode(errors='replace')}"
    raise AGREED_ERRORS[kind - 1](message) from error
  return result
