"""Tuners of a frozen tower: the baselines with the same head as relationship prompts (Table 10).

What a tuner computes is separate from where it is attached. Either tower of CLIP calls
`tune(site, x, y)` after each of its projections and norms, with what went in and what came out; a
`Tuner` is the maths at one site and what it trains there. Its parameters are in the collection
`prompts`, under the tuner's name. A new tuner is an entry of TUNERS (docs/extending.md).

    bitfit   an offset to every bias (Ben Zaken et al., 2022)
    adapter  a bottleneck after both projections that end a branch (Houlsby et al., 2019)
    ssf      a factor and an offset for every channel of every result (Lian et al., 2022)
    lora     products of low rank added to the query and value projections (Hu et al., 2022)
    dora     the same, and the norms of the columns beside their directions (Liu et al., 2024)
    oft      block-diagonal rotations of what the attention's projections read (Qiu et al., 2023);
             those of both towers are what H-CLIP trains (Peng et al., 2025)
    lst      a narrow network beside the tower, no gradient through it (Sung et al., 2022)
    full     the vision tower itself: the only one that trains parameters of `params`

All start as the tower they tune, bit for bit. Those at sites tune the text tower, too, by the word
with `text_` before it. Two others train what the text tower reads:

    coop     the vectors of the first tokens of every sentence, as what is added to CLIP's (Zhou et
             al., 2022)
    maple    those before every block, and prompts of the vision tower made from them (Khattak et
             al., 2023); drawn at random, so that it starts elsewhere
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from rpn_jax.models import initializers, trained
from rpn_jax.models.clip import CLIPConfig

zeros, ones = nn.initializers.zeros, nn.initializers.ones

# Paths of a block's projections and norms in its parameters; those of a stem are their names.
BLOCK_SITES = {
  "ln_1": ("ln_1",),
  "in_proj": ("attn", "in_proj"),
  "out_proj": ("attn", "out_proj"),
  "ln_2": ("ln_2",),
  "c_fc": ("mlp", "c_fc"),
  "c_proj": ("mlp", "c_proj"),
}


@dataclasses.dataclass(frozen=True)
class Site:
  """A projection or norm of a tower: its name and the channels it reads and writes."""

  name: str
  inputs: int
  outputs: int


@dataclasses.dataclass(frozen=True)
class Tuner:
  """One way to tune a tower.

  Attributes:
    parameters: (site, config) -> {name: (initializer, shape)}; {} leaves the site alone. The
      config has the tuners' settings, such as `lora_rank` of an RPNConfig.
    apply: (parameters of the site, x, y) -> another y.
    merge: (parameters of the site, weights of the site) -> weights that give the tuned result by
      themselves; None where there are no such weights.
    reads_weights: whether `apply` takes the weights of the site, a projection, too.
  """

  parameters: Callable[[Site, Any], dict]
  apply: Callable
  merge: Callable | None = None
  reads_weights: bool = False


def _bitfit_parameters(site: Site, config: Any) -> dict:
  return {} if site.name == "patch_embed" else {"bias": (zeros, (site.outputs,))}


def _adapter_parameters(site: Site, config: Any) -> dict:
  if site.name not in ("out_proj", "c_proj"):
    return {}
  width, bottleneck = site.outputs, config.adapter_width
  return {
    "down": (initializers.uniform(width**-0.5), (width, bottleneck)),
    "down_bias": (zeros, (bottleneck,)),
    "up": (zeros, (bottleneck, width)),
    "up_bias": (zeros, (width,)),
  }


def _adapter(p: dict, x: jax.Array, y: jax.Array) -> jax.Array:
  hidden = jax.nn.gelu(y @ p["down"] + p["down_bias"])
  return y + hidden @ p["up"] + p["up_bias"]


def _ssf_parameters(site: Site, config: Any) -> dict:
  return {"scale": (ones, (site.outputs,)), "shift": (zeros, (site.outputs,))}


def _ssf_merge(p: dict, weights: dict) -> dict:
  factor = "kernel" if "kernel" in weights else "scale"
  bias = weights.get("bias", 0.0) * p["scale"] + p["shift"]
  return {factor: weights[factor] * p["scale"], "bias": bias}


def _lora_parameters(site: Site, config: Any) -> dict:
  if site.name != "in_proj":
    return {}
  down, up = (site.inputs, config.lora_rank), (config.lora_rank, site.inputs)
  random = initializers.uniform(site.inputs**-0.5)
  return {"q_a": (random, down), "q_b": (zeros, up), "v_a": (random, down), "v_b": (zeros, up)}


def _lora(p: dict, x: jax.Array, y: jax.Array) -> jax.Array:
  q, v = x @ p["q_a"] @ p["q_b"], x @ p["v_a"] @ p["v_b"]
  return y + jnp.concatenate([q, jnp.zeros_like(q), v], -1)


def _lora_merge(p: dict, weights: dict) -> dict:
  kernel = weights["kernel"]
  return {**weights, "kernel": _lora(p, jnp.eye(len(kernel)), kernel)}


def _dora_parameters(site: Site, config: Any) -> dict:
  parameters = _lora_parameters(site, config)
  norms = dict.fromkeys(("q_norm", "v_norm"), (zeros, (site.inputs,)))
  return {**parameters, **norms} if parameters else {}


def _dora_thirds(p: dict, weights: dict) -> list[tuple[jax.Array, jax.Array, jax.Array]]:
  """Of queries and values: the frozen kernel, the added product, and the factor of the columns.

  A column's trained norm is that of the frozen kernel plus an offset, which starts at 0. As in the
  paper (section 4.3), no gradient passes through the norm that it is divided by.
  """
  found = []
  for name, kernel in zip(("q", "v"), jnp.split(weights["kernel"].astype(jnp.float32), 3, 1)[::2]):
    product = p[f"{name}_a"] @ p[f"{name}_b"]
    # By one reduction, since two may differ in their last bits where the product is still 0.
    frozen, norm = jnp.linalg.norm(jnp.stack([kernel, kernel + product]), axis=1)
    factor = (frozen + p[f"{name}_norm"]) / jax.lax.stop_gradient(norm)
    found.append((kernel, product, factor))
  return found


def _dora(p: dict, x: jax.Array, y: jax.Array, weights: dict) -> jax.Array:
  # As what is added to y, so that factors of 1 and products of 0 leave its bits alone.
  q, v = (
    (factor - 1) * (x @ kernel.astype(x.dtype)) + factor * (x @ p[f"{name}_a"] @ p[f"{name}_b"])
    for name, (kernel, _, factor) in zip(("q", "v"), _dora_thirds(p, weights))
  )
  return y + jnp.concatenate([q, jnp.zeros_like(q), v], -1)


def _dora_merge(p: dict, weights: dict) -> dict:
  q, v = (factor * (kernel + product) for kernel, product, factor in _dora_thirds(p, weights))
  keys = jnp.split(weights["kernel"], 3, 1)[1]
  return {**weights, "kernel": jnp.concatenate([q, keys, v], 1)}


def _oft_parameters(site: Site, config: Any) -> dict:
  if site.name not in ("in_proj", "out_proj"):
    return {}
  side = config.oft_block
  if site.inputs % side:
    divisors = [d for d in range(2, site.inputs + 1) if site.inputs % d == 0]
    nearest = min(divisors, key=lambda d: abs(d - side))
    raise ValueError(
      f"oft_block={side}: expected a divisor of the tower's width, {site.inputs}, such as {nearest}"
    )
  # Queries, keys and values have rotations of their own.
  return {"skew": (zeros, (site.outputs // site.inputs, site.inputs // side, side, side))}


def _rotations(p: dict) -> jax.Array:
  """Orthogonal (parts, blocks, side, side), by Cayley's map of the skew-symmetric part."""
  skew = (p["skew"] - p["skew"].mT) / 2
  one = jnp.eye(skew.shape[-1])
  return jnp.linalg.solve(one - skew, one + skew)


