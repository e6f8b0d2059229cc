"""Dense labels from an untrained CLIP: ways to read its vision tower.

    vanilla    The tower as it was trained (Radford et al., 2021); it stands in every table of the
               papers below, each time by that paper's protocol.
    maskclip   Zhou et al., ECCV 2022: every token keeps its own value, as later papers rerun it.
    maskclip_released
               The same as its official code computes it, from which the paper's figures are: with
               exact GELU and a small epsilon in all norms, although the weights were trained with
               others, and images that are padded to whole patches.
    sclip      Wang et al., ECCV 2024: softmax(q qᵀ) + softmax(k kᵀ), each over its scaled scores;
               the rows of the sum add up to 2.
    clearclip  Lan et al., ECCV 2024: softmax(q qᵀ), without residual connection and MLP.
    naclip     Hajimiri et al., WACV 2025: softmax(k kᵀ + ω), ω a Gaussian around each patch,
               without residual connection and MLP; naclip_kk lacks ω, naclip_nonly has little else.
    res_clip   Yang et al., CVPR 2025: naclip, clearclip or sclip with the attention of middle
               blocks and of the labels of a first pass.
    sc_clip    Bai et al., 2024: outliers filled, patches averaged with their like.
    gem        Bousselham et al., CVPR 2024: a second stream through the last blocks.
    pearl      CVPR 2026: keys rotated towards the queries, without residual connection and MLP.

Each is checked against arrays recorded from its official code (tests/golden_training_free), but
pearl against its formula alone. Published scores and their protocols are in docs/method.md.
"""

import dataclasses
import difflib
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from rpn_jax.models import heads
from rpn_jax.models.clip import CLIPConfig, VisionTransformer, l2_normalize
from rpn_jax.models.kernels import TEXTBOOK, Kernels
from rpn_jax.models.network import Defaults, as_record
from rpn_jax.models.training_free import gem, pearl, res_clip, sc_clip
from rpn_jax.models.training_free.attention import (
  as_trained,
  key_key,
  neighbor_keys,
  neighbors_only,
  own_value,
  query_query,
  query_query_key_key,
)
from rpn_jax.models.training_free.forward import Forward, Method
from rpn_jax.models.training_free.maskclip import smooth, suppress
from rpn_jax.models.training_free.positions import POSITIONS

METHODS = {
  "vanilla": Method(as_trained),
  "maskclip": Method(own_value),
  "maskclip_released": Method(
    own_value, positions="maskclip", odd_sides="pad", activation="gelu", epsilon=1e-6
  ),
  "sclip": Method(query_query_key_key),
  "clearclip": Method(query_query, residual=False),
  "naclip": Method(tokens=neighbor_keys, residual=False),
  "naclip_kk": Method(key_key, residual=False),
  "naclip_nonly": Method(tokens=neighbors_only, residual=False),
  "res_clip": Method(tokens=res_clip.tokens, check=res_clip.check, sees_classes=True),
  "sc_clip": Method(tokens=sc_clip.tokens, check=sc_clip.check, residual=False),
  "gem": Method(tokens=gem.tokens, check=gem.check, positions="gem"),
  "pearl": Method(tokens=pearl.tokens, residual=False),
}
# Of the tower whose blocks SC-CLIP's code names.
SC_CLIP_LAYERS = 12
WORDS = {
  "residual": ("kept", "dropped", ""),
  "positions": (*POSITIONS, ""),
  "odd_sides": ("drop", "pad", ""),
}


