"""Every kind of CLIP file to equal parameters and to the recorded embeddings; own files."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from rpn_jax.models.clip import CLIP, CLIPConfig
from rpn_jax.weights import arrays, clip_file
from tests.weights.checks import flatten, one_line, same
from tests.weights.files import (
  HEADS,
  HF,
  OPENCLIP,
  OPENCLIP_CONFIG,
  QUICK,
  STATE_DICT,
  TINY,
  TORCHSCRIPT,
  dictionary,
  hf_config,
  hf_names,
  write_state,
)  # fmt: skip


@pytest.mark.parametrize(
  "path", [STATE_DICT, OPENCLIP, HF, TORCHSCRIPT], ids=lambda path: path.name
)
def test_embeddings_of_the_original(path, tmp_path):
  recording = TORCHSCRIPT.with_suffix(".npz") if path == TORCHSCRIPT else path.parent / "clip.npz"
  recorded = np.load(recording)
  # The archive's code tells by itself.
  config, params = clip_file.load(path, None if path == TORCHSCRIPT else QUICK)
  clip_file.save(tmp_path / "ours.safetensors", config, params)
  again, params = clip_file.load(tmp_path / "ours.safetensors")
  assert again == config
  image = np.moveaxis(recorded["image"], 1, -1)
  tokens = recorded["tokens"].astype(np.int32)
  apply = jax.jit(
    lambda params: {
      "encode_image": CLIP(config).apply({"params": params}, image, method="encode_image"),
      "encode_text": CLIP(config).apply({"params": params}, tokens, method="encode_text"),
      "logits_per_image": CLIP(config).apply({"params": params}, image, tokens),
    }
  )
  for name, got in apply(params).items():
    want = recorded[name]
    error, rms = np.abs(got - want).max(), np.sqrt(np.mean(want**2))
    assert error <= 1e-4 * rms, f"{name}: max|difference| {error:.3g}, rms {rms:.3g}"


def test_a_repository_of_the_hub_without_hf(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  one_line("does not exist: check the path, or .* 'hf://a/b-c'", clip_file.load_clip, "a/b-c")
  for path in ("a/b.safetensors", "a/b/c", "none"):
    one_line("does not exist: check the path$", clip_file.load_clip, path)


def test_weights_by_name_and_in_the_home_folder(tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path))
  monkeypatch.chdir(tmp_path)
  shipped = clip_file.find_weights("shapes_clip.safetensors")
  assert shipped.parent == clip_file.ASSETS
  config, params = clip_file.load_clip("shapes_clip.safetensors")
  clip_file.save(tmp_path / "mine.safetensors", config, params)
  assert clip_file.load_clip("~/mine.safetensors")[0] == config
  # A file of that name comes first.
  (tmp_path / "mine.safetensors").rename("shapes_clip.safetensors")
  assert clip_file.find_weights("shapes_clip.safetensors") != shipped
  one_line("does not exist", clip_file.load_clip, "other.safetensors")


def test_architecture_of_the_golden_model():
  config, params = clip_file.load(STATE_DICT, QUICK)
  told = json.loads(str(np.load(STATE_DICT.parent / "clip.npz")["config"]))
  assert config == CLIPConfig(
    embed_dim=told["embed_dim"],
    image_size=told["image_resolution"],
    patch_size=told["vision_patch_size"],
    vision_width=told["vision_width"],
    vision_layers=told["vision_layers"],
    vision_heads=told["vision_width"] // 64,
    text_width=told["transformer_width"],
    text_layers=told["transformer_layers"],
    text_heads=told["transformer_heads"],
    context_length=told["context_length"],
    vocab_size=told["vocab_size"],
  )
  # One model in two formats.
  same(params, clip_file.load(OPENCLIP, QUICK)[1])
  same(params, clip_file.load(HF, QUICK)[1])
  assert arrays.fingerprint(params) == arrays.fingerprint(clip_file.load(OPENCLIP, QUICK)[1])


def test_every_format_gives_the_same(tmp_path, tiny, state):
  def cast(dtype):
    return {name: value.astype(dtype) for name, value in state.items()}

  numbers = {"input_resolution": 4, "context_length": 5, "vocab_size": 7}
  mask = np.triu(np.full((5, 5), -np.inf, np.float32), 1)
  extras = {name: np.array(value) for name, value in numbers.items()}
  extras["transformer.resblocks.0.attn_mask"] = mask
  paths = [tmp_path / name for name in ("bare.pt", "nested.pth", "half.pt", "x.safetensors")]
  write_state(paths[0], {**state, **extras})
  write_state(paths[1], state, lambda root: dictionary({"state_dict": root}))
  write_state(paths[2], cast(np.float16))
  paths[3].write_bytes(safetensors.numpy.save(cast(np.float16)))
  for path in paths:
    config, params = clip_file.load(path, HEADS)
    assert config == TINY
    assert all(value.dtype == np.float32 for value in jax.tree.leaves(params))
    same(params, tiny)
  path = tmp_path / "bfloat16.safetensors"
  path.write_bytes(safetensors.numpy.save(cast(jnp.bfloat16)))
  rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(np.float32), tiny)
  same(clip_file.load(path, HEADS)[1], rounded)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_own_format(tmp_path, tiny, dtype):
  path = tmp_path / "x.safetensors"
  config = dataclasses.replace(TINY, activation="gelu")
  on_device = jax.tree.map(jnp.asarray, tiny)
  clip_file.save(path, config, on_device, dtype, metadata={"note": "kept", "format": "not this"})
  again, params = clip_file.load(path)
  assert again == config
  same(params, tiny)  # whose values are exact in float16
  with safetensors.safe_open(path, "numpy") as file:
    assert file.metadata()["note"] == "kept" and file.metadata()["format"] == "rpn_jax.clip"
    assert file.get_tensor("visual/patch_embed/kernel").dtype == dtype
    assert file.get_tensor("logit_scale").dtype == np.float32
  assert list(tmp_path.iterdir()) == [path]
  one_line("expected activation 'gelu' as in", clip_file.load, path, {"activation": "quick_gelu"})


@pytest.mark.parametrize("dtype", [np.float32, np.float16, jnp.bfloat16])
def test_a_folder_of_transformers_tells_all(tmp_path, tiny, state, dtype):
  theirs = {name: value.astype(dtype) for name, value in hf_names(state, 1, 2).items()}
  theirs["text_model.embeddings.position_ids"] = np.arange(5)[None]
  (tmp_path / "model.safetensors").write_bytes(safetensors.numpy.save(theirs))
  (tmp_path / "config.json").write_text(json.dumps(hf_config()))
  config, params = clip_file.load(tmp_path)
  assert config == TINY
  rounded = jax.tree.map(lambda x: x.astype(dtype).astype(np.float32), tiny)
  same(params, rounded)
  (tmp_path / "config.json").write_text(
    json.dumps(hf_config(dataclasses.replace(TINY, activation="gelu")))
  )
  assert clip_file.load(tmp_path / "model.safetensors")[0].activation == "gelu"
  one_line("expected activation 'gelu' as in", clip_file.load, tmp_path, HEADS)


def test_open_clip(tmp_path, tiny, state):
  """Names of its trainings and of its newer models; exact GELU unless the config says quick."""
  newer = {
    name if name.startswith("visual.") or name == "logit_scale" else f"text.{name}": value
    for name, value in state.items()
  }
  trained = {f"module.{name}": value for name, value in state.items()}
  for renamed in (state, newer, trained):
    path = write_state(tmp_path / "x.pt", renamed)
    same(clip_file.load(path, HEADS)[1], tiny)
  beside = tmp_path / "open_clip_config.json"
  for quick, activation in (({}, "gelu"), ({"quick_gelu": True}, "quick_gelu")):
    beside.write_text(json.dumps({"model_cfg": {**OPENCLIP_CONFIG, **quick}}))
    assert clip_file.load(path)[0] == dataclasses.replace(TINY, activation=activation)
  for wrong, match in (
    ({"vision_cfg": {"timm_model_name": "convnext"}}, "convnext"),
    ({"vision_cfg": {"width": 8, "head_width": 0}}, "malformed"),
    ({"vision_cfg": {"layers": [3, 4, 6, 3]}}, "a ResNet"),
    ({"vision_cfg": 3}, "no vision_cfg"),
  ):
    beside.write_text(json.dumps({"model_cfg": {**OPENCLIP_CONFIG, **wrong}}))
    one_line(match, clip_file.load, path)


def test_own_files_that_do_not_fit(tmp_path, tiny):
  path = tmp_path / "x.safetensors"
  fields = dataclasses.asdict(TINY)
  flat = flatten(tiny)
  good = {"format": "rpn_jax.clip", "version": "1", "config": json.dumps(fields)}
  for metadata, match in (
    ({**good, "version": "2"}, "version 1 .* got '2'"),
    ({**good, "config": "no JSON"}, "a config"),
    ({**good, "config": "[]"}, "config fields"),
    ({**good, "config": json.dumps({**fields, "text_layers": 10**9})}, "integer from 1"),
    ({**good, "config": json.dumps({**fields, "text_layers": 100})}, "100 text layers"),
    ({**good, "config": json.dumps({**fields, "vocab_size": 8})}, "token_embedding"),
    ({**good, "config": json.dumps({**fields, "mean": [0.5, "a", 0.5]})}, "three numbers for mean"),
    ({**good, "config": json.dumps({**fields, "std": [1, 1, 0]})}, "std above 0"),
    ({**good, "config": json.dumps({**fields, "squash": "no"})}, "true or false for squash"),
    ({}, "visual.conv1.weight"),
  ):
    path.write_bytes(safetensors.numpy.save(flat, metadata))
    assert str(path) in one_line(match, clip_file.load, path)


def test_shapes_are_compared_before_anything_is_copied(tmp_path, tiny, state, monkeypatch):
  state["visual.proj"] = np.zeros((8, 5), np.float32)
  (tmp_path / "x").write_bytes(safetensors.numpy.save(state))
  clip_file.save(tmp_path / "own", TINY, tiny)
  copied = []
  monkeypatch.setattr(clip_file, "float32", lambda value, *_: copied.append(value))
  one_line("visual/proj with shape", clip_file.load, tmp_path / "x", HEADS)
  assert not copied
  clip_file.load(tmp_path / "own")
  assert copied


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_named(tmp_path, tiny, state, value):
  """In the files of others, by their names, and in this project's own."""
  state["visual.proj"][1, 2:4] = value
  (tmp_path / "x.safetensors").write_bytes(safetensors.numpy.save(state))
  write_state(tmp_path / "x.pt", {k: v.astype(np.float16) for k, v in state.items()})
  for name in ("x.safetensors", "x.pt"):
    message = r"2 of the 32 values of 'visual.proj' are NaN or infinite in .*" + name
    one_line(message, clip_file.load, tmp_path / name, HEADS)
  clip_file.save(tmp_path / "own.safetensors", TINY, tiny)
  own, metadata = arrays.read_safetensors(tmp_path / "own.safetensors")
  content = safetensors.numpy.save({**own, "logit_scale": np.full((), value, np.float32)}, metadata)
  (tmp_path / "own.safetensors").write_bytes(content)
  message = "1 of the 1 values of 'logit_scale' are NaN or infinite in .*own"
  one_line(message, clip_file.load, tmp_path / "own.safetensors")


def test_a_failed_save_leaves_the_old_file(tmp_path, tiny):
  path = tmp_path / "x.safetensors"
  path.write_text("old")
  large = {**tiny, "visual": {**tiny["visual"], "proj": tiny["visual"]["proj"] + 1e6}}
  one_line("visual/proj, got infinity", clip_file.save, path, TINY, large, np.float16)
  one_line("missing", clip_file.save, path, TINY, {"visual": tiny["visual"], "text": tiny["text"]})
  one_line("float64", clip_file.save, path, TINY, tiny, np.float64)
  one_line("cannot write", clip_file.save, tmp_path / "no" / "x.safetensors", TINY, tiny)
  assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
