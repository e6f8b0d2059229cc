"""Rule tables between our parameter paths and the names in other people's files.

Ours are '/'-joined paths of the parameter tree. Every name on both sides has to be used once.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

import numpy as np

from rpn_jax.base.errors import InputError
from rpn_jax.weights.arrays import check_float

# How an array of theirs becomes ours: the order of its axes. PyTorch multiplies by the transpose.
LAYOUTS = {
  "same": None,
  "linear": (1, 0),  # (out, in) -> (in, out)
  "conv": (2, 3, 1, 0),  # (out, in, height, width) -> (height, width, in, out)
  "transposed": (0, 2, 3, 1),  # (in, out, height, width) -> (in, height, width, out)
}


class Rule(NamedTuple):
  """One array: its path in our tree, its name in their file, how its axes change (LAYOUTS)."""

  ours: str
  theirs: str
  layout: str = "same"

  def under(self, ours: str, theirs: str) -> "Rule":
    """The same rule with both names behind a prefix."""
    return Rule(ours + self.ours, theirs + self.theirs, self.layout)


def norm(ours: str, theirs: str) -> tuple[Rule, ...]:
  return (Rule(f"{ours}/scale", f"{theirs}.weight"), Rule(f"{ours}/bias", f"{theirs}.bias"))


def linear(ours: str, theirs: str, separator: str = ".") -> tuple[Rule, ...]:
  return (
    Rule(f"{ours}/kernel", f"{theirs}{separator}weight", "linear"),
    Rule(f"{ours}/bias", f"{theirs}{separator}bias"),
  )


# OpenAI's names, within a block and within a tower. `text_projection` and `proj` are bare matrices
# that multiply from the right, as ours do.
_BLOCK = (
  *norm("ln_1", "ln_1"),
  *linear("attn/in_proj", "attn.in_proj", "_"),
  *linear("attn/out_proj", "attn.out_proj"),
  *norm("ln_2", "ln_2"),
  *linear("mlp/c_fc", "mlp.c_fc"),
  *linear("mlp/c_proj", "mlp.c_proj"),
)
_VISION = (
  Rule("patch_embed/kernel", "conv1.weight", "conv"),
  Rule("class_embedding", "class_embedding"),
  Rule("position_embedding", "positional_embedding"),
  *norm("ln_pre", "ln_pre"),
  *norm("ln_post", "ln_post"),
  Rule("proj", "proj"),
)
_TEXT = (
  Rule("token_embedding", "token_embedding.weight"),
  Rule("position_embedding", "positional_embedding"),
  *norm("ln_final", "ln_final"),
  Rule("projection", "text_projection"),
)

# The trained arrays of the official RPN code; ours are paths in the `prompts` collection.
AUTHORS_PROMPTS = (
  Rule("deep_tokens", "backbone.deep_prompt_embeddings"),
  *linear("prompt_proj", "backbone.prompt_proj"),
  *norm("prompt_norm", "backbone.prompt_norm"),
  Rule("h", "prompt_proj"),
  *linear("head/patch_proj", "decode_head.vis_proj_1"),
  *norm("head/patch_norm", "decode_head.vis_norm_1"),
  *linear("head/text_proj", "decode_head.cls_proj_1"),
  *norm("head/text_norm", "decode_head.tex_norm_1"),
  *linear("head/text_reduce", "decode_head.cls_proj"),
)


class Naming(NamedTuple):
  """Prefixes of the two towers in a family of files, and the logit scale's name if it is there."""

  vision: str
  text: str
  logit_scale: str | None


OPENAI = Naming("visual.", "", "logit_scale")
AUTHORS = Naming("backbone.", "text_encoder.", None)

