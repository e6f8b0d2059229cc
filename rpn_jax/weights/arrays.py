"""Arrays of weight files by name: safetensors, PyTorch archives, shards with an index."""

import contextlib
import hashlib
import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax import traverse_util

from rpn_jax.base.buckets import is_bucket
from rpn_jax.base.errors import InputError
from rpn_jax.base.paths import expand, on_disk, replacing
from rpn_jax.weights import torch_archive

SAFETENSORS, SHARDS = "safetensors", "shards with an index"

_SAFETENSORS_TYPES: dict[str, np.dtype] = {
  "F16": np.dtype("float16"),
  "BF16": jnp.dtype("bfloat16"),
  "F32": np.dtype("float32"),
  "F64": np.dtype("float64"),
  "I32": np.dtype("int32"),
  "I64": np.dtype("int64"),
}
# Of a JSON file beside weights; the largest index known has 100 kB.
_MAX_JSON_BYTES = 8 << 20
_MAX_SHARDS = 1000
_MAX_HEADER_BYTES = 16 << 20
# What a folder of a published model holds, in the order of preference.
_OF_TRANSFORMERS, _OF_OPEN_CLIP = (
  tuple(
    name
    for stem, suffix in ((arrays, "safetensors"), (pickle, "bin"))
    for name in (
      f"{stem}.{suffix}",
      f"{stem}.{suffix}.index.json",
      f"{stem}.fp16.{suffix}",
      f"{stem}.{suffix}.index.fp16.json",
    )
  )
  for arrays, pickle in (
    ("model", "pytorch_model"),
    ("open_clip_model", "open_clip_pytorch_model"),
  )
)


class WeightsFile(NamedTuple):
  """What a file of weights holds.

  Attributes:
    path: of the file itself, where a folder was named.
    kind: SAFETENSORS, SHARDS, `torch_archive.STATE_DICT` or `torch_archive.TORCHSCRIPT`.
    arrays: by the file's own names, in the stored types; views that cost nothing until used.
    metadata: the header entries of safetensors.
    attributes: of the modules in a TorchScript archive, by name; what is neither array nor module.
  """

  path: pathlib.Path
  kind: str
  arrays: Mapping[str, np.ndarray]
  metadata: Mapping[str, str] = {}
  attributes: Mapping[str, object] = {}


def read_arrays(path) -> WeightsFile:
  """Reads a file of weights. Its content decides how, not its name.

  Args:
    path: of a PyTorch archive, safetensors, the index of shards, or a folder with one of them.

  Raises:
    InputError: no such file, another kind of file, or a damaged one.
  """
  path = expand(path)
  if path.is_dir():
    path = _in_folder(path)
  sharded = is_bucket(path) and path.suffix == ".json" and path.is_file()
  path = on_disk(path, read_index(path).values() if sharded else ())
  if not path.is_file():
    raise InputError(f"expected a file of CLIP weights, {path} does not exist: check the path")
  with path.open("rb") as file:
    head = file.read(9)
  if head.startswith(b"PK"):
    content = torch_archive.read(path)
    return WeightsFile(path, content.kind, content.tensors, attributes=content.attributes)
  if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
    raise InputError(
      f"expected a PyTorch zip file, {path} has the format before PyTorch 1.6: "
      "load and save it once with a newer PyTorch"
    )
  if head == b"version h":  # ttps://git-lfs.github.com/spec/v1
    raise InputError(
      f"expected CLIP weights, {path} is a pointer of Git LFS without its content: run git lfs "
      "pull in the clone, or download the file itself"
    )
  if path.suffix == ".json":
    return WeightsFile(path, SHARDS, _read_shards(path))
  if head[8:] != b"{":
    raise InputError(
      f"expected CLIP weights (PyTorch zip or safetensors), {path} begins with {head[:4]!r} and is "
      "neither: check the path and the download"
    )
  return WeightsFile(path, SAFETENSORS, *read_safetensors(path))


