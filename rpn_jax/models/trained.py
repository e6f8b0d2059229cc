"""What a network trains, apart from what is frozen.

The trained tree holds the `prompts` collection and, under their own names "visual" and "text", the
trained parameters of CLIP's towers. Optimizer and checkpoints know this tree alone; the frozen rest
of `params` is neither copied nor stored.
"""

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util

TOWERS = ("visual", "text")


def split(params: Mapping, pattern: str) -> tuple[dict, dict]:
  """The trained and the frozen part of the collection `params`.

  Args:
    params: nested dictionaries.
    pattern: regular expression over whole '/'-joined paths, such as "visual/.*"; "" matches none.

  Raises:
    ValueError: a pattern that names no parameter, or parameters outside the towers.
  """
  flat = traverse_util.flatten_dict(params, sep="/")
  names = {name for name in flat if pattern and re.fullmatch(pattern, name)}
  outside = {name.partition("/")[0] for name in names} - set(TOWERS)
  if outside or (pattern and not names):
    raise ValueError(
      f"expected a pattern of parameters in {' or '.join(TOWERS)}, got {pattern!r} of "
      f"{', '.join(sorted({name.partition('/')[0] for name in flat}))}"
    )
  part = lambda kept: {name: x for name, x in flat.items() if (name in names) == kept}
  trained, frozen = (traverse_util.unflatten_dict(part(kept), sep="/") for kept in (True, False))
  return trained, frozen


def join(params: Mapping, tree: Mapping) -> dict:
  """The collections to apply a network with: {"params": …, "prompts": …}.

  Args:
    params: the frozen parameters; those that the tree trains may be among them or not.
    tree: what is trained.
  """
  towers = {name: x for name, x in tree.items() if name in TOWERS}
  prompts = {name: x for name, x in tree.items() if name not in TOWERS}
  return {"params": _overlaid(params, towers), "prompts": prompts}


def _overlaid(below: Any, above: Any) -> Any:
  """`below` with the leaves of `above` in it."""
  if not (isinstance(below, Mapping) and isinstance(above, Mapping)):
    return above
  return {**below, **{k: _overlaid(below.get(k, {}), x) for k, x in above.items()}}


def init_prompts(network: Any, params: Mapping, text: Any, key: jax.Array, image_size: int) -> dict:
  """Initial values of what is trained: the `prompts` collection and the trained part of `params`.

  Args:
    network: a `Network`.
    params: the towers it uses.
    text: what `network.text_input` gives for some class names; no shape depends on how many.
    key: random key.
    image_size: side of a training crop, pixels.
  """
  keys = dict(zip(("prompts", "dropout", "gate"), jax.random.split(key, 3)))

  def init(params: Mapping, text: Any) -> dict:
    image = jnp.zeros((1, image_size, image_size, 3))
    _, variables = network.apply({"params": params}, image, text, rngs=keys, mutable=["prompts"])
    return variables.get("prompts", {})

  trained, _ = split(params, network.trained)
  # A copy: the training step donates its state.
  return {**jax.jit(init)(params, text), **jax.tree.map(jnp.copy, trained)}