# Hugging Face's names of the same arrays: (pattern, OpenAI's name). What stands behind a slash is
# not part of the name: T is to be transposed; q, k and v are one array in OpenAI's files.
_HF_BLOCK = (  # group 1 is the number of the block
  (r"layer_norm(\d)\.(weight|bias)", r"ln_\2.\3"),
  (r"self_attn\.out_proj\.(weight|bias)", r"attn.out_proj.\2"),
  (r"self_attn\.([qkv])_proj\.(weight|bias)", r"attn.in_proj_\3/\2"),
  (r"mlp\.fc1\.(weight|bias)", r"mlp.c_fc.\2"),
  (r"mlp\.fc2\.(weight|bias)", r"mlp.c_proj.\2"),
)
_HF = (
  ("logit_scale", "logit_scale"),
  (r"visual_projection\.weight", "visual.proj/T"),
  (r"text_projection\.weight", "text_projection/T"),
  (r"vision_model\.embeddings\.class_embedding", "visual.class_embedding"),
  (r"vision_model\.embeddings\.patch_embedding\.weight", "visual.conv1.weight"),
  (r"vision_model\.embeddings\.position_embedding\.weight", "visual.positional_embedding"),
  (r"vision_model\.pre_layrnorm\.(weight|bias)", r"visual.ln_pre.\1"),  # their spelling
  (r"vision_model\.post_layernorm\.(weight|bias)", r"visual.ln_post.\1"),
  (r"text_model\.embeddings\.token_embedding\.weight", "token_embedding.weight"),
  (r"text_model\.embeddings\.position_embedding\.weight", "positional_embedding"),
  (r"text_model\.final_layer_norm\.(weight|bias)", r"ln_final.\1"),
  *(
    (
      rf"{tower}_model\.encoder\.layers\.(\d+)\.{theirs}",
      rf"{prefix}transformer.resblocks.\1.{ours}",
    )
    for tower, prefix in (("vision", "visual."), ("text", ""))
    for theirs, ours in _HF_BLOCK
  ),
)


def clip_rules(naming: Naming, vision_layers: int, text_layers: int) -> list[Rule]:
  """The full table of a CLIP model in one family of files."""
  rules = []
  for ours, theirs, tower, layers in (
    ("visual/", naming.vision, _VISION, vision_layers),
    ("text/", naming.text, _TEXT, text_layers),
  ):
    rules += [rule.under(ours, theirs) for rule in tower]
    for i in range(layers):
      rules += [
        rule.under(f"{ours}block_{i}/", f"{theirs}transformer.resblocks.{i}.") for rule in _BLOCK
      ]
  if naming.logit_scale:
    rules.append(Rule("logit_scale", naming.logit_scale))
  return rules


def from_hf(state: Mapping[str, np.ndarray], where: str) -> dict[str, np.ndarray]:
  """The state of a `CLIPModel` of Hugging Face's transformers by OpenAI's names.

  Raises:
    InputError: an unknown name, or queries, keys and values that do not fit.
  """
  renamed = {}
  for name, value in state.items():
    if name.endswith("embeddings.position_ids"):  # 0, 1, 2, … in older files
      continue
    new = _hf_name(name)
    if new is None:
      raise InputError(
        f"expected the arrays of a CLIPModel of transformers, {name!r} is unknown in {where}"
        f"{other_model(state)}: use the complete, unchanged file of such a model"
      )
    if new.endswith("/T"):
      if value.ndim != 2:
        raise InputError(
          f"expected {name!r} with 2 axes, got shape {value.shape} in {where}: the file is damaged"
        )
      new, value = new.removesuffix("/T"), value.T
    renamed[new] = value
  joined = {}
  for name, value in renamed.items():
    base, slash, part = name.rpartition("/")
    if not slash:
      joined[name] = value
    elif part == "q":
      names = [f"{base}/{letter}" for letter in "qkv"]
      parts = [renamed[name] for name in names if name in renamed]
      if len(parts) < 3 or any(x.shape != value.shape or not x.ndim for x in parts):
        raise InputError(
          f"expected queries, keys and values of one shape for {base!r} in {where}: the file is "
          "damaged"
        )
      joined[base] = np.concatenate(parts)
  return joined