def _in_folder(folder: pathlib.Path) -> pathlib.Path:
  """The weights in the folder of a model: files of the usual names, or the only one there is.

  Raises:
    InputError: none, or several of other names.
  """
  known = _OF_TRANSFORMERS + _OF_OPEN_CLIP
  if (folder / "open_clip_config.json").is_file():
    # First, since `model.safetensors` beside them may be timm's, of the image tower alone.
    known = _OF_OPEN_CLIP + _OF_TRANSFORMERS
  suffixes = (".safetensors", ".bin", ".pt", ".pth", ".index.json")
  others = [x for x in sorted(folder.iterdir()) if x.name.endswith(suffixes) and x.is_file()]
  for name in known:
    if (folder / name).is_file():
      return folder / name
  if len(others) != 1:
    found = f"several, such as {others[0].name} and {others[1].name}" if others else "none"
    raise InputError(
      f"expected a file of CLIP weights in the folder {folder}, such as {known[0]}, got {found}: "
      "name the file"
    )
  return others[0]


def read_safetensors(path: pathlib.Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
  """Arrays, as views of the file that read nothing before they are used, and the metadata.

  Raises:
    InputError: a damaged file, another kind of file, or arrays of a type that no weights have.
  """
  with path.open("rb") as file:
    if int.from_bytes(file.read(8), "little") > _MAX_HEADER_BYTES:
      raise InputError(
        f"expected a safetensors or PyTorch zip file, {path} is neither or is damaged (its header "
        f"would be larger than {_MAX_HEADER_BYTES >> 20} MiB): get it again"
      )
  try:
    # Checks the header: offsets within the file, in order, as long as the shapes say.
    with safetensors.safe_open(path, "numpy") as file:
      metadata = file.metadata() or {}
      names = list(file.keys())
  except safetensors.SafetensorError as error:
    raise InputError(
      f"expected a safetensors or PyTorch zip file, {path} is neither or is damaged "
      f"({_reason(error)}): get it again"
    ) from None
  except OSError as error:
    raise InputError(f"{path} cannot be read ({error.strerror}): check the file") from None
  # The library cannot give bfloat16 to NumPy; the raw bytes can.
  content = np.memmap(path, np.uint8, "r")
  start = 8 + int.from_bytes(content[:8].tobytes(), "little")
  header = json.loads(content[8:start].tobytes())
  state = {}
  for name in names:
    entry = header[name]
    if entry["dtype"] not in _SAFETENSORS_TYPES:
      raise InputError(
        f"expected float weights, {name!r} is {entry['dtype']} in {path}: use another file"
      )
    begin, end = (start + offset for offset in entry["data_offsets"])
    data = content[begin:end] if begin < end else np.empty(0, np.uint8)
    dtype = _SAFETENSORS_TYPES[entry["dtype"]]
    if begin % dtype.itemsize:  # such a header is allowed, and cannot be a view
      data = data.copy()
    state[name] = data.view(dtype).reshape(entry["shape"])
  return state, metadata


def read_json(path: pathlib.Path) -> dict:
  """A JSON object from a file beside weights.

  Raises:
    InputError: no JSON object, or one of more than 8 MiB.
  """
  try:
    size = path.stat().st_size
    content = json.loads(path.read_bytes()) if size <= _MAX_JSON_BYTES else None
  except (OSError, ValueError, RecursionError):
    raise InputError(f"expected JSON in {path}, it cannot be read: get it again") from None
  if size > _MAX_JSON_BYTES:
    raise InputError(f"expected JSON of at most {_MAX_JSON_BYTES >> 20} MiB, {path} is larger")
  if not isinstance(content, dict):
    raise InputError(f"expected a JSON object in {path}, got something else: get it again")
  return content


def read_index(index: pathlib.Path) -> dict[str, str]:
  """{name of an array: file name of its shard, in the folder of the index}.

  Raises:
    InputError: no index, too many shards, or one in another folder.
  """
  file_of = read_json(index).get("weight_map")
  if not isinstance(file_of, dict) or not all(isinstance(x, str) for x in file_of.values()):
    raise InputError(f"expected an index with a weight_map in {index}: use the model's own index")
  files = sorted(set(file_of.values()))
  if len(files) > _MAX_SHARDS:
    raise InputError(f"expected at most {_MAX_SHARDS} shards, {index} names {len(files)}")
  for file in files:
    # A path would lead out of the folder.
    if file != os.path.basename(file) or file in ("", ".", ".."):
      raise InputError(f"expected file names in {index}, got the path {file[:60]!r}: refused")
  return file_of


def _read_shards(index: pathlib.Path) -> dict[str, np.ndarray]:
  """The arrays of all files that an index names, each where the index says it is."""
  file_of = read_index(index)
  state: dict[str, np.ndarray] = {}
  for file in sorted(set(file_of.values())):
    shard = read_arrays(index.parent / file).arrays
    listed = {name for name, place in file_of.items() if place == file}
    if listed != set(shard):
      raise InputError(
        f"expected in {index.parent / file} the {len(listed)} arrays that {index.name} lists, got "
        f"{len(shard)}, {sorted(listed ^ set(shard))[0]!r} differs: get both again"
      )
    state.update(shard)
  return state


def check_float(value: np.ndarray, name: str, where: str) -> None:
  """Checks the type of weights.

  Raises:
    InputError: another type than float16, bfloat16 or float32, with the array's name.
  """
  if value.dtype not in (np.float16, np.float32, jnp.bfloat16):
    raise InputError(
      f"expected float16, bfloat16 or float32 weights, {name!r} is {value.dtype} in {where}: "
      "save it with one of these types"
    )


def float32(value: np.ndarray, name: str, where: str) -> np.ndarray:
  """A float32 copy of weights.

  Raises:
    InputError: see `check_float`, or values that are NaN or infinite, with the array's name.
  """
  check_float(value, name, where)
  copy = np.array(value, np.float32, order="C")
  finite = np.isfinite(copy)
  if not finite.all():
    raise InputError(
      f"expected finite weights, {copy.size - finite.sum():,} of the {copy.size:,} values of "
      f"{name!r} are NaN or infinite in {where}: get the file again, or save it as float32"
    )
  return copy


@contextlib.contextmanager
def writing(path) -> Iterator[pathlib.Path]:
  """A temporary path that becomes `path`; see `paths.replacing`.

  Raises:
    InputError: the file cannot be written, or `path` is a device, a link, or a folder.
  """
  # As root a rename replaces `/dev/null` as well.
  if os.path.lexists(path) and (os.path.islink(path) or not os.path.isfile(path)):
    kind = "a link" if os.path.islink(path) else "a folder or a device"
    raise InputError(f"cannot write {path}, which is {kind}: name a new file or one to replace")
  try:
    with replacing(path) as temporary:
      yield temporary
  except (OSError, safetensors.SafetensorError) as error:
    raise InputError(
      f"cannot write {path} ({_reason(error)}): check the folder and the free disk space"
    ) from None


def write_safetensors(path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
  """Writes arrays by name; readers see the old file or the new one.

  Raises:
    InputError: infinity or NaN in an array, or the file cannot be written.
  """
  for name, value in arrays.items():
    if not np.isfinite(value).all():
      raise InputError(
        f"expected finite numbers in {name}, got infinity or NaN as {value.dtype} for {path}: use "
        "float32 or check the weights"
      )
  with writing(path) as temporary:
    temporary.touch()
    mode = temporary.stat().st_mode  # as the umask has it; the library lets nobody else read
    safetensors.numpy.save_file(dict(arrays), temporary, dict(metadata))
    temporary.chmod(mode)


def fingerprint(params) -> str:
  """16 hex digits that identify weights: of SHA-256 over sorted names, shapes and float32 bytes."""
  digest = hashlib.sha256()
  for name, value in sorted(traverse_util.flatten_dict(params, sep="/").items()):
    value = np.asarray(value, "<f4", order="C")
    digest.update(f"{name}{value.shape}".encode())
    digest.update(value.tobytes())
  return digest.hexdigest()[:16]


def _reason(error: Exception) -> str:
  return getattr(error, "strerror", None) or " ".join(str(error).split())[:100]
