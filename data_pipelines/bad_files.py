"""The raw files of a data set that cannot be used, told together."""

import sys
from collections.abc import Iterable, Iterator

from rpn_jax.base.errors import InputError

# After so many, preparing ends: they are probably all of a kind.
MAX_LISTED = 50


class BadFiles:
  """Raw files that cannot be used: all are told at once, so that they are mended at once."""

  def __init__(self):
    self._errors: list[InputError] = []

  def left_out(self, results: Iterable) -> Iterator:
    """The results that are no errors. A shard without some of its examples is not finished."""
    for result in results:
      if isinstance(result, InputError):
        self._errors.append(result)
        if len(self._errors) == MAX_LISTED:
          self.check()
      else:
        yield result

  def check(self) -> None:
    """Lists the files.

    Raises:
      InputError: there are some.
    """
    if len(self._errors) == 1:
      raise self._errors[0]
    if self._errors:
      print(*self._errors, sep="\n", file=sys.stderr, flush=True)
      least = "at least " if len(self._errors) == MAX_LISTED else ""
      raise InputError(
        f"{least}{len(self._errors)} files cannot be used, for the reasons above: correct or "
        "remove them and run the same command again"
      )
