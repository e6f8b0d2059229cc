"""Every field of a run, declared once: default, type, allowed words or bounds, and its meaning.

A run's config is an `ml_collections.ConfigDict` made by `defaults`; `configs/` holds the recipes,
each a few changes of the defaults. `check` and docs/configs.md come from the declarations, too.

Words are listed where no other will do. Networks, training-free methods, tuners, templates and data
sets can be added (docs/extending.md); a wrong name among these is refused by whoever looks it up.
"""

# ruff: noqa: RUF009 (`field` is a dataclasses.field)

import dataclasses
from collections.abc import Mapping
from typing import Any

from ml_collections import config_dict

from rpn_jax.base import fields
from rpn_jax.base import pixels as pixels
from rpn_jax.base.errors import InputError
from rpn_jax.base.fields import ABSENT, Config, field, section, spec
from rpn_jax.base.words import check_known as check_known
from rpn_jax.config.evaluation import Eval
from rpn_jax.config.networks import CATSegConfig, Dense, RPNConfig
from rpn_jax.config.pretraining import Pretrain, check_pretraining
from rpn_jax.config.self_training import SelfTraining, check_self_training


@dataclasses.dataclass(frozen=True)
class Loss:
  """The loss of training."""

  name: str = field(
    "sigmoid",
    "sigmoid: focal and dice loss; bce: binary cross-entropy; softmax: cross-entropy",
    words=("sigmoid", "bce", "softmax"),
  )
  mask_ignored: bool = field(
    False,
    "leave ignored pixels out of the focal loss and of bce; to the official codes they are "
    "negatives",
  )
  skip_empty: bool = field(
    False,
    "sigmoid: a batch whose pixels are all ignored adds nothing; in the official code its focal "
    "loss is divided by 1 in place of a number of masks, so it outweighs other batches",
  )


@dataclasses.dataclass(frozen=True)
class Optimizer:
  """AdamW with learning-rate groups, as in the official codes."""

  steps: int = field(20_000, "length of the schedule; follows config.steps", at_least=1)
  base_lr: float = field(2e-5, "learning rate of a group with factor 1", at_least=0)
  min_lr: float = field(1e-6, "learning rate at the end of the schedule", at_least=0)
  schedule: str = field("poly", "how the rate decays", words=("poly", "cosine"))
  power: float = field(0.9, "exponent of poly", at_least=0)
  warmup_steps: int = field(
    1500, "steps of linear warm-up; unless it is set, at most a sixth of config.steps", at_least=0
  )
  warmup_ratio: float = field(1e-6, "share of the rate at step 0", at_least=0)
  weight_decay: float = field(
    0.01, "decoupled, on every parameter, norms and biases included", at_least=0
  )
  no_decay: str = field(
    "", "regular expression for the whole path of parameters without weight decay; none by default"
  )
  clip_norm: float = field(
    0.0, "gradients are scaled down to this norm over all parameters; 0: never", at_least=0
  )
  groups: tuple[tuple[str, str, float], ...] = field(
    (("h", r"h(_bias)?", 1.0), ("rest", r"(?!h(_bias)?$).*", 10.0)),
    "(group, regular expression for the whole path of a parameter, factor of the rate); every "
    "parameter belongs to one group",
  )


