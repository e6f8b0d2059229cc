"""Every kind of CLIP file to equal parameters and to the recorded embeddings; bad files refused."""

import dataclasses
import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import traverse_util

from rpn_jax.base.errors import InputError
from rpn_jax.inference.predictor import find_weights
from rpn_jax.models.clip import CLIP, CLIPConfig
from rpn_jax.tasks import convert
from rpn_jax.weights import arrays, clip_file, names, prompts_file, torch_archive
from tests import FIXTURES, ROOT
from tests.weights.test_torch_archive import dictionary, number, text, write_state

GOLDEN = ROOT / "tests/golden"
TORCHSCRIPT = FIXTURES / "" / "torchscript_clip.pt"
STATE_DICT = GOLDEN / "clip" / "tiny_clip_state_dict.pt"
OPENCLIP = GOLDEN / "clip" / "tiny_clip_openclip.safetensors"
HF, HF_CONFIG = GOLDEN / "clip" / "tiny_clip_hf.safetensors", "tiny_clip_hf_config.json"

# Width below 64: the heads must be told.
TINY = CLIPConfig(
  embed_dim=4,
  image_size=4,
  patch_size=2,
  vision_width=8,
  vision_layers=1,
  vision_heads=4,
  text_width=6,
  text_layers=2,
  text_heads=3,
  context_length=5,
  vocab_size=7,
)
HEADS = {"vision_heads": 4, "text_heads": 3, "activation": "quick_gelu"}
QUICK = {"activation": "quick_gelu"}


def flatten(tree):
  return traverse_util.flatten_dict(tree, sep="/")


def same(left, right):
  left, right = flatten(left), flatten(right)
  assert set(left) == set(right)
  for name, value in left.items():
    np.testing.assert_array_equal(value, right[name], err_msg=name)


def one_line(match, call, *args, **kwargs):
  with pytest.raises(InputError, match=match) as error:
    call(*args, **kwargs)
  assert "\n" not in str(error.value)
  return str(error.value)


@pytest.fixture(scope="module")
def tiny():
  """Parameters of TINY, exact in float16."""
  rng = np.random.default_rng(0)
  flat = {
    name: rng.normal(size=shape).astype(np.float16).astype(np.float32)
    for name, shape in clip_file.expected_shapes(TINY).items()
  }
  return traverse_util.unflatten_dict(flat, sep="/")


@pytest.fixture
def state(tiny):
  """The same by OpenAI's names."""
  rules = {r.ours: r for r in names.clip_rules(names.OPENAI, 1, 2)}
  flat = flatten(tiny)
  to_theirs = {
    "same": lambda x: x,
    "linear": np.transpose,
    "conv": lambda x: x.transpose(3, 2, 0, 1),
  }
  return {
    rule.theirs: to_theirs[rule.layout](flat[ours]).copy(order="C") for ours, rule in rules.items()
  }


# --- Real files -----------------------------------------------------------------------------------


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


def test_shapes_of_published_models():
  """Parameter counts of OpenAI's ViT-B/16 and ViT-L/14."""
  tower = {"vision_width": 1024, "vision_layers": 24, "vision_heads": 16, "patch_size": 14}
  large = {**tower, "embed_dim": 768, "text_width": 768, "text_heads": 12}
  for fields, count in (
    ({}, 149_620_737),
    (large, 427_616_513),
  ):
    shapes = clip_file.expected_shapes(CLIPConfig(**fields)).values()
    assert sum(int(np.prod(shape)) for shape in shapes) == count


# --- Formats --------------------------------------------------------------------------------------


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
  assert clip_file.load(path, {"activation": "quick_gelu"})[0].activation == "quick_gelu"


def test_names_are_used_once():
  for naming in (names.OPENAI, names.AUTHORS):
    rules = names.clip_rules(naming, 12, 12)
    assert len({r.ours for r in rules}) == len({r.theirs for r in rules}) == len(rules)


def test_fingerprint(tiny):
  first = arrays.fingerprint(tiny)
  assert len(first) == 16 and int(first, 16) >= 0
  assert arrays.fingerprint(jax.tree.map(jnp.asarray, tiny)) == first
  assert arrays.fingerprint({**tiny, "logit_scale": np.float32(9)}) != first
  assert arrays.fingerprint({"a": np.zeros((2, 3))}) != arrays.fingerprint({"a": np.zeros((3, 2))})


