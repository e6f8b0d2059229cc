"""Contrastive pre-training: the loss by hand, and a few steps of the whole way."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from configs import shapes_clip
from data_pipelines import datasets
from rpn_jax.tasks import pretrain
from rpn_jax.training.contrastive import contrastive_loss
from rpn_jax.weights import arrays, clip_file


def test_equal_captions_share_the_target():
  image = jnp.eye(3)
  tokens = jnp.array([[1, 2], [1, 2], [1, 3]])
  # The first two captions are one text: either is a right answer for either image.
  text = jnp.array([[1.0, 1, 0], [1, 1, 0], [0, 0, 1]]) / jnp.sqrt(jnp.array([[2.0], [2], [1]]))
  scale = 10.0
  logits = scale * np.asarray(image @ text.T)
  log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  log_q = logits.T - np.log(np.exp(logits.T).sum(-1, keepdims=True))
  target = np.array([[0.5, 0.5, 0], [0.5, 0.5, 0], [0, 0, 1]])
  want = -((target * log_p).sum(-1).mean() + (target * log_q).sum(-1).mean()) / 2
  got = contrastive_loss(image, text, tokens, jnp.log(scale))
  np.testing.assert_allclose(got, want, rtol=1e-5)


@pytest.mark.slow
def test_a_short_pretraining_writes_weights_that_load(tmp_path):
  config = shapes_clip.get_config("runlocal")
  with config.unlocked():
    config.clip.update(vision_width=16, vision_layers=1, vision_heads=2, text_layers=1)
  record = pretrain.pretrain(config, tmp_path, **datasets.captions(config))
  clip, params = clip_file.load(tmp_path / "clip.safetensors")
  assert (clip.mean, clip.std) == (tuple(config.mean), tuple(config.std))
  assert clip.vision_width == 16 and record["fingerprint"] == arrays.fingerprint(params)
  assert json.loads((tmp_path / "metrics.json").read_text()) == json.loads(json.dumps(record))
  assert 0 <= record["top1"] <= 1 and record["images"] == 4 * 8