@dataclasses.dataclass(frozen=True)
class Data:
  """The training data set, and how its images reach the network."""

  name: str = field("voc20", "training set; docs/data.md lists them")
  variant: str = field(
    "", "for your own data the name they were prepared under, for ade847 short512 or native"
  )
  naming: str = field(
    "dataset",
    "wording of the class names; some sets also have maskclip, spaced, catseg, sclip, clearclip, "
    "proxyclip or itaclip",
  )
  data_dir: str = field("data", "folder of prepared data sets", is_path=True, free=True)
  local_copy: str = field(
    "",
    "folder that the records are copied to, once per host, and read from; empty reads data_dir, or "
    "copies from gs:// to the cache folder",
    is_path=True,
    free=True,
  )
  setting: str = field(
    "zero_shot",
    "zero_shot: unseen classes (of a folder those in its unseen.txt) are ignored in training; "
    "transductive: found by self-training; supervised: all classes are trained on; "
    "annotation_free: all, on what a training-free method predicts in place of the ground truth",
    words=("zero_shot", "transductive", "supervised", "annotation_free"),
  )
  unseen: tuple[str, ...] = field(
    (),
    "zero_shot and transductive: names of the unseen classes, in place of the data set's own "
    "split; (): that one",
  )
  batch_size: int = field(32, "images per step, over all devices", at_least=1)
  recipe: str = field(
    "mmsegmentation",
    "whose resizing, augmentation and order: mmsegmentation, or detectron2, which resizes with "
    "antialias, limits no class in a crop, flips last and pads with gray",
    words=("mmsegmentation", "detectron2"),
  )
  crop: int = field(512, "side of training crops, pixels", at_least=1)
  scale: tuple[int, int] = field(
    (2048, 512), "limits of long and short side before random scaling, pixels", at_least=1
  )
  ratio: tuple[float, float] = field((0.5, 2.0), "range of the random scale", above=0)
  label_resize: str = field(
    "floor_nearest",
    "pixel of a training label that one of its resized form is copied from: that at floor(i s), as "
    "in both libraries, or at the center, floor((i + 1/2) s)",
    words=("floor_nearest", "nearest"),
  )
  photometric: bool = field(True, "distort brightness, contrast, saturation and hue")
  held_out: float = field(
    0.0,
    "share of the training images that is kept from training and takes the evaluation set's "
    "place, scored on the trained classes alone: to choose settings by; 0: none",
    at_least=0,
    at_most=0.9,
  )
  train_images: int = field(ABSENT, "shapes only: scenes drawn for training", at_least=1)
  short_side: int = field(
    512, "short side of evaluated images, pixels", at_least=1, evaluation=True
  )
  long_side: int = field(
    0,
    "limit of their long side, pixels, at the cost of the short one; 0: none",
    at_least=0,
    evaluation=True,
  )
  eval_images: int = field(
    0,
    "evaluate on the first images only; 0: on all. Of shapes: scenes drawn for it",
    at_least=0,
    evaluation=True,
  )
  mean: tuple[float, float, float] | None = field(
    None, "subtracted per channel, in [0, 1]; None: as the CLIP weights were trained"
  )
  std: tuple[float, float, float] | None = field(
    None, "divided by per channel, in [0, 1]; None: as the CLIP weights were trained", above=0
  )
  threads: int = field(4, "threads that read ahead", at_least=0, free=True)
  workers: int = field(0, "extra reader processes", at_least=0, free=True)


@dataclasses.dataclass(frozen=True)
class Run:
  """A segmentation run: training, evaluation, prediction."""

  task: str = field("segment", "what main.py runs", words=("segment", "pretrain"))
  seed: int = field(
    0, "for initial prompts, data order, augmentation, dropout and gate noise",
    at_least=0, at_most=1 << 62,
  )  # fmt: skip
  clip: str = field(
    "",
    "CLIP weights: a file, one in rpn_jax/assets, or a name in the list of `rpn weights`",
    is_path=True,
  )
  prompts: str = field(
    "",
    "trained prompts to evaluate or predict with: a file, an exported folder or hf://owner/name; "
    "none: the workdir's",
    is_path=True,
    evaluation=True,
  )
  templates: str | tuple[str, ...] = field(
    "single",
    "sentences around a class name, averaged: a named set, or one sentence with {} for the name",
  )
  synonyms: str = field(
    "mean",
    'how names like "sea, ocean" are embedded: the first, their mean, the best of them (max; '
    "evaluation only), or joined as one text",
    words=("first", "mean", "max", "joined"),
  )
  method: str = field("rpn", "network: rpn, cat_seg, or training_free (CLIP as it is)")
  dtype: str = field(
    "float32", "compute type of the tower; prompts stay float32", words=("float32", "bfloat16")
  )
  remat: str = field(
    "none",
    "what blocks compute again in the backward pass, to save memory: none, dots (the MLP and the "
    "norms), full",
    words=("none", "dots", "full"),
    free=True,
  )
  matmul_precision: str = field(
    "default", "precision of float32 matrix products", words=("default", "high", "highest")
  )
  parallel: str = field(
    "shard_map", "how the step is spread over devices", words=("shard_map", "pmap"), free=True
  )
  shard_state: bool = field(
    False, "spread prompts and optimizer state over the devices, to save memory", free=True
  )
  steps: int = field(20_000, "optimizer steps", at_least=1)
  log_every: int = field(10, "steps between logged losses", at_least=1, free=True)
  eval_every: int = field(
    2_000, "steps between evaluations, each with a checkpoint", at_least=1, free=True
  )
  save_every: int = field(
    500, "steps between further checkpoints; 0: no others", at_least=0, free=True
  )
  max_skipped: int = field(
    10,
    "steps whose loss or gradients are NaN or infinite are skipped; so many in a row end the run",
    at_least=1,
    free=True,
  )
  model: RPNConfig = field(RPNConfig())
  dense: Dense = field(Dense())
  cat_seg: CATSegConfig = field(CATSegConfig())
  loss: Loss = field(Loss())
  self_training: SelfTraining = field(SelfTraining())
  optimizer: Optimizer = field(Optimizer())
  data: Data = field(Data())
  eval: Eval = field(Eval(), evaluation=True)


