"""Plain vision transformers under RPN: names, numbers, refusals."""

import dataclasses
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rpn_jax.base.errors import InputError
from rpn_jax.config import RPNConfig
from rpn_jax.inference.classifier import class_probabilities
from rpn_jax.models.clip import VisionTransformer, l2_normalize
from rpn_jax.models.rpn import RPN
from rpn_jax.models.trained import init_prompts
from rpn_jax.weights import clip_file, plain_vit
from rpn_jax.weights.architecture import usual_heads
from tests import tiny

WIDTH, LAYERS, PATCH, GRID = 64, 2, 8, 3


def timm_state():
  rng = np.random.default_rng(0)
  array = lambda *shape: np.float32(0.2 * rng.normal(size=shape))
  state = {
    "cls_token": array(1, 1, WIDTH),
    "pos_embed": array(1, 1 + GRID**2, WIDTH),
    "patch_embed.proj.weight": array(WIDTH, 3, PATCH, PATCH),
    "patch_embed.proj.bias": array(WIDTH),
    "norm.weight": 1 + array(WIDTH),
    "norm.bias": array(WIDTH),
    "head.weight": array(10, WIDTH),
    "head.bias": array(10),
  }
  shapes = {
    "norm1": (WIDTH,), "attn.qkv": (3 * WIDTH, WIDTH), "attn.proj": (WIDTH, WIDTH),
    "norm2": (WIDTH,), "mlp.fc1": (4 * WIDTH, WIDTH), "mlp.fc2": (WIDTH, 4 * WIDTH),
  }  # fmt: skip
  for i in range(LAYERS):
    for name, shape in shapes.items():
      state[f"blocks.{i}.{name}.weight"] = array(*shape) + (len(shape) == 1)
      state[f"blocks.{i}.{name}.bias"] = array(shape[0])
  return state


def hf_state():
  """The same arrays by Hugging Face's names."""
  back = {v: k for k, v in plain_vit.HF_OUTSIDE.items()}
  parts = {v: k for k, v in plain_vit.HF_BLOCK.items()}
  state = {"vit.pooler.dense.weight": np.zeros((2, 2), np.float32)}
  for name, value in timm_state().items():
    if name.startswith("head"):
      state[name.replace("head", "classifier")] = value
    elif name.startswith("blocks"):
      _, i, rest = name.split(".", 2)
      part, kind = rest.rsplit(".", 1)
      layer = f"vit.encoder.layer.{i}"
      if part == "attn.qkv":
        for which, x in zip(("query", "key", "value"), np.split(value, 3)):
          state[f"{layer}.attention.attention.{which}.{kind}"] = x
      else:
        state[f"{layer}.{parts[part]}.{kind}"] = value
    else:
      state[f"vit.{back[name]}"] = value
  return state


def reference(state, image_HxWx3):
  """What timm's VisionTransformer computes of its tokens, written down in numpy."""

  def norm(x, name):
    x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
    return x * state[f"{name}.weight"] + state[f"{name}.bias"]

  def linear(x, name):
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

  def gelu(x):
    return np.asarray(jax.nn.gelu(x, approximate=False))

  kernel = state["patch_embed.proj.weight"]
  rows = image_HxWx3.reshape(GRID, PATCH, GRID, PATCH, 3).transpose(0, 2, 4, 1, 3)
  patches = rows.reshape(GRID**2, -1) @ kernel.reshape(WIDTH, -1).T + state["patch_embed.proj.bias"]
  x = np.concatenate([state["cls_token"][0], patches]) + state["pos_embed"][0]
  for i in range(LAYERS):
    qkv = linear(norm(x, f"blocks.{i}.norm1"), f"blocks.{i}.attn.qkv")
    q, k, v = np.split(qkv, 3, -1)  # one head of 64
    scores = q @ k.T / 8
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    x = x + linear(weights / weights.sum(-1, keepdims=True) @ v, f"blocks.{i}.attn.proj")
    x = x + linear(
      gelu(linear(norm(x, f"blocks.{i}.norm2"), f"blocks.{i}.mlp.fc1")), f"blocks.{i}.mlp.fc2"
    )
  return norm(x, "norm")


@pytest.fixture
def clip(tmp_path):
  path = tmp_path / "clip.safetensors"
  tiny.save(path)
  return path


