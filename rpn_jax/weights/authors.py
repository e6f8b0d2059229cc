"""Checkpoints of the authors' RPN (`liblacklucy/RPN`), both ways."""

import collections
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from rpn_jax.base.errors import InputError
from rpn_jax.models.clip import CLIPConfig, resize_positions
from rpn_jax.weights.clip_file import check_tree, make_config, read_architecture
from rpn_jax.weights.names import AUTHORS, AUTHORS_PROMPTS, clip_rules, to_ours, to_theirs

# In the release's state dict, but no computation of it reads them.
AUTHORS_UNUSED = ("prompt_norm.weight", "prompt_norm.bias")


# --- The authors' release -------------------------------------------------------------------------


def from_authors(state: Mapping[str, np.ndarray], where: str = "the authors' state") -> tuple:
  """Trees from the state dict of the authors' segmentor (`liblacklucy/RPN`).

  Args:
    state: arrays by the release's names; entries in AUTHORS_UNUSED are left out.
    where: the file it comes from, for messages.

  Returns:
    CLIP parameters (without the logit scale, which the release does not keep) and the `prompts`
    collection of the released form.

  Raises:
    InputError: an array is missing, unknown or misshapen.
  """
  fields = read_architecture(state, AUTHORS, where)
  # Heads change no shape, and the release's state dict does not tell them.
  heads = {"vision_heads": 1, "text_heads": 1}
  config = make_config(fields, {**heads, "activation": "quick_gelu"}, where)
  rules = clip_rules(AUTHORS, config.vision_layers, config.text_layers)
  split = len(rules)
  rules += AUTHORS_PROMPTS
  used = {name: value for name, value in state.items() if name not in AUTHORS_UNUSED}
  flat = to_ours(rules, used, where)
  clip = {rule.ours: flat[rule.ours] for rule in rules[:split]}
  prompts = {rule.ours: flat[rule.ours] for rule in rules[split:]}
  check_tree(config, {**clip, "logit_scale": np.float32(0)}, where)
  _check_released_prompts(config, prompts, where)
  unflatten = traverse_util.unflatten_dict
  return unflatten(clip, sep="/"), unflatten(prompts, sep="/")


def _check_released_prompts(config: CLIPConfig, prompts: Mapping, where: str) -> None:
  layers, width, joint = config.vision_layers, config.vision_width, config.embed_dim
  # None: free, the number of deep tokens and of patch tokens.
  shapes = collections.defaultdict(lambda: (joint,))
  shapes.update(
    {
      "deep_tokens": (layers, None, width),
      "h": (None, width),
      "prompt_proj/kernel": (width, width),
      "prompt_proj/bias": (width,),
      "prompt_norm/scale": (width,),
      "prompt_norm/bias": (width,),
      "head/patch_proj/kernel": (joint, joint),
      "head/text_proj/kernel": (joint, joint),
      "head/text_reduce/kernel": (2 * joint, joint),
    }
  )
  for path, value in prompts.items():
    want = shapes[path]
    if value.ndim != len(want) or any(w not in (None, n) for w, n in zip(want, value.shape)):
      raise InputError(
        f"expected {path} with shape {want} (None: any), got {value.shape} in {where}: "
        "the file is damaged or of another architecture"
      )


def to_authors_prompts(prompts) -> dict[str, np.ndarray]:
  """The `prompts` tree of the released form, or a tree shaped like it, by the authors' names.

  Raises:
    InputError: the tree is of another form (per-layer h, M2oE), which has no names there.
  """
  flat = traverse_util.flatten_dict(prompts, sep="/")
  return to_theirs(AUTHORS_PROMPTS, flat, "the prompts tree")


def same_towers(theirs: Mapping, clip: Mapping, where: str) -> None:
  """The release resizes the positions of its image tower; all else is CLIP's own."""
  theirs, clip = (traverse_util.flatten_dict(tree, sep="/") for tree in (theirs, clip))
  for name, value in theirs.items():
    want = clip.get(name)
    if name == "visual/position_embedding" and want is not None and want.shape != value.shape:
      side = round((len(value) - 1) ** 0.5)
      want = np.asarray(resize_positions(jnp.asarray(want), side, side))
    # OpenAI's weights are float16, which a checkpoint of float32 holds exactly.
    if want is None or want.shape != value.shape or not np.allclose(want, value, atol=1e-4):
      raise InputError(
        f"expected one CLIP in {where}, {name} differs: pass the weights that were trained around"
      )
