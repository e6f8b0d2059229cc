"""The devices of one process as a mesh, and batches on it."""

import jax
import numpy as np

from rpn_jax.errors import InputError


def data_mesh() -> jax.sharding.Mesh:
  """All local devices along one axis, `data`."""
  return jax.sharding.Mesh(np.array(jax.local_devices()), ("data",))


def check_batch_size(batch_size: int, mesh: jax.sharding.Mesh) -> None:
  if batch_size % mesh.size:
    raise InputError(
      f"config.data.batch_size={batch_size} does not divide among {mesh.size} devices: "
      f"make it a multiple of {mesh.size}"
    )


def put_batch(batch: dict, mesh: jax.sharding.Mesh) -> dict:
  """Host arrays (B, ...) on the devices, split along the batch."""
  split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
  return jax.device_put(batch, split)
