"""RPN: a frozen CLIP vision tower that segments, steered by relationship prompts.

Everything trained is in the collection `prompts`; the tower is in `params`. One forward pass
serves training and inference; the text embeddings are an input, computed once.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from rpn_jax.models import prompts, rpm
from rpn_jax.models.clip import CLIPConfig, VisionTransformer, l2_normalize, resize_grid


@dataclasses.dataclass(frozen=True)
class RPNConfig:
  """What is trained, and how it is wired. The defaults are the paper's.

  Attributes:
    prompt_tower: put prompts into the tower. False leaves CLIP's own features under the head
      ("LPM only").
    relationship_prompts: RPM on or off.
    deep_tokens: P, free prompt tokens in every layer.
    m2oe: multi-scale mixture of experts before ITP.
    m2oe_reduced: R, the width of the experts.
    m2oe_experts: number of scales.
    m2oe_top_k: experts the gate keeps.
    h_shared: one h for all layers (release) or one per layer (paper, Eq. 3).
    h_grid: (rows, columns) of the grid h is stored on; it is resized to the token grid. None is
      the grid of CLIP's pre-training.
    head: LPM variant, "paper" or "released".
    class_embedding_copies: how often the class embedding is added to the class token; the
      released code adds it twice.
    prompt_dropout: dropout rate of projected prompts.
  """

  prompt_tower: bool = True
  relationship_prompts: bool = True
  deep_tokens: int = 0
  m2oe: bool = True
  m2oe_reduced: int = 3
  m2oe_experts: int = 4
  m2oe_top_k: int = 2
  h_shared: bool = False
  h_grid: tuple[int, int] | None = None
  head: str = "paper"
  class_embedding_copies: int = 1
  prompt_dropout: float = 0.1


class RPN(nn.Module):
  """Relationship prompt network.

  Attributes:
    clip: architecture of the frozen tower.
    config: see RPNConfig.
    dtype: compute type of the tower and of the head's matrix products.
    remat: what the tower's blocks recompute in the backward pass, see VisionTransformer.
  """

  clip: CLIPConfig
  config: RPNConfig
  dtype: Any = jnp.float32
  remat: str = "none"

  def setup(self):
    c, width, layers = self.config, self.clip.vision_width, self.clip.vision_layers
    self.visual = VisionTransformer(self.clip, self.dtype, self.remat)
    self.head = rpm.LPM(c.head, self.dtype)
    if not c.prompt_tower:
      return
    # Epsilon 1e-6 as released (the tower's own norms have 1e-5).
    self.prompt_norm = prompts.LayerNorm(
      epsilon=1e-6, dtype=jnp.float32, use_fast_variance=False
    )
    token_init = prompts.uniform((6 / (3 * self.clip.patch_size**2 + width)) ** 0.5)
    if c.deep_tokens:
      self.deep_tokens = prompts.prompt(
        self, "deep_tokens", token_init, (layers, c.deep_tokens, width)
      )
    if c.relationship_prompts:
      rows, columns = c.h_grid or (self.clip.grid, self.clip.grid)
      shape = (rows * columns, width)
      self.h = prompts.prompt(
        self, "h", token_init, shape if c.h_shared else (layers - 1, *shape)
      )
      if c.m2oe:
        self.m2oe = [
          rpm.M2oE(c.m2oe_reduced, c.m2oe_experts, c.m2oe_top_k) for _ in range(layers - 1)
        ]
    if c.deep_tokens or c.relationship_prompts:
      self.prompt_proj = prompts.torch_dense(
        width, width, self.dtype, nn.initializers.normal((2 / width) ** 0.5)
      )

  def __call__(
    self, image_BxHxWx3, text_CxE, train: bool = False, first_example=0
  ) -> jax.Array:
    """Class logits on the patch grid: (B, h, w, C) float32, before any sigmoid.

    Args:
      image_BxHxWx3: normalised images; sides are multiples of the patch size.
      text_CxE: unit-length text embeddings, one per class to be prompted and scored.
      train: dropout (rng `dropout`) and gate noise (rng `gate`) on.
      first_example: position of the first image in the global batch; the noise of an image
        depends on its position there, not on how the batch is split over devices.
    """
    first_example = first_example if train else None
    x, grid = self.visual.embed(image_BxHxWx3, self.config.class_embedding_copies)
    self.sow("intermediates", "embed", x)
    layers = self.clip.vision_layers
    relationship = None
    for i in range(layers):
      x = self.prompted_block(i, x, relationship, first_example)
      patches, cls = self.read_out(x)
      self.sow("intermediates", "patches", patches)
      self.sow("intermediates", "cls", cls)
      if self.uses_rpm and i < layers - 1:
        if self.config.m2oe:
          mixed = self.m2oe[i](x[:, 1:], grid, first_example)
          patches = self.read_out(mixed, class_token=False)
        m = rpm.itp(patches, cls, text_CxE)
        relationship = rpm.apg(m, self.h_of(i, grid))
        self.sow("intermediates", "m", m)
        self.sow("intermediates", "relationship", relationship)
    logits = self.head(patches, cls, text_CxE)
    return rearrange(logits, "b (h w) c -> b h w c", h=grid[0])

  @property
  def uses_rpm(self) -> bool:
    return self.config.prompt_tower and self.config.relationship_prompts

  def prompted_block(self, i, x_BxNxD, relationship_BxCxD, first_example):
    """Block i on [CLS, deep prompts, relationship prompts, patches]; prompt outputs dropped."""
    batch = x_BxNxD.shape[0]
    extra = []
    if self.config.prompt_tower and self.config.deep_tokens:
      deep = self.prompt_proj(self.deep_tokens[i])
      extra.append(jnp.broadcast_to(deep, (batch, *deep.shape)))
    if relationship_BxCxD is not None:
      extra.append(self.prompt_proj(relationship_BxCxD))
    rate = self.config.prompt_dropout
    if first_example is not None and rate:
      # A key for each kind: deep and relationship prompts drop independently.
      keys = [prompts.example_keys(self.make_rng("dropout"), first_example, batch) for _ in extra]
      extra = [prompts.dropout(e, rate, k) for e, k in zip(extra, keys)]
    extra = [e.astype(x_BxNxD.dtype) for e in extra]
    count = sum(e.shape[1] for e in extra)
    x = jnp.concatenate([x_BxNxD[:, :1], *extra, x_BxNxD[:, 1:]], axis=1)
    x = self.visual.run_block(i, x)
    self.sow("intermediates", "hidden", x)
    return jnp.concatenate([x[:, :1], x[:, 1 + count :]], axis=1)

  def read_out(self, x_BxNxD, class_token: bool = True):
    """z = L2norm(ln_post(prompt_norm(x)) proj): patches (B, N, E) and the class token (B, E)."""
    if self.config.prompt_tower:
      x_BxNxD = self.prompt_norm(x_BxNxD)
    z = l2_normalize(self.visual.project(x_BxNxD))
    return (z[:, 1:], z[:, 0]) if class_token else z

  def h_of(self, i, grid):
    """h of layer i (Eq. 3) on the token grid: (N, D)."""
    h = self.h if self.config.h_shared else self.h[i]
    rows, columns = self.config.h_grid or (self.clip.grid, self.clip.grid)
    h = rearrange(h, "(h w) d -> h w d", h=rows, w=columns)
    return rearrange(resize_grid(h, *grid), "h w d -> (h w) d")
