"""The legend: which classes it lists, and how."""

import numpy as np

from rpn_jax.drawing import legend
from rpn_jax.drawing.palette import class_colors

SHAPES = ["red circle", "blue square", "sand"]


def test_legend_is_sorted_marked_and_counted(monkeypatch):
  label = np.array([[0, 1, 1, 2], [2, 2, 9, 9]])
  colors = class_colors(SHAPES)

  def texts(**options):
    entries = legend.legend_entries([label], SHAPES, colors, **options)
    return [entry.text + entry.suffix for entry in entries]

  assert texts(unseen=(1,)) == ["sand", "blue square *", "red circle", "ignored"]
  assert texts(share=True) == [
    "sand: 37.5 %",
    "blue square: 25.0 %",
    "red circle: 12.5 %",
    "ignored: 25.0 %",
  ]
  shares = {0: "0.0 %", 1e-6: "<0.1 %", 0.0004: "<0.1 %", 0.0005: "0.1 %", 1: "100.0 %"}
  assert [legend.share_text(share) for share in shares] == list(shares.values())
  monkeypatch.setattr(legend, "MAX_ENTRIES", 1)
  assert texts(share=True)[1] == "and 2 with fewer pixels: 37.5 %"


def test_pixels_of_no_class_have_a_swatch_only_where_they_are_hatched():
  label, colors = np.array([[0, 9]]), class_colors(SHAPES)
  _, ignored = legend.legend_entries([label], SHAPES, colors)
  assert ignored == (None, "ignored", "")
  _, rest = legend.legend_entries([label], SHAPES, colors, rest="other")
  assert rest == ((), "other", "")
