"""A traced JAX function as an ONNX model: a node or a few for each primitive operation.

jax2onnx, the converter that is kept up, cannot be installed beside this package's Orbax and takes
minutes for the smallest network (docs/deploy.md). What a network here consists of is some forty
primitives, which are written down below; anything else is refused by its name.

What does not depend on the inputs is computed while the graph is written. Sides may be open: sums
and products of those that the inputs have.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jax.extend.core import ClosedJaxpr, Literal

from rpn_jax.base.errors import InputError
from rpn_jax.inference.onnx_graph import Graph, Node, Tensor

# Understood by onnxruntime from 1.14 on, of 2023.
OPSET, IR_VERSION = 18, 8
# A protocol buffer has 2 GB; the rest is for what is no weight.
MAX_BYTES = 2**31 - 2**24

# Primitive -> operator, where that is all.
ELEMENTWISE = {
  "abs": "Abs", "add": "Add", "add_any": "Add", "and": "And", "ceil": "Ceil", "cos": "Cos",
  "div": "Div", "eq": "Equal", "erf": "Erf", "exp": "Exp", "floor": "Floor", "ge": "GreaterOrEqual",
  "gt": "Greater", "le": "LessOrEqual", "log": "Log", "logistic": "Sigmoid", "lt": "Less",
  "max": "Max", "min": "Min", "mul": "Mul", "neg": "Neg", "not": "Not", "or": "Or", "pow": "Pow",
  "sign": "Sign", "sin": "Sin", "sqrt": "Sqrt", "sub": "Sub", "tanh": "Tanh",
}  # fmt: skip
REDUCTIONS = {
  "reduce_sum": "ReduceSum", "reduce_max": "ReduceMax", "reduce_min": "ReduceMin",
}  # fmt: skip
# Primitives that leave their operands as they are.
UNCHANGED = ("copy", "copy_p", "name", "optimization_barrier", "stop_gradient")
# Parameters that hold what a primitive calls.
CALLED = ("jaxpr", "call_jaxpr", "fun_jaxpr")


class Operations(Graph):
  """What every primitive is in ONNX: the methods on_….

  Each takes the equation of a program and the values of its inputs, arrays or tensors.
  """

  def run(self, jaxpr: Any, constants: Sequence[Any], arguments: Sequence[Any]) -> list[Any]:
    """The values of a program's outputs: arrays where they are known, else tensors."""
    values: dict[Any, Any] = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*constants, *arguments)))
    read = lambda atom: np.asarray(atom.val) if isinstance(atom, Literal) else values[atom]
    for equation in jaxpr.eqns:
      outputs = self.primitive(equation, [read(atom) for atom in equation.invars])
      values.update(zip(equation.outvars, outputs))
    return [read(atom) for atom in jaxpr.outvars]

  def primitive(self, equation: Any, inputs: list[Any]) -> list[Any]:
    """The values of an operation's outputs.

    Raises:
      NotImplementedError: ONNX has no such operation, or it is not written down here.
    """
    name, params = equation.primitive.name, equation.params
    if name in UNCHANGED:
      return inputs
    called = next((params[key] for key in CALLED if key in params), None)
    if called is not None and name != "scan":
      if isinstance(called, ClosedJaxpr):
        return self.run(called.jaxpr, called.consts, inputs)
      return self.run(called, (), inputs)
    shapes = [out.aval.shape for out in equation.outvars]
    tensors = any(isinstance(value, Tensor) for value in inputs)
    if not tensors and all(isinstance(side, int) for shape in shapes for side in shape):
      out = equation.primitive.bind(*inputs, **params)
      return [np.asarray(x) for x in (out if equation.primitive.multiple_results else [out])]
    if name in ELEMENTWISE:
      return [self.elementwise(ELEMENTWISE[name], inputs, shapes[0])]
    if name in REDUCTIONS:
      axes = self.constant(params["axes"], np.int64)
      reduced = self.node(REDUCTIONS[name], [self.name(inputs[0]), axes], keepdims=0)
      return [Tensor(reduced, shapes[0])]
    method = getattr(self, f"on_{name}", None)
    if method is None:
      raise NotImplementedError(f"the operation {name!r}")
    result = method(equation, *inputs)
    if isinstance(result, list):
      return result
    return [result if isinstance(result, Tensor) else Tensor(result, shapes[0])]

  def elementwise(self, operator: str, inputs: list[Any], shape: Sequence[Any]) -> Tensor:
    """An operator that stretches its operands as NumPy does."""
    names, stored = [], [1] * len(shape)
    for value in inputs:
      if not isinstance(value, Tensor) and value.size and (value == value.flat[0]).all():
        value = value.reshape(-1)[:1].reshape([1] * value.ndim)  # one for all
      names.append(value.name if isinstance(value, Tensor) else self.constant(value))
      sides = value.stored if isinstance(value, Tensor) else value.shape
      for axis, side in enumerate(sides, len(shape) - len(sides)):
        stored[axis] = side if isinstance(stored[axis], int) and stored[axis] == 1 else stored[axis]
    return Tensor(self.node(operator, names), shape, stored)

  def on_integer_pow(self, equation: Any, x: Tensor) -> Tensor:
    power = equation.params["y"]
    if power == 2:
      return Tensor(self.node("Mul", [x.name, x.name]), x.shape, x.stored)
    power = self.constant(power, np.float32)
    return Tensor(self.node("Pow", [x.name, power]), x.shape, x.stored)

  def on_square(self, equation: Any, x: Tensor) -> Tensor:
    return Tensor(self.node("Mul", [x.name, x.name]), x.shape, x.stored)

  def on_rsqrt(self, equation: Any, x: Tensor) -> Tensor:
    root = self.node("Sqrt", [x.name])
    return Tensor(self.node("Reciprocal", [root]), x.shape, x.stored)

  def on_erfc(self, equation: Any, x: Tensor) -> Tensor:
    one = self.constant(1, equation.outvars[0].aval.dtype)
    return Tensor(self.node("Sub", [one, self.node("Erf", [x.name])]), x.shape, x.stored)

  def on_expm1(self, equation: Any, x: Tensor) -> Tensor:
    one = self.constant(1, equation.outvars[0].aval.dtype)
    return Tensor(self.node("Sub", [self.node("Exp", [x.name]), one]), x.shape, x.stored)

  def on_ne(self, equation: Any, x: Any, y: Any) -> Tensor:
    equal = self.elementwise("Equal", [x, y], equation.outvars[0].aval.shape)
    return Tensor(self.node("Not", [equal.name]), equal.shape, equal.stored)

  def on_select_n(self, equation: Any, which: Any, *cases: Any) -> Tensor:
    if len(cases) != 2:
      raise NotImplementedError(f"a choice of {len(cases)}")
    return self.elementwise("Where", [which, *cases[::-1]], equation.outvars[0].aval.shape)

  def on_convert_element_type(self, equation: Any, x: Tensor) -> Tensor:
    return Tensor(self.cast(x.name, equation.outvars[0].aval.dtype), x.shape, x.stored)

  def on_broadcast_in_dim(self, equation: Any, x: Any, *sides: Any) -> Tensor:
    shape, at = equation.outvars[0].aval.shape, equation.params["broadcast_dimensions"]
    old = x.stored if isinstance(x, Tensor) else x.shape
    stored: list[Any] = [1] * len(shape)
    for axis, side in zip(at, old):
      stored[axis] = side
    if not isinstance(x, Tensor):
      return Tensor(self.constant(x.reshape(stored)), shape, stored)
    same = tuple(stored) == x.stored
    return Tensor(x.name if same else self.reshape(x.name, stored), shape, stored)

  def on_reshape(self, equation: Any, x: Any, *sides: Any) -> str:
    return self.reshape(self.name(x), equation.outvars[0].aval.shape)

  on_squeeze = on_reshape
  on_expand_dims = on_reshape

  def on_transpose(self, equation: Any, x: Any) -> Tensor:
    order = equation.params["permutation"]
    turn = lambda sides: [sides[axis] for axis in order]
    return Tensor(self.permuted(x.name, order), turn(x.shape), turn(x.stored))

  def on_tile(self, equation: Any, x: Any, *sides: Any) -> str:
    return self.node("Tile", [self.name(x), self.shape(equation.params["reps"])])

  def on_concatenate(self, equation: Any, *parts: Any) -> str:
    names = [self.name(part) for part in parts]
    return self.node("Concat", names, axis=int(equation.params["dimension"]))

  def on_unstack(self, equation: Any, x: Any) -> list[Tensor]:
    """Of JAX 0.12; before that slices that are squeezed."""
    axis = int(equation.params["axis"])
    return [self.row(x, i, axis) for i in range(len(equation.outvars))]

  def on_slice(self, equation: Any, x: Any) -> str:
    first, last = equation.params["start_indices"], equation.params["limit_indices"]
    strides = equation.params["strides"] or [1] * len(first)
    # An axis that is taken whole may be the number of images.
    cut = [
      axis
      for axis, side in enumerate(x.shape)
      if not (first[axis] == 0 and last[axis] == side and strides[axis] == 1)
    ]
    first, last, strides = ([part[axis] for axis in cut] for part in (first, last, strides))
    return self.sliced(self.name(x), first, last, cut, strides)

  def sliced(
    self, name: str, first: Sequence[int], last: Sequence[int], axes: Sequence[int],
    strides: Sequence[int],
  ) -> str:  # fmt: skip
    parts = [self.constant(part, np.int64) for part in (first, last, axes, strides)]
    return self.node("Slice", [name, *parts])

  def on_split(self, equation: Any, x: Any) -> list[Tensor]:
    axis, ends = int(equation.params["axis"]), np.cumsum(equation.params["sizes"]).tolist()
    name = self.name(x)
    return [
      Tensor(self.sliced(name, [first], [last], [axis], [1]), out.aval.shape)
      for first, last, out in zip([0, *ends], ends, equation.outvars)
    ]

  def on_rev(self, equation: Any, x: Any) -> str:
    axes = [int(axis) for axis in equation.params["dimensions"]]
    ones = [-1] * len(axes)
    return self.sliced(self.name(x), ones, [-(2**31)] * len(axes), axes, ones)

  def on_pad(self, equation: Any, x: Any, value: Any) -> str:
    low, high, inner = zip(*equation.params["padding_config"])
    if any(inner):
      raise NotImplementedError("padding between elements")
    if not any((*low, *high)):
      return self.name(x)
    sides = self.constant([*low, *high], np.int64)
    return self.node("Pad", [self.name(x), sides, self.name(value)])

  def on_dot_general(self, equation: Any, x: Any, y: Any) -> str:
    """Batch axes, then one axis of rows and one of columns; ONNX multiplies such matrices."""
    (sum_x, sum_y), (batch_x, batch_y) = equation.params["dimension_numbers"]
    out = equation.outvars[0].aval
    # ONNX gives the type of the operands, and sums in a type of its own choice.
    x, y = (self.as_type(value, atom, out) for value, atom in zip((x, y), equation.invars))
    free_x, free_y = (
      [axis for axis in range(len(value.shape)) if axis not in (*batch, *summed)]
      for value, batch, summed in ((x, batch_x, sum_x), (y, batch_y, sum_y))
    )
    rows = self.transpose(x, (*batch_x, *free_x, *sum_x))
    columns = self.transpose(y, (*batch_y, *sum_y, *free_y))
    batch = [x.shape[axis] for axis in batch_x]
    size = lambda value, axes: math.prod(value.shape[axis] for axis in axes)
    summed = size(x, sum_x)
    # A matrix that is the same for all images multiplies any number of axes before the last one.
    if len(sum_x) != 1 or not free_x or (batch and len(free_x) != 1):
      rows = self.reshape(rows, (*batch, size(x, free_x), summed))
    if len(sum_x) != 1 or len(free_y) != 1:
      columns = self.reshape(columns, (*batch, summed, size(y, free_y)))
    return self.reshape(self.node("MatMul", [rows, columns]), out.shape)

  def as_type(self, value: Any, atom: Any, out: Any) -> Any:
    """A value of an equation in the type of what comes out of it."""
    if atom.aval.dtype == out.dtype:
      return value
    if isinstance(value, Tensor):
      return Tensor(self.cast(value.name, out.dtype), value.shape, value.stored)
    return value.astype(out.dtype)

  def on_conv_general_dilated(self, equation: Any, x: Any, kernel: Any) -> str:
    params = equation.params
    if set(params["lhs_dilation"]) != {1} or params["batch_group_count"] != 1:
      raise NotImplementedError("a convolution with gaps in its input")
    order = params["dimension_numbers"]
    low, high = zip(*params["padding"])
    out = self.node(
      "Conv",
      [self.transpose(x, order.lhs_spec), self.transpose(kernel, order.rhs_spec)],
      strides=params["window_strides"],
      pads=[int(side) for side in (*low, *high)],
      dilations=params["rhs_dilation"],
      group=params["feature_group_count"],
    )
    return self.permuted(out, np.argsort(order.out_spec).tolist())

  def on_reduce_window_sum(self, equation: Any, x: Any) -> str:
    params = equation.params
    window, padding = params["window_dimensions"], params["padding"]
    outer = (window[0], window[-1], *padding[0], *padding[-1])
    if len(window) != 4 or outer != (1, 1, 0, 0, 0, 0):
      raise NotImplementedError("sums over windows of other axes than the middle two")
    if {*params["base_dilation"], *params["window_dilation"]} != {1}:
      raise NotImplementedError("sums over windows with gaps")
    means = self.node(
      "AveragePool",
      [self.permuted(self.name(x), (0, 3, 1, 2))],
      kernel_shape=window[1:3],
      strides=params["window_strides"][1:3],
      pads=[padding[1][0], padding[2][0], padding[1][1], padding[2][1]],
      count_include_pad=1,
    )
    count = self.constant(math.prod(window), equation.outvars[0].aval.dtype)
    return self.permuted(self.node("Mul", [means, count]), (0, 2, 3, 1))

  def on_reduce_or(self, equation: Any, x: Any) -> str:
    axes = self.constant(equation.params["axes"], np.int64)
    largest = self.node("ReduceMax", [self.cast(self.name(x), np.int32), axes], keepdims=0)
    return self.cast(largest, bool)

  def top(self, x: Any, k: int, axis: int, largest: int) -> list[str]:
    """The names of the k largest or smallest values along an axis, sorted, and where they are."""
    inputs = [self.name(x), self.constant([k], np.int64)]
    names = [f"TopK_{len(self.nodes)}_{part}" for part in ("values", "indices")]
    self.nodes.append(Node("TopK", inputs, names, {"axis": axis, "largest": largest, "sorted": 1}))
    return names

  def on_top_k(self, equation: Any, x: Any) -> list[Tensor]:
    shape, axis = equation.outvars[0].aval.shape, int(equation.params.get("axis", x.shape[-1]))
    values, indices = self.top(x, int(equation.params["k"]), axis, largest=1)
    return [Tensor(values, shape), Tensor(self.cast(indices, np.int32), shape)]

  def on_sort(self, equation: Any, *operands: Any) -> str:
    if len(operands) != 1:
      raise NotImplementedError("arrays that are sorted by another one")
    axis = equation.params["dimension"]
    return self.top(operands[0], operands[0].shape[axis], axis, largest=0)[0]

  def on_gather(self, equation: Any, x: Any, indices: Any) -> str:
    numbers, sizes = equation.params["dimension_numbers"], equation.params["slice_sizes"]
    batch = tuple(numbers.operand_batching_dims)
    if not numbers.offset_dims and set(sizes) == {1} and batch == tuple(range(len(batch))):
      rest = tuple(range(len(batch), len(x.shape)))
      if tuple(numbers.start_index_map) == rest == tuple(numbers.collapsed_slice_dims):
        where = self.cast(self.name(indices), np.int64)
        return self.node("GatherND", [self.name(x), where], batch_dims=len(batch))
    if not isinstance(indices, Tensor) and indices.ndim == 1 and not batch:
      axes, first = [int(axis) for axis in numbers.start_index_map], [int(i) for i in indices]
      last = [start + sizes[axis] for start, axis in zip(first, axes)]
      part = self.sliced(self.name(x), first, last, axes, [1] * len(axes))
      return self.reshape(part, equation.outvars[0].aval.shape)
    raise NotImplementedError("a look-up of slices by computed places")

  def on_scan(self, equation: Any, *inputs: Any) -> list[Any]:
    """A loop, written out turn by turn."""
    params = equation.params
    called = params["jaxpr"]
    body, kept = (called.jaxpr, called.consts) if isinstance(called, ClosedJaxpr) else (called, ())
    # Versions of JAX count them under different names; what is stacked has an axis more outside.
    stacked = lambda outer, inner: len(outer.aval.shape) > len(inner.aval.shape)
    carried = sum(not stacked(*pair) for pair in zip(equation.outvars, body.outvars))
    consts = len(inputs) - carried - sum(map(stacked, equation.invars, body.invars))
    state, rows = [*inputs[consts : consts + carried]], inputs[consts + carried :]
    turns: list[list[Any]] = []
    if not isinstance(params["length"], int):
      raise NotImplementedError("a loop over an open number of images")
    order = range(params["length"])
    for turn in reversed(order) if params["reverse"] else order:
      taken = [self.row(value, turn) for value in rows]
      out = self.run(body, kept, [*inputs[:consts], *state, *taken])
      state = out[:carried]
      turns.append(out[carried:])
    if params["reverse"]:
      turns.reverse()
    results = []
    for out, parts in zip(equation.outvars[carried:], zip(*turns)):
      shape = out.aval.shape
      names = [self.reshape(self.name(part), (1, *shape[1:])) for part in parts]
      results.append(Tensor(self.node("Concat", names, axis=0), shape))
    return [*state, *results]

  def row(self, value: Any, index: int, axis: int = 0) -> Any:
    """One of the parts of a value along an axis, which is gone."""
    if not isinstance(value, Tensor):
      return value.take(index, axis)
    part = self.node("Gather", [self.name(value), self.constant(index, np.int64)], axis=axis)
    return Tensor(part, [*value.shape[:axis], *value.shape[axis + 1 :]])


