"""CLIP (Radford et al., 2021): both towers, purely functional, parameters in `params`.

Shape letters: B batch, N tokens, P extra tokens, D tower width, E joint embedding,
T text length, H/W pixels, h/w patch grid; in attention H heads and d width of a head.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from rpn_jax.models import layers
from rpn_jax.models.block import Block, keep_result
from rpn_jax.models.kernels import TEXTBOOK, Kernels
from rpn_jax.models.layers import ACTIVATIONS, LAYER_NORM_EPSILON, LayerNorm, StoredParams
from rpn_jax.models.remat import run_block
from rpn_jax.models.resizing import resize_grid


@dataclasses.dataclass(frozen=True)
class CLIPConfig:
  """Architecture of a CLIP model; it travels with converted weights.

  Attributes:
    embed_dim: E, the width of the joint image-text space.
    image_size: pixels of the square images it was trained on.
    patch_size: pixels of one square patch.
    vision_width: D of the vision tower.
    vision_layers: residual blocks of the vision tower.
    vision_heads: attention heads of the vision tower.
    vision_mlp_width: channels inside the MLPs of the vision tower; None: 4 D.
    text_width: D of the text tower.
    text_layers: residual blocks of the text tower.
    text_heads: attention heads of the text tower.
    context_length: the longest text, in tokens, begin and end tokens included.
    vocab_size: rows of the token embedding.
    activation: "quick_gelu" (OpenAI's weights) or "gelu".
    vision: what the vision tower is. "clip", or "vit": a plain vision transformer (ViT, MAE) beside
      CLIP's text tower, with exact GELU, other epsilons, no `ln_pre`, and no `proj`: what takes its
      tokens to the joint space is trained (Table 12).
    mean: of the images it was trained on, per channel, for values in [0, 1]; None: not told.
    std: their standard deviation; None: not told.
    squash: whether they were squashed to a square, rather than one cropped from their middle.
  """

  embed_dim: int = 512
  image_size: int = 224
  patch_size: int = 16
  vision_width: int = 768
  vision_layers: int = 12
  vision_heads: int = 12
  text_width: int = 512
  text_layers: int = 12
  text_heads: int = 8
  context_length: int = 77
  vocab_size: int = 49408
  activation: str = "quick_gelu"
  vision: str = "clip"
  mean: tuple[float, ...] | None = None
  std: tuple[float, ...] | None = None
  squash: bool = False
  vision_mlp_width: int | None = None

  def __post_init__(self) -> None:
    if self.vision not in ("clip", "vit"):
      raise ValueError(f'vision must be "clip" or "vit", got {self.vision!r}')
    if self.activation not in ACTIVATIONS:
      raise ValueError(f"activation must be one of {sorted(ACTIVATIONS)}, got {self.activation!r}")

  @property
  def grid(self) -> int:
    """Patches along one side of a training image."""
    return self.image_size // self.patch_size


def resize_positions(
  positions_NxD: jax.Array, height: int, width: int, resize: Callable = resize_grid
) -> jax.Array:
  """(1 + height * width, D): the class row, then the square grid of rows resized."""
  side = round((positions_NxD.shape[0] - 1) ** 0.5)
  grid = rearrange(positions_NxD[1:], "(h w) d -> h w d", h=side)
  grid = rearrange(resize(grid, height, width), "h w d -> (h w) d")
  return jnp.concatenate([positions_NxD[:1], grid])


class VisionTransformer(StoredParams, nn.Module):
  """CLIP's image tower, with its stages as methods so that prompts can be put between them.

  Attributes:
    config: the architecture.
    dtype: compute type of matrix products and of the residual stream.
    remat: what the blocks compute again in the backward pass instead of storing it: "none", "dots"
      (the MLP and the norms, so that only the attention's products are stored) or "full".
    kernels: see `Kernels`.
    epsilon: of the norms; None is what the tower was trained with.
  """

  config: CLIPConfig
  dtype: Any = jnp.float32
  remat: str = "none"
  kernels: Kernels = TEXTBOOK
  epsilon: float | None = None

  def setup(self) -> None:
    c = self.config
    patch = (c.patch_size, c.patch_size)
    self.patch_embed = nn.Conv(
      c.vision_width,
      patch,
      strides=patch,
      padding="VALID",
      use_bias=False,
      dtype=self.dtype,
      conv_general_dilated=functools.partial(layers.convolve_patches, self.kernels.product),
    )
    init = nn.initializers.normal(c.vision_width**-0.5)
    self.class_embedding = self.param("class_embedding", init, (c.vision_width,))
    self.position_embedding = self.param(
      "position_embedding", init, (1 + c.grid**2, c.vision_width)
    )
    plain = c.vision == "vit"
    epsilon = self.epsilon or (1e-6 if plain else LAYER_NORM_EPSILON)
    norm = functools.partial(LayerNorm, function=self.kernels.layer_norm)
    self.ln_pre = None if plain else norm(epsilon)
    activation = "gelu" if plain else c.activation
    block = functools.partial(Block, kernels=self.kernels, mlp_width=c.vision_mlp_width)
    settings = (c.vision_width, c.vision_heads, activation, self.dtype, epsilon)
    self.block = [block(*settings) for _ in range(c.vision_layers)]
    self.ln_post = norm(epsilon)
    if not plain:
      self.proj = self.param("proj", init, (c.vision_width, c.embed_dim))

  def embed(
    self,
    image_BxHxWx3: jax.Array,
    class_embedding_copies: int = 1,
    tune: Callable = keep_result,
    resize: Callable = resize_positions,
  ) -> tuple[jax.Array, tuple[int, int]]:
    """Tokens before the first block: (B, 1 + h*w, D), and the patch grid (h, w).

    `resize`, (positions, h, w) -> (1 + h*w, D), takes the position embedding to another grid.
    """
    size = self.config.patch_size
    _, height, width, _ = image_BxHxWx3.shape
    if height % size or width % size:
      raise ValueError(f"image sides must be multiples of the patch, {size}, got {height}x{width}")
    patches = self.patch_embed(image_BxHxWx3.astype(self.dtype))
    patches = tune("patch_embed", image_BxHxWx3, patches)
    batch, h, w, _ = patches.shape
    patches = rearrange(patches, "b h w d -> b (h w) d").astype(jnp.float32)
    positions = resize(self.position_embedding, h, w)
    cls = jnp.tile(class_embedding_copies * self.class_embedding, (batch, 1, 1))
    x = jnp.concatenate([cls, patches], axis=1) + positions
    if self.ln_pre is not None:
      x = tune("ln_pre", x, self.ln_pre(x))
    return x.astype(self.dtype), (h, w)

  def run_block(
    self,
    i: int,
    x_BxNxD: jax.Array,
    read: Callable | None = None,
    residual: bool = True,
    tune: Callable | None = None,
    extra_BxPxD: jax.Array | None = None,
  ) -> jax.Array:
    """Block i on x; see `Block`."""
    block = self.block[i]
    return run_block(block, self.remat, x_BxNxD, read, residual, tune, extra_BxPxD)

  def project(
    self, x_BxNxD: jax.Array, tune: Callable = keep_result, exact: bool = False
  ) -> jax.Array:
    """`ln_post`, then the projection into the joint space: (..., D) -> (..., E) float32.

    A plain transformer has none: (..., D) float32. `exact`: float32 whatever the compute type.
    """
    dtype = jnp.float32 if exact else self.dtype
    highest = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    product = highest if exact else self.kernels.product
    x = tune("ln_post", x_BxNxD, self.ln_post(x_BxNxD)).astype(dtype)
    if self.config.vision == "vit":
      return x.astype(jnp.float32)
    return product(x, self.proj.astype(dtype)).astype(jnp.float32)

  def __call__(
    self, image_BxHxWx3: jax.Array, kept_patches_BxK: jax.Array | None = None
  ) -> jax.Array:
    """Embedding of the class token: (B, E), not normalized.

    `kept_patches_BxK` lists the patches that the tower gets; pre-training with half of them takes
    half the time (FLIP, Li et al., 2023).
    """
    x, _ = self.embed(image_BxHxWx3)
    if kept_patches_BxK is not None:
      kept = jnp.take_along_axis(x[:, 1:], kept_patches_BxK[..., None], axis=1)
      x = jnp.concatenate([x[:, :1], kept], axis=1)
    for i in range(self.config.vision_layers):
      x = self.run_block(i, x)
    return self.project(x[:, 0])


class TextTransformer(StoredParams, nn.Module):
  """CLIP's text tower: causal attention; the embedding is read at the end-of-text token.

  Attributes:
    config: the architecture.
    dtype: compute type of matrix products and of the residual stream.
    remat: see `VisionTransformer`.
    kernels: see `Kernels`.
  """

  config: CLIPConfig
  dtype: Any = jnp.float32
  remat: str = "none"
  kernels: Kernels = TEXTBOOK

  def setup(self) -> None:
    c = self.config
    self.token_embedding = self.param(
      "token_embedding", nn.initializers.normal(0.02), (c.vocab_size, c.text_width)
    )
    self.position_embedding = self.param(
      "position_embedding", nn.initializers.normal(0.01), (c.context_length, c.text_width)
    )
    block = functools.partial(Block, kernels=self.kernels, causal=True)
    settings = (c.text_width, c.text_heads, c.activation, self.dtype)
    self.block = [block(*settings) for _ in range(c.text_layers)]
    self.ln_final = LayerNorm(function=self.kernels.layer_norm)
    self.projection = self.param(
      "projection", nn.initializers.normal(c.text_width**-0.5), (c.text_width, c.embed_dim)
    )

  def project(
    self, x_BxTxD: jax.Array, tokens_BxT: jax.Array, tune: Callable = keep_result
  ) -> jax.Array:
    """The joint embedding of every text, from its end-of-text token: (B, E) float32."""
    # The end-of-text token has the largest id of the vocabulary.
    end = jnp.argmax(tokens_BxT, axis=-1)
    x = x_BxTxD[jnp.arange(x_BxTxD.shape[0]), end].astype(jnp.float32)
    x = tune("ln_final", x, self.ln_final(x)).astype(self.dtype)
    return self.kernels.product(x, self.projection.astype(self.dtype)).astype(jnp.float32)

  def __call__(
    self,
    tokens_BxT: jax.Array,
    tune_part: Callable | None = None,
    offset_MxD: jax.Array | None = None,
    context_JxMxD: jax.Array | None = None,
  ) -> jax.Array:
    """Embeddings (B, E) float32, not normalized.

    Args:
      tokens_BxT: token ids. T may be shorter than the context: attention is causal, so the padding
        after the end-of-text token changes nothing.
      tune_part: part of the tower ("stem", "block_0", …) -> its tune function; see
        `tuners.tune_part`.
      offset_MxD: what is added to the embeddings of the M tokens after the first one.
      context_JxMxD: what stands in place of the M tokens after the first one before each of the
        first J blocks: of their embeddings, and of what earlier blocks made of them.

    Raises:
      ValueError: texts longer than the context.
    """
    length = tokens_BxT.shape[1]
    if length > self.config.context_length:
      raise ValueError(f"at most {self.config.context_length} tokens, got {length}")
    tune_part = tune_part or (lambda part: None)
    context = () if context_JxMxD is None else context_JxMxD
    x = self.token_embedding[tokens_BxT]
    if offset_MxD is not None:
      x = x.at[:, 1 : 1 + len(offset_MxD)].add(offset_MxD)
    x = self._with_context(x, context[:1]) + self.position_embedding[:length]
    x = x.astype(self.dtype)
    for i, block in enumerate(self.block):
      if i:
        x = self._with_context(x, context[i : i + 1])
      x = run_block(block, self.remat, x, tune=tune_part(f"block_{i}"))
      self.sow("intermediates", "hidden", x)
    return self.project(x, tokens_BxT, tune_part("stem") or keep_result)

  @staticmethod
  def _with_context(x_BxTxD: jax.Array, context: Any) -> jax.Array:
    """x with the one context (1, M, D) in place of its tokens 1 … M; as it is without one."""
    if not len(context):
      return x_BxTxD
    return x_BxTxD.at[:, 1 : 1 + context.shape[1]].set(context[0].astype(x_BxTxD.dtype))


class CLIP(nn.Module):
  """Both towers and the logit scale.

  Attributes:
    config: the architecture.
    dtype: compute type of matrix products and of the residual streams.
    kernels: see `Kernels`.
  """

  config: CLIPConfig
  dtype: Any = jnp.float32
  kernels: Kernels = TEXTBOOK

  def setup(self) -> None:
    self.visual = VisionTransformer(self.config, self.dtype, kernels=self.kernels)
    self.text = TextTransformer(self.config, self.dtype, kernels=self.kernels)
    # exp(logit_scale) starts at 1 / 0.07, as in the paper's section 2.5.
    self.logit_scale = self.param("logit_scale", nn.initializers.constant(2.6592), ())

  def encode_image(
    self, image_BxHxWx3: jax.Array, kept_patches_BxK: jax.Array | None = None
  ) -> jax.Array:
    return self.visual(image_BxHxWx3, kept_patches_BxK)

  def encode_text(self, tokens_BxT: jax.Array) -> jax.Array:
    return self.text(tokens_BxT)

  def encode(self, image_BxHxWx3: jax.Array, tokens_CxT: jax.Array) -> tuple[jax.Array, jax.Array]:
    return self.encode_image(image_BxHxWx3), self.encode_text(tokens_CxT)

  def __call__(self, image_BxHxWx3: jax.Array, tokens_CxT: jax.Array) -> jax.Array:
    """Zero-shot logits (B, C): scaled cosine of every image with every text."""
    image, text = map(l2_normalize, self.encode(image_BxHxWx3, tokens_CxT))
    return jnp.exp(self.logit_scale) * image @ text.T


def l2_normalize(x: jax.Array) -> jax.Array:
  """Unit length along the last axis, without an epsilon, as CLIP does."""
  return x / jnp.linalg.norm(x, axis=-1, keepdims=True)
