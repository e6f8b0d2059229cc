"""Losses against plain full-size formulas; chunks; gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from rpn_jax.training import losses


def compiled(loss, *arguments, **options):
  """One program is quicker than its operations; it is made anew, since chunks differ."""
  return jax.jit(functools.partial(loss, **options))(*arguments)


def data(classes=5, height=12, width=10, seed=0):
  rng = np.random.default_rng(seed)
  logits = rng.normal(size=(2, 3, 5, classes)).astype(np.float32)
  label = rng.integers(0, classes + 1, (2, height, width))
  return logits, np.where(label == classes, 255, label)


def plain_sigmoid(logits, label, mask_ignored):
  """Focal and dice written out at full size."""
  batch, height, width = label.shape
  classes = logits.shape[-1]
  full = jax.image.resize(logits, (batch, height, width, classes), "bilinear", antialias=False)
  p = np.asarray(jax.nn.sigmoid(full), np.float64)
  focal = dice = masks = 0.0
  for b in range(batch):
    for c in range(classes):
      y = label[b] == c
      pt = np.where(y, p[b, ..., c], 1 - p[b, ..., c])
      term = np.where(y, 0.25, 0.75) * (1 - pt) ** 2 * -np.log(pt)
      term = term[label[b] != 255] if mask_ignored else term
      focal += term.mean()
      if y.any():
        masks += 1
        dice += 1 - (2 * (p[b, ..., c] * y).sum() + 1) / (p[b, ..., c].sum() + y.sum() + 1)
  return 100 * focal / masks, dice / masks, masks


@pytest.mark.parametrize("mask_ignored", [False, True])
@pytest.mark.parametrize("chunk", [1, 300, 2**24])
def test_sigmoid_loss_is_the_plain_formula(mask_ignored, chunk, monkeypatch):
  monkeypatch.setattr(losses, "CHUNK_ELEMENTS", chunk)
  logits, label = data()
  terms = compiled(losses.sigmoid_loss, logits, label, mask_ignored=mask_ignored)
  focal, dice, masks = plain_sigmoid(logits, label, mask_ignored)
  assert terms["loss_mask"].normalizer == masks
  np.testing.assert_allclose(terms["loss_mask"].value, focal, rtol=1e-5)
  np.testing.assert_allclose(terms["loss_dice"].value, dice, rtol=1e-5)


def test_chunks_change_neither_value_nor_gradient(monkeypatch):
  logits, label = data()

  def total(x):
    return sum(t.value for t in losses.sigmoid_loss(x, label).values())

  whole = compiled(jax.value_and_grad(total), logits)
  monkeypatch.setattr(losses, "CHUNK_ELEMENTS", 1)
  rows = compiled(jax.value_and_grad(total), logits)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), whole, rows)


def test_no_full_size_array_is_made(monkeypatch):
  """The compiled gradient never holds B x H x W x C numbers at once, nor B x h x W x C."""
  monkeypatch.setattr(losses, "CHUNK_ELEMENTS", 2**14)
  logits = jnp.zeros((1, 16, 16, 64))
  label = jnp.zeros((1, 256, 256), jnp.int32)
  full = 256 * 256 * 64 * 4

  def total(x):
    return sum(t.value for t in losses.sigmoid_loss(x, label).values())

  memory = jax.jit(jax.grad(total)).lower(logits).compile().memory_analysis()
  assert memory.temp_size_in_bytes < full / 16


def test_softmax_loss_is_the_plain_formula():
  logits, label = data()
  full = jax.image.resize(logits, (2, 12, 10, 5), "bilinear", antialias=False)
  log_p = np.asarray(jax.nn.log_softmax(full))
  valid = label != 255
  want = -np.take_along_axis(log_p, np.where(valid, label, 0)[..., None], -1)[..., 0][valid].mean()
  np.testing.assert_allclose(
    compiled(losses.softmax_loss, logits, label)["loss_ce"].value, want, rtol=1e-5
  )


def test_all_ignored_is_finite():
  logits, label = data()
  label = np.full_like(label, 255)
  for loss in losses.LOSSES.values():
    total = lambda x, loss=loss: sum(t.value for t in loss(x, label).values())
    grad = compiled(jax.grad(total), logits)
    assert np.isfinite(grad).all()


def test_a_batch_without_masks_outweighs_others_or_is_left_out():
  """By default it is divided by 1, as in the official code."""
  logits, label = data()
  empty = np.full_like(label, 255)
  plain = compiled(losses.sigmoid_loss, logits, empty)["loss_mask"]
  full = jax.image.resize(logits, (2, 12, 10, 5), "bilinear", antialias=False)
  p = np.asarray(jax.nn.sigmoid(full), np.float64)
  negatives = 0.75 * p**2 * -np.log(1 - p)
  np.testing.assert_allclose(plain.value, 100 * negatives.mean((1, 2)).sum(), rtol=1e-5)

  def loss(x, label):
    return sum(t.value for t in losses.sigmoid_loss(x, label, skip_empty=True).values())

  value, gradient = compiled(jax.value_and_grad(loss), logits, empty)
  assert value == 0 and not gradient.any()
  # Wherever there is a mask, on any device, the field changes nothing.
  np.testing.assert_array_equal(
    compiled(loss, logits, label),
    compiled(lambda *a: sum(t.value for t in losses.sigmoid_loss(*a).values()), logits, label),
  )
  summed = losses.Term(plain.total, jnp.float32(4), skip_empty=True)  # masks of another device
  np.testing.assert_allclose(summed.value, plain.value / 4, rtol=1e-6)


def test_rows_per_chunk_divides():
  assert losses.rows_per_chunk(1, 512, 512, 20, 32) == 32
  assert losses.rows_per_chunk(1, 518, 518, 20, 37) == 14  # 28 is no divisor
  assert losses.rows_per_chunk(1, 512, 512, 20, 512) == 2
  assert 512 % losses.rows_per_chunk(8, 512, 512, 156, 32) == 0
  assert losses.rows_per_chunk(8, 7, 10**9, 156, 32) == 1


def test_a_loss_takes_the_fields_of_its_config():
  """A field that a loss has is passed on: half of these pixels are ignored."""
  logits, label = np.zeros((1, 2, 2, 3), np.float32), np.array([[[0, 255], [255, 1]]])
  for name, term in (("sigmoid", "loss_mask"), ("bce", "loss_bce")):
    for mask_ignored in (False, True):
      fields = ConfigDict({"name": name, "mask_ignored": mask_ignored, "skip_empty": False})
      want = compiled(losses.LOSSES[name], logits, label, mask_ignored=mask_ignored)[term]
      got = compiled(losses.make_loss(fields, 255), logits, label)[term]
      assert got.total == want.total and got.normalizer == want.normalizer
    assert got.total != compiled(losses.LOSSES[name], logits, label)[term].total


@pytest.mark.parametrize("mask_ignored", [False, True])
@pytest.mark.parametrize("name", losses.LOSSES)
def test_more_classes_than_eight_bits(name, mask_ignored):
  """255 is a class there, and costs what it would in another place."""
  rng = np.random.default_rng(0)
  logits = np.float32(rng.normal(size=(2, 2, 3, 300)))
  label = rng.choice([3, 255, 299, 65535], (2, 6, 9))
  swapped = np.arange(300)
  swapped[[7, 255]] = 255, 7
  fields = ConfigDict({"name": name, "mask_ignored": mask_ignored, "skip_empty": False})
  got = compiled(losses.make_loss(fields, 65535), logits, label)
  moved = np.where(label == 255, 7, np.where(label == 65535, -1, label))
  want = compiled(losses.make_loss(fields, -1), logits[..., swapped], moved)
  for term in want:
    assert np.isfinite(got[term].total) and got[term].normalizer == want[term].normalizer
    np.testing.assert_allclose(got[term].total, want[term].total, rtol=1e-5)
