"""Every kernel against the textbook layers, and which of them a platform's program has."""

import functools
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from rpn_jax.config import RPNConfig
from rpn_jax.models import kernels, layers
from rpn_jax.models.clip import CLIPConfig
from rpn_jax.models.kernels import cpu, gpu, tpu
from rpn_jax.models.rpn import RPN

close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.fixture(params=[*kernels.PLATFORMS, "cpu, head by head"])
def attend(request, monkeypatch):
  """The attention of each platform, of CPUs also head by head, however small."""
  platform, *way = request.param.split(", ")
  monkeypatch.setattr(cpu, "MAX_MAP_ELEMENTS", 0 if way else cpu.MAX_MAP_ELEMENTS)
  # A function of its own, for programs of its own.
  return functools.partial(kernels.for_platform(platform).attend)


@functools.partial(jax.jit, static_argnums=0)
def out_and_pulled(f, arrays, g=None):
  """What f gives, and the gradients of its product with g; without g, of the sum of its squares.

  One program is quicker than its operations, and that of the textbooks is shared.
  """
  out, pull = jax.vjp(f, *arrays)
  return out, *pull(2 * out if g is None else g)


def queries_keys_values():
  # Five of the nine tokens are attended to only.
  q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 9, 4, 8))
  return q[:, :4], k, v


def test_attention_is_the_textbooks(attend):
  qkv = queries_keys_values()
  want = out_and_pulled(layers.attend, qkv)
  jax.tree.map(close, out_and_pulled(attend, qkv), want)
  half = tuple(x.astype(jnp.bfloat16) for x in qkv)
  out, *gradients = out_and_pulled(attend, half)
  assert {x.dtype for x in (out, *gradients)} == {jnp.dtype("bfloat16")}
  np.testing.assert_allclose(np.float32(out), want[0], atol=0.05)
  for got, exact in zip(gradients, want[1:]):
    np.testing.assert_allclose(np.float32(got), exact, atol=0.1)


def test_causal_attention_is_the_textbooks(attend):
  q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 9, 4, 8))
  want = out_and_pulled(functools.partial(layers.attend, causal=True), (q, k, v))
  causal = functools.partial(attend, causal=True)
  got = out_and_pulled(causal, (q, k, v))
  jax.tree.map(close, got, want)
  first = causal(q[:, :3], k[:, :3], v[:, :3])
  close(got[0][:, :3], first)  # later tokens are not attended to


# Tokens, extra tokens, heads, channels of one, causal.
FUSED = {
  "chunks of queries": (33, 5, 2, 64, False),
  "causal": (20, 0, 4, 32, True),
  "a block that heads do not fill": (9, 3, 3, 32, False),
  "more classes than tokens": (9, 21, 1, 128, False),
  "one class": (9, 1, 2, 64, False),
}
SLOW = ("more classes than tokens", "one class")


@pytest.mark.parametrize(
  "tokens, more, heads, width, causal",
  [
    pytest.param(*case, id=name, marks=[pytest.mark.slow] if name in SLOW else [])
    for name, case in FUSED.items()
  ],
)
def test_the_kernel_of_tpus_is_the_textbooks(tokens, more, heads, width, causal, monkeypatch):
  """In Pallas' interpreter."""
  monkeypatch.setattr(tpu, "CHUNK_SCORES", 2**9)
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  wide = heads * width
  qkv, g = draw(1, tokens, 3 * wide), draw(1, tokens, wide)
  extra = draw(1, more, 3 * wide) if more else None
  assert tpu.fits(qkv, extra, heads)

  attend = lambda f: lambda qkv, extra: f(qkv, extra, heads, causal)
  textbook = attend(functools.partial(layers.self_attend, layers.attend))
  want = out_and_pulled(textbook, (qkv, extra), g)
  for dtype, tolerance in ((jnp.float32, 1e-5), (jnp.bfloat16, 2e-2)):
    cast = lambda tree, dtype=dtype: jax.tree.map(lambda x: x.astype(dtype), tree)
    with pltpu.force_tpu_interpret_mode():
      got = out_and_pulled(attend(tpu.self_attend), cast((qkv, extra)), cast(g))
    for a, exact in zip(*map(jax.tree.leaves, (got, want)), strict=True):
      assert a.dtype == dtype
      np.testing.assert_allclose(np.float32(a), exact, atol=tolerance * abs(exact).max())


