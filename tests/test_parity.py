"""Replays the tensors recorded from the authors' code, array by array.

Every array of the set is either compared, used as an input, or listed in NOT_REPLAYED with a
reason; `test_every_array_is_accounted_for` fails on an array that is neither. Names and sizes come
from the set, so another set of the same format runs unchanged (`--golden-dir`).
"""

import functools
import json
import re

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rpn_jax.config import RPNConfig
from rpn_jax.inference import layouts, metrics, sliding
from rpn_jax.models import clip, rpm
from rpn_jax.models.clip import CLIP, CLIPConfig, VisionTransformer
from rpn_jax.models.rpn import RPN
from rpn_jax.text.tokenizer import tokenize
from rpn_jax.training import losses, optim, pseudo_labels
from rpn_jax.training.step import TrainState, train_step
from rpn_jax.weights import authors, clip_file

TOLERANCE = 1e-4  # of the reference's root mean square, as the set's README states

# file -> (array name pattern, why it is not compared)
NOT_REPLAYED = {
  "eval.npz": [],
  "posembed.npz": [
    (r"forward\.full_(ok|error)", "the authors' segmentor refuses such images; ours runs"),
  ],
  "pipeline.npz": [(r".*", "replayed in test_transforms.py")],
  "tokenizer.npz": [(r".*", "replayed in test_tokenizer.py")],
  "loss_cases.npz": [
    (r"all_ignored\.loss_ce", "0/0, NaN on purpose; ours is 0, checked below"),
    (r"all_ignored\.grad_ce", "of that NaN"),
  ],
  "train.npz": [(r"loss\.acc_seg", "a training-batch accuracy the project does not log")],
  "train_noseen.npz": [(r"loss\.acc_seg", "as in train.npz")],
  "train_selftraining.npz": [(r"loss\.acc_seg", "as in train.npz")],
  "train_softmax.npz": [(r"loss\.acc_seg", "as in train.npz")],
  "train_textfile.npz": [(r"loss\.acc_seg", "as in train.npz")],
  "clip.npz": [],
  "metrics.npz": [],
}
USED: dict[str, set[str]] = {}


class Recorded:
  """One .npz of the set that remembers which arrays were asked for."""

  def __init__(self, path):
    self.name = path.name
    self.arrays = dict(np.load(path))
    self.used = USED.setdefault(self.name, set())

  def __getitem__(self, key):
    self.used.add(key)
    return self.arrays[key]

  def __contains__(self, key):
    return key in self.arrays


def close(got, recorded, key, absolute=None, rows=...):
  """Asserts max|difference| <= TOLERANCE * rms(reference) and says by how much it missed."""
  want = np.asarray(recorded[key])[rows]
  got = np.asarray(got)
  assert got.shape == want.shape, f"{recorded.name} {key}: {got.shape}, recorded {want.shape}"
  if want.dtype.kind in "iub":
    wrong = int((got != want).sum())
    assert not wrong, f"{recorded.name} {key}: {wrong} of {want.size} integers differ"
    return
  error = float(np.abs(got.astype(np.float64) - want).max())
  limit = absolute or TOLERANCE * float(np.sqrt(np.mean(want.astype(np.float64) ** 2)))
  assert error <= limit, f"{recorded.name} {key}: max|difference| {error:.3g}, allowed {limit:.3g}"


@functools.partial(jax.jit, static_argnums=0)
def encode_text(config, params, tokens):
  """Unit-length text, and what it were if the tower ended at each layer."""
  tower = functools.partial(clip.TextTransformer(config).apply, {"params": params})
  text, variables = tower(tokens, mutable=["intermediates"])
  layers = [tower(x, tokens, method="project") for x in variables["intermediates"]["hidden"]]
  return clip.l2_normalize(text), [clip.l2_normalize(x) for x in layers]


