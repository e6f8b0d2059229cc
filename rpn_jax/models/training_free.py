"""Dense labels from an untrained CLIP: four ways to read the last block of the vision tower.

    vanilla    The tower as it was trained (Radford et al., 2021); it stands in every table of the
               papers below, each time by that paper's protocol.
    maskclip   Zhou et al., ECCV 2022: every token keeps its own value. Published, ViT-B/16 on
               VOC20 / Context59 / COCO-Stuff: 49.5 / 21.7 / 12.5 mIoU by its own protocol (the
               whole image at once, 85 sentences, its own wording of the classes) and
               74.9 / 26.4 / 16.7 in later reruns by others.
    sclip      Wang et al., 2023: softmax(q qᵀ) + softmax(k kᵀ), each over its scaled scores; the
               rows of the sum add up to 2. Its repository lists 81.5 / 34.5 / 22.8: short side
               336, windows of 224 every 112 pixels, 80 sentences, several names per class.
    clearclip  Lan et al., ECCV 2024: softmax(q qᵀ), without residual connection and MLP.
               Published 80.9 / 35.9 / 23.9; its code resizes to a short side of 448 and has
               windows of 448 every 224 pixels, 80 sentences.

MaskCLIP's two refinements may follow any of them; they differ from its official decode head:

    prompt denoising   The head overwrites a suppressed class with -100; if it suppresses all of
                       them, class 0 wins everywhere. Here 2 is subtracted, more than two cosines
                       can differ by: suppressed classes come last, in their old order.
    key smoothing      The paper's cosine of keys. The released vision transformer puts the keys
                       through the output projection and normalizes every channel over the
                       positions. The sum of weights is divided out here, which changes no arg-max
                       and keeps the scores of overlapping windows comparable.
"""

import difflib
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from rpn_jax.models import heads
from rpn_jax.models.clip import CLIPConfig, VisionTransformer, l2_normalize
from rpn_jax.models.kernels import TEXTBOOK, Kernels
from rpn_jax.models.network import Defaults, as_record

# Probabilities are softmax(100 · cosine); 100 is where CLIP's own scale ends.
SCALE = 100.0


