"""What a training-free method is, and what it sees of a forward pass."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from einops import rearrange

from rpn_jax.models.clip import VisionTransformer


class Method(NamedTuple):
  """How CLIP's vision tower is read.

  Attributes:
    read: (attend, q, k, v) -> (B, N, H, d), each of q, k, v (B, N, H, d): how the tokens of the
      last block read the values. `attend(q, k, v)` is softmax(q kᵀ / √d) v as the device computes
      it fastest.
    residual: whether the last block keeps its residual connection and its MLP.
    tokens: in place of `read` where that does not say it: (Forward) -> patch tokens (B, N, D), of
      which the class scores are read.
    check: (DenseCLIP) raises a ValueError about settings of the method that no image can have.
    positions: a key of `positions.POSITIONS`.
    odd_sides: what becomes of pixels at the bottom and the right that are no whole patch: "drop",
      or "pad" with zeros.
    activation: of the tower's MLPs; "" is what it was trained with.
    epsilon: of the tower's norms; None is what it was trained with.
    sees_classes: whether the scores of a class depend on which others there are.
  """

  read: Callable | None = None
  residual: bool = True
  tokens: Callable | None = None
  check: Callable | None = None
  positions: str = "sclip"
  odd_sides: str = "drop"
  activation: str = ""
  epsilon: float | None = None
  sees_classes: bool = False


@dataclasses.dataclass(frozen=True)
class Forward:
  """A forward pass up to the input of the last block, for `Method.tokens`.

  Attributes:
    tower: the vision tower, bound to its parameters.
    inputs: of each block, (B, 1 + N, D): the output of block i, counted from 1, is `inputs[i]`. The
      class token comes first.
    grid: rows and columns of patches.
    image: (B, H, W, 3).
    residual: whether the last block keeps its residual connection and its MLP.
    settings: object with the settings of the methods, see `DenseCLIP`.
    classify: patch tokens (B, N, D) -> cosines with the text (B, N, C), float32.
    record: (name, array) keeps an array for tests and analysis, in the collection "intermediates".
  """

  tower: VisionTransformer
  inputs: list[jax.Array]
  grid: tuple[int, int]
  image: jax.Array
  residual: bool
  settings: Any
  classify: Callable[[jax.Array], jax.Array]
  record: Callable[[str, Any], Any]

  @property
  def last(self) -> int:
    """Index of the last block, from 0."""
    return len(self.inputs) - 1

  @property
  def attend(self) -> Callable:
    """(q, k, v) -> softmax(q kᵀ / √d) v, as the device computes it fastest."""
    return self.tower.kernels.attend

  def project(self, i: int, x_BxNxD: jax.Array | None = None) -> tuple[jax.Array, ...]:
    """q, k, v (B, N, H, d) of block i, from 0, of its own input or of other tokens."""
    return self.tower.block[i].project(self.inputs[i] if x_BxNxD is None else x_BxNxD)

  def output(self, i: int, x_BxNxHxd: jax.Array) -> jax.Array:
    """The output projection of block i's attention, bias included: (B, N, D)."""
    return self.tower.block[i].attn.out_proj(rearrange(x_BxNxHxd, "b n h d -> b n (h d)"))

  def run_last(self, read: Callable) -> jax.Array:
    """Patch tokens after the last block, which reads its values by `read` (q, k, v)."""
    return self.tower.run_block(self.last, self.inputs[-1], read, self.residual)[:, 1:]


def check_blocks(name: str, blocks: tuple[int, ...], layers: int) -> None:
  """Refuses blocks that are not before the last one.

  Raises:
    ValueError: a block that the tower does not have, or its last.
  """
  if layers < 2:
    raise ValueError(f"{name}: expected a tower of 2 blocks or more, got {layers}")
  if not blocks or min(blocks) < 1 or max(blocks) >= layers:
    raise ValueError(
      f"{name}={tuple(blocks)}: expected blocks from 1 to {layers - 1} of the {layers} that the "
      "tower has, since the last is read another way"
    )


def in_proportion(blocks: tuple[int, ...], layers: int) -> tuple[int, ...]:
  """Blocks of a tower of 12, from 1, at the same depth of another one."""
  return tuple(min(max(round(b * layers / 12), 1), layers - 1) for b in blocks)
