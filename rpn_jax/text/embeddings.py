"""Text embeddings of class names: computed once by the frozen text tower, then reused.

Shape letters: C classes, K sentences of a name, T tokens of a sentence, E joint embedding.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import cast

import jax
import numpy as np

from rpn_jax.base import paths
from rpn_jax.base.console import progress
from rpn_jax.base.errors import InputError
from rpn_jax.models import kernels
from rpn_jax.models.clip import CLIPConfig, TextTransformer, l2_normalize
from rpn_jax.text.templates import check_synonyms, phrases, template_sentences
from rpn_jax.text.tokenizer import tokenize

# Sentences per call of the text tower, the first of these numbers that is enough. Calls are padded
# to them, and sentences to 16, 32, … tokens, so that few programs serve all words.
BATCH_SENTENCES = (8, 32, 128)
MIN_TOKENS = 16
# Part of every key on disk: raise it when the tokenizer or the tower computes something else.
CACHE_VERSION = 1


@dataclasses.dataclass(frozen=True, eq=False)
class TextEncoder:
  """Class names to what a network is given of them.

  Attributes:
    config: the CLIP architecture.
    params: CLIP parameters with a `text` branch.
    templates: see `template_sentences`.
    synonyms: one of `templates.SYNONYMS`.
    fingerprint: of the parameters, `arrays.fingerprint(params)`, for the embeddings on disk;
      "" keeps none there.
  """

  config: CLIPConfig
  params: Mapping
  templates: str | Sequence[str] = "single"
  synonyms: str = "mean"
  fingerprint: str = ""

  @property
  def sentences(self) -> int:
    """Number of sentences around a name."""
    return len(template_sentences(self.templates))

  def embed(self, names: Sequence[str]) -> np.ndarray:
    """Unit-length embeddings (C, E) float32 by these parameters; see `class_embeddings`."""
    return class_embeddings(
      self.config, self.params, names, self.templates,
      synonyms=self.synonyms, fingerprint=self.fingerprint,
    )  # fmt: skip

  def tokens(self, names: Sequence[str]) -> np.ndarray:
    """Token ids (C, K, T) int32, for a network that trains the text tower.

    K is the number of sentences times the largest number of synonyms: all sentences of the first
    synonym, then all of the second. Rows of zeros fill up names with fewer synonyms; they have no
    begin token, and whoever averages leaves them out. T is what the longest sentence needs, in
    multiples of 8.

    Raises:
      InputError: as `class_embeddings`.
    """
    sentences = template_sentences(self.templates)
    parts = _checked_phrases(names, self.synonyms)
    counts_C = [len(row) * len(sentences) for row in parts]
    texts = _sentences_around([phrase for row in parts for phrase in row], sentences)
    filled_CxK = np.arange(max(counts_C)) < np.array(counts_C)[:, None]
    ids = _token_ids(self.config, texts)
    tokens_CxKxT = np.zeros((*filled_CxK.shape, ids.shape[1]), np.int32)
    tokens_CxKxT[filled_CxK] = ids
    return tokens_CxKxT


def class_embeddings(
  config: CLIPConfig,
  params: Mapping,
  names: Sequence[str],
  templates: str | Sequence[str] = "single",
  *,
  synonyms: str = "mean",
  fingerprint: str | None = None,
  device: jax.Device | None = None,
) -> np.ndarray:
  """Unit-length text embeddings (C, E) float32, one per name.

  With several templates it is the normalized mean of the normalized embeddings (Radford et al.,
  2021, section 3.1.4), and so it is with several synonyms.

  Args:
    config: the CLIP architecture.
    params: CLIP parameters with a `text` branch.
    names: C class names; equal ones get equal embeddings.
    templates: see `template_sentences`.
    synonyms: one of `templates.SYNONYMS`; with "max", names already split by `expand`.
    fingerprint: of the weights, `arrays.fingerprint(params)`. With it the result is kept on disk,
      and found there the next time; without it nothing is.
    device: to compute on; None is the first one of this process.

  Raises:
    InputError: no names, an empty or over-long one, unknown templates or synonyms, or weights
      that give NaN or infinity.
  """
  sentences = template_sentences(templates)
  parts = _checked_phrases(names, synonyms)

  path = None
  if fingerprint and (folder := paths.cache_dir()):
    key = json.dumps([CACHE_VERSION, fingerprint, repr(config), sentences, parts])
    path = folder / "text" / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.npy"
    kept = _read(path, (len(parts), config.embed_dim))
    if kept is not None:
      return kept

  unique = list(dict.fromkeys(phrase for row in parts for phrase in row))
  embeddings = _embed(config, params, _sentences_around(unique, sentences), device)
  embeddings = embeddings.reshape(len(unique), len(sentences), -1)
  of_phrase = dict(zip(unique, _normalized_mean(embeddings), strict=True))
  result = np.stack([_normalized_mean(np.stack([of_phrase[p] for p in row])) for row in parts])
  if path:
    _write(path, result)
  return result


def _checked_phrases(names: Sequence[str], synonyms: str) -> list[list[str]]:
  check_synonyms(synonyms)
  parts = [phrases(name, synonyms) for name in names]
  if not parts or any("" in row for row in parts):
    raise InputError(f"expected class names that are not empty, got {list(names)[:5]!r}")
  return parts


def _sentences_around(names: Sequence[str], sentences: Sequence[str]) -> list[str]:
  return [sentence.replace("{}", name) for name in names for sentence in sentences]


def _token_ids(config: CLIPConfig, texts: Sequence[str]) -> np.ndarray:
  """Token ids (len(texts), T) int32. Attention is causal: what is cut off is padding in every text
  and would change nothing."""
  tokens = tokenize(texts, config.context_length)
  tokens = tokens[:, : 8 * -(-int((tokens != 0).sum(1).max()) // 8)]
  if tokens.max() >= config.vocab_size:
    raise InputError(
      f"the text tower knows {config.vocab_size} tokens, the tokenizer made id {tokens.max()}: "
      "these weights need another tokenizer"
    )
  return tokens


@functools.partial(jax.jit, static_argnums=0)
def _encode(tower: TextTransformer, params: Mapping, tokens: np.ndarray) -> jax.Array:
  # Compiled once per tower and shape, however often names are embedded. Exact products: what is
  # kept on disk must not depend on the device that made it.
  with jax.default_matmul_precision("highest"):
    return l2_normalize(cast(jax.Array, tower.apply({"params": params}, tokens)))


def _embed(
  config: CLIPConfig, params: Mapping, texts: Sequence[str], device: jax.Device | None
) -> np.ndarray:
  """Unit-length embeddings (len(texts), E) float32 of whole texts."""
  tokens = _token_ids(config, texts)
  size = next((n for n in BATCH_SENTENCES if n >= len(tokens)), BATCH_SENTENCES[-1])
  length = max(MIN_TOKENS, 1 << (tokens.shape[1] - 1).bit_length())
  length = min(length, config.context_length)
  padded = np.pad(tokens, ((0, 0), (0, length - tokens.shape[1])))
  padded = np.pad(padded, ((0, -len(tokens) % size), (0, 0)), mode="edge")
  starts = range(0, len(padded), size)
  # A display for the thousands of texts of a large vocabulary, not for a few names.
  displayed = progress(starts, "embed class names", "batch") if len(starts) > 8 else starts
  device = device or jax.local_devices()[0]
  tower = TextTransformer(config, kernels=kernels.for_platform(device.platform))
  params = jax.device_put(params["text"], device)
  rows = [np.asarray(_encode(tower, params, padded[i : i + size])) for i in displayed]
  embeddings = np.concatenate(rows)[: len(tokens)]
  if not np.isfinite(embeddings).all():
    text = texts[int(np.argmin(np.isfinite(embeddings).all(-1)))]
    raise InputError(
      f"expected a finite embedding of {text!r}, the text tower gave NaN or infinity: the weights "
      "are damaged, get them again"
    )
  return embeddings


def _normalized_mean(embeddings: np.ndarray) -> np.ndarray:
  mean = embeddings.mean(axis=-2)
  return mean / np.linalg.norm(mean, axis=-1, keepdims=True)


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
  """Keeps embeddings on disk; where the disk is full they are computed again the next time."""
  with contextlib.suppress(OSError):
    path.parent.mkdir(parents=True, exist_ok=True)
    with paths.replacing(path) as temporary, open(temporary, "wb") as file:
      np.save(file, embeddings)
