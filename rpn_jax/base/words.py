"""Words typed by users: class lists, suggestions for typos, differences between configs."""

import codecs
import difflib
import pathlib
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rpn_jax.base import paths, vocabularies
from rpn_jax.base.errors import InputError

# Argument of `parse_names`.
Names = str | Sequence[str | Sequence[str]]
# Separates the synonyms of a class in vocabularies: "sea, ocean".
SEPARATOR = ", "
# Before the name of a published data set whose classes are meant.
LIST = "list:"
MAX_TEXT_BYTES = 16 << 20
# What people separate classes by: comma and semicolon, of full width, Chinese, Japanese, Arabic.
_SEPARATES = ",;，；、﹐﹑﹔､،؛"
_JOINS = "|｜"
_BLANK = _SEPARATES + " \t\u00a0\u3000"
_LINE_ENDS = re.compile(r"[\n\r\x0b\x0c\x85\u2028\u2029]")
_BRACKETS = {
  "(": ")",
  "[": "]",
  "{": "}",
  "（": "）",
  "［": "］",
  "｛": "｝",
  "【": "】",
  "〔": "〕",
}
_QUOTES = {'"': '"', "'": "'", "“": "”", "„": "“", "«": "»", "「": "」", "『": "』", "＂": "＂"}


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
    names: "cat | kitten, grass", with commas, semicolons or line ends between classes and `|`
      between synonyms, also as they are written in Chinese, Japanese and Arabic. Within brackets,
      and within quotes around a whole name, they separate nothing: 'crt screen (lcd, tv), "salt,
      pepper"'. `list:NAME` among the names stands for the class names of a published data set, see
      `vocabularies.NAMES`. Or a list whose items are names or lists of synonyms: each is one class,
      in which `|` and, as in vocabularies, SEPARATOR join synonyms.

  Raises:
    InputError: no names, an empty one or an empty synonym, a duplicate, a bracket or quote that is
      not closed, an unknown list, or what is no text.
  """
  classes: Sequence[Sequence[str]]
  if isinstance(names, str):
    lines = (line.strip(_BLANK) for line in _LINE_ENDS.split(names))
    classes = [synonyms for line in lines if line for synonyms in _parse_line(line)]
  else:
    classes = _listed(names)
  found: list[str] = []
  for i, parts in enumerate(classes):
    stripped = [part.strip() for part in parts]
    if len(stripped) > 1 and "" in stripped:
      raise InputError(
        f"class name {i + 1}, {' | '.join(stripped).strip()!r}, has an empty synonym: remove the "
        "stray |"
      )
    if len(stripped) == 1 and stripped[0].startswith(LIST):
      found += read_list(stripped[0].removeprefix(LIST))
    else:
      found.append(SEPARATOR.join(stripped))
  return check_names(found)


def _listed(names: Any) -> list[list[str]]:
  """The synonyms of each class of a list; see `parse_names`."""
  try:
    items = None if isinstance(names, Mapping | bytes) else list(names)
  except TypeError:
    items = None
  if items is None:
    raise InputError(
      'expected class names as text, as in "cat | kitten, grass", or as a list of texts, got '
      f"{type(names).__name__}"
    )
  classes = []
  for i, name in enumerate(items):
    single = isinstance(name, str | bytes | Mapping) or not isinstance(name, Iterable)
    synonyms = [name] if single else [*name]
    if wrong := [part for part in synonyms if not isinstance(part, str)]:
      raise InputError(
        f"class name {i + 1}: expected text, or a list of synonyms, got {wrong[0]!r}"
      )
    classes.append([part for synonym in synonyms for part in _split_at_bars(synonym)])
  return classes


def _split_at_bars(synonym: str) -> list[str]:
  """What `|` separates in a name of a list, whose commas stay."""
  if not any(bar in synonym for bar in _JOINS):
    return [synonym]
  return [half for part in _parts(synonym) for half in _parse_line(part, separates="")[0]]


def read_list(name: str) -> tuple[str, ...]:
  """The class names of a published data set; raises an InputError for an unknown one."""
  check_known(LIST, name, vocabularies.NAMES)
  return vocabularies.read(name)


def read_names(source: str) -> tuple[str, ...]:
  """Class names by the name of a published data set, or of a text file.

  A file has the syntax of `parse_names`; lines that begin with # are comments.

  Args:
    source: as somebody typed it. One of `vocabularies.NAMES` is never a file: `./ade150` is.

  Raises:
    InputError: no such file, no text, or see `parse_names`.
  """
  if source in vocabularies.NAMES:
    return read_list(source)
  path = paths.expand(source)
  if not path.is_file():
    raise InputError(
      f"--words={source}: expected a text file of class names, or one of "
      f"{', '.join(vocabularies.NAMES)}; no such file"
    )
  text = read_text(path, "class names")
  lines = [line for line in _LINE_ENDS.split(text) if not line.lstrip().startswith("#")]
  try:
    names = parse_names("\n".join(lines))
  except InputError as error:
    raise InputError(f"{path}: {error}") from None
  if noted := [name for name in names if re.search(r"\s#", name)]:
    print(f"{path}: {noted[0]!r} is one class name; only a # at the beginning of a line begins a "
          "comment", flush=True)  # fmt: skip
  used = sum(bool(line.strip(_BLANK)) for line in lines)
  if 1 < used < len(names) and not any(LIST in line for line in lines):
    print(f"{path}: {len(names)} classes on {used} lines; in a line, commas separate classes and "
          "| joins synonyms", flush=True)  # fmt: skip
  return names


def read_text(path: pathlib.Path, what: str) -> str:
  """The text of a small file in UTF-8, or in what Windows calls Unicode (UTF-16 with its mark).

  Raises:
    InputError: another encoding, or far too much of it.
  """
  try:
    if path.stat().st_size > MAX_TEXT_BYTES:
      raise InputError(f"{path}: expected {what}, got more than {MAX_TEXT_BYTES >> 20} MiB of text")
    data = path.read_bytes()
    wide = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    text = data.decode("utf-16" if wide else "utf-8-sig")
    if "\0" in text:
      raise UnicodeError
    return text
  except (OSError, UnicodeError) as error:
    got = error.strerror if isinstance(error, OSError) else "another encoding"
    raise InputError(
      f"{path}: expected {what} as text in UTF-8, got {got}; save it again"
    ) from error


def _parse_line(line: str, separates: str = _SEPARATES) -> list[list[str]]:
  """Classes of a line, each a list of synonyms; `separates`: the letters between classes."""
  classes, start, closing = [[""]], 0, []
  at = 0
  while at < len(line):
    letter, part = line[at], classes[-1][-1]
    if not part.strip() and letter in _QUOTES:
      end = line.find(_QUOTES[letter], at + 1)
      rest = line[end + 1 :].lstrip() if end > 0 else ""
      if end > 0 and (not rest or rest[0] in separates + _JOINS):
        name = line[at + 1 : end].strip()
        # The quotes stay where a list of names, which may be parsed again, would be split.
        quoted = any(x in name for x in (SEPARATOR, *_JOINS))
        classes[-1][-1] = f'"{name}"' if quoted else name
        at = len(line) - len(rest)
        continue
      if end < 0 and letter != "'":  # '70s
        raise InputError(f"class names: the quote in {line[at : at + 30]!r} is not closed")
    if letter in _BRACKETS:
      closing.append(_BRACKETS[letter])
      start = at if len(closing) == 1 else start
    elif closing and letter == closing[-1]:
      closing.pop()
    elif not closing and letter in separates + _JOINS:
      if letter in _JOINS:
        classes[-1].append("")
      else:
        classes.append([""])
      at += 1
      continue
    classes[-1][-1] = part + letter
    at += 1
  if closing:
    raise InputError(f"class names: the bracket in {line[start : start + 30]!r} is not closed")
  return classes


def split_synonyms(name: str) -> list[str]:
  """The synonyms of a class name: "sea, ocean" is two, "crt screen (lcd, tv)" is one."""
  return [part[1:-1] if _is_quoted(part) else part for part in _parts(name)]


def _parts(name: str) -> list[str]:
  """The synonyms as they are written; commas in brackets and quotes separate nothing."""
  found, pending = [], ""
  for part in name.split(SEPARATOR):
    pending = f"{pending}{SEPARATOR}{part}" if pending else part
    if not _is_open(pending):
      found.append(pending.strip())
      pending = ""
  # What is never closed was no bracket.
  return found + [part.strip() for part in pending.split(SEPARATOR)] if pending else found


def _is_open(text: str) -> bool:
  if text.startswith('"'):
    return not _is_quoted(text)
  closing: list[str] = []
  for letter in text:
    if letter in _BRACKETS:
      closing.append(_BRACKETS[letter])
    elif closing and letter == closing[-1]:
      closing.pop()
  return bool(closing)


def _is_quoted(text: str) -> bool:
  return len(text) > 1 and text[0] == text[-1] == '"'


def composed(text: str) -> str:
  """The text in Unicode's NFC, in which letters that look alike are alike: é is one character."""
  return unicodedata.normalize("NFC", text)


