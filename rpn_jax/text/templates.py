"""Sentences around class names, and names with synonyms.

A name like "sea, ocean" lists synonyms; of this project's vocabularies only ade847 has such names,
217 of 847. Published methods read them differently, hence `SYNONYMS`:

    first   only the first; nine pairs or triples of ade847 are then equal ("screen", "bag")
    mean    normalized mean of the synonyms (CAT-Seg, `cat_seg_predictor.py`, there per sentence)
    max     every synonym competes by itself, the best counts (FC-CLIP, `get_classification_logits`,
            after OpenSeg and on OpenSeg's own, longer lists)
    joined  the whole string as it is (SAN, `clip_utils/classifier.py`)

ZegCLIP and RPN were measured on sets without synonyms.
"""

import functools
import importlib.resources
import json
from collections.abc import Sequence

from rpn_jax.base.errors import InputError
from rpn_jax.base.words import SEPARATOR, check_known, split_synonyms, without_articles
from rpn_jax.text.tokenizer import split_words

SYNONYMS = ("first", "mean", "max", "joined")


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
    templates: one of `template_names()` ("single" and "zegclip15" are those of the official code),
      or the sentences themselves.

  Raises:
    InputError: an unknown set, no sentence, or one without its '{}'.
  """
  if isinstance(templates, str) and "{}" not in templates:
    check_known("templates=", templates, _template_sets())
    return tuple(_template_sets()[templates])
  sentences = (templates,) if isinstance(templates, str) else tuple(templates)
  if not sentences:
    raise InputError("no templates: expected at least one sentence, as in ('a photo of a {}',)")
  for sentence in sentences:
    if sentence.count("{}") != 1:
      raise InputError(f"template {sentence!r}: expected one '{{}}', where the class name goes")
  return sentences


def check_synonyms(synonyms: str) -> None:
  """Raises an InputError unless it is one of SYNONYMS."""
  check_known("synonyms=", synonyms, SYNONYMS)


def phrases(name: str, synonyms: str) -> list[str]:
  """The synonyms of a name that its embedding is made of.

  Raises:
    InputError: a name with several synonyms where each of them competes by itself ("max").
  """
  parts = split_synonyms(name)
  parts = [SEPARATOR.join(parts)] if synonyms == "joined" else parts
  if synonyms == "max" and len(parts) > 1:
    raise InputError(
      f"synonyms='max' has no single embedding of {name!r}, and training labels index names: "
      "train with 'first', 'mean' or 'joined'; for evaluation `expand` the names first"
    )
  return parts[:1] if synonyms == "first" else parts


def check_distinct(names: Sequence[str], synonyms: str) -> None:
  """Checks that CLIP can tell class names apart, which it reads without case and spaces.

  Args:
    names: as somebody typed them.
    synonyms: one of SYNONYMS.

  Raises:
    InputError: two names with the same embedding; with "max", with a synonym in common.
  """
  first: dict[frozenset, str] = {}
  for name in names:
    for key in embedding_keys(name, synonyms):
      other = first.setdefault(key, name)
      if other == name:
        continue
      if synonyms == "max" and embedding_keys(other, "mean") != embedding_keys(name, "mean"):
        (words,) = key
        raise InputError(
          f"class names {other!r} and {name!r} share {' '.join(words)!r}, whose pixels would all "
          "be of the first with synonyms='max': leave it out of one, or take synonyms='mean'"
        )
      raise InputError(
        f"class names {other!r} and {name!r} are the same words to CLIP, which ignores capitals, "
        "spaces and articles: leave one out"
      )


def embedding_keys(name: str, synonyms: str) -> set[frozenset]:
  """What each embedding of a typed name depends on: the words of its synonyms."""
  rows, _ = expand([without_articles(name)], [0], synonyms)
  return {frozenset(tuple(split_words(part)) for part in phrases(row, synonyms)) for row in rows}


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
  check_synonyms(synonyms)
  if synonyms != "max":
    return tuple(names), tuple(scored_as)
  rows = [
    (part, scored)
    for name, scored in zip(names, scored_as, strict=True)
    for part in split_synonyms(name)
  ]
  parts, classes = zip(*rows)
  return parts, classes
