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
  known = list(choices) + [w for v in choices.values() if isinstance(v, tuple) for w in v]
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


def model(preset: str, *, deep_tokens: int, h_grid: tuple[int, int]) -> ml_collections.ConfigDict:
  """The network of a preset; the fields are those of `RPNConfig`.

  Args:
    preset: "paper" or "released".
    deep_tokens: free prompt tokens per layer of the released preset.
    h_grid: token grid of a training crop, on which the released preset stores h.
  """
  released = preset == "released"
  c = ml_collections.ConfigDict()
  c.prompt_tower = True  # prompts inside the tower; False: head only
  c.relationship_prompts = True  # RPM on or off
  c.deep_tokens = deep_tokens if released else 0  # P, free prompt tokens in every layer
  c.m2oe = not released  # multi-scale mixture of experts; absent from the release
  c.m2oe_reduced = 3  # r, width of the experts
  c.m2oe_experts = 4  # scales 1, 1/2, 1/4, 1/8
  c.m2oe_top_k = 2  # experts the gate keeps; the paper gives no number
  c.h_shared = released  # one h for all layers, or one per layer
  # Grid h is stored on; None: that of CLIP's pre-training, resized to the tokens.
  c.h_grid = h_grid if released else ml_collections.config_dict.placeholder(tuple)
  c.head = preset  # LPM variant
  c.class_embedding_copies = 2 if released else 1  # the release adds the class embedding twice
  c.prompt_dropout = 0.1  # on projected prompts
  return c


def apply_variant(c: ml_collections.ConfigDict, variant: str) -> None:
  """Turns parts of the network off: the comparisons of docs/results.md."""
  if variant == "no_rpm":
    c.relationship_prompts = False
  elif variant == "vpt":
    c.relationship_prompts, c.deep_tokens = False, 40
  elif variant == "lpm":
    c.prompt_tower = False


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
  # (group, regular expression over the whole parameter path, rate factor)
  c.groups = (("h", r"h", 1.0), ("rest", r"(?!h$).*", 10.0))
  return c