class Golden:
  """The authors' model of the set as ours."""

  def __init__(self, directory):
    self.directory = directory
    self.meta = m = json.loads((directory / "meta.json").read_text())
    state = dict(np.load(directory / "params.npz"))
    USED["params.npz"] = set(state)
    self.clip, self.prompts = authors.from_authors(state)
    vocab, text_width = state["text_encoder.token_embedding.weight"].shape
    context, _ = state["text_encoder.positional_embedding"].shape
    self.clip_config = CLIPConfig(
      embed_dim=m["out_dim"],
      image_size=m["res"],
      patch_size=m["patch"],
      vision_width=m["width"],
      vision_layers=m["layers"],
      vision_heads=m["heads"],
      text_width=text_width,
      text_layers=m["tl"],
      text_heads=m["th"],
      context_length=context,
      vocab_size=vocab,
    )
    side = m["res"] // m["patch"]
    self.config = RPNConfig(
      tuner="rpn+vpt",
      deep_tokens=m["num_tokens"],
      m2oe="none",
      h_shared=True,
      h_grid=(side, side),
      head="released",
      class_embedding_copies=2,
      prompt_dropout=0.0,
    )
    self.model = RPN(self.clip_config, self.config)
    self.params = {"visual": self.clip["visual"]}
    self.inputs = self.load("inputs")
    self.image = np.moveaxis(self.inputs["image"], 1, -1)
    self.label = self.inputs["label"][:, 0]
    self.seen = self.inputs["seen"]
    self.unseen = self.inputs["unseen"]
    tokens = self.inputs["tokens"]
    self.text, self.text_layers = encode_text(self.clip_config, self.clip["text"], tokens)
    # Labels of the zero-shot setting: positions among the seen classes, everything else ignored.
    self.position = np.full(256, 255)
    self.position[self.seen] = np.arange(len(self.seen))

  def load(self, name):
    return Recorded(self.directory / f"{name}.npz")

  @functools.cached_property
  def forward(self):
    return jax.jit(
      lambda prompts, image, text: self.model.apply(
        {"params": self.params, "prompts": prompts}, image, text, mutable=["intermediates"]
      )
    )


@pytest.fixture(scope="module")
def golden(golden_dir):
  return Golden(golden_dir)


def check_intermediates(golden, recorded, text, logits, inside):
  """Compares what a file has of embeddings, hidden streams, maps and prompts."""
  size = golden.meta["res"]
  inside = inside["intermediates"]
  sequence_first = lambda x: np.moveaxis(np.asarray(x), 1, 0)
  if "embed" in recorded:
    close(sequence_first(inside["embed"][0]), recorded, "embed")
  for i in range(golden.meta["layers"]):
    key = f"layer{i}."
    patches, cls = inside["patches"][i], inside["cls"][i]
    if key + "hidden" in recorded:
      # What becomes of prompts, in between, is dropped and not computed here.
      rows = np.r_[0, -patches.shape[1] : 0]
      close(sequence_first(inside["hidden"][i]), recorded, key + "hidden", rows=rows)
    if key + "vis_token" not in recorded:
      continue
    close(patches, recorded, key + "vis_token")
    close(cls, recorded, key + "cls_token")
    # The product t * g that itp() avoids.
    close(text[None] * cls[:, None], recorded, key + "rel_cls")
    # The last layer's map and prompts are recorded, though nothing uses them.
    m = inside["m"][i] if i < len(inside["m"]) else rpm.itp(patches, cls, text)
    close(m, recorded, key + "m")
    prompts = rpm.apg(m, golden.prompts["h"])
    if i < len(inside["relationship"]):
      np.testing.assert_array_equal(prompts, rpm.apg(m, golden.prompts["h"]))
      prompts = inside["relationship"][i]
    close(sequence_first(prompts), recorded, key + "mask_prompt")
  close(np.moveaxis(logits, -1, 1), recorded, "logits_lowres")
  if "logits" in recorded:
    full = jax.image.resize(
      logits, (*logits.shape[:1], size, size, logits.shape[-1]), "bilinear", antialias=False
    )
    close(np.moveaxis(full, -1, 1), recorded, "logits")


def check_text(golden, recorded):
  for i, text in enumerate(golden.text_layers):
    close(text, recorded, f"text.layer{i}")