def model(
  program: ClosedJaxpr, inputs: Sequence[str], output: str, metadata: Mapping[str, str]
) -> Any:
  """A program of one output as an `onnx.ModelProto`.

  Args:
    program: the traced function. The first side of each input may be open.
    inputs: names of the inputs.
    output: name of the output.
    metadata: texts to store with the model.

  Raises:
    InputError: an operation that is not written down here, or more constants than fit a file.
  """
  import onnx
  from onnx import helper, numpy_helper

  graph = Operations()
  arguments = [Tensor(name, aval.shape) for name, aval in zip(inputs, program.in_avals)]
  for tensor in arguments:
    if not isinstance(tensor.shape[0], int):
      graph.sides[str(tensor.shape[0])] = graph.node("Shape", [tensor.name], start=0, end=1)
  try:
    (result,) = graph.run(program.jaxpr, program.consts, arguments)
    graph.nodes.append(Node("Identity", [graph.name(result)], [output], {}))
  except NotImplementedError as error:
    raise InputError(
      f"expected a network that can be written as ONNX, got {error}: use --to=stablehlo"
    ) from error
  # Of a constant that was stretched later on, the first form is not used.
  used = {name for node in graph.nodes for name in node.inputs}
  constants = {name: array for name, array in graph.constants.items() if name in used}
  size = sum(array.nbytes for array in constants.values())
  if size > MAX_BYTES:
    raise InputError(
      f"expected at most {MAX_BYTES / 1e9:.1f} GB of weights in an ONNX file, got {size / 1e9:.1f}:"
      " use --dtype=float16"
    )

  def attribute(value: Any) -> Any:
    return helper.np_dtype_to_tensor_dtype(value) if isinstance(value, np.dtype) else value

  def describe(name: str, aval: Any) -> Any:
    sides = [side if isinstance(side, int) else str(side) for side in aval.shape]
    return helper.make_tensor_value_info(name, attribute(aval.dtype), sides)

  nodes = [
    helper.make_node(
      node.operator, node.inputs, node.outputs, name=node.outputs[0],
      **{key: attribute(value) for key, value in node.attributes.items()},
    )
    for node in graph.nodes
  ]  # fmt: skip
  proto = helper.make_model(
    helper.make_graph(
      nodes,
      "network",
      [describe(*pair) for pair in zip(inputs, program.in_avals)],
      [describe(output, program.out_avals[0])],
      [numpy_helper.from_array(array, name) for name, array in constants.items()],
    ),
    opset_imports=[helper.make_opsetid("", OPSET)],
    ir_version=IR_VERSION,
    producer_name="rpn_jax",
  )
  helper.set_model_props(proto, dict(metadata))
  onnx.checker.check_model(proto)
  return proto
