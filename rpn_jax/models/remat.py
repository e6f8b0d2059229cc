"""What the backward pass computes again instead of storing it.

Shape letters: B batch, N tokens, P extra tokens, D width.
"""

from collections.abc import Callable

import flax.linen as nn
import jax

from rpn_jax.models.kernels.lean import STATISTICS

# What a block stores for the backward pass beside its input.
REMAT_POLICIES = {
  "none": jax.checkpoint_policies.everything_saveable,  # and the block is not wrapped at all
  "dots": jax.checkpoint_policies.save_only_these_names("attention", STATISTICS),
  "full": jax.checkpoint_policies.nothing_saveable,
}
# Of norms: their inputs, and the mean and the deviation of every row.
NORM_POLICY = jax.checkpoint_policies.save_only_these_names(STATISTICS)


def run_block(
  block: nn.Module,
  remat: str,
  x_BxNxD: jax.Array,
  read: Callable | None = None,
  residual: bool = True,
  tune: Callable | None = None,
  extra_BxPxD: jax.Array | None = None,
) -> jax.Array:
  """`block` on x, of which the backward pass computes again what the policy `remat` names."""

  def run(
    block: nn.Module, x: jax.Array, tune: Callable | None, extra: jax.Array | None
  ) -> jax.Array:
    return block(x, read, residual, tune, extra)

  if remat != "none":
    run = nn.remat(run, policy=REMAT_POLICIES[remat])
  return run(block, x_BxNxD, tune, extra_BxPxD)
