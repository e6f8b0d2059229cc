"""What tells of CLIP weights what no shape does: the files that their publisher put beside them.

`config.json` and `preprocessor_config.json` of transformers, `open_clip_config.json`, the files of
a tokenizer, and the module of a TorchScript archive. A field that is read is followed if this
project's CLIP can do so; one that asks for another computation is refused, and so is one that is
not known, by name.
"""

import hashlib
import pathlib
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from rpn_jax.base.errors import InputError
from rpn_jax.weights import torch_archive, torch_code
from rpn_jax.weights.arrays import WeightsFile, read_json

CLIP_TOKENS = 49408
# SHA-256 of the words of CLIP's tokenizer in the order of their ids, one a line.
CLIP_WORDS = "7cccc44d334555d1ff3c0ac5f0246b428fab2918383e77ee745cf30d41010b78"
ACTIVATIONS = ("quick_gelu", "gelu")
EPSILON = 1e-5


class Told(NamedTuple):
  """Fields of CLIPConfig, and the file that tells them."""

  fields: dict[str, Any]
  source: str


class _Other(ValueError):
  """This project's CLIP computes something else than what is asked for."""


def read(file: WeightsFile, hf: bool) -> Told:
  """The fields of CLIPConfig that stand in or beside a file of weights.

  Args:
    file: the weights.
    hf: whether they have the names of Hugging Face's transformers.

  Raises:
    InputError: a model that this project's CLIP does not compute, or another tokenizer.
  """
  folder = file.path.parent
  if file.kind == torch_archive.TORCHSCRIPT:
    return Told(_settled(file.path, _from_module, file.attributes, file.path), str(file.path))
  config = folder / ("config.json" if hf else "open_clip_config.json")
  fields = {}
  if config.is_file():
    fields = _settled(config, _from_hf if hf else _from_openclip, read_json(config))
  _check_tokenizer(folder)
  for name in ("preprocessor_config.json", "processor_config.json"):
    if (folder / name).is_file() and fields.get("mean") is None:
      fields |= _settled(folder / name, _images_from_hf, read_json(folder / name), fields)
  return Told(fields, str(config))


def _settled(path: pathlib.Path, reader, *arguments) -> dict[str, Any]:
  try:
    return reader(*arguments)
  except (_Other, TypeError, AttributeError, ValueError, ArithmeticError, KeyError) as error:
    reason = str(error)[:300] if isinstance(error, _Other) else f"it is malformed ({error})"
    # A file beside the weights may be there by chance.
    remedy = ", or move it if it does not belong to them" if path.suffix == ".json" else ""
    raise InputError(
      f"expected a CLIP that this project computes in {path}, {reason}: use other weights{remedy}"
    ) from None


def _take(
  section: str,
  content: Mapping,
  compared: Mapping[str, tuple[str, Any]],
  fixed: Mapping[str, Collection],
  free: Collection[str],
) -> dict[str, Any]:
  """Fields of CLIPConfig from a section of a config.

  Args:
    section: its name, for messages.
    content: the section.
    compared: their name -> (our name, their default).
    fixed: their name -> the values that ask for what CLIP computes.
    free: names that change nothing in the features of a trained model.
  """
  if not isinstance(content, Mapping):
    raise _Other(f"its {section} is no object")
  for name, allowed in fixed.items():
    if name in content and content[name] not in allowed:
      raise _Other(f"its {section}.{name} is {content[name]!r}, CLIP's is {next(iter(allowed))!r}")
  told = {name for name, value in content.items() if value is not None}
  if unknown := sorted(told - {*compared} - {*fixed} - {*free}):
    raise _Other(f"its {section}.{unknown[0]} = {str(content[unknown[0]])[:60]!r} is not known")
  found = {ours: content.get(theirs, default) for theirs, (ours, default) in compared.items()}
  for name in ("image_size", "patch_size"):
    if isinstance(value := found.get(name), (list, tuple)):
      if len(set(value)) != 1:
        raise _Other(f"its {section}.{name} is {list(value)}, not square")
      found[name] = value[0]
  return found


