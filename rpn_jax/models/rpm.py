"""The relationship prompt module (RPM), by the equations of the RPN paper; heads.py has the head.

Shape letters: B batch, N patch tokens, C classes, D vision width, E joint embedding,
h/w patch grid, R reduced width.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from rpn_jax.models import initializers, prompts
from rpn_jax.models.resizing import resize_grid


def itp(
  patches_BxNxE: jax.Array, cls_BxE: jax.Array, text_CxE: jax.Array, kind: str = "image_to_pixel"
) -> jax.Array:
  """Image-to-pixel semantic attention (Eq. 2): the relationship map m, (B, N, C).

  `p (t * g)^T`, since `(p * g) t^T` would take an array of the patches' size. Of Table 5: without g
  ("no_image") it is p t^T; without p ("no_pixel") it is (t * g)^T, (B, E, C).
  """
  if kind == "no_image":
    return jnp.einsum("bne,ce->bnc", patches_BxNxE, text_CxE)
  if kind == "no_pixel":
    return jnp.einsum("be,ce->bec", cls_BxE, text_CxE)
  return jnp.einsum("bne,bce->bnc", patches_BxNxE, text_CxE * cls_BxE[:, None])


def apg(map_BxNxC: jax.Array, h_NxD: jax.Array) -> jax.Array:
  """Adaptive prompt generation (Eq. 3): relationship prompts r = m^T h, (B, C, D)."""
  return jnp.einsum("bnc,nd->bcd", map_BxNxC, h_NxD)


def top_k_gates(scores_BxJ: jax.Array, k: int) -> jax.Array:
  """Softmax over the k largest scores, zero for the others: (B, J), rows sum to one."""
  kept, index = jax.lax.top_k(scores_BxJ, k)
  places_BxKxJ = jax.nn.one_hot(index, scores_BxJ.shape[-1])
  return (jax.nn.softmax(kept)[..., None] * places_BxKxJ).sum(1)


class M2oE(nn.Module):
  """Multi-scale mixture of experts (section 3.2), as a residual on the patch tokens.

  Expert j sees the reduced tokens at scale 1/2^(j-1) through a depthwise 3x3 convolution; a gate
  on their mean picks `top_k` experts. Training adds noise to the gate (rng stream `gate`).

  Attributes:
    reduced: R, the width the experts work at.
    experts: how many scales.
    top_k: experts kept by the gate; the paper gives no number.
    gated: False sums all experts, the plain multi-scale module of Table 5.
  """

  reduced: int = 3
  experts: int = 4
  top_k: int = 2
  gated: bool = True

  @nn.compact
  def __call__(
    self,
    patches_BxNxD: jax.Array,
    grid: tuple[int, int],
    train: bool = False,
    example_offset: jax.Array | int = 0,
  ) -> jax.Array:
    """(B, N, D) -> (B, N, D). `train` adds noise to the gate, see `RPN.__call__`."""
    h, w = grid
    width = patches_BxNxD.shape[-1]
    patches = patches_BxNxD.astype(jnp.float32)
    reduce = prompts.torch_dense(self.reduced, width, jnp.float32).copy(name="reduce")
    x = rearrange(reduce(patches), "b (h w) r -> h w b r", h=h)

    gates_BxJ = jnp.ones((x.shape[2], self.experts))
    if self.gated:
      gates_BxJ = self.gates(x.mean((0, 1)), train, example_offset)
    mixed = jnp.float32(0)
    for j in range(self.experts):
      small = resize_grid(x, jax.core.max_dim(1, h // 2**j), jax.core.max_dim(1, w // 2**j))
      bound = initializers.uniform(1 / 3)  # PyTorch's for a depthwise 3x3 kernel: 1/sqrt(9)
      convolve = prompts.Conv(
        self.reduced,
        (3, 3),
        feature_group_count=self.reduced,
        kernel_init=bound,
        bias_init=bound,
        name=f"expert_{j}",
      )
      expert = convolve(rearrange(small, "h w b r -> b h w r"))
      expert = resize_grid(rearrange(expert, "b h w r -> h w b r"), h, w)
      mixed = mixed + gates_BxJ[:, j, None] * expert
    # The gates sum to one, so one Linear of the mixture is the mixture of the Linears. It starts
    # small: at the start of training the tower's own tokens should pass almost unchanged.
    expand = prompts.Dense(
      width, dtype=jnp.float32, kernel_init=nn.initializers.normal(0.02), name="expand"
    )
    return patches_BxNxD + expand(rearrange(mixed, "h w b r -> b (h w) r")).astype(
      patches_BxNxD.dtype
    )

  def gates(self, mean_BxR: jax.Array, train: bool, example_offset: jax.Array | int) -> jax.Array:
    """Weights of the experts from the mean of the reduced tokens: (B, J)."""
    init = initializers.uniform(self.reduced**-0.5)
    gate, gate_noise = (
      prompts.prompt(self, name, init, (self.reduced, self.experts))
      for name in ("gate", "gate_noise")
    )
    scores_BxJ = mean_BxR @ gate
    if train:
      keys = prompts.example_keys(self.make_rng("gate"), example_offset, len(scores_BxJ))
      noise = jax.vmap(lambda key: jax.random.normal(key, (self.experts,)))(keys)
      scores_BxJ += noise * jax.nn.softplus(mean_BxR @ gate_noise)
    return top_k_gates(scores_BxJ, self.top_k)