def check_names(names: Sequence[str]) -> tuple[str, ...]:
  """The names in NFC, without surrounding whitespace.

  Raises:
    InputError: no names, an empty one, a duplicate, or one that is no text.
  """
  names = tuple(composed(name.strip()) for name in names)
  if not names:
    raise InputError('no class names: expected at least one, as in "red circle, sand"')
  for i, name in enumerate(names):
    if not name:
      raise InputError(f"class name {i + 1} of {len(names)} is empty: remove the stray comma")
    if name in names[:i]:
      raise InputError(f"duplicate class name {name!r}: every class needs its own name")
    try:
      name.encode()
    except UnicodeEncodeError:
      raise InputError(
        f"class name {name!r}: expected text in UTF-8, got other bytes, as of a Latin-1 script or "
        "file: convert it, as by iconv"
      ) from None
  return names


def without_articles(name: str) -> str:
  """A class name without articles, since templates have their own."""
  parts = [re.sub(r"^(an?|the)\s+(?=\S)", "", part, flags=re.I) for part in _parts(name)]
  return SEPARATOR.join(parts)


def differences(old: object, new: object, path: str = "") -> list[str]:
  """Differences between two nested dictionaries, as lines `path: old value -> new value`."""
  if isinstance(old, Mapping) and isinstance(new, Mapping):
    keys = sorted(old.keys() | new.keys())
    lines = [differences(old.get(k), new.get(k), f"{path}.{k}" if path else k) for k in keys]
    return [line for part in lines for line in part]
  return [] if old == new else [f"{path}: {old} -> {new}"]
