"""A CLIP small enough to train beside in seconds, with random weights."""

import functools
import pathlib

import jax
import numpy as np

from rpn_jax.inference.predictor import open_run
from rpn_jax.models.clip import CLIP, CLIPConfig
from rpn_jax.weights import clip_file

TINY = CLIPConfig(
  embed_dim=8, image_size=32, patch_size=8, vision_width=16, vision_layers=2, vision_heads=2,
  text_width=8, text_layers=1, text_heads=2,
)  # fmt: skip

# The flags that make configs/shapes.py fit it.
FLAGS = (
  "--config.data.crop=32", "--config.data.short_side=32", "--config.eval.crop=32",
  "--config.data.scale=(128,32)", "--config.eval.stride=24", "--config.model.m2oe_experts=2",
)  # fmt: skip


@functools.cache
def _initial(clip: CLIPConfig, seed: int):
  init = jax.jit(CLIP(clip).init)
  image, tokens = np.zeros((1, 32, 32, 3)), np.zeros((1, 77), np.int32)
  return jax.device_get(init(jax.random.key(seed), image, tokens)["params"])


def _params(seed: int):
  return _initial(TINY, seed)


def save(path: pathlib.Path, seed: int = 0, clip: CLIPConfig = TINY) -> None:
  clip_file.save(path, clip, _initial(clip, seed))


def restored(config, workdir) -> dict:
  """Step and prompts of a run's newest and best checkpoints."""
  predictor, run = open_run(config, workdir)
  return predictor.read_prompts(run)
