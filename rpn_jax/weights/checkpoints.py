"""Public CLIP checkpoints by name: where they are, what they must hold, and whose they are.

No row was ever fetched where this was written, which reached none of these hosts. The facts are
from the pages of the repositories (read in stored copies, November 2026; the OpenAI and L/14
DataComp pages in duplicates of them), and from `pretrained.py` of mlfoundations/open_clip:

- config.json: openai/clip-vit-large-patch14-336 (a duplicate), facebook/metaclip-b16-fullcc2.5b
  (c295da7) and -l14- (38e794d): no `hidden_act`, which is QuickGELU in transformers.
- open_clip_config.json: laion/CLIP-ViT-B-16-laion2B-s34B-b88K (7288da5), apple/DFN2B-CLIP-ViT-B-16
  (5add2d7): no `quick_gelu`, exact GELU; apple/DFN2B-CLIP-ViT-L-14 (fa63e19): `quick_gelu`.
- DataComp.XL: exact GELU, since open_clip lists them under ViT-B-16 and ViT-L-14, whose names with
  QuickGELU end in "-quickgelu".
- LAION-2B's g/14 and bigG/14: `model_configs` of open_clip 3.3, which lists them with its usual
  images and files; their pages in a mirror and a duplicate, which say MIT.
- Licenses: the head of each repository's page; OpenAI's from github.com/openai/CLIP.

All were trained on images normalized with OpenAI's mean and deviation. LAION-2B's ViT-L/14 was not
(`mean=INCEPTION_MEAN` in open_clip), and is therefore left out.
"""

import dataclasses
import hashlib
import pathlib
import re
from typing import Any

from rpn_jax.base.errors import InputError
from rpn_jax.base.paths import expand
from rpn_jax.base.words import check_known, suggestion
from rpn_jax.config import BACKBONES
from rpn_jax.models.clip import CLIPConfig

# A trained model in a repository, as `--mode=export` names it.
PROMPTS = "prompts.safetensors"
# Files of weights in a repository, in the order of preference: by the names of transformers, and of
# open_clip.
TRANSFORMERS = ("model.safetensors", "pytorch_model.bin")
OPEN_CLIP = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
# What an index of shards ends in, behind the name of the file that they are parts of.
INDEX = ".index.json"
# A repository with both may keep the image tower alone in model.safetensors (those of timm do).
ANY_LAYOUT = tuple(
  name
  for one in (OPEN_CLIP[0], TRANSFORMERS[0], OPEN_CLIP[1], TRANSFORMERS[1])
  for name in (one, one + INDEX)
)

_HUB = "hf://"
_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".json")
# OpenAI's own addresses; they have answered 404 since October 2025 (openai/CLIP, issue 516).
_OPENAI = "https://openaipublic.azureedge.net/clip/models"


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  """A public checkpoint.

  Attributes:
    name: as people call it; with `hf://` in front, any repository of the hub.
    repository: owner and name on the hub.
    files: names of its file of weights, in the order of preference.
    config: the architecture; None where the publisher's config beside the weights tells it.
    parameters: how many there are; 0 if unknown.
    publisher: who trained it, on what.
    license: of the weights.
    revision: a branch, tag or commit.
    url: a second address.
    sha256: published checksum of the file at the second address.
  """

  name: str
  repository: str
  files: tuple[str, ...]
  config: CLIPConfig | None = None
  parameters: int = 0
  publisher: str = ""
  license: str = ""
  revision: str = "main"
  url: str = ""
  sha256: str = ""

  @property
  def listed(self) -> bool:
    """Whether it is CLIP by a name of the table; at an address there may be a trained model."""
    return not self.name.startswith(_HUB)

  @property
  def slug(self) -> str:
    """The name as a file name: the same for all spellings, and another one for another name."""
    if self.listed:
      return self.name.replace("/", "-")
    # As the hub's own cache has it; no owner and no repository has two hyphens in a row.
    address = self.name.removeprefix(_HUB)
    slug = re.sub(r"[^\w.@-]", "-", address.replace("/", "--"))
    if slug.replace("--", "/") == address:
      return slug
    return f"{slug}-{hashlib.sha256(address.encode()).hexdigest()[:8]}"

  @property
  def page(self) -> str:
    """Where a browser finds the files."""
    return f"https://huggingface.co/{self.repository}/tree/{self.revision}"