def hf_names(state: dict, vision: int, text: int) -> dict:
  """A state by OpenAI's names as transformers would save it."""
  renamed = {
    "logit_scale": state["logit_scale"],
    "visual_projection.weight": state["visual.proj"].T.copy(),
    "text_projection.weight": state["text_projection"].T.copy(),
  }
  plain = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre": "vision_model.pre_layrnorm",
    "visual.ln_post": "vision_model.post_layernorm",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final": "text_model.final_layer_norm",
  }
  parts = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1",
           "mlp.c_proj": "mlp.fc2", "attn.out_proj": "self_attn.out_proj"}  # fmt: skip
  for ours, theirs in plain.items():
    for end in (".weight", ".bias", ""):
      if end == "" and ours in state:
        renamed[theirs] = state[ours]
      elif end and f"{ours}{end}" in state:
        renamed[f"{theirs}{end}"] = state[f"{ours}{end}"]
  for tower, start, layers in (("vision", "visual.", vision), ("text", "", text)):
    for i in range(layers):
      here, there = f"{start}transformer.resblocks.{i}", f"{tower}_model.encoder.layers.{i}"
      for end in ("weight", "bias"):
        for ours, theirs in parts.items():
          renamed[f"{there}.{theirs}.{end}"] = state[f"{here}.{ours}.{end}"]
        for letter, part in zip("qkv", np.split(state[f"{here}.attn.in_proj_{end}"], 3)):
          renamed[f"{there}.self_attn.{letter}_proj.{end}"] = part.copy()
  return renamed


def hf_config(act="quick_gelu") -> dict:
  return {
    "vision_config": {"num_attention_heads": 4, "hidden_act": act},
    "text_config": {"num_attention_heads": 3, "hidden_act": act},
  }


def write_shards(folder, state, count=3) -> pathlib.Path:
  names = sorted(state)
  places = {}
  for i in range(count):
    part = {name: state[name] for name in names[i::count]}
    file = f"model-{i + 1:05}-of-{count:05}.safetensors"
    (folder / file).write_bytes(safetensors.numpy.save(part))
    places |= dict.fromkeys(part, file)
  index = folder / "model.safetensors.index.json"
  index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
  return index


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
  (tmp_path / "config.json").write_text(json.dumps(hf_config("gelu")))
  assert clip_file.load(tmp_path / "model.safetensors")[0].activation == "gelu"
  assert clip_file.load(tmp_path, QUICK)[0].activation == "quick_gelu"  # a person knows better


def test_shards(tmp_path, tiny, state):
  index = write_shards(tmp_path, hf_names(state, 1, 2))
  (tmp_path / "config.json").write_text(json.dumps(hf_config()))
  for path in (tmp_path, index):
    config, params = clip_file.load(path)
    assert config == TINY
    same(params, tiny)
  places = json.loads(index.read_text())["weight_map"]
  victim = sorted(places)[0]
  outside = tmp_path.parent / "outside.safetensors"
  outside.write_bytes(safetensors.numpy.save({victim: np.zeros(1, "f")}))
  for wrong, match in (
    ({**places, victim: "../outside.safetensors"}, r"got the path '\.\./outside"),
    ({**places, victim: str(outside)}, "got the path"),
    ({**places, victim: "model-00002-of-00003.safetensors"}, "differs"),
    ({**places, victim: "missing.safetensors"}, "is no file"),
    ({**places, victim: 3}, "weight_map"),
    ({k: v for k, v in places.items() if k != victim}, "differs"),
    ([], "weight_map"),
  ):
    index.write_text(json.dumps({"weight_map": wrong}))
    one_line(match, clip_file.load, index)
  index.write_text("[" * 100_000)
  one_line("cannot be read", clip_file.load, index)


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
  model = {
    "embed_dim": 4,
    "vision_cfg": {"width": 8, "head_width": 2},
    "text_cfg": {"heads": 3},
  }
  beside = tmp_path / "open_clip_config.json"
  for quick, activation in (({}, "gelu"), ({"quick_gelu": True}, "quick_gelu")):
    beside.write_text(json.dumps({"model_cfg": {**model, **quick}}))
    assert clip_file.load(path)[0] == dataclasses.replace(TINY, activation=activation)
  for wrong, match in (
    ({"vision_cfg": {"timm_model_name": "convnext"}}, "convnext"),
    ({"vision_cfg": {"width": 8, "head_width": 0}}, "division"),
    ({"vision_cfg": 3}, "config of a CLIP"),
  ):
    beside.write_text(json.dumps({"model_cfg": {**model, **wrong}}))
    one_line(match, clip_file.load, path)


