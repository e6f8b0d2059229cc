"""The words behind a config file's colon, and what the first lines of a config file say."""

import importlib
import re

import pytest

from configs import common, folder, reference, shapes
from rpn_jax import config
from rpn_jax.base.errors import InputError
from rpn_jax.weights import clip_file

CHOICES = {"preset": ("paper", "released"), "tuner": ("", "rpn", "vpt"), "quick": False}


@pytest.mark.parametrize(
  "arg, changes",
  [
    ("", {}),
    (" , ,", {}),
    ("released", {"preset": "released"}),
    ("preset=released, quick", {"preset": "released", "quick": True}),
    ("quick,quick=False", {"quick": False}),
    ("tuner=vpt,tuner=", {"tuner": ""}),
  ],
)
def test_words(arg, changes):
  plain = {"preset": "paper", "tuner": "", "quick": False}
  assert common.parse_arg(arg, **CHOICES).to_dict() == {**plain, **changes}


@pytest.mark.parametrize(
  "arg, message",
  [
    ("relesed", "config argument 'relesed' is not known; did you mean 'released'? Known: preset"),
    ("prest=paper", "config argument 'prest' is not known; did you mean 'preset'"),
    ("preset=papre", "config argument preset='papre' is not known; did you mean 'paper'"),
    ("preset", "config argument preset='' is not known"),
    ("tuner=vtp", "config argument tuner='vtp' is not known; did you mean 'vpt'? Known: rpn, vpt"),
    ("quick=maybe", "config argument quick='maybe' is not known"),
  ],
)
def test_wrong_words(arg, message):
  with pytest.raises(InputError) as error:
    common.parse_arg(arg, **CHOICES)
  assert message in str(error.value)


@pytest.mark.parametrize("name", reference.FAMILIES)
def test_a_config_file_opens_with_its_command_hardware_and_scores(name):
  said = importlib.import_module(f"configs.{name}").__doc__
  assert re.search(rf"^    python main\.py --config=configs/{name}\.py.* --workdir=", said, re.M)
  hardware = said.partition("\nHardware: ")[2]
  assert hardware and re.search(r"\bnot run\b|\d %|in %", hardware, re.I)


def test_presets():
  paper, released = (
    common.segmentation(preset, "voc20", crop=512, patch=16, deep_tokens=10)
    for preset in ("paper", "released")
  )
  assert paper.model.h_grid is None and released.model.h_grid == (32, 32)
  assert (paper.model.deep_tokens, released.model.deep_tokens) == (40, 10)
  assert paper.data.mean != released.data.mean == (0.485, 0.456, 0.406)


def test_open_vocabulary_training_may_do_without_annotations():
  settings = {
    word: shapes.get_config(word) for word in ("open_vocab", "open_vocab,annotation_free")
  }
  assert [c.data.setting for c in settings.values()] == ["supervised", "annotation_free"]
  assert {c.eval.sets for c in settings.values()} == {("shapes", "crowds")}


def test_a_folder_with_the_shipped_clip_is_trained_as_the_shapes_are():
  """One word fits all that depends on the tower: only the data and the setting are others."""
  c, like = folder.get_config("backbone=shapes,zero_shot"), shapes.get_config()
  clip, _ = clip_file.load_clip(c.clip)
  assert (c.data.crop, c.eval.crop) == (clip.image_size, clip.image_size) == (64, 64)
  flat = [reference.flat(x) for x in (c, like)]
  differing = {k for k in flat[0].keys() | flat[1].keys() if flat[0].get(k) != flat[1].get(k)}
  assert differing == {"data.name", "data.train_images", "data.eval_images"}
  assert flat[0]["optimizer.warmup_steps"] == 50 and c.steps == 1000


@pytest.mark.parametrize("word, trained_at", [("b16", 224), ("l14", 224), ("shapes", 64)])
def test_sizes_of_a_folder_fit_its_tower(word, trained_at):
  c = folder.get_config(word)
  sides = {c.data.crop: "data", c.eval.crop: "eval"}
  assert not config.notes_on_sizes(sides, c.clip, trained_at)
  assert c.eval.stride <= c.eval.crop <= c.data.short_side == min(c.data.scale)