# transformers: (our name, the default of its CLIPVisionConfig or CLIPTextConfig).
_HF_COMPARED = {
  "vision": {
    "hidden_size": ("vision_width", 768),
    "num_hidden_layers": ("vision_layers", 12),
    "num_attention_heads": ("vision_heads", 12),
    "intermediate_size": ("vision_mlp_width", 3072),
    "image_size": ("image_size", 224),
    "patch_size": ("patch_size", 32),
    "hidden_act": ("activation", "quick_gelu"),
  },
  "text": {
    "vocab_size": ("vocab_size", CLIP_TOKENS),
    "hidden_size": ("text_width", 512),
    "num_hidden_layers": ("text_layers", 12),
    "num_attention_heads": ("text_heads", 8),
    "max_position_embeddings": ("context_length", 77),
    "hidden_act": ("activation", "quick_gelu"),
  },
}
_NONE: tuple = (None, False, {}, [])
_HF_FIXED: dict[str, Collection] = {
  "layer_norm_eps": (EPSILON,),
  "hidden_act": ACTIVATIONS,
  "is_decoder": _NONE,
  "is_encoder_decoder": _NONE,
  "add_cross_attention": _NONE,
  "cross_attention_hidden_size": _NONE,
  "pruned_heads": _NONE,
}
# Training, storage, and settings of text generation that older versions wrote into every config.
_HF_FREE = {
  *"""
  _attn_implementation _attn_implementation_autoset _commit_hash _name_or_path architectures
  attention_dropout attn_implementation bad_words_ids begin_suppress_tokens bos_token_id
  chunk_size_feed_forward decoder_start_token_id diversity_penalty do_sample dropout dtype
  early_stopping encoder_no_repeat_ngram_size eos_token_id exponential_decay_length_penalty
  finetuning_task forced_bos_token_id forced_eos_token_id gradient_checkpointing id2label
  initializer_factor initializer_range label2id length_penalty logit_scale_init_value max_length
  min_length name_or_path no_repeat_ngram_size num_beam_groups num_beams num_labels
  num_return_sequences output_attentions output_hidden_states output_scores pad_token_id prefix
  problem_type projection_dim remove_invalid_values repetition_penalty return_dict
  return_dict_in_generate sep_token_id suppress_tokens task_specific_params temperature
  tf_legacy_loss tie_encoder_decoder tie_word_embeddings tokenizer_class top_k top_p torch_dtype
  torchscript transformers_version typical_p use_bfloat16 use_cache
  """.split()  # noqa: SIM905
}


def _from_hf(content: Mapping) -> dict[str, Any]:
  kind = content.get("model_type")
  if kind != "clip":
    raise _Other(f"its model_type is {kind!r}, not 'clip'")
  sections = {"model_type", "text_config", "vision_config", "text_config_dict"}
  free = _HF_FREE | sections | {"vision_config_dict"}
  fields = _take("config", content, {"projection_dim": ("embed_dim", 512)}, {}, free)
  for tower, own in (("vision", {"num_channels": (3,)}), ("text", {})):
    section = content.get(f"{tower}_config") or {}
    compared = _HF_COMPARED[tower]
    older = content.get(f"{tower}_config_dict")
    defaults: dict[str, Any] = {name: value for name, (_, value) in compared.items()}
    defaults |= {"intermediate_size": 4 * defaults["hidden_size"], "layer_norm_eps": EPSILON}
    if older is not None:  # it wins, and so do the defaults of what it leaves out
      section = {**section, **defaults, **older}
    section = {**defaults, **section}
    fixed = {**_HF_FIXED, **own, "model_type": (f"clip_{tower}_model",)}
    if tower == "text":
      fixed["intermediate_size"] = (4 * section["hidden_size"],)
      # Features are read at the largest id, which END is; transformers calls that 2 for old models.
      fixed["eos_token_id"] = (min(section["vocab_size"], CLIP_TOKENS) - 1, 2)
    found = _take(f"{tower}_config", section, compared, fixed, _HF_FREE)
    if fields.setdefault("activation", found["activation"]) != found["activation"]:
      raise _Other(f"its towers have the activations {fields['activation']}, {found['activation']}")
    fields |= found
  return fields


def _images_from_hf(content: Mapping, told: Mapping) -> dict[str, Any]:
  content = content.get("image_processor", content)
  side = told.get("image_size")
  size, crop = content.get("size", {"shortest_edge": side}), content.get("crop_size", side)
  squash = isinstance(size, Mapping) and "height" in size
  square: tuple = (side, {"height": side, "width": side})
  yes = (True, None)
  fixed: dict[str, Collection] = {
    "do_resize": yes, "do_rescale": yes, "do_normalize": yes, "use_square_size": _NONE,
    "do_pad": _NONE, "resample": (3, None), "rescale_factor": (1 / 255, None),
    "size": (side, {"shortest_edge": side}, {"height": side, "width": side}),
    "do_center_crop": (True, False, None) if squash else yes,
  }  # fmt: skip
  if side is None:  # no config.json tells: the arrays do, and the size is the archive's own matter
    del fixed["size"]
  elif content.get("do_center_crop") is not False and crop not in square:
    raise _Other(f"its images are cropped to {crop}, the model's are {side} pixels wide")
  free = {
    "crop_size", "data_format", "default_to_square", "device", "disable_grouping",
    "feature_extractor_type", "image_processor_type", "input_data_format", "pad_size",
    "do_convert_rgb", "processor_class", "return_tensors", "size", "_valid_processor_keys",
  }  # fmt: skip
  compared = {"image_mean": ("mean", None), "image_std": ("std", None)}
  return {**_take("images", content, compared, fixed, free), "squash": squash}


