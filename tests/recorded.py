"""Arrays recorded from official codes: which of a set a test has asked for."""

import pathlib
import re

import numpy as np


class Recorded:
  """The arrays of a file, which remembers those that were asked for.

  Args:
    path: of the file.
    used: file name -> names of its arrays that were asked for; of one set.
  """

  def __init__(self, path: pathlib.Path, used: dict[str, set[str]]):
    self.name = path.name
    self.arrays = np.load(path)
    self.used = used.setdefault(path.name, set())

  def __getitem__(self, key):
    self.used.add(key)
    return self.arrays[key]

  def __contains__(self, key):
    return key in self.arrays.files


def check_all_used(directory: pathlib.Path, used: dict[str, set[str]], not_replayed) -> None:
  """Asserts that every array was asked for, or is listed as (file, pattern of names, reason)."""
  for path in directory.glob("*.npz"):
    left = set(np.load(path).files) - used.get(path.name, set())
    reasons = [pattern for name, pattern, _ in not_replayed if name == path.name]
    left = {key for key in left if not any(re.fullmatch(p, key) for p in reasons)}
    assert not left, f"{path.name}: {sorted(left)[:5]} are not compared"
