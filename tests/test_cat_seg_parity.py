"""Replays the tensors recorded from the official CAT-Seg code, array by array.

As in test_parity.py, every array of the set is compared, used as an input or listed with a reason,
and names and sizes come from the set (`--golden-catseg`).
"""

import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from rpn_jax import config
from rpn_jax.base.words import SEPARATOR
from rpn_jax.inference import layouts
from rpn_jax.inference.sliding import SlidingWindow
from rpn_jax.models.cat_seg import CATSeg, resize_bicubic, squash
from rpn_jax.models.trained import join, split
from rpn_jax.text.tokenizer import tokenize
from rpn_jax.training import losses, optim
from rpn_jax.training.step import TrainState, gradients, update
from rpn_jax.weights import cat_seg
from rpn_jax.weights.arrays import read_arrays
from tests.recorded import Recorded, check_all_used

TOLERANCE = 1e-4  # of the recorded array's root mean square, as the set's README states
LARGEST = 2e-3  # of one element, likewise
GRADIENT = 1e-3
# Their gradient is zero but for rounding: softmax does not see what all keys have in common.
NO_GRADIENT = re.compile(r".*swin_block\.block_\d\.attn\.k\.bias")

# (file, array name pattern, why it is not compared)
NOT_REPLAYED = [
  ("preprocess.npz", r".*", "replayed in data_pipelines/test_transforms.py"),
  ("metrics.npz", r".*", "replayed in inference/test_metrics.py"),
  ("text.npz", r".*init_text_features_single", "of a routine whose result nothing reads"),
]
USED: dict[str, set[str]] = {}


def close(got, recorded, key, tolerance=TOLERANCE):
  """Asserts the README's rule: the RMS of the difference, and the largest one."""
  want = np.asarray(recorded[key], np.float64)
  got = np.asarray(got, np.float64)
  assert got.shape == want.shape, f"{recorded.name} {key}: {got.shape}, recorded {want.shape}"
  rms = np.sqrt(np.mean(want**2))
  error = np.abs(got - want)
  where = f"{recorded.name} {key}"
  assert np.sqrt(np.mean(error**2)) <= tolerance * rms, f"{where}: {error.max() / rms:.2g} of RMS"
  assert error.max() <= LARGEST / TOLERANCE * tolerance * rms, f"{where}: {error.max() / rms:.2g}"


def channels_first(x):
  return np.moveaxis(np.asarray(x), -1, 1)


class Golden:
  """The network of the set."""

  def __init__(self, directory):
    self.directory = directory
    self.meta = m = json.loads((directory / "meta.json").read_text())
    self.geometry = g = m["geometry"]
    state = self.load("state_dict")
    self.state = {name: state[name] for name in state.arrays.files}
    heads = {"vision_heads": g["vis_heads"], "text_heads": g["text_heads"]}
    self.official = o = cat_seg.from_official(self.state, "the set", heads)
    self.fields = {
      **o.fields,
      "resolution": m["clip_resolution"],
      "window": g["window"],
      "heads": g["nheads"],
      "pad_len": g["pad_len"],
      "class_pooling_train": tuple(g["pool_train"]),
      "guidance_layers": tuple(g["hooks"]),
    }
    self.model = self.with_fields()
    trained, self.frozen = split(o.params, self.model.trained)
    self.trained = {**o.prompts, **trained}
    self.variables = {"params": o.params, "prompts": o.prompts}

  def load(self, name):
    return Recorded(self.directory / f"{name}.npz", USED)

  def with_fields(self, **changes):
    return CATSeg(self.official.clip, config.CATSegConfig(**{**self.fields, **changes}))

  def normalize(self, image):
    mean, std = (np.array(self.meta[f"clip_pixel_{name}"]) for name in ("mean", "std"))
    return np.asarray((image - mean) / std, np.float32)

  def tokens(self, which):
    return self.load("text")[f"{which}_token_ids_compact"][:, None]

  def theirs(self, tree):
    """A trained tree by the official names and layouts."""
    rules = [
      *cat_seg.tower_rules(self.official.clip),
      *cat_seg.prompt_rules(self.fields["layers"], bool(self.fields["pad_len"])),
    ]
    flat = traverse_util.flatten_dict(tree, sep="/")
    renamed = cat_seg.to_theirs([rule for rule in rules if rule.ours in flat], flat, "")
    return {
      name: value.reshape(1, 1, -1) if ".padding_" in name else value
      for name, value in renamed.items()
    }