TASKS: dict[str, type] = {"segment": Run, "pretrain": Pretrain}
_ALL = fields.declared(Run).values()
# Names of the fields that may differ between a run and its continuation or its evaluation.
FREE = frozenset(f.name for f in _ALL if spec(f).free)
EVALUATION = frozenset(f.name for f in _ALL if spec(f).evaluation)


def defaults() -> config_dict.ConfigDict:
  """A segmentation run: the recipe of the official code on VOC 2012, RPN as in the paper.

  `optimizer.steps` follows `steps`, and so does a warm-up that would take most of a short run. The
  dictionary is not locked.
  """
  c = section(Run)
  c.optimizer.steps = c.get_ref("steps")
  c.optimizer.warmup_steps = warmup(c, Optimizer.warmup_steps)
  return c


def warmup(c: config_dict.ConfigDict, most: int) -> config_dict.FieldReference:
  """Steps of warm-up, or of another phase, that follow `c.steps`: a sixth, at most so many."""
  sixth = c.get_ref("steps") // 6
  return (sixth + most - abs(sixth - most)) // 2  # the smaller one: references have no minimum


def declared_class(config: Config) -> type:
  """The class that declares the fields of a config: that of its task."""
  return TASKS.get(str(config.get("task")), Run)


def check(config: Config) -> None:
  """Checks the values of a config before anything is done.

  What another version wrote is accepted: missing and unknown fields are passed over.

  Raises:
    InputError: a value of another type, out of bounds, or an unknown word; windows that leave
      pixels out, or a layout that cannot have them so; fields that only another setting reads;
      see `check_pretraining`.
  """
  fields.check(config, declared_class(config))
  if declared_class(config) is Pretrain:
    return check_pretraining(config)
  check_self_training(config)
  groups = config.get("optimizer", {}).get("groups", ())
  names = [group for group, *_ in groups]
  for group, _, factor in groups:
    if names.count(group) > 1:
      raise InputError(
        f"config.optimizer.groups: expected groups of different names, got {group!r} twice; rename "
        "one, or join their regular expressions with |"
      )
    if not factor >= 0:
      raise InputError(
        f"config.optimizer.groups: expected factors of at least 0, got {factor} for {group!r}"
      )
  low, high = config.get("data", {}).get("ratio", (1, 1))
  if low > high:
    raise InputError(f"config.data.ratio=({low}, {high}): expected the smaller factor first")
  windows, setting = config.get("eval", {}), config.get("data", {}).get("setting")
  penalty = windows.get("seen_penalty", 0.0)
  if setting == "annotation_free" and penalty not in (0.0, Eval.seen_penalty):
    raise InputError(
      f"config.eval.seen_penalty={penalty}: expected {Eval.seen_penalty} with config.data.setting="
      f"{setting!r}, where no class is seen and none is penalized: leave it out"
    )
  layout, crop, stride = windows.get("layout"), windows.get("crop"), windows.get("stride")
  if layout == "square" and windows["square"] < crop:
    raise InputError(
      f"config.eval.square={windows['square']}: expected at least config.eval.crop={crop}, since "
      "windows are cut out of the square; raise it, or lower the crop"
    )
  if layout in ("square", "whole", "image") and tuple(windows["scales"]) != (1.0,):
    raise InputError(
      f"config.eval.scales={tuple(windows['scales'])}: expected (1.0,) with config.eval.layout="
      f"{layout!r}, which takes every image at one size; config.eval.flip averages over views"
    )
  if layout not in ("whole", "image") and crop and stride and stride > crop:
    raise InputError(
      f"config.eval.stride={stride}: expected at most config.eval.crop={crop}, since the pixels "
      f"between windows would get no class; lower the stride, as to {max(1, crop * 5 // 6)}, or "
      "raise the crop"
    )
  if config.get("shard_state") and config.get("parallel") == "pmap":
    raise InputError(
      'config.shard_state=True needs config.parallel="shard_map": under pmap every device has the '
      "whole state"
    )


