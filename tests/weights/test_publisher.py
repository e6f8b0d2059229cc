"""Files of other libraries, as these write them: computed rightly, or refused by name."""

import dataclasses
import functools
import io
import json
import pathlib
import zipfile

import jax
import numpy as np
import pytest

from rpn_jax.base import pixels
from rpn_jax.models.clip import CLIP
from rpn_jax.text import tokenizer
from rpn_jax.weights import clip_file, publisher
from tests import FIXTURES
from tests.weights.checks import one_line
from tests.weights.files import write_state

HEADS = {"vision_heads": 2, "text_heads": 4}
# How images are prepared is no part of the program.
NO_IMAGES = {"mean": None, "std": None, "squash": False}


@functools.cache
def archive() -> zipfile.ZipFile:
  return zipfile.ZipFile(io.BytesIO((FIXTURES / "clip_files.zip").read_bytes()))


def unpack(case: str, folder: pathlib.Path) -> pathlib.Path:
  """The folder of a case; `tests/tools/make_clip_files.py` wrote it."""
  for name in archive().namelist():
    if name.startswith(f"{case}/"):
      (folder / name.rpartition("/")[2]).write_bytes(archive().read(name))
  return folder


def arrays_of(name: str):
  return np.load(io.BytesIO(archive().read(name)))


@functools.cache
def features():
  """One program for all configs that compute the same."""
  return jax.jit(
    lambda config, params, image, tokens: CLIP(config).apply(
      {"params": params}, image, tokens, method="encode"
    ),
    static_argnums=0,
  )


LOADED = {
  "hf": {},
  "hf_gelu": {},
  "hf_older": {},
  "hf_eos_2": {},
  "hf_wide_mlp": {},
  "hf_half": {},
  "openclip": {},
  "openclip_custom": {},
  "openclip_wide_mlp": {},
  "openclip_half": {},
  "openclip_training": {},
  "openclip_model": {},
  "openclip_model_state_dict": {},
  "openclip_protocol_4": {},
  "openclip_protocol_5": {},
  "openclip_scale_of_one_axis": {},
  "openclip_script/model.pt": {},
  "openclip_script_gelu/model.pt": {},
  "openai_state/model.pt": {"vision_heads": 1, "text_heads": 1, "activation": "quick_gelu"},
}


@pytest.mark.parametrize("case", LOADED)
def test_features_of_the_library(case, tmp_path):
  name, _, file = case.partition("/")
  config, params = clip_file.load(unpack(name, tmp_path) / file, LOADED[case])
  inputs, right = arrays_of("inputs.npz"), arrays_of(f"{name}/right.npz")
  image, tokens = np.moveaxis(inputs["image"], 1, -1), inputs["tokens"].astype(np.int32)
  got = features()(dataclasses.replace(config, **NO_IMAGES), params, image, tokens)
  for key, value in zip(("image_features", "text_features"), got):
    np.testing.assert_allclose(value, right[key], rtol=0, atol=1e-5 * np.abs(right[key]).max())
  if name.endswith("half"):
    assert config.mean == config.std == (0.5, 0.5, 0.5) and config.squash
  else:
    assert config.mean in (None, pixels.CLIP_MEAN) and not config.squash
  clip_file.save(tmp_path / "own", config, params)
  assert clip_file.load(tmp_path / "own")[0] == config


