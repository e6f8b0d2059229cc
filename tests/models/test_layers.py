"""The norm, and what a training step stores."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rpn_jax import config, devices
from rpn_jax.analysis import costs
from rpn_jax.config import RPNConfig
from rpn_jax.models import kernels, layers, prompts
from rpn_jax.models.clip import CLIPConfig
from rpn_jax.models.rpn import RPN
from rpn_jax.models.trained import init_prompts
from rpn_jax.training import losses, optim
from rpn_jax.training.step import TrainState, train_step

close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("platform", kernels.PLATFORMS)
@pytest.mark.parametrize("epsilon", [1e-5, 0.1])
def test_norm_and_its_gradients_are_linens(epsilon, platform):
  keys = jax.random.split(jax.random.key(0), 4)
  # Off zero, as CLIP's residual stream is: the backward pass is multiplied out.
  x = 3 + 5 * jax.random.normal(keys[0], (2, 7, 16))
  weights = jax.random.normal(keys[1], x.shape)
  scale, bias = jax.random.normal(keys[2], (16,)), jax.random.normal(keys[3], (16,))

  def value_and_gradients(module, collection):
    def loss(x, scale, bias):
      return (module.apply({collection: {"scale": scale, "bias": bias}}, x) * weights).sum()

    return jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(x, scale, bias)

  want = value_and_gradients(nn.LayerNorm(epsilon=epsilon, use_fast_variance=False), "params")
  function = kernels.for_platform(platform).layer_norm
  for norm in (layers.LayerNorm(epsilon), layers.LayerNorm(epsilon, function=function)):
    jax.tree.map(close, value_and_gradients(norm, "params"), want)
  trained = prompts.LayerNorm(epsilon, function=function)
  jax.tree.map(close, value_and_gradients(trained, "prompts"), want)


@pytest.mark.parametrize(
  "version", [kernels.TEXTBOOK, *map(kernels.for_platform, kernels.PLATFORMS)]
)
def test_norm_of_bfloat16_loses_less_than_the_rounding_of_its_input(version):
  exact = 100 + jax.random.normal(jax.random.key(0), (3, 768))
  x = jnp.bfloat16(exact)
  norm = layers.LayerNorm(function=version.layer_norm)
  variables = jax.jit(norm.init)(jax.random.key(0), x)

  @jax.jit
  def value_and_gradient(x):
    out, back = jax.vjp(lambda x: norm.apply(variables, x), x)
    return out, back(out)[0]

  out, gradient = value_and_gradient(x)
  assert out.dtype == jnp.float32
  assert gradient.dtype == jnp.bfloat16
  plain = jax.jit(nn.LayerNorm(epsilon=1e-5, use_fast_variance=False).apply)
  want = plain(variables, np.float32(x))
  rounding = np.abs(want - plain(variables, exact)).mean()
  assert np.abs(out - want).mean() < 0.1 * rounding


@pytest.mark.parametrize("platform", kernels.PLATFORMS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_norm_of_a_row_without_variance_is_its_bias(dtype, platform):
  norm = layers.LayerNorm(function=kernels.for_platform(platform).layer_norm)
  # Of these the mean of squares is less than the square of the mean, as rounded.
  x = jnp.broadcast_to(jnp.arange(129, 255, dtype=dtype)[:, None], (126, 1000))
  variables = {"params": {"scale": jnp.ones(1000), "bias": jnp.full(1000, 2.0)}}
  out, back = jax.jit(lambda x: jax.vjp(lambda x: norm.apply(variables, x), x))(x)
  np.testing.assert_allclose(out, 2, atol=0.01)
  assert jnp.isfinite(back(jnp.ones_like(out))[0]).all()


@pytest.mark.slow
@pytest.mark.skipif(jax.default_backend() != "cpu", reason="plans of XLA's CPU compiler")
def test_what_is_computed_again_is_not_stored():
  """Without the compiler option, XLA computed it in the forward pass and kept it."""
  tower = CLIPConfig(
    embed_dim=32, image_size=128, patch_size=8, vision_width=64, vision_layers=4, vision_heads=2
  )
  text = np.eye(4, 32, dtype=np.float32)
  # A tuner that adds little to compile beside the blocks themselves.
  settings = RPNConfig(tuner="vpt", deep_tokens=4)
  model = RPN(tower, settings, kernels=kernels.for_platform("cpu"))

  def start(key):
    params = costs.random_towers(tower, key)
    return params, init_prompts(model, params, text, key, 128)

  key = jax.random.key(0)
  params, trained = jax.eval_shape(start, key)
  optimizer = optim.make_optimizer(config.Optimizer(steps=100), trained)
  state = jax.eval_shape(lambda t: TrainState(jnp.int32(0), t, optimizer.init(t)), trained)
  batch = costs.random_batch(2, 128, 4)

  def megabytes(remat):
    def step(state, params, batch, key):
      return train_step(
        state, params, text, batch, key,
        model=model.clone(remat=remat), optimizer=optimizer, loss_fn=losses.sigmoid_loss,
      )  # fmt: skip

    jitted = jax.jit(
      step, donate_argnums=0, compiler_options=devices.compiler_options(devices.data_mesh())
    )
    compiled = jitted.lower(state, params, batch, key).compile()
    return compiled.memory_analysis().temp_size_in_bytes / 1e6

  none, dots, full = map(megabytes, ("none", "dots", "full"))
  assert full < 0.9 * dots < 0.8 * none, (none, dots, full)
