"""TODO rpn_jax.text.templates."""

import difflib
import functools
import importlib.resources
import json
from collections.abc import Sequence

from rpn_jax.base.errors import InputError
from rpn_jax.base.words import SEPARATOR

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
  check_mode(synonyms)
  if synonyms != "max":
    return tuple(names), tuple(scored_as)
  rows = [
    (part, scored) for name, scored in zip(names, scored_as, strict=True) for part in _split(name)
  ]
  parts, classes = zip(*rows)
  return parts, classes


def _split(name: str) -> list[str]:
  return [part.strip() for part in name.split(SEPARATOR)]


def check_mode(synonyms: str) -> None:
  if synonyms not in SYNONYMS:
    near = difflib.get_close_matches(synonyms, SYNONYMS, 1, 0.0)[0]
    raise InputError(
      f"config.synonyms={synonyms!r} is not known; did you mean {near!r}? "
      f"Known: {', '.join(SYNONYMS)}"
    )


def name_parts(name: str, synonyms: str) -> list[str]:
  """The texts that make up one embedding."""
  parts = [name.strip()] if synonyms == "joined" else _split(name)
  if synonyms == "max" and len(parts) > 1:
    raise InputError(
      f"synonyms='max' has no single embedding of {name!r}, and training labels index names: "
      "train with 'first', 'mean' or 'joined'; for evaluation `expand` the names first"
    )
  return parts[:1] if synonyms == "first" else parts