def _oft(p: dict, x: jax.Array, y: jax.Array, weights: dict) -> jax.Array:
  turned = (_rotations(p) - jnp.eye(p["skew"].shape[-1])).astype(x.dtype)
  blocks = x.reshape(*x.shape[:-1], *turned.shape[1:3])
  moved = jnp.einsum("...ki,pkij->p...kj", blocks, turned).reshape(len(turned), *x.shape)
  kernels = jnp.split(weights["kernel"].astype(x.dtype), len(turned), 1)
  return y + jnp.concatenate([m @ k for m, k in zip(moved, kernels)], -1)


def _oft_merge(p: dict, weights: dict) -> dict:
  rotations, kernel = _rotations(p), weights["kernel"]
  parts, blocks, side, _ = rotations.shape
  kernel = kernel.reshape(blocks, side, parts, -1)
  turned = jnp.einsum("pkij,kjpo->kipo", rotations, kernel)
  return {**weights, "kernel": turned.reshape(weights["kernel"].shape)}


TUNERS = {
  "adapter": Tuner(_adapter_parameters, _adapter),
  "bitfit": Tuner(
    _bitfit_parameters,
    lambda p, x, y: y + p["bias"],
    lambda p, weights: {**weights, "bias": weights["bias"] + p["bias"]},
  ),
  "dora": Tuner(_dora_parameters, _dora, _dora_merge, reads_weights=True),
  "lora": Tuner(_lora_parameters, _lora, _lora_merge),
  "oft": Tuner(_oft_parameters, _oft, _oft_merge, reads_weights=True),
  "ssf": Tuner(_ssf_parameters, lambda p, x, y: y * p["scale"] + p["shift"], _ssf_merge),
}
# Not attached to sites: prompts (rpn.py), a side network, the tower itself, the head alone.
OTHERS = ("rpn", "vpt", "lst", "full", "lpm")
# Of the text tower: what it reads, and the tuners at its sites.
CONTEXTS, TEXT = ("coop", "maple"), "text_"
# Each of them is a change of the same weights by its own rule: one of them for a tower.
EXCLUSIVE = ("lora", "dora", "oft")


