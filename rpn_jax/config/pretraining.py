"""Pre-training of the tiny CLIPs: its fields, and which of their values go together."""

# ruff: noqa: RUF009 (`field` is a dataclasses.field)

import dataclasses

from ml_collections import config_dict

from rpn_jax.base import pixels
from rpn_jax.base.errors import InputError
from rpn_jax.base.fields import ABSENT, Config, field
from rpn_jax.base.words import check_known

# Token ids of CLIP's tokenizer.
VOCABULARY = 49408


@dataclasses.dataclass(frozen=True)
class Pretrain:
  """Pre-training of the tiny CLIP on captioned shapes."""

  task: str = field("pretrain", "what main.py runs", words=("pretrain",))
  seed: int = field(0, "for initial parameters and drawn images", at_least=0, at_most=1 << 62)
  scenes: str = field(
    "views",
    "captioned images: views of up to three large objects, or crowded with three to eight, all of "
    "which are named",
    words=("views", "crowded"),
  )
  steps: int = field(1500, "optimizer steps", at_least=1)
  batch_size: int = field(128, "image-caption pairs per step", at_least=2)
  kept_patches: float = field(
    0.5, "share of random patches the tower sees, until the last steps", above=0, at_most=1
  )
  unmasked_steps: int = field(
    200, "last steps, which see every patch; unless set, at most a sixth of config.steps",
    at_least=0,
  )  # fmt: skip
  learning_rate: float = field(1e-3, "peak of the cosine schedule", at_least=0)
  warmup_steps: int = field(
    100, "steps of linear warm-up from 0; unless set, at most a sixth of config.steps", at_least=0
  )
  weight_decay: float = field(0.05, "decoupled, on matrices only", at_least=0)
  template: str = field("a photo of a {}", "sentence of the zero-shot test")
  mean: tuple[float, float, float] = field(pixels.CLIP_MEAN, "subtracted per channel, in [0, 1]")
  std: tuple[float, float, float] = field(
    pixels.CLIP_STD, "divided by per channel, in [0, 1]", above=0
  )
  caption_tokens: int = field(
    32, "columns of the token batch; attention is causal, so padding only costs time", at_least=1
  )
  log_every: int = field(10, "steps between logged losses", at_least=1, free=True)
  eval_every: int = field(
    150, "steps between zero-shot tests, each with a checkpoint", at_least=1, free=True
  )
  test_images: int = field(480, "single-object images of the zero-shot test", at_least=1)
  clip: config_dict.ConfigDict = field(ABSENT, "architecture: the fields of CLIPConfig")


def check_pretraining(config: Config) -> None:
  """Refuses values that do not go together, of which a run would end late or mean something else.

  Raises:
    InputError: such a value; the message has the bound that another field sets.
  """
  clip, steps = config["clip"], config["steps"]
  for name, value in clip.items():
    if name != "activation" and (type(value) is not int or value < 1):
      raise InputError(f"config.clip.{name}: expected an integer of at least 1, got {value!r}")
  check_known("config.clip.activation=", clip["activation"], ("quick_gelu", "gelu"))
  side, patch = clip["image_size"], clip["patch_size"]
  patches, heads = (side // patch) ** 2, ("vision", "text")
  bounds = [
    ("warmup_steps", config["warmup_steps"] < steps, f"less than config.steps={steps}"),
    ("unmasked_steps", config["unmasked_steps"] <= steps, f"at most config.steps={steps}"),
    ("clip.image_size", side % patch == 0, f"a multiple of config.clip.patch_size={patch}"),
    (
      "kept_patches",
      round(config["kept_patches"] * patches) >= 1,
      f"at least one of the {patches} patches, as {1 / patches:.3g}",
    ),
    (
      "caption_tokens",
      config["caption_tokens"] <= clip["context_length"],
      f"at most config.clip.context_length={clip['context_length']}",
    ),
    (
      "clip.vocab_size",
      clip["vocab_size"] == VOCABULARY,
      f"{VOCABULARY}, the tokens of CLIP's tokenizer",
    ),
    *(
      (
        f"clip.{tower}_width",
        clip[f"{tower}_width"] % clip[f"{tower}_heads"] == 0,
        f"a multiple of config.clip.{tower}_heads={clip[f'{tower}_heads']}",
      )
      for tower in heads
    ),
  ]
  for path, holds, expected in bounds:
    if not holds:
      section, _, name = path.rpartition(".")
      raise InputError(
        f"config.{path}={(config[section] if section else config)[name]}: expected {expected}"
      )
