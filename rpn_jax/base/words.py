"""Words that people type: class lists, suggestions for a mistyped word, what differs."""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence

from rpn_jax.base.errors import InputError

# What `parse_names` takes.
Names = str | Sequence[str | Sequence[str]]
# Between the synonyms of a class, as vocabularies write them: "sea, ocean".
SEPARATOR = ", "


def suggestion(word: object, known: Iterable[str]) -> str:
  """The known word that is nearest to a mistyped one; "" if nothing is known."""
  near = difflib.get_close_matches(str(word), list(known), 1, 0.0)
  return near[0] if near else ""


def check_known(what: str, word: object, known: Iterable[str]) -> None:
  """Checks a word against the allowed ones.

  Args:
    what: what stands before the word in the message, such as `data set ` or `config.synonyms=`.
    word: as typed.
    known: the allowed words.

  Raises:
    InputError: another word, with the nearest known one and all of them.
  """
  known = list(known)
  if word not in known:
    raise InputError(
      f"{what}{word!r} is not known; did you mean {suggestion(word, known)!r}? "
      f"Known: {', '.join(known)}"
    )


def parse_names(names: Names) -> tuple[str, ...]:
  """Class names, each with its synonyms joined by SEPARATOR, as the vocabularies write them.

  Args:
    names: "cat | kitten, grass", with commas or line breaks between classes and `|` between
      synonyms; or a list of names, in which a list stands for synonyms.

  Raises:
    InputError: no name, an empty one, or a duplicate.
  """
  if isinstance(names, str):
    names = [name.split("|") for name in re.split(r"[,\n]", names.strip().strip(","))]
  rows = [[name] if isinstance(name, str) else name for name in names]
  return check_names([SEPARATOR.join(part.strip() for part in row) for row in rows])


def check_names(names: Sequence[str]) -> tuple[str, ...]:
  """The names without surrounding blanks.

  Raises:
    InputError: no name, an empty one, or a duplicate.
  """
  names = tuple(name.strip() for name in names)
  if not names:
    raise InputError('no class names: expected at least one, as in --classes="red circle, sand"')
  for i, name in enumerate(names):
    if not name:
      raise InputError(f"class name {i + 1} of {len(names)} is empty: remove the stray comma")
    if name in names[:i]:
      raise InputError(f"duplicate class name {name!r}: every class needs its own name")
  return names


def without_articles(name: str) -> str:
  """A class name without its articles: the sentence around it brings its own."""
  parts = [re.sub(r"^(an?|the)\s+(?=\S)", "", part, flags=re.I) for part in name.split(SEPARATOR)]
  return SEPARATOR.join(parts)


def differences(old: object, new: object, path: str = "") -> list[str]:
  """What differs between two nested dictionaries: lines `path: old value -> new value`."""
  if isinstance(old, Mapping) and isinstance(new, Mapping):
    keys = sorted(old.keys() | new.keys())
    lines = [differences(old.get(k), new.get(k), f"{path}.{k}" if path else k) for k in keys]
    return [line for part in lines for line in part]
  return [] if old == new else [f"{path}: {old} -> {new}"]
