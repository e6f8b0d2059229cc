"""CAT-Seg (Cho et al., CVPR 2024): a cost volume of CLIP's own features, aggregated.

Patches of the image are compared with every class name; these maps of cosines are then refined over
space and over classes (`cost_aggregation`), and enlarged (`cost_decoder`). In both towers queries
and values of attention are trained, so names are encoded in every training step.

Shape letters: B images, C classes, P prompts of a class, K sentences of a class, T tokens, E joint
embedding, D width of the vision tower, N tokens of an image, h/w patch grid, G channels of what
guides.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from rpn_jax.models import cost_aggregation, cost_decoder, heads, prompts, resizing, text_side
from rpn_jax.models.clip import (
  CLIPConfig,
  TextTransformer,
  VisionTransformer,
  l2_normalize,
  resize_positions,
)
from rpn_jax.models.kernels import TEXTBOOK, Kernels
from rpn_jax.models.network import Defaults, Windows, as_record
from rpn_jax.models.remat import REMAT_POLICIES
from rpn_jax.models.trained import TOWERS, join
from rpn_jax.models.training_free import own_value

# What `tuned` trains in every block of both towers, as regular expressions of paths in it.
TUNED = {
  "query_value": "attn/in_proj/(query|value)",
  "query_key": "attn/in_proj/(query|key)",
  "key_value": "attn/in_proj/(key|value)",
  "attention": "attn/.*",
  "full": ".*",
}
# Below it a norm counts as this, as in PyTorch's cosine.
SMALLEST_NORM = 1e-12


class CATSeg(Defaults, nn.Module):
  """Cost aggregation network; see `Network`.

  Attributes:
    clip: architecture of the towers.
    config: hashable, with the fields of `rpn_jax.config.CATSegConfig`.
    dtype: compute type.
    remat: what the towers' blocks compute again in the backward pass, see `VisionTransformer`; with
      any but "none", so does the aggregation, chunk by chunk.
    loss: name of the loss it is trained with, a key of `heads.SCORES`.
    kernels: see `Kernels`.

  Raises:
    ValueError: settings that do not fit each other or the towers.
  """

  clip: CLIPConfig
  config: Any
  dtype: Any = jnp.float32
  remat: str = "none"
  loss: str = "bce"
  kernels: Kernels = TEXTBOOK

  section = "cat_seg"
  title = "CAT-Seg"
  towers = TOWERS
  trainable = True
  independent = False  # classes attend to each other
  emphasis = 0.5  # half the range of a sigmoid
  input_multiple = 1  # images are resized to `resolution`

  def __post_init__(self) -> None:
    c, clip = self.config, self.clip
    for name, known in (("loss", heads.SCORES), ("remat", REMAT_POLICIES)):
      if getattr(self, name) not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
    if clip.vision != "clip":
      raise ValueError(f'CAT-Seg needs the vision tower of a CLIP, got vision="{clip.vision}"')
    if c.resolution % clip.patch_size:
      raise ValueError(
        f"resolution={c.resolution}: expected a multiple of the patch size, {clip.patch_size}, as "
        f"{24 * clip.patch_size} in the official code"
      )
    if wrong := [i for i in c.guidance_layers if i > clip.vision_layers - 2]:
      raise ValueError(
        f"guidance_layers: expected blocks of 0 to {clip.vision_layers - 2}, since the last is "
        f"read another way, got {wrong[0]}; the official code has those at a third and two thirds "
        "of the tower"
      )
    grid = c.resolution // clip.patch_size
    for name in ("class_pooling_train", "class_pooling_eval"):
      if max(getattr(c, name)) > grid:
        raise ValueError(
          f"{name}={getattr(c, name)}: expected at most the {grid} x {grid} patches of resolution="
          f"{c.resolution}"
        )
    if c.width % c.heads:
      raise ValueError(f"width={c.width}: expected a multiple of {c.heads}, the heads")
    for width in c.decoder_widths:
      try:
        cost_decoder.norm_groups(width)
      except ValueError as error:
        raise ValueError(f"decoder_widths={c.decoder_widths}: {error}") from None
    for i, (before, guidance) in enumerate(
      zip((c.width, c.decoder_widths[0]), c.decoder_guidance_widths)
    ):
      if guidance >= before:
        raise ValueError(
          f"decoder_guidance_widths: expected fewer than the {before} channels before doubling "
          f"{i + 1}, got {guidance}"
        )
    super().__post_init__()

  @classmethod
  def create(
    cls,
    clip: CLIPConfig,
    settings: Any,
    *,
    loss: str = "bce",
    dtype: Any = jnp.float32,
    remat: str = "none",
    kernels: Kernels = TEXTBOOK,
  ) -> "CATSeg":
    """See `Network.create`."""
    return cls(clip, as_record(settings), dtype, remat, loss, kernels)

  @property
  def trained(self) -> str:
    c = self.config
    if c.tuned == "none":
      patterns = []
    else:
      patterns = [rf"(visual|text)/block_\d+/{TUNED[c.tuned]}"]
    if patterns and not c.tuned_unused_query:
      last = self.clip.vision_layers - 1
      patterns[0] = rf"(?!visual/block_{last}/attn/in_proj/query){patterns[0]}"
    if c.tuned_positions:
      patterns.append("visual/position_embedding")
    return "|".join(patterns)

  @property
  def scores(self) -> Callable:
    return heads.SCORES[self.loss]

  @property
  def probabilities(self) -> Callable:
    return heads.unchanged

  @nn.nowrap
  def merged(self, params: dict, prompts: dict) -> tuple["CATSeg", dict, dict]:
    config = dataclasses.replace(self.config, tuned="none", tuned_positions=False)
    variables = join(params, prompts)
    return self.clone(config=config), variables["params"], variables["prompts"]

  @classmethod
  def windows(cls, clip: CLIPConfig) -> Windows:
    """Tiles of 384 pixels in an image squashed to 640, and all of it at once, for every tower."""
    del clip
    return Windows(
      short_side=640, long_side=2560, crop=384, stride=256, layout="square", square=640,
      resize="detectron2",
    )  # fmt: skip

  def setup(self) -> None:
    c, clip, dtype = self.config, self.clip, self.dtype
    remat = self.remat != "none"
    self.visual = VisionTransformer(clip, dtype, self.remat, self.kernels)
    self.text = TextTransformer(clip, dtype, self.remat, self.kernels)
    conv = functools.partial(cost_aggregation.torch_conv, dtype=dtype)
    self.upsample = [
      cost_decoder.Upsample(width, factor, dtype)
      for width, factor in zip(c.guidance_widths, (2, 4))
    ]
    self.cost_embed = conv(c.width, (7, 7), c.prompts)
    self.appearance_proj = conv(c.appearance_width, (3, 3), clip.embed_dim)
    self.text_proj = prompts.torch_dense(
      c.text_width, clip.embed_dim, dtype, product=self.kernels.product
    )
    self.decoder_proj = [
      conv(width, (3, 3), fan_in)
      for width, fan_in in zip(c.decoder_guidance_widths, c.guidance_widths)
    ]
    self.spatial = [
      cost_aggregation.SpatialAggregation(c.width, c.heads, c.window, remat, dtype, self.kernels)
      for _ in range(c.layers)
    ]
    self.classes = [
      cost_aggregation.ClassAggregation(
        c.width,
        c.heads,
        c.class_attention,
        c.text_width,
        c.pad_len,
        c.class_pool_align_corners,
        c.class_residual_includes_pooled,
        remat,
        dtype,
        self.kernels,
      )
      for _ in range(c.layers)
    ]
    self.decoder = cost_decoder.Decoder(
      c.decoder_widths, c.decoder_guidance_widths, remat, dtype, self.kernels
    )

  @nn.nowrap
  def text_input(self, encoder: Any, names: Sequence[str]) -> Any:
    """Token ids (C, K, T).

    Raises:
      ValueError: there are not `prompts` sentences.
    """
    if self.config.prompts not in (1, encoder.sentences):
      raise ValueError(
        f"prompts={self.config.prompts}: expected 1 or as many as config.templates has sentences, "
        f"{encoder.sentences}"
      )
    return encoder.tokens(names)

  def encode_text(self, text: jax.Array) -> jax.Array:
    """Embeddings (C, P, E), unit length, of token ids (C, K, T); embeddings stay as they are."""
    if jnp.issubdtype(text.dtype, jnp.floating):
      return text
    encode = lambda module, tokens: module.text(tokens)
    sentences = text_side.sentence_embeddings(encode, self, text, self.clip)
    # Rows of zeros fill up names with fewer synonyms.
    sentences = jnp.where((text > 0).any(-1)[..., None], sentences, 0)
    synonyms = rearrange(sentences, "c (s p) e -> c s p e", p=self.config.prompts)
    return l2_normalize(synonyms.sum(1))

  def __call__(
    self,
    image_BxHxWx3: jax.Array,
    text: jax.Array,
    *,
    train: bool = False,
    example_offset: jax.Array | int = 0,
  ) -> jax.Array:
    """Class logits (B, 4 h, 4 w, C) float32, before `scores`.

    Args:
      image_BxHxWx3: normalized images of any size, which are squashed to `resolution`.
      text: token ids (C, K, T), or embeddings (C, P, E) of `encode_text`.
      train: whether the classes are pooled as in training.
      example_offset: not used; there is no noise.
    """
    del example_offset
    features, guidance = self.dense_features(image_BxHxWx3)
    return self.segment(features, guidance, self.encode_text(text), train)

  def segment(
    self,
    features_BxhxwxE: jax.Array,
    guidance: tuple[jax.Array, ...],
    text_CxPxE: jax.Array,
    train: bool = False,
  ) -> jax.Array:
    """Class logits (B, 4 h, 4 w, C) from what `dense_features` and `encode_text` give."""
    c = self.config
    text = jnp.broadcast_to(text_CxPxE, (features_BxhxwxE.shape[0], *text_CxPxE.shape))
    cost = cost_volume(features_BxhxwxE, text)
    batch, classes = cost.shape[:2]
    kept = None
    if 0 < c.pad_len < classes:
      _, kept = jax.lax.top_k(cost.max((2, 3, 4)), c.pad_len)
      choose = lambda x: jnp.take_along_axis(x, kept.reshape(*kept.shape, *[1] * (x.ndim - 2)), 1)
      cost, text = choose(cost), choose(text)
    logits = self.aggregate(cost, features_BxhxwxE, text, guidance, train)
    if kept is not None:
      dropped = jnp.full((batch, classes, *logits.shape[2:]), c.truncated_logit)
      logits = dropped.at[jnp.arange(batch)[:, None], kept].set(logits)
    return rearrange(logits, "b c h w -> b h w c")

  def dense_features(self, image_BxHxWx3: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Features of the patches in the joint space (B, h, w, E), not normalized, and the output of
    two blocks, upsampled: (B, 2 h, 2 w, G) and (B, 4 h, 4 w, G')."""
    c = self.config
    x, grid = self.visual.embed(squash(image_BxHxWx3, c.resolution), resize=resize_bicubic)
    self.sow("intermediates", "embed", x)
    last = self.clip.vision_layers - 1
    hidden = []
    for i in range(last):
      x = self.visual.run_block(i, x)
      self.sow("intermediates", "hidden", x)
      hidden.append(x)
    value = self.visual.run_block(
      last, x, functools.partial(own_value, self.kernels.attend), residual=False
    )
    residual = x[:, :1] if c.dense_residual == "class_token" else x
    tokens = self.visual.project(self.visual.block[last].feed_forward(residual + value))
    self.sow("intermediates", "dense", tokens)
    on_grid = lambda x: rearrange(x[:, 1:], "b (h w) d -> b h w d", h=grid[0])
    guidance = tuple(
      upsample(on_grid(hidden[i])) for upsample, i in zip(self.upsample, c.guidance_layers)
    )
    return on_grid(tokens), guidance

  def aggregate(
    self,
    cost_BxCxhxwxP: jax.Array,
    features_BxhxwxE: jax.Array,
    text_BxCxPxE: jax.Array,
    guidance: tuple[jax.Array, ...],
    train: bool,
  ) -> jax.Array:
    """Logits (B, C, 4 h, 4 w) of a cost volume."""
    c = self.config
    cost = cost_BxCxhxwxP
    self.sow("intermediates", "cost", cost)
    x = self.cost_embed(cost.reshape(-1, *cost.shape[2:])).reshape(*cost.shape[:4], -1)
    self.sow("intermediates", "cost_embedding", x)
    appearance = jax.nn.relu(self.appearance_proj(features_BxhxwxE))
    text = jax.nn.relu(self.text_proj(l2_normalize(text_BxCxPxE.mean(2))))
    decoded = tuple(jax.nn.relu(proj(g)) for proj, g in zip(self.decoder_proj, guidance))
    self.sow("intermediates", "appearance_guidance", appearance)
    self.sow("intermediates", "text_guidance", text)
    self.sow("intermediates", "decoder_guidance", decoded)
    pooling = c.class_pooling_train if train else c.class_pooling_eval
    for spatial, classes in zip(self.spatial, self.classes):
      x = classes(spatial(x, appearance), text, pooling)
      self.sow("intermediates", "layer", x)
    return self.decoder(x, decoded)


def squash(image_BxHxWx3: jax.Array, side: int) -> jax.Array:
  """Bilinear resize to a square, without antialias."""
  size = (image_BxHxWx3.shape[0], side, side, 3)
  if image_BxHxWx3.shape == size:
    return image_BxHxWx3
  exact = jax.lax.Precision.HIGHEST
  return jax.image.resize(image_BxHxWx3, size, "bilinear", antialias=False, precision=exact)


def cost_volume(features_BxhxwxE: jax.Array, text_BxCxPxE: jax.Array) -> jax.Array:
  """Cosine of every patch with every prompt of every class: (B, C, h, w, P)."""
  unit = lambda x: x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), SMALLEST_NORM)
  return jnp.einsum("bhwe,bcpe->bchwp", unit(features_BxhxwxE), unit(text_BxCxPxE))


def resize_bicubic(positions_NxD: jax.Array, height: int, width: int) -> jax.Array:
  """(1 + height * width, D): the class row, then the square grid of rows resized by PyTorch's
  bicubic interpolation."""
  return resize_positions(positions_NxD, height, width, resizing.resize_bicubic)
