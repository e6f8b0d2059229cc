"""The one error class."""

from rpn_jax.base.errors import InputError


def test_errors_are_one_line_whatever_they_quote():
  assert str(InputError("no file a\nb\x1b[31m é")) == r"no file a\nb\x1b[31m é"
