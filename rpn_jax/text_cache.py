"""Text embeddings of class names: computed once by the frozen text tower, then reused."""

import functools
from collections.abc import Sequence

import jax
import numpy as np

from rpn_jax.errors import InputError
from rpn_jax.models.clip import CLIP, CLIPConfig, l2_normalize
from rpn_jax.tokenizer import tokenize

# Texts per call of the text tower; the last call is padded, so that one program serves all.
BATCH = 128


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


@functools.partial(jax.jit, static_argnums=0)
def _encode(model, params, tokens):
  # Compiled once per model and shape, however often names are embedded.
  return l2_normalize(model.apply({"params": params}, tokens, method="encode_text"))


def class_embeddings(
  config: CLIPConfig, params, names: Sequence[str], templates: Sequence[str] = ("a photo of a {}",)
) -> np.ndarray:
  """Unit-length text embeddings (C, E) float32, one per class name.

  With several templates a class is the normalised mean of its normalised embeddings
  (Radford et al., 2021, section 3.1.4).

  Args:
    config: the CLIP architecture.
    params: CLIP parameters with a `text` branch.
    names: C class names; see `check_names`.
    templates: sentences with one `{}` for the name.

  Raises:
    InputError: an empty, repeated or over-long name.
  """
  names = check_names(names)
  texts = [template.format(name) for name in names for template in templates]
  tokens = tokenize(texts, config.context_length)
  # Attention is causal: columns that are padding in every text change nothing.
  tokens = tokens[:, : 8 * -(-int((tokens != 0).sum(1).max()) // 8)]
  if tokens.max() >= config.vocab_size:
    raise InputError(
      f"the text tower knows {config.vocab_size} tokens, the tokenizer made id {tokens.max()}: "
      "these weights need another tokenizer"
    )
  size = min(BATCH, len(tokens))
  padded = np.pad(tokens, ((0, -len(tokens) % size), (0, 0)), mode="edge")
  starts = range(0, len(padded), size)
  rows = [np.asarray(_encode(CLIP(config), params, padded[i : i + size])) for i in starts]
  embeddings = np.concatenate(rows)[: len(tokens)].reshape(len(names), len(templates), -1)
  mean = embeddings.mean(axis=1)
  return mean / np.linalg.norm(mean, axis=-1, keepdims=True)
