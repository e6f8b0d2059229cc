"""Weights and prompts from the files people have into the form that this package reads, and back.

    python -m rpn_jax convert ViT-B-16.pt clip_b16.safetensors --dtype float16 --verify

Reads TorchScript archives, PyTorch state dicts and safetensors, whole or in shards with an index,
with the names of OpenAI, open_clip or Hugging Face's transformers, and this project's own files.
What the publisher of a model put beside its weights is read, too: config.json,
open_clip_config.json, preprocessor_config.json, and whether the tokenizer is CLIP's.

A checkpoint of the official code of RPN or of CAT-Seg becomes a file of prompts, and such a file
becomes theirs; CAT-Seg's has the whole CLIP in it:

    python -m rpn_jax convert rpn_voc.pth rpn_voc.safetensors --clip clip_b16.safetensors
    python -m rpn_jax convert rpn_voc.safetensors rpn_voc.pth
    python -m rpn_jax convert model_base.pth cat_seg_b.safetensors --clip ViT-B/16
    python -m rpn_jax convert cat_seg_b.safetensors model_base.pth --clip ViT-B/16
"""

import argparse
import pathlib
from collections.abc import Mapping, Sequence

import jax

from rpn_jax.base import paths
from rpn_jax.base.console import run_command, table
from rpn_jax.base.errors import InputError
from rpn_jax.base.fields import with_tuples
from rpn_jax.base.transfer import sha256
from rpn_jax.config import CATSegConfig
from rpn_jax.text.embeddings import class_embeddings
from rpn_jax.weights import authors, cat_seg, checkpoints, clip_file, prompts_file, publisher
from rpn_jax.weights.architecture import describe
from rpn_jax.weights.arrays import WeightsFile, fingerprint, read_arrays

# SHA-256 of OpenAI's published files -> name.
PUBLISHED = {row.sha256: row.name for row in checkpoints.CHECKPOINTS.values() if row.sha256}
# In a trained CLIP the first two are closer to each other than the first and the third.
TRIPLES = (
  ("a photo of a cat", "a photo of a kitten", "a photo of a truck"),
  ("a photo of a car", "a photo of an automobile", "a photo of a banana"),
  ("a photo of the sea", "a photo of the ocean", "a photo of a desk"),
  ("a photo of a sofa", "a photo of a couch", "a photo of a horse"),
  ("a photo of a tree", "a photo of a forest", "a photo of a computer"),
  ("a photo of a person", "a photo of a woman", "a photo of a bridge"),
)


