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

import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Sequence

import jax
import numpy as np
from absl import logging

from rpn_jax.base.console import progress
from rpn_jax.base.errors import InputError
from rpn_jax.base.paths import replacing
from rpn_jax.models.clip import CLIPConfig, TextTransformer, l2_normalize
from rpn_jax.text.templates import check_mode, name_parts, template_sentences
from rpn_jax.text.tokenizer import tokenize

# Texts per call of the text tower; the last call is padded, so that one program serves all.
BATCH = 128
# Part of every key on disk: raise it when the tokenizer or the tower computes something else.
CACHE_VERSION = 1


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
  check_mode(synonyms)
  sentences = template_sentences(templates)
  parts = [name_parts(name, synonyms) for name in names]
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
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary, open(temporary, "wb") as file:
      np.save(file, embeddings)
  except OSError as error:
    _warn(path.parent, error.strerror)


@functools.cache  # once for a folder, however many vocabularies are embedded
def _warn(directory: pathlib.Path, reason: str | None) -> None:
  logging.warning("text embeddings are not kept in %s for the next run: %s", directory, reason)
