"""What a network trains, apart from what is frozen.

The trained tree holds the `prompts` collection and, under their own names "visual" and "text", the
trained parameters of CLIP's towers. Optimizer and checkpoints know this tree alone; the frozen rest
of `params` is neither copied nor stored.

CLIP's attention has one kernel for queries, keys and values. Where only some of them are trained,
both trees have its thirds, `in_proj/query`, `in_proj/key` and `in_proj/value`, in its place.
"""

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util

from rpn_jax.models.block import Block

TOWERS: tuple[str, ...] = ("visual", "text")
FUSED, THIRDS = "kernel", ("query", "key", "value")
_ENDS = tuple(f"/in_proj/{third}" for third in THIRDS)
_flat = functools.partial(traverse_util.flatten_dict, sep="/")


def split(params: Mapping, pattern: str) -> tuple[dict, dict]:
  """The trained and the frozen part of the collection `params`.

  Args:
    params: nested dictionaries.
    pattern: regular expression over whole '/'-joined paths, such as "visual/.*", or
      "visual/.*/in_proj/(query|value)" for thirds of kernels; "" matches none.

  Raises:
    ValueError: a pattern that names no parameter, or parameters outside the towers.
  """
  matches = re.compile(pattern).fullmatch if pattern else lambda name: None
  flat: dict[str, jax.Array] = {}
  for name, x in _flat(params).items():
    apart = {} if matches(name) else thirds(name, x)
    flat |= apart if any(map(matches, apart)) else {name: x}
  roots = {name.partition("/")[0] for name in flat if matches(name)}
  if roots - set(TOWERS) or (pattern and not roots):
    raise ValueError(
      f"expected a pattern of parameters in {' or '.join(TOWERS)}, got {pattern!r} of "
      f"{', '.join(sorted(params))}"
    )
  part = lambda kept: {name: x for name, x in flat.items() if bool(matches(name)) == kept}
  trained, frozen = (traverse_util.unflatten_dict(part(kept), sep="/") for kept in (True, False))
  return trained, frozen


def thirds(name: str, x: jax.Array) -> dict[str, jax.Array]:
  """The thirds of a fused input projection by their paths; {} of any other parameter."""
  path, _, leaf = name.rpartition("/")
  if leaf != FUSED or not path.endswith("/in_proj"):
    return {}
  width = x.shape[1] // len(THIRDS)
  return {f"{path}/{t}": x[:, i * width : (i + 1) * width] for i, t in enumerate(THIRDS)}


def in_compute_type(frozen: Mapping, dtype: Any) -> dict:
  """What is not trained, the kernels of the towers' blocks in the type they are multiplied in.

  A program would cast them each time, to the same values, and read twice the bytes for it.
  """
  kernels = re.compile(rf".*/block_\d+/(attn|mlp)/\w+/({'|'.join((FUSED, *THIRDS))})")
  flat = _flat(frozen)
  other = {
    name: x for name, x in flat.items() if kernels.fullmatch(name) and x.dtype != jnp.dtype(dtype)
  }
  # On a device all in one program: one for each shape would take longer to compile.
  on_host = not any(isinstance(x, jax.Array) for x in other.values())
  cast = _cast if on_host else jax.jit(_cast, static_argnums=1)
  return traverse_util.unflatten_dict({**flat, **cast(other, dtype)}, sep="/")


def _cast(arrays: Mapping, dtype: Any) -> dict:
  return {name: x.astype(dtype) for name, x in arrays.items()}


def join(params: Mapping, tree: Mapping) -> dict:
  """The collections to apply a network with: {"params": …, "prompts": …}.

  Args:
    params: the frozen parameters; those that the tree trains may be among them or not.
    tree: what is trained.
  """
  towers = {name: x for name, x in tree.items() if name in TOWERS}
  prompts = {name: x for name, x in tree.items() if name not in TOWERS}
  flat = {**_flat(params), **_flat(towers)}
  for path in {name.rpartition("/")[0] for name in flat if name.endswith(_ENDS)}:
    fused = thirds(f"{path}/{FUSED}", flat[f"{path}/{FUSED}"]) if f"{path}/{FUSED}" in flat else {}
    parts = [flat.pop(name, fused.get(name)) for name in (f"{path}/{third}" for third in THIRDS)]
    flat[f"{path}/{FUSED}"] = jnp.concatenate(parts, axis=1)
  return {"params": traverse_util.unflatten_dict(flat, sep="/"), "prompts": prompts}


def init_prompts(network: Any, params: Mapping, text: Any, key: jax.Array, image_size: int) -> dict:
  """Initial values of what is trained: the `prompts` collection and the trained part of `params`.

  Args:
    network: a `Network`.
    params: the towers it uses.
    text: what `network.text_input` gives for some class names; no shape depends on how many.
    key: random key.
    image_size: side of a training crop, pixels.
  """
  trained, _ = split(params, network.trained)
  # A copy: the training step donates its state.
  copied = jax.tree.map(jnp.copy, trained)
  return {**_init(network, params, text, key, image_size), **copied}


# The key is an argument: one program for all seeds, and XLA need not draw the numbers of a constant
# key to compile it.
@functools.partial(jax.jit, static_argnums=(0, 4))
def _init(network: Any, params: Mapping, text: Any, key: jax.Array, image_size: int) -> dict:
  keys = dict(zip(("prompts", "dropout", "gate"), jax.random.split(key, 3)))
  image = jnp.zeros((1, image_size, image_size, 3))
  _, variables = network.apply({"params": params}, image, text, rngs=keys, mutable=["prompts"])
  return variables.get("prompts", {})


def prompt_shapes(network: Any, params: Mapping, text: Any, image_size: int) -> dict:
  """Shapes and types of what `init_prompts` returns; its arguments but the key."""

  def pass_blocks(run: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
    # A block holds no prompts, and its result has the shape of its input.
    if isinstance(context.module, Block) and context.method_name == "__call__":
      return args[0]
    return run(*args, **kwargs)

  def init(text: Any) -> dict:
    return init_prompts(network, params, text, jax.random.key(0), image_size)

  with nn.intercept_methods(pass_blocks):  # half the time of tracing them
    return jax.eval_shape(init, text)