def test_towers_of_transformers_that_do_not_fit(tmp_path, state):
  theirs = hf_names(state, 1, 2)
  query = "text_model.encoder.layers.0.self_attn.q_proj.weight"
  for changes, config, match in (
    ({"vision_model.extra": np.zeros(2, "f")}, hf_config(), "'vision_model.extra' is unknown"),
    ({query: np.zeros((3, 3), "f")}, hf_config(), "queries, keys and values"),
    ({query: None}, hf_config(), "in_proj_weight' missing"),
    ({"text_projection.weight": np.zeros(3, "f")}, hf_config(), "2 axes"),
    ({}, {**hf_config(), "text_config": {"hidden_act": "gelu"}}, "activations"),
    ({}, {"vision_config": {"layer_norm_eps": 1e-6}}, "layer_norm_eps"),
    ({}, {"vision_config": [1]}, "config of a CLIP"),
    ({}, {**hf_config(), "vision_config": {"num_attention_heads": "4"}}, "integer from 1"),
  ):
    changed = {k: v for k, v in {**theirs, **changes}.items() if v is not None}
    (tmp_path / "model.safetensors").write_bytes(safetensors.numpy.save(changed))
    (tmp_path / "config.json").write_text(json.dumps(config))
    one_line(match, clip_file.load, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
  ("name", "fields", "count"),
  [
    ("B/32", {"patch_size": 32}, 151_277_313),
    ("B/16", {}, 149_620_737),
    ("L/14", {"patch_size": 14}, 427_616_513),
    ("L/14@336", {"patch_size": 14, "image_size": 336}, 427_944_193),
  ],
)
def test_published_sizes(tmp_path, name, fields, count):
  """Full-size random files of every family and type to one tree of parameters."""
  if name[0] == "L":
    fields = {**fields, "vision_width": 1024, "vision_layers": 24, "vision_heads": 16,
              "embed_dim": 768, "text_width": 768, "text_heads": 12}  # fmt: skip
  config = CLIPConfig(**fields)
  noise = np.random.default_rng(0).normal(0, 0.02, 1 << 20).astype(np.float16)
  rules = names.clip_rules(names.OPENAI, config.vision_layers, config.text_layers)
  shapes = clip_file.expected_shapes(config)
  state = {}
  for rule in rules:
    shape, axes = shapes[rule.ours], names.LAYOUTS[rule.layout]
    theirs = [shape[i] for i in np.argsort(axes)] if axes else shape
    state[rule.theirs] = np.resize(noise, theirs)
  openai, hf = tmp_path / "openai.safetensors", tmp_path / "hf"
  hf.mkdir()
  safetensors.numpy.save_file(state, openai)
  # bfloat16 holds fewer digits than the noise has: what is equal is its rounding.
  rounded = {k: v.astype(jnp.bfloat16) for k, v in state.items()}
  renamed = hf_names(rounded, config.vision_layers, config.text_layers)
  write_shards(hf, renamed)
  heads = {"num_attention_heads": config.vision_heads}
  told = {"vision_config": heads, "text_config": {"num_attention_heads": config.text_heads}}
  (hf / "config.json").write_text(json.dumps(told))
  del rounded, renamed
  for source, options in ((openai, ["--activation=quick_gelu"]), (hf, [])):
    target = tmp_path / "ours.safetensors"
    assert convert.main([str(source), str(target), *options]) == 0
    again, params = clip_file.load(target)
    assert again == config
    assert sum(value.size for value in jax.tree.leaves(params)) == count
    want = state["visual.transformer.resblocks.11.mlp.c_fc.weight"].T
    want = want if source == openai else want.astype(jnp.bfloat16)
    got = params["visual"]["block_11"]["mlp"]["c_fc"]["kernel"]
    np.testing.assert_array_equal(got, want.astype(np.float32))
    target.unlink()


