"""RPN: a frozen CLIP vision tower that segments, steered by relationship prompts.

Everything trained is in the collection `prompts`; the tower is in `params`. One forward pass
serves training and inference; the text embeddings are an input, computed once.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from rpn_jax.models import heads, initializers, ladder, prompts, rpm, text_side, trained, tuners
from rpn_jax.models.clip import CLIPConfig, TextTransformer, VisionTransformer, l2_normalize
from rpn_jax.models.kernels import TEXTBOOK, Kernels
from rpn_jax.models.network import Defaults, Windows, as_record
from rpn_jax.models.remat import NORM_POLICY, REMAT_POLICIES
from rpn_jax.models.resizing import resize_grid


class RPN(Defaults, nn.Module):
  """Relationship prompt network; see `Network`.

  Attributes:
    clip: architecture of the frozen tower.
    config: what is trained, and how it is wired: hashable, with the fields of
      `rpn_jax.config.RPNConfig`.
    dtype: compute type of the tower and of the head's matrix products.
    remat: what the tower's blocks compute again in the backward pass, see `VisionTransformer`.
    loss: name of the loss it is trained with, a key of `heads.SCORES`.
    kernels: see `Kernels`.

  Raises:
    ValueError: an unknown loss, remat policy or tuner.
  """

  clip: CLIPConfig
  config: Any
  dtype: Any = jnp.float32
  remat: str = "none"
  loss: str = "sigmoid"
  kernels: Kernels = TEXTBOOK

  section = "model"
  trainable = True
  independent = False  # the image's tokens attend to the prompts of all classes
  emphasis = 0.5  # half the range of a sigmoid

  def __post_init__(self) -> None:
    c = self.config
    tuners.check(tuners.parse(c.tuner), c, self.clip)
    if c.m2oe == "gated" and c.m2oe_top_k > c.m2oe_experts:
      raise ValueError(
        f"m2oe_top_k={c.m2oe_top_k}: expected at most m2oe_experts={c.m2oe_experts}, of which the "
        "gate keeps as many"
      )
    for name, known in (("loss", heads.SCORES), ("remat", REMAT_POLICIES)):
      if getattr(self, name) not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
    super().__post_init__()

  @classmethod
  def create(
    cls,
    clip: CLIPConfig,
    settings: Any,
    *,
    loss: str = "sigmoid",
    dtype: Any = jnp.float32,
    remat: str = "none",
    kernels: Kernels = TEXTBOOK,
  ) -> "RPN":
    """See `Network.create`."""
    return cls(clip, as_record(settings), dtype, remat, loss, kernels)

  @classmethod
  def windows(cls, clip: CLIPConfig) -> Windows:
    """Short side and windows of 512 pixels, which overlap by 86, for a tower of 224."""
    crop = round(512 / 224 * clip.image_size / clip.patch_size) * clip.patch_size
    overlap = round(86 / 224 * clip.image_size)
    return Windows(short_side=crop, crop=crop, stride=crop - overlap)

  @property
  def title(self) -> str:
    return self.config.tuner

  @property
  def trained(self) -> str:
    return "visual/.*" if "full" in self.tuner_names else ""

  @property
  def scores(self) -> Callable:
    return heads.SCORES[self.loss]

  @property
  def probabilities(self) -> Callable:
    return heads.unchanged

  @nn.nowrap
  def merged(self, params: dict, prompts: dict) -> tuple["RPN", dict, dict]:
    config, params, prompts = tuners.merge(self.config, params, prompts)
    return self.clone(config=config), params, prompts

  @property
  def tuner_names(self) -> tuple[str, ...]:
    """What adapts the towers."""
    return tuple(self.config.tuner.split("+"))

  @property
  def text_tuners(self) -> tuple[str, ...]:
    """Those of them that work in the text tower."""
    return tuners.of_text(self.tuner_names)

  @property
  def towers(self) -> tuple[str, ...]:  # type: ignore[override]
    return trained.TOWERS if self.text_tuners else trained.TOWERS[:1]

  @nn.nowrap
  def text_input(self, encoder: Any, names: Sequence[str]) -> Any:
    """Embeddings (C, E), or token ids (C, S, K, T) where the text tower is tuned."""
    if not self.text_tuners:
      return encoder.embed(names)
    return text_side.tokens(encoder, names, self.context_tokens)

  @property
  def context_tokens(self) -> int:
    """How many tokens of a sentence are trained."""
    return self.config.context_tokens if set(tuners.CONTEXTS) & set(self.tuner_names) else 0

  @property
  def prompted(self) -> bool:
    """Whether any prompts pass through the tower."""
    return "rpn" in self.tuner_names or "vpt" in self.tuner_names

  def setup(self) -> None:
    c, width, layers = self.config, self.clip.vision_width, self.clip.vision_layers
    dense = functools.partial(prompts.torch_dense, product=self.kernels.product)
    self.visual = VisionTransformer(self.clip, self.dtype, self.remat, self.kernels)
    if not c.head.startswith("tfpm"):
      self.head = heads.LPM(c.head, self.dtype, self.kernels)
    if self.clip.vision == "vit":
      self.joint = dense(self.clip.embed_dim, width, self.dtype)
    self.tuned = {
      name: prompts.tree(
        self, name, functools.partial(tuners.initial, tuners.TUNERS[name], self.clip, c)
      )
      for name in self.tuner_names
      if name in tuners.TUNERS
    }
    if self.text_tuners:
      self.text = TextTransformer(self.clip, self.dtype, self.remat, self.kernels)
      self.text_tuned = {
        name.removeprefix(tuners.TEXT): prompts.tree(
          self,
          name,
          functools.partial(
            tuners.initial, tuners.TUNERS[name.removeprefix(tuners.TEXT)], self.clip, c,
            tower="text",
          ),
        )
        for name in self.text_tuners
        if name not in tuners.CONTEXTS
      }  # fmt: skip
      text_shape, depth = (c.context_tokens, self.clip.text_width), self.coupled_layers
      if "coop" in self.tuner_names:
        self.offset = prompts.prompt(self, "offset", nn.initializers.zeros, text_shape)
      if depth:
        init = nn.initializers.normal(0.02)
        self.context = prompts.prompt(self, "context", init, (depth, *text_shape))
        self.coupling = [dense(width, self.clip.text_width, self.dtype) for _ in range(depth)]
    if "lst" in self.tuner_names:
      self.lst = ladder.LadderSide(self.clip, c.lst_reduction, self.dtype, self.kernels)
    if not self.prompted:
      return
    # Epsilon 1e-6 as in the official code (the tower's own norms have 1e-5).
    self.prompt_norm = prompts.LayerNorm(epsilon=1e-6, function=self.kernels.layer_norm)
    self.prompt_proj = dense(width, width, self.dtype, nn.initializers.normal((2 / width) ** 0.5))
    init = initializers.uniform((6 / (3 * self.clip.patch_size**2 + width)) ** 0.5)
    if "vpt" in self.tuner_names:
      self.deep_tokens = prompts.prompt(self, "deep_tokens", init, (layers, c.deep_tokens, width))
    if self.prompting:
      rows, columns = c.h_grid or (self.clip.grid, self.clip.grid)
      shape = (self.clip.embed_dim if c.itp == "no_pixel" else rows * columns, width)
      per_layer = () if c.h_shared else (len(self.prompting),)
      if c.apg == "linear":
        init = initializers.uniform(shape[0] ** -0.5)
        self.h_bias = prompts.prompt(self, "h_bias", init, (*per_layer, width))
      self.h = prompts.prompt(self, "h", init, (*per_layer, *shape))
      # Without pixels in ITP the experts have no input.
      if c.m2oe != "none" and c.itp != "no_pixel":
        mixture = (c.m2oe_reduced, c.m2oe_experts, c.m2oe_top_k, c.m2oe == "gated")
        self.m2oe = [rpm.M2oE(*mixture) for _ in self.prompting]

  @property
  def coupled_layers(self) -> int:
    """How many layers of both towers have prompts of maple: all of the shorter one."""
    layers = min(self.clip.text_layers, self.clip.vision_layers)
    return layers if "maple" in self.tuner_names else 0

  @property
  def prompting(self) -> list[int]:
    """The layers, counted from 0, whose output makes relationship prompts."""
    layers = list(range(self.clip.vision_layers - 1)) if "rpn" in self.tuner_names else []
    # The paper counts from 1: its odd layers are 0, 2, 4, … here.
    return {
      "all": layers, "first": layers[:1], "last": layers[-1:], "odd": layers[::2],
      "even": layers[1::2], "none": [],
    }[self.config.rpm_layers]  # fmt: skip

  def __call__(
    self,
    image_BxHxWx3: jax.Array,
    text_CxE: jax.Array,
    *,
    train: bool = False,
    example_offset: jax.Array | int = 0,
  ) -> jax.Array:
    """Class logits on the patch grid: (B, h, w, C) float32, before `scores`.

    Args:
      image_BxHxWx3: normalized images; sides are multiples of the patch size.
      text_CxE: unit-length text embeddings, one per class to be prompted and scored; or the token
        ids that `text_input` gives.
      train: whether dropout (rng `dropout`) and gate noise (rng `gate`) are on.
      example_offset: position of the first image in the global batch; the noise of an image
        depends on its position there, not on how the batch is split over devices.
    """
    c = self.config
    text_CxE = self.encode_text(text_CxE)
    x, grid = self.visual.embed(image_BxHxWx3, c.class_embedding_copies, self.tune("stem"))
    self.sow("intermediates", "embed", x)
    hidden = [x]
    relationship = None
    for i in range(self.clip.vision_layers):
      x = self.prompted_block(i, x, relationship, train, example_offset)
      hidden.append(x)
      if "lst" in self.tuner_names and i == self.clip.vision_layers - 1:
        x = x + self.lst(hidden)
      slot = self.prompting.index(i) if i in self.prompting else None
      first = 1  # of the patches among the tokens that are read out
      if slot is not None and c.m2oe != "none" and c.itp != "no_pixel":
        # Patches are read out as they are mixed; before that, the class token alone.
        z_class = self.read_out(x[:, :1])
        z, first = self.read_out(self.m2oe[slot](x[:, 1:], grid, train, example_offset)), 0
      else:
        z = z_class = self.read_out(x)
      patches, cls = l2_normalize(z[:, first:]), l2_normalize(z_class[:, 0])
      self.sow("intermediates", "patches", patches)
      self.sow("intermediates", "cls", cls)
      relationship = None
      if slot is not None:
        if c.itp == "no_pixel":
          m = rpm.itp(patches, cls, text_CxE, c.itp)
        else:
          m = self.relationship_map(z, cls, text_CxE)[:, first:]
        relationship = rpm.apg(m, self.resized_h(slot, grid))
        if c.apg == "linear":
          relationship += self.h_bias if c.h_shared else self.h_bias[slot]
        self.sow("intermediates", "m", m)
        self.sow("intermediates", "relationship", relationship)
    if c.head.startswith("tfpm"):
      logits = heads.tfpm(patches, cls, text_CxE, c.head[-1])
    else:
      logits = self.head(patches, cls, text_CxE)
    return rearrange(logits, "b (h w) c -> b h w c", h=grid[0])

  def encode_text(self, text: jax.Array) -> jax.Array:
    """Unit-length embeddings (C, E) of the token ids of `text_input`; embeddings as they are."""
    if not self.text_tuners or jnp.issubdtype(text.dtype, jnp.floating):
      return text
    tune_part = functools.partial(tuners.tune_part, self.text_tuned)
    offset = self.offset if "coop" in self.tuner_names else None
    context = self.context if self.coupled_layers else None
    encode = lambda module, tokens: module.text(tokens, tune_part, offset, context)
    return text_side.encode(encode, self, text, self.clip)

  def tune(self, part: str) -> tuners.Tune:
    """The tune function of the stem or of a block."""
    return tuners.tune_part(self.tuned, part)

  def prompted_block(
    self,
    i: int,
    x_BxNxD: jax.Array,
    relationship_BxCxD: jax.Array | None,
    train: bool,
    example_offset: jax.Array | int,
  ) -> jax.Array:
    """Block i on [CLS, patches], which attend to deep and relationship prompts, too.

    What the block would make of the prompts themselves is not used and not computed.
    """
    x, batch = x_BxNxD, x_BxNxD.shape[0]
    extra = []
    if "vpt" in self.tuner_names:
      deep = self.prompt_proj(self.deep_tokens[i])
      extra.append(jnp.broadcast_to(deep, (batch, *deep.shape)))
    if relationship_BxCxD is not None:
      extra.append(self.prompt_proj(relationship_BxCxD))
    rate = self.config.prompt_dropout
    if train and rate:
      # A key for each kind: deep and relationship prompts drop independently.
      keys = [prompts.example_keys(self.make_rng("dropout"), example_offset, batch) for _ in extra]
      extra = [prompts.dropout(e, rate, k) for e, k in zip(extra, keys)]
    if i < self.coupled_layers:
      coupled = self.coupling[i](self.context[i])
      extra.insert(0, jnp.broadcast_to(coupled, (batch, *coupled.shape)))
    extra = [e.astype(x.dtype) for e in extra]
    if relationship_BxCxD is not None and self.config.combine != "cat":
      mean = extra.pop().mean(1, keepdims=True)
      # A bare product would erase the patches, since prompts start small.
      add = self.config.combine == "add"
      patches = x[:, 1:] + mean if add else x[:, 1:] * (1 + mean)
      x = jnp.concatenate([x[:, :1], patches], axis=1)
    extra_BxPxD = jnp.concatenate(extra, axis=1) if extra else None
    x = self.visual.run_block(i, x, tune=self.tune(f"block_{i}"), extra_BxPxD=extra_BxPxD)
    self.sow("intermediates", "hidden", x)
    return x

  def read_out(self, x_BxNxD: jax.Array) -> jax.Array:
    """z = ln_post(prompt_norm(x)) proj of every token, before it gets unit length: (B, N, E)."""
    z = self.project(x_BxNxD)
    return self.joint(z).astype(jnp.float32) if self.clip.vision == "vit" else z

  def relationship_map(
    self, z_BxNxE: jax.Array, cls_BxE: jax.Array, text_CxE: jax.Array
  ) -> jax.Array:
    """m of the tokens that `read_out` gives: (B, N, C).

    The map is divided by their lengths, not they, which are of E numbers each, not of C.
    """
    m = rpm.itp(z_BxNxE, cls_BxE, text_CxE, self.config.itp)
    return m / jnp.linalg.norm(z_BxNxE, axis=-1, keepdims=True)

  # The backward pass computes the first norm again for the second instead of storing it.
  @functools.partial(nn.remat, policy=NORM_POLICY)
  def project(self, x_BxNxD: jax.Array) -> jax.Array:
    if self.prompted:
      x_BxNxD = self.prompt_norm(x_BxNxD).astype(x_BxNxD.dtype)
    return self.visual.project(x_BxNxD, self.tune("stem"))

  def resized_h(self, slot: int, grid: tuple[int, int]) -> jax.Array:
    """h of a layer (Eq. 3) on the token grid: (N, D)."""
    h = self.h if self.config.h_shared else self.h[slot]
    if self.config.itp == "no_pixel":
      return h
    rows, columns = self.config.h_grid or (self.clip.grid, self.clip.grid)
    h = rearrange(h, "(h w) d -> h w d", h=rows, w=columns)
    return rearrange(resize_grid(h, *grid), "h w d -> (h w) d")
