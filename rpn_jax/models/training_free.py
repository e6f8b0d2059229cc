"""Dense labels from an untrained CLIP: four ways to read the last block of the image tower.

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

MaskCLIP's two refinements may follow any of them; they differ from its released decode head in
this:

    prompt denoising   The head overwrites a suppressed class with -100; if it suppresses all of
                       them, class 0 wins everywhere. Here 2 is subtracted, more than two cosines
                       can differ by: suppressed classes come last, in their old order.
    key smoothing      The paper's cosine of keys. The released vision transformer puts the keys
                       through the output projection and normalises every channel over the
                       positions. The sum of weights is divided out here, which changes no arg-max
                       and keeps the scores of overlapping windows comparable.
"""

import difflib
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from rpn_jax.base.errors import InputError
from rpn_jax.models.clip import CLIPConfig, VisionTransformer, l2_normalize

# method -> (attention kind of the last block, whether its residual connection and MLP stay)
METHODS = {
  "vanilla": ("qk", True),
  "maskclip": ("value", True),
  "sclip": ("qq_kk", True),
  "clearclip": ("qq", False),
}

# Probabilities are softmax(100 · cosine); 100 is where CLIP's own scale ends.
SCALE = 100.0


class DenseCLIP(nn.Module):
  """Patch labels from cosines of patches and text.

  Same call as `RPN`, with an empty `prompts` collection.

  Attributes:
    clip: architecture of the frozen tower.
    method: one of METHODS.
    denoise: a class whose probability is below this in all patches of the network's input (with
      sliding windows: of the window) is suppressed; MaskCLIP's threshold is 0.5, 0 is off.
    key_smoothing: average the patches' probabilities by the similarity of their keys.
    dtype: compute type.

  Raises:
    InputError: an unknown method, or a threshold that is no probability.
  """

  clip: CLIPConfig
  method: str = "maskclip"
  denoise: float = 0.0
  key_smoothing: bool = False
  dtype: Any = jnp.float32

  def __post_init__(self):
    if self.method not in METHODS:
      near = difflib.get_close_matches(str(self.method), METHODS, 1, 0.0)[0]
      raise InputError(
        f"config.dense.method={self.method!r} is not known; did you mean {near!r}? "
        f"Known: {', '.join(METHODS)}"
      )
    if not 0 <= self.denoise <= 1:
      raise InputError(f"config.dense.denoise={self.denoise}: expected a probability, 0 to 1")
    super().__post_init__()

  def setup(self):
    self.visual = VisionTransformer(self.clip, self.dtype)

  def __call__(self, image_BxHxWx3, text_CxE, train: bool = False) -> jax.Array:
    """Scores on the patch grid, (B, h, w, C) float32; the highest wins, here and in their mean.

    They are cosines, less 2 for suppressed classes; with key smoothing, weighted means of
    probabilities.
    """
    del train
    x, grid = self.visual.embed(image_BxHxWx3)
    last = self.clip.vision_layers - 1
    for i in range(last):
      x = self.visual.run_block(i, x)
    tokens = self.visual.run_block(last, x, *METHODS[self.method])
    scores = l2_normalize(self.visual.project(tokens[:, 1:])) @ text_CxE.T
    if self.denoise:
      scores = suppress(scores, self.denoise)
    if self.key_smoothing:
      keys = self.visual.run_block(last, x, "key", False)[:, 1:]
      scores = smooth(jax.nn.softmax(SCALE * scores), keys.astype(jnp.float32))
    return rearrange(scores, "b (h w) c -> b h w c", h=grid[0])


def suppress(cosine_BxNxC: jax.Array, threshold: float) -> jax.Array:
  """Cosines less 2 for every class that no patch gives a probability of `threshold`."""
  best = jax.nn.softmax(SCALE * cosine_BxNxC).max(axis=1, keepdims=True)
  return cosine_BxNxC - 2.0 * (best < threshold)


def smooth(scores_BxNxC: jax.Array, keys_BxNxD: jax.Array) -> jax.Array:
  """Mean of all patches' scores, weighted by the cosine of keys; negative weights count."""
  keys = l2_normalize(keys_BxNxD)
  weight = keys @ keys.mT
  return weight @ scores_BxNxC / jnp.abs(weight).sum(-1, keepdims=True)
