"""Names of other people's files to ours: each used once, unknown ones refused."""

import json

import numpy as np
import pytest
import safetensors.numpy

from rpn_jax.tasks import convert
from rpn_jax.weights import clip_file, names
from tests.weights.checks import one_line, same
from tests.weights.files import HEADS, hf_config, hf_names, write_state


def test_names_are_used_once():
  for naming in (names.OPENAI, names.AUTHORS):
    rules = names.clip_rules(naming, 12, 12)
    assert len({r.ours for r in rules}) == len({r.theirs for r in rules}) == len(rules)


def test_towers_of_transformers_that_do_not_fit(tmp_path, state):
  theirs = hf_names(state, 1, 2)
  query = "text_model.encoder.layers.0.self_attn.q_proj.weight"
  for changes, config, match in (
    ({"vision_model.extra": np.zeros(2, "f")}, hf_config(), "'vision_model.extra' is unknown"),
    ({query: np.zeros((3, 3), "f")}, hf_config(), "queries, keys and values"),
    ({query: None}, hf_config(), "in_proj_weight' missing"),
    ({"text_projection.weight": np.zeros(3, "f")}, hf_config(), "2 axes"),
  ):
    changed = {k: v for k, v in {**theirs, **changes}.items() if v is not None}
    (tmp_path / "model.safetensors").write_bytes(safetensors.numpy.save(changed))
    (tmp_path / "config.json").write_text(json.dumps(config))
    one_line(match, clip_file.load, tmp_path)


def test_prefixes_of_trainings(tmp_path, tiny, state):
  for prefix in ("module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."):
    wrapped = {f"{prefix}{name}": value for name, value in state.items()}
    same(clip_file.load(write_state(tmp_path / "x.pt", wrapped), HEADS)[1], tiny)
    wrapped = {f"{prefix}{name}": value for name, value in hf_names(state, 1, 2).items()}
    same(clip_file.load(write_state(tmp_path / "x.pt", wrapped), HEADS)[1], tiny)


def test_segmentors_that_are_not_the_authors(tmp_path, capsys):
  state = {"backbone.layer1.0.conv1.weight": np.ones(1, "f"), "decode_head.b": np.ones(1, "f")}
  path = write_state(tmp_path / "x.pth", state)
  assert convert.main([str(path), str(tmp_path / "y.safetensors")]) == 2
  assert "a segmentor of mmseg that is not the authors' RPN" in capsys.readouterr().err


def test_one_tower_of_transformers(tmp_path, state):
  """The text tower that comes with image generators: its config says what it is."""
  theirs = {k: v for k, v in hf_names(state, 1, 2).items() if k.startswith("text_model.")}
  (tmp_path / "model.safetensors").write_bytes(safetensors.numpy.save(theirs))
  (tmp_path / "config.json").write_text('{"model_type": "clip_text_model"}')
  one_line("model_type is 'clip_text_model', not 'clip'", clip_file.load, tmp_path)


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
      r"\(a ResNet\)",
    ),
    ({"visual__conv1__weight": None, "visual__blocks__0__x": np.ones(1, "f")}, r"\(EVA-CLIP\)"),
    (
      {"visual__conv1__weight": None, "decode_head__conv_seg__weight": np.ones(1, "f")},
      r"\(a segmentor of mmseg that is not the authors' RPN\)",
    ),
    ({"transformer__resblocks__0__ln_1__bias": None}, "resblocks.0.ln_1.bias' missing"),
    ({"visual__extra": np.zeros(3, np.float32)}, "'visual.extra' unknown"),
    (
      {"positional_embedding_res": np.zeros((5, 6), "f")},
      r"_res' unknown in .* \(Long-CLIP\): use",
    ),
    ({"visual__conv1_alpha__weight": np.zeros(3, "f")}, r"unknown in .* \(Alpha-CLIP\)"),
    ({"text_decoder__proj": np.zeros(3, "f")}, r"unknown in .* \(BLIP or CoCa\)"),
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
