"""The tensors of PyTorch files (`torch.save` and TorchScript), read and written without PyTorch.

Both kinds are zip archives: `data.pkl` is a pickle that describes the tensors, `data/<key>` are
their raw bytes. A pickle is a program, so it runs here on an interpreter that knows tensors,
containers and nothing else: no import, no call of foreign code, no foreign class.
"""

import collections
import math
import pickle
import zipfile
import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from rpn_jax.base.errors import InputError
from rpn_jax.base.paths import on_disk

STATE_DICT, TORCHSCRIPT = "PyTorch state dict", "TorchScript archive"

# The description of a model of some hundred tensors takes about 100 kB, code included less than a
# megabyte. An opcode of one byte can make an object of 64.
_MAX_PICKLE_BYTES = 4 << 20
_MAX_DEPTH = 64
# Visits of modules: a file can tie modules together so that there are 2^64 ways through them.
_MAX_MODULES = 100_000
_MAX_AXES = 8

_STORAGES = {
  "HalfStorage": np.dtype("<f2"),
  "BFloat16Storage": np.dtype(jnp.bfloat16),
  "FloatStorage": np.dtype("<f4"),
  "DoubleStorage": np.dtype("<f8"),
  "BoolStorage": np.dtype("?"),
  "ByteStorage": np.dtype("u1"),
  "CharStorage": np.dtype("i1"),
  "ShortStorage": np.dtype("<i2"),
  "IntStorage": np.dtype("<i4"),
  "LongStorage": np.dtype("<i8"),
}

# What `torch.save` and TorchScript write: pickle protocols 2 to 5 without their ways to name
# classes by number (EXT) or to make objects in other ways (INST, OBJ, NEWOBJ_EX).
_FLOW = pickle.PROTO + pickle.FRAME + pickle.STOP + pickle.MARK + pickle.POP + pickle.POP_MARK
_MEMO = pickle.BINGET + pickle.LONG_BINGET + pickle.BINPUT + pickle.LONG_BINPUT + pickle.MEMOIZE
_CONSTANTS = pickle.NONE + pickle.NEWTRUE + pickle.NEWFALSE + pickle.BINFLOAT
_STRINGS = pickle.BINUNICODE + pickle.SHORT_BINUNICODE + pickle.BINBYTES + pickle.SHORT_BINBYTES
_INTEGERS = pickle.BININT + pickle.BININT1 + pickle.BININT2 + pickle.LONG1 + pickle.LONG4
_TUPLES = pickle.EMPTY_TUPLE + pickle.TUPLE + pickle.TUPLE1 + pickle.TUPLE2 + pickle.TUPLE3
_LISTS = pickle.EMPTY_LIST + pickle.APPEND + pickle.APPENDS
_DICTS = pickle.EMPTY_DICT + pickle.SETITEM + pickle.SETITEMS
_OBJECTS = (
  pickle.GLOBAL
  + pickle.STACK_GLOBAL
  + pickle.REDUCE
  + pickle.NEWOBJ
  + pickle.BUILD
  + pickle.BINPERSID
)
_OPCODES = _FLOW + _MEMO + _CONSTANTS + _STRINGS + _INTEGERS + _TUPLES + _LISTS + _DICTS + _OBJECTS

# Where checkpoints of trainings have the weights.
_IN_CHECKPOINT = ("state_dict", "model_state_dict", "model")
_WHOLE = "use a file with the state dict of a whole model"


class Refused(Exception):
  """The file holds something else than tensors and plain containers; and what to do about it."""

  def __init__(self, reason: str, remedy: str = "get it again, from a source you trust"):
    super().__init__(reason)
    self.remedy = remedy


class Content(NamedTuple):
  """What a file holds.

  Attributes:
    kind: STATE_DICT or TORCHSCRIPT.
    tensors: read-only arrays by name, in the stored type: views of the file.
    attributes: of TorchScript modules, by name; what is neither tensor nor module.
  """

  kind: str
  tensors: dict[str, np.ndarray]
  attributes: dict[str, object]


class _Module:
  """A TorchScript object: its attributes, none of its code."""

  def __init__(self) -> None:
    self.attributes: dict[str, object] = {}


class _Inert:
  """Stands for an object in a checkpoint's notes: nothing of it is made or kept."""

  def __init__(self, *_):
    pass

  def __setitem__(self, key, value):
    pass


class _Dispatch(dict):
  def __missing__(self, code):
    raise Refused(f"its pickle has opcode {code:#x}, which torch.save does not write")


# Of its methods type checkers know none.
_Interpreter: Any = pickle._Unpickler


