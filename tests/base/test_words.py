"""Words that look alike are alike, however their letters are stored."""

import unicodedata

import pytest

from rpn_jax.base.errors import InputError
from rpn_jax.base.words import check_names, parse_names


def test_names_are_composed():
  decomposed = unicodedata.normalize("NFD", "café | bistrô, Übung")
  assert len(decomposed) == len("café | bistrô, Übung") + 3
  assert parse_names(decomposed) == ("café, bistrô", "Übung")


def test_names_that_look_alike_are_duplicates():
  with pytest.raises(InputError, match="duplicate class name 'é'"):
    check_names(["e\u0301", "\u00e9"])


def test_no_names_are_told_without_a_flag():
  """In Python there are no flags."""
  with pytest.raises(
    InputError, match=r"no class names: expected at least one, as in \"red circle"
  ):
    parse_names([])
