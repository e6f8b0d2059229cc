"""A tiny CLIP by our names and by OpenAI's."""

import numpy as np
import pytest
from flax import traverse_util

from rpn_jax.weights import architecture, names
from tests.weights.checks import flatten
from tests.weights.files import TINY


@pytest.fixture(scope="module")
def tiny():
  """Parameters of TINY, exact in float16."""
  rng = np.random.default_rng(0)
  flat = {
    name: rng.normal(size=shape).astype(np.float16).astype(np.float32)
    for name, shape in architecture.expected_shapes(TINY).items()
  }
  return traverse_util.unflatten_dict(flat, sep="/")


@pytest.fixture
def state(tiny):
  """The same by OpenAI's names."""
  rules = {r.ours: r for r in names.clip_rules(names.OPENAI, 1, 2)}
  flat = flatten(tiny)
  to_theirs = {
    "same": lambda x: x,
    "linear": np.transpose,
    "conv": lambda x: x.transpose(3, 2, 0, 1),
  }
  return {
    rule.theirs: to_theirs[rule.layout](flat[ours]).copy(order="C") for ours, rule in rules.items()
  }