@pytest.fixture(scope="module")
def golden(golden_catseg):
  return Golden(golden_catseg)


@pytest.fixture(scope="module")
def evaluated(golden):
  """Logits of the recorded evaluation image, padded and squashed, and what leads to them."""
  image = golden.normalize(golden.load("eval")["image_uint8"])
  unit = golden.meta["size_divisibility"]
  padded = np.pad(image, (*((0, -side % unit) for side in image.shape[:2]), (0, 0)))[None]

  @jax.jit
  def forward(variables, image, tokens):
    return golden.model.apply(variables, image, tokens, mutable=["intermediates"])

  logits, variables = forward(golden.variables, padded, golden.tokens("test"))
  return padded, logits, variables["intermediates"]


@pytest.fixture(scope="module")
def inputs(golden, evaluated):
  """What the aggregation gets of the recorded evaluation image: features, guidance, text."""
  dense = functools.partial(golden.model.apply, method="dense_features")
  features, guidance = jax.jit(dense)(golden.variables, evaluated[0])
  return features, guidance, golden.load("text")["test_text_features"][:, None]


def segment(model, golden, *inputs, **options):
  """Logits (B, C, 4 h, 4 w), every third row and column."""
  apply = jax.jit(functools.partial(model.apply, method="segment", **options))
  return channels_first(apply(golden.variables, *inputs))[..., ::3, ::3]


def test_tokens(golden):
  text, meta = golden.load("text"), golden.meta
  original = text["vocab_original_ids"]
  for which in ("train", "test"):
    names = meta["geometry"][f"{which}_classes"]
    sentences = [meta["prompt_template"].replace("{}", name.split(SEPARATOR)[0]) for name in names]
    ids = text[f"{which}_token_ids"]
    np.testing.assert_array_equal(tokenize(sentences, ids.shape[1]), ids)
    compact = text[f"{which}_token_ids_compact"]
    np.testing.assert_array_equal(original[compact], ids)


@functools.partial(jax.jit, static_argnums=0, static_argnames="method")
def encode(model, variables, tokens, method="encode_text"):
  return model.apply(variables, tokens, method=method)


def raw_text(model, tokens):
  return model.text(tokens)


@pytest.mark.parametrize("which", ["train", "test"])
def test_text(golden, which):
  text, tokens = golden.load("text"), golden.tokens(which)
  raw = encode(golden.model, golden.variables, tokens[:, 0], method=raw_text)
  close(raw, text, f"{which}_text_raw")
  features = encode(golden.model, golden.variables, tokens)
  close(features[:, 0], text, f"{which}_text_features")


@pytest.mark.parametrize("which", ["train", "test"])
def test_text_of_several_prompts_and_synonyms(golden, which):
  """Every prompt is averaged over the synonyms; class names in the set have several."""
  text, meta = golden.load("text"), golden.meta
  original = text["vocab_original_ids"]
  templates = meta["templates_select8"]
  names = [name.split(SEPARATOR) for name in meta["geometry"][f"{which}_classes"]]
  most = max(map(len, names))
  tokens = np.zeros((len(names), most * len(templates), meta["context_length"]), np.int32)
  for row, synonyms in enumerate(names):
    sentences = [t.replace("{}", synonym) for synonym in synonyms for t in templates]
    ids = tokenize(sentences, meta["context_length"])
    assert np.isin(ids, original).all()
    tokens[row, : len(ids)] = np.searchsorted(original, ids)
  model = golden.with_fields(prompts=len(templates))
  features = encode(model, golden.variables, tokens)
  close(features, text, f"{which}_init_text_features_select8")
  mean = features.mean(1)
  mean /= jnp.linalg.norm(mean, axis=-1, keepdims=True)
  close(mean, text, f"{which}_select8_mean_text_features")