def as_trained(attend: Callable, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
  """softmax(q kᵀ / √d) v."""
  return attend(q, k, v)


def own_value(attend: Callable, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
  """Every token keeps its own value."""
  del attend, q, k
  return v


def query_query(attend: Callable, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
  """softmax(q qᵀ / √d) v."""
  del k
  return attend(q, q, v)


def query_query_key_key(attend: Callable, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
  """(softmax(q qᵀ / √d) + softmax(k kᵀ / √d)) v."""
  return attend(q, q, v) + attend(k, k, v)


class Method(NamedTuple):
  """How the last block is read.

  Attributes:
    read: (attend, q, k, v) -> (B, N, H, d), each of q, k, v (B, N, H, d). `attend(q, k, v)` is
      softmax(q kᵀ / √d) v as the device computes it fastest.
    residual: whether the block keeps its residual connection and its MLP.
  """

  read: Callable
  residual: bool = True


METHODS = {
  "vanilla": Method(as_trained),
  "maskclip": Method(own_value),
  "sclip": Method(query_query_key_key),
  "clearclip": Method(query_query, residual=False),
}


class DenseCLIP(Defaults, nn.Module):
  """Patch labels from cosines of patches and text; see `Network`. The `prompts` are empty.

  Attributes:
    clip: architecture of the frozen tower.
    method: one of METHODS.
    denoise: a class whose probability is below this in all patches of the network's input (with
      sliding windows: of the window) is suppressed; MaskCLIP's threshold is 0.5, 0 is off.
    key_smoothing: average the patches' probabilities by the similarity of their keys.
    dtype: compute type.
    kernels: see `Kernels`.

  Raises:
    ValueError: an unknown method, a threshold that is not a probability, or a plain vision tower,
      whose tokens are not in CLIP's joint space before training.
  """

  clip: CLIPConfig
  method: str = "maskclip"
  denoise: float = 0.0
  key_smoothing: bool = False
  dtype: Any = jnp.float32
  kernels: Kernels = TEXTBOOK

  section = "dense"
  trained = ""
  trainable = False
  emphasis = 0.05  # cosines of different classes usually differ by as much

  def __post_init__(self) -> None:
    if self.method not in METHODS:
      near = difflib.get_close_matches(str(self.method), METHODS, 1, 0.0)[0]
      raise ValueError(
        f"method={self.method!r} is not known; did you mean {near!r}? Known: {', '.join(METHODS)}"
      )
    if not 0 <= self.denoise <= 1:
      raise ValueError(f"denoise={self.denoise}: expected a probability, 0 to 1")
    if self.clip.vision != "clip":
      raise ValueError(
        f'a training-free method needs the vision tower of a CLIP, got vision="{self.clip.vision}"'
      )
    super().__post_init__()

  def setup(self) -> None:
    self.visual = VisionTransformer(self.clip, self.dtype, kernels=self.kernels)

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
    """See `Network.create`; nothing is trained, so that loss and remat change nothing."""
    del loss, remat
    s = as_record(settings)
    return cls(clip, s.method, s.denoise, s.key_smoothing, dtype, kernels)

  @property
  def title(self) -> str:
    return self.method

  @property
  def scores(self) -> Callable:
    return heads.SCORES["cosine"]

  @property
  def probabilities(self) -> Callable:
    return cosine_probabilities

  @property
  def independent(self) -> bool:
    # Denoising compares the classes, smoothing averages what a softmax over them gives.
    return not (self.denoise or self.key_smoothing)

  def __call__(
    self,
    image_BxHxWx3: jax.Array,
    text_CxE: jax.Array,
    *,
    train: bool = False,
    example_offset: jax.Array | int = 0,
  ) -> jax.Array:
    """Scores on the patch grid, (B, h, w, C) float32; the highest wins, here and in their mean.

    They are cosines, less 2 for suppressed classes; with key smoothing, weighted means of
    probabilities.
    """
    del train, example_offset
    x, grid = self.visual.embed(image_BxHxWx3)
    last, method = self.clip.vision_layers - 1, METHODS[self.method]
    for i in range(last):
      x = self.visual.run_block(i, x)
    read = functools.partial(method.read, self.kernels.attend)
    tokens = self.visual.run_block(last, x, read, method.residual)
    scores = l2_normalize(self.visual.project(tokens[:, 1:])) @ text_CxE.T
    if self.denoise:
      scores = suppress(scores, self.denoise)
    if self.key_smoothing:
      _, keys, _ = self.visual.block[last].project(x)
      keys = rearrange(keys[:, 1:], "b n h d -> b n (h d)")
      scores = smooth(jax.nn.softmax(SCALE * scores), keys.astype(jnp.float32))
    return rearrange(scores, "b (h w) c -> b h w c", h=grid[0])


def cosine_probabilities(scores: jax.Array) -> jax.Array:
  """softmax(100 · cosine) over the classes, (..., C) -> (..., C)."""
  return jax.nn.softmax(SCALE * scores, axis=-1)


def suppress(cosine_BxNxC: jax.Array, threshold: float) -> jax.Array:
  """Cosines less 2 for every class that no patch gives a probability of `threshold`."""
  best = jax.nn.softmax(SCALE * cosine_BxNxC).max(axis=1, keepdims=True)
  return cosine_BxNxC - 2.0 * (best < threshold)


def smooth(scores_BxNxC: jax.Array, keys_BxNxD: jax.Array) -> jax.Array:
  """Mean of all patches' scores, weighted by the cosine of keys; negative weights count."""
  keys = l2_normalize(keys_BxNxD)
  weight = keys @ keys.mT
  return weight @ scores_BxNxC / jnp.abs(weight).sum(-1, keepdims=True)