class _Unpickler(_Interpreter):
  """The Python pickle interpreter, cut down to tensors.

  The short form, `find_class` of the C interpreter, is not enough: that one allocates by sizes that
  the file declares, and it makes, calls and fills objects by opcodes that cannot be taken away. So
  every opcode that does is replaced here.
  """

  dispatch = _Dispatch((code, _Interpreter.dispatch[code]) for code in _OPCODES)

  def __init__(self, file, read_storage):
    super().__init__(file, encoding="utf-8")
    self._read_storage = read_storage

  def find_class(self, module, name):
    if module == "__torch__" or module.startswith("__torch__."):
      return _Module
    if module == "torch" and name in _STORAGES:
      return _STORAGES[name]
    if (module, name) in _FUNCTIONS:
      return _FUNCTIONS[module, name]
    raise Refused(
      f"it asks for {module}.{name}",
      "if you trust its source, load it with its own code and save its state_dict() alone",
    )

  def persistent_load(self, pid):
    if not (isinstance(pid, tuple) and len(pid) == 5 and pid[0] == "storage"):
      raise Refused("it refers to something that is not a tensor storage")
    _, dtype, key, _, count = pid
    if not isinstance(dtype, np.dtype) or not isinstance(key, str) or not _is_size(count):
      raise Refused("it has a malformed storage reference")
    return self._read_storage(dtype, key, count)

  def load_reduce(self):
    arguments = self.stack.pop()
    function = self.stack[-1]
    if not any(function is allowed for allowed in _FUNCTIONS.values()):
      raise Refused("it calls something that does not make a tensor")
    self.stack[-1] = function(*arguments)

  def load_newobj(self):
    arguments = self.stack.pop()
    kind = self.stack[-1]
    if kind is not _Inert and (kind is not _Module or arguments != ()):
      raise Refused("it makes an object that is not a tensor")
    self.stack[-1] = kind()

  def load_build(self):
    state = self.stack.pop()
    target = self.stack[-1]
    # State dicts carry version notes (`_metadata`) this way; nothing here needs them.
    if isinstance(target, _Module) and isinstance(state, dict):
      target.attributes = state
    elif not isinstance(target, (collections.OrderedDict, _Inert)):
      raise Refused("it sets attributes of something that is not a module")

  def load_setitem(self):
    _check_keys(self.stack[-2:-1])
    super().load_setitem()

  def load_setitems(self):
    _check_keys(self.stack[::2])
    super().load_setitems()

  dispatch[pickle.SETITEM[0]] = load_setitem
  dispatch[pickle.SETITEMS[0]] = load_setitems
  dispatch[pickle.REDUCE[0]] = load_reduce
  dispatch[pickle.NEWOBJ[0]] = load_newobj
  dispatch[pickle.BUILD[0]] = load_build


def _check_keys(keys) -> None:
  # Hashing a tuple of tuples of tuples, each twice the one before, takes forever.
  if not all(type(key) in (str, int) for key in keys):
    raise Refused("it has a dictionary with keys that are not names")


def _is_size(value) -> bool:
  return type(value) is int and 0 <= value < 1 << 62


def _rebuild_tensor(storage, offset, sizes, strides, *_):
  """A view of the storage, once its extent is known to lie inside.

  The arguments left out say how PyTorch trains it (gradients, hooks).
  """
  valid = (
    isinstance(storage, np.ndarray)
    and isinstance(sizes, tuple)
    and isinstance(strides, tuple)
    and len(sizes) == len(strides) <= _MAX_AXES
    and all(map(_is_size, (offset, *sizes, *strides)))
  )
  if not valid:
    raise Refused("it has a malformed tensor")
  count = math.prod(sizes)
  last = offset + sum((n - 1) * step for n, step in zip(sizes, strides, strict=True))
  # The count too: a stride of 0 would repeat one stored value without end.
  if count and (count > storage.size or last >= storage.size):
    raise Refused(f"a tensor of shape {sizes} does not fit its storage of {storage.size} values")
  if count == 0:
    return np.zeros(sizes, storage.dtype)
  strides = tuple(step * storage.itemsize for step in strides)
  return np.lib.stride_tricks.as_strided(storage[offset:], sizes, strides, writeable=False)


def _rebuild_parameter(data, *_):
  return data


def _ordered_dict():
  return collections.OrderedDict()


def _untyped(value, *_):
  """TorchScript wraps lists and dictionaries to keep their element types; the value is enough."""
  return value


