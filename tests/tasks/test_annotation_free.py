"""Annotation-free runs: whose labels they train on, from when on, and that no mask is read."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data_pipelines import datasets
from rpn_jax.base.errors import InputError
from rpn_jax.inference.predictor import Predictor
from rpn_jax.models.training_free import DenseCLIP
from rpn_jax.tasks import train
from rpn_jax.training import annotation_free
from rpn_jax.training.metric_log import read_history
from rpn_jax.training.step import TrainState
from tests import tiny
from tests.tasks import test_cat_seg
from tests.tasks.test_train import Killed, home, make_config, small_config, undrawn

__all__ = ["home", "undrawn"]  # fixtures


@pytest.fixture(scope="module")
def taught(home):
  """A run without annotations, whose network takes over after three of eight steps."""
  changes = {"self_training.refresh": 3, "save_every": 1, "log_every": 1}
  config = small_config(home, "runlocal,annotation_free", **changes)
  train.train(config, home / "taught", datasets.load(config))
  return config, home / "taught"


def same_run(config, workdir, other):
  losses = [read_history(w / "metrics.jsonl")["train/loss"] for w in (workdir, other)]
  assert len(losses[0]) == 8 and losses[0] == losses[1]
  prompts = [tiny.restored(config, w)["last"] for w in (workdir, other)]
  jax.tree.map(np.testing.assert_array_equal, *prompts)


class Shuffled:
  """A source whose pixels have random classes or none."""

  def __init__(self, source):
    self.source = source

  def __len__(self):
    return len(self.source)

  def __getitem__(self, i):
    label = self.source[i]["label"]
    classes = np.random.default_rng(i).integers(0, 28, label.shape, label.dtype)
    return {**self.source[i], "label": np.where(classes == 27, 255, classes).astype(label.dtype)}


@pytest.mark.slow
def test_it_resumes_exactly_and_reads_no_ground_truth(home, taught, monkeypatch):
  """Before the network takes over; and after it, from parameters that it had before the save."""
  config, workdir = taught
  source = datasets._source

  def shuffled(c, data_set, split):
    return source(c, data_set, split) if split == "val" else Shuffled(source(c, data_set, split))

  monkeypatch.setattr(datasets, "_source", shuffled)
  data, again = datasets.load(config), home / "taught_again"
  for step in (2, 5):

    def batches_until_killed(start, step=step):
      yield from itertools.islice(data.train_batches(start), step - start)
      raise Killed

    with pytest.raises(Killed):
      train.train(config, again, dataclasses.replace(data, train_batches=batches_until_killed))
  train.train(config, again, data)
  same_run(config, again, workdir)


def test_the_network_takes_over_from_its_teacher(home, taught, capsys):
  _, workdir = taught
  never = small_config(home, "runlocal,annotation_free", log_every=1)
  train.train(never, home / "never", datasets.load(never))
  assert "27 of 27 classes by the labels of sclip, on cpu" in capsys.readouterr().out
  losses = [read_history(w / "metrics.jsonl")["train/loss"] for w in (workdir, home / "never")]
  with_own, without = np.array(losses)[..., 1]
  np.testing.assert_array_equal(with_own[:3], without[:3])
  assert (with_own[3:] != without[3:]).all()
  # What the teacher is set to belongs to the run, where that network's section is another's else.
  with never.unlocked():
    never.dense.denoise = 0.5
  with pytest.raises(InputError, match=r"dense\.denoise: 0\.0 -> 0\.5"):
    train.train(never, home / "never", datasets.load(never))


def labels_now(config, data):
  """Labels of a batch, the trained parameters being anything; and those of the untrained tower."""
  predictor = Predictor.from_config(config)
  names = [data.names[i] for i in data.trained]
  text, batch = predictor.training_text(names), next(data.train_batches(0))
  teacher = annotation_free.make_teacher(config, predictor.network)
  network, encoder = predictor.network, predictor.encoder
  labeler = annotation_free.make_labeler(teacher, config, network, encoder, data)
  prompts = jax.tree.map(lambda x: np.full(x.shape, 3, x.dtype), predictor.prompt_shapes(32))
  state = TrainState(jnp.int32(0), prompts, ())
  got = jax.jit(lambda *given: labeler(state, *given))(predictor.params, text, batch)
  visual = {"visual": predictor.params["visual"]}
  settings = {"method": "sclip", "denoise": 0.0, "key_smoothing": False}
  logits = jax.jit(DenseCLIP.create(predictor.clip, settings).apply)(
    {"params": visual, "prompts": {}}, batch["image"], predictor.encoder.embed(names)
  )
  wide = jax.image.resize(logits, (*batch["label"].shape, len(names)), "bilinear")
  want = np.where(batch["label"] == 255, 255, wide.argmax(-1))
  return np.asarray(got), want, prompts


@pytest.mark.parametrize(
  "network", ["full", "lora", pytest.param("cat_seg", marks=pytest.mark.slow)]
)
def test_the_teacher_is_the_tower_before_training(home, network):
  """Also where the network trains the tower, or the text tower."""
  if network == "cat_seg":
    config = test_cat_seg.small(home, "shapes,runlocal,annotation_free")
  else:
    config = small_config(home, "runlocal,annotation_free", **{"model.tuner": network})
  data = datasets.load(config)
  got, want, prompts = labels_now(config, data)
  assert network == "lora" or "visual" in prompts
  assert len(np.unique(want)) > 3
  assert (got == want).mean() > 0.999  # ties of float32


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"self_training.teacher": "sclop"}, r"self_training\.teacher='sclop' .* did you mean 'sclip'"),
    ({"dense.method": "clearclip"}, r"config\.dense\.method='clearclip': the teacher of an"),
    ({"method": "training_free"}, "nothing to train"),
  ],
)
def test_teachers_that_are_none(home, tmp_path, changes, message):
  config = make_config(home, "runlocal,annotation_free", **changes)
  with pytest.raises(InputError, match=message):
    train.train(config, tmp_path / "run", datasets.load(config))
  assert not (tmp_path / "run").exists()  # so that the same folder serves the right command


def test_a_crop_is_made_of_the_teachers_patches(home, tmp_path):
  config = test_cat_seg.small(home, "shapes,runlocal,annotation_free", **{"data.crop": 36})
  with pytest.raises(InputError, match=r"data\.crop=36: .* the nearest: 32 and 40"):
    train.train(config, tmp_path / "run", datasets.load(config))
