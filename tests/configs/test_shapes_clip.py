"""The family of tiny towers: one change each of the one that is shipped."""

import json

import pytest

from configs import shapes_clip
from configs.reference import flat
from data_pipelines.shapes import captions
from rpn_jax import config
from rpn_jax.text.tokenizer import tokenize
from rpn_jax.weights.clip_file import ASSETS


def test_the_default_is_what_the_shipped_tower_was_made_with():
  record = json.loads((ASSETS / "shapes_clip.json").read_text())["config"]
  assert json.loads(json.dumps(shapes_clip.get_config().to_dict())) == {
    **record, "scenes": "views",  # the only ones there were
  }  # fmt: skip


@pytest.mark.parametrize("tower", shapes_clip.TOWERS)
def test_a_tower_differs_in_what_is_listed(tower):
  base, c = (flat(shapes_clip.get_config(words)) for words in ("", f"tower={tower}"))
  assert {name: c[name] for name in c if c[name] != base[name]} == shapes_clip.TOWERS[tower]
  assert tower in shapes_clip.__doc__
  for words in (tower, f"{tower},runlocal"):
    config.check(shapes_clip.get_config(words))


def test_heads_of_the_wide_tower_have_the_width_of_the_others():
  wide, base = (shapes_clip.get_config(words).clip for words in ("wide", "base"))
  assert wide.vision_width / wide.vision_heads == base.vision_width / base.vision_heads == 32


def test_the_longest_crowded_caption_fits():
  objects = captions._listed([f"the {name}" for name in captions.OBJECTS[:8]])
  text = f"{objects} on {captions._listed(['grass', 'water'])}"
  tokens = tokenize([t.format(text) for t in captions._TEMPLATES], 77)
  assert (tokens != 0).sum(1).max() == shapes_clip.get_config("crowded").caption_tokens