def test_evaluation_forward(golden):
  recorded = golden.load("eval")
  check_text(golden, recorded)
  logits, inside = golden.forward(golden.prompts, golden.image, golden.text)
  check_intermediates(golden, recorded, golden.text, logits, inside)
  size = golden.meta["res"]
  slide = sliding.SlidingWindow(
    lambda windows: golden.forward(golden.prompts, windows, golden.text)[0],
    len(golden.text),
    crop=size,
    stride=size,
    penalty=golden.meta["seen_penalty"],
    penalized=golden.seen,
  )
  scores = [slide.scores(image) for image in golden.image]
  close(np.moveaxis(np.stack(scores), -1, 1), recorded, "out")


def test_evaluation_with_given_text(golden):
  recorded = golden.load("eval_textfile")
  text = golden.inputs["text_embedding"]
  both, _ = golden.forward(golden.prompts, golden.image, text)
  scores = jax.nn.sigmoid(clip.resize_grid(both[0], golden.meta["res"], golden.meta["res"]))
  scores = scores.at[..., golden.seen].add(-golden.meta["seen_penalty"])
  close(np.moveaxis(scores, -1, 0)[None], recorded, "out0")
  want = recorded["logits_lowres"]
  close(np.moveaxis(both[: len(want)], -1, 1), recorded, "logits_lowres")


@functools.partial(jax.jit, static_argnames=("model", "loss_fn", "unseen"))
@functools.partial(jax.grad, has_aux=True)
def gradients(prompts, params, image, text, label, *, model, loss_fn, unseen):
  """Gradients of the prompts; loss terms, logits, labels and intermediates on the way.

  With unseen classes, labels of -1 become pseudo labels.
  """
  variables = {"params": params, "prompts": prompts}
  logits, inside = model.apply(variables, image, text, mutable=["intermediates"])
  if unseen:
    label = pseudo_labels.pseudo_labels(logits, label, np.array(unseen))
  terms = loss_fn(logits, label)
  return sum(t.value for t in terms.values()), (terms, logits, label, inside)


def check_step(golden, recorded, text, label, loss_fn, unseen=()):
  """Forward, loss, target and the gradient of every prompt parameter."""
  grads, (terms, logits, label, inside) = gradients(
    golden.prompts, golden.params, golden.image, text, label,
    model=golden.model, loss_fn=loss_fn, unseen=unseen,
  )  # fmt: skip
  close(np.asarray(label)[:, None], recorded, "target")
  for name, term in terms.items():
    close(np.float32(term.value), recorded, f"loss.{name}")
  close(np.float32(sum(t.value for t in terms.values())), recorded, "loss.total")
  if "logits_lowres" in recorded:
    check_intermediates(golden, recorded, text, logits, inside)
  if "grad.logits" in recorded:
    size = golden.meta["res"]
    full = jax.image.resize(
      logits, (logits.shape[0], size, size, logits.shape[-1]), "bilinear", antialias=False
    )
    grad = jax.grad(lambda x: sum(t.value for t in loss_fn(x, label).values()))(full)
    close(np.moveaxis(grad, -1, 1), recorded, "grad.logits")
  shapes = {k: v.shape for k, v in np.load(golden.directory / "params.npz").items()}
  theirs = authors.to_authors_prompts(grads)
  compared = 0
  for key in [k for k in recorded.arrays if k.startswith("grad.") and k != "grad.logits"]:
    name = key.removeprefix("grad.")
    assert theirs[name].shape == shapes[name]
    # A softmax does not see a shift, so this gradient is zero but for rounding.
    shift = recorded.name == "train_softmax.npz" and name == "decode_head.tex_norm_1.bias"
    close(theirs[name], recorded, key, absolute=1e-6 if shift else None)
    compared += 1
  assert compared
  if "nograd_names" in recorded:
    unused = set(golden.meta["trainable"]) - set(theirs)
    assert unused == set(recorded["nograd_names"].tolist())


def zero_shot_label(golden, label):
  return np.int32(golden.position[label])


def test_train_step_inductive(golden):
  recorded = golden.load("train")
  check_text(golden, recorded)
  check_step(
    golden,
    recorded,
    golden.text[golden.seen],
    zero_shot_label(golden, golden.label),
    losses.sigmoid_loss,
  )
  table = golden.inputs["visibility_seen_mask"]
  ours = golden.position[: len(table)]
  np.testing.assert_array_equal(ours, np.where(table < 0, 255, table))