# --- Bad files ------------------------------------------------------------------------------------


def test_files_of_another_kind(tmp_path, tiny):
  path = tmp_path / "x.pt"
  for content, match in (
    (b"\xff\xd8\xff\xe0\x00\x10JFIF and so on", "neither"),
    (b"", "neither"),
    (b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.", "before PyTorch 1.6"),
    (TORCHSCRIPT.read_bytes()[:100_000], "damaged"),
    (OPENCLIP.read_bytes()[:100_000], "damaged"),
    (OPENCLIP.read_bytes()[:20], "damaged"),
    (safetensors.numpy.save({"a": np.zeros(2, np.uint8)}), "U8"),
  ):
    path.write_bytes(content)
    assert str(path) in one_line(match, clip_file.load, path)
  one_line("no file", clip_file.load, tmp_path / "missing.pt")
  one_line("no file", clip_file.load, tmp_path)


def replaced(state, **changes):
  """The state with entries changed ("__" for "."), or left out where the value is None."""
  state = {**state, **{name.replace("__", "."): value for name, value in changes.items()}}
  return {name: value for name, value in state.items() if value is not None}


@pytest.mark.parametrize(
  ("changes", "match"),
  [
    ({"visual__proj": None}, "'visual.proj' missing"),
    ({"visual__conv1__weight": None}, "visual.conv1.weight"),
    (
      {"visual__conv1__weight": None, "visual__layer1__0__conv1__weight": np.ones(1, "f")},
      "a ResNet",
    ),
    ({"transformer__resblocks__0__ln_1__bias": None}, "resblocks.0.ln_1.bias' missing"),
    ({"visual__extra": np.zeros(3, np.float32)}, "'visual.extra' unknown"),
    ({"transformer__resblocks__7__x": np.zeros(3, np.float32)}, "and 11 more missing"),
    ({"visual__proj": np.zeros((8, 5), np.float32)}, "visual/proj with shape"),
    ({"visual__proj": np.zeros((8, 4), np.int64)}, "'visual.proj' is int64"),
    ({"ln_final__weight": np.zeros(5, np.float32)}, "text/ln_final/scale"),
    ({"visual__positional_embedding": np.zeros((4, 8), np.float32)}, "square grid"),
    ({"visual__conv1__weight": np.zeros((8, 3), np.float32)}, "4 axes"),
    ({"transformer__resblocks__0__attn__out_proj__weight": np.zeros(36, np.float32)}, "2 axes"),
    ({"input_resolution": np.array(224)}, "input_resolution 4 "),
    ({"transformer__resblocks__0__attn_mask": np.zeros((5, 5), np.float32)}, "causal mask"),
  ],
)
def test_states_that_do_not_fit(tmp_path, state, changes, match):
  path = write_state(tmp_path / "x.pt", replaced(state, **changes))
  assert str(path) in one_line(match, clip_file.load, path, HEADS)


def test_config_given_by_a_person(tmp_path, state):
  path = write_state(tmp_path / "x.pt", state)
  one_line("its number of heads is not in the file, pass vision_heads", clip_file.load, path)
  heads = {"vision_heads": 4, "text_heads": 3}
  one_line("does not tell it: pass --activation=quick_gelu", clip_file.load, path, heads)
  for wrong, match in (
    ({"vision_heads": 3}, "divide the width 8"),
    ({"vision_heads": 0}, "integer from 1"),
    ({"activation": "relu"}, "activation must be"),
    ({"activation": []}, "unhashable"),
    ({"depth": 3}, "depth"),
    ({"embed_dim": 5}, "with shape"),
    ({"vision_layers": 2}, "expected 2 visual layers"),
  ):
    one_line(match, clip_file.load, path, {**HEADS, **wrong})


def test_own_files_that_do_not_fit(tmp_path, tiny):
  path = tmp_path / "x.safetensors"
  fields = dataclasses.asdict(TINY)
  arrays = flatten(tiny)
  good = {"format": "rpn_jax.clip", "version": "1", "config": json.dumps(fields)}
  for metadata, match in (
    ({**good, "version": "2"}, "version 1 .* got '2'"),
    ({**good, "config": "no JSON"}, "a config"),
    ({**good, "config": "[]"}, "config fields"),
    ({**good, "config": json.dumps({**fields, "text_layers": 10**9})}, "integer from 1"),
    ({**good, "config": json.dumps({**fields, "text_layers": 100})}, "100 text layers"),
    ({**good, "config": json.dumps({**fields, "vocab_size": 8})}, "token_embedding"),
    ({}, "visual.conv1.weight"),
  ):
    path.write_bytes(safetensors.numpy.save(arrays, metadata))
    assert str(path) in one_line(match, clip_file.load, path)


def test_a_failed_save_leaves_the_old_file(tmp_path, tiny):
  path = tmp_path / "x.safetensors"
  path.write_text("old")
  large = {**tiny, "visual": {**tiny["visual"], "proj": tiny["visual"]["proj"] + 1e6}}
  one_line("visual/proj, got infinity", clip_file.save, path, TINY, large, np.float16)
  one_line("missing", clip_file.save, path, TINY, {"visual": tiny["visual"], "text": tiny["text"]})
  one_line("float64", clip_file.save, path, TINY, tiny, np.float64)
  one_line("cannot write", clip_file.save, tmp_path / "no" / "x.safetensors", TINY, tiny)
  assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


# --- Command line ---------------------------------------------------------------------------------


def test_command_line(tmp_path, capsys):
  target = tmp_path / "x.safetensors"
  assert convert.main([str(TORCHSCRIPT), str(target), "--dtype", "float16"]) == 0
  printed = capsys.readouterr().out
  count = sum(value.size for value in jax.tree.leaves(clip_file.load(target)[1]))
  for part in ("TorchScript archive", f"{count:,} parameters", "1 x 128 (2 heads)", str(target)):
    assert part in printed
  assert convert.main([str(TORCHSCRIPT), str(target), "--activation", "gelu"]) == 0
  assert clip_file.load(target)[0].activation == "gelu"
  assert convert.main([str(tmp_path / "missing"), str(target)]) == 2
  assert capsys.readouterr().err.count("\n") == 1


# --- The authors' release -------------------------------------------------------------------------


@pytest.fixture(scope="module", name="authors")
def authors_state():
  return dict(np.load(GOLDEN / "params.npz"))


def test_verify(tmp_path, capsys, monkeypatch):
  source, target = find_weights("shapes_clip.safetensors"), tmp_path / "x.safetensors"
  assert convert.main([str(source), str(target), "--verify"]) == 0
  printed = capsys.readouterr().out
  assert f"sha256 {arrays.sha256(source)}: no file of OpenAI's" in printed
  assert "a photo of a kitten" in printed and re.search(r"\d of 6 in order", printed)
  monkeypatch.setitem(convert.PUBLISHED, arrays.sha256(source), "ViT-X")
  assert convert.main([str(source), str(target), "--verify"]) == 0
  assert "OpenAI's ViT-X" in capsys.readouterr().out
  # A vocabulary of another tokenizer: no similarities, but an answer.
  assert convert.main([str(TORCHSCRIPT), str(target), "--verify"]) == 0
  assert "no similarities of texts: " in capsys.readouterr().out


def test_an_mmcv_checkpoint_becomes_prompts_and_goes_back(tmp_path, authors, capsys):
  """By way of files, with every array of the recorded ones equal at the end."""
  clip, prompts = authors.from_authors(authors)
  # Notes as mmcv leaves them, one of NumPy's numbers among them.
  number_of_numpy = b"cnumpy.core.multiarray\nscalar\n(cnumpy\ndtype\n(" + text("f8")
  number_of_numpy += b"\x89\x88tR(K\x03" + text("<") + b"NNNK\xffK\xffK\x00tbc_codecs\nencode\n("
  number_of_numpy += text("\x00" * 8) + text("latin1") + b"tRtR"
  best = {"best_score": number_of_numpy, "last_ckpt": text("/work/latest.pth")}
  meta = {"epoch": number(1), "env_info": text("Linux\n"), "hook_msgs": dictionary(best)}

  def mmcv(root):
    return dictionary({"meta": dictionary(meta), "state_dict": root, "optimizer": b"}"})

  source = write_state(tmp_path / "rpn.pth", authors, mmcv)
  # The CLIP around it, with its logit scale.
  params = {**clip, "logit_scale": np.float32(4.6)}
  fields = clip_file.read_architecture(authors, names.AUTHORS, "golden")
  heads = {"vision_heads": 4, "text_heads": 2, "activation": "quick_gelu"}
  clip_file.save(tmp_path / "clip.safetensors", CLIPConfig(**fields, **heads), params)

  ours, back = tmp_path / "prompts.safetensors", tmp_path / "back.pth"
  assert convert.main([str(source), str(ours)]) == 2
  assert "pass --clip=FILE" in capsys.readouterr().err
  option = f"--clip={tmp_path}/clip.safetensors"
  assert convert.main([str(source), str(ours), option]) == 0, capsys.readouterr().err
  content = prompts_file.load(ours)
  same(content.prompts, prompts)
  assert content.clip == arrays.fingerprint(params)
  assert content.config["model"]["deep_tokens"] == prompts["deep_tokens"].shape[1]
  assert convert.main([str(ours), str(back)]) == 0
  kind, state = torch_archive.read(back)
  trainable = json.loads((GOLDEN / "meta.json").read_text())["trainable"]
  assert kind == torch_archive.STATE_DICT
  assert {*state, *authors.AUTHORS_UNUSED} == set(trainable)
  for name, value in state.items():
    np.testing.assert_array_equal(value, authors[name])
  params["text"]["projection"] = params["text"]["projection"] + 1
  clip_file.save(tmp_path / "clip.safetensors", CLIPConfig(**fields, **heads), params)
  assert convert.main([str(source), str(ours), option]) == 2
  assert "text/projection differs" in capsys.readouterr().err


def test_from_authors(authors):
  clip, prompts = authors.from_authors(authors)
  vision = "backbone.transformer.resblocks.2."
  np.testing.assert_array_equal(
    clip["visual"]["block_2"]["mlp"]["c_fc"]["kernel"], authors[f"{vision}mlp.c_fc.weight"].T
  )
  np.testing.assert_array_equal(
    clip["text"]["token_embedding"], authors["text_encoder.token_embedding.weight"]
  )
  np.testing.assert_array_equal(prompts["h"], authors["prompt_proj"])
  np.testing.assert_array_equal(
    prompts["prompt_proj"]["kernel"], authors["backbone.prompt_proj.weight"].T
  )
  np.testing.assert_array_equal(
    prompts["head"]["text_reduce"]["kernel"], authors["decode_head.cls_proj.weight"].T
  )
  back = authors.to_authors_prompts(prompts)
  meta = json.loads((GOLDEN / "meta.json").read_text())
  assert {*back, *authors.AUTHORS_UNUSED} == set(meta["trainable"])
  for name, value in back.items():
    np.testing.assert_array_equal(value, authors[name])


def test_authors_states_that_do_not_fit(authors):
  for name, value, match in (
    ("decode_head.extra", np.zeros(2), "'decode_head.extra' unknown"),
    ("prompt_proj", None, "'prompt_proj' missing"),
    ("prompt_proj", np.zeros((64, 32), np.float32), "expected h with shape"),
    ("decode_head.cls_proj.weight", np.zeros((32, 32), np.float32), "text_reduce"),
    ("backbone.proj", np.zeros((64, 31), np.float32), "visual/proj"),
  ):
    changed = {k: v for k, v in {**authors, name: value}.items() if v is not None}
    assert "rpn.pth" in one_line(match, authors.from_authors, changed, "rpn.pth")
  _, prompts = authors.from_authors(authors)
  one_line("unknown", authors.to_authors_prompts, {**prompts, "m2oe_0": {"gate": np.zeros(2)}})
