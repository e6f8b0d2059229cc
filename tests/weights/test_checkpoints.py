"""The table of public checkpoints, and what counts as a name."""

import numpy as np

from rpn_jax.models.clip import CLIPConfig
from rpn_jax.weights import checkpoints
from tests import ROOT, tiny
from tests.weights.checks import flatten, one_line


def test_names():
  find = checkpoints.find
  assert find("ViT-B/16") is find("vit-b-16") is find("ViT_B_16") is not None
  assert find("ViT-L-14@336px").config.image_size == 336
  for other in ("ViT-B-16.pt", "weights/ViT-B-16.safetensors", "runs/shapes", "shapes_clip", ""):
    assert find(other) is None
  address = find("hf://owner/na.me@refs%2Fpr%2F1/sub/model.safetensors")
  assert address.repository == "owner/na.me" and address.files == ("sub/model.safetensors",)
  assert address.revision == "refs/pr/1" and "/" not in address.slug
  one_line("CLIP 'ViT-B/18' is not known; did you mean 'ViT-B/16'", find, "ViT-B/18")
  # g/14 is another model than the giant G/14, which open_clip calls bigG/14.
  assert find("VIT-g-14-LAION2B").name == "ViT-g/14-laion2b"
  assert find("ViT-bigg-14-laion2b").name == "ViT-bigG/14-laion2b"
  one_line("CLIP 'ViT-G/14-laion2b' is not known", find, "ViT-G/14-laion2b")
  for wrong in ("hf://owner", "hf://owner/name/../../x", "hf://a b/c", "hf://"):
    one_line("expected hf://owner/name", find, wrong)


def test_every_address_has_a_file_of_its_own():
  names = [
    "hf://a/b-c", "hf://a-b/c", "hf://ViT-B/16", "ViT-B/16", "hf://a/b@x", "hf://a/b/x", "hf://a/b",
    "hf://a/b/x y", "hf://a/b/x-y", "hf://a/b--x", "hf://a/b@c%2Fd", "hf://a/b@c-2Fd",
  ]  # fmt: skip
  slugs = [checkpoints.find(name).slug for name in names]
  assert len({*slugs}) == len(names) and all("/" not in slug for slug in slugs)


def test_what_is_nearly_an_address():
  typed = "HF://a/b", "hf:/a/b", "hf:a/b", "huggingface://a/b", "hf-hub:a/b"
  pasted = (f"https://huggingface.co/a/b{end}" for end in ("", "/", "/tree/main"))
  for text in (*typed, *pasted):
    message = f"got '{text}': did you mean 'hf://a/b'"
    one_line(message, checkpoints.find, text)
    one_line(message, checkpoints.check_name, text)
  for page, address in (
    ("resolve/main/c/d.bin?download=true", "a/b/c/d.bin"),
    ("blob/refs%2Fpr%2F3/d.bin", "a/b@refs%2Fpr%2F3/d.bin"),
  ):
    one_line(f"'hf://{address}'", checkpoints.find, f"https://huggingface.co/a/b/{page}")
    assert checkpoints.find(f"hf://{address}").repository == "a/b"
  one_line("'a/b' is no name of weights; did you mean 'hf://a/b'", checkpoints.check_name, "a/b")


def count(c: CLIPConfig) -> int:
  """Parameters of a CLIP, from the formula of a transformer."""
  # Attention of 4 D² + 4 D, norms of 4 D, and two projections between D and the MLP's width.
  blocks = lambda d, mlp, layers: layers * (4 * d**2 + 9 * d + (2 * d + 1) * mlp)
  vision = blocks(c.vision_width, c.vision_mlp_width or 4 * c.vision_width, c.vision_layers)
  vision += c.vision_width * (3 * c.patch_size**2 + 1 + c.grid**2 + 1 + 4 + c.embed_dim)
  text = blocks(c.text_width, 4 * c.text_width, c.text_layers)
  text += c.text_width * (c.vocab_size + c.context_length + 2 + c.embed_dim)
  return vision + text + 1


def test_the_table():
  slugs = {row.slug for row in checkpoints.CHECKPOINTS.values()}
  assert len(slugs) == len(checkpoints.CHECKPOINTS)
  assert count(tiny.TINY) == sum(np.size(x) for x in flatten(tiny._params(0)).values())
  for row in checkpoints.CHECKPOINTS.values():
    assert count(row.config) == row.parameters, row.name  # as open_clip publishes them
    assert row.license and row.publisher and row.name == checkpoints.find(row.slug).name
    assert not row.url or row.sha256 in row.url
    # Heads are not told by a file alone.
    for tower in ("vision", "text"):
      width, heads = (getattr(row.config, f"{tower}_{what}") for what in ("width", "heads"))
      assert heads == (16 if width > 1280 else width / 64)


def test_the_page_has_the_table():
  page = (ROOT / "docs/weights.md").read_text()
  for row in checkpoints.CHECKPOINTS.values():
    line = f"| `{row.name}` | {row.publisher} | {row.repository} | {row.license} |"
    assert line in page, f"docs/weights.md lacks: {line}"
