"""Replays the arrays recorded from the official code of the training-free methods.

As in test_parity.py, every array of the set is compared, used as an input or listed with a reason;
names, sizes and settings come from the set (`--golden-training-free`). The tower runs once for each
image and rule of positions, and what reads it once for each variant.
"""

import functools
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rpn_jax.base import pixels
from rpn_jax.inference.decision import Decision
from rpn_jax.inference.refinement import Refinement
from rpn_jax.inference.sliding import SlidingWindow
from rpn_jax.models.pamr import pamr
from rpn_jax.models.resizing import aligned_matrix, resize_by_matrices, resize_grid
from rpn_jax.models.training_free import DenseCLIP, cosine_probabilities, res_clip
from rpn_jax.models.training_free.positions import POSITIONS
from rpn_jax.weights import arrays, clip_file
from tests.recorded import Recorded, check_all_used

# Largest deviations, of the recorded array's root mean square, as the set's README states.
TOLERANCE = 2e-5
REFINED = 1e-4
FIRST_PASS = 2e-4
SCORES = 3e-3  # recorded in float16

# (file, array name pattern, why it is not compared)
NOT_REPLAYED = [
  ("resclip.npz", r".*_half", "SFR's matrix in float16, for the speed of the official code's GPU"),
  ("segmentation.npz", r".*_itaclip", "closes the label ids as a picture; not a method here"),
  ("itaclip.npz", r".*", "needs texts of a language model; not a method here"),
  ("cliptrase.npz", r".*", "clusters patches with DBSCAN; not a method here"),
]
USED: dict[str, set[str]] = {}


def close(got, recorded, key, tolerance=TOLERANCE):
  """Asserts the README's rule, or equality of integers."""
  want, got = np.asarray(recorded[key]), np.asarray(got)
  where = f"{recorded.name} {key}"
  assert got.shape == want.shape, f"{where}: {got.shape}, recorded {want.shape}"
  if want.dtype.kind in "iub":
    assert (got == want).all(), f"{where}: {(got != want).sum()} of {want.size} integers differ"
    return
  error = np.abs(got - np.float64(want)).max() / np.sqrt(np.mean(np.float64(want) ** 2))
  assert error <= tolerance, f"{where}: {error:.2g} of the root mean square"


class Golden:
  """The CLIP of the set, its images, and what its towers make of them."""

  def __init__(self, directory: pathlib.Path):
    self.directory = directory
    self.inputs = self.load("inputs")
    weights = np.load(directory / "weights.npz")
    USED["weights.npz"] = set(weights.files)
    state = {name: weights[name] for name in weights.files}
    file = arrays.WeightsFile(directory / "weights.npz", arrays.SAFETENSORS, state)
    told = {
      "activation": "quick_gelu", "vision_heads": int(self.inputs["vision_heads"]), "text_heads": 1,
    }  # fmt: skip
    _, self.clip, params = clip_file.parse(file, told)
    assert self.clip.patch_size == self.inputs["patch_size"]
    self.variables = {"params": {"visual": params["visual"]}}
    self.text = self.inputs["text"]
    images = [key for key in self.inputs.arrays.files if key.startswith("image_")]
    self.images = [key.removeprefix("image_") for key in images]
    self.block_inputs = functools.cache(self._block_inputs)

  def load(self, name):
    return Recorded(self.directory / f"{name}.npz", USED)

  def image(self, name):
    return np.moveaxis(self.inputs[f"image_{name}"], 0, -1)[None]

  def names(self, recorded, pattern):
    """Images of which a file has an array, by its name with the image's as {}."""
    return [name for name in self.images if pattern.format(name) in recorded]

  def _block_inputs(self, network, name):
    return network.apply(self.variables, self.image(name), method="block_inputs")

  def run(self, method, name, **fields):
    """Scores (h, w, C) and what was recorded on the way."""
    network = DenseCLIP(self.clip, method, **fields)
    # Networks that see the tower alike share its program and its result.
    tower = DenseCLIP(
      self.clip, method if method in ("gem", "maskclip_released") else "sclip",
      positions=network.positions, odd_sides=network.odd_sides,
    )  # fmt: skip
    inputs = self.block_inputs(tower, name)
    apply = functools.partial(network.apply, mutable=["intermediates"], method="read")
    # Compiled as a whole only where one program is quicker than its operations one by one.
    apply = jax.jit(apply) if method.startswith(("na", "res", "sc_")) else apply
    scores, variables = apply(self.variables, self.image(name), inputs, self.text)
    found = variables["intermediates"]
    return scores[0], {key: value[0] for key, value in found.items() if key != "visual"}


