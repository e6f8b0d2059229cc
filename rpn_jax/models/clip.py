"""CLIP (Radford et al., 2021): both towers, purely functional, parameters in `params`.

Shape letters: B batch, N tokens, P extra tokens, D tower width, E joint embedding,
T text length, H/W pixels, h/w patch grid.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jax.ad_checkpoint import checkpoint_name

from rpn_jax.models.layers import ACTIVATIONS, LAYER_NORM_EPSILON, LayerNorm, attend

# What is stored of a block, beside its input, for the backward pass; without an entry, everything.
REMAT_POLICIES = {"dots": jax.checkpoint_policies.save_only_these_names("attention"), "full": None}


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
    text_width: D of the text tower.
    text_layers: residual blocks of the text tower.
    text_heads: attention heads of the text tower.
    context_length: the longest text, in tokens, begin and end tokens included.
    vocab_size: rows of the token embedding.
    activation: "quick_gelu" (OpenAI's weights) or "gelu".
    vision: what the vision tower is. "clip", or "vit": a plain vision transformer (ViT, MAE) beside
      CLIP's text tower, with exact GELU, other epsilons, no `ln_pre`, and no `proj`: what takes its
      tokens to the joint space is trained (Table 12).
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

  def __post_init__(self):
    if self.vision not in ("clip", "vit"):
      raise ValueError(f'vision must be "clip" or "vit", got {self.vision!r}')
    if self.activation not in ACTIVATIONS:
      raise ValueError(f"activation must be one of {sorted(ACTIVATIONS)}, got {self.activation!r}")

  @property
  def grid(self) -> int:
    """Patches along one side of a training image."""
    return self.image_size // self.patch_size


def resize_grid(grid_hxwxD: jax.Array, height: int, width: int) -> jax.Array:
  """Bilinear resize of the two leading axes, align_corners=False, no antialias."""
  if grid_hxwxD.shape[:2] == (height, width):
    return grid_hxwxD
  shape = (height, width, *grid_hxwxD.shape[2:])
  return jax.image.resize(
    grid_hxwxD, shape, "bilinear", antialias=False, precision=jax.lax.Precision.HIGHEST
  )


def resize_positions(positions_NxD: jax.Array, height: int, width: int) -> jax.Array:
  """(1 + height * width, D): the class row, then the square grid of rows resized."""
  side = round((positions_NxD.shape[0] - 1) ** 0.5)
  grid = rearrange(positions_NxD[1:], "(h w) d -> h w d", h=side)
  grid = rearrange(resize_grid(grid, height, width), "h w d -> (h w) d")
  return jnp.concatenate([positions_NxD[:1], grid])


def untuned(site, x, y):
  """The tune function that leaves a projection or norm as it is; see `peft.Tune`."""
  del site, x
  return y


class Attention(nn.Module):
  """Multi-head self-attention with CLIP's fused input projection."""

  heads: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(
    self, x_BxNxD, kind: str = "qk", causal: bool = False, tune=untuned, extra_BxPxD=None
  ):
    """`kind` names the softmax maps that are summed over the values: "qk", "qq" or "qq_kk"; with
    "value" each token keeps its own, and "key" returns the keys (B, N, D) themselves.

    Extra tokens have keys and values only: they are looked at, and nothing is returned for them.
    """
    width = x_BxNxD.shape[-1]
    in_proj = nn.Dense(3 * width, dtype=self.dtype, name="in_proj")
    project = lambda x: checkpoint_name(tune("in_proj", x, in_proj(x)), "attention")
    split = lambda qkv: rearrange(qkv, "b n (three h d) -> three b n h d", three=3, h=self.heads)
    qkv = project(x_BxNxD)
    self.sow("intermediates", "qkv", qkv)
    q, k, v = split(qkv)
    if extra_BxPxD is not None:
      _, *more = split(project(extra_BxPxD))
      k, v = (jnp.concatenate(pair, axis=1) for pair in zip((k, v), more))
    maps = {"qk": [(q, k)], "qq": [(q, q)], "qq_kk": [(q, q), (k, k)], "value": [], "key": []}
    if kind not in maps:
      raise ValueError(f"attention kind must be one of {sorted(maps)}, got {kind!r}")
    if kind == "key":
      return rearrange(k, "b n h d -> b n (h d)")
    if maps[kind]:
      v = sum(attend(a, b, v, causal) for a, b in maps[kind])
    v = rearrange(v, "b n h d -> b n (h d)")
    out = nn.Dense(width, dtype=self.dtype, name="out_proj")(v)
    return checkpoint_name(tune("out_proj", v, out), "attention")


