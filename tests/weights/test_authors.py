"""Checkpoints of the official RPN code, recorded as arrays, to our trees and back."""

import json

import numpy as np
import pytest

from rpn_jax.weights import authors
from tests.weights.checks import one_line
from tests.weights.files import GOLDEN


@pytest.fixture(scope="module")
def recorded():
  return dict(np.load(GOLDEN / "params.npz"))


def test_from_authors(recorded):
  clip, prompts = authors.from_authors(recorded)
  vision = "backbone.transformer.resblocks.2."
  np.testing.assert_array_equal(
    clip["visual"]["block_2"]["mlp"]["c_fc"]["kernel"], recorded[f"{vision}mlp.c_fc.weight"].T
  )
  np.testing.assert_array_equal(
    clip["text"]["token_embedding"], recorded["text_encoder.token_embedding.weight"]
  )
  np.testing.assert_array_equal(prompts["h"], recorded["prompt_proj"])
  np.testing.assert_array_equal(
    prompts["prompt_proj"]["kernel"], recorded["backbone.prompt_proj.weight"].T
  )
  np.testing.assert_array_equal(
    prompts["head"]["text_reduce"]["kernel"], recorded["decode_head.cls_proj.weight"].T
  )
  back = authors.to_authors_prompts(prompts)
  meta = json.loads((GOLDEN / "meta.json").read_text())
  assert {*back, *authors.UNUSED} == set(meta["trainable"])
  for name, value in back.items():
    np.testing.assert_array_equal(value, recorded[name])


def test_authors_states_that_do_not_fit(recorded):
  for name, value, match in (
    ("decode_head.extra", np.zeros(2), "'decode_head.extra' unknown"),
    ("prompt_proj", None, "'prompt_proj' missing"),
    ("prompt_proj", np.zeros((64, 32), np.float32), "expected h with shape"),
    ("decode_head.cls_proj.weight", np.zeros((32, 32), np.float32), "text_reduce"),
    ("backbone.proj", np.zeros((64, 31), np.float32), "visual/proj"),
  ):
    changed = {k: v for k, v in {**recorded, name: value}.items() if v is not None}
    assert "rpn.pth" in one_line(match, authors.from_authors, changed, "rpn.pth")
  _, prompts = authors.from_authors(recorded)
  one_line(
    "got others: m2oe_0", authors.to_authors_prompts, {**prompts, "m2oe_0": {"gate": np.zeros(2)}}
  )
