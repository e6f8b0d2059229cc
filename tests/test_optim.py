"""Optimizer groups."""

import pytest

from configs import common
from rpn_jax import optim

TREE = {"h": 0, "head": {"patch_proj": {"kernel": 0}}, "m2oe_0": {"gate": 0}}


def test_every_parameter_has_one_group():
  rules = common.optimizer(10).groups
  groups = optim.assign_groups(TREE, rules)
  assert groups == {
    "h": "h",
    "head": {"patch_proj": {"kernel": "rest"}},
    "m2oe_0": {"gate": "rest"},
  }


def test_a_parameter_outside_all_groups_is_refused():
  with pytest.raises(ValueError, match=r"'head/patch_proj/kernel' .* \[\]"):
    optim.assign_groups(TREE, (("h", "h", 1.0), ("m2oe", "m2oe.*", 10.0)))


def test_a_parameter_in_two_groups_is_refused():
  with pytest.raises(ValueError, match=r"'h' .* \['h', 'all'\]"):
    optim.assign_groups(TREE, (("h", "h", 1.0), ("all", ".*", 10.0)))
