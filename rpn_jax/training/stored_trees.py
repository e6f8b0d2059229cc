"""Trees of arrays in the types in which they were stored: checksums, shapes, types."""

import hashlib
from typing import Any

import jax
import numpy as np

from rpn_jax.base.errors import InputError
from rpn_jax.base.words import differences
from rpn_jax.training.unreadable import DamagedCheckpoint


def digest(tree: Any) -> str:
  """SHA-256 over names, types, shapes and bytes of a tree of arrays."""
  total = hashlib.sha256()
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    value = np.asarray(leaf)
    total.update(f"{jax.tree_util.keystr(path)} {value.dtype} {value.shape}".encode())
    total.update(np.ascontiguousarray(value).tobytes())
  return total.hexdigest()


def with_stored_types(tree: Any, stored: Any) -> Any:
  """A tree with the types in which it was stored, over which its checksum was taken.

  The types of the network's own tree depend on JAX's flags.

  Args:
    tree: shapes and types that the network would have.
    stored: Orbax's metadata of the stored tree; None if there is none.

  Raises:
    DamagedCheckpoint: the metadata are missing.
  """
  import orbax.checkpoint as ocp

  if stored is None:
    raise DamagedCheckpoint("an item is missing")
  types = {
    leaf.name: np.dtype(leaf.dtype)
    for leaf in jax.tree.leaves(stored.tree)
    if hasattr(leaf, "dtype")
  }

  def with_type(name: str, value: Any) -> Any:
    if not hasattr(value, "dtype"):  # an empty node, as optax has for parameters of other groups
      return value
    stored_type = types.get(name, value.dtype)
    same = stored_type == value.dtype
    return value if same else jax.ShapeDtypeStruct(value.shape, stored_type)

  return jax.tree.map(with_type, ocp.tree.get_param_names(tree), tree)


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