def test_train_step_image_without_seen_pixels(golden):
  recorded = golden.load("train_noseen")
  label = recorded["label"][:, 0]
  check_step(
    golden,
    recorded,
    golden.text[golden.seen],
    zero_shot_label(golden, label),
    losses.sigmoid_loss,
  )


def test_train_step_softmax(golden):
  recorded = golden.load("train_softmax")
  check_step(
    golden,
    recorded,
    golden.text[golden.seen],
    zero_shot_label(golden, golden.label),
    losses.softmax_loss,
  )


def test_train_step_given_text(golden):
  recorded = golden.load("train_textfile")
  check_step(
    golden,
    recorded,
    golden.inputs["text_embedding"][golden.seen],
    zero_shot_label(golden, golden.label),
    losses.sigmoid_loss,
  )


def test_train_step_self_training(golden):
  recorded = golden.load("train_selftraining")
  before = golden.label.copy()
  before[np.isin(before, golden.unseen)] = -1
  close(before[:, None], recorded, "label_before_pseudo")
  text = golden.inputs["text_embedding"]  # this recording was made with the given text
  check_step(golden, recorded, text, before, losses.sigmoid_loss, tuple(golden.unseen.tolist()))
  logits, _ = golden.forward(golden.prompts, golden.image, text)
  everywhere = pseudo_labels.pseudo_labels(logits, jnp.full_like(before, -1), golden.unseen)
  close(np.asarray(everywhere)[:, None], recorded, "pseudo_label")


@pytest.mark.parametrize(
  "case", ["same_size", "upsampled", "one_ignored", "all_ignored", "no_ignored"]
)
@pytest.mark.parametrize("chunk", [1, 2**24])
def test_loss_cases(golden, case, chunk, monkeypatch):
  monkeypatch.setattr(losses, "CHUNK_ELEMENTS", chunk)
  recorded = golden.load("loss_cases")
  logits = np.moveaxis(recorded[f"{case}.logits"], 1, -1)
  label = recorded[f"{case}.label"]
  terms, grads = values_and_gradients(losses.sigmoid_loss, logits, label)
  assert max(int(terms["loss_mask"].normalizer), 1) == recorded[f"{case}.num_masks"]
  for name in ("mask", "dice"):
    limit = value_limit(recorded, f"{case}.loss_{name}")
    close(np.float32(terms[f"loss_{name}"].value), recorded, f"{case}.loss_{name}", limit)
    limit = value_limit(recorded, f"{case}.grad_{name}")
    close(np.moveaxis(grads[f"loss_{name}"], -1, 1), recorded, f"{case}.grad_{name}", limit)
  terms, grads = values_and_gradients(losses.softmax_loss, logits, label)
  value, grad = terms["loss_ce"].value, grads["loss_ce"]
  if case == "all_ignored":
    assert value == 0 and not np.asarray(grad).any()
  else:
    close(np.float32(value), recorded, f"{case}.loss_ce")
    close(np.moveaxis(grad, -1, 1), recorded, f"{case}.grad_ce")


def values_and_gradients(loss_fn, logits, label):
  """The terms of a loss, and the gradient of each, compiled as one."""

  def both(logits):
    terms, back = jax.vjp(lambda x: {k: t.value for k, t in loss_fn(x, label).items()}, logits)
    one = lambda name: {k: jnp.float32(k == name) for k in terms}
    return loss_fn(logits, label), {name: back(one(name))[0] for name in terms}

  return jax.jit(both)(logits)


def value_limit(recorded, key):
  """An all-zero reference has no scale of its own: there, one absolute limit."""
  return None if recorded[key].any() else 1e-9