# Names that only other models have.
_OTHER_MODELS = (
  (r"vision_model\.head\.", "SigLIP"),
  (r"text_model\.roberta\.", "AltCLIP"),
  (r"text_decoder\.", "BLIP or CoCa"),
  (r"text_model\.encoder\.layer\.", "a text tower of BERT, as in ChineseCLIP and BLIP"),
  (r"decode_head\.", "a segmentor of mmseg that is not the authors' RPN"),
  (r"(visual|backbone)\.layer1\.", "a ResNet"),
  (r"visual\.trunk\.", "an image tower of timm"),
  (r"visual\.blocks\.", "EVA-CLIP"),
  (r"positional_embedding_res", "Long-CLIP"),
  (r"visual\.conv1_alpha\.", "Alpha-CLIP"),
  (r"blocks\.", "an image tower alone"),
  (r"image_encoder\.", "MobileCLIP"),
)


def other_model(state: Collection[str]) -> str:
  """What names tell of a model that is no CLIP ViT, for the middle of a message; "" if nothing."""
  for pattern, kind in _OTHER_MODELS:
    if any(re.match(pattern, name) for name in state):
      return f" ({kind})"
  return ""


def _hf_name(name: str) -> str | None:
  for pattern, new in _HF:
    if match := re.fullmatch(pattern, name):
      return match.expand(new)
  return None


def unwrapped(state: Mapping[str, np.ndarray], where: str) -> dict[str, np.ndarray]:
  """The state without what trainings add: prefixes in any order, an axis of the logit scale.

  Raises:
    InputError: the bias of a sigmoid loss.
  """
  prefixes = ("module.", "_orig_mod.")  # of DDP and of torch.compile
  while state and (found := [x for x in prefixes if all(name.startswith(x) for name in state)]):
    state = {name.removeprefix(found[0]): value for name, value in state.items()}
  if "logit_bias" in state:
    raise InputError(
      f"expected a CLIP, {where} has a logit_bias, as SigLIP and others with a sigmoid loss have: "
      "use weights that were trained with CLIP's loss"
    )
  if (scale := state.get("logit_scale")) is not None and scale.shape == (1,):
    state = {**state, "logit_scale": scale.reshape(())}
  return dict(state)


def from_openclip(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """The state by OpenAI's names, without the prefix of open_clip's newer models."""
  if "text.text_projection" in state:
    return {name.removeprefix("text."): value for name, value in state.items()}
  return state


def to_ours(rules: Iterable[Rule], state: Mapping[str, np.ndarray], where: str) -> dict:
  """Our flat arrays from theirs, views in the stored types: every name is used exactly once.

  Raises:
    InputError: a name is missing or unknown, or an array has another rank than its rule needs.
  """
  rules = list(rules)
  check_same_names({rule.theirs for rule in rules}, state, where)
  flat = {}
  for rule in rules:
    value, axes = np.asarray(state[rule.theirs]), LAYOUTS[rule.layout]
    if axes and value.ndim != len(axes):
      raise InputError(
        f"not a CLIP ViT checkpoint: expected {rule.theirs!r} with {len(axes)} axes, got shape "
        f"{value.shape} in {where}; use another file"
      )
    check_float(value, rule.theirs, where)
    flat[rule.ours] = np.transpose(value, axes) if axes else value
  return flat


def to_theirs(rules: Iterable[Rule], flat: Mapping[str, np.ndarray], where: str) -> dict:
  """The inverse of `to_ours`, types unchanged.

  Raises:
    InputError: a path is missing or unknown.
  """
  rules = list(rules)
  check_same_names({rule.ours for rule in rules}, flat, where)
  state = {}
  for rule in rules:
    value, axes = np.asarray(flat[rule.ours]), LAYOUTS[rule.layout]
    state[rule.theirs] = np.transpose(value, np.argsort(axes)) if axes else value
  return state


def check_same_names(wanted: set[str], got: Collection[str], where: str) -> None:
  """Raises an InputError with the first name that is missing or unknown."""
  for what, names in (("missing", wanted - set(got)), ("unknown", set(got) - wanted)):
    if names:
      first = sorted(names)[0]
      more = f" and {len(names) - 1} more" if len(names) > 1 else ""
      raise InputError(
        f"expected the {len(wanted)} arrays of this kind of model, {first!r}{more} {what} in "
        f"{where}{other_model(got)}: use its complete, unchanged file"
      )
