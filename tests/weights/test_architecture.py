"""Architectures from shapes, publishers' configs and persons; impossible ones refused."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from flax import traverse_util

from rpn_jax.models.clip import CLIP, CLIPConfig
from rpn_jax.weights import architecture, clip_file
from tests.weights.checks import one_line
from tests.weights.files import HEADS, TINY, write_state


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
  one_line("heads of the vision tower, 1 layers 8 wide.*--vision_heads=", clip_file.load, path)
  heads = {"vision_heads": 4, "text_heads": 3}
  one_line("rpn convert. with --activation=quick_gelu", clip_file.load, path, heads)
  for wrong, match in (
    ({"vision_heads": 3}, "divide the width 8"),
    ({"vision_heads": 0}, "integer from 1"),
    ({"activation": "relu"}, "activation must be"),
    ({"activation": []}, "unhashable"),
    ({"depth": 3}, "depth"),
    ({"embed_dim": 5}, "expected embed_dim 4"),
    ({"vision_layers": 2}, "expected vision_layers 1"),
  ):
    one_line(match, clip_file.load, path, {**HEADS, **wrong})


def test_heads_of_published_models():
  """From open_clip's model configs: heads of 64 channels, but in the largest image towers."""
  for tower, width, layers, heads in (
    ("vision", 768, 12, 12),
    ("vision", 896, 12, 14),
    ("vision", 1024, 24, 16),
    ("vision", 1280, 32, 16),  # H/14
    ("vision", 1408, 40, 16),  # g/14
    ("vision", 1664, 48, 16),  # bigG/14
    ("vision", 1792, 56, 16),
    ("text", 512, 12, 8),
    ("text", 1280, 32, 20),
    ("vision", 1280, 24, None),
    ("vision", 1152, 27, None),
    ("text", 1408, 24, None),
  ):
    assert architecture.usual_heads(tower, width, layers) == heads


@pytest.mark.parametrize(
  "fields", [{}, {"vision": "vit", "vision_mlp_width": 20, "vision_layers": 2, "text_layers": 3}]
)
def test_shapes_that_are_written_down_are_the_models(fields):
  config = dataclasses.replace(TINY, **fields)
  side = config.image_size
  image, tokens = np.zeros((1, side, side, 3)), np.zeros((1, config.context_length), np.int32)
  init = functools.partial(CLIP(config).init, method="encode")
  tree = jax.eval_shape(init, jax.random.key(0), image, tokens)["params"]
  want = {path: x.shape for path, x in traverse_util.flatten_dict(tree, sep="/").items()}
  assert architecture.expected_shapes(config) == want