# Of what trainings note beside the weights: scores and palettes of NumPy, arguments, paths, types.
_NOTES = (
  ("_codecs", "encode"),
  ("numpy", "dtype"),
  ("numpy", "ndarray"),
  *((f"numpy.{x}.multiarray", y) for x in ("core", "_core") for y in ("scalar", "_reconstruct")),
  ("argparse", "Namespace"),
  *((x, y) for x in ("pathlib", "pathlib._local") for y in ("PosixPath", "WindowsPath")),
  *(("torch", x) for x in ("device", "Size", "float16", "bfloat16", "float32", "float64")),
  ("collections", "defaultdict"),
  *((x, y) for x in ("builtins", "__builtin__") for y in ("set", "list", "dict", "int", "float")),
)
_FUNCTIONS = {
  ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
  ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
  ("collections", "OrderedDict"): _ordered_dict,
  ("torch.jit._pickle", "build_intlist"): _untyped,
  ("torch.jit._pickle", "build_boollist"): _untyped,
  ("torch.jit._pickle", "build_doublelist"): _untyped,
  ("torch.jit._pickle", "build_tensorlist"): _untyped,
  ("torch.jit._pickle", "restore_type_tag"): _untyped,
  **dict.fromkeys(_NOTES, _Inert),
}


def _flatten(module: _Module, prefix: str, depth: int, found: Content, visits: list) -> None:
  """Adds what is below a TorchScript object, named as its state dict names it."""
  # A file can tie a module into itself.
  if depth > _MAX_DEPTH:
    raise Refused(f"its modules are nested more than {_MAX_DEPTH} deep")
  visits.append(depth)
  if len(visits) > _MAX_MODULES:
    raise Refused(f"it has more than {_MAX_MODULES:,} modules")
  for name, value in module.attributes.items():
    if isinstance(value, _Module):
      _flatten(value, f"{prefix}{name}.", depth + 1, found, visits)
    elif isinstance(value, np.ndarray):
      found.tensors[f"{prefix}{name}"] = value
    else:
      found.attributes[f"{prefix}{name}"] = value


def _content_of(root) -> Content:
  if isinstance(root, _Module):
    found = Content(TORCHSCRIPT, {}, {})
    _flatten(root, "", 0, found, [])
    return found
  if isinstance(root, dict):
    root = next((root[x] for x in _IN_CHECKPOINT if isinstance(root.get(x), dict)), root)
  if not isinstance(root, dict):
    raise Refused(f"it holds a {type(root).__name__}, not a state dict", _WHOLE)
  for name, value in root.items():
    if not isinstance(name, str) or not isinstance(value, np.ndarray):
      raise Refused(f"entry {str(name)[:60]!r} of its state dict is not a tensor", _WHOLE)
  return Content(STATE_DICT, dict(root), {})


def read(path) -> Content:
  """The tensors of a file written by `torch.save` or `torch.jit.save`.

  Args:
    path: a zip-format `.pt` or `.pth`: a TorchScript module, a state dict, or a dictionary that
      holds one under `state_dict`, `model_state_dict` or `model`. What else is in it, such as the
      state of an optimizer, is not read.

  Raises:
    InputError: the file is missing, damaged or another kind of file, or its pickle asks for
      anything but tensors and plain containers. Nothing of it has run then.
  """
  path = on_disk(path)
  again = "get it again, from a source you trust"
  try:
    with zipfile.ZipFile(path) as archive:
      return _read(archive, np.memmap(path, np.uint8, "r"))
  except FileNotFoundError:
    raise InputError(f"expected a PyTorch file, {path} does not exist: check the path") from None
  except IsADirectoryError:
    raise InputError(f"expected a PyTorch file, {path} is a folder: name the file in it") from None
  except Refused as error:
    raise InputError(
      f"expected a PyTorch file of tensors, {path} is refused, {error}: {error.remedy}"
    ) from None
  except (zipfile.BadZipFile, EOFError, OSError, NotImplementedError) as error:
    raise InputError(
      f"expected a PyTorch file (zip archive), {path} is another kind of file or damaged "
      f"({_line(error)}): {again}"
    ) from None
  except Exception as error:  # a malformed pickle fails in any way a malformed program can
    kind = type(error).__name__
    raise InputError(
      f"expected a PyTorch file, the description of tensors in {path} is malformed "
      f"({kind}: {_line(error)}): {again}"
    ) from None


def _line(error) -> str:
  return " ".join(str(error).split())[:100]


def _read(archive: zipfile.ZipFile, content: np.ndarray) -> Content:
  pickles = [x for x in archive.namelist() if x.count("/") == 1 and x.endswith("/data.pkl")]
  if len(pickles) != 1:
    raise Refused("the archive has no data.pkl in its top folder")
  folder = pickles[0].removesuffix("data.pkl")
  if archive.getinfo(pickles[0]).file_size > _MAX_PICKLE_BYTES:
    raise Refused(f"its data.pkl is larger than {_MAX_PICKLE_BYTES >> 20} MiB")
  order = f"{folder}byteorder"
  if order in archive.namelist() and archive.open(order).read(16) != b"little":
    raise Refused("its numbers are not little-endian")
  storages: dict[str, tuple[int, zipfile.ZipInfo]] = {}
  total = 0

  def read_storage(dtype, key, count):
    nonlocal total
    if key not in storages:
      try:
        info = archive.getinfo(f"{folder}data/{key}")
      except KeyError:
        raise Refused(f"storage {key[:20]!r} is missing from it") from None
      # Stored bytes are part of the file; compressed or overlapping ones could unfold to any size.
      total += info.file_size
      if info.compress_type != zipfile.ZIP_STORED or total > len(content):
        raise Refused(f"storage {key[:20]!r} is compressed or larger than the file")
      storages[key] = _begin(content, info), info
    begin, info = storages[key]
    size = count * dtype.itemsize
    if size > info.file_size:
      raise Refused(
        f"storage {key[:20]!r} is declared as {count} values of {dtype} and has {info.file_size} "
        "bytes"
      )
    return content[begin : begin + size].view(dtype)

  with archive.open(pickles[0]) as file:
    found = _content_of(_Unpickler(file, read_storage).load())
  _check_sums(content, found.tensors, storages.values())
  return found