REFUSED = {
  "hf_tanh": "vision_config.hidden_act is 'gelu_pytorch_tanh'",
  "hf_two_activations": "towers have the activations gelu, quick_gelu",
  "hf_epsilon": "vision_config.layer_norm_eps is 1e-06, CLIP's is 1e-05",
  "hf_eos": "text_config.eos_token_id is 320",
  "hf_vocabulary": "expected the 49408 tokens of CLIP's tokenizer, got 49500",
  "metaclip_2": "model_type is 'metaclip_2', not 'clip'",
  "siglip": "model_type is 'siglip'",
  "altclip": "model_type is 'altclip'",
  "chinese_clip": "model_type is 'chinese_clip'",
  "blip": "model_type is 'blip'",
  "openclip_image_pool": "vision_cfg.pool_type is 'avg', CLIP's is 'tok'",
  "openclip_text_pool": "text_cfg.pool_type is 'last'",
  "openclip_no_mask": "text_cfg.no_causal_mask is True",
  "openclip_tanh": "vision_cfg.act_kwargs is {'approximate': 'tanh'}",
  "openclip_epsilon": "text_cfg.norm_kwargs is {'eps': 1e-06}",
  "openclip_not_square": r"vision_cfg.image_size is \[32, 8\], not square",
  "openclip_logit_bias": "logit bias of -10.0, as SigLIP has",
  "openclip_tokenizer": "tokenizer is bert-base-uncased, not CLIP's",
  "openclip_script_avg/model.pt": "visual.pool_type is 'avg', unlike CLIP's",
}


@pytest.mark.parametrize("case", REFUSED)
def test_models_that_compute_something_else(case, tmp_path):
  name, _, file = case.partition("/")
  message = one_line(REFUSED[case], clip_file.load, unpack(name, tmp_path) / file)
  assert str(tmp_path) in message


@pytest.mark.parametrize(
  ("case", "match"),
  [
    ("metaclip_2", "expected the 49408 tokens of CLIP.s tokenizer, got 60000"),
    ("siglip", "logit_bias, as SigLIP"),
    ("altclip", "AltCLIP"),
    ("chinese_clip", "text tower of BERT"),
    ("blip", "text tower of BERT|BLIP"),
  ],
)
def test_other_models_without_their_config(case, match, tmp_path):
  (unpack(case, tmp_path) / "config.json").unlink()
  one_line(match, clip_file.load, tmp_path)


def test_a_logit_bias_without_a_config(tmp_path):
  (unpack("openclip_logit_bias", tmp_path) / "open_clip_config.json").unlink()
  one_line("logit_bias, as SigLIP", clip_file.load, tmp_path, HEADS)


# What transformers 4.16 wrote into each of both sections, as in the files of openai/clip-vit-*.
GENERIC = {
  "_name_or_path": "", "add_cross_attention": False, "architectures": None,
  "bad_words_ids": None, "bos_token_id": None, "chunk_size_feed_forward": 0,
  "cross_attention_hidden_size": None, "decoder_start_token_id": None, "diversity_penalty": 0.0,
  "do_sample": False, "dropout": 0.0, "early_stopping": False,
  "encoder_no_repeat_ngram_size": 0, "eos_token_id": None, "finetuning_task": None,
  "forced_bos_token_id": None, "forced_eos_token_id": None,
  "id2label": {"0": "LABEL_0", "1": "LABEL_1"}, "initializer_factor": 1.0,
  "initializer_range": 0.02, "is_decoder": False, "is_encoder_decoder": False,
  "label2id": {"LABEL_0": 0, "LABEL_1": 1}, "length_penalty": 1.0, "max_length": 20,
  "min_length": 0, "no_repeat_ngram_size": 0, "num_beam_groups": 1, "num_beams": 1,
  "num_return_sequences": 1, "output_attentions": False, "output_hidden_states": False,
  "output_scores": False, "pad_token_id": None, "prefix": None, "problem_type": None,
  "projection_dim": 512, "pruned_heads": {}, "remove_invalid_values": False,
  "repetition_penalty": 1.0, "return_dict": True, "return_dict_in_generate": False,
  "sep_token_id": None, "task_specific_params": None, "temperature": 1.0,
  "tie_encoder_decoder": False, "tie_word_embeddings": True, "tokenizer_class": None,
  "top_k": 50, "top_p": 1.0, "torch_dtype": None, "torchscript": False,
  "transformers_version": "4.16.0.dev0", "typical_p": 1.0, "use_bfloat16": False,
}  # fmt: skip