@pytest.fixture(scope="module")
def golden(golden_training_free):
  return Golden(golden_training_free)


def replay(golden, file, suffix, method, **fields):
  """Compares the scores, and features if recorded, of every image that a file has."""
  recorded = golden.load(file)
  names = golden.names(recorded, "logits_{}" + suffix)
  assert names, f"{file}: no logits_*{suffix}"
  for name in names:
    scores, found = golden.run(method, name, **fields)
    close(scores, recorded, f"logits_{name}{suffix}")
    if f"features_{name}{suffix}" in recorded:
      close(found["features"][0], recorded, f"features_{name}{suffix}")
    yield name, recorded, scores, found


def test_images_are_normalized_alike(golden):
  for name in golden.images:
    normalized = pixels.normalize(
      golden.inputs[f"picture_{name}"], pixels.CLIP_MEAN, pixels.CLIP_STD
    )
    close(np.moveaxis(normalized, -1, 0), golden.inputs, f"image_{name}")


def test_positions_and_what_the_last_block_gets(golden):
  visual = golden.variables["params"]["visual"]
  for name in golden.names(golden.inputs, "positions_{}"):
    grid = (side // golden.clip.patch_size for side in golden.image(name).shape[1:3])
    close(
      POSITIONS["sclip"](visual["position_embedding"], *grid), golden.inputs, f"positions_{name}"
    )
    tower = DenseCLIP(golden.clip, "sclip")
    close(golden.block_inputs(tower, name)[-1][0], golden.inputs, f"penultimate_{name}")


SIMPLE = {
  "vanilla": [("vanilla", "", {}), ("vanilla", "_no_residual", {"residual": "dropped"})],
  "maskclip": [
    ("maskclip", "", {}),
    ("maskclip", "_no_residual", {"residual": "dropped"}),
    ("maskclip_released", "_released", {}),
    ("maskclip", "_quickgelu", {"positions": "maskclip", "odd_sides": "pad"}),
  ],
  "sclip": [("sclip", "", {}), ("sclip", "_no_residual", {"residual": "dropped"})],
  "clearclip": [("clearclip", "", {}), ("clearclip", "_residual", {"residual": "kept"})],
}
CASES = [(file, *case) for file, cases in SIMPLE.items() for case in cases]


@pytest.mark.parametrize("file, method, suffix, fields", CASES)
def test_last_block(golden, file, method, suffix, fields):
  for _ in replay(golden, file, suffix, method, **fields):
    pass


def test_maskclip_refinements(golden):
  recorded = golden.load("maskclip")
  for name in golden.names(recorded, "denoised_{}"):
    threshold = float(recorded[f"denoise_threshold_{name}"])
    run = functools.partial(golden.run, "maskclip_released", name)
    close(run(denoise=threshold)[0], recorded, f"denoised_{name}")
    # Recorded for every patch, also for those that are sure.
    everywhere = {"key_smoothing": True, "smoothed_below": 2.0}
    scores, found = run(**everywhere)
    close(scores, recorded, f"smoothed_{name}")
    close(found["keys"][0], recorded, f"keys_{name}")
    scores, _ = run(denoise=threshold, **everywhere)
    close(scores, recorded, f"denoised_smoothed_{name}")


def test_naclip(golden):
  std = float(golden.load("naclip")["gaussian_std"])
  for name, recorded, _, found in replay(golden, "naclip", "", "naclip", gaussian_std=std):
    close(found["omega"], recorded, f"omega_{name}")
  for suffix, method in (("_nonly", "naclip_nonly"), ("_kk", "naclip_kk")):
    for _ in replay(golden, "naclip", suffix, method, gaussian_std=std):
      pass
  scores, _ = golden.run("naclip", "odd", gaussian_std=std)
  upsampled = resize_grid(scores, *golden.image("odd").shape[1:3])
  close(np.moveaxis(upsampled, -1, 0), golden.load("naclip"), "upsampled_odd")


def resclip_settings(golden):
  recorded = golden.load("resclip")
  return {
    "gaussian_std": float(recorded["gaussian_std"]),
    "logit_scale": float(recorded["logit_scale"]),
    "res_clip_blocks": (6, 7, 8, 9),  # fixed in the official code
    "res_clip_threshold": float(recorded["temp_thd"]),
    "res_clip_rcs": tuple(map(float, recorded["tau_lambda_rcs"])),
    "res_clip_sfr": tuple(map(float, recorded["tau_lambda_sfr"])),
  }


RES_CLIP = {
  "": {},
  "_clearclip": {"res_clip_base": "clearclip"},
  "_sclip": {"res_clip_base": "sclip"},
  "_rcs_only": {"res_clip_sfr": (1.0, 0.0)},
  "_sfr_only": {"res_clip_rcs": (1.0, 0.0)},
  "_sfr_no_decay": {"res_clip_decay": False},
}


@pytest.mark.parametrize("suffix", RES_CLIP)
def test_resclip(golden, suffix):
  settings = {**resclip_settings(golden), **RES_CLIP[suffix]}
  for name, recorded, _, found in replay(golden, "resclip", suffix, "res_clip", **settings):
    if not suffix:
      close(found["patch_labels"][0], recorded, f"patch_labels_{name}")
      close(found["sfr"][0], recorded, f"sfr_{name}")


def test_resclip_first_pass(golden):
  """The maps of the middle blocks, and the first pass from its own cosines on."""
  recorded, settings = golden.load("resclip"), resclip_settings(golden)
  for name in golden.names(recorded, "rcs_{}"):
    inputs = golden.block_inputs(DenseCLIP(golden.clip, "sclip"), name)

    def cross(module, inputs):
      pairs = [module.visual.block[i - 1].project(inputs[i - 1])[:2] for i in range(6, 10)]
      tokens, heads = inputs[0].shape[1], module.clip.vision_heads
      one_hot = jnp.broadcast_to(jnp.eye(tokens)[:, None], (1, tokens, heads, tokens))
      return res_clip.cross_attention(module.kernels.attend, pairs, one_hot)

    apply = functools.partial(DenseCLIP(golden.clip).apply, method=cross)
    maps = jax.jit(apply)(golden.variables, inputs)[0]
    close(np.moveaxis(maps, 1, 0), recorded, f"rcs_{name}")
  for name in golden.names(recorded, "first_pass_probabilities_{}"):
    cosine = recorded[f"logits_{name}_rcs_only"]
    first = jax.jit(functools.partial(res_clip.first_probabilities, scale=settings["logit_scale"]))
    probability = np.moveaxis(first(golden.image(name)[0], cosine), -1, 0)
    close(probability, recorded, f"first_pass_probabilities_{name}", FIRST_PASS)


def test_scclip(golden):
  recorded = golden.load("scclip")
  number = lambda key: int(recorded[key])
  first, end = map(int, recorded["multi_layers"])  # counted from 0, the second excluded
  settings = {
    "sc_clip_blocks": (number("pre_layer") + 1, number("post_layer") + 1, first + 1, end),
    "sc_clip_neighbors": number("neighbours"),
    "sc_clip_contamination": float(recorded["contamination"]),
    "sc_clip_beta": float(recorded["beta"]),
    "sc_clip_class_weight": float(recorded["class_weight"]),
  }
  for name, _, _, found in replay(golden, "scclip", "", "sc_clip", **settings):
    close(found["lof"][0], recorded, f"lof_{name}")
    close(np.flatnonzero(found["outliers"][0]), recorded, f"outliers_{name}")
    for which in ("before", "after"):
      close(found[which][0], recorded, f"{which}_{name}")


def test_gem(golden):
  recorded = golden.load("gem")
  suffixes = {re.sub(r"logits_[^_]+", "", key) for key in recorded.arrays.files if "logits" in key}
  assert {"", "_no_residual"} < suffixes
  for suffix in suffixes:
    told = re.fullmatch(r"_depth(\d+)_iter(\d+)", suffix)
    depth, iterations = map(int, told.groups()) if told else (7, 1)
    fields = {"gem_depth": depth, "gem_iterations": iterations}
    # ClearCLIP's repository has GEM without the residual connections.
    fields |= {"residual": "dropped"} if suffix == "_no_residual" else {}
    for name, _, scores, _ in replay(golden, "gem", suffix, "gem", **fields):
      if not suffix:
        maps = np.moveaxis(resize_grid(scores, *golden.image(name).shape[1:3]), -1, 0)
        maps = maps[: len(recorded[f"maps_{name}"])]
        low, high = maps.min((1, 2), keepdims=True), maps.max((1, 2), keepdims=True)
        close((maps - low) / (high - low), recorded, f"maps_{name}")


def test_pamr(golden):
  recorded = golden.load("pamr")
  image = np.moveaxis(recorded["image"], 0, -1)
  variants = [key.removeprefix("out_") for key in recorded.arrays.files if key.startswith("out_")]
  assert len(variants) > 1
  for variant in variants:
    mask = np.moveaxis(recorded["mask_coarse" if variant == "coarse" else "mask"], 0, -1)
    # The official code resizes what is coarser, with aligned corners.
    mask = resize_by_matrices(mask, *map(aligned_matrix, mask.shape, image.shape[:2]))
    dilations = tuple(map(int, recorded[f"dilations_{variant}"]))
    refine = functools.partial(pamr, steps=int(recorded[f"steps_{variant}"]), dilations=dilations)
    out = jax.jit(refine)(image, mask, image.shape[:2])
    close(np.moveaxis(out, -1, 0), recorded, f"out_{variant}", REFINED)


def test_sliding_windows(golden):
  """Cosines averaged over windows, resized to another size, and refined there."""
  recorded = golden.load("segmentation")
  network = DenseCLIP(golden.clip, "sclip")
  logits = jax.jit(lambda windows: network.apply(golden.variables, windows, golden.text))
  window = functools.partial(
    SlidingWindow, logits, len(golden.text), crop=int(recorded["crop"]),
    stride=int(recorded["stride"]), activation=network.scores,
  )  # fmt: skip
  image, size = golden.image("slide")[0], recorded["resized"].shape[1:]
  channels_first = lambda scores: np.moveaxis(scores, -1, 0)
  close(channels_first(window().scores(image)), recorded, "merged")
  close(channels_first(window().scores(image, size)), recorded, "resized")
  refined = window(refinement=Refinement("pamr", 10, (8, 16))).scores(image, size)
  close(channels_first(refined), recorded, "refined", REFINED)


class Whole:
  """Scores of an image that are there already."""

  def __init__(self, scores):
    self.scores = scores

  def merge(self, output, size, bias_C=0.0, more=()):
    return jax.tree.map(np.asarray, output(self.scores + bias_C, *more))


def test_thresholds(golden):
  recorded = golden.load("segmentation")
  scores = jnp.moveaxis(jnp.asarray(recorded["postprocess_input"]), 0, -1)
  class_of_row, size = golden.inputs["query_idx"], scores.shape[:2]
  names = [key.removeprefix("labels_") for key in recorded.arrays.files if key.startswith("labels")]
  assert {"plain", "prob", "area", "naclip"} <= set(names)
  for name in set(names) - {"itaclip"}:
    # It is -1 where it is off, and not there where the code has none.
    off = f"area_thd_{name}" not in recorded
    area = 0.0 if off else max(0.0, float(recorded[f"area_thd_{name}"]))
    decision = Decision(float(recorded[f"prob_thd_{name}"]), area)
    probabilities = cosine_probabilities(float(recorded[f"logit_scale_{name}"]))
    labels = decision(Whole(scores), size, probabilities, class_of_row)
    close(labels, recorded, f"labels_{name}")
    # What the labels are decided by: the best name of each class.
    p = np.asarray(probabilities(scores))
    p = np.stack([p[..., class_of_row == i].max(-1) for i in range(class_of_row.max() + 1)])
    if name == "naclip":
      p /= p.sum(0)
    want = np.float32(recorded[f"scores_{name}"])
    kept = want.any((1, 2))  # the others are below the threshold of the area
    assert kept.all() or area > 0
    close_scores = np.abs(p[kept] - want[kept]).max() / np.sqrt(np.mean(want**2))
    assert close_scores <= SCORES, f"scores_{name}: {close_scores:.2g} of the root mean square"


def test_every_array_is_accounted_for(golden):
  check_all_used(golden.directory, USED, NOT_REPLAYED)
