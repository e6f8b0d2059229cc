"""TPUs that are not there: their published limits, and devices to compile for.

libtpu, which `pip install "jax[tpu]"` brings, holds the compiler of every generation and needs no
chip to compile for one.
"""

import dataclasses
import importlib.util
import os
import re
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies

from rpn_jax.base.console import silent_stderr
from rpn_jax.base.errors import InputError
from rpn_jax.base.words import check_known
from rpn_jax.devices import AXIS

EXAMPLES = "v5e:2x4, v4:2x2x4, v5p:2x2x1, v6e:16x16, or 2xv5e:16x16 for two slices"


@dataclasses.dataclass(frozen=True)
class Chip:
  """Published limits of a chip.

  Attributes:
    flops: multiplications and additions in bfloat16, 1/s.
    bandwidth: of its memory, bytes/s.
    memory: bytes that the compiler may plan with.
    options: how libtpu is asked for it.
    one_host: chips of a host along each axis.
  """

  flops: float
  bandwidth: float
  memory: int
  options: dict[str, Any] = dataclasses.field(default_factory=dict, hash=False)
  one_host: tuple[int, ...] = (2, 2, 1)


# Google Cloud's pages "TPU v4", "TPU v5e", "TPU v5p" and "TPU v6e", by chip: peak compute (bf16),
# HBM bandwidth. Memory is what the compiler names when a program does not fit; for v4, whose limit
# was not met, the published 32 GiB.
CHIPS = {
  "v4": Chip(275e12, 1228e9, 32 * 2**30, {"chip_config_name": "megacore"}),
  "v5e": Chip(197e12, 819e9, int(15.75 * 2**30)),
  "v5p": Chip(459e12, 2765e9, int(95.7 * 2**30)),
  "v6e": Chip(918e12, 1640e9, int(31.25 * 2**30)),
}


@dataclasses.dataclass(frozen=True)
class Pod:
  """Chips to compile for.

  Attributes:
    name: such as "v5e:16x16".
    chip: of what kind.
    mesh: all of them, in the order of a run.
    host: those of the first host.
  """

  name: str
  chip: Chip
  mesh: jax.sharding.Mesh
  host: jax.sharding.Mesh


def pod(name: str) -> Pod:
  """The chips of a topology: [SLICESx]GENERATION:AxB[xC].

  Raises:
    InputError: another form, an unknown generation, a shape that the generation does not have, or
      no libtpu.
  """
  match = re.fullmatch(r"(?:(\d+)x)?(v\w+):(\d+(?:x\d+){1,2})", name)
  if not match:
    raise InputError(f"--topology: expected chips such as {EXAMPLES}, got {name!r}")
  slices, generation, shape = match.groups()
  check_known("--topology: generation ", generation, CHIPS)
  if importlib.util.find_spec("libtpu") is None:
    raise InputError(
      "compiling for TPUs needs their compiler, libtpu, which is not installed: "
      'pip install "jax[tpu]", with the version of JAX that is installed'
    )
  chip, options = CHIPS[generation], dict(CHIPS[generation].options)
  sides = [*map(int, shape.split("x")), 1][:3]
  if any(side < host for side, host in zip(sides, chip.one_host)):
    options["chips_per_host_bounds"] = [min(pair) for pair in zip(sides, chip.one_host)]
  if slices:
    options["num_slices"] = int(slices)
  # Neither a metadata server nor another process is waited for.
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
  if generation == "v4" and len(shape.split("x")) == 2:
    shape = f"{shape}x1"
  try:
    with silent_stderr():  # libtpu tells what it looks for
      found = topologies.get_topology_desc(f"{generation}:{shape}", platform="tpu", **options)
  except (jax.errors.JaxRuntimeError, ValueError) as error:
    reason = " ".join(str(error).split())
    raise InputError(
      f"--topology={name}: libtpu has no such chips ({reason}); expected such as {EXAMPLES}"
    ) from None
  devices: list[Any] = sorted(found.devices, key=_place)
  first = [d for d in devices if d.process_index == devices[0].process_index]
  mesh, host = (jax.sharding.Mesh(np.array(part), (AXIS,)) for part in (devices, first))
  return Pod(name, chip, mesh, host)


def _place(device: Any) -> tuple[int, int]:
  return device.process_index, device.id
