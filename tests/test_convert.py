"""Every kind of CLIP file to equal parameters and to the recorded embeddings; bad files refused."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import traverse_util
from test_torch_archive import dictionary, write_state

from rpn_jax import convert
from rpn_jax.errors import InputError
from rpn_jax.models.clip import CLIP, CLIPConfig

HERE = pathlib.Path(__file__).parent
GOLDEN = HERE / "golden"
TORCHSCRIPT = HERE / "fixtures" / "torchscript_clip.pt"
STATE_DICT = GOLDEN / "clip" / "tiny_clip_state_dict.pt"
OPENCLIP = GOLDEN / "clip" / "tiny_clip_openclip.safetensors"

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
HEADS = {"vision_heads": 4, "text_heads": 3}


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
    for name, shape in convert.expected_shapes(TINY).items()
  }
  return traverse_util.unflatten_dict(flat, sep="/")


@pytest.fixture
def state(tiny):
  """The same by OpenAI's names."""
  rules = {r.ours: r for r in convert.clip_rules(convert.OPENAI, 1, 2)}
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


@pytest.mark.parametrize("path", [STATE_DICT, OPENCLIP, TORCHSCRIPT], ids=lambda path: path.name)
def test_embeddings_of_the_original(path, tmp_path):
  recording = TORCHSCRIPT.with_suffix(".npz") if path == TORCHSCRIPT else path.parent / "clip.npz"
  recorded = np.load(recording)
  config, params = convert.load(path)
  convert.save(tmp_path / "ours.safetensors", config, params)
  again, params = convert.load(tmp_path / "ours.safetensors")
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
  config, params = convert.load(STATE_DICT)
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
  same(params, convert.load(OPENCLIP)[1])
  assert convert.fingerprint(params) == convert.fingerprint(convert.load(OPENCLIP)[1])


def test_shapes_of_published_models():
  """Parameter counts of OpenAI's ViT-B/16 and ViT-L/14."""
  tower = {"vision_width": 1024, "vision_layers": 24, "vision_heads": 16, "patch_size": 14}
  large = {**tower, "embed_dim": 768, "text_width": 768, "text_heads": 12}
  for fields, count in (
    ({}, 149_620_737),
    (large, 427_616_513),
  ):
    shapes = convert.expected_shapes(CLIPConfig(**fields)).values()
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
    config, params = convert.load(path, HEADS)
    assert config == TINY
    assert all(value.dtype == np.float32 for value in jax.tree.leaves(params))
    same(params, tiny)
  path = tmp_path / "bfloat16.safetensors"
  path.write_bytes(safetensors.numpy.save(cast(jnp.bfloat16)))
  rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(np.float32), tiny)
  same(convert.load(path, HEADS)[1], rounded)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_own_format(tmp_path, tiny, dtype):
  path = tmp_path / "x.safetensors"
  config = dataclasses.replace(TINY, activation="gelu")
  on_device = jax.tree.map(jnp.asarray, tiny)
  convert.save(path, config, on_device, dtype, metadata={"note": "kept", "format": "not this"})
  again, params = convert.load(path)
  assert again == config
  same(params, tiny)  # whose values are exact in float16
  with safetensors.safe_open(path, "numpy") as file:
    assert file.metadata()["note"] == "kept" and file.metadata()["format"] == "rpn_jax.clip"
    assert file.get_tensor("visual/patch_embed/kernel").dtype == dtype
    assert file.get_tensor("logit_scale").dtype == np.float32
  assert list(tmp_path.iterdir()) == [path]
  assert convert.load(path, {"activation": "quick_gelu"})[0].activation == "quick_gelu"


def test_names_are_used_once():
  for naming in (convert.OPENAI, convert.AUTHORS):
    rules = convert.clip_rules(naming, 12, 12)
    assert len({r.ours for r in rules}) == len({r.theirs for r in rules}) == len(rules)


