"""A predictor asks a network for its text once, and for whole patches where it needs them."""

import dataclasses
import types
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest

from configs import shapes as shapes_config
from rpn_jax.base import pixels
from rpn_jax.base.errors import InputError
from rpn_jax.config import defaults
from rpn_jax.inference import predictor
from rpn_jax.inference.predictor import Predictor, Protocol
from rpn_jax.models.clip import CLIPConfig
from rpn_jax.models.network import Defaults, Windows
from tests import tiny
from tests.models.test_network import CAT_SEG

CLIP = CLIPConfig(patch_size=16)
ENCODED: list[tuple] = []


class TextTower(Defaults, nn.Module):
  """Its logits are the sum of an image times a factor of each class, of its "text tower"."""

  clip: Any = CLIP
  dtype: Any = jnp.float32
  input_multiple = 1
  towers = ("visual", "text")
  scores = probabilities = staticmethod(jnp.negative)

  def encode_text(self, text):
    ENCODED.append(text.shape)  # when traced
    return self.variables["params"]["text"]["factor"] * text.sum(-1).astype(jnp.float32)

  def __call__(self, image, text):
    assert text.dtype == jnp.float32  # encoded before
    return image.sum((1, 2, 3))[:, None, None, None] * text


def predictor_of(network, **protocol):
  encoder: Any = types.SimpleNamespace(config=CLIP)
  params = {"visual": {}, "text": {"factor": np.float32(2)}}
  return Predictor(network, params, {}, encoder, Protocol(**protocol))


def test_the_text_tower_runs_once_for_a_list_of_classes(monkeypatch):
  runs, encode = [], predictor.encode_text

  def counted(network, mesh, shape):
    return lambda *arguments: runs.append(shape) or encode(network, mesh, shape)(*arguments)

  monkeypatch.setattr(predictor, "encode_text", counted)
  one = predictor_of(TextTower(), short_side=8, crop=8, stride=8)
  ENCODED.clear()
  text = np.array([[1, 2], [3, 4], [0, 1]], np.int32)
  for _ in range(2):  # the same classes again, with another list between
    scores = one.sliding_window(text).scores(np.ones((8, 16, 3), np.float32))
    np.testing.assert_allclose(scores[0, 0], -np.array([3, 7, 1]) * 2 * 8 * 8 * 3)
    one.sliding_window(text[:2])
  assert runs == [(3, 2), (2, 2)] and ENCODED == [(3, 2), (2, 2)]
  for i in range(predictor.KEPT_TEXTS):
    one.sliding_window(text + i + 1)
  one.sliding_window(text)  # no longer kept
  assert len(runs) == 2 + predictor.KEPT_TEXTS + 1
  assert len(ENCODED) == 2  # a program for each shape


def test_weights_are_cast_once_for_all_words(monkeypatch):
  casts, cast = [], predictor.in_compute_type
  monkeypatch.setattr(
    predictor, "in_compute_type", lambda *given: casts.append(given) or cast(*given)
  )
  one = predictor_of(TextTower(), short_side=8, crop=8, stride=8)
  for text in (np.array([[1, 2]], np.int32), np.array([[3, 4], [0, 1]], np.int32)):
    scores = one.sliding_window(text).scores(np.ones((8, 8, 3), np.float32))
    np.testing.assert_allclose(scores[0, 0], -2 * 8 * 8 * 3 * text.sum(-1))
  assert len(casts) == 1
  assert one.with_prompts({"other": {}}).sliding_window(text) and len(casts) == 2


def test_windows_are_whole_patches_unless_the_network_resizes():
  class Patches(TextTower):
    input_multiple = Defaults.input_multiple

  assert Patches().input_multiple == 16
  with pytest.raises(InputError, match=r"config.eval.crop=24: expected a multiple of .*, 16"):
    predictor_of(Patches(), short_side=8, crop=24, stride=8)
  predictor_of(TextTower(), short_side=8, crop=24, stride=8)


def test_crops_of_a_run_are_whole_patches_in_every_mode(tmp_path):
  config = shapes_config.get_config()
  config.data.crop = 100
  with pytest.raises(InputError, match=r"config.data.crop=100: expected a multiple of .*, 8; the"):
    predictor.open_run(config, tmp_path)


def test_images_and_windows_are_those_of_the_networks_protocol():
  windows = Windows(
    short_side=24, crop=16, stride=8, long_side=30, layout="square", square=20, resize="detectron2"
  )
  one = predictor_of(TextTower(), **windows._asdict())
  image = np.random.default_rng(0).integers(0, 256, (40, 80, 3), np.uint8)
  p = one.protocol
  got = one.prepare(image)
  assert got.shape == (15, 30, 3)
  want = pixels.normalize(pixels.resize(image, (15, 30), "detectron2"), p.mean, p.std)
  np.testing.assert_array_equal(got, want)
  layout = one.sliding_window(np.ones((3, 2), np.int32)).layout
  assert type(layout).__name__ == "Square" and len(layout.windows(got)) == 5
  assert (layout.crop, layout.stride, layout.square) == (16, 8, 20)


def test_what_a_network_refuses_is_named_as_a_field_of_the_config(tmp_path):
  tiny.save(tmp_path / "clip.safetensors")

  def made(**fields):
    config = defaults()
    config.update(method="cat_seg", clip=str(tmp_path / "clip.safetensors"))
    config.cat_seg.update(dataclasses.asdict(CAT_SEG))
    config.update_from_flattened_dict(fields)
    return Predictor.from_config(config)

  with pytest.raises(
    InputError, match=r"^config\.cat_seg\.resolution=36: expected .* code \(config\.clip="
  ):
    made(**{"cat_seg.resolution": 36})
  # Before anything is trained, or read: two synonyms of one sentence are no two sentences.
  one = made(**{"cat_seg.prompts": 2})
  for text in (lambda: one.training_text(["a, b"]), lambda: one.prompt_shapes(32)):
    with pytest.raises(InputError, match=r"^config\.cat_seg\.prompts=2: expected 1 or .*, 1$"):
      text()
  many = made(**{"cat_seg.prompts": 15, "templates": "zegclip15"})
  assert many.training_text(["a, b"]).shape[:2] == (1, 30)
  assert many.prompt_shapes(32)["cost_embed"]["kernel"].shape[2] == 15