def parse(words: str) -> tuple[str, ...]:
  """The tuners of a string like "rpn+lora".

  Raises:
    ValueError: an unknown or repeated word.
  """
  texts = (f"{TEXT}{name}" for name in TUNERS)
  known, found = sorted((*OTHERS, *CONTEXTS, *TUNERS, *texts)), tuple(words.split("+"))
  if not set(found) <= set(known) or len(set(found)) < len(found):
    raise ValueError(
      f'tuner: expected words joined by "+", each once, of {", ".join(known)}, got {words!r}'
    )
  for group in (CONTEXTS, EXCLUSIVE, tuple(f"{TEXT}{name}" for name in EXCLUSIVE)):
    if len(clash := [word for word in group if word in found]) > 1:
      raise ValueError(f"tuner: expected one of {', '.join(clash)} at the most, got {words!r}")
  return found


def check(words: Sequence[str], config: Any, clip: CLIPConfig) -> None:
  """Checks settings of tuners that depend on a CLIP.

  Raises:
    ValueError: rotations of `oft` that the width of a tower cannot be divided into, or a side
      network of `lst` whose width its heads cannot divide.
  """
  side, heads = clip.vision_width // config.lst_reduction, clip.vision_heads
  if "lst" in words and (not side or side % heads):
    raise ValueError(
      f"lst_reduction={config.lst_reduction}: expected a number that makes of the tower's width "
      f"{clip.vision_width} a multiple of its {heads} heads, got a side network of {side}"
    )
  for word, width in (("oft", clip.vision_width), (f"{TEXT}oft", clip.text_width)):
    if word in words:
      TUNERS["oft"].parameters(Site("in_proj", width, 3 * width), config)


def of_text(words: Sequence[str]) -> tuple[str, ...]:
  """Those of a network's tuners that work in the text tower."""
  return tuple(word for word in words if word in CONTEXTS or word.startswith(TEXT))


@flax.struct.dataclass
class Tune:
  """The tune function of a tower's stem or of one block; a pytree, so that it passes `remat`.

  Attributes:
    parameters: tuner -> site -> name -> array.
  """

  parameters: dict

  def __call__(
    self, site: str, x: jax.Array, y: jax.Array, layer: nn.Module | None = None
  ) -> jax.Array:
    """What the tuners, in the order of their names, make of the result y of a site.

    `layer` is the projection whose result it is.
    """
    for name, sites in sorted(self.parameters.items()):
      if site in sites:
        tuner = TUNERS[name]
        weights = [layer.variables["params"]] if tuner.reads_weights and layer else []
        # Bottlenecks work in the tower's compute type, sums in the result's.
        y = tuner.apply(sites[site], x.astype(y.dtype), y, *weights).astype(y.dtype)
    return y


