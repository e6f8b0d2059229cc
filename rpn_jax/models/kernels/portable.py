"""The kernels of several platforms in one program, which is stored and compiled for one later.

An operation of our own whose lowering differs by platform: `jax.lax.platform_dependent` would
lower a TPU's kernel for CPUs as well, which is refused. It has no derivative.
"""

import dataclasses
import functools
from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import mlir

from rpn_jax.models.kernels import LEAN, PLATFORMS, Kernels

# As `jax.export` names platforms. cuDNN's attention is for the GPUs at hand, and its form is not
# one that JAX keeps for stored programs.
VERSIONS = {"cpu": PLATFORMS["cpu"], "cuda": LEAN, "tpu": PLATFORMS["tpu"]}

self_attend_p = Primitive("self_attend")
attend_p = Primitive("attend")


def self_attend(
  qkv_BxNxF: jax.Array, extra_BxPxF: jax.Array | None, heads: int, causal: bool = False
) -> jax.Array:
  """`layers.self_attend`, by the version of each platform."""
  extra = () if extra_BxPxF is None else (extra_BxPxF,)
  return self_attend_p.bind(qkv_BxNxF, *extra, heads=heads, causal=causal)


def attend(
  q_BxNxHxd: jax.Array, k_BxMxHxd: jax.Array, v_BxMxHxd: jax.Array, causal: bool = False
) -> jax.Array:
  """`layers.attend`, by the version of each platform."""
  return attend_p.bind(q_BxNxHxd, k_BxMxHxd, v_BxMxHxd, causal=causal)


def _self_attend_by(
  kernels: Kernels, qkv: jax.Array, *extra: jax.Array, heads: int, causal: bool
) -> jax.Array:
  return kernels.self_attend(qkv, *(extra or (None,)), heads, causal)


def _attend_by(kernels: Kernels, *arrays: jax.Array, causal: bool) -> jax.Array:
  return kernels.attend(*arrays, causal)


def _register(primitive: Primitive, by: Any) -> None:
  def shape(*arrays: Any, **settings: Any) -> Any:
    version = functools.partial(by, LEAN, **settings)
    out = jax.eval_shape(version, *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays))
    return jax.core.ShapedArray(out.shape, out.dtype)

  primitive.def_abstract_eval(shape)
  for platform, version in VERSIONS.items():
    rule = mlir.lower_fun(functools.partial(by, version), multiple_results=False)
    mlir.register_lowering(primitive, rule, platform=platform)


_register(self_attend_p, _self_attend_by)
_register(attend_p, _attend_by)

PORTABLE = dataclasses.replace(LEAN, attend=attend, self_attend=self_attend)