class MLP(nn.Module):
  activation: str
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x_BxNxD, tune=untuned):
    width = x_BxNxD.shape[-1]
    hidden = nn.Dense(4 * width, dtype=self.dtype, name="c_fc")(x_BxNxD)
    hidden = tune("c_fc", x_BxNxD, hidden)
    hidden = ACTIVATIONS[self.activation](hidden)
    return tune("c_proj", hidden, nn.Dense(width, dtype=self.dtype, name="c_proj")(hidden))


class Block(nn.Module):
  """Pre-norm residual block."""

  heads: int
  activation: str
  dtype: Any = jnp.float32
  epsilon: float = LAYER_NORM_EPSILON

  @nn.compact
  def __call__(
    self,
    x_BxNxD,
    attention: str = "qk",
    causal: bool = False,
    residual: bool = True,
    tune=None,
    extra_BxPxD=None,
  ):
    """(B, N, D) -> (B, N, D). Extra tokens are looked at by the others, but not computed further.

    Without `residual` only what the attention returns: no residual connection, no MLP.
    `tune(site, x, y)` may change what the projection or norm `site` makes of x.
    """
    x, tune = x_BxNxD, tune or untuned
    ln_1 = LayerNorm(self.epsilon, name="ln_1")
    norm = lambda x: tune("ln_1", x, ln_1(x))
    extra = None if extra_BxPxD is None else norm(extra_BxPxD)
    attend = Attention(self.heads, self.dtype, name="attn")
    attended = attend(norm(x), attention, causal, tune, extra).astype(x.dtype)
    if not residual:
      return attended
    x = x + attended
    mlp = MLP(self.activation, self.dtype, name="mlp")
    normed = tune("ln_2", x, LayerNorm(self.epsilon, name="ln_2")(x))
    return x + mlp(normed, tune).astype(x.dtype)


class VisionTransformer(nn.Module):
  """CLIP's image tower, with its stages as methods so that prompts can be put between them.

  Attributes:
    config: the architecture.
    dtype: compute type of matrix products and of the residual stream.
  """

  config: CLIPConfig
  dtype: Any = jnp.float32

  def setup(self):
    c = self.config
    patch = (c.patch_size, c.patch_size)
    self.patch_embed = nn.Conv(
      c.vision_width, patch, strides=patch, padding="VALID", use_bias=False, dtype=self.dtype
    )
    init = nn.initializers.normal(c.vision_width**-0.5)
    self.class_embedding = self.param("class_embedding", init, (c.vision_width,))
    self.position_embedding = self.param(
      "position_embedding", init, (1 + c.grid**2, c.vision_width)
    )
    plain = c.vision == "vit"
    epsilon = 1e-6 if plain else LAYER_NORM_EPSILON
    self.ln_pre = None if plain else LayerNorm()
    settings = (c.vision_heads, "gelu" if plain else c.activation, self.dtype, epsilon)
    self.block = [Block(*settings) for _ in range(c.vision_layers)]
    self.ln_post = LayerNorm(epsilon)
    if not plain:
      self.proj = self.param("proj", init, (c.vision_width, c.embed_dim))

  def embed(self, image_BxHxWx3, class_embedding_copies: int = 1, tune=untuned):
    """Tokens before the first block: (B, 1 + h*w, D), and the patch grid (h, w)."""
    size = self.config.patch_size
    _, height, width, _ = image_BxHxWx3.shape
    if height % size or width % size:
      raise ValueError(f"image sides must be multiples of the patch, {size}, got {height}x{width}")
    patches = self.patch_embed(image_BxHxWx3.astype(self.dtype))
    patches = tune("patch_embed", image_BxHxWx3, patches)
    batch, h, w, _ = patches.shape
    patches = rearrange(patches, "b h w d -> b (h w) d").astype(jnp.float32)
    positions = resize_positions(self.position_embedding, h, w)
    cls = jnp.tile(class_embedding_copies * self.class_embedding, (batch, 1, 1))
    x = jnp.concatenate([cls, patches], axis=1) + positions
    if self.ln_pre is not None:
      x = tune("ln_pre", x, self.ln_pre(x))
    return x.astype(self.dtype), (h, w)

  def run_block(
    self, i: int, x_BxNxD, attention: str = "qk", residual: bool = True, tune=None, extra_BxPxD=None
  ):
    """See `Block`."""
    return self.block[i](x_BxNxD, attention, False, residual, tune, extra_BxPxD)

  def project(self, x_BxNxD, tune=untuned):
    """`ln_post`, then the projection into the joint space: (..., D) -> (..., E) float32.

    A plain transformer has none: (..., D) float32.
    """
    x = tune("ln_post", x_BxNxD, self.ln_post(x_BxNxD.astype(jnp.float32))).astype(self.dtype)
    if self.config.vision == "vit":
      return x.astype(jnp.float32)
    return (x @ self.proj.astype(self.dtype)).astype(jnp.float32)

  def __call__(self, image_BxHxWx3, kept_patches_BxK=None):
    """Embedding of the class token: (B, E), not normalised.

    `kept_patches_BxK` lists the patches to look at; pre-training at half the patches costs half
    the time (FLIP, Li et al., 2023).
    """
    x, _ = self.embed(image_BxHxWx3)
    if kept_patches_BxK is not None:
      kept = jnp.take_along_axis(x[:, 1:], kept_patches_BxK[..., None], axis=1)
      x = jnp.concatenate([x[:, :1], kept], axis=1)
    for i in range(self.config.vision_layers):
      x = self.run_block(i, x)
    return self.project(x[:, 0])


