"""What the tests of weights compare and expect."""

import numpy as np
import pytest
from flax import traverse_util

from rpn_jax.base.errors import InputError


def flatten(tree):
  return traverse_util.flatten_dict(tree, sep="/")


def same(left, right):
  """Equal trees of equal arrays."""
  left, right = flatten(left), flatten(right)
  assert set(left) == set(right)
  for name, value in left.items():
    np.testing.assert_array_equal(value, right[name], err_msg=name)


def one_line(match, call, *args, **kwargs):
  """The InputError of a call, which has to be one line."""
  with pytest.raises(InputError, match=match) as error:
    call(*args, **kwargs)
  assert "\n" not in str(error.value)
  return str(error.value)
