"""Tuners of a frozen tower: the rivals of relationship prompts, under the same head (Table 10).

What a tuner computes is apart from where it is attached. The tower calls `tune(site, x, y)` after
each of its projections and norms, with what went in and what came out; a `Tuner` is the maths at
one site and what it trains there. All of it lives in the collection `prompts`, under the tuner's
name. A new one is an entry of TUNERS (docs/extending.md).

    bitfit   an offset to every bias (Ben Zaken et al., 2022)
    adapter  a bottleneck after both projections that end a branch (Houlsby et al., 2019)
    ssf      a factor and an offset for every channel of every result (Lian et al., 2022)
    lora     products of low rank added to the query and value projections (Hu et al., 2022)
    lst      a narrow network beside the tower, no gradient through it (Sung et al., 2022)
    full     the vision tower itself: the only one for which `params` are trained

All start as the tower they tune, to the bit.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from rpn_jax.models import prompts
from rpn_jax.models.clip import CLIPConfig

zeros, ones = nn.initializers.zeros, nn.initializers.ones
uniform_start = nn.initializers.lecun_uniform()

# Paths of a block's projections and norms in its parameters.
BLOCK_SITES = {
  "ln_1": ("ln_1",),
  "in_proj": ("attn", "in_proj"),
  "out_proj": ("attn", "out_proj"),
  "ln_2": ("ln_2",),
  "c_fc": ("mlp", "c_fc"),
  "c_proj": ("mlp", "c_proj"),
}
STEM_SITES = ("patch_embed", "ln_pre", "ln_post")


@dataclasses.dataclass(frozen=True)
class Site:
  """A projection or norm of the tower: its name and the channels it reads and writes."""

  name: str
  inputs: int
  outputs: int


@dataclasses.dataclass(frozen=True)
class Tuner:
  """One way to tune the tower.

  Attributes:
    parameters: (site, config) -> {name: (initialiser, shape)}; {} leaves the site alone.
    apply: (parameters of the site, x, y) -> another y.
    merge: (parameters of the site, weights of the site) -> weights that give the tuned result by
      themselves; None where there are no such weights.
  """

  parameters: Callable[[Site, Any], dict]
  apply: Callable
  merge: Callable | None = None


def _bitfit_parameters(site, config):
  return {} if site.name == "patch_embed" else {"bias": (zeros, (site.outputs,))}


def _adapter_parameters(site, config):
  if site.name not in ("out_proj", "c_proj"):
    return {}
  width, bottleneck = site.outputs, config.adapter_width
  return {
    "down": (prompts.uniform(width**-0.5), (width, bottleneck)),
    "down_bias": (zeros, (bottleneck,)),
    "up": (zeros, (bottleneck, width)),
    "up_bias": (zeros, (width,)),
  }


def _adapter(p, x, y):
  hidden = jax.nn.gelu(y @ p["down"] + p["down_bias"])
  return y + hidden @ p["up"] + p["up_bias"]


def _ssf_parameters(site, config):
  return {"scale": (ones, (site.outputs,)), "shift": (zeros, (site.outputs,))}


def _ssf_merge(p, weights):
  factor = "kernel" if "kernel" in weights else "scale"
  bias = weights.get("bias", 0.0) * p["scale"] + p["shift"]
  return {factor: weights[factor] * p["scale"], "bias": bias}


def _lora_parameters(site, config):
  if site.name != "in_proj":
    return {}
  down, up = (site.inputs, config.lora_rank), (config.lora_rank, site.inputs)
  random = prompts.uniform(site.inputs**-0.5)
  return {"q_a": (random, down), "q_b": (zeros, up), "v_a": (random, down), "v_b": (zeros, up)}


def _lora(p, x, y):
  q, v = x @ p["q_a"] @ p["q_b"], x @ p["v_a"] @ p["v_b"]
  return y + jnp.concatenate([q, jnp.zeros_like(q), v], -1)


def _lora_merge(p, weights):
  kernel = weights["kernel"]
  return {**weights, "kernel": _lora(p, jnp.eye(len(kernel)), kernel)}


TUNERS = {
  "adapter": Tuner(_adapter_parameters, _adapter),
  "bitfit": Tuner(
    _bitfit_parameters,
    lambda p, x, y: y + p["bias"],
    lambda p, weights: {**weights, "bias": weights["bias"] + p["bias"]},
  ),
  "lora": Tuner(_lora_parameters, _lora, _lora_merge),
  "ssf": Tuner(_ssf_parameters, lambda p, x, y: y * p["scale"] + p["shift"], _ssf_merge),
}
# What is no matter of sites: prompts (rpn.py), a side network, the tower itself, the head alone.
OTHERS = ("rpn", "vpt", "lst", "full", "lpm")


@flax.struct.dataclass
class Tune:
  """The tune function of the tower's stem or of one block; a pytree, so that it passes `remat`.

  Attributes:
    parameters: tuner -> site -> name -> array.
  """

  parameters: dict

  def __call__(self, site: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """What the tuners, in the order of their names, make of the result y of a site."""
    for name, sites in sorted(self.parameters.items()):
      if site in sites:
        # Bottlenecks work in the tower's compute type, sums in the result's.
        y = TUNERS[name].apply(sites[site], x.astype(y.dtype), y).astype(y.dtype)
    return y


def sites(clip: CLIPConfig) -> dict[str, list[Site]]:
  """The sites of the vision tower, by part: "stem", "block_0", …"""
  d = clip.vision_width
  block = [
    Site("ln_1", d, d), Site("in_proj", d, 3 * d), Site("out_proj", d, d),
    Site("ln_2", d, d), Site("c_fc", d, 4 * d), Site("c_proj", 4 * d, d),
  ]  # fmt: skip
  stem = [Site("patch_embed", 3 * clip.patch_size**2, d)]
  stem += [Site("ln_pre", d, d)] if clip.vision == "clip" else []
  parts = {f"block_{i}": block for i in range(clip.vision_layers)}
  return {"stem": [*stem, Site("ln_post", d, d)], **parts}


def initial(tuner: Tuner, clip: CLIPConfig, config, key: jax.Array) -> dict:
  """Initial parameters of a tuner: part -> site -> name -> array."""
  tree = {}
  for part, places in sites(clip).items():
    for site in places:
      for name, (init, shape) in tuner.parameters(site, config).items():
        key, own = jax.random.split(key)
        value = init(own, shape, jnp.float32)
        tree.setdefault(part, {}).setdefault(site.name, {})[name] = value
  return tree


def variables(params: dict, tree: dict) -> dict:
  """The collections to apply a network with, from the frozen tower and what is trained.

  Where the tower itself is trained ("full"), its parameters are the entry `visual` of the trained
  tree and take the place of the frozen ones.
  """
  if "visual" in tree:
    params, tree = {"visual": tree["visual"]}, {k: v for k, v in tree.items() if k != "visual"}
  return {"params": params, "prompts": tree}


def merged_config(config):
  """The config of a network whose tuners have been merged into its tower; see `merge`."""
  at_sites = [name for name in config.tuners if name in TUNERS]
  if any(TUNERS[name].merge is None for name in at_sites):
    return config
  kept = [name for name in config.tuners if name not in (*at_sites, "full")]
  return dataclasses.replace(config, tuner="+".join(kept) or "lpm")


def merge(config, params: dict, tree: dict) -> tuple[Any, dict, dict]:
  """Tuners put into the tower's weights: the same outputs without their cost.

  Args:
    config: of the network, an RPNConfig.
    params: the frozen tower.
    tree: what is trained.

  Returns:
    The three as they are without the tuners. Nothing changes where a tuner of sites has no such
    weights (the adapter).
  """
  smaller = merged_config(config)
  if smaller == config:
    return config, params, tree
  collections = variables(params, tree)
  visual, rest = collections["params"]["visual"], dict(collections["prompts"])
  flat = flax.traverse_util.flatten_dict(jax.tree.map(np.asarray, visual))
  for name in sorted(set(config.tuners) & set(TUNERS)):
    for part, places in rest.pop(name).items():
      for site, p in places.items():
        path = (part, *BLOCK_SITES[site]) if part != "stem" else (site,)
        here = {k[-1]: v for k, v in flat.items() if k[:-1] == path}
        weights = TUNERS[name].merge(p, here)
        if site == "patch_embed":  # has no bias; every patch gets its position's row added
          rows = np.array(flat["position_embedding",])
          rows[1:] += weights.pop("bias")
          flat["position_embedding",] = rows
        flat |= {(*path, k): np.asarray(v) for k, v in weights.items()}
  return smaller, {"visual": flax.traverse_util.unflatten_dict(flat)}, rest