def _sized(size: str, activation: str) -> dict[str, Any]:
  """Architecture, and the number of parameters that follows from it (a test counts them)."""
  b16, l14 = (BACKBONES[name].architecture for name in ("b16", "l14"))
  fields, millions = {
    "B/32": ({**b16, "patch_size": 32}, 151_277_313),
    "B/16": (b16, 149_620_737),
    "L/14": (l14, 427_616_513),
    "L/14@336px": ({**l14, "image_size": 336}, 427_944_193),
    "g/14": (
      {
        **l14,
        "embed_dim": 1024,
        "vision_width": 1408,
        "vision_layers": 40,
        "vision_mlp_width": 6144,
        "text_width": 1024,
        "text_layers": 24,
        "text_heads": 16,
      },
      1_366_678_273,
    ),
    "bigG/14": (
      {
        **l14,
        "embed_dim": 1280,
        "vision_width": 1664,
        "vision_layers": 48,
        "vision_mlp_width": 8192,
        "text_width": 1280,
        "text_layers": 32,
        "text_heads": 20,
      },
      2_539_567_105,
    ),
  }[size]
  return {"config": CLIPConfig(**fields, activation=activation), "parameters": millions}


def _openai(size: str, repository: str, sha256: str) -> Checkpoint:
  file = f"ViT-{size}.pt".replace("/", "-").replace("@", "-")
  return Checkpoint(
    f"ViT-{size}", f"openai/{repository}", TRANSFORMERS, publisher="OpenAI", license="MIT",
    url=f"{_OPENAI}/{sha256}/{file}", sha256=sha256, **_sized(size, "quick_gelu"),
  )  # fmt: skip


_ROWS = (
  _openai(
    "B/32", "clip-vit-base-patch32",
    "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af",
  ),
  _openai(
    "B/16", "clip-vit-base-patch16",
    "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f",
  ),
  _openai(
    "L/14", "clip-vit-large-patch14",
    "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836",
  ),
  _openai(
    "L/14@336px", "clip-vit-large-patch14-336",
    "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02",
  ),
  Checkpoint(
    "ViT-B/16-laion2b", "laion/CLIP-ViT-B-16-laion2B-s34B-b88K", OPEN_CLIP,
    publisher="LAION, LAION-2B", license="MIT", **_sized("B/16", "gelu"),
  ),
  Checkpoint(
    "ViT-g/14-laion2b", "laion/CLIP-ViT-g-14-laion2B-s34B-b88K", OPEN_CLIP,
    publisher="LAION, LAION-2B", license="MIT", **_sized("g/14", "gelu"),
  ),
  Checkpoint(
    "ViT-bigG/14-laion2b", "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k", OPEN_CLIP,
    publisher="LAION, LAION-2B", license="MIT", **_sized("bigG/14", "gelu"),
  ),
  Checkpoint(
    "ViT-B/16-datacomp", "laion/CLIP-ViT-B-16-DataComp.XL-s13B-b90K", OPEN_CLIP,
    publisher="LAION, DataComp.XL", license="MIT", **_sized("B/16", "gelu"),
  ),
  Checkpoint(
    "ViT-L/14-datacomp", "laion/CLIP-ViT-L-14-DataComp.XL-s13B-b90K", OPEN_CLIP,
    publisher="LAION, DataComp.XL", license="MIT", **_sized("L/14", "gelu"),
  ),
  Checkpoint(
    "ViT-B/16-dfn", "apple/DFN2B-CLIP-ViT-B-16", OPEN_CLIP,
    publisher="Apple, DFN-2B", license="Apple's own", **_sized("B/16", "gelu"),
  ),
  Checkpoint(
    "ViT-L/14-dfn", "apple/DFN2B-CLIP-ViT-L-14", OPEN_CLIP,
    publisher="Apple, DFN-2B", license="Apple's own", **_sized("L/14", "quick_gelu"),
  ),
  Checkpoint(
    "ViT-B/16-metaclip", "facebook/metaclip-b16-fullcc2.5b", TRANSFORMERS,
    publisher="Meta, MetaCLIP 2.5B", license="CC-BY-NC-4.0", **_sized("B/16", "quick_gelu"),
  ),
  Checkpoint(
    "ViT-L/14-metaclip", "facebook/metaclip-l14-fullcc2.5b", TRANSFORMERS,
    publisher="Meta, MetaCLIP 2.5B", license="CC-BY-NC-4.0", **_sized("L/14", "quick_gelu"),
  ),
)  # fmt: skip
CHECKPOINTS = {row.name: row for row in _ROWS}
# Other spellings, as those of open_clip ("ViT-B-16"), are the same name.
_FOLDED = re.compile(r"[/_-]")
# What is typed or pasted in place of hf://.
_LIKE_HUB = re.compile(
  r"(?i)(hf|hf-hub|huggingface):/*|https?://(www\.)?(huggingface\.co|hf\.co)/+"
)
# What a page's address has behind owner/name: a branch, and a file of it.
_PAGE = re.compile(r"([^/]+/[^/]+)/(?:tree|blob|resolve)/([^/]+)(/.+)?")