def test_sliding_window(golden):
  recorded = golden.load("slide")
  m = golden.meta
  image = np.moveaxis(golden.inputs["slide_image"], 1, -1)[0]
  height, width = image.shape[:2]
  corners = layouts.window_corners(height, width, m["crop"], m["stride"])
  boxes = [(y, y + m["crop"], x, x + m["crop"]) for y, x in corners]
  want = recorded["windows"]
  ours = {tuple(b) for b in boxes}
  theirs = {(y1, y2, x1, x2) for y1, y2, x1, x2 in want.tolist()}
  assert ours == theirs and len(boxes) == len(want)

  def slider(penalized):
    return sliding.SlidingWindow(
      lambda windows: golden.forward(golden.prompts, windows, golden.text)[0],
      len(golden.text),
      crop=m["crop"],
      stride=m["stride"],
      window_batch=3,
      penalty=m["seen_penalty"],
      penalized=penalized,
    )

  slide = slider(golden.seen)
  scores = slide.scores(image)
  close(np.moveaxis(scores, -1, 0)[None], recorded, "preds")
  size = tuple(golden.inputs["slide_ori_shape"].tolist())
  close(np.moveaxis(clip.resize_grid(scores, *size), -1, 0)[None], recorded, "preds_rescaled")
  close(slide(image, size)[None], recorded, "argmax")
  close(slide(image)[None], recorded, "argmax_norescale")
  penalty = np.zeros(len(golden.text), np.float32)
  penalty[golden.seen] = m["seen_penalty"]
  for i, (y, _, x, _) in enumerate(want.tolist()):
    crop = image[y : y + m["crop"], x : x + m["crop"]]
    logits, _ = golden.forward(golden.prompts, crop[None], golden.text)
    out = jax.nn.sigmoid(clip.resize_grid(logits[0], m["crop"], m["crop"])) - penalty
    if f"window{i}.mean" in recorded:
      # A mean over many scores of both signs: its own size is no scale for its rounding.
      close(np.float32(out.mean()), recorded, f"window{i}.mean", absolute=1e-5)
    if f"window{i}.out" in recorded:
      close(np.moveaxis(out, -1, 0)[None], recorded, f"window{i}.out")


def test_position_resize(golden):
  recorded = golden.load("posembed")
  for name in sorted({k.removesuffix(".src") for k in recorded.arrays if k.endswith(".src")}):
    want = recorded[f"{name}.dst"]
    side = round((len(want) - 1) ** 0.5)
    close(clip.resize_positions(recorded[f"{name}.src"], side, side), recorded, f"{name}.dst")
  image = np.moveaxis(recorded["forward.image"], 1, -1)
  tower = VisionTransformer(golden.clip_config)
  embed, grid = jax.jit(functools.partial(tower.apply, class_embedding_copies=2, method="embed"))(
    {"params": golden.params["visual"]}, image
  )
  grid = tuple(map(int, grid))
  assert list(grid) == recorded["forward.grid"].tolist()
  close(np.moveaxis(embed, 1, 0), recorded, "forward.embed")
  positions = golden.params["visual"]["position_embedding"]
  close(clip.resize_positions(positions, *grid)[1:], recorded, "forward.pos")


def test_optimizer_and_schedule(golden):
  recorded = golden.load("optim")
  config = json.loads(str(recorded["config"]))
  names = recorded["names"].tolist()
  rates, decays = recorded["lr"], recorded["weight_decay"]
  settings = authors_settings(config, rates)
  state = TrainState(jnp.int32(0), golden.prompts, None)
  optimizer = optim.make_optimizer(settings, golden.prompts)
  state = state.replace(opt_state=optimizer.init(golden.prompts))
  step = jax.jit(
    functools.partial(
      train_step, model=golden.model, optimizer=optimizer, loss_fn=losses.sigmoid_loss
    )
  )
  batch = {"image": golden.image, "label": jnp.asarray(golden.position[golden.label], jnp.int32)}
  text = golden.text[golden.seen]
  groups = flax.traverse_util.flatten_dict(
    optim.assign_groups(golden.prompts, settings.groups), sep="/"
  )
  factors = {name: factor for name, _, factor in settings.groups}
  schedules = {factors[name]: s for name, s in optim.schedules(settings).items()}
  theirs = authors.to_authors_prompts(
    flax.traverse_util.unflatten_dict(
      {k: np.full(np.shape(v), factors[groups[k]]) for k, v in flat(golden.prompts).items()},
      sep="/",
    )
  )
  for t in range(len(rates)):
    before = state
    state, terms = step(state, golden.params, text, batch, jax.random.key(0))
    want = recorded["losses"][t]
    np.testing.assert_allclose([terms["loss_mask"], terms["loss_dice"]], want, rtol=1e-4)
    for name, rate in zip(names, rates[t]):
      if name in theirs:
        schedule = schedules[theirs[name].flat[0]]
        np.testing.assert_allclose(schedule(before.step), rate, rtol=1e-5)
  used = [name in theirs for name in names]
  np.testing.assert_allclose(decays[used], settings.weight_decay)
  initial = np.load(golden.directory / "params.npz")
  final = authors.to_authors_prompts(state.prompts)
  for key in [k for k in recorded.arrays if k.startswith("final.")]:
    name = key.removeprefix("final.")
    # Parameters nothing uses get no gradient and are left as they were; ours do not exist.
    close(final.get(name, initial[name]), recorded, key)


