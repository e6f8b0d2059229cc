"""CLIP weights from the files people have to the parameter tree of `rpn_jax.models.clip`.

    python -m rpn_jax convert ViT-B-16.pt clip_b16.safetensors --dtype float16 --verify

Reads TorchScript archives, PyTorch state dicts and safetensors, whole or in shards with an index,
with the names of OpenAI, open_clip or Hugging Face's transformers, and this project's own files.
Where a model's config.json or open_clip_config.json is beside its weights it is read, too.

The authors' checkpoint of RPN becomes a file of prompts, and such a file becomes theirs:

    python -m rpn_jax convert rpn_voc.pth rpn_voc.safetensors --clip clip_b16.safetensors
    python -m rpn_jax convert rpn_voc.safetensors rpn_voc.pth
"""

import argparse
import pathlib
import sys
from collections.abc import Mapping

import jax

from rpn_jax.base.console import table
from rpn_jax.base.errors import InputError
from rpn_jax.models.clip import CLIPConfig
from rpn_jax.text.embeddings import class_embeddings
from rpn_jax.weights import torch_archive
from rpn_jax.weights.arrays import fingerprint, read_arrays, sha256, written
from rpn_jax.weights.authors import from_authors, same_towers, to_authors_prompts
from rpn_jax.weights.clip_file import describe, load, load_with_kind, save

# SHA-256 of OpenAI's published files; they are part of the addresses these are downloaded from.
PUBLISHED = {
  "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af": "ViT-B/32",
  "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f": "ViT-B/16",
  "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836": "ViT-L/14",
  "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02": "ViT-L/14@336px",
}
# In a trained CLIP the first two are closer to each other than the first and the third.
TRIPLES = (
  ("a photo of a cat", "a photo of a kitten", "a photo of a truck"),
  ("a photo of a car", "a photo of an automobile", "a photo of a banana"),
  ("a photo of the sea", "a photo of the ocean", "a photo of a desk"),
  ("a photo of a sofa", "a photo of a couch", "a photo of a horse"),
  ("a photo of a tree", "a photo of a forest", "a photo of a computer"),
  ("a photo of a person", "a photo of a woman", "a photo of a bridge"),
)


def verification(source: pathlib.Path, config: CLIPConfig, params) -> str:
  """What `--verify` prints: the checksum, and similarities of texts."""
  lines = []
  if source.is_file():
    digest = sha256(source)
    known = PUBLISHED.get(digest)
    lines.append(f"sha256 {digest}: " + (f"OpenAI's {known}" if known else "no file of OpenAI's"))
  texts = list(dict.fromkeys(text for triple in TRIPLES for text in triple))
  try:
    embedding = dict(zip(texts, class_embeddings(config, params, texts, "{}", synonyms="joined")))
  except InputError as error:
    return "\n".join([*lines, f"no similarities of texts: {error}"])
  rows, right = [], 0
  for text, near, far in TRIPLES:
    close, distant = (float(embedding[text] @ embedding[other]) for other in (near, far))
    right += close > distant
    rows.append([text, near, f"{close:.3f}", far, f"{distant:.3f}"])
  lines.append(table(rows, ["text", "near", "cosine", "far", "cosine"]))
  lines.append(
    f"{right} of {len(TRIPLES)} in order"
    + ("" if right == len(TRIPLES) else ": a CLIP trained on photographs has all of them")
  )
  return "\n".join(lines)


def main(arguments=None) -> int:
  parser = argparse.ArgumentParser(prog="rpn convert", description=__doc__)
  parser.formatter_class = argparse.RawDescriptionHelpFormatter
  parser.add_argument("source", help="weights of CLIP, prompts, or the authors' checkpoint")
  parser.add_argument("destination", help="the safetensors (or, of prompts, .pth) file to write")
  parser.add_argument("--dtype", choices=("float16", "float32"), default="float32")
  parser.add_argument(
    "--activation", choices=("quick_gelu", "gelu"), help="if neither file nor config tell it"
  )
  parser.add_argument("--vision_heads", type=int, help="if not width / 64")
  parser.add_argument("--text_heads", type=int, help="if not width / 64")
  parser.add_argument("--verify", action="store_true", help="checksum, and similarities of texts")
  parser.add_argument("--clip", help="with the authors' checkpoint: the CLIP it was trained around")
  args = parser.parse_args(arguments)
  source, destination = pathlib.Path(args.source), pathlib.Path(args.destination)
  given = {
    name: value
    for name in ("activation", "vision_heads", "text_heads")
    if (value := getattr(args, name)) is not None
  }
  try:
    read = read_arrays(source)
    if any(name.startswith("decode_head.") for name in read[1]):
      lines = _authors_to_prompts(source, read[1], destination, args.clip)
    elif read[2].get("format") == "rpn_jax.prompts":
      lines = _prompts_to_authors(source, destination)
    else:
      kind, config, params = load_with_kind(source, given, read)
      save(destination, config, params, args.dtype, {"source": kind})
      count = sum(value.size for value in jax.tree.leaves(params))
      lines = [f"{source}: {kind}", describe(config)]
      lines.append(f"{count:,} parameters, fingerprint {fingerprint(params)}")
      if args.verify:
        lines.append(verification(source, config, params))
      lines.append(f"wrote {destination} ({args.dtype})")
  except InputError as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  print("\n".join(lines))
  return 0


def _authors_to_prompts(source, state: Mapping, destination, clip_path: str | None) -> list[str]:
  from rpn_jax.weights import prompts_file

  if clip_path is None:
    raise InputError(
      f"{source} is a checkpoint of the authors' RPN: pass --clip=FILE, the CLIP weights it was "
      "trained around, which are compared with the ones in it"
    )
  theirs, prompts = from_authors(state, str(source))
  _, clip = load(clip_path)
  same_towers(theirs, clip, f"{source} and {clip_path}")
  side = round(len(prompts["h"]) ** 0.5)
  # The release's settings; h is stored on the token grid of a training crop.
  model = {
    "tuner": "rpn+vpt", "itp": "image_to_pixel", "apg": "parameter", "m2oe": "none",
    "rpm_layers": "all", "combine": "cat", "h_shared": True,
    "deep_tokens": prompts["deep_tokens"].shape[1], "h_grid": [side, side], "head": "released",
    "class_embedding_copies": 2,
  }  # fmt: skip
  content = prompts_file.Prompts(prompts, fingerprint(clip), {"model": model}, (), 0)
  prompts_file.save(destination, content)
  count = sum(value.size for value in jax.tree.leaves(prompts))
  return [
    f"{source}: the authors' checkpoint, its CLIP is that of {clip_path}",
    f"wrote {count:,} parameters to {destination}; predict with the preset released and "
    f"--config.prompts={destination}",
  ]


def _prompts_to_authors(source, destination) -> list[str]:
  from rpn_jax.weights import prompts_file

  content = prompts_file.load(source)
  state = to_authors_prompts(content.prompts)
  meta = {"clip": content.clip, "step": str(content.step), "written_by": "rpn_jax"}
  with written(destination) as temporary:
    torch_archive.write(temporary, state, meta)
  return [
    f"wrote {len(state)} arrays by the authors' names to {destination}: load them over a model "
    "with CLIP's weights, not strictly, for the frozen towers are not in it"
  ]
