"""CLIP's tokenizer: text to ids, equal to OpenAI's for every string the tests try.

The steps: ftfy and HTML clean-up, lower case, a split into words, byte-pair merges within words.
"""

import functools
import gzip
import html
import importlib.resources
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from rpn_jax.base.errors import InputError

if TYPE_CHECKING:
  from tokenizers import models, pre_tokenizers

START, END = "<|startoftext|>", "<|endoftext|>"
START_ID, END_ID = 49406, 49407
VOCAB_SIZE = 49408

# 256 bytes, the same with an end-of-word mark, and two special words are ids of their own; every
# other id is one merge.
_NUM_MERGES = VOCAB_SIZE - 2 * 256 - 2

# The original matches without regard to case. In lower-cased text that shows in two places only:
# U+017F (long s) counts as the s of 's, and U+0345 (iota subscript) is dropped, being neither a
# letter nor "not a letter".
_WORDS = (
  r"<\|startoftext\|>|<\|endoftext\|>|'[s\x{17F}]|'t|'re|'ve|'m|'ll|'d"
  r"|\p{L}+|\p{N}|[^\s\p{L}\p{N}\x{345}]+"
)


def _byte_letters() -> list[str]:
  """The letter that stands for each byte in the merges file, in the order of their ids.

  Printable Latin-1 bytes stand for themselves and come first; the others take letters from U+0100.
  """
  printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
  others = 256 - len(printable)
  return [chr(c) for c in printable] + [chr(0x100 + i) for i in range(others)]


@functools.cache
def _splitter() -> "pre_tokenizers.Sequence":
  """Splits a text into words, spelled in the letters of bytes."""
  # Imported here: the library takes longer to load than the rest of this module.
  from tokenizers import Regex, pre_tokenizers

  split = pre_tokenizers.Split(Regex(_WORDS), "removed", invert=True)
  spell = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  return pre_tokenizers.Sequence([split, spell])


@functools.cache
def _model() -> "models.BPE":
  """The byte-pair model, which takes a fifth of a second to read."""
  from tokenizers import models

  asset = importlib.resources.files("rpn_jax") / "assets" / "bpe_simple_vocab_16e6.txt.gz"
  lines = gzip.decompress(asset.read_bytes()).decode().split("\n")
  pairs = [line.split() for line in lines[1 : 1 + _NUM_MERGES]]
  merges = [(left, right) for left, right in pairs]
  letters = _byte_letters()
  words = [*letters, *(x + "</w>" for x in letters), *("".join(x) for x in merges), START, END]
  vocabulary = {word: i for i, word in enumerate(words)}
  return models.BPE(vocabulary, merges, end_of_word_suffix="</w>", unk_token=END)


def _clean(text: str) -> str:
  # Plain words have nothing to mend, and are most of what is typed: ftfy takes a while to load.
  if not (text.isascii() and text.isprintable() and "&" not in text):
    import ftfy

    # Twice: captions collected from the web hold entities of entities.
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
  return " ".join(text.split()).lower()


def split_words(text: str) -> list[str]:
  """The words of a text, in the letters of their bytes: texts with the same ids have the same."""
  return [word for word, _ in _splitter().pre_tokenize_str(_clean(text))]


def encode(text: str) -> list[int]:
  """Ids of one text, without the begin and end tokens and without padding."""
  model, ids = _model(), []
  for word in split_words(text):
    # The special words never go through the merges, which would spell them out.
    if word in (START, END):
      ids.append(START_ID if word == START else END_ID)
    else:
      ids.extend(token.id for token in model.tokenize(word))
  return ids


def tokenize(texts: Sequence[str], context_length: int = 77) -> np.ndarray:
  """Token ids of texts: begin token, text, end token, zeros.

  Args:
    texts: the texts; any unicode.
    context_length: ids per text, the begin and end tokens included.

  Returns:
    (len(texts), context_length) int32.

  Raises:
    InputError: a text is too long, or `texts` is not a list of strings.

  Source: Radford et al., 2021, and OpenAI's `clip.tokenize`.
  """
  if isinstance(texts, str):
    raise InputError(f"tokenize expects a list of texts, got one string {texts!r}: wrap it in [ ]")
  if context_length < 2:
    raise InputError(
      f"context_length must hold the begin and end tokens, got {context_length}: use 2 or more"
    )
  tokens = np.zeros((len(texts), context_length), np.int32)
  for row, text in zip(tokens, texts, strict=True):
    if not isinstance(text, str):
      raise InputError(f"tokenize expects strings, got {type(text).__name__} {text!r}: convert it")
    ids = [START_ID, *encode(text), END_ID]
    if len(ids) > context_length:
      shown = text if len(text) <= 80 else text[:77] + "..."
      raise InputError(
        f"text {shown!r} has {len(ids)} tokens with begin and end, the model reads at most "
        f"{context_length}: shorten it"
      )
    row[: len(ids)] = ids
  return tokens
