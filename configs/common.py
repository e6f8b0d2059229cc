"""What the experiment files share: constants, and the parser of their arguments."""

import difflib

import ml_collections

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

TEMPLATE = "a photo of a {}"


def parse_arg(arg: str, **choices) -> ml_collections.ConfigDict:
  """Parses the words behind a config file's colon: `file.py:preset=paper,runlocal`.

  Args:
    arg: words separated by commas; a word alone switches a flag on or, if it is one of the
      allowed values of a choice, picks it.
    **choices: name -> False (a flag) or a tuple of allowed values, the default first.

  Returns:
    A value for every name.

  Raises:
    ValueError: an unknown word, with the nearest known one.
  """
  values = {k: v[0] if isinstance(v, tuple) else v for k, v in choices.items()}
  known = list(choices) + [w for v in choices.values() if isinstance(v, tuple) for w in v if w]
  for word in filter(None, (w.strip() for w in arg.split(","))):
    name, equals, value = word.partition("=")
    if not equals and name not in choices:
      owners = [k for k, v in choices.items() if isinstance(v, tuple) and name in v]
      name, value = (owners[0], name) if owners else (name, "")
    allowed = choices.get(name)
    if allowed is False and (not equals or value in ("True", "False")):
      values[name] = value != "False"
    elif isinstance(allowed, tuple) and value in allowed:
      values[name] = value
    else:
      near = difflib.get_close_matches(word.split("=")[-1], known, 1, 0.0)
      raise ValueError(
        f"config argument {word!r} is not known; did you mean {near[0]!r}? "
        f"Known: {', '.join(known)}"
      )
  return ml_collections.ConfigDict(values)


# What can adapt the tower in a word of a config's argument; any others are joined by "+" in
# --config.model.tuner.
TUNERS = ("rpn", "vpt", "rpn+vpt", "lpm", "bitfit", "adapter", "ssf", "lora", "lst", "full")

# Backbones: weights file, patch, crop and stride of the windows. 512 is no multiple of 14.
BACKBONES = {
  "b16": ("weights/ViT-B-16.safetensors", 16, 512, 426),
  "l14": ("weights/ViT-L-14.safetensors", 14, 518, 432),
}


def benchmark(
  arg: str, name: str, *, steps: int, deep_tokens: int, templates: str, settings: tuple[str, ...]
) -> ml_collections.ConfigDict:
  """A published recipe on one of the benchmark data sets, from the words behind the colon.

  Args:
    arg: `setting=…`, `preset=paper|released`, `backbone=b16|l14`, `tuner=…`, `runlocal`.
    name: training set, see the table in `data_pipelines/__init__.py`.
    steps: optimizer steps.
    deep_tokens: of the released preset.
    templates: name of a set of sentences.
    settings: allowed values of `setting`, the default first.
  """
  args = parse_arg(
    arg,
    setting=settings,
    preset=("paper", "released"),
    backbone=tuple(BACKBONES),
    tuner=("", *TUNERS),
    runlocal=False,
  )
  weights, patch, crop, stride = BACKBONES[args.backbone]
  c = segmentation(args.preset, name, crop=crop, patch=patch, deep_tokens=deep_tokens)
  c.clip = weights
  c.templates = templates
  c.data.setting = args.setting
  c.eval.stride = stride
  if args.tuner:
    c.model.tuner = args.tuner
  c.steps = steps
  c.eval_every = steps // 10
  # The paper trains on four devices of 8 images; the released logs are of 8 images in all.
  c.data.batch_size = 8 if args.preset == "released" else 32
  if args.runlocal:  # a few steps, to see on a laptop that everything is in place
    c.steps, c.eval_every, c.log_every = 4, 4, 1
    c.data.batch_size, c.data.eval_images = 2, 4
  return c