class TextTransformer(nn.Module):
  """CLIP's text tower: causal attention, the embedding is read at the end-of-text token."""

  config: CLIPConfig
  dtype: Any = jnp.float32

  def setup(self):
    c = self.config
    self.token_embedding = self.param(
      "token_embedding", nn.initializers.normal(0.02), (c.vocab_size, c.text_width)
    )
    self.position_embedding = self.param(
      "position_embedding", nn.initializers.normal(0.01), (c.context_length, c.text_width)
    )
    self.block = [Block(c.text_heads, c.activation, self.dtype) for _ in range(c.text_layers)]
    self.ln_final = LayerNorm()
    self.projection = self.param(
      "projection", nn.initializers.normal(c.text_width**-0.5), (c.text_width, c.embed_dim)
    )

  def project(self, x_BxTxD, tokens_BxT):
    # The end-of-text token has the largest id of the vocabulary.
    end = jnp.argmax(tokens_BxT, axis=-1)
    x = self.ln_final(x_BxTxD[jnp.arange(x_BxTxD.shape[0]), end].astype(jnp.float32))
    return (x.astype(self.dtype) @ self.projection.astype(self.dtype)).astype(jnp.float32)

  def __call__(self, tokens_BxT):
    """Embeddings (B, E), not normalised. T may be shorter than the context: attention is causal,
    so the padding after the end-of-text token changes nothing."""
    length = tokens_BxT.shape[1]
    if length > self.config.context_length:
      raise ValueError(f"at most {self.config.context_length} tokens, got {length}")
    x = self.token_embedding[tokens_BxT] + self.position_embedding[:length]
    x = x.astype(self.dtype)
    for block in self.block:
      x = block(x, "qk", True)
      self.sow("intermediates", "hidden", x)
    return self.project(x, tokens_BxT)


class CLIP(nn.Module):
  """Both towers and the logit scale."""

  config: CLIPConfig
  dtype: Any = jnp.float32

  def setup(self):
    self.visual = VisionTransformer(self.config, self.dtype)
    self.text = TextTransformer(self.config, self.dtype)
    # exp(logit_scale) starts at 1 / 0.07, as in the paper's section 2.5.
    self.logit_scale = self.param("logit_scale", nn.initializers.constant(2.6592), ())

  def encode_image(self, image_BxHxWx3, kept_patches_BxK=None):
    return self.visual(image_BxHxWx3, kept_patches_BxK)

  def encode_text(self, tokens_BxT):
    return self.text(tokens_BxT)

  def encode(self, image_BxHxWx3, tokens_CxT):
    return self.encode_image(image_BxHxWx3), self.encode_text(tokens_CxT)

  def __call__(self, image_BxHxWx3, tokens_CxT):
    """Zero-shot logits (B, C): scaled cosine of every image with every text."""
    image, text = map(l2_normalize, self.encode(image_BxHxWx3, tokens_CxT))
    return jnp.exp(self.logit_scale) * image @ text.T


def l2_normalize(x: jax.Array) -> jax.Array:
  """Unit length along the last axis, without an epsilon, as CLIP does."""
  return x / jnp.linalg.norm(x, axis=-1, keepdims=True)
