"""Text embeddings of class names: computed once by the frozen text tower, then reused.

A name like "sea, ocean" lists synonyms; of this project's vocabularies only ade847 has such names,
217 of 847. Published methods read them differently, hence `SYNONYMS`:

    first   only the first; nine pairs or triples of ade847 are then equal ("screen", "bag")
    mean    normalised mean of the synonyms (CAT-Seg, `cat_seg_predictor.py`, there per sentence)
    max     every synonym competes by itself, the best counts (FC-CLIP, `get_classification_logits`,
            after OpenSeg and on OpenSeg's own, longer lists)
    joined  the whole string as it is (SAN, `clip_utils/classifier.py`)

ZegCLIP and RPN were measured on sets without synonyms.
"""

import contextlib
import difflib
import functools
import hashlib
import importlib.resources
import json
import os
import pathlib
from collections.abc import Sequence

import jax
import numpy as np
from absl import logging

from rpn_jax.errors import InputError
from rpn_jax.logging import progress
from rpn_jax.models.clip import CLIPConfig, TextTransformer, l2_normalize
from rpn_jax.tokenizer import tokenize

# Texts per call of the text tower; the last call is padded, so that one program serves all.
BATCH = 128
SYNONYMS = ("first", "mean", "max", "joined")
SEPARATOR = ", "
# Part of every key on disk: raise it when the tokenizer or the tower computes something else.
CACHE_VERSION = 1


@functools.cache
def _template_sets() -> dict[str, list[str]]:
  asset = importlib.resources.files("rpn_jax") / "assets" / "templates.json"
  sets = json.loads(asset.read_text(encoding="utf-8"))
  return {name: sentences for name, sentences in sets.items() if not name.startswith("_")}


def template_names() -> tuple[str, ...]:
  """The named sets of templates that ship with the package."""
  return tuple(_template_sets())


def template_sentences(templates: str | Sequence[str]) -> tuple[str, ...]:
  """Sentences around a class name, each with one '{}' for it.

  Args:
    templates: one of `template_names()` ("single" and "zegclip15" are the released RPN's), or the
      sentences themselves.

  Raises:
    InputError: an unknown set, with the nearest known one, no sentence, or one without its '{}'.
  """
  if isinstance(templates, str) and "{}" not in templates:
    known = _template_sets()
    if templates not in known:
      near = difflib.get_close_matches(templates, known, 1, 0.0)[0]
      raise InputError(
        f"config.templates={templates!r} is not known; did you mean {near!r}? "
        f"Known: {', '.join(known)}"
      )
    return tuple(known[templates])
  sentences = (templates,) if isinstance(templates, str) else tuple(templates)
  if not sentences:
    raise InputError("no templates: expected at least one sentence, as in ('a photo of a {}',)")
  for sentence in sentences:
    if sentence.count("{}") != 1:
      raise InputError(f"template {sentence!r}: expected one '{{}}', where the class name goes")
  return sentences


def check_names(names: Sequence[str]) -> tuple[str, ...]:
  """The names stripped of blanks; empty and repeated ones are an InputError."""
  names = tuple(name.strip() for name in names)
  if not names:
    raise InputError('no class names: expected at least one, as in --classes="red circle, sand"')
  for i, name in enumerate(names):
    if not name:
      raise InputError(f"class name {i + 1} of {len(names)} is empty: remove the stray comma")
    if name in names[:i]:
      raise InputError(f"class name {name!r} is given twice: every class needs a name of its own")
  return names


def expand(
  names: Sequence[str], scored_as: Sequence[int], synonyms: str
) -> tuple[tuple[str, ...], tuple[int, ...]]:
  """The rows to prompt at evaluation, and the class that each of them is scored as.

  With "max" every synonym is a row: mapping the best row of a pixel through `scored_as` gives the
  class with the highest score over its synonyms. Otherwise both come back as they were.

  Args:
    names: prompted names.
    scored_as: scored class of every name.
    synonyms: one of SYNONYMS.

  Raises:
    InputError: another mode.
  """
  _check_mode(synonyms)
  if synonyms != "max":
    return tuple(names), tuple(scored_as)
  rows = [
    (part, scored)
    for name, scored in zip(names, scored_as, strict=True)
    for part in _split(name)
  ]
  parts, classes = zip(*rows)
  return parts, classes


def _split(name: str) -> list[str]:
  return [part.strip() for part in name.split(SEPARATOR)]


def _check_mode(synonyms: str) -> None:
  if synonyms not in SYNONYMS:
    near = difflib.get_close_matches(synonyms, SYNONYMS, 1, 0.0)[0]
    raise InputError(
      f"config.synonyms={synonyms!r} is not known; did you mean {near!r}? "
      f"Known: {', '.join(SYNONYMS)}"
    )


def _parts(name: str, synonyms: str) -> list[str]:
  """The texts that make up one embedding."""
  parts = [name.strip()] if synonyms == "joined" else _split(name)
  if synonyms == "max" and len(parts) > 1:
    raise InputError(
      f"synonyms='max' has no single embedding of {name!r}, and training labels index names: "
      "train with 'first', 'mean' or 'joined'; for evaluation `expand` the names first"
    )
  return parts[:1] if synonyms == "first" else parts