def check_whole_patches(field: str, side: int, clip: str, multiple: int) -> None:
  """Refuses a crop or window that is not made of whole patches.

  Args:
    field: where the side was set, e.g. "config.data.crop".
    side: pixels.
    clip: the weights, as the config names them.
    multiple: `Network.input_multiple`: their patch size in pixels, or 1 if the network resizes.

  Raises:
    InputError: the side is no such multiple.
  """
  if side % multiple:
    below = side // multiple * multiple
    nearest = [str(s) for s in (below, below + multiple) if s]
    raise InputError(
      f"{field}={side}: expected a multiple of the patch size of {clip}, {multiple}; "
      f"the nearest: {' and '.join(nearest)}"
    )


# A tower sees crops up to so many times larger or smaller than the images it was trained on well
# enough: 512 and 518 pixels, in place of 224, are 2.3.
MAX_CROP_RATIO = 3.0


def notes_on_sizes(sides: Mapping[int, str], clip: str, trained_at: int) -> list[str]:
  """A line for every crop or window that is far from what the tower was trained at.

  Args:
    sides: side in pixels -> where it was set, e.g. "config.data.crop".
    clip: the weights, as the config names them.
    trained_at: side of the images that they were trained on, pixels.
  """
  return [
    f"{field}={side} is far from the {trained_at} pixels that {clip} was trained at: expect "
    f"{'slow steps and ' if side > trained_at else ''}poor scores; {trained_at} to "
    f"{2 * trained_at} pixels fit, with short side, stride and scale in proportion"
    for side, field in sides.items()
    if not 1 / MAX_CROP_RATIO <= side / trained_at <= MAX_CROP_RATIO
  ]


def notes_on_schedule(config: config_dict.ConfigDict) -> list[str]:
  """A line if the learning rate is still rising when the run ends."""
  warmup_steps, steps = config.optimizer.warmup_steps, config.steps
  if warmup_steps < steps:
    return []
  return [
    f"config.optimizer.warmup_steps={warmup_steps}: the rate is still rising at the last of the "
    f"{steps} steps and never reaches config.optimizer.base_lr; {max(1, steps // 6)} would be a "
    "sixth of the run"
  ]


def complete(config: Config) -> None:
  """Adds the fields that a config lacks, with their defaults, and expands a leading `~` in paths.

  A file that was written for an earlier version lacks some.
  """
  cls = declared_class(config)
  whole = section(cls)
  if cls is Run:
    whole = defaults()
    whole.steps = config.get("steps", whole.steps)  # which others follow
  fields.complete(config, whole)
  fields.expand_paths(config, cls)


@dataclasses.dataclass(frozen=True)
class Backbone:
  """One of OpenAI's CLIPs.

  Attributes:
    title: as papers call it, and `rpn weights`.
    crop: side of training crops and windows, pixels: whole patches.
    stride: step of the windows, pixels.
    architecture: fields of CLIPConfig: `vision_width`, `patch_size` and what differs from its
      defaults.
  """

  title: str
  crop: int
  stride: int
  architecture: Mapping[str, Any]


# Data sets of one's own images and annotations, prepared under a name that the user gives.
OWN_DATA = ("folder", "coco_json", "labelme", "yolo_seg", "voc_folder")

BACKBONES = {
  "b16": Backbone(
    "ViT-B/16", 512, 426, {"vision_width": 768, "patch_size": 16}
  ),
  "l14": Backbone(  # 512 is no multiple of 14
    "ViT-L/14", 518, 432,
    {
      "embed_dim": 768, "patch_size": 14, "vision_width": 1024, "vision_layers": 24,
      "vision_heads": 16, "text_width": 768, "text_heads": 12,
    },
  ),
}  # fmt: skip
