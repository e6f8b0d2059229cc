"""Words typed by users: class lists, suggestions for typos, differences between configs."""

import difflib
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence

from rpn_jax.base.errors import InputError

# Argument of `parse_names`.
Names = str | Sequence[str | Sequence[str]]
# Separates the synonyms of a class in vocabularies: "sea, ocean".
SEPARATOR = ", "


def suggestion(word: object, known: Iterable[str]) -> str:
  """The known word closest to a mistyped one; "" if there are none."""
  near = difflib.get_close_matches(str(word), list(known), 1, 0.0)
  return near[0] if near else ""


def check_known(what: str, word: object, known: Iterable[str]) -> None:
  """Checks a word against the allowed ones.

  Args:
    what: text before the word in the message, such as `data set ` or `config.synonyms=`.
    word: the word to check.
    known: the allowed words.

  Raises:
    InputError: an unknown word; the message has the closest known one and all of them.
  """
  known = list(known)
  if word not in known:
    raise InputError(
      f"{what}{word!r} is not known; did you mean {suggestion(word, known)!r}? "
      f"Known: {', '.join(word or repr(word) for word in known)}"
    )


def parse_names(names: Names) -> tuple[str, ...]:
  """Class names in the form of the vocabularies: synonyms joined by SEPARATOR.

  Args:
    names: "cat | kitten, grass", with commas or line breaks between classes and `|` between
      synonyms; or a list whose items are names or lists of synonyms.

  Raises:
    InputError: no names, an empty one, or a duplicate.
  """
  if isinstance(names, str):
    names = [name.split("|") for name in re.split(r"[,\n]", names.strip().strip(","))]
  classes = [[name] if isinstance(name, str) else name for name in names]
  return check_names([SEPARATOR.join(name.strip() for name in synonyms) for synonyms in classes])


def composed(text: str) -> str:
  """The text in Unicode's NFC, in which letters that look alike are alike: é is one character."""
  return unicodedata.normalize("NFC", text)


def check_names(names: Sequence[str]) -> tuple[str, ...]:
  """The names in NFC, without surrounding whitespace.

  Raises:
    InputError: no names, an empty one, or a duplicate.
  """
  names = tuple(composed(name.strip()) for name in names)
  if not names:
    raise InputError('no class names: expected at least one, as in "red circle, sand"')
  for i, name in enumerate(names):
    if not name:
      raise InputError(f"class name {i + 1} of {len(names)} is empty: remove the stray comma")
    if name in names[:i]:
      raise InputError(f"duplicate class name {name!r}: every class needs its own name")
  return names


def without_articles(name: str) -> str:
  """A class name without articles, since templates have their own."""
  parts = [re.sub(r"^(an?|the)\s+(?=\S)", "", part, flags=re.I) for part in name.split(SEPARATOR)]
  return SEPARATOR.join(parts)


def differences(old: object, new: object, path: str = "") -> list[str]:
  """Differences between two nested dictionaries, as lines `path: old value -> new value`."""
  if isinstance(old, Mapping) and isinstance(new, Mapping):
    keys = sorted(old.keys() | new.keys())
    lines = [differences(old.get(k), new.get(k), f"{path}.{k}" if path else k) for k in keys]
    return [line for part in lines for line in part]
  return [] if old == new else [f"{path}: {old} -> {new}"]