# open_clip: (our name, the default of its CLIPVisionCfg or CLIPTextCfg).
_OPENCLIP_COMPARED = {
  "vision_cfg": {
    "width": ("vision_width", 768),
    "layers": ("vision_layers", 12),
    "patch_size": ("patch_size", 16),
    "image_size": ("image_size", 224),
  },
  "text_cfg": {
    "context_length": ("context_length", 77),
    "vocab_size": ("vocab_size", CLIP_TOKENS),
    "width": ("text_width", 512),
    "heads": ("text_heads", 8),
    "layers": ("text_layers", 12),
  },
}
_OPENCLIP_BOTH: dict[str, Collection] = {
  "ls_init_value": _NONE,
  "act_kwargs": (None, {}, {"approximate": "none"}),
  "norm_kwargs": (None, {}, {"eps": EPSILON}),
  "final_ln_after_pool": _NONE,
  "block_type": (None, "default"),
  **dict.fromkeys(
    ("qk_norm", "scaled_cosine_attn", "scale_heads", "scale_attn_inner", "scale_attn", "scale_fc"),
    _NONE,
  ),
}
_OPENCLIP_FIXED: dict[str, dict[str, Collection]] = {
  "vision_cfg": {
    "timm_model_name": _NONE,
    "attentional_pool": _NONE,
    "global_average_pool": _NONE,
    "input_patchnorm": _NONE,
    "no_ln_pre": _NONE,
    "pool_type": ("tok",),
    **_OPENCLIP_BOTH,
  },
  "text_cfg": {
    "hf_model_name": _NONE,
    "tokenizer_mode": _NONE,
    "tokenizer_kwargs": _NONE,
    "embed_cls": _NONE,
    "no_causal_mask": _NONE,
    "pool_type": ("argmax",),
    "proj_type": ("linear",),
    "proj_bias": _NONE,
    "mlp_ratio": (4,),
    **_OPENCLIP_BOTH,
  },
}
_OPENCLIP_FREE = {
  # The positions are stored, learned or not. The poolers' settings matter with a pooler only.
  "vision_cfg": {
    "head_width", "mlp_ratio", "patch_dropout", "output_tokens", "pos_embed_type",
    "attn_pooler_queries", "attn_pooler_heads", "n_queries", "timm_model_pretrained",
    "timm_pool", "timm_proj", "timm_proj_bias", "timm_drop", "timm_drop_path",
  },
  "text_cfg": {
    "hf_tokenizer_name", "pad_id", "eos_id", "output_tokens", "hf_model_pretrained",
    "hf_proj_type", "hf_pooler_type",
  },
}  # fmt: skip
_OPENCLIP_TOP: dict[str, Collection] = {
  "multimodal_cfg": _NONE,
  "init_logit_bias": _NONE,
  "quick_gelu": (False, True, None),
}


def _from_openclip(content: Mapping) -> dict[str, Any]:
  model = content.get("model_cfg", content)
  if not all(isinstance(model.get(x), Mapping) for x in ("vision_cfg", "text_cfg")):
    raise _Other("it has no vision_cfg and text_cfg")
  vision, text = model["vision_cfg"], model["text_cfg"]
  tokenizer = text.get("hf_tokenizer_name")
  for value, meaning in (
    (vision.get("timm_model_name"), "its image tower is {} of timm"),
    (text.get("hf_model_name"), "its text tower is {} of transformers"),
    (tokenizer, "its tokenizer is {}, not CLIP's"),
    (model.get("init_logit_bias"), "it has a logit bias of {}, as SigLIP has"),
    (model.get("multimodal_cfg") and "multimodal_cfg", "it is CoCa: it has a {}"),
  ):
    if value and not str(value).startswith("openai/clip-vit-"):
      raise _Other(meaning.format(str(value)[:60]))
  if isinstance(vision.get("layers"), list):
    raise _Other("its image tower is a ResNet")
  free = {"custom_text", "init_logit_scale", "nonscalar_logit_scale", "cast_dtype", "output_dict",
          "vision_cfg", "text_cfg", "preprocess_cfg"}  # fmt: skip
  fields = _take("model_cfg", model, {"embed_dim": ("embed_dim", None)}, _OPENCLIP_TOP, free)
  for tower, compared in _OPENCLIP_COMPARED.items():
    fields |= _take(tower, model[tower], compared, _OPENCLIP_FIXED[tower], _OPENCLIP_FREE[tower])
  fields["activation"] = "quick_gelu" if model.get("quick_gelu") else "gelu"
  fields["vision_heads"] = fields["vision_width"] // vision.get("head_width", 64)
  fields["vision_mlp_width"] = int(fields["vision_width"] * vision.get("mlp_ratio", 4))
  return {**fields, **_images_from_openclip(content.get("preprocess_cfg"), fields["image_size"])}


