"""Architectures from shapes, publishers' configs and persons; impossible ones refused."""

import numpy as np

from rpn_jax.models.clip import CLIPConfig
from rpn_jax.weights import architecture, clip_file
from tests.weights.checks import one_line
from tests.weights.files import HEADS, write_state


def test_shapes_of_published_models():
  """Parameter counts of OpenAI's ViT-B/16 and ViT-L/14."""
  tower = {"vision_width": 1024, "vision_layers": 24, "vision_heads": 16, "patch_size": 14}
  large = {**tower, "embed_dim": 768, "text_width": 768, "text_heads": 12}
  for fields, count in (
    ({}, 149_620_737),
    (large, 427_616_513),
  ):
    shapes = architecture.expected_shapes(CLIPConfig(**fields)).values()
    assert sum(int(np.prod(shape)) for shape in shapes) == count


def test_config_given_by_a_person(tmp_path, state):
  path = write_state(tmp_path / "x.pt", state)
  one_line("its number of heads is not in the file, pass vision_heads", clip_file.load, path)
  heads = {"vision_heads": 4, "text_heads": 3}
  one_line("does not tell it: pass --activation=quick_gelu", clip_file.load, path, heads)
  for wrong, match in (
    ({"vision_heads": 3}, "divide the width 8"),
    ({"vision_heads": 0}, "integer from 1"),
    ({"activation": "relu"}, "activation must be"),
    ({"activation": []}, "unhashable"),
    ({"depth": 3}, "depth"),
    ({"embed_dim": 5}, "with shape"),
    ({"vision_layers": 2}, "expected 2 visual layers"),
  ):
    one_line(match, clip_file.load, path, {**HEADS, **wrong})