def tune_part(tuned: dict, part: str) -> Tune:
  """The tune function of a part of a tower, from its tuners' parameters {tuner: see `initial`}."""
  return Tune({name: tree[part] for name, tree in tuned.items() if part in tree})


def sites(clip: CLIPConfig, tower: str = "visual") -> dict[str, list[Site]]:
  """The sites of a tower, "visual" or "text", by part: "stem", "block_0", …"""
  if tower == "visual":
    d, layers, hidden = clip.vision_width, clip.vision_layers, clip.vision_mlp_width
    stem = [Site("patch_embed", 3 * clip.patch_size**2, d)]
    stem += [Site("ln_pre", d, d)] if clip.vision == "clip" else []
    stem += [Site("ln_post", d, d)]
  else:
    d, layers, hidden = clip.text_width, clip.text_layers, None
    stem = [Site("ln_final", d, d)]
  hidden = hidden or 4 * d
  block = [
    Site("ln_1", d, d), Site("in_proj", d, 3 * d), Site("out_proj", d, d),
    Site("ln_2", d, d), Site("c_fc", d, hidden), Site("c_proj", hidden, d),
  ]  # fmt: skip
  return {"stem": stem, **{f"block_{i}": block for i in range(layers)}}


def initial(
  tuner: Tuner, clip: CLIPConfig, config: Any, key: jax.Array, tower: str = "visual"
) -> dict[str, dict]:
  """Initial parameters of a tuner in one tower: part -> site -> name -> array.

  Args:
    tuner: see `Tuner`.
    clip: the architecture of the tower.
    config: the tuners' settings.
    key: of random initial values.
    tower: "visual" or "text".
  """
  tree: dict[str, dict] = {}
  for part, places in sites(clip, tower).items():
    for site in places:
      for name, (init, shape) in tuner.parameters(site, config).items():
        key, own = jax.random.split(key)
        value = init(own, shape, jnp.float32)
        tree.setdefault(part, {}).setdefault(site.name, {})[name] = value
  return tree


def merge_tower(weights: dict, tuned: dict) -> dict:
  """Weights of a tower, either one, that give the tuned result by themselves.

  Args:
    weights: the parameters of the tower.
    tuned: tuner -> its parameters, see `initial`; every tuner has a `merge`.
  """
  flat = flax.traverse_util.flatten_dict(jax.tree.map(np.asarray, weights))
  for tuner, tree in sorted(tuned.items()):
    for part, places in tree.items():
      for site, p in places.items():
        path = (part, *BLOCK_SITES[site]) if part != "stem" else (site,)
        here = {k[-1]: v for k, v in flat.items() if k[:-1] == path}
        fold = TUNERS[tuner].merge
        if fold is None:
          raise ValueError(f"{tuner} has no weights to put into a tower")
        here = fold(p, here)
        if site == "patch_embed":  # has no bias; every patch gets its position's row added
          rows = np.array(flat["position_embedding",])
          rows[1:] += here.pop("bias")
          flat["position_embedding",] = rows
        flat |= {(*path, k): np.asarray(v) for k, v in here.items()}
  return flax.traverse_util.unflatten_dict(flat)


def merge(config: Any, params: dict, tree: dict) -> tuple[Any, dict, dict]:
  """An RPN's tuners put into its tower's weights: the same outputs without their cost.

  Args:
    config: of the network, an RPNConfig.
    params: the frozen tower.
    tree: what is trained, see `trained.join`.

  Returns:
    Config, `params` and `prompts` without the tuners. A tuner at sites that has no such weights
    (the adapter) keeps all of them beside the tower.
  """
  params, rest = trained.join(params, tree).values()
  at_sites = [name for name in parse(config.tuner) if name in TUNERS]
  if any(TUNERS[name].merge is None for name in at_sites):
    return config, params, rest
  kept = [name for name in parse(config.tuner) if name not in (*at_sites, "full")]
  tuned = {name: rest.pop(name) for name in at_sites}
  if tuned:
    params = {**params, "visual": merge_tower(params["visual"], tuned)}
  return dataclasses.replace(config, tuner="+".join(kept) or "lpm"), params, rest