def test_fingerprint(tiny):
  first = convert.fingerprint(tiny)
  assert len(first) == 16 and int(first, 16) >= 0
  assert convert.fingerprint(jax.tree.map(jnp.asarray, tiny)) == first
  assert convert.fingerprint({**tiny, "logit_scale": np.float32(9)}) != first
  assert convert.fingerprint({"a": np.zeros((2, 3))}) != convert.fingerprint(
    {"a": np.zeros((3, 2))}
  )


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
    assert str(path) in one_line(match, convert.load, path)
  one_line("no file", convert.load, tmp_path / "missing.pt")
  one_line("no file", convert.load, tmp_path)
  one_line("text_model", convert.load, GOLDEN / "clip" / "tiny_clip_hf.safetensors")


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
  assert str(path) in one_line(match, convert.load, path, HEADS)


def test_config_given_by_a_person(tmp_path, state):
  path = write_state(tmp_path / "x.pt", state)
  one_line("its number of heads is not in the file, pass vision_heads", convert.load, path)
  for wrong, match in (
    ({"vision_heads": 3}, "divide the width 8"),
    ({"vision_heads": 0}, "integer from 1"),
    ({"activation": "relu"}, "activation must be"),
    ({"activation": []}, "unhashable"),
    ({"depth": 3}, "depth"),
    ({"embed_dim": 5}, "with shape"),
    ({"vision_layers": 2}, "expected 2 visual layers"),
  ):
    one_line(match, convert.load, path, {**HEADS, **wrong})


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
    ({**good, "config": json.dumps({**fields, "text_layers": 900})}, "900 text layers"),
    ({**good, "config": json.dumps({**fields, "vocab_size": 8})}, "token_embedding"),
    ({}, "visual.conv1.weight"),
  ):
    path.write_bytes(safetensors.numpy.save(arrays, metadata))
    assert str(path) in one_line(match, convert.load, path)


def test_a_failed_save_leaves_the_old_file(tmp_path, tiny):
  path = tmp_path / "x.safetensors"
  path.write_text("old")
  large = {**tiny, "visual": {**tiny["visual"], "proj": tiny["visual"]["proj"] + 1e6}}
  one_line("visual/proj, got infinity", convert.save, path, TINY, large, np.float16)
  one_line("missing", convert.save, path, TINY, {"visual": tiny["visual"], "text": tiny["text"]})
  one_line("float64", convert.save, path, TINY, tiny, np.float64)
  one_line("cannot write", convert.save, tmp_path / "no" / "x.safetensors", TINY, tiny)
  assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


# --- Command line ---------------------------------------------------------------------------------


def test_command_line(tmp_path, capsys):
  target = tmp_path / "x.safetensors"
  assert convert.main([str(TORCHSCRIPT), str(target), "--dtype", "float16"]) == 0
  printed = capsys.readouterr().out
  count = sum(value.size for value in jax.tree.leaves(convert.load(target)[1]))
  for part in ("TorchScript archive", f"{count:,} parameters", "1 x 128 (2 heads)", str(target)):
    assert part in printed
  assert convert.main([str(TORCHSCRIPT), str(target), "--activation", "gelu"]) == 0
  assert convert.load(target)[0].activation == "gelu"
  assert convert.main([str(tmp_path / "missing"), str(target)]) == 2
  assert capsys.readouterr().err.count("\n") == 1


# --- The authors' release -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def authors():
  return dict(np.load(GOLDEN / "params.npz"))


def test_from_authors(authors):
  clip, prompts = convert.from_authors(authors)
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
  back = convert.to_authors_prompts(prompts)
  meta = json.loads((GOLDEN / "meta.json").read_text())
  assert {*back, *convert.AUTHORS_UNUSED} == set(meta["trainable"])
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
    assert "rpn.pth" in one_line(match, convert.from_authors, changed, "rpn.pth")
  _, prompts = convert.from_authors(authors)
  one_line("unknown", convert.to_authors_prompts, {**prompts, "m2oe_0": {"gate": np.zeros(2)}})
