"""Files that list the classes of masks: a name per line, with or without its color."""

import dataclasses
import pathlib
import re
from collections.abc import Mapping

from data_pipelines.sources.files import ColorTable, read_lines
from data_pipelines.sources.own_data import IGNORED_NAMES
from rpn_jax.base.errors import InputError
from rpn_jax.base.words import composed

# CVAT's, in which comments and further fields (parts, actions) are left out.
LABELMAP = "labelmap.txt"
_COLORED = re.compile(r"(.*?)\s*:\s*(\d{1,3})\s*,\s*(\d{1,3})\s*,\s*(\d{1,3})\s*(?::.*)?")
_WITHOUT_COLOR = re.compile(r"([^:]*?)\s*:\s*:.*")


@dataclasses.dataclass(frozen=True)
class ClassFile:
  """What a file of class names says.

  Attributes:
    path: of the file.
    names: in the order of the lines.
    colors: (red, green, blue) of every name, or None.
  """

  path: pathlib.Path
  names: tuple[str, ...]
  colors: tuple[tuple[int, int, int], ...] | None = None

  @property
  def classes(self) -> list[str]:
    """The names without those that stand, with their color, for pixels of no class."""
    return [n for n in self.names if self.colors is None or n not in IGNORED_NAMES]

  def table(self, labels: Mapping[str, int]) -> ColorTable:
    """Reads masks of the colors; `labels` has all names."""
    assert self.colors is not None
    colors = zip(self.colors, self.names, strict=True)
    return ColorTable({color: labels[name] for color, name in colors}, self.path)


def read(path: pathlib.Path) -> ClassFile:
  """The names, and colors, of `names.txt` and the like, or of CVAT's `labelmap.txt`.

  Raises:
    InputError: no text, a line without a name, a name or color twice, or colors of some names.
  """
  lines = [composed(line) for line in read_lines(path, "class names, one per line,")]
  if path.name == LABELMAP:
    lines = [line for line in lines if line and not line.startswith("#")]
    lines = [found[1] if (found := _WITHOUT_COLOR.fullmatch(line)) else line for line in lines]
  while lines and not lines[-1]:  # as editors leave them behind the last name
    lines.pop()
  if not lines:
    raise InputError(f"{path}: expected one name per line, got an empty file; write the names")
  found = [_COLORED.fullmatch(line) for line in lines]
  colored = [match for match in found if match]
  if colored and len(colored) < len(lines):
    plain = next(line for line, match in zip(lines, found) if not match)
    raise InputError(
      f"{path}: expected the color of every class behind its name, as in {colored[0][0]!r}, or of "
      f"none, got {plain!r} too; write its color"
    )
  names = [match[1] for match in colored] if colored else lines
  _check_different(path, "name", names)
  if not colored:
    return ClassFile(path, tuple(names))
  colors = [tuple(int(match[i]) for i in (2, 3, 4)) for match in colored]
  if wrong := [color for color in colors if max(color) > 255]:
    raise InputError(f"{path}: expected colors of 0…255, got {_text(wrong[0])}; correct it")
  _check_different(path, "color", [_text(color) for color in colors])
  return ClassFile(path, tuple(names), tuple(colors))


def _check_different(path: pathlib.Path, what: str, entries: list[str]) -> None:
  """None blank and none twice, since the line number is the id."""
  first: dict[str, int] = {}
  for number, entry in enumerate(entries, 1):
    if not entry or first.setdefault(entry, number) != number:
      got = f"{entry!r} in lines {first[entry]} and {number}" if entry else f"none in line {number}"
      raise InputError(f"{path}: expected a different {what} in every line, got {got}; correct it")


def _text(color: tuple[int, ...]) -> str:
  return ",".join(map(str, color))