def flat(tree):
  return flax.traverse_util.flatten_dict(tree, sep="/")


def authors_settings(config, rates):
  """Our optimizer fields from the recorded JSON."""
  import ml_collections

  settings = ml_collections.ConfigDict()
  settings.base_lr = config["lr"]
  settings.min_lr = config["min_lr"]
  settings.power = config["power"]
  settings.warmup_steps = config["warmup_iters"]
  settings.warmup_ratio = config["warmup_ratio"]
  settings.steps = config["max_iters"]
  settings.weight_decay = config["weight_decay"]
  settings.clip_norm = 0.0
  settings.schedule, settings.no_decay = "poly", ""
  settings.groups = (("h", r"h", 1.0), ("rest", r"(?!h$).*", 10.0))
  return settings


def test_schedule_check_values():
  """The published check points of the schedule."""
  make = functools.partial(
    optim.make_schedule, steps=20000, power=0.9, minimum=1e-6, warmup_steps=1500, warmup_ratio=1e-6
  )
  expected = {
    2e-5: {0: 2.0e-11, 49: 6.519839e-7, 749: 9.666299e-6, 1499: 1.870094e-5, 1500: 1.871255e-5,
           10000: 1.118185e-5, 19999: 1.002558e-6},
    2e-4: {49: 6.519191e-6, 1500: 1.865157e-4, 10000: 1.076415e-4, 19999: 1.026787e-6},
  }  # fmt: skip
  for base, values in expected.items():
    for t, value in values.items():
      np.testing.assert_allclose(make(base)(t), value, rtol=1e-5)


def test_metrics(golden):
  recorded = golden.load("metrics")
  label = recorded["voc_ann"].astype(np.int64)
  # VOC's map: 0 (background) is ignored, k becomes k - 1.
  label = np.where((label == 0) | (label == 255), 255, label - 1)
  prediction = recorded["voc_pred"]
  classes = recorded["voc_IoU"].shape[0]
  matrices = [metrics.confusion_matrix(a, b, classes) for a, b in zip(label, prediction)]
  per_image = np.stack(matrices)
  correct = np.stack([np.diag(m) for m in matrices])
  close(correct.astype(np.float32), recorded, "voc_intersect")
  close(per_image.sum(1).astype(np.float32), recorded, "voc_pred_area")
  close(per_image.sum(2).astype(np.float32), recorded, "voc_label_area")
  union = per_image.sum(1) + per_image.sum(2) - correct
  close(union.astype(np.float32), recorded, "voc_union")
  total = per_image.sum(0)
  seen, unseen = range(classes - 5), range(classes - 5, classes)
  ours = metrics.scores(total, seen, unseen)
  close(np.float32(ours["pAcc"]), recorded, "voc_aAcc")
  iou = np.array([np.nan if v is None else v for v in ours["iou"]], np.float32)
  np.testing.assert_allclose(iou, recorded["voc_IoU"], rtol=1e-5)
  with np.errstate(invalid="ignore"):
    accuracy = np.diag(total) / total.sum(1)
  np.testing.assert_allclose(accuracy, recorded["voc_Acc"], rtol=1e-5)
  close(np.float32(ours["miou_seen"]), recorded, "voc_mIoU_seen_nanmean")
  close(np.float32(ours["miou_unseen"]), recorded, "voc_mIoU_unseen_nanmean")
  close(np.float32(ours["hiou"]), recorded, "voc_hIoU_nanmean")
  np.testing.assert_allclose(iou[list(unseen)].mean(), recorded["voc_mIoU_unseen_mean"], rtol=1e-5)
  text = str(recorded["voc_evaluate_json"])
  found = re.search(r'"mIoU": ([0-9.]+)', text)
  if found:
    np.testing.assert_allclose(ours["miou_union"], float(found[1]), atol=1e-4)
  coco = metrics.confusion_matrix(
    recorded["coco_label"], recorded["coco_pred"], recorded["coco_IoU"].shape[0]
  )
  ours = metrics.scores(coco)
  close(np.float32(ours["pAcc"]), recorded, "coco_aAcc")
  iou = np.array([np.nan if v is None else v for v in ours["iou"]], np.float32)
  np.testing.assert_allclose(iou, recorded["coco_IoU"], rtol=1e-5)
  with np.errstate(invalid="ignore"):
    accuracy = np.diag(coco) / coco.sum(1)
  np.testing.assert_allclose(accuracy, recorded["coco_Acc"], rtol=1e-5)


