"""Contrastive pre-training: the loss by hand, and a few steps of the whole way."""

import itertools
import json
from contextlib import nullcontext
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import main
from configs import shapes_clip
from data_pipelines import datasets
from rpn_jax import devices
from rpn_jax.base.errors import InputError
from rpn_jax.tasks import pretrain
from rpn_jax.training.contrastive import contrastive_loss
from rpn_jax.training.metric_log import read_history
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


@pytest.fixture
def small():
  config = shapes_clip.get_config("runlocal")
  with config.unlocked():
    config.clip.update(vision_width=16, vision_layers=1, vision_heads=2, text_layers=1)
  return config


def test_batches_after_some_steps_are_those_of_a_whole_run(small):
  whole, rest = (datasets.captions(small)["batches"](start) for start in (0, 2))
  next(whole), next(whole)
  for batch, same in zip(whole, rest, strict=True):
    np.testing.assert_array_equal(batch["image"], same["image"])
    assert list(batch["caption"]) == list(same["caption"])


def test_a_crowded_tower_is_tested_on_images_of_its_size(small):
  crowded = shapes_clip.get_config("crowded,runlocal")
  data = datasets.captions(crowded)
  assert data["test_images"].shape == (96, 96, 96, 3)
  assert next(data["batches"](0))["image"].shape == (8, 96, 96, 3)


def test_a_long_caption_is_refused(small, tmp_path):
  with small.unlocked():
    small.caption_tokens = 5
  with pytest.raises(InputError, match=r"caption_tokens=5: a caption has \d+ tokens; set it to 77"):
    pretrain.pretrain(small, tmp_path, **datasets.captions(small))


def test_it_runs_in_one_process(small, tmp_path, monkeypatch):
  """On a pod, whose processes would join, in each for itself; the workdir is locked by one."""
  joined = []
  monkeypatch.setattr(devices, "runtime", lambda *given: joined.append(given[-1]) or nullcontext())
  monkeypatch.setattr(pretrain, "pretrain", lambda *given, **data: None)
  flags = SimpleNamespace(mode="train", distributed=[], restart=False)
  monkeypatch.setattr(main, "FLAGS", flags)
  main.run(small, tmp_path)
  assert joined == [True]
  monkeypatch.undo()
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  with pytest.raises(InputError, match="is for one process, got 2: leave out --distributed"):
    pretrain.pretrain(small, tmp_path, **datasets.captions(small))


@pytest.mark.slow
def test_a_short_pretraining_writes_weights_that_load(tmp_path, small, capsys):
  whole, halves = tmp_path / "whole", tmp_path / "halves"
  data = datasets.captions(small)
  record = pretrain.pretrain(small, whole, **data)
  clip, params = clip_file.load(whole / "clip.safetensors")
  assert (clip.mean, clip.std) == (tuple(small.mean), tuple(small.std))
  assert clip.vision_width == 16 and record["fingerprint"] == arrays.fingerprint(params)
  assert json.loads((whole / "metrics.json").read_text()) == json.loads(json.dumps(record))
  assert 0 <= record["top1"] <= 1 and record["images"] == 4 * 8

  def ends_after_three(start):
    yield from itertools.islice(data["batches"](start), 3 - start)
    raise InputError("interrupted")

  with pytest.raises(InputError, match="interrupted"):
    pretrain.pretrain(small, halves, **data | {"batches": ends_after_three})
  resumed = pretrain.pretrain(small, halves, **data)
  assert "resuming at step 2 of 4" in capsys.readouterr().out
  assert resumed | {"seconds": 0} == record | {"seconds": 0}
  assert read_history(halves / "metrics.jsonl") == read_history(whole / "metrics.jsonl")
  # The same command again repeats nothing and writes what is gone.
  (halves / "clip.safetensors").unlink()
  assert pretrain.pretrain(small, halves, **data) == resumed
  with small.unlocked():
    small.scenes = "crowded"
  with pytest.raises(InputError, match=r"different config .*scenes: views -> crowded"):
    pretrain.pretrain(small, halves, **data)
  with small.unlocked():
    small.steps, small.unmasked_steps, small.warmup_steps = 1, 0, 0
  pretrain.pretrain(small, halves, **data, restart=True)
  assert len(list(halves.glob("replaced-*/checkpoints/4"))) == 1