def find(name: object) -> Checkpoint | None:
  """The checkpoint of a name, or of `hf://owner/name[@revision][/file]`; None for anything else.

  Raises:
    InputError: an address of another form, or a name that is nearly one of the table.
  """
  text = str(name)
  if text.startswith(_HUB):
    return _of_address(text)
  if typo := _LIKE_HUB.match(text):
    raise InputError(
      f"expected hf://owner/name for a repository of the hub, got {text!r}: did you mean "
      f"{_of_page(text[typo.end() :])!r}?"
    )
  folded = {_fold(known): row for known, row in CHECKPOINTS.items()}
  if row := folded.get(_fold(text)):
    return row
  if re.fullmatch(r"(?i)vit-[a-z]+[-/]\d+(@\w+)?(-[a-z0-9]+)?", text):
    check_known("CLIP ", text, CHECKPOINTS)
  return None


def unfetched(name: str) -> CLIPConfig | None:
  """The architecture of published weights by their name, which need not be here; else None."""
  found = None if expand(name).exists() else find(name)
  return found.config if found else None


def check_name(name: str) -> Checkpoint:
  """The checkpoint of a name.

  Raises:
    InputError: an unknown name.
  """
  if checkpoint := find(name):
    return checkpoint
  near = near_address(name) or suggestion(name, CHECKPOINTS)
  raise InputError(
    f"{name!r} is no name of weights; did you mean {near!r}? "
    "`rpn weights` lists them; hf://owner/name is any other repository of the hub"
  )


def near_address(name: object) -> str:
  """hf://owner/name of owner/name, which may be a path, too; "" of anything else."""
  text = str(name)
  is_file = pathlib.PurePath(text).suffix in _SUFFIXES
  is_address = re.fullmatch(r"[\w.-]+/[\w.-]+", text) and not text.lower().startswith("vit")
  return _HUB + text if is_address and not is_file else ""


def _of_page(address: str) -> str:
  """hf://owner/name, with @revision and /file, of an address or what a browser shows of it."""
  address = address.partition("?")[0].rstrip("/")
  if page := _PAGE.fullmatch(address):
    repository, revision, file = page.groups()
    address = repository + (f"@{revision}" if revision != "main" else "") + (file or "")
  return _HUB + address


def _fold(name: str) -> str:
  folded = _FOLDED.sub("-", name)
  return folded if "-G-" in folded else folded.lower()  # g/14 is not the giant G/14


def _of_address(text: str) -> Checkpoint:
  match = re.fullmatch(r"hf://([\w.-]+/[\w.-]+)(?:@([\w.%-]+))?(?:/(.+))?", text)
  if not match or any(part in ("", ".", "..") for part in text.removeprefix(_HUB).split("/")):
    raise InputError(
      f"expected hf://owner/name, with @revision or /file behind it if needed, got {text!r}: as in "
      "hf://openai/clip-vit-base-patch16"
    )
  repository, revision, file = match.groups()
  revision = (revision or "main").replace("%2F", "/")
  files = (file,) if file else (PROMPTS, *ANY_LAYOUT)
  return Checkpoint(text, repository, files, revision=revision)