def main(arguments=None) -> int:
  parser = argparse.ArgumentParser(
    prog="rpn convert",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument(
    "source", help="weights of CLIP or their name, prompts, or an official checkpoint"
  )
  parser.add_argument(
    "destination", type=paths.expand, help="the safetensors (or, of prompts, .pth) file to write"
  )
  parser.add_argument("--dtype", choices=("float16", "float32"), help="of weights (float32)")
  parser.add_argument(
    "--activation", choices=("quick_gelu", "gelu"), help="if neither file nor config tell it"
  )
  parser.add_argument("--vision_heads", type=int, help="if nothing tells them")
  parser.add_argument("--text_heads", type=int, help="if nothing tells them")
  parser.add_argument(
    "--verify", action="store_const", const=True, help="checksum, and similarities of texts"
  )
  parser.add_argument(
    "--clip", help="with a checkpoint of RPN or CAT-Seg: the CLIP it was trained around"
  )
  args = parser.parse_args(arguments)

  def convert() -> None:
    untold = ("activation", "vision_heads", "text_heads")
    names = ("dtype", *untold, "verify", "clip")
    given = {name: value for name in names if (value := getattr(args, name)) is not None}
    overrides = {name: given[name] for name in untold if name in given}
    file = read_arrays(clip_file.find_weights(args.source, overrides))
    if authors.is_authors(file.arrays):
      _check_flags(given, "a checkpoint of RPN", ("clip",))
      lines = _authors_to_prompts(file, args.destination, args.clip)
    elif cat_seg.is_cat_seg(file.arrays):
      _check_flags(given, "a checkpoint of CAT-Seg", ("clip",))
      lines = _cat_seg_to_prompts(file, args.destination, args.clip)
    elif file.metadata.get("format") == prompts_file.FORMAT:
      _check_flags(given, "a file of prompts", ("clip",))
      lines = _prompts_to_authors(file.path, args.destination, args.clip)
    else:
      _check_flags(given, "weights of CLIP", names[:-1])
      dtype, verify = given.get("dtype", "float32"), given.get("verify", False)
      lines = _convert_clip(file, args.destination, dtype, overrides, verify)
    print("\n".join(lines))

  return run_command(convert)


def _check_flags(given: Mapping, source: str, used: Sequence[str]) -> None:
  """Raises an InputError for a flag that a source of this kind does not use."""
  if unused := [name for name in given if name not in used]:
    raise InputError(f"--{unused[0]} is not for {source}, which the source is: leave it out")


def _convert_clip(
  file: WeightsFile, destination: pathlib.Path, dtype: str, overrides: Mapping, verify: bool
) -> list[str]:
  kind, config, params = clip_file.parse(file, overrides)
  clip_file.save(destination, config, params, dtype, {"source": kind})
  lines = [f"{file.path}: {kind}", describe(config)]
  lines.append(f"{_count(params):,} parameters, fingerprint {fingerprint(params)}")
  if config.vocab_size < publisher.CLIP_TOKENS:
    lines.append(
      f"the text tower knows {config.vocab_size} tokens, CLIP's tokenizer makes ids up to "
      f"{publisher.CLIP_TOKENS - 1}: no text can be embedded by these weights"
    )
  if verify:
    lines.append(verification(file.path, config, params))
  return [*lines, f"wrote {destination} ({dtype})"]


def verification(source: pathlib.Path, config, params: Mapping) -> str:
  """What `--verify` prints: the checksum, and similarities of texts.

  Args:
    source: the file of weights.
    config: the CLIPConfig they tell.
    params: CLIP parameters.
  """
  digest = sha256(source)
  known = PUBLISHED.get(digest)
  lines = [f"sha256 {digest}: " + (f"OpenAI's {known}" if known else "no file of OpenAI's")]
  texts = list(dict.fromkeys(text for triple in TRIPLES for text in triple))
  try:
    embedding = dict(zip(texts, class_embeddings(config, params, texts, "{}", synonyms="joined")))
  except InputError as error:
    return "\n".join([*lines, f"no similarities of texts: {error}"])
  rows, in_order = [], 0
  for text, near, far in TRIPLES:
    close, distant = (float(embedding[text] @ embedding[other]) for other in (near, far))
    in_order += close > distant
    rows.append([text, near, f"{close:.3f}", far, f"{distant:.3f}"])
  lines.append(table(rows, ["text", "near", "cosine", "far", "cosine"]))
  lines.append(f"{in_order} of {len(TRIPLES)} in order")
  if in_order < len(TRIPLES):
    lines[-1] += ": a CLIP trained on photographs has all of them"
  return "\n".join(lines)


def _authors_to_prompts(
  file: WeightsFile, destination: pathlib.Path, clip_path: str | None
) -> list[str]:
  _, clip = _clip_of(clip_path, f"{file.path} is a checkpoint of the authors' RPN")
  theirs, prompts = authors.from_authors(file.arrays, str(file.path))
  authors.check_same_clip(theirs, clip, f"{file.path} and {clip_path}")
  _save_prompts(destination, prompts, clip, authors.settings(prompts))
  return [
    f"{file.path}: the authors' checkpoint, its CLIP is that of {clip_path}",
    f"wrote {_count(prompts):,} parameters to {destination}; predict with the preset released and "
    f"--config.prompts={destination}",
  ]


def _cat_seg_to_prompts(
  file: WeightsFile, destination: pathlib.Path, clip_path: str | None
) -> list[str]:
  config, clip = _clip_of(clip_path, f"{file.path} is a checkpoint of CAT-Seg")
  where = f"{file.path} and {clip_path}"
  official = cat_seg.from_official(file.arrays, str(file.path))
  trained, tuned = cat_seg.trained_part(official, clip, where)
  prompts, other = {**official.prompts, **trained}, cat_seg.other_towers(official, config)
  _save_prompts(
    destination, prompts, clip, {**cat_seg.settings(official, tuned), "clip": str(clip_path)}
  )
  return [
    f"{file.path}: CAT-Seg on a {tuned['tuned']} tuned CLIP, the rest of it is that of {clip_path}",
    *filter(None, [official.assumed]),
    *(f"it was trained with other towers (official -> yours): {x}" for x in other),
    f"wrote {_count(prompts):,} parameters to {destination}; predict with --model={destination}",
  ]


def _count(tree: Mapping) -> int:
  return sum(value.size for value in jax.tree.leaves(tree))


def _clip_of(path: str | None, checkpoint: str) -> tuple:
  """Architecture and parameters of the CLIP that a checkpoint was trained around."""
  if path is None:
    raise InputError(
      f"{checkpoint}: pass --clip=FILE_OR_NAME, the CLIP weights that it was trained around"
    )
  return clip_file.load_clip(path)


def _save_prompts(destination: pathlib.Path, prompts: dict, clip: Mapping, config: Mapping) -> None:
  content = prompts_file.Prompts(prompts, fingerprint(clip), dict(config), (), 0)
  prompts_file.save(destination, content)


def _prompts_to_authors(
  source: pathlib.Path, destination: pathlib.Path, clip_path: str | None
) -> list[str]:
  content = prompts_file.load(source)
  notes = {"clip": content.clip, "step": str(content.step), "written_by": "rpn_jax"}
  if content.config.get("method") == "cat_seg":
    config, clip = _clip_of(clip_path, f"{source} becomes a checkpoint with the whole CLIP in it")
    run = prompts_file.config_of(source).to_dict()
    if content.clip != fingerprint(clip):
      raise InputError(
        f"{source} was trained around the CLIP weights {content.clip}, {clip_path} has "
        f"{fingerprint(clip)}: pass --clip with those weights"
      )
    fields = CATSegConfig(**run["cat_seg"])
    state = cat_seg.save(destination, config, clip, content.prompts, fields, notes)
    lines = [
      f"wrote {len(state)} arrays by the official names to {destination}, as detectron2 does"
    ]
    official = cat_seg.from_official(state, str(destination))
    if changed := cat_seg.unwritten(official, config, run):
      lines.append(f"no checkpoint holds these settings (official -> yours): {'; '.join(changed)}")
    return lines
  if clip_path is not None:
    raise InputError(
      f"--clip={clip_path} is not for prompts of RPN, whose checkpoint holds no CLIP: leave it out"
    )
  if changed := authors.other_settings(content.prompts, content.config.get("model", {})):
    raise InputError(
      f"{source} was trained with settings that the official code does not have (official -> "
      f"yours: {'; '.join(changed)}), and would predict something else there: train with "
      "preset=released, or keep the file as it is"
    )
  arrays = authors.save(destination, content.prompts, notes)
  lines = [
    f"wrote {arrays} arrays by the authors' names to {destination}: load them over a model "
    "with CLIP's weights, not strictly, for the frozen towers are not in it; h is for crops of "
    f"{len(content.prompts['h'])} patches"
  ]
  config = content.config
  own = authors.settings(content.prompts)["data"]  # which are there anyway
  data = {name: x for name, x in config.get("data", {}).items() if with_tuples(x) != own.get(name)}
  known = {**data, "templates": config.get("templates")}
  if said := [f"{name} {known[name]}" for name in ("templates", "mean", "std") if known.get(name)]:
    lines.append(f"no checkpoint holds these settings, give them there: {', '.join(said)}")
  return lines
