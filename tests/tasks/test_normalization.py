"""Images reach the network normalized as its weights were trained, unless the config says more."""

import dataclasses
import json
import sys

import jax
import numpy as np
import pytest
from absl import flags
from PIL import Image

import data_pipelines
from configs import shapes
from data_pipelines import datasets, registry
from rpn_jax import Segmenter
from rpn_jax.base import pixels
from rpn_jax.base.errors import InputError
from rpn_jax.config import check
from rpn_jax.config.flags import define_config, parse
from rpn_jax.models.clip import VisionTransformer
from rpn_jax.tasks import evaluate, predict, train
from rpn_jax.weights import clip_file
from tests import ROOT, tiny
from tests.tasks.test_train import make_config
from tests.weights.test_publisher import unpack

HALF, QUARTER = (0.5,) * 3, (0.25,) * 3


def white(data_config, split):
  image, label = np.full((32, 32, 3), 255, np.uint8), np.zeros((32, 32), np.uint8)
  return [{"image": image, "label": label, "id": f"{split} {i}"} for i in range(8)]


@pytest.fixture
def home(tmp_path, monkeypatch):
  """Weights of which white is (1 - 0.5) / 0.25 = 2, and a data set of white images."""
  clip = dataclasses.replace(tiny.TINY, mean=HALF, std=QUARTER)
  clip_file.save(tmp_path / "clip.safetensors", clip, tiny._params(0))
  monkeypatch.setattr(registry, "DATA_SETS", dict(registry.DATA_SETS))
  data_pipelines.register("white", classes=["white", "black"], source=white)
  return tmp_path


@pytest.fixture
def seen(monkeypatch):
  """The values of all images that reached the network since it was last cleared."""
  values, embed = set(), VisionTransformer.embed

  def recorded(self, image, *args, **options):
    jax.debug.callback(lambda x: values.update(np.unique(x).tolist()), image)
    return embed(self, image, *args, **options)

  monkeypatch.setattr(VisionTransformer, "embed", recorded)
  return values


def test_the_whole_way(home, seen, monkeypatch):
  for name in ("draw_figures", "plot_curves"):
    monkeypatch.setattr(train, name, lambda *_: None)
  monkeypatch.setattr(evaluate, "draw_figures", lambda *_: None)
  Image.new("RGB", (32, 32), (255, 255, 255)).save(home / "white.png")
  config = make_config(
    home, "runlocal,supervised", steps=1, **{"data.name": "white", "data.ratio": (1.0, 1.0)},
    **{"data.photometric": False, "data.batch_size": 8, "model.tuner": "lpm"},
  )  # fmt: skip
  assert (config.data.mean, config.data.std) == (HALF, QUARTER)
  workdir = home / "run"

  def check(action, *arguments):
    seen.clear()
    action(*arguments)
    jax.effects_barrier()
    assert seen - {0.0} == {2.0}  # prompts are initialized with an image of zeros

  check(train.train, config, workdir, datasets.load(config))
  stored = json.loads((workdir / "config.json").read_text())["config"]["data"]
  assert (stored["mean"], stored["std"]) == ([0.5] * 3, [0.25] * 3)
  check(evaluate.evaluate_run, config, workdir, datasets.load_evaluations(config))
  check(predict.predict, config, workdir, str(home / "white.png"), "white, black")
  check(Segmenter.load(workdir), str(home / "white.png"), "white, black")
  check(Segmenter.load(home / "clip.safetensors"), str(home / "white.png"), "white, black")


def make(clip, **data):
  config = shapes.get_config("runlocal")
  with config.unlocked():
    config.clip = str(clip)
    config.data.update(**data)
  return config


def test_what_the_config_says_comes_first(home):
  config = make(home / "clip.safetensors", mean=(0.1, 0.2, 0.3))
  complete = clip_file.with_normalization(config)
  assert (complete.data.mean, complete.data.std) == ((0.1, 0.2, 0.3), QUARTER)
  assert config.data.std is None and complete.is_locked == config.is_locked
  assert clip_file.with_normalization(complete) is complete
  # The next one is not told by the last.
  config.clip = "shapes_clip.safetensors"
  assert clip_file.with_normalization(config).data.std == pixels.CLIP_STD


def test_a_flag_is_what_the_config_says(monkeypatch):
  arguments = ["main.py", "--config=configs/shapes.py", "--config.data.std=(0.1, 0.2, 0.3)"]
  monkeypatch.setattr(sys, "argv", arguments)  # where ml_collections looks for overrides
  monkeypatch.chdir(ROOT)
  values = flags.FlagValues()
  define_config(values)
  parse(values, arguments)
  check(values.config)
  assert values.config.data.std == (0.1, 0.2, 0.3) and values.config.data.mean is None


def test_no_array_is_read_for_it(tmp_path, monkeypatch):
  """Of files of others, too, before they are converted."""
  folder = unpack("hf_half", tmp_path)
  monkeypatch.setattr(clip_file, "float32", None)
  complete = clip_file.with_normalization(make(folder))
  assert (complete.data.mean, complete.data.std) == (HALF, HALF)


def test_other_digits_are_the_same_run(home):
  clip = dataclasses.replace(tiny.TINY, mean=(0.4815, 0.4578, 0.4082), std=pixels.CLIP_STD)
  clip_file.save(home / "clip.safetensors", clip, tiny._params(0))
  complete = clip_file.with_normalization(make(home / "clip.safetensors"))
  assert complete.data.mean == pixels.CLIP_MEAN


def test_data_do_not_guess(home):
  with pytest.raises(InputError, match=r"got None and None, which leave them to the CLIP weights"):
    datasets.load(make(home / "clip.safetensors"))