def _begin(content: np.ndarray, info: zipfile.ZipInfo) -> int:
  """Where the bytes of a stored entry begin, behind a header with its name and padding."""
  header = content[info.header_offset : info.header_offset + 30].tobytes()
  lengths = sum(int.from_bytes(header[i : i + 2], "little") for i in (26, 28))
  begin = info.header_offset + 30 + lengths
  if header[:4] != b"PK\x03\x04" or begin + info.file_size > len(content):
    raise zipfile.BadZipFile(f"bad header of {info.filename[:40]}")
  return begin


def _check_sums(content: np.ndarray, tensors: Mapping[str, np.ndarray], storages) -> None:
  """Compares the checksums of the storages that tensors are views of, and of no others."""
  start = content.__array_interface__["data"][0]
  used = np.sort([x.__array_interface__["data"][0] - start for x in tensors.values() if x.size])
  for begin, info in storages:
    first, last = np.searchsorted(used, (begin, begin + info.file_size))
    if first < last and zlib.crc32(content[begin : begin + info.file_size].data) != info.CRC:
      raise zipfile.BadZipFile(f"Bad CRC-32 for file {info.filename[:40]!r}")


def write(
  path, state: Mapping[str, np.ndarray], meta: Mapping[str, str], key: str = "state_dict"
) -> None:
  """Writes what `torch.load` reads as {"meta": meta, "state_dict": state}, as mmcv saves it.

  Args:
    path: of the new file.
    state: arrays by name; stored as float32.
    meta: notes, strings by strings.
    key: what the state is called; detectron2 calls it "model".
  """
  # The opcodes are spelled out because `pickle` imports whatever it writes the name of, here
  # PyTorch's classes. A subclass of its Python version that does not was half as long again.

  def text(value: str) -> bytes:
    return pickle.BINUNICODE + len(value.encode()).to_bytes(4, "little") + value.encode()

  def number(value: int) -> bytes:
    return pickle.LONG1 + b"\x08" + value.to_bytes(8, "little", signed=True)

  def numbers(values) -> bytes:
    return pickle.MARK + b"".join(map(number, values)) + pickle.TUPLE

  def named(module: str, name: str) -> bytes:
    return pickle.GLOBAL + f"{module}\n{name}\n".encode()

  def dictionary(entries: Mapping[str, bytes]) -> bytes:
    items = b"".join(text(key) + value for key, value in entries.items())
    return pickle.EMPTY_DICT + pickle.MARK + items + pickle.SETITEMS

  def tensor(key: str, value: np.ndarray) -> bytes:
    strides = [math.prod(value.shape[i + 1 :]) for i in range(value.ndim)]
    storage = pickle.MARK + text("storage") + named("torch", "FloatStorage") + text(key)
    storage += text("cpu") + number(value.size) + pickle.TUPLE + pickle.BINPERSID
    hooks = named("collections", "OrderedDict") + pickle.EMPTY_TUPLE + pickle.REDUCE
    arguments = storage + number(0) + numbers(value.shape) + numbers(strides)
    arguments = pickle.MARK + arguments + pickle.NEWFALSE + hooks + pickle.TUPLE
    return named("torch._utils", "_rebuild_tensor_v2") + arguments + pickle.REDUCE

  arrays = {name: np.array(value, "<f4", order="C") for name, value in state.items()}
  tensors = {name: tensor(str(i), value) for i, (name, value) in enumerate(arrays.items())}
  notes = dictionary({key: text(value) for key, value in meta.items()})
  root = dictionary({"meta": notes, key: dictionary(tensors)})
  with zipfile.ZipFile(path, "w") as archive:
    archive.writestr("archive/data.pkl", pickle.PROTO + b"\x02" + root + pickle.STOP)
    archive.writestr("archive/byteorder", "little")
    for i, value in enumerate(arrays.values()):
      archive.writestr(f"archive/data/{i}", value.tobytes())
    archive.writestr("archive/version", "3\n")