def test_clip(golden, evaluated, inputs):
  recorded, (padded, _, stages) = golden.load("clip"), evaluated
  visual = {"params": golden.official.params["visual"]}
  square = squash(padded, golden.fields["resolution"])
  patches = golden.model.apply(
    golden.variables, square, method=lambda m, image: m.visual.patch_embed(image)
  )
  close(patches[:, ::3, ::3], recorded, "patch_embed")
  grid = golden.fields["resolution"] // golden.official.clip.patch_size
  positions = resize_bicubic(jnp.asarray(visual["params"]["position_embedding"]), grid, grid)
  close(positions, recorded, "resized_positional_embedding")
  close(stages["embed"][0], recorded, "after_ln_pre")
  for i, hidden in enumerate(stages["hidden"]):
    if f"block{i}_out" in recorded.arrays.files:
      close(hidden, recorded, f"block{i}_out")
  close(stages["dense"][0], recorded, "dense_features")
  features, guidance, _ = inputs
  close(channels_first(features), recorded, "guidance_res3")
  for name, step, g in zip(("guidance_res4_s3", "guidance_res5_s5"), (3, 5), guidance):
    close(channels_first(g[:, ::step, ::step]), recorded, name)


def test_stages(golden, evaluated):
  recorded, (padded, logits, stages) = golden.load("eval"), evaluated
  close(channels_first(padded)[..., ::5, ::5], recorded, "padded_normalised")
  square = squash(padded, golden.fields["resolution"])
  close(channels_first(square)[..., ::3, ::3], recorded, "clip_input")
  close(np.moveaxis(stages["cost"][0], -1, 1), recorded, "cost_volume")
  close(channels_first(stages["appearance_guidance"][0]), recorded, "appearance_guidance_proj")
  close(stages["text_guidance"][0], recorded, "text_guidance_proj")
  for i, step in enumerate((3, 5)):
    guidance = stages["decoder_guidance"][0][i][:, ::step, ::step]
    close(channels_first(guidance), recorded, f"decoder_guidance_proj{i}")
    key = f"decoder{i + 1}_s{step}"
    close(stages["decoder"]["step"][i][:, :, ::step, ::step], recorded, key)
  close(stages["cost_embedding"][0], recorded, "cost_embedding")
  for key in [key for key in recorded.arrays.files if re.fullmatch(r"layer\d+_swin_block\d", key)]:
    layer, block = map(int, re.findall(r"\d+", key))
    close(stages[f"spatial_{layer}"]["block"][block - 1], recorded, key)
  for i, layer in enumerate(stages["layer"]):
    close(layer, recorded, f"layer{i}_class")
  close(channels_first(logits), recorded, "logits")


def test_appearance_guidance_is_normalized(golden, evaluated):
  recorded, (_, _, stages) = golden.load("eval"), evaluated
  norm = golden.official.prompts["spatial_0"]["guidance_norm"]
  x = np.asarray(stages["appearance_guidance"][0])
  x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + golden.meta["ln_eps"])
  close(x * norm["scale"] + norm["bias"], recorded, "layer0_guidance_norm")


def test_training_pooling(golden, inputs):
  logits = segment(golden.model, golden, *inputs, train=True)
  close(logits, golden.load("eval"), "logits_train_pooling")


def sliding_window(golden, layout, **settings):
  tokens = golden.tokens("test")
  text = encode(golden.model, golden.variables, tokens)
  apply = jax.jit(golden.model.apply)
  calls = []

  def logits(windows):
    out = apply(golden.variables, windows, text)
    calls.append((windows, out))
    return out

  window = SlidingWindow(
    logits, len(text), layout=layout, activation=golden.model.scores, **settings
  )
  return window, calls