@pytest.mark.parametrize(
  "tokens, more, causal", [(5, 4, False), pytest.param(9, 0, True, marks=pytest.mark.slow)]
)
def test_attention_by_cudnn_is_the_textbooks(tokens, more, causal, monkeypatch):
  """By JAX's own attention in its place, with its rule for gradients."""
  differentiated, theirs = [], jax.nn.dot_product_attention

  def cudnn(q, k, v, *, implementation, **options):
    assert implementation == "cudnn"
    if differentiated and (q.shape[1] % 2 or k.shape[1] % 2):
      raise NotImplementedError("unsupported sequence length")
    return theirs(q, k, v, **options)

  monkeypatch.setattr(jax.nn, "dot_product_attention", cudnn)
  monkeypatch.setattr(gpu, "has_cudnn", lambda: True)
  monkeypatch.setattr(gpu, "fits", lambda q: True)
  rng = np.random.default_rng(0)
  draw = lambda n, width: jnp.asarray(rng.normal(size=(2, n, width)), jnp.float32)
  arrays = (draw(tokens, 24), draw(more, 24) if more else None)
  g = draw(tokens, 8)
  attend = lambda f: lambda qkv, extra: f(qkv, extra, 2, causal)
  textbook = attend(functools.partial(layers.self_attend, layers.attend))
  close(jax.jit(attend(gpu.self_attend))(*arrays), jax.jit(textbook)(*arrays))
  differentiated.append(True)
  want = out_and_pulled(textbook, arrays, g)
  jax.tree.map(close, out_and_pulled(attend(gpu.self_attend), arrays, g), want)


def test_cudnn_attends_in_16_bits_from_ampere_on(monkeypatch):
  q = lambda dtype, width=64: jax.ShapeDtypeStruct((1, 9, 4, width), dtype)
  assert gpu.fits(q(jnp.bfloat16)) and gpu.fits(q(jnp.float16, 128))
  assert not (gpu.fits(q(jnp.float32)) or gpu.fits(q(jnp.bfloat16, 20)))
  assert not gpu.fits(q(jnp.bfloat16, 256))
  for capability, attends in (("9.0", True), ("8.0", True), ("7.5", False), ("10.3", True)):
    chips = [types.SimpleNamespace(compute_capability=capability)]
    monkeypatch.setattr(jax, "local_devices", lambda backend, chips=chips: chips)
    assert gpu.has_cudnn.__wrapped__() is attends


def test_what_does_not_fit_on_the_chip_goes_another_way():
  shape = lambda tokens, dtype: jax.ShapeDtypeStruct((1, tokens, 3 * 768), dtype)
  assert tpu.fits(shape(1370, jnp.bfloat16), shape(256, jnp.bfloat16), 12)
  assert not tpu.fits(shape(10_000, jnp.bfloat16), None, 12)
  assert not tpu.fits(shape(9, jnp.float32), None, 3)  # heads of 256 channels


def test_large_scores_do_not_overflow(attend):
  q = 100 * jax.random.normal(jax.random.key(0), (1, 5, 1, 8))
  for function in (layers.attend, attend):
    for x in jax.tree.leaves(out_and_pulled(function, (q, q, q), jnp.ones_like(q))):
      assert np.isfinite(x).all()


@pytest.mark.parametrize("platform", kernels.PLATFORMS)
def test_products_are_those_of_matrices(platform):
  x, w = jax.random.normal(jax.random.key(0), (2, 3, 5, 64)), jnp.ones((64, 7)) / 3
  g = jax.random.normal(jax.random.key(1), (2, 3, 5, 7))
  product = kernels.for_platform(platform).product
  jax.tree.map(close, out_and_pulled(product, (x, w), g), out_and_pulled(jnp.matmul, (x, w), g))


def test_products_of_bfloat16_are_not_rounded_on_cpus():
  x, w, g = (
    jax.random.normal(jax.random.key(i), shape, jnp.bfloat16)
    for i, shape in enumerate([(2, 3, 256), (256, 5), (2, 3, 5)])
  )
  exact = [np.float64(a) for a in (x, w, g)]
  out, dx, dw = out_and_pulled(cpu.product, (x, w), g.astype(jnp.float32))
  assert out.dtype == jnp.float32 and {dx.dtype, dw.dtype} == {x.dtype}
  # A bfloat16 has eight digits: rounded once, the result would be off by up to 2e-3 of itself.
  np.testing.assert_allclose(out, exact[0] @ exact[1], rtol=1e-5, atol=1e-4)
  dx_exact, dw_exact = exact[2] @ exact[1].T, np.einsum("abk,abf->kf", exact[0], exact[2])
  for got, want in ((dx, dx_exact), (dw, dw_exact)):
    np.testing.assert_allclose(np.float32(got), want, rtol=2**-8, atol=1e-4)


def test_biases_are_added_before_anything_is_rounded_on_cpus():
  # 1 + 2^-8 lies between two neighbors in bfloat16, and 1 + 2^-7 is the upper one.
  dense = layers.Dense(1, jnp.bfloat16, product=cpu.product)
  params = {"kernel": np.ones((1, 1), np.float32), "bias": np.float32([1 + 2**-8])}
  out = dense.apply({"params": params}, jnp.full((1, 1), 2.0**-8))
  assert out.dtype == jnp.bfloat16 and float(out[0, 0]) == 1 + 2**-7


