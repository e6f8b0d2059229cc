"""An ONNX graph under construction, without the package of that name."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np


class Tensor:
  """A value of the graph that depends on its inputs.

  Attributes:
    name: of the value.
    shape: in JAX.
    stored: in the graph, where an axis may still have one element for all; operators on elements
      stretch it, for others `Graph.name` does.
  """

  def __init__(self, name: str, shape: Sequence[Any], stored: Sequence[Any] | None = None):
    self.name, self.shape = name, tuple(shape)
    self.stored = self.shape if stored is None else tuple(stored)


class Node(NamedTuple):
  """An operator with the names of its inputs and outputs; a type is an attribute as it is."""

  operator: str
  inputs: list[str]
  outputs: list[str]
  attributes: dict[str, Any]


class Graph:
  """A graph under construction: nodes, constants, and the sides that were left open.

  Attributes:
    nodes: in the order they run.
    constants: name -> array.
    sides: open side -> name of the value that has it.
  """

  def __init__(self) -> None:
    self.nodes: list[Node] = []
    self.constants: dict[str, np.ndarray] = {}
    self._names: dict[Any, str] = {}
    self.sides: dict[str, str] = {}

  def node(self, operator: str, inputs: Sequence[str], **attributes: Any) -> str:
    """Adds a node; the name of its one result."""
    name = f"{operator}_{len(self.nodes)}"
    self.nodes.append(Node(operator, [*inputs], [name], attributes))
    return name

  def constant(self, value: Any, dtype: Any = None) -> str:
    """The name of an array, which is stored once."""
    array = np.asarray(value, dtype)
    key = str(array.dtype), array.shape, array.tobytes()
    if key not in self._names:
      self._names[key] = f"constant_{len(self.constants)}"
      self.constants[self._names[key]] = array
    return self._names[key]

  def shape(self, shape: Sequence[Any]) -> str:
    """The name of a shape."""
    if all(isinstance(side, int) for side in shape):
      return self.constant(shape, np.int64)
    return self.node("Concat", [self.side(side) for side in shape], axis=0)

  def side(self, side: Any) -> str:
    if isinstance(side, int):
      return self.constant([side], np.int64)
    sums = []
    for term in str(side).split(" + "):
      factors = [
        self.sides[part] if part in self.sides else self.constant([_number(part)], np.int64)
        for part in term.split("*")
      ]
      sums.append(functools.reduce(lambda a, b: self.node("Mul", [a, b]), factors))
    return functools.reduce(lambda a, b: self.node("Add", [a, b]), sums)

  def name(self, value: Any) -> str:
    """The name of a value in its full shape."""
    if not isinstance(value, Tensor):
      return self.constant(value)
    if value.stored == value.shape:
      return value.name
    return self.node("Expand", [value.name, self.shape(value.shape)])

  def reshape(self, name: str, shape: Sequence[Any]) -> str:
    if sum(not isinstance(side, int) for side in shape) == 1:
      shape = [side if isinstance(side, int) else -1 for side in shape]
    return self.node("Reshape", [name, self.shape(shape)])

  def cast(self, name: str, dtype: Any) -> str:
    return self.node("Cast", [name], to=np.dtype(dtype))

  def transpose(self, value: Any, order: Sequence[int]) -> str:
    """The name of a value with its axes in another order; constants are turned here."""
    if not isinstance(value, Tensor):
      return self.constant(np.ascontiguousarray(np.transpose(value, order)))
    name = self.name(value)
    return name if list(order) == sorted(order) else self.permuted(name, order)

  def permuted(self, name: str, order: Sequence[int]) -> str:
    return self.node("Transpose", [name], perm=[int(axis) for axis in order])


def _number(text: str) -> int:
  """The whole number in a term of an open side."""
  if not text.isdecimal():
    raise NotImplementedError(f"a side of {text}")
  return int(text)