def test_fields_that_older_versions_wrote(tmp_path):
  """Settings of text generation in both towers, and empty `*_config_dict`."""
  folder = unpack("hf", tmp_path)
  content = json.loads((folder / "config.json").read_text())
  for tower in ("text", "vision"):
    content[f"{tower}_config"] |= GENERIC
    content[f"{tower}_config_dict"] = None
  content["text_config"] |= {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
  (folder / "config.json").write_text(json.dumps(content))
  assert clip_file.load(folder)[0].text_heads == 4
  content["vision_config"]["of_a_later_version"] = None  # which sets nothing
  (folder / "config.json").write_text(json.dumps(content))
  clip_file.load(folder)
  content["vision_config"]["pruned_heads"] = {"0": [1]}
  (folder / "config.json").write_text(json.dumps(content))
  one_line("vision_config.pruned_heads is", clip_file.load, folder)


def test_smaller_vocabularies(tmp_path, state):
  state["token_embedding.weight"] = np.zeros((30522, 6), np.float32)
  path = write_state(tmp_path / "bert.pt", state)
  one_line("expected the 49408 tokens of CLIP's tokenizer, got 30522", clip_file.load, path)


def changed(path: pathlib.Path, *keys: str, value: object) -> None:
  """Sets an entry of a JSON file; None removes it."""
  content = json.loads(path.read_text())
  section = content
  for key in keys[:-1]:
    section = section.setdefault(key, {})
  section[keys[-1]] = value
  if value is None:
    del section[keys[-1]]
  path.write_text(json.dumps(content))


@pytest.mark.parametrize(
  ("keys", "value", "match"),
  [
    (["model_type"], None, "model_type is None, not 'clip'"),
    (["model_type"], "bert", "model_type is 'bert'"),
    (["vision_config"], None, "expected patch_size 8 as in .* got 32|expected embed_dim|vision_"),
    (["projection_dim"], 16, "expected embed_dim 8 .* got 16 from .*config.json"),
    (["vision_config", "hidden_size"], 32, "expected vision_width 16 .* got 32"),
    (["vision_config", "intermediate_size"], 78, "expected vision_mlp_width 64 .* got 78"),
    (["text_config", "intermediate_size"], 39, "intermediate_size is 39, CLIP's is 32"),
    (["vision_config", "num_hidden_layers"], 3, "expected vision_layers 2 .* got 3"),
    (["vision_config", "patch_size"], 16, "expected patch_size 8 .* got 16"),
    (["vision_config", "image_size"], [16, 8], "not square"),
    (["vision_config", "num_channels"], 4, "num_channels is 4"),
    (["vision_config", "rotary"], True, "vision_config.rotary = 'True' is not known"),
    (["text_config", "model_type"], "t5", "text_config.model_type is 't5'"),
    (["text_config", "max_position_embeddings"], 77, "expected context_length 8 .* got 77"),
    (["text_config", "num_attention_heads"], "4", "integer from 1"),
    (["text_config", "layer_norm_eps"], "small", "layer_norm_eps is 'small'"),
    (["text_config"], [1], "malformed|no object"),
    (["quantization_config"], {"bits": 4}, "quantization_config = .* is not known"),
  ],
)
def test_configs_of_something_else(keys, value, match, tmp_path):
  folder = unpack("hf", tmp_path)
  changed(folder / "config.json", *keys, value=value)
  one_line(match, clip_file.load, folder)


def test_a_config_of_another_program(tmp_path):
  folder = unpack("hf", tmp_path)
  for content, match in (
    ("{}", "model_type is None"),
    ('{"optimizer": "adam"}', "model_type is None"),
    ("[]", "expected a JSON object"),
  ):
    (folder / "config.json").write_text(content)
    one_line(match, clip_file.load, folder)
  folder = unpack("openclip", tmp_path)
  for file in folder.glob("*.safetensors"):
    file.unlink()
  (folder / "open_clip_config.json").write_text("{}")
  one_line("no vision_cfg and text_cfg", clip_file.load, folder)


@pytest.mark.parametrize(
  ("keys", "value", "match"),
  [
    (["image_mean"], [0.5], "three numbers for mean"),
    (["image_std"], [0.5, 0.5, 0], "std above 0"),
    (["do_rescale"], False, "do_rescale is False"),
    (["do_normalize"], False, "do_normalize is False"),
    (["rescale_factor"], 1 / 127.5, "rescale_factor is"),
    (["resample"], 2, "resample is 2, CLIP's is 3"),
    (["size"], {"shortest_edge": 18}, "size is {'shortest_edge': 18}"),
    (["size"], {"shortest_edge": 16}, "do_center_crop is False"),
    (["pad"], 3, "images.pad = '3' is not known"),
  ],
)
def test_images_of_another_kind(keys, value, match, tmp_path):
  folder = unpack("hf_half", tmp_path)
  changed(folder / "preprocessor_config.json", *keys, value=value)
  one_line(match, clip_file.load, folder)


def test_images_told_beside_other_files(tmp_path):
  """In a folder of open_clip whose config leaves them out, and under `image_processor`."""
  folder = unpack("openclip", tmp_path)
  config = json.loads((folder / "open_clip_config.json").read_text())
  del config["preprocess_cfg"]
  (folder / "open_clip_config.json").write_text(json.dumps(config))
  assert clip_file.load(folder)[0].mean is None
  half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": 16, "crop_size": 16}
  (folder / "processor_config.json").write_text(json.dumps({"image_processor": half}))
  config = clip_file.load(folder)[0]
  assert config.mean == config.std == (0.5, 0.5, 0.5) and not config.squash


def words() -> dict[str, int]:
  model = tokenizer._model()
  return {model.id_to_token(i): i for i in range(tokenizer.VOCAB_SIZE)}


def test_tokenizers(tmp_path):
  folder = unpack("hf", tmp_path)
  lower = {"type": "Sequence", "normalizers": [{"type": "Lowercase"}]}
  own = words()
  assert publisher.digest(own) == publisher.CLIP_WORDS
  swapped = {**own, "a</w>": own["b</w>"], "b</w>": own["a</w>"]}

  def whole(vocab, normalizer=lower, kind="BPE"):
    return {"normalizer": normalizer, "model": {"type": kind, "vocab": vocab}}

  for name, content, match in (
    ("tokenizer.json", whole(own), None),
    ("tokenizer.json", whole(swapped), "got BPE of 49408 words"),
    ("tokenizer.json", whole(own, None), "got BPE of 49408 words"),
    ("tokenizer.json", whole([["<pad>", 0.0]], None, "Unigram"), "got Unigram of 1 words"),
    ("tokenizer.json", whole({str(i) * 30: i for i in range(99999)}), "more than 8 MiB"),
    ("tokenizer.json", {}, "got None of 0 words"),
    ("tokenizer.json", {"model": {"vocab": True}}, "got None of 0 words"),
    ("vocab.json", own, None),
    ("vocab.json", swapped, "another vocabulary"),
    ("tokenizer_config.json", {"tokenizer_class": "CLIPTokenizer"}, None),
    ("tokenizer_config.json", {"do_lower_case": True, "model_max_length": 77}, None),
    ("tokenizer_config.json", {"tokenizer_class": "XLMRobertaTokenizer"}, "XLMRobertaTokenizer"),
  ):
    (folder / name).write_text(json.dumps(content))
    if match:
      one_line(f"expected CLIP's tokenizer in .*{match}", clip_file.load, folder)
    else:
      clip_file.load(folder)
    (folder / name).unlink()


def test_what_a_file_tells_is_not_overridden(tmp_path):
  folder = unpack("openclip_script", tmp_path)
  for passed, match in (
    ({"activation": "gelu"}, "expected activation 'quick_gelu' as in .* got 'gelu' from what was"),
    ({"vision_heads": 4}, "expected vision_heads 2"),
  ):
    one_line(match, clip_file.load, folder / "model.pt", passed)
  clip_file.load(folder / "model.pt", {"activation": "quick_gelu", **HEADS})
