"""The workdir of a run: held by one process at a time."""

import contextlib
import pathlib
from collections.abc import Iterator

import jax

from rpn_jax.base.errors import InputError
from rpn_jax.base.paths import locked

LOCK = ".lock"


@contextlib.contextmanager
def held_workdir(workdir: pathlib.Path) -> Iterator[None]:
  """Holds the workdir for this run's first process, on behalf of all of them.

  Raises:
    InputError: another run holds it, with the name of its process.
  """
  if jax.process_index():
    yield
    return
  path = workdir / LOCK
  with contextlib.ExitStack() as stack:
    try:
      workdir.mkdir(parents=True, exist_ok=True)
      stack.enter_context(locked(path, str(workdir), "use another --workdir"))
    except OSError as error:
      raise InputError(
        f"expected a workdir to write to, {path} cannot be opened ({error.strerror}): use another "
        "--workdir"
      ) from error
    yield