def test_whole_image(golden):
  """Scores of the padded image, stretched over the image, as the official code has them."""
  recorded, side = golden.load("eval"), golden.fields["resolution"]
  image = golden.normalize(recorded["image_uint8"])
  window, _ = sliding_window(golden, "whole", crop=side, stride=side, window_batch=1)
  scores = window.scores(image, tuple(map(int, recorded["output_size"])))
  close(np.moveaxis(scores, -1, 0), recorded, "sem_seg")


def test_tiles_and_a_global_view(golden):
  recorded, meta = golden.load("sliding"), golden.meta
  crop, stride, square, _, height, width = map(int, recorded["geometry"])
  raw = np.float32(recorded["image_uint8"])
  corners = layouts.window_corners(square, square, crop, stride)
  window, calls = sliding_window(
    golden, "square", crop=crop, stride=stride, square=square, window_batch=len(corners) + 1
  )
  for key, side in (("image_resized_s5", square), ("image_global_s5", crop)):
    close(
      np.moveaxis(layouts.resize_image(raw, side, side), -1, 0)[None, :, ::5, ::5], recorded, key
    )
  scores = window.scores(golden.normalize(recorded["image_uint8"]), (height, width))
  ((tiles, logits),) = calls
  close(channels_first(tiles)[..., ::7, ::7], recorded, "tiles_normalised_s7")
  seen = squash(tiles, meta["clip_resolution"])
  close(channels_first(seen)[..., ::7, ::7], recorded, "clip_input_s7")
  close(channels_first(logits)[..., ::3, ::3], recorded, "tile_logits_s3")
  count = np.zeros((square, square), int)
  for y, x in corners:
    count[y : y + crop, x : x + crop] += 1
  np.testing.assert_array_equal(count[::5, ::5], recorded["overlap_count_s5"])
  close(np.moveaxis(scores, -1, 0), recorded, "sem_seg")


