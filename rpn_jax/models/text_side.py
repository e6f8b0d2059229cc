"""Text that a tuned text tower encodes in the step, in place of embeddings computed once.

Shape letters: C classes, S synonyms, K sentences, T tokens, E joint embedding.
"""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from rpn_jax.models import cost_aggregation
from rpn_jax.models.clip import CLIPConfig, l2_normalize

# Beside them names that begin alike, or one alone, do not pass for a part of the sentence.
OTHER_NAMES = ("a", "b")


def tokens(encoder: Any, names: Sequence[str], shared: int) -> np.ndarray:
  """Token ids (C, S, K, T); rows of zeros fill up names with fewer synonyms.

  Args:
    encoder: see `Network.text_input`.
    names: C class names.
    shared: how many tokens after the first one all sentences must have in common.

  Raises:
    ValueError: they have not.
  """
  ids_CxKxT = encoder.tokens(names)
  length = ids_CxKxT.shape[-1]
  every = [ids_CxKxT, encoder.tokens(OTHER_NAMES)] if shared else []
  rows = [row for ids in every for row in ids.reshape(-1, ids.shape[-1]) if row.any()]
  if len({tuple(row[1 : 1 + shared]) for row in rows}) > 1:
    raise ValueError(
      f"context_tokens={shared}: expected sentences of config.templates that all begin with the "
      f"same {shared} tokens before the name, as 4 in 'a photo of a {{}}'; got others"
    )
  return ids_CxKxT.reshape(len(names), -1, encoder.sentences, length)


def encode(
  tower: Callable, module: nn.Module, tokens_CxSxKxT: jax.Array, clip: CLIPConfig
) -> jax.Array:
  """Unit-length embeddings (C, E): means over sentences, then over synonyms, as CLIP's ensembles.

  Args:
    tower: (module, tokens (B, T)) -> embeddings (B, E), not normalized.
    module: what the tower is a part of.
    tokens_CxSxKxT: of `tokens`.
    clip: the architecture.
  """
  rows_CxSxKxE = sentence_embeddings(tower, module, tokens_CxSxKxT, clip)
  means = l2_normalize(rows_CxSxKxE.mean(2))
  there = (tokens_CxSxKxT > 0).any((2, 3))
  return l2_normalize(jnp.where(there[..., None], means, 0).sum(1))


def sentence_embeddings(
  tower: Callable, module: nn.Module, tokens: jax.Array, clip: CLIPConfig
) -> jax.Array:
  """Unit-length embeddings (…, E) of token ids (…, T), in chunks; see `encode`."""
  length = tokens.shape[-1]
  widest = length * max(4 * clip.text_width, length * clip.text_heads)
  rows = cost_aggregation.in_chunks(
    lambda module, tokens: tower(module, tokens[0])[None],
    module, (tokens.reshape(1, -1, length),), (), axis=1, elements=widest, remat=False,
  )  # fmt: skip
  return l2_normalize(rows).reshape(*tokens.shape[:-1], -1)
