"""The settings of each network: a section of the config."""

import dataclasses

from rpn_jax.base.fields import field, spec
from rpn_jax.base.words import check_known


@dataclasses.dataclass(frozen=True)
class RPNConfig:
  """What RPN trains, and how it is wired. The defaults are the paper's.

  Raises:
    InputError: a word that a field does not have. Which tuners there are the network knows
      (`models.tuners.parse`).
  """

  tuner: str = field(
    "rpn",
    'what adapts the tower, joined by "+": rpn (relationship prompts), vpt (deep prompt tokens), '
    "bitfit, adapter, ssf, lora, dora, oft, lst, full (the tower itself), lpm (only the head); of "
    "the text tower coop, maple, and those at its projections and norms, such as text_lora",
  )
  deep_tokens: int = field(40, "P, prompt tokens of vpt in every layer", at_least=0)
  adapter_width: int = field(64, "bottleneck of adapter, channels", at_least=1)
  lora_rank: int = field(8, "rank of lora and dora", at_least=1)
  oft_block: int = field(16, "side of the rotations of oft, channels", at_least=2)
  context_tokens: int = field(
    4,
    "tokens of every sentence that coop and maple train, with which all of them begin: 4 are those "
    'of "a photo of a {}"',
    at_least=1,
  )
  lst_reduction: int = field(
    8, "how many times narrower than the tower the side network of lst is", at_least=1
  )
  itp: str = field(
    "image_to_pixel",
    "relationship map, Eq. 2, or that without the image or without the pixels",
    words=("image_to_pixel", "no_image", "no_pixel"),
  )
  apg: str = field(
    "parameter",
    "h, Eq. 3, as a bare parameter, or as a linear layer: other initial values, and a bias",
    words=("parameter", "linear"),
  )
  m2oe: str = field(
    "gated",
    "mixture of experts before ITP, their plain sum, or none; the official code has none",
    words=("gated", "sum", "none"),
  )
  m2oe_reduced: int = field(3, "r, width of the experts", at_least=1)
  m2oe_experts: int = field(4, "number of experts, at scales 1, 1/2, 1/4, 1/8", at_least=1)
  m2oe_top_k: int = field(2, "experts the gate keeps; the paper gives no number", at_least=1)
  h_shared: bool = field(
    False, "one h for all layers, as in the official code, or one per layer (Eq. 3)"
  )
  h_grid: tuple[int, int] | None = field(
    None,
    "rows and columns of the grid h is stored on, resized to the tokens; None: the grid of CLIP's "
    "pre-training",
    at_least=1,
  )
  rpm_layers: str = field(
    "all",
    "layers whose output makes relationship prompts for the next: all (but the last), or the "
    "first, last, odd or even of these, counted from 1",
    words=("all", "first", "last", "odd", "even", "none"),
  )
  combine: str = field(
    "cat",
    "relationship prompts as further tokens (cat), or their mean m over the classes added to the "
    "patch tokens (add) or as the factor 1 + m (mul)",
    words=("cat", "add", "mul"),
  )
  head: str = field(
    "lpm_c",
    "LPM a, b or c, the c of the official code (released), or TFPM, which trains nothing",
    words=("lpm_a", "lpm_b", "lpm_c", "released", "tfpm_a", "tfpm_b", "tfpm_c"),
  )
  class_embedding_copies: int = field(
    1,
    "how often the class embedding is added to the class token; the official code adds it twice",
    at_least=0,
  )
  prompt_dropout: float = field(0.1, "dropout rate of projected prompts", at_least=0, at_most=1)

  def __post_init__(self) -> None:
    for f in dataclasses.fields(self):
      if words := spec(f).words:
        check_known(f"{f.name}=", getattr(self, f.name), words)