def segmentation(
  preset: str, name: str, *, crop: int, patch: int, deep_tokens: int
) -> ml_collections.ConfigDict:
  """Every field of a segmentation run, with the recipe of the release.

  Args:
    preset: "paper" or "released": which reading of RPN (docs/method.md).
    name: training set.
    crop: side of training crops and of test windows, pixels.
    patch: patch size of the tower, pixels.
    deep_tokens: of the released preset.
  """
  c = ml_collections.ConfigDict()
  c.task = "segment"  # what main.py runs
  c.seed = 0  # of initial prompts, data order, augmentation, dropout and gate noise
  c.clip = ""  # CLIP weights: a path, or a file shipped in rpn_jax/assets
  c.prompts = ""  # a file of trained prompts, to evaluate or predict with; none: the workdir's
  # Sentences around a class name, averaged: a named set, or one sentence with {} for the name.
  c.templates = "single"
  c.synonyms = "mean"  # of names like "sea, ocean": first, mean, max or joined
  c.method = "rpn"  # "rpn", or "training_free": CLIP as it is
  c.dtype = "float32"  # compute type of the tower: float32 or bfloat16; prompts stay float32
  # What blocks recompute in the backward pass, for less memory and more time: "none", "dots" (the
  # MLP and the norms) or "full".
  c.remat = "none"
  c.matmul_precision = "default"  # of float32 matrix products: default, high or highest
  c.parallel = "shard_map"  # how the step is spread over devices: "shard_map" (jit) or "pmap"
  c.shard_state = False  # spread prompts and optimizer state over the devices, for less memory
  c.model = model(preset, deep_tokens=deep_tokens, h_grid=(crop // patch, crop // patch))

  c.dense = ml_collections.ConfigDict()  # of method "training_free"
  c.dense.method = "maskclip"  # vanilla, maskclip, sclip or clearclip
  c.dense.denoise = 0.0  # classes whose best probability in a window is lower are suppressed
  c.dense.key_smoothing = False  # average probabilities by the similarity of keys

  c.steps = 20_000  # optimizer steps
  c.log_every = 10  # steps between logged losses
  c.eval_every = 2_000  # steps between evaluations, each with a checkpoint
  c.save_every = 500  # steps between checkpoints, besides those; 0: no others
  # Steps whose loss or gradients are NaN or infinite are not applied; so many in a row end the run.
  c.max_skipped = 10

  c.loss = ml_collections.ConfigDict()
  c.loss.name = "sigmoid"  # "sigmoid" (focal and dice) or "softmax" (cross-entropy)
  c.loss.mask_ignored = False  # leave ignored pixels out of the focal loss; released: negatives

  c.self_training = ml_collections.ConfigDict()  # of the transductive setting
  c.self_training.start = 0.5  # share of the steps after which unseen classes get pseudo-labels
  # "unseen": pixels that the truth gives to some unseen class (the dagger rows); "unlabelled":
  # these and the ones that the truth leaves out, so that it does not tell where to look.
  c.self_training.pixels = "unseen"

  c.optimizer = optimizer(c.get_ref("steps"))

  c.data = ml_collections.ConfigDict()
  c.data.name = name  # training set; see docs/data.md
  c.data.variant = ""  # of "folder" the name it was prepared under, of "ade847" short512 or native
  c.data.naming = "dataset"  # wording of class names: "dataset", "maskclip" or "spaced"
  c.data.data_dir = "data"  # prepared data sets live here
  # zero_shot: unseen classes are "ignore" in training; transductive: found by self-training;
  # supervised: all classes are trained on.
  c.data.setting = "zero_shot"
  c.data.batch_size = 32  # images per step, over all devices
  c.data.crop = crop  # side of training crops, pixels
  c.data.scale = (4 * crop, crop)  # limits of long and short side before random scaling
  c.data.ratio = (0.5, 2.0)  # range of the random scale
  c.data.photometric = True  # distort brightness, contrast, saturation and hue
  c.data.short_side = crop  # short side of evaluated images, pixels
  c.data.eval_images = 0  # evaluate on the first images only; 0: on all
  c.data.mean, c.data.std = normalization(preset)  # per channel, of values in [0, 1]
  c.data.threads = 4  # threads that read ahead
  c.data.workers = 0  # extra reader processes

  c.eval = ml_collections.ConfigDict()
  # Sets that --mode=eval goes through, every class prompted; none: the training set, its setting.
  c.eval.sets = ()
  c.eval.crop = crop  # side of the sliding window, pixels
  c.eval.stride = 426  # step of the sliding window, pixels
  c.eval.window_batch = 4  # windows per call of the network
  # Test-time augmentation: scores averaged over sizes, as factors on short_side, and mirror images.
  c.eval.scales = (1.0,)
  c.eval.flip = False  # also average over the mirror images
  c.eval.seen_penalty = 0.1  # subtracted from the scores of seen classes in the zero-shot setting
  c.eval.palette = "default"  # of predictions.png: "default", or "colorblind"
  return c


def model(preset: str, *, deep_tokens: int, h_grid: tuple[int, int]) -> ml_collections.ConfigDict:
  """The network of a preset; the fields are those of `RPNConfig`.

  Args:
    preset: "paper" or "released".
    deep_tokens: free prompt tokens per layer of the released preset.
    h_grid: token grid of a training crop, on which the released preset stores h.
  """
  released = preset == "released"
  c = ml_collections.ConfigDict()
  # What adapts the tower, joined by "+": rpn (relationship prompts), vpt (deep prompt tokens), lpm
  # (nothing but the head), bitfit, adapter, ssf, lora, lst, full.
  c.tuner = "rpn+vpt" if released else "rpn"
  c.deep_tokens = deep_tokens if released else 40  # P, prompt tokens of vpt in every layer
  c.adapter_width = 64  # bottleneck of adapter
  c.lora_rank = 8  # of lora
  c.lst_reduction = 8  # how many times narrower than the tower the network of lst is
  c.itp = "image_to_pixel"  # relationship map, Eq. 2: image_to_pixel, no_image or no_pixel
  c.apg = "parameter"  # h, Eq. 3: a bare parameter, or linear: another start, and a bias
  # Before ITP the gated mixture of experts, their plain sum, or none; absent from the release.
  c.m2oe = "none" if released else "gated"
  c.m2oe_reduced = 3  # r, width of the experts
  c.m2oe_experts = 4  # scales 1, 1/2, 1/4, 1/8
  c.m2oe_top_k = 2  # experts the gate keeps; the paper gives no number
  c.h_shared = released  # one h for all layers, or one per layer
  # Grid h is stored on; None: that of CLIP's pre-training, resized to the tokens.
  c.h_grid = h_grid if released else ml_collections.config_dict.placeholder(tuple)
  # Layers that make relationship prompts: all, first, last, odd, even or none.
  c.rpm_layers = "all"
  c.combine = "cat"  # prompts as further tokens (cat), or their class mean added or as factor (mul)
  c.head = "released" if released else "lpm_c"  # lpm_a to lpm_c, released, tfpm_a to tfpm_c
  c.class_embedding_copies = 2 if released else 1  # the release adds the class embedding twice
  c.prompt_dropout = 0.1  # on projected prompts
  return c


def normalization(preset: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
  """Mean and std per channel, in [0, 1]: the release used ImageNet's, CLIP has its own."""
  if preset == "released":
    return IMAGENET_MEAN, IMAGENET_STD
  return CLIP_MEAN, CLIP_STD


def optimizer(steps) -> ml_collections.ConfigDict:
  """The release's AdamW recipe.

  Args:
    steps: length of the schedule; a reference, so that overriding the steps moves it too.
  """
  c = ml_collections.ConfigDict()
  c.steps = steps  # length of the schedule
  c.base_lr = 2e-5  # of a group with factor 1
  c.min_lr = 1e-6  # at the end of the schedule
  c.power = 0.9  # of the polynomial decay
  c.warmup_steps = 1500  # linear warm-up
  c.warmup_ratio = 1e-6  # of the rate at step 0
  c.weight_decay = 0.01  # decoupled, on every parameter, norms and biases too
  c.clip_norm = 0.0  # gradients are scaled down to this norm over all parameters; 0: as they are
  # (group, regular expression over the whole parameter path, rate factor)
  c.groups = (("h", r"h(_bias)?", 1.0), ("rest", r"(?!h(_bias)?$).*", 10.0))
  return c
