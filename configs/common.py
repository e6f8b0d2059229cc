"""What the experiment files share: the parser of their arguments, presets, benchmark recipes."""

from ml_collections import config_dict

from rpn_jax import config


def parse_arg(arg: str, **choices) -> config_dict.ConfigDict:
  """Parses the words behind a config file's colon: `file.py:preset=paper,runlocal`.

  Args:
    arg: words separated by commas; a word alone switches a flag on or, if it is one of the
      allowed values of a choice, picks it.
    **choices: name -> False (a flag) or a tuple of allowed values, the default first.

  Returns:
    A value for every name.

  Raises:
    InputError: an unknown word, with the nearest known one.
  """
  values = {k: v[0] if isinstance(v, tuple) else v for k, v in choices.items()}
  known = list(choices) + [w for v in choices.values() if isinstance(v, tuple) for w in v if w]
  for word in filter(None, (w.strip() for w in arg.split(","))):
    name, equals, value = word.partition("=")
    if not equals and name not in choices:
      config.check_known("config argument ", word, known)
      name, value = next(k for k, v in choices.items() if isinstance(v, tuple) and word in v), word
    config.check_known("config argument ", name, choices)
    if choices[name] is False:
      value = value if equals else "True"
      config.check_known(f"config argument {name}=", value, ("True", "False"))
      values[name] = value == "True"
    else:
      if value not in choices[name]:
        config.check_known(f"config argument {name}=", value, filter(None, choices[name]))
      values[name] = value
  return config_dict.ConfigDict(values)


# Which classes are labeled in training.
SETTINGS = ("zero_shot", "transductive", "supervised", "annotation_free")
# What can adapt the tower in a word of a config's argument; any others are joined by "+" in
# --config.model.tuner.
TUNERS = (
  "rpn", "vpt", "rpn+vpt", "lpm", "bitfit", "adapter", "ssf", "lora", "dora", "oft", "lst", "full",
  "coop", "maple", "text_lora",
)  # fmt: skip


# The tiny CLIP of the shapes data set, which is shipped: the size it was trained at, pixels.
TINY_CROP, TINY_PATCH = 64, 8
TINY_SHORT_SIDE = 96  # of its scenes, pixels


def benchmark(
  arg: str,
  name: str,
  *,
  steps: int,
  deep_tokens: int,
  templates: str,
  settings: tuple[str, ...],
  backbones: tuple[str, ...] = tuple(config.BACKBONES),
) -> config_dict.ConfigDict:
  """A published recipe on one of the benchmark data sets, from the words behind the colon.

  Args:
    arg: `setting=…`, `preset=paper|released`, `backbone=…`, `tuner=…`, `runlocal`.
    name: training set, see the table in `data_pipelines/__init__.py`.
    steps: optimizer steps.
    deep_tokens: of the released preset.
    templates: name of a set of sentences.
    settings: allowed values of `setting`, the default first.
    backbones: allowed values of `backbone`: those of config.BACKBONES, and shapes, see `tiny_clip`.
  """
  args = parse_arg(
    arg,
    setting=settings,
    preset=("paper", "released"),
    backbone=backbones,
    tuner=("", *TUNERS),
    runlocal=False,
  )
  tiny = args.backbone == "shapes"
  if tiny:
    crop, patch = TINY_CROP, TINY_PATCH
  else:
    backbone = config.BACKBONES[args.backbone]
    crop, patch = backbone.crop, backbone.architecture["patch_size"]
  c = segmentation(args.preset, name, crop=crop, patch=patch, deep_tokens=deep_tokens)
  c.templates = templates
  c.data.setting = args.setting
  c.steps = steps
  c.eval_every = steps // 10
  if args.tuner:
    c.model.tuner = args.tuner
  # The paper trains on four devices of 8 images; the logs of the official code are of 8 in all.
  c.data.batch_size = 8 if args.preset == "released" else 32
  if tiny:
    tiny_clip(c)
  else:
    c.clip, c.eval.stride = backbone.title, backbone.stride
  if args.runlocal:  # a few steps, to see on a laptop that everything is in place
    c.steps, c.eval_every, c.log_every = 4, 4, 1
    c.data.batch_size, c.data.eval_images = 2, 4
  return c


def tiny_clip(c: config_dict.ConfigDict) -> None:
  """Fits a run with crops of TINY_CROP to the tiny CLIP that is shipped, in place.

  Sizes, augmentation, length and rates belong together; such a run takes minutes on a CPU.
  """
  c.clip = "shapes_clip.safetensors"
  c.steps, c.eval_every = 1000, 250
  # The default rates are for batches of 16 and 20,000 steps; this run is a fraction of that.
  c.optimizer.base_lr = 2e-4
  c.optimizer.warmup_steps = config.warmup(c, 50)
  c.data.batch_size = 8
  c.data.scale = (4 * TINY_SHORT_SIDE, TINY_SHORT_SIDE)
  c.data.ratio = (0.75, 1.5)
  # Photometric distortion turns hues by up to 36 degrees, which makes orange red: to this CLIP
  # colors are half of every class name.
  c.data.photometric = False
  c.data.short_side = TINY_SHORT_SIDE
  c.data.threads = 2
  c.eval.stride = 48


def segmentation(
  preset: str, name: str, *, crop: int, patch: int, deep_tokens: int
) -> config_dict.ConfigDict:
  """A segmentation run with a preset: the defaults, made to fit a tower and its crops.

  Args:
    preset: "paper" or "released": which reading of RPN (docs/method.md).
    name: training set.
    crop: side of training crops and of test windows, pixels.
    patch: patch size of the tower, pixels.
    deep_tokens: of the released preset.
  """
  c = config.defaults()
  c.data.name = name
  c.data.crop = c.data.short_side = c.eval.crop = crop
  c.data.scale = (4 * crop, crop)
  c.model = model(preset, deep_tokens=deep_tokens, h_grid=(crop // patch, crop // patch))
  if preset == "released":  # the official code normalizes with ImageNet's statistics
    c.data.mean, c.data.std = config.pixels.IMAGENET_MEAN, config.pixels.IMAGENET_STD
  return c


def model(preset: str, *, deep_tokens: int, h_grid: tuple[int, int]) -> config_dict.ConfigDict:
  """The network of a preset: "paper" is the default, "released" that of the official code.

  Args:
    preset: "paper" or "released".
    deep_tokens: prompt tokens per layer of the released preset.
    h_grid: token grid of a training crop, on which the released preset stores h.
  """
  released = {
    "tuner": "rpn+vpt",
    "deep_tokens": deep_tokens,
    "m2oe": "none",
    "h_shared": True,
    "h_grid": h_grid,
    "head": "released",
    "class_embedding_copies": 2,
  }
  return config.section(config.RPNConfig, **(released if preset == "released" else {}))
