"""Aggregation of a cost volume, which CAT-Seg trains from nothing (Cho et al., CVPR 2024).

Every class has a map of cosines with the image. The maps are refined over space, class by class,
and over the classes, position by position; each time an image or text feature guides the queries
and keys.

What guides is the same for all classes, or for all positions, so its share of a product is computed
once, apart from the share of the other channels. Classes, and positions, that do not see each other
go through a layer in chunks, which bounds the memory.

Shape letters: B images, C classes, h/w grid of the cost volume, D width of the cost embedding,
G channels of what guides, H heads, d width of a head, M side of a window, W windows, K positions.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from rpn_jax.models import initializers, prompts
from rpn_jax.models.kernels import TEXTBOOK, Kernels
from rpn_jax.models.resizing import aligned_matrix, interpolation_matrix

# Scalars of the widest array of one chunk: 64 MB in float32.
CHUNK_ELEMENTS = 2**24
# Added to the attention between parts of a window that are not neighbors in the image; the official
# code has this number, not minus infinity.
NOT_NEIGHBORS = -100.0


class Guided(nn.Module):
  """A linear layer, or a convolution, of channels and of what guides them, concatenated.

  Attributes:
    features: channels out.
    kernel_size: (3, 3) for a convolution with padding, () for a linear layer.
    use_bias: whether there is a bias.
    dtype: compute type.
    kernels: see `Kernels`.
  """

  features: int
  kernel_size: tuple[int, ...] = ()
  use_bias: bool = True
  dtype: Any = jnp.float32
  kernels: Kernels = TEXTBOOK

  @nn.compact
  def __call__(self, x: jax.Array, guidance: jax.Array) -> jax.Array:
    """(B, C, …, D) and (B, C or 1, …, G), which is broadcast -> (B, C, …, features)."""
    width = x.shape[-1]
    fan_in = math.prod(self.kernel_size) * (width + guidance.shape[-1])
    init = initializers.uniform(fan_in**-0.5)
    shape = (*self.kernel_size, width + guidance.shape[-1], self.features)
    kernel = prompts.prompt(self, "kernel", init, shape).astype(self.dtype)
    apply = self._convolve if self.kernel_size else jnp.matmul
    out = apply(x.astype(self.dtype), kernel[..., :width, :])
    if guidance.shape[-1]:
      out += apply(guidance.astype(self.dtype), kernel[..., width:, :])
    if self.use_bias:
      out += prompts.prompt(self, "bias", init, (self.features,)).astype(self.dtype)
    return out

  def _convolve(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Convolution over the two axes before the last: (…, h, w, features)."""
    y = self.kernels.convolve(x.reshape(-1, *x.shape[-3:]), kernel)
    return y.reshape(*x.shape[:-1], kernel.shape[-1])


def torch_conv(
  features: int, kernel_size: tuple[int, int], fan_in: int, dtype: Any
) -> prompts.Conv:
  """A convolution that keeps the size, with PyTorch's initial values."""
  bound = initializers.uniform((math.prod(kernel_size) * fan_in) ** -0.5)
  return prompts.Conv(features, kernel_size, dtype=dtype, kernel_init=bound, bias_init=bound)


