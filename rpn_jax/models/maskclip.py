"""MaskCLIP (Zhou et al., 2022): dense labels from an untrained CLIP."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from rpn_jax.models.clip import CLIPConfig, VisionTransformer, l2_normalize


class MaskCLIP(nn.Module):
  """Patch logits are cosines with the text; the last block keeps every patch's own value.

  Same call as `RPN`, with an empty `prompts` collection.

  Attributes:
    clip: architecture of the frozen tower.
    dtype: compute type.
  """

  clip: CLIPConfig
  dtype: Any = jnp.float32

  def setup(self):
    self.visual = VisionTransformer(self.clip, self.dtype)

  def __call__(self, image_BxHxWx3, text_CxE, train: bool = False) -> jax.Array:
    """Cosines on the patch grid: (B, h, w, C) float32."""
    del train
    x, grid = self.visual.embed(image_BxHxWx3)
    last = self.clip.vision_layers - 1
    for i in range(self.clip.vision_layers):
      x = self.visual.run_block(i, x, "value" if i == last else "qk")
    patches = l2_normalize(self.visual.project(x[:, 1:]))
    return rearrange(patches @ text_CxE.T, "b (h w) c -> b h w c", h=grid[0])