def mae_state():
  """With the decoder, by MAE's own names."""
  names = ("mask_token", "decoder_embed.weight", "decoder_pos_embed", "decoder_norm.bias",
           "decoder_blocks.0.attn.qkv.weight", "decoder_pred.bias")  # fmt: skip
  return timm_state() | {name: np.zeros((2, 2), np.float32) for name in names}


@pytest.mark.parametrize("state", [timm_state, hf_state, mae_state])
def test_it_computes_what_the_original_does(state, clip):
  config, params = plain_vit.join(state(), "vit.safetensors", *clip_file.load(clip), heads=1)
  assert (config.vision, config.image_size, config.vision_heads) == ("vit", PATCH * GRID, 1)
  image = np.random.default_rng(1).normal(size=(1, PATCH * GRID, PATCH * GRID, 3))
  apply = jax.jit(VisionTransformer(config).apply)
  got = apply({"params": params["visual"]}, jnp.float32(image))
  with pytest.raises(InputError, match="got a plain vision transformer"):
    class_probabilities(types.SimpleNamespace(clip=config), ["sand", "water"])
  np.testing.assert_allclose(got[0], reference(timm_state(), image[0])[0], rtol=1e-4, atol=1e-4)


def test_rpn_trains_what_takes_it_to_the_words(tmp_path, clip):
  config, params = plain_vit.join(timm_state(), "vit", *clip_file.load(clip), heads=1)
  model = RPN(config, RPNConfig(m2oe="none"))
  text = l2_normalize(jax.random.normal(jax.random.key(0), (3, config.embed_dim)))
  tower = {"visual": params["visual"]}
  tree = init_prompts(model, tower, text, jax.random.key(1), 32)
  assert tree["joint"]["kernel"].shape == (WIDTH, config.embed_dim)
  image = jax.random.normal(jax.random.key(2), (2, 32, 32, 3))
  loss = lambda p: model.apply({"params": tower, "prompts": p}, image, text).sum()
  assert np.abs(jax.jit(jax.grad(loss))(tree)["joint"]["kernel"]).max() > 0


@pytest.mark.parametrize(
  "change, message",
  [
    (lambda s: s.pop("blocks.1.mlp.fc2.bias"), "no array blocks.1.mlp.fc2.bias"),
    (lambda s: s.update({"blocks.0.ls1.gamma": np.zeros(64, np.float32)}), "blocks.0.ls1.gamma"),
    (lambda s: s.update({"norm.bias": np.zeros(32, np.float32)}), "norm.bias has shape"),
    (lambda s: s.pop("cls_token"), "no array cls_token"),
    (lambda s: s.update({"pos_embed": np.zeros((1, 9, 64), np.float32)}), "a square grid"),
  ],
)
def test_other_networks_are_refused(change, message, clip):
  state = timm_state()
  change(state)
  with pytest.raises(InputError, match=message):
    plain_vit.join(state, "vit.safetensors", *clip_file.load(clip), heads=1)


def test_mlps_are_as_wide_as_those_of_the_encoder(clip, tmp_path):
  """Not as those of the CLIP, whose width is told where it is not four times the tower's."""
  narrow = {
    name: value[..., : 3 * WIDTH] if "fc2.weight" in name else value[: 3 * WIDTH]
    for name, value in timm_state().items()
    if re.search(r"mlp\.fc(1\.|2\.weight)", name)
  }
  config, params = clip_file.load(clip)
  wide = dataclasses.replace(config, vision_mlp_width=100)
  for state, around, width in ((timm_state(), wide, None), (narrow, config, 3 * WIDTH)):
    joined, both = plain_vit.join(timm_state() | state, "vit", around, params, heads=1)
    clip_file.save(tmp_path / "joined.safetensors", joined, both)
    assert clip_file.load(tmp_path / "joined.safetensors")[0].vision_mlp_width == width


def test_heads_are_asked_for(clip):
  """MAE's largest encoder has 16 heads of 80 channels, not 20 of 64."""
  for heads in (None, 3):
    with pytest.raises(InputError, match=f"2 layers 64 wide, got {heads}.*pass --heads=NUMBER"):
      plain_vit.join(timm_state(), "vit.safetensors", *clip_file.load(clip), heads=heads)
  assert usual_heads("vision", 1280, 32) == 16 and usual_heads("vision", 192, 12) == 3
