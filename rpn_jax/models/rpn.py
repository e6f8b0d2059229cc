"""RPN: a frozen CLIP vision tower that segments, steered by relationship prompts.

Everything trained is in the collection `prompts`; the tower is in `params`. One forward pass
serves training and inference; the text embeddings are an input, computed once.
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from rpn_jax.base.errors import InputError
from rpn_jax.models import heads, ladder, prompts, rpm, tuners
from rpn_jax.models.clip import (
  REMAT_POLICIES,
  CLIPConfig,
  VisionTransformer,
  l2_normalize,
  resize_grid,
)

# Fields of words, and the words; those of `tuner` are joined by "+".
WORDS = {
  "itp": ("image_to_pixel", "no_image", "no_pixel"),
  "apg": ("parameter", "linear"),
  "m2oe": ("gated", "sum", "none"),
  "rpm_layers": ("all", "first", "last", "odd", "even", "none"),
  "combine": ("cat", "add", "mul"),
  "head": ("lpm_a", "lpm_b", "lpm_c", "released", "tfpm_a", "tfpm_b", "tfpm_c"),
}


@dataclasses.dataclass(frozen=True)
class RPNConfig:
  """What is trained, and how it is wired. The defaults are the paper's.

  Attributes:
    tuner: what adapts the tower, words joined by "+": "rpn" relationship prompts, "vpt" deep
      prompt tokens, the tuners of `peft`, or "lpm", nothing but the head.
    deep_tokens: P, free prompt tokens of "vpt" in every layer.
    adapter_width: bottleneck of "adapter".
    lora_rank: rank of "lora".
    lst_reduction: how many times narrower than the tower the side network of "lst" is.
    itp: "image_to_pixel" (Eq. 2), or without the image ("no_image") or the pixels ("no_pixel").
    apg: h as a bare "parameter" (Eq. 3), or as a "linear" layer: another start, and a bias.
    m2oe: before ITP the "gated" mixture of experts, their plain "sum", or "none".
    m2oe_reduced: R, the width of the experts.
    m2oe_experts: number of scales.
    m2oe_top_k: experts the gate keeps.
    h_shared: one h for all layers (release) or one per layer (paper, Eq. 3).
    h_grid: (rows, columns) of the grid h is stored on; it is resized to the token grid. None is
      the grid of CLIP's pre-training.
    rpm_layers: layers whose output makes relationship prompts for the next: "all" (but the last
      of the tower), the "first" or "last" of these, the "odd" or "even" ones, counted from 1, or
      "none".
    combine: relationship prompts as further tokens ("cat"), or their mean over the classes added
      to every patch token ("add") or multiplying it as 1 + mean ("mul").
    head: LPM variant a, b or c, the release's c, or TFPM, which trains nothing.
    class_embedding_copies: how often the class embedding is added to the class token; the
      released code adds it twice.
    prompt_dropout: dropout rate of projected prompts.

  Raises:
    InputError: an unknown word.
  """

  tuner: str = "rpn"
  deep_tokens: int = 40
  adapter_width: int = 64
  lora_rank: int = 8
  lst_reduction: int = 8
  itp: str = "image_to_pixel"
  apg: str = "parameter"
  m2oe: str = "gated"
  m2oe_reduced: int = 3
  m2oe_experts: int = 4
  m2oe_top_k: int = 2
  h_shared: bool = False
  h_grid: tuple[int, int] | None = None
  rpm_layers: str = "all"
  combine: str = "cat"
  head: str = "lpm_c"
  class_embedding_copies: int = 1
  prompt_dropout: float = 0.1

  def __post_init__(self):
    for field, allowed in WORDS.items():
      if getattr(self, field) not in allowed:
        raise InputError(
          f"config.model.{field} must be one of {', '.join(allowed)}, got {getattr(self, field)!r}"
        )
    known = sorted((*tuners.OTHERS, *tuners.TUNERS))
    unknown = [word for word in self.tuners if word not in known]
    if unknown or len(set(self.tuners)) < len(self.tuners):
      raise InputError(
        f'config.model.tuner: expected words joined by "+", each once, of {", ".join(known)}, '
        f"got {self.tuner!r}"
      )

  @property
  def tuners(self) -> tuple[str, ...]:
    return tuple(self.tuner.split("+"))

  @property
  def prompted(self) -> bool:
    """Whether any prompt tokens pass through the tower."""
    return "rpn" in self.tuners or "vpt" in self.tuners


class RPN(nn.Module):
  """Relationship prompt network.

  Attributes:
    clip: architecture of the frozen tower.
    config: see RPNConfig.
    dtype: compute type of the tower and of the head's matrix products.
    remat: what the tower's blocks compute again in the backward pass instead of storing it: "none",
      "dots" (the MLP and the norms, so that only attention's products are stored) or "full".
  """

  clip: CLIPConfig
  config: RPNConfig
  dtype: Any = jnp.float32
  remat: str = "none"

  def setup(self):
    c, width, layers = self.config, self.clip.vision_width, self.clip.vision_layers
    self.visual = VisionTransformer(self.clip, self.dtype)
    if not c.head.startswith("tfpm"):
      self.head = heads.LPM(c.head, self.dtype)
    if self.clip.vision == "vit":
      self.joint = prompts.torch_dense(self.clip.embed_dim, width, self.dtype)
    self.tuned = {
      name: prompts.tree(
        self, name, functools.partial(tuners.initial, tuners.TUNERS[name], self.clip, c)
      )
      for name in c.tuners
      if name in tuners.TUNERS
    }
    if "lst" in c.tuners:
      self.lst = ladder.LadderSide(self.clip, c.lst_reduction, self.dtype)
    if not c.prompted:
      return
    # Epsilon 1e-6 as released (the tower's own norms have 1e-5).
    self.prompt_norm = prompts.LayerNorm(epsilon=1e-6)
    self.prompt_proj = prompts.torch_dense(
      width, width, self.dtype, nn.initializers.normal((2 / width) ** 0.5)
    )
    init = prompts.uniform((6 / (3 * self.clip.patch_size**2 + width)) ** 0.5)
    if "vpt" in c.tuners:
      self.deep_tokens = prompts.prompt(self, "deep_tokens", init, (layers, c.deep_tokens, width))
    if "rpn" in c.tuners and self.prompting:
      rows, columns = c.h_grid or (self.clip.grid, self.clip.grid)
      shape = (self.clip.embed_dim if c.itp == "no_pixel" else rows * columns, width)
      per_layer = () if c.h_shared else (len(self.prompting),)
      if c.apg == "linear":
        init = prompts.uniform(shape[0] ** -0.5)
        self.h_bias = prompts.prompt(self, "h_bias", init, (*per_layer, width))
      self.h = prompts.prompt(self, "h", init, (*per_layer, *shape))
      # Without pixels in ITP there is nothing for the experts to see.
      if c.m2oe != "none" and c.itp != "no_pixel":
        mixture = (c.m2oe_reduced, c.m2oe_experts, c.m2oe_top_k, c.m2oe == "gated")
        self.m2oe = [rpm.M2oE(*mixture) for _ in self.prompting]

  @property
  def prompting(self) -> list[int]:
    """The layers, counted from 0, whose output makes relationship prompts."""
    layers = list(range(self.clip.vision_layers - 1))
    # The paper counts from 1: its odd layers are 0, 2, 4, … here.
    return {
      "all": layers, "first": layers[:1], "last": layers[-1:], "odd": layers[::2],
      "even": layers[1::2], "none": [],
    }[self.config.rpm_layers]  # fmt: skip

  def __call__(self, image_BxHxWx3, text_CxE, train: bool = False, first_example=0) -> jax.Array:
    """Class logits on the patch grid: (B, h, w, C) float32, before any sigmoid.

    Args:
      image_BxHxWx3: normalised images; sides are multiples of the patch size.
      text_CxE: unit-length text embeddings, one per class to be prompted and scored.
      train: dropout (rng `dropout`) and gate noise (rng `gate`) on.
      first_example: position of the first image in the global batch; the noise of an image
        depends on its position there, not on how the batch is split over devices.
    """
    c = self.config
    first_example = first_example if train else None
    x, grid = self.visual.embed(image_BxHxWx3, c.class_embedding_copies, self.tune("stem"))
    self.sow("intermediates", "embed", x)
    hidden = [x]
    relationship = None
    for i in range(self.clip.vision_layers):
      x = self.prompted_block(i, x, relationship, first_example)
      hidden.append(x)
      if "lst" in c.tuners and i == self.clip.vision_layers - 1:
        x = x + self.lst(hidden)
      z = self.read_out(x)
      patches, cls = z[:, 1:], z[:, 0]
      self.sow("intermediates", "patches", patches)
      self.sow("intermediates", "cls", cls)
      relationship = None
      if "rpn" in c.tuners and i in self.prompting:
        slot = self.prompting.index(i)
        if c.m2oe != "none" and c.itp != "no_pixel":
          mixed = self.m2oe[slot](x[:, 1:], grid, first_example)
          patches = self.read_out(mixed)
        m = rpm.itp(patches, cls, text_CxE, c.itp)
        relationship = rpm.apg(m, self.h_of(slot, grid))
        if c.apg == "linear":
          relationship += self.h_bias if c.h_shared else self.h_bias[slot]
        self.sow("intermediates", "m", m)
        self.sow("intermediates", "relationship", relationship)
    if c.head.startswith("tfpm"):
      logits = heads.tfpm(patches, cls, text_CxE, c.head[-1])
    else:
      logits = self.head(patches, cls, text_CxE)
    return rearrange(logits, "b (h w) c -> b h w c", h=grid[0])

  def tune(self, part: str) -> tuners.Tune:
    """The tune function of the stem or of a block."""
    return tuners.Tune({name: tree[part] for name, tree in self.tuned.items() if part in tree})

  def prompted_block(self, i, x_BxNxD, relationship_BxCxD, first_example):
    """Block i on [CLS, patches], which look at deep and relationship prompts, too.

    What the block would make of the prompts themselves is not used and not computed.
    """
    x, batch = x_BxNxD, x_BxNxD.shape[0]
    extra = []
    if "vpt" in self.config.tuners:
      deep = self.prompt_proj(self.deep_tokens[i])
      extra.append(jnp.broadcast_to(deep, (batch, *deep.shape)))
    if relationship_BxCxD is not None:
      extra.append(self.prompt_proj(relationship_BxCxD))
    rate = self.config.prompt_dropout
    if first_example is not None and rate:
      # A key for each kind: deep and relationship prompts drop independently.
      keys = [prompts.example_keys(self.make_rng("dropout"), first_example, batch) for _ in extra]
      extra = [prompts.dropout(e, rate, k) for e, k in zip(extra, keys)]
    extra = [e.astype(x.dtype) for e in extra]
    if first_example is not None:
      # The gradients of prompts are taken from those of the tokens before these are passed on:
      # XLA's CPU scheduler would keep the tokens' of every layer to the end.
      x, extra = jax.lax.optimization_barrier((x, extra))
    if relationship_BxCxD is not None and self.config.combine != "cat":
      mean = extra.pop().mean(1, keepdims=True)
      # A bare product would erase the patches, since prompts start small.
      add = self.config.combine == "add"
      patches = x[:, 1:] + mean if add else x[:, 1:] * (1 + mean)
      x = jnp.concatenate([x[:, :1], patches], axis=1)
    block = RPN.run_block
    if self.remat != "none":
      block = nn.remat(block, static_argnums=1, policy=REMAT_POLICIES[self.remat])
    x = block(self, i, x, jnp.concatenate(extra, axis=1) if extra else None)
    self.sow("intermediates", "hidden", x)
    return x

  def run_block(self, i, x_BxNxD, extra_BxPxD):
    return self.visual.run_block(i, x_BxNxD, tune=self.tune(f"block_{i}"), extra_BxPxD=extra_BxPxD)

  def read_out(self, x_BxNxD):
    """z = L2norm(ln_post(prompt_norm(x)) proj) of every token: (B, N, E)."""
    z = self.project(x_BxNxD)
    if self.clip.vision == "vit":
      z = self.joint(z).astype(jnp.float32)
    return l2_normalize(z)

  # In the backward pass the first norm is computed again for the second, not stored.
  @nn.remat
  def project(self, x_BxNxD):
    if self.config.prompted:
      x_BxNxD = self.prompt_norm(x_BxNxD)
    return self.visual.project(x_BxNxD, self.tune("stem"))

  def h_of(self, slot, grid):
    """h of a layer (Eq. 3) on the token grid: (N, D)."""
    h = self.h if self.config.h_shared else self.h[slot]
    if self.config.itp == "no_pixel":
      return h
    rows, columns = self.config.h_grid or (self.clip.grid, self.clip.grid)
    h = rearrange(h, "(h w) d -> h w d", h=rows, w=columns)
    return rearrange(resize_grid(h, *grid), "h w d -> (h w) d")