def in_chunks(
  function: Callable, module: nn.Module, mapped: tuple, shared: tuple, *, axis: int, elements: int,
  remat: bool,
) -> jax.Array:  # fmt: skip
  """`function(module, *mapped, *shared)`, over chunks of an axis of `mapped` and of the result.

  Args:
    function: of arrays (B, …).
    module: whose submodules the function uses.
    mapped: arrays whose `axis` is cut.
    shared: arrays that every chunk gets as they are.
    axis: 1 or more.
    elements: scalars that one index of the axis has in the function's widest array, for all B.
    remat: compute chunks again in the backward pass instead of storing what is inside them.
  """
  if remat:
    function = nn.remat(function)
  length = mapped[0].shape[axis]
  size = max(1, CHUNK_ELEMENTS // elements)
  if size >= length:
    return function(module, *mapped, *shared)
  chunks = -(-length // size)
  size = -(-length // chunks)

  def cut(x: jax.Array) -> jax.Array:
    pad = [(0, 0)] * x.ndim
    pad[axis] = (0, chunks * size - length)
    x = jnp.pad(x, pad).reshape(*x.shape[:axis], chunks, size, *x.shape[axis + 1 :])
    return jnp.moveaxis(x, axis, 0)

  scan = nn.scan(
    lambda module, carry, chunk: (carry, function(module, *chunk, *shared)),
    variable_broadcast=("params", prompts.COLLECTION),
    variable_axes={"intermediates": 0},
    split_rngs={"params": False, prompts.COLLECTION: False},
  )
  _, y = scan(module, (), tuple(map(cut, mapped)))
  y = jnp.moveaxis(y, 0, axis)
  y = y.reshape(*y.shape[:axis], chunks * size, *y.shape[axis + 2 :])
  return jax.lax.slice_in_dim(y, 0, length, axis=axis)


@functools.cache
def window_layout(height: int, width: int, window: int, shift: int) -> tuple:
  """How a grid is cut into windows.

  Returns:
    Side of the windows, shift, rows and columns added at the end, and what is added to the
    attention in each window, (W, M * M, M * M), or None.
  """
  if max(height, width) <= window:
    window, shift = max(height, width), 0
  rows, columns = (-side % window for side in (height, width))

  def part(side: int, padding: int) -> np.ndarray:
    """For each row of the rolled grid, which of them it is a neighbor of."""
    at = np.arange(side + padding)
    shifted = (at >= side + padding - window).astype(int) + (at >= side + padding - shift)
    parts = shifted if shift else np.zeros_like(at)
    return np.where(np.roll(at, -shift) < side, parts, -1)

  ids = 5 * part(height, rows)[:, None] + part(width, columns)
  outside = (part(height, rows)[:, None] < 0) | (part(width, columns) < 0)
  ids = np.where(outside, -9, ids)
  ids = rearrange(ids, "(h m) (w n) -> (h w) (m n)", m=window, n=window)
  different = ids[:, :, None] != ids[:, None, :]
  mask = np.where(different, np.float32(NOT_NEIGHBORS), np.float32(0))
  return window, shift, rows, columns, mask if different.any() else None


def attend_within(q: jax.Array, k: jax.Array, v: jax.Array, mask: np.ndarray | None) -> jax.Array:
  """softmax(q kᵀ / √d + mask) v: q, k, v (N, W, M * M, H, d), mask (W, M * M, M * M) or None."""
  scores = jnp.einsum("nwqhd,nwkhd->nwhqk", q * q.shape[-1] ** -0.5, k).astype(jnp.float32)
  if mask is not None:
    scores += mask[:, None]
  weights = jax.nn.softmax(scores).astype(v.dtype)
  return jnp.einsum("nwhqk,nwkhd->nwqhd", weights, v)


class WindowBlock(nn.Module):
  """Attention within windows, then an MLP (Swin, Liu et al., 2021, without position bias).

  Attributes:
    width: D.
    heads: H.
    window: M, at most; a smaller grid is one window.
    shift: of the windows against the grid.
    dtype: compute type of products.
    kernels: see `Kernels`.
  """

  width: int
  heads: int
  window: int
  shift: int
  dtype: Any = jnp.float32
  kernels: Kernels = TEXTBOOK

  def setup(self) -> None:
    norm = functools.partial(prompts.LayerNorm, function=self.kernels.layer_norm)
    dense = functools.partial(prompts.torch_dense, dtype=self.dtype, product=self.kernels.product)
    self.norm_1, self.norm_2 = norm(), norm()
    self.query, self.key = (Guided(self.width, dtype=self.dtype) for _ in range(2))
    self.value, self.out = (dense(self.width, self.width) for _ in range(2))
    self.fc_1 = dense(4 * self.width, self.width)
    self.fc_2 = dense(self.width, 4 * self.width)

  def __call__(self, x_BxCxhxwxD: jax.Array, guidance_Bx1xhxwxG: jax.Array) -> jax.Array:
    """(B, C, h, w, D) -> (B, C, h, w, D)."""
    x = x_BxCxhxwxD
    _, _, height, width, _ = x.shape
    window, shift, rows, columns, mask = window_layout(height, width, self.window, self.shift)

    def windows(y: jax.Array) -> jax.Array:
      y = jnp.pad(y, ((0, 0), (0, 0), (0, rows), (0, columns), (0, 0)))
      y = jnp.roll(y, (-shift, -shift), (2, 3)) if shift else y
      pattern = "b c (h m) (w n) (e d) -> (b c) (h w) (m n) e d"
      return rearrange(y, pattern, m=window, n=window, e=self.heads)

    y = self.norm_1(x)
    q, k, v = self.query(y, guidance_Bx1xhxwxG), self.key(y, guidance_Bx1xhxwxG), self.value(y)
    out = attend_within(windows(q), windows(k), windows(v), mask)
    out = rearrange(
      out, "(b c) (h w) (m n) e d -> b c (h m) (w n) (e d)",
      b=x.shape[0], h=(height + rows) // window, m=window,
    )  # fmt: skip
    out = jnp.roll(out, (shift, shift), (2, 3)) if shift else out
    x = x + self.out(out[:, :, :height, :width])
    hidden = self.kernels.activations["gelu"](self.fc_1(self.norm_2(x)))
    return x + self.fc_2(hidden)


class SpatialAggregation(nn.Module):
  """Two window blocks, the second with shifted windows; every class by itself.

  Attributes: see `WindowBlock`, and
    remat: whether chunks of classes are computed again in the backward pass.
  """

  width: int
  heads: int
  window: int
  remat: bool = False
  dtype: Any = jnp.float32
  kernels: Kernels = TEXTBOOK

  def setup(self) -> None:
    self.guidance_norm = prompts.LayerNorm(function=self.kernels.layer_norm)
    settings = (self.width, self.heads, self.window)
    self.block = [
      WindowBlock(*settings, shift, self.dtype, self.kernels) for shift in (0, self.window // 2)
    ]

  def __call__(self, x_BxCxhxwxD: jax.Array, guidance_BxhxwxG: jax.Array) -> jax.Array:
    """(B, C, h, w, D) -> (B, C, h, w, D); G may be 0."""
    guidance = guidance_BxhxwxG[:, None]
    if guidance.shape[-1]:
      guidance = self.guidance_norm(guidance)

    def blocks(module: SpatialAggregation, x: jax.Array, guidance: jax.Array) -> jax.Array:
      for block in module.block:
        x = block(x, guidance)
        module.sow("intermediates", "block", x)
      return x

    x = x_BxCxhxwxD
    _, _, h, w, width = x.shape
    attention = self.heads * min(self.window**2, h * w)  # scores of a token; the MLP has 4 D
    elements = len(x) * h * w * max(4 * width, attention)
    return in_chunks(blocks, self, (x,), (guidance,), axis=1, elements=elements, remat=self.remat)


class ClassAggregation(nn.Module):
  """Attention over the classes at every position of a pooled map, then an MLP.

  Classes are filled up to `pad_len` with copies of a learned token. The copies are equal, so one of
  them is computed and counts as many times.

  Attributes:
    width: D.
    heads: H.
    attention: "linear" (Katharopoulos et al., 2020) or "full".
    guidance_width: G.
    pad_len: see above; 0 adds none.
    align_corners: whether the pooled map is enlarged with aligned corners.
    residual_includes_pooled: whether the input is added pooled and enlarged, too.
    remat: whether chunks of positions are computed again in the backward pass.
    dtype: compute type of products.
    kernels: see `Kernels`.
  """

  width: int
  heads: int
  attention: str
  guidance_width: int
  pad_len: int
  align_corners: bool
  residual_includes_pooled: bool
  remat: bool = False
  dtype: Any = jnp.float32
  kernels: Kernels = TEXTBOOK

  def setup(self) -> None:
    norm = functools.partial(prompts.LayerNorm, function=self.kernels.layer_norm)
    dense = functools.partial(prompts.torch_dense, dtype=self.dtype, product=self.kernels.product)
    self.norm_1, self.norm_2 = norm(), norm()
    self.query, self.key = (Guided(self.width, dtype=self.dtype) for _ in range(2))
    self.value = dense(self.width, self.width)
    self.fc_1 = dense(4 * self.width, self.width)
    self.fc_2 = dense(self.width, 4 * self.width)
    if self.pad_len:
      learned = functools.partial(prompts.prompt, self, init=nn.initializers.zeros)
      self.padding_token = learned("padding_token", shape=(self.width,))
      self.padding_guidance = learned("padding_guidance", shape=(self.guidance_width,))

  def __call__(
    self, x_BxCxhxwxD: jax.Array, guidance_BxCxG: jax.Array, pooling: tuple[int, int]
  ) -> jax.Array:
    """(B, C, h, w, D) -> (B, C, h, w, D).

    Args:
      x_BxCxhxwxD: cost embedding.
      guidance_BxCxG: of the text.
      pooling: rows and columns that are averaged; what is left over at the end is left out.
    """
    x = x_BxCxhxwxD
    _, classes, height, width, _ = x.shape
    h, w = height // pooling[0], width // pooling[1]
    pooled = x[:, :, : h * pooling[0], : w * pooling[1]]
    pooled = rearrange(pooled, "b c (h m) (w n) d -> b (h w) c m n d", h=h, w=w).mean((3, 4))
    guidance = guidance_BxCxG[:, None]
    count = max(self.pad_len - classes, 0)
    if count:
      guidance = _append(guidance, self.padding_guidance)

    def aggregate(module: ClassAggregation, s: jax.Array, guidance: jax.Array) -> jax.Array:
      s = _append(s, module.padding_token) if count else s
      return module.attend(s, guidance, classes, count)

    elements = len(x) * (classes + 1) * 4 * self.width
    if self.attention == "full":
      elements = max(elements, len(x) * self.heads * (classes + 1) ** 2)
    out = in_chunks(
      aggregate, self, (pooled,), (guidance,), axis=1, elements=elements, remat=self.remat
    )
    if not self.residual_includes_pooled:
      out = out - pooled
    out = rearrange(out, "b (h w) c d -> b c h w d", h=h)
    return x + enlarge(out, height, width, self.align_corners)

  def attend(
    self, s_BxKxCxD: jax.Array, guidance_Bx1xCxG: jax.Array, classes: int, padding: int
  ) -> jax.Array:
    """Attention and MLP over the classes, of which the last counts `padding` times if that is not
    0: (B, K, C, D), without that one."""
    y = self.norm_1(s_BxKxCxD)
    heads = lambda z: rearrange(z, "b k c (e d) -> b k c e d", e=self.heads)
    q = heads(self.query(y, guidance_Bx1xCxG)[:, :, :classes])
    k = heads(self.key(y, guidance_Bx1xCxG))
    v = heads(self.value(y))
    times = np.ones(s_BxKxCxD.shape[2], np.float32)
    if padding:
      times[-1] = padding
    read = linear_attention if self.attention == "linear" else full_attention
    out = rearrange(read(q, k, v, times), "b k c e d -> b k c (e d)")
    s = s_BxKxCxD[:, :, :classes] + out  # no projection follows
    return s + self.fc_2(jax.nn.relu(self.fc_1(self.norm_2(s))))


def _append(x_BxKxCxD: jax.Array, token_D: jax.Array) -> jax.Array:
  """`x` with a token after the classes."""
  x = x_BxKxCxD
  token = jnp.broadcast_to(token_D, (*x.shape[:2], 1, x.shape[-1]))
  return jnp.concatenate([x, token.astype(x.dtype)], axis=2)


def linear_attention(q: jax.Array, k: jax.Array, v: jax.Array, times_C: np.ndarray) -> jax.Array:
  """f(q) (f(k)ᵀ v) / (f(q) Σ f(k)), f = elu + 1, class c as if it were there times_C[c] times."""
  q, k = (jax.nn.elu(z) + 1 for z in (q, k))
  count = times_C.sum()
  weighted = k * times_C[:, None, None].astype(k.dtype)
  product = jnp.einsum("bkced,bkcef->bkedf", weighted, v / count)
  total = jnp.einsum("bkced,bked->bkce", q, weighted.sum(2)) + 1e-6
  return jnp.einsum("bkced,bkedf->bkcef", q, product) * (count / total)[..., None]


def full_attention(q: jax.Array, k: jax.Array, v: jax.Array, times_C: np.ndarray) -> jax.Array:
  """softmax(q kᵀ / √d) v, class c as if it were there times_C[c] times."""
  scores = jnp.einsum("bkqed,bkced->bkeqc", q * q.shape[-1] ** -0.5, k).astype(jnp.float32)
  weights = jax.nn.softmax(scores + np.log(times_C)).astype(v.dtype)
  return jnp.einsum("bkeqc,bkced->bkqed", weights, v)


def enlarge(x: jax.Array, height: int, width: int, align_corners: bool) -> jax.Array:
  """Bilinear resize of the two axes before the last."""
  if x.shape[-3:-1] == (height, width):
    return x
  resize = aligned_matrix if align_corners else interpolation_matrix
  rows, columns = resize(x.shape[-3], height), resize(x.shape[-2], width)
  exact = jax.lax.Precision.HIGHEST
  return jnp.einsum("Hh,...hwd,Ww->...HWd", rows, x, columns, precision=exact)
