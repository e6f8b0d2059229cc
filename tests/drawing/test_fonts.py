"""Text of any script and length in a given width."""

import os

import matplotlib
import pytest

from rpn_jax.drawing import fonts
from rpn_jax.drawing.fonts import _dejavu, _font_with, font_for, load_font, wrap


@pytest.mark.parametrize("text", ["x" * 300, "many words " * 30, "short", ""])
@pytest.mark.parametrize("width", [60, 200])
def test_wrapped_text_fits_and_keeps_its_end(text, width):
  font = load_font(16)
  lines = wrap(text, font, width, 3, " *")
  assert 1 <= len(lines) <= 3
  assert all(font.getlength(line) <= width for line in lines)
  assert lines[-1].endswith("*")


def test_letters_that_no_font_has_are_named(monkeypatch):
  monkeypatch.setattr(fonts, "_font_with", lambda wanted: _dejavu())
  warned = []
  monkeypatch.setattr(fonts, "_warn_of_letters", warned.append)
  path, texts = font_for(["a cat", "猫 é"])
  assert (path, texts) == (_dejavu(), ["a cat", "<U+732B> é"])
  assert warned == ["猫"]
  assert font_for(["naïve Straße"])[1] == ["naïve Straße"]


def test_letters_are_drawn_with_a_font_that_has_them():
  path = _font_with(frozenset("猫"))
  if path == _dejavu():
    pytest.skip("no font with Chinese letters is installed")
  assert font_for(["猫"]) == (path, ["猫"])


def test_the_fonts_are_matplotlibs_wherever_it_keeps_them(monkeypatch):
  folder = os.path.join(matplotlib.get_data_path(), "fonts", "ttf")
  assert _dejavu() == os.path.join(folder, "DejaVuSans.ttf")
  monkeypatch.setattr(fonts.importlib.util, "find_spec", lambda name: None)
  assert _dejavu(bold=True) == os.path.join(folder, "DejaVuSans-Bold.ttf")
