"""Config fields, declared once as dataclass fields: their ConfigDicts and their checks."""

import dataclasses
import functools
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

from ml_collections import config_dict

from rpn_jax.base.errors import InputError
from rpn_jax.base.paths import expand
from rpn_jax.base.words import check_known

# Larger numbers are typos, or lead to runs that never end.
MAX_VALUE = 1 << 40
# Default of fields that only some configs have.
ABSENT = object()

Config: TypeAlias = config_dict.ConfigDict | dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Spec:
  """Properties of a field besides its type and default.

  Attributes:
    comment: meaning and unit.
    words: allowed values; () allows all.
    at_least, above, at_most: bounds of a number, or of every number in a tuple.
    is_path: expand a leading `~`.
    free: may change when a run is resumed, since it affects neither training nor its order.
    evaluation: may change for an evaluation, since it affects scores only.
  """

  comment: str
  words: tuple[str, ...] = ()
  at_least: float = -MAX_VALUE
  above: float | None = None
  at_most: float = MAX_VALUE
  is_path: bool = False
  free: bool = False
  evaluation: bool = False

  @property
  def bounds(self) -> list[str]:
    """The bounds in words, such as "at least 1"."""
    bounds = [f"at least {self.at_least}"] if self.at_least > -MAX_VALUE else []
    bounds += [f"above {self.above}"] if self.above is not None else []
    return bounds + ([f"at most {self.at_most}"] if self.at_most < MAX_VALUE else [])

  def violated(self, number: float) -> str:
    """The bound that a number violates, in words; "" if none. NaN violates them."""
    if not number >= self.at_least:
      return f"at least {self.at_least}"
    if self.above is not None and not number > self.above:
      return f"above {self.above}"
    return "" if number <= self.at_most else f"at most {self.at_most}"


def field(default: Any, comment: str = "", **attributes: Any) -> Any:
  """Declares a field, or a section of fields; see `Spec`.

  Args:
    default: the default value; for a section, an instance of the class that declares its fields.
    comment: meaning and unit; for a section, the first line of its class by default.
    **attributes: the other attributes of Spec.
  """
  comment = comment or default.__doc__.splitlines()[0]
  return dataclasses.field(default=default, metadata={"spec": Spec(comment, **attributes)})


def spec(declaration: dataclasses.Field) -> Spec:
  """The Spec of a field declared with `field`."""
  return declaration.metadata["spec"]


def is_section(declaration: dataclasses.Field) -> bool:
  """Whether a field is a section of fields: its default is a dataclass instance."""
  return dataclasses.is_dataclass(declaration.default)


def declared(cls: type, prefix: str = "") -> dict[str, dataclasses.Field]:
  """Path (such as `data.crop`) -> declaration; sections precede their fields."""
  found = {}
  for f in dataclasses.fields(cls):
    found[prefix + f.name] = f
    if is_section(f):
      found |= declared(type(f.default), f"{prefix}{f.name}.")
  return found


def section(cls: type, **changes: Any) -> config_dict.ConfigDict:
  """An unlocked ConfigDict with the defaults of a declared class, with changes.

  Raises:
    TypeError: a change to an undeclared field.
  """
  c = config_dict.ConfigDict()
  for f in dataclasses.fields(cls):
    value = changes.pop(f.name, f.default)
    if dataclasses.is_dataclass(value):
      value = section(type(value))
    elif value is None:  # a placeholder keeps the type
      kind = typing.get_args(f.type)[0]
      value = config_dict.placeholder(typing.get_origin(kind) or kind)
    if value is not ABSENT:
      c[f.name] = value
  if changes:
    raise TypeError(f"{cls.__name__} has no field {', '.join(changes)}")
  return c


def check(config: Config, cls: type) -> None:
  """Checks the values of a config.

  Missing and undeclared fields are skipped, since another version may have written the config.

  Raises:
    InputError: a value has the wrong type, is out of bounds or an unknown word.
  """
  for path, f in declared(cls).items():
    parent, name = _parent(config, path)
    if name not in parent:
      continue
    value, known = parent[name], spec(f)
    if not _fits(value, f.type):
      expected = f.type.__name__ if isinstance(f.type, type) else str(f.type)
    else:
      violated = [known.violated(number) for number in _numbers(value)]
      expected = next(filter(None, violated), "")
      if value in ((), []) and known.bounds:
        expected = "one value or more"
    if expected:
      example = "" if f.default is ABSENT or is_section(f) else f", such as {f.default!r}"
      raise InputError(f"config.{path}: expected {expected}{example}, got {value!r}")
    if known.words:
      check_known(f"config.{path}=", value, known.words)


def complete(config: config_dict.ConfigDict, defaults: config_dict.ConfigDict) -> None:
  """Adds the fields of `defaults` that a config and its sections lack."""
  with config.unlocked():
    for name, value in defaults.items(preserve_field_references=True):
      if name not in config:
        config[name] = value
      elif isinstance(value, config_dict.ConfigDict):
        complete(config[name], value)


def expand_paths(config: Config, cls: type) -> None:
  """Expands a leading `~` in the fields that are paths."""
  for path, f in declared(cls).items():
    parent, name = _parent(config, path)
    if spec(f).is_path and str(parent.get(name)).startswith("~"):
      parent[name] = str(expand(parent[name]))


def _parent(config: Config, path: str) -> tuple[Any, str]:
  """The section that contains a field, {} if missing, and the field's name."""
  *sections, name = path.split(".")
  return functools.reduce(lambda parent, key: parent.get(key, {}), sections, config), name


def _fits(value: Any, kind: Any) -> bool:
  if isinstance(kind, types.UnionType):
    return any(_fits(value, k) for k in typing.get_args(kind))
  if typing.get_origin(kind) is tuple:
    parts = typing.get_args(kind)
    if not isinstance(value, (tuple, list)):  # JSON has no tuples
      return False
    if parts[-1] is Ellipsis:
      parts = parts[:1] * len(value)
    return len(value) == len(parts) and all(map(_fits, value, parts))
  if dataclasses.is_dataclass(kind):
    return isinstance(value, (config_dict.ConfigDict, dict))
  if kind in (int, float):
    return isinstance(value, (int, kind)) and not isinstance(value, bool)
  return isinstance(value, kind)


def _numbers(value: Any) -> Iterator[float]:
  if isinstance(value, (tuple, list)):
    for part in value:
      yield from _numbers(part)
  elif isinstance(value, (int, float)):
    yield value


def with_tuples(value: Any) -> Any:
  """Turns the lists of JSON back into tuples, which modules can hash."""
  if isinstance(value, Mapping):
    return {k: with_tuples(v) for k, v in value.items()}
  return tuple(map(with_tuples, value)) if isinstance(value, list) else value
