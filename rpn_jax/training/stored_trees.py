"""Trees of arrays as they were stored: reading, checksums, shapes, types."""

import hashlib
import pathlib
from typing import Any

import jax
import numpy as np

from rpn_jax.base.errors import InputError
from rpn_jax.base.words import differences
from rpn_jax.training.unreadable import DamagedCheckpoint

# What tensorstore keeps of a database while its arrays are read, so as not to parse it for each.
CACHE_BYTES = 2**24


def digest(tree: Any) -> str:
  """SHA-256 over names, types, shapes and bytes of a tree of arrays."""
  total = hashlib.sha256()
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    value = np.asarray(leaf)
    total.update(f"{jax.tree_util.keystr(path)} {value.dtype} {value.shape}".encode())
    total.update(np.ascontiguousarray(value).tobytes())
  return total.hexdigest()


def read_tree(folder: pathlib.Path, like: Any) -> Any:
  """The arrays of an item as they were stored, one after another.

  They are read from the files of Orbax (zarr arrays in an OCDBT database) without Orbax, for two
  reasons. Orbax reads all arrays at once, and if one fails, closes an event loop that the threads
  of the other reads still call: where damaged checkpoints were read so, Python 3.13.0 crashed
  (docs/reliability.md). And it gives them the types of the network, which depend on JAX's flags,
  while checksums are over those stored.

  Args:
    folder: the item in a checkpoint.
    like: a tree of the same structure; shapes and types may differ.

  Raises:
    DamagedCheckpoint: it has other arrays.
    ValueError, OSError: from tensorstore, if it is damaged or cannot be read.
  """
  import orbax.checkpoint as ocp
  import tensorstore as ts

  context = ts.Context({"cache_pool": {"total_bytes_limit": CACHE_BYTES}})
  database = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{folder}/"}}
  keys = ts.KvStore.open(database, context=context).result().list().result()
  arrays = {}
  for name in (key.decode().removesuffix("/.zarray") for key in keys if key.endswith(b"/.zarray")):
    spec = {"driver": "zarr", "kvstore": {**database, "path": f"{name}/"}}
    arrays[name] = ts.open(spec, context=context).result().read().result()
  names, unused = ocp.tree.get_param_names(like), set(arrays)

  def take(name: str, value: Any) -> Any:
    if not hasattr(value, "dtype"):  # an empty node, as optax has for parameters of other groups
      return value
    if name not in arrays:
      raise DamagedCheckpoint(f"the array {name} of its {folder.name} is missing")
    unused.discard(name)
    return arrays[name]

  tree = jax.tree.map(take, names, like)
  if unused:
    raise DamagedCheckpoint(f"its {folder.name} has an array of another network: {min(unused)}")
  return tree


def check_types(tree: Any, like: Any, where: object) -> None:
  """Compares types, which are other ones under other flags of JAX.

  Raises:
    InputError: a checkpoint's tree has other types than the network's.
  """
  pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(like), strict=True)
  changed = sorted({f"{x.dtype} -> {y.dtype}" for x, y in pairs if x.dtype != y.dtype})
  if changed:
    raise InputError(
      f"{where} has other types than this process uses (checkpoint -> process: "
      f"{', '.join(changed)}); it was left as it is: unset JAX_ENABLE_X64, or set it as it was"
    )


def check_shapes(want: Any, got: Any, where: object) -> None:
  """Compares shapes, since Orbax silently restores arrays of other shapes than requested."""
  shapes = lambda tree: {
    jax.tree_util.keystr(path): np.shape(leaf)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }
  if changed := differences(shapes(got), shapes(want)):
    raise InputError(
      f"{where} has other shapes than this network (checkpoint -> network: {changed[0]}): use the "
      "version of rpn_jax that wrote it, or a new --workdir"
    )