def test_clip(golden_dir):
  recorded = Recorded(golden_dir / "clip" / "clip.npz")
  settings = json.loads(str(recorded["config"]))
  heads = {
    "vision_heads": settings["vision_width"] // 64,  # OpenAI's rule
    "text_heads": settings["transformer_heads"],
  }
  config, params = clip_file.load(
    golden_dir / "clip" / "tiny_clip_state_dict.pt", {**heads, "activation": "quick_gelu"}
  )
  assert config.vision_layers == settings["vision_layers"]
  model = CLIP(config)
  image = np.moveaxis(recorded["image"], 1, -1)
  tokens, originals = recorded["tokens"], recorded["tokens_original"]
  vocabulary = recorded["vocab_ids"]
  np.testing.assert_array_equal(vocabulary[tokens], originals)
  texts = recorded["texts"].tolist()
  np.testing.assert_array_equal(tokenize(texts, settings["context_length"]), originals)

  @jax.jit
  def forward(image):
    apply = functools.partial(model.apply, {"params": params})
    visual = functools.partial(VisionTransformer(config).apply, {"params": params["visual"]})
    embed, _ = visual(image, class_embedding_copies=2, method="embed")
    encoded = apply(image, method="encode_image"), apply(tokens, method="encode_text")
    return *encoded, apply(image, tokens), embed

  image, text, logits, embed = forward(image)
  close(image, recorded, "encode_image")
  close(text, recorded, "encode_text")
  close(logits, recorded, "logits_per_image")
  close(np.asarray(logits).T, recorded, "logits_per_text")
  close(np.exp(params["logit_scale"]), recorded, "logit_scale_exp")
  for i, x in enumerate(encode_text(config, params["text"], tokens)[1]):
    close(x, recorded, f"rpn_text.layer{i}")
  close(np.moveaxis(embed, 1, 0), recorded, "rpn_embed")


def test_class_names_become_the_recorded_tokens(golden):
  inputs = golden.inputs
  sentences = [f"a photo of a {name}" for name in inputs["class_names"].tolist()]
  tokens = tokenize(sentences, golden.clip_config.context_length)
  close(tokens, inputs, "tokens_original")
  # The set's small text tower knows only the ids that occur.
  close(inputs["vocab_ids"][inputs["tokens"]], inputs, "tokens_original")


def test_every_array_is_accounted_for(golden_dir):
  """Runs last in this file: nothing in the set is passed over silently."""
  missed = []
  for path in [*golden_dir.glob("*.npz"), *(golden_dir / "clip").glob("*.npz")]:
    reasons = NOT_REPLAYED.get(path.name, [])
    for key in np.load(path).files:
      excused = any(re.fullmatch(pattern, key) for pattern, _ in reasons)
      if key not in USED.get(path.name, ()) and not excused:
        missed.append(f"{path.name}:{key}")
  assert not missed, f"{len(missed)} arrays neither compared nor excused: {missed[:20]}"
