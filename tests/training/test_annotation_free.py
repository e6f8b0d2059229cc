"""Labels of annotation-free training: whose they are, and from when on."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rpn_jax.models import heads
from rpn_jax.training import annotation_free
from rpn_jax.training.step import TrainState

IGNORE, UNLABELLED = 255, 254
CLASSES = 5


def network(temperature):
  """A stand-in for a network: patches of 4 x 4 pixels, times the tower's matrix, times the text."""

  def apply(variables, image, text):
    patches = image.reshape(2, 2, 4, 3, 4, 3).mean((2, 4))
    return temperature * patches @ variables["params"]["visual"]["kernel"] @ text.T

  scores, same = heads.SCORES["sigmoid"], heads.unchanged
  return types.SimpleNamespace(towers=("visual",), apply=apply, scores=scores, probabilities=same)


@pytest.fixture
def case():
  """A teacher and a pupil that trains its tower, with a text each; a batch with padding."""
  rng = np.random.default_rng(0)
  array = lambda *shape: np.float32(rng.normal(size=shape))
  tower = lambda: {"visual": {"kernel": array(3, 4)}}
  label = rng.integers(0, 9, (2, 8, 12))
  label[1, :, 7:] = IGNORE
  return types.SimpleNamespace(
    teacher=network(3.0), pupil=network(1.0), before=tower(), now=tower(), snapshot=tower(),
    text=array(CLASSES, 4), own_text=array(CLASSES, 4),
    batch={"image": 3 * array(2, 8, 12, 3), "label": label},
  )  # fmt: skip


def labels(case, updates=0, **fields):
  labeler = annotation_free.Labeler(case.teacher, case.text, case.pupil, **fields)
  snapshot = annotation_free.Snapshot(jnp.int32(updates), case.snapshot)
  state = TrainState(jnp.int32(updates), case.now, ("moments", snapshot))
  run = jax.jit(lambda params, text, batch: labeler(state, params, text, batch))
  return np.asarray(run(case.before, case.own_text, case.batch))


def best(case, net, tower, text):
  """Classes and their probabilities by another way of resizing, padding ignored."""
  logits = net.apply({"params": tower}, case.batch["image"], text)
  wide = np.asarray(jax.image.resize(logits, (2, 8, 12, CLASSES), "bilinear"))
  classes = np.where(case.batch["label"] == IGNORE, IGNORE, wide.argmax(-1))
  return classes, 1 / (1 + np.exp(-wide.max(-1)))


def test_the_teacher_labels_all_but_padding(case):
  want, _ = best(case, case.teacher, case.before, case.text)
  assert len(np.unique(want)) > 3
  np.testing.assert_array_equal(labels(case), want)
  case.batch["label"][want != IGNORE] = UNLABELLED  # what is no padding is not read
  np.testing.assert_array_equal(labels(case), want)


def test_pixels_without_confidence_are_ignored(case):
  classes, probability = best(case, case.teacher, case.before, case.text)
  want = np.where(probability < 0.8, IGNORE, classes)
  assert 0.2 < (want == IGNORE).mean() < 0.8
  np.testing.assert_array_equal(labels(case, confidence=0.8), want)


def test_the_pupil_of_the_snapshot_takes_over(case):
  """Its own text, its tower as it was: neither the present one nor that before training."""
  taught, _ = best(case, case.teacher, case.before, case.text)
  own, _ = best(case, case.pupil, case.snapshot, case.own_text)
  assert (taught != own).any()
  for updates, want in ((0, taught), (3, taught), (4, own), (9, own)):
    np.testing.assert_array_equal(labels(case, updates, refresh=4), want)
  np.testing.assert_array_equal(labels(case, 9), taught)


def test_snapshots_are_of_every_so_many_updates():
  optimizer = annotation_free.with_snapshots(optax.sgd(0.5), 2)
  prompts = {"h": jnp.float32([8.0, 4.0])}
  state, found = optimizer.init(prompts), []
  for _ in range(5):
    updates, state = optimizer.update({"h": jnp.float32([2.0, 4.0])}, state, prompts)
    prompts = optax.apply_updates(prompts, updates)  # less 1 and 2
    found.append(state[-1].prompts["h"].tolist())
  assert found == [[0, 0], [6, 0], [6, 0], [4, -4], [4, -4]] and int(state[-1].updates) == 5
  plain = optax.sgd(0.5)
  assert annotation_free.with_snapshots(plain, 0) is plain