def _images_from_openclip(content: Mapping | None, side: object) -> dict[str, Any]:
  fixed: dict[str, Collection] = {
    "mode": ("RGB", None),
    "interpolation": ("bicubic", "random", None),
    "resize_mode": ("shortest", "squash", None),
    "size": (side, [side, side], [3, side, side], None),
  }
  content = content or {}
  compared = {"mean": ("mean", None), "std": ("std", None)}
  images = _take("preprocess_cfg", content, compared, fixed, {"fill_color"})
  return {**images, "squash": content.get("resize_mode") == "squash"}


def _check_tokenizer(folder: pathlib.Path) -> None:
  """Refuses weights beside a tokenizer that is not CLIP's.

  Raises:
    InputError: another tokenizer, by name.
  """
  words = None
  whole, listed, named = (
    folder / name for name in ("tokenizer.json", "vocab.json", "tokenizer_config.json")
  )
  if whole.is_file():
    beside, kind = whole, "one of more than 8 MiB"
    if whole.stat().st_size <= 8 << 20:
      content = read_json(whole)
      model = content.get("model")
      model = model if isinstance(model, dict) else {}
      vocabulary = model.get("vocab")
      count = len(vocabulary) if isinstance(vocabulary, (dict, list)) else 0
      kind = f"{model.get('type')} of {count} words"
      # CLIP's has this among its normalizers; without it other texts come out.
      words = vocabulary if "Lowercase" in str(content.get("normalizer")) else None
  elif listed.is_file():
    beside, kind, words = listed, "another vocabulary", read_json(listed)
  elif named.is_file():
    beside, kind = named, str(read_json(named).get("tokenizer_class"))
    if kind in ("CLIPTokenizer", "CLIPTokenizerFast", "None"):  # older files name no class
      return
  else:
    return
  if digest(words) != CLIP_WORDS:
    raise InputError(
      f"expected CLIP's tokenizer in {beside}, got {kind[:60]}: use other weights, or move it if "
      "it does not belong to them"
    )


def digest(words: object) -> str:
  """SHA-256 of a vocabulary {word: id}; "" for anything else."""
  if not isinstance(words, Mapping) or not all(type(x) is int for x in words.values()):
    return ""
  in_order = sorted(words, key=lambda word: words[word])
  if [words[word] for word in in_order] != list(range(len(words))):
    return ""
  return hashlib.sha256("\n".join(in_order).encode("utf-8", "replace")).hexdigest()


_MODULE_FIXED: dict[str, Collection] = {
  "pool_type": ("tok", "argmax"),
  "text_pool_type": ("argmax",),
  "attn_pool": _NONE,
  "global_average_pool": _NONE,
  "input_patchnorm": _NONE,
  "final_ln_after_pool": _NONE,
  "logit_bias": _NONE,
  "cls_emb": _NONE,
  "use_pad_mask": _NONE,
  "add_zero_attn": _NONE,
  "bias_k": _NONE,
  "bias_v": _NONE,
}


def _from_module(attributes: Mapping[str, object], path: pathlib.Path) -> dict[str, Any]:
  """From the attributes of a scripted module, which a traced one lacks, and the archive's code."""
  heads: dict[str, set] = {"vision_heads": set(), "text_heads": set()}
  for name, value in attributes.items():
    last = name.rpartition(".")[2]
    if name in ("attn_mask", "text.attn_mask") and value is None:
      raise _Other("its text tower has no causal mask")
    if last in _MODULE_FIXED and value not in _MODULE_FIXED[last]:
      raise _Other(f"its {name} is {value!r}, unlike CLIP's")
    if name == "visual.image_size" and isinstance(value, (tuple, list)) and len({*value}) != 1:
      raise _Other(f"its {name} is {list(value)}, not square")
    if last == "num_heads":
      heads["vision_heads" if name.startswith("visual.") else "text_heads"].add(value)
  fields: dict[str, Any] = {name: found.pop() for name, found in heads.items() if len(found) == 1}
  if any(heads.values()):
    raise _Other("the numbers of heads in its layers differ")
  code = torch_code.read(path)
  if code.tanh:
    raise _Other("its code has GELU by tanh, CLIP's is exact")
  if wrong := code.epsilons - {EPSILON}:
    raise _Other(f"its code has the epsilon {min(wrong)}, CLIP's is {EPSILON}")
  return fields | ({"activation": code.activation} if code.activation else {})