VARIANTS = {
  "full_attention": lambda g: {"class_attention": "full"},
  "window_ge_grid": lambda g: {"window": g["grid"]},
  "pad0": lambda g: {"pad_len": 0},
  "pad256": lambda g: {"pad_len": 256},
  "pad_exact": lambda g: {"pad_len": len(g["test_classes"])},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variant(golden, inputs, name):
  model = golden.with_fields(**VARIANTS[name](golden.geometry))
  close(segment(model, golden, *inputs), golden.load("variants"), f"{name}_logits_s3")


def test_truncation(golden, inputs):
  recorded = golden.load("variants")
  model = golden.with_fields(pad_len=int(recorded["trunc_pad_len"]))
  features, (_, guidance, text) = np.moveaxis(recorded["trunc_img_feats"], 1, -1), inputs
  mirrored = [jnp.concatenate([g, g[:, :, ::-1]]) for g in guidance]
  logits = segment(model, golden, features, mirrored, text)
  unit = features / np.linalg.norm(features, axis=-1, keepdims=True)
  score = np.einsum("bhwe,ce->bhwc", unit, text[:, 0]).max((1, 2))
  close(score, recorded, "trunc_score")
  for got, want, kept in zip(logits, recorded["trunc_logits_s3"], recorded["trunc_kept"]):
    dropped = np.setdiff1d(np.arange(len(got)), kept)
    assert (got[dropped] == model.config.truncated_logit).all()
    assert (want[dropped] == model.config.truncated_logit).all()
    error = np.sqrt(np.mean((got[kept] - want[kept]) ** 2))
    assert error <= TOLERANCE * np.sqrt(np.mean(want[kept] ** 2))


def test_several_prompts_are_channels(golden, inputs):
  recorded = golden.load("variants")
  text = recorded["prompt3_text_features"][0]
  embed = {
    "kernel": recorded["prompt3_conv1_weight"].transpose(2, 3, 1, 0),
    "bias": recorded["prompt3_conv1_bias"],
  }
  model = golden.with_fields(prompts=text.shape[1]).bind(
    {**golden.variables, "prompts": {**golden.official.prompts, "cost_embed": embed}}
  )
  logits = jax.jit(model.segment)(*inputs[:2], text)
  close(channels_first(logits)[..., ::3, ::3], recorded, "prompt3_logits_s3")


@pytest.fixture(scope="module")
def batch(golden):
  recorded = golden.load("train")
  image = golden.normalize(recorded["images_uint8"])
  return {"image": image, "label": recorded["labels"].astype(np.int32)}


def test_training_forward(golden, batch):
  recorded = golden.load("train")
  apply = functools.partial(golden.model.apply, train=True, mutable=["intermediates"])
  tokens = golden.tokens("train")
  logits, variables = jax.jit(apply)(golden.variables, batch["image"], tokens)
  stages = variables["intermediates"]
  close(np.moveaxis(stages["cost"][0][:1], -1, 1), recorded, "cost_volume")
  for i, layer in enumerate(stages["layer"]):
    if f"layer{i}_class" in recorded:  # the first two
      close(layer[:1], recorded, f"layer{i}_class")
  if "logits_image1_layer0_class" in recorded:
    close(stages["layer"][0][1:2], recorded, "logits_image1_layer0_class")
  for i, step in enumerate((3, 5)):
    stage = stages["decoder"]["step"][i][:1, :, ::step, ::step]
    close(stage, recorded, f"decoder{i + 1}_s{step}")
  close(channels_first(logits)[..., ::3, ::3], recorded, "logits")
  text = encode(golden.model, golden.variables, tokens)
  close(text[:, 0], recorded, "text_features")
  side = batch["label"].shape[1]
  wide = jax.image.resize(
    logits, (len(logits), side, side, logits.shape[-1]), "bilinear", antialias=False
  )
  close(channels_first(wide)[..., ::7, ::7], recorded, "logits_upsampled_s7")
  for key, masked in (("loss", False), ("loss_if_ignored_masked_out", True)):
    (term,) = losses.bce_loss(logits, batch["label"], mask_ignored=masked).values()
    np.testing.assert_allclose(term.value, recorded[key], rtol=TOLERANCE)


@pytest.fixture(scope="module")
def steps(golden, batch):
  """Gradients of the first step, and (trained tree, loss, gradient norm) of three steps."""
  m = golden.meta
  settings = config.Optimizer(
    steps=m["max_iter"], base_lr=m["base_lr"], min_lr=0.0, warmup_steps=0, schedule="cosine",
    weight_decay=m["weight_decay"], clip_norm=m["grad_clip_norm"], no_decay=NORMS,
    groups=GROUPS,
  )  # fmt: skip
  optimizer = optim.make_optimizer(settings, golden.trained)
  state = TrainState(jnp.int32(0), golden.trained, optimizer.init(golden.trained))
  tokens = golden.tokens("train")

  @jax.jit
  def step(state):
    grads, terms = gradients(
      state, golden.frozen, tokens, batch, jax.random.key(0), model=golden.model,
      loss_fn=losses.bce_loss,
    )  # fmt: skip
    return grads, *update(state, grads, terms, optimizer)

  first, taken = None, []
  for _ in range(3):
    grads, state, metrics = step(state)
    first = first or grads
    taken.append((state.prompts, float(metrics["loss"]), float(metrics["grad_norm"])))
  return first, taken, settings


NORMS = r".*norm(_\d)?/(scale|bias)"
GROUPS = (("clip", r"(visual|text)/.*", 0.01), ("rest", r"(?!(visual|text)/).*", 1.0))


def test_gradients(golden, steps):
  recorded, got = golden.load("grads"), golden.theirs(steps[0])
  assert set(got) == set(recorded.arrays.files) == set(golden.meta["trainable_attention"])
  for name, value in got.items():
    if name in golden.meta["zero_gradients"]:
      assert not np.any(value) and not np.any(recorded[name])
    elif NO_GRADIENT.fullmatch(name):
      np.testing.assert_allclose(value, recorded[name], atol=1e-8)
    else:
      close(value, recorded, name, GRADIENT)


def test_three_steps(golden, steps):
  recorded, (_, taken, settings) = golden.load("optim"), steps
  np.testing.assert_allclose([loss for _, loss, _ in taken], recorded["losses"], rtol=1e-4)
  np.testing.assert_allclose([norm for *_, norm in taken], recorded["grad_norms"], rtol=1e-3)
  rates = optim.schedules(settings)
  per_step = [[float(rates[name](t)) for name in ("clip", "rest")] for t in range(3)]
  np.testing.assert_allclose(per_step, recorded["lr_per_step"], rtol=1e-6)
  start = golden.theirs(golden.trained)
  for number in (1, 3):
    after = golden.theirs(taken[number - 1][0])
    for name, value in after.items():
      if NO_GRADIENT.fullmatch(name) or name in golden.meta["zero_gradients"]:
        recorded[f"step{number}/{name}"]
        continue
      close(np.float64(value) - start[name], recorded, f"step{number}/{name}", 2e-2)


@pytest.mark.parametrize("name, steps", [("schedule", None), ("schedule80k", 80_000)])
def test_schedule(golden, name, steps):
  recorded = golden.load("optim")
  rate = optim.make_schedule(1.0, steps or golden.meta["max_iter"], decay="cosine")
  got = [float(rate(t)) for t in recorded[f"{name}_iters"]]
  np.testing.assert_allclose(got, recorded[f"{name}_multiplier"], rtol=1e-5, atol=1e-6)


def test_groups_are_those_of_the_official_code(golden):
  """Learning rate and weight decay of every parameter."""
  rules = {rule.ours: rule.theirs for rule in cat_seg.tower_rules(golden.official.clip)}
  rules |= {rule.ours: rule.theirs for rule in cat_seg.prompt_rules(golden.fields["layers"], True)}
  factor = {name: value for name, _, value in GROUPS}
  groups = traverse_util.flatten_dict(optim.assign_groups(golden.trained, GROUPS), sep="/")
  ours = {
    rules[path]: (
      factor[group] * golden.meta["base_lr"],
      golden.meta["weight_decay_norm" if re.fullmatch(NORMS, path) else "weight_decay"],
    )
    for path, group in groups.items()
  }
  theirs = {g["name"]: (g["lr"], g["weight_decay"]) for g in golden.meta["param_groups"]}
  assert ours.keys() == theirs.keys()
  for name, want in theirs.items():
    assert ours[name] == pytest.approx(want), name


def test_the_rest_of_the_projection_is_untouched(golden, steps):
  """Keys, biases and everything frozen are the same bits after three steps."""
  before, after = join(golden.frozen, golden.trained), join(golden.frozen, steps[1][-1][0])
  flat = functools.partial(traverse_util.flatten_dict, sep="/")
  for path, want in flat(before["params"]).items():
    got, want = np.asarray(flat(after["params"])[path]), np.asarray(want)
    if path.endswith("attn/in_proj/kernel"):
      width = want.shape[0]
      keys = slice(width, 2 * width)
      np.testing.assert_array_equal(got[:, keys], want[:, keys])
      assert (got[:, 2 * width :] != want[:, 2 * width :]).any()
    else:
      np.testing.assert_array_equal(got, want)


def test_checkpoint_there_and_back(golden, tmp_path):
  file = read_arrays(golden.directory / "model_tiny.pth")
  assert file.arrays.keys() == golden.state.keys()
  o = golden.official
  grid = golden.fields["resolution"] // o.clip.patch_size
  state = cat_seg.to_official(
    o.clip, o.params, o.prompts, grid=grid, window=golden.fields["window"]
  )
  assert state.keys() == file.arrays.keys()
  for name, want in file.arrays.items():
    np.testing.assert_array_equal(state[name], want, err_msg=name)


def test_every_array_is_accounted_for(golden):
  check_all_used(golden.directory, USED, NOT_REPLAYED)