@pytest.mark.parametrize("platform", kernels.PLATFORMS)
@pytest.mark.parametrize("name", layers.ACTIVATIONS)
def test_activations_round_once(name, platform):
  x = jnp.linspace(-6, 6, 101).astype(jnp.bfloat16)
  got = jax.jit(kernels.for_platform(platform).activations[name])(x)
  assert got.dtype == jnp.bfloat16
  exact = layers.ACTIVATIONS[name](x.astype(jnp.float32))
  np.testing.assert_array_equal(got, exact.astype(jnp.bfloat16))


@pytest.mark.parametrize("platform", kernels.PLATFORMS)
@pytest.mark.parametrize("name", layers.ACTIVATIONS)
def test_activations_are_the_textbooks(name, platform):
  x = jnp.linspace(-6, 6, 101)
  functions = (kernels.for_platform(platform).activations[name], layers.ACTIVATIONS[name])
  got, want = (out_and_pulled(f, (x,), jnp.ones_like(x)) for f in functions)
  jax.tree.map(close, got, want)


@pytest.mark.parametrize("platform", kernels.PLATFORMS)
@pytest.mark.parametrize("side", [1, 3, 5])
def test_convolutions_are_the_textbooks(platform, side):
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  arrays, g = (draw(2, 6, 9, 4), draw(side, side, 4, 3)), draw(2, 6, 9, 3)
  convolve = kernels.for_platform(platform).convolve
  want = out_and_pulled(layers.convolve, arrays, g)
  jax.tree.map(close, out_and_pulled(convolve, arrays, g), want)
  half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), (arrays, g))
  for got, exact in zip(out_and_pulled(convolve, *half), want):
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float32(got), exact, atol=0.02 * abs(exact).max())


def test_gradients_of_convolutions_in_loops_have_the_fast_order():
  """XLA's CPU compiler has a slow convolution for other orders of the arrays."""
  x, kernel = jnp.ones((3, 2, 6, 6, 4)), jnp.ones((3, 3, 4, 4))

  def program(convolve):
    loss = lambda x, kernel: jax.lax.scan(
      lambda y, x: (y + (convolve(x, kernel) ** 2).sum(), None), 0.0, x
    )[0]
    return jax.jit(jax.grad(loss, (0, 1))).lower(x, kernel).compile().as_text()

  orders = lambda text: set(re.findall(r"dim_labels=(\S+?)[,\s]", text))
  assert orders(program(cpu.convolve)) == {"b01f_01io->b01f"}
  assert len(orders(program(layers.convolve))) > 1


def test_kernels_are_part_of_a_programs_key():
  versions = {kernels.TEXTBOOK, *map(kernels.for_platform, ("cpu", "gpu", "tpu", "rocm"))}
  own = set(kernels.PLATFORMS.values())
  assert len(own) == 3 and versions == {kernels.TEXTBOOK, kernels.LEAN, *own}


def test_a_program_has_the_kernels_of_its_platform(monkeypatch):
  """Whatever the process runs on: a CPU compiles for TPUs, too."""
  monkeypatch.setattr(cpu, "MAX_MAP_ELEMENTS", 0)
  clip = CLIPConfig(
    embed_dim=8, image_size=16, patch_size=8, vision_width=128, vision_layers=2, vision_heads=2
  )
  image, text = jnp.zeros((1, 16, 16, 3)), jnp.eye(3, 8)
  config = RPNConfig(m2oe_experts=2)
  variables = jax.eval_shape(RPN(clip, config).init, jax.random.key(0), image, text)

  def program(platform):
    model = RPN(clip, config, kernels=kernels.for_platform(platform))
    loss = lambda prompts, params: model.apply(
      {"params": params, "prompts": prompts}, image, text, train=True,
      rngs={"dropout": jax.random.key(0), "gate": jax.random.key(0)},
    ).sum()  # fmt: skip
    traced = jax.jit(jax.grad(loss)).trace(variables["prompts"], variables["params"])
    return traced.lower(lowering_platforms=({"gpu": "cuda"}.get(platform, platform),)).as_text()

  # Two layers forward and backward, one loop each; a random number generator may have others.
  programs = {platform: program(platform) for platform in kernels.PLATFORMS}
  loops = {platform: text.count("stablehlo.while") for platform, text in programs.items()}
  assert loops["cpu"] >= max(loops["tpu"], loops["gpu"]) + 4, loops
  # Nothing is trained before the first of the two layers, which has no backward pass.
  calls = {platform: text.count("tpu_custom_call") for platform, text in programs.items()}
  assert calls == {"cpu": 0, "gpu": 0, "tpu": 3}
