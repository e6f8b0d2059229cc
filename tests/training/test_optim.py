"""Optimizer groups."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rpn_jax import config
from rpn_jax.base.errors import InputError
from rpn_jax.training import optim

TREE = {"h": 0, "head": {"patch_proj": {"kernel": 0}}, "m2oe_0": {"gate": 0}}


def test_every_parameter_has_one_group():
  rules = config.Optimizer().groups
  groups = optim.assign_groups(TREE, rules)
  assert groups == {
    "h": "h",
    "head": {"patch_proj": {"kernel": "rest"}},
    "m2oe_0": {"gate": "rest"},
  }


def test_a_parameter_outside_all_groups_is_refused():
  with pytest.raises(InputError, match=r"parameter 'head/patch_proj/kernel', none of h, m2oe "):
    optim.assign_groups(TREE, (("h", "h", 1.0), ("m2oe", "m2oe.*", 10.0)))


def test_a_parameter_in_two_groups_is_refused():
  with pytest.raises(InputError, match=r"parameter 'h', h and all of h, all matches"):
    optim.assign_groups(TREE, (("h", "h", 1.0), ("all", ".*", 10.0)))


@pytest.mark.parametrize("field, value", [("groups", (("h", "(h", 1.0),)), ("no_decay", "*")])
def test_what_is_no_regular_expression_is_refused(field, value):
  settings = config.Optimizer(**{field: value})
  with pytest.raises(InputError, match=f"config.optimizer.{field}: expected a regular expression"):
    optim.make_optimizer(settings, {"h": jnp.ones(2)})


@pytest.mark.parametrize(
  "decay, exact",
  [("poly", lambda t: (1 - t) ** 0.9), ("cosine", lambda t: np.sin(np.pi * (1 - t) / 2) ** 2)],
)
def test_the_last_rates_are_those_of_float64(decay, exact):
  """1 - t / T in float32 is wrong by up to a thousandth there."""
  rate = optim.make_schedule(1.0, 80_000, decay=decay, power=0.9)
  steps = np.arange(79_990, 80_000)
  np.testing.assert_allclose(rate(steps), exact(steps / 80_000), rtol=2e-6)


def test_gradients_are_clipped_by_their_norm_over_all_groups():
  tree = {"h": jnp.ones(2), "head": {"kernel": jnp.ones(3)}}
  grads = {"h": jnp.full(2, 3.0), "head": {"kernel": jnp.full(3, -4.0)}}
  moments: dict[str, list] = {"mu": [], "nu": []}
  for clip_norm in (0.0, 1e9, 2.0):
    optimizer = optim.make_optimizer(config.Optimizer(clip_norm=clip_norm), tree)
    update = jax.jit(
      lambda optimizer=optimizer: optimizer.update(grads, optimizer.init(tree), tree)
    )
    _, state = update()
    for name, found in moments.items():
      of_groups = optax.tree_utils.tree_get_all_with_path(state, name)
      found.append(jax.tree.leaves([moment for _, moment in of_groups]))
  scale = 2.0 / float(optax.tree.norm(grads))
  for name, power in (("mu", 1), ("nu", 2)):  # of the gradient
    plain, loose, clipped = moments[name]
    assert [x.shape for x in plain] == [(2,), (3,)]
    for x, same, smaller in zip(plain, loose, clipped):
      np.testing.assert_array_equal(x, same)
      np.testing.assert_allclose(smaller, x * scale**power, rtol=1e-6)