class DenseCLIP(Defaults, nn.Module):
  """Patch labels from cosines of patches and text; see `Network`. The `prompts` are empty.

  Images may have any size. The scores of one whose sides are no multiples of the patch are of its
  whole patches with `odd_sides` "drop", which the official codes stretch over all of it; or of the
  image padded to whole patches.

  Attributes:
    clip: architecture of the frozen tower.
    method: one of METHODS.
    residual, positions, odd_sides: see `Method` and WORDS; "" is the method's own.
    logit_scale: probabilities are softmax(logit_scale · cosine).
    denoise: a class whose probability is below this in all patches of the network's input (with
      sliding windows: of the window) is suppressed; MaskCLIP's threshold is 0.5, 0 is off.
    key_smoothing: sum the patches' probabilities by the similarity of their keys.
    smoothed_below: of the patches whose largest probability is smaller; MaskCLIP's is 1.
    gaussian_std: of NACLIP's neighborhood and of ResCLIP's blur, in patches.
    res_clip_base: the method that ResCLIP adds to.
    res_clip_blocks, res_clip_rcs, res_clip_sfr: see `res_clip.tokens`.
    res_clip_decay, res_clip_threshold: see `res_clip.feedback` and `res_clip.patch_labels`.
    sc_clip_blocks: see `sc_clip.blocks`.
    sc_clip_neighbors: of the local outlier factor.
    sc_clip_contamination: part of the patches that are outliers.
    sc_clip_beta: cosines of patches that are smaller count as 0.
    sc_clip_class_weight: of the class token that is added to each patch.
    gem_depth: see `gem.depth`.
    gem_iterations: how often queries, keys and values are averaged with their like.
    pearl_alpha: weight of the centered keys.
    dtype: compute type. The last projection and the cosines are computed in float32 whatever it is.
    kernels: see `Kernels`.

  Raises:
    ValueError: an unknown method or word, a threshold that is not a probability, blocks that the
      tower does not have, or a plain vision tower, whose tokens are not in CLIP's joint space
      before training.
  """

  clip: CLIPConfig
  method: str = "maskclip"
  residual: str = ""
  positions: str = ""
  odd_sides: str = ""
  logit_scale: float = 100.0
  denoise: float = 0.0
  key_smoothing: bool = False
  smoothed_below: float = 1.0
  gaussian_std: float = 5.0
  res_clip_base: str = "naclip"
  res_clip_blocks: tuple[int, ...] | None = None
  res_clip_rcs: tuple[float, float] = (2.0, 0.4)
  res_clip_sfr: tuple[float, float] = (1.8, 0.7)
  res_clip_decay: bool = True
  res_clip_threshold: float = 0.11
  sc_clip_blocks: tuple[int, int, int, int] | None = None
  sc_clip_neighbors: int = 30
  sc_clip_contamination: float = 0.05
  sc_clip_beta: float = 0.4
  sc_clip_class_weight: float = 0.3
  gem_depth: int | None = None
  gem_iterations: int = 1
  pearl_alpha: float = 0.08
  dtype: Any = jnp.float32
  kernels: Kernels = TEXTBOOK

  section = "dense"
  trained = ""
  trainable = False
  emphasis = 0.05  # cosines of different classes usually differ by as much
  input_multiple = 1

  def __post_init__(self) -> None:
    for name, known in (("method", METHODS), *WORDS.items()):
      value = getattr(self, name)
      if value not in known:
        near = difflib.get_close_matches(str(value), known, 1, 0.0)[0]
        raise ValueError(
          f"{name}={value!r} is not known; did you mean {near!r}? Known: "
          f"{', '.join(word or repr(word) for word in known)}"
        )
    if not 0 <= self.denoise <= 1:
      raise ValueError(f"denoise={self.denoise}: expected a probability, 0 to 1")
    if self.clip.vision != "clip":
      raise ValueError(
        f'a training-free method needs the vision tower of a CLIP, got vision="{self.clip.vision}"'
      )
    if check := METHODS[self.method].check:
      check(self)
    super().__post_init__()

  def setup(self) -> None:
    method = METHODS[self.method]
    clip = dataclasses.replace(self.clip, activation=method.activation or self.clip.activation)
    self.visual = VisionTransformer(clip, self.dtype, kernels=self.kernels, epsilon=method.epsilon)

  @classmethod
  def create(
    cls,
    clip: CLIPConfig,
    settings: Any,
    *,
    loss: str = "",
    dtype: Any = jnp.float32,
    remat: str = "none",
    kernels: Kernels = TEXTBOOK,
  ) -> "DenseCLIP":
    """See `Network.create`; nothing is trained, so that loss and remat change nothing.

    Settings that runs of earlier versions lack have their defaults.
    """
    del loss, remat
    s = as_record(settings)
    names = {f.name for f in dataclasses.fields(cls)} - {
      "clip",
      "dtype",
      "kernels",
      "parent",
      "name",
    }
    fields = {name: getattr(s, name) for name in names if hasattr(s, name)}
    return cls(clip, **fields, dtype=dtype, kernels=kernels)

  @property
  def title(self) -> str:
    return self.method

  @property
  def scores(self) -> Callable:
    return heads.SCORES["cosine"]

  @property
  def probabilities(self) -> Callable:
    return cosine_probabilities(self.logit_scale)

  @property
  def independent(self) -> bool:
    # Denoising compares the classes, smoothing averages what a softmax over them gives.
    return not (self.denoise or self.key_smoothing or METHODS[self.method].sees_classes)

  @property
  def keeps_residual(self) -> bool:
    """Whether the last block keeps its residual connection and its MLP."""
    own = METHODS[self.res_clip_base if self.method == "res_clip" else self.method].residual
    return self.residual == "kept" if self.residual else own

  def __call__(
    self,
    image_BxHxWx3: jax.Array,
    text_CxE: jax.Array,
    *,
    train: bool = False,
    example_offset: jax.Array | int = 0,
  ) -> jax.Array:
    """Scores on the patch grid, (B, h, w, C) float32; the highest wins, here and in their mean.

    They are cosines, or `maskclip.SUPPRESSED`; with key smoothing, sums of probabilities.

    Raises:
      ValueError: an image smaller than a patch, or too small for the method.
    """
    del train, example_offset
    return self.read(image_BxHxWx3, self.block_inputs(image_BxHxWx3), text_CxE)

  def block_inputs(self, image_BxHxWx3: jax.Array) -> list[jax.Array]:
    """The tokens before each block of the tower, (B, 1 + N, D) each."""
    resize = POSITIONS[self.positions or METHODS[self.method].positions]
    inputs = [self.visual.embed(self.whole_patches(image_BxHxWx3)[0], resize=resize)[0]]
    for i in range(self.clip.vision_layers - 1):
      inputs.append(self.visual.run_block(i, inputs[-1]))
    return inputs

  def read(
    self, image_BxHxWx3: jax.Array, inputs: list[jax.Array], text_CxE: jax.Array
  ) -> jax.Array:
    """The scores of an image from what `block_inputs` made of it; see `__call__`."""
    method = METHODS[self.method]
    whole, image = self.whole_patches(image_BxHxWx3)
    height, width = (side // self.clip.patch_size for side in whole.shape[1:3])
    forward = Forward(
      self.visual, inputs, (height, width), image, self.keeps_residual, self,
      functools.partial(self.cosines, text_CxE=text_CxE),
      functools.partial(self.sow, "intermediates"),
    )  # fmt: skip
    if method.tokens is None:
      assert method.read is not None
      tokens = forward.run_last(functools.partial(method.read, forward.attend))
    else:
      tokens = method.tokens(forward)
    forward.record("features", self.visual.project(tokens, exact=True))
    scores = forward.classify(tokens)
    if self.denoise:
      scores = suppress(scores, self.denoise, self.logit_scale)
    if self.key_smoothing:
      _, keys, _ = forward.project(forward.last)
      keys = forward.output(forward.last, keys)[:, 1:]
      forward.record("keys", keys)
      scores = smooth(self.probabilities(scores), keys, self.smoothed_below)
    return rearrange(scores, "b (h w) c -> b h w c", h=height)

  def whole_patches(self, image_BxHxWx3: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The whole patches of an image, and the image that the scores are of.

    Raises:
      ValueError: there are none.
    """
    size, (height, width) = self.clip.patch_size, image_BxHxWx3.shape[1:3]
    if (self.odd_sides or METHODS[self.method].odd_sides) == "pad":
      padding = ((0, 0), (0, -height % size), (0, -width % size), (0, 0))
      padded = jnp.pad(image_BxHxWx3, padding)
      return padded, padded
    if height < size or width < size:
      raise ValueError(
        f"image of {height}x{width} pixels: expected one patch of {size}x{size} or more"
      )
    return image_BxHxWx3[:, : height - height % size, : width - width % size], image_BxHxWx3

  def cosines(self, tokens_BxNxD: jax.Array, text_CxE: jax.Array) -> jax.Array:
    """Cosines of tokens with unit-length text, (B, N, C) float32.

    Those of different classes differ by as little as 0.01, which bfloat16 would round away.
    """
    features = l2_normalize(self.visual.project(tokens_BxNxD, exact=True))
    text = jnp.asarray(text_CxE, jnp.float32)
    return jnp.matmul(features, text.T, precision=jax.lax.Precision.HIGHEST)


def default_method(clip: CLIPConfig) -> str:
  """The best method that needs no data set's thresholds, for a tower.

  Published scores put SC-CLIP first, by figures that were not looked up again
  (inference/published.py); its code names blocks of a tower of 12. Of the others NACLIP is the best
  for deeper ones, where SCLIP loses half of its score: ResCLIP, which scores higher, gives pixels
  that it is unsure of to the first of the names. On the shallow tower of the shapes data set
  SC-CLIP and SCLIP score alike and the others less, and SC-CLIP averages small objects away
  (docs/method.md, docs/results.md).
  """
  layers = clip.vision_layers
  if layers == SC_CLIP_LAYERS and clip.grid**2 > DenseCLIP.sc_clip_neighbors:
    return "sc_clip"
  return "sclip" if layers < SC_CLIP_LAYERS else "naclip"


@functools.cache  # one function for equal networks
def cosine_probabilities(scale: float) -> Callable[[jax.Array], jax.Array]:
  """Cosines (..., C) -> softmax(scale · cosine) over the classes."""

  def probabilities(scores: jax.Array) -> jax.Array:
    return jax.nn.softmax(scale * scores, axis=-1)

  return probabilities