@functools.partial(jax.jit, static_argnums=0)
def _encode(tower, params, tokens):
  # Compiled once per tower and shape, however often names are embedded. Exact products: what is
  # kept on disk must not depend on the device that made it.
  with jax.default_matmul_precision("highest"):
    return l2_normalize(tower.apply({"params": params}, tokens))


def _embed(config: CLIPConfig, params, texts: Sequence[str]) -> np.ndarray:
  """Unit-length embeddings (len(texts), E) float32 of whole texts."""
  tokens = tokenize(texts, config.context_length)
  # Attention is causal: columns that are padding in every text change nothing.
  tokens = tokens[:, : 8 * -(-int((tokens != 0).sum(1).max()) // 8)]
  if tokens.max() >= config.vocab_size:
    raise InputError(
      f"the text tower knows {config.vocab_size} tokens, the tokenizer made id {tokens.max()}: "
      "these weights need another tokenizer"
    )
  size = min(BATCH, 1 << (len(tokens) - 1).bit_length())  # a few sizes, each compiled once
  padded = np.pad(tokens, ((0, -len(tokens) % size), (0, 0)), mode="edge")
  starts = range(0, len(padded), size)
  # A display for the thousands of texts of a large vocabulary, not for a few names.
  shown = progress(starts, "embed class names", "batch") if len(starts) > 8 else starts
  tower, params = TextTransformer(config), jax.device_put(params["text"])
  rows = [np.asarray(_encode(tower, params, padded[i : i + size])) for i in shown]
  return np.concatenate(rows)[: len(tokens)]


def _normalized_mean(embeddings: np.ndarray) -> np.ndarray:
  mean = embeddings.mean(axis=-2)
  return mean / np.linalg.norm(mean, axis=-1, keepdims=True)


def class_embeddings(
  config: CLIPConfig,
  params,
  names: Sequence[str],
  templates: str | Sequence[str] = "single",
  *,
  synonyms: str = "mean",
  fingerprint: str | None = None,
  cache_dir: str | os.PathLike | None = None,
) -> np.ndarray:
  """Unit-length text embeddings (C, E) float32, one per name.

  With several templates it is the normalised mean of the normalised embeddings (Radford et al.,
  2021, section 3.1.4), and so it is with several synonyms.

  Args:
    config: the CLIP architecture.
    params: CLIP parameters with a `text` branch.
    names: C class names; equal ones get equal embeddings.
    templates: see `template_sentences`.
    synonyms: one of SYNONYMS; with "max", names already split by `expand`.
    fingerprint: of the weights, `convert.fingerprint(params)`. With it the result is kept on disk,
      and found there the next time; without it nothing is.
    cache_dir: where; None is ~/.cache/rpn_jax/text.

  Raises:
    InputError: no names, an empty or over-long one, unknown templates or synonyms.
  """
  _check_mode(synonyms)
  sentences = template_sentences(templates)
  parts = [_parts(name, synonyms) for name in names]
  phrases = list(dict.fromkeys(part for row in parts for part in row))
  if not phrases or "" in phrases:
    raise InputError(f"expected class names that are not empty, got {list(names)[:5]!r}")

  path = None
  if fingerprint:
    directory = pathlib.Path(cache_dir or pathlib.Path.home() / ".cache/rpn_jax/text")
    key = json.dumps([CACHE_VERSION, fingerprint, repr(config), sentences, parts])
    path = directory / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.npy"
    kept = _read(path, (len(parts), config.embed_dim))
    if kept is not None:
      return kept

  texts = [sentence.replace("{}", phrase) for phrase in phrases for sentence in sentences]
  embeddings = _embed(config, params, texts).reshape(len(phrases), len(sentences), -1)
  of_phrase = dict(zip(phrases, _normalized_mean(embeddings)))
  result = np.stack([_normalized_mean(np.stack([of_phrase[p] for p in row])) for row in parts])
  if path:
    _write(path, result)
  return result


def _read(path: pathlib.Path, shape: tuple[int, int]) -> np.ndarray | None:
  """Embeddings from a file of `_write`; None if it is missing, damaged or something else."""
  try:
    # Mapped, so that a header that lies about the size allocates nothing.
    kept = np.array(np.load(path, allow_pickle=False, mmap_mode="r"))
    usable = kept.shape == shape and kept.dtype == np.float32
    return kept if usable and np.allclose(np.linalg.norm(kept, axis=-1), 1, atol=1e-4) else None
  except Exception:  # a damaged header raises all kinds of errors, and each means: compute it anew
    return None


def _write(path: pathlib.Path, embeddings: np.ndarray) -> None:
  """Keeps embeddings on disk if that is possible; a reader never sees half a file."""
  temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(temporary, "wb") as file:
      np.save(file, embeddings)
    os.replace(temporary, path)
  except OSError as error:
    _warn(path.parent, error.strerror)
    with contextlib.suppress(OSError):
      temporary.unlink(missing_ok=True)


@functools.cache  # once for a folder, however many vocabularies are embedded
def _warn(directory: pathlib.Path, reason: str | None) -> None:
  logging.warning("text embeddings are not kept in %s for the next run: %s", directory, reason)