@dataclasses.dataclass(frozen=True)
class Dense:
  """Training-free segmentation."""

  method: str = field(
    "maskclip",
    "vanilla, maskclip, maskclip_released, sclip, clearclip, naclip, naclip_kk, naclip_nonly, "
    "res_clip, sc_clip, gem or pearl (docs/method.md)",
  )
  residual: str = field(
    "",
    "residual connection and MLP of the last block, in gem the residual connections of its stream; "
    '"" is the method\'s own in this and the next two',
    words=("kept", "dropped", ""),
  )
  positions: str = field(
    "",
    "whose resize of the position embedding: sclip's and maskclip's are bicubic, and take it as it "
    "is for as many patches as the tower's, gem's is bicubic with antialias, RPN's bilinear",
    words=("sclip", "maskclip", "gem", "bilinear", ""),
  )
  odd_sides: str = field(
    "",
    "pixels at the bottom and the right that are no whole patch: left out, and the scores "
    "stretched (drop), or made whole by zeros (pad)",
    words=("drop", "pad", ""),
  )
  logit_scale: float = field(100.0, "probabilities are softmax(this times cosine)", above=0)
  denoise: float = field(
    0.0,
    "classes whose best probability in a window is lower are suppressed; 0: none",
    at_least=0,
    at_most=1,
  )
  key_smoothing: bool = field(False, "sum probabilities by the similarity of keys")
  smoothed_below: float = field(
    1.0, "smooth patches whose largest probability is lower", at_least=0
  )
  gaussian_std: float = field(5.0, "naclip's neighborhood and res_clip's blur, patches", above=0)
  res_clip_base: str = field(
    "naclip", "method that res_clip adds to", words=("naclip", "clearclip", "sclip")
  )
  res_clip_blocks: tuple[int, ...] | None = field(
    None,
    "blocks, from 1, whose attention res_clip adds; None: 6 to 9, or as deep in a tower of fewer "
    "than 12",
    at_least=1,
  )
  res_clip_rcs: tuple[float, float] = field(
    (2.0, 0.4), "τ and λ of that attention in the sum; (1, 0): none", at_least=0
  )
  res_clip_sfr: tuple[float, float] = field(
    (1.8, 0.7),
    "τ and λ of what a first pass's labels add; (1, 0): none, and no first pass",
    at_least=0,
  )
  res_clip_decay: bool = field(
    True, "less weight for patches of one label whose connecting line leaves it"
  )
  res_clip_threshold: float = field(
    0.11,
    "pixels whose largest probability in the first pass is lower take the first name",
    at_least=0,
    at_most=1,
  )
  sc_clip_blocks: tuple[int, int, int, int] | None = field(
    None,
    "blocks, from 1, whose output says which patches are alike before and after the last block, "
    "and the first and last of those that sc_clip adds up; None: 9, 4, 4 and 10 of 12, in "
    "proportion",
    at_least=1,
  )
  sc_clip_neighbors: int = field(
    30, "of a patch, when outliers are looked for; fewer than patches", at_least=1
  )
  sc_clip_contamination: float = field(
    0.05, "part of the patches that are outliers", at_least=0, at_most=1
  )
  sc_clip_beta: float = field(0.4, "cosines of patches that are lower count as 0")
  sc_clip_class_weight: float = field(0.3, "of the class token that is added to every patch")
  gem_depth: int | None = field(
    None,
    "one more than the last blocks that gem's second stream goes through; None: 7, or half of the "
    "blocks and one in a tower of fewer than 12",
    at_least=2,
  )
  gem_iterations: int = field(
    1, "how often gem averages queries, keys and values with their like first", at_least=0
  )
  pearl_alpha: float = field(
    0.08, "weight of the centered keys; 0.3 for ADE20K and Cityscapes", at_least=0
  )


@dataclasses.dataclass(frozen=True)
class CATSegConfig:
  """CAT-Seg. The defaults are those of the official code with ViT-B/16."""

  tuned: str = field(
    "query_value",
    "projections of the attention that are trained in both towers, whole blocks (full), or none",
    words=("query_value", "query_key", "key_value", "attention", "full", "none"),
  )
  tuned_positions: bool = field(False, "also train the position embedding of the vision tower")
  tuned_unused_query: bool = field(
    True,
    "count the query of the last vision block among what is trained: no gradient reaches it, so "
    "weight decay alone acts on it",
  )
  resolution: int = field(
    384, "side of the square that every image and window is resized to, pixels", at_least=1
  )
  dense_residual: str = field(
    "class_token",
    "what the last block adds to each token's value: the class token, or the token itself (own)",
    words=("class_token", "own"),
  )
  prompts: int = field(
    1,
    "channels of the cost volume: 1 for the mean over the sentences of `templates`, or as many as "
    "there are sentences",
    at_least=1,
  )
  width: int = field(128, "channels of the cost embedding", at_least=1)
  layers: int = field(2, "aggregation layers, each spatial, then over the classes", at_least=1)
  heads: int = field(4, "attention heads of both aggregations", at_least=1)
  window: int = field(12, "side of the windows of spatial aggregation, patches", at_least=1)
  appearance_width: int = field(128, "channels of the appearance guidance", at_least=1)
  text_width: int = field(128, "channels of the text guidance", at_least=1)
  class_attention: str = field("linear", "attention over the classes", words=("linear", "full"))
  class_pooling_train: tuple[int, int] = field(
    (2, 2), "rows and columns averaged before class aggregation, in training", at_least=1
  )
  class_pooling_eval: tuple[int, int] = field(
    (1, 1), "the same in evaluation and prediction", at_least=1, evaluation=True
  )
  class_pool_align_corners: bool = field(
    True, "undo the pooling by a resize with aligned corners, or by half pixels"
  )
  class_residual_includes_pooled: bool = field(
    True,
    "class aggregation adds its input and what it makes of it, of which the input is a part; or "
    "what it makes of it without that part",
  )
  pad_len: int = field(
    256,
    "classes that are filled up to with learned tokens; of more, those with the highest cosines "
    "are kept for each image; 0: neither",
    at_least=0,
  )
  truncated_logit: float = field(-100.0, "logit of the classes that are not kept")
  guidance_layers: tuple[int, int] = field(
    (3, 7),
    "blocks of the vision tower, from 0, whose output guides the first and second upsampling; the "
    "paper has them the other way round",
    at_least=0,
  )
  guidance_widths: tuple[int, int] = field((256, 128), "their channels, upsampled", at_least=1)
  decoder_guidance_widths: tuple[int, int] = field(
    (32, 16), "their channels, projected", at_least=1
  )
  decoder_widths: tuple[int, int] = field((64, 32), "channels after each upsampling", at_least=1)
