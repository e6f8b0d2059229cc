"""The tokenizer against recordings of OpenAI's: golden strings, every class name, odd unicode."""

import html
import json

import ftfy
import numpy as np
import pytest

from rpn_jax.base.errors import InputError
from rpn_jax.text import tokenizer
from tests import FIXTURES, ROOT

VOCABULARIES = (ROOT / "data_pipelines/vocabularies", ROOT / "rpn_jax/assets/vocabularies")


@pytest.fixture(scope="module")
def golden():
  return np.load(ROOT / "tests/golden" / "tokenizer.npz")


@pytest.fixture(scope="module")
def recorded():
  """{text: ids} of fixtures/tokens.npz."""
  data = np.load(FIXTURES / "" / "tokens.npz")
  texts = json.loads(data["texts"].tobytes())
  ids = np.split(data["ids"], np.cumsum(data["lengths"].astype(int))[:-1])
  return dict(zip(texts, (x.tolist() for x in ids), strict=True))


def test_golden_strings(golden):
  tokens = tokenizer.tokenize(golden["strings"].tolist())
  assert tokens.dtype == np.int32
  np.testing.assert_array_equal(tokens, golden["tokens"])


def test_over_long_text(golden):
  text = str(golden["long_string"])
  with pytest.raises(InputError, match=r"\d+ tokens .*at most 77.*: shorten it$") as error:
    tokenizer.tokenize(["a cat", text])
  assert text[:40] in str(error.value) and "\n" not in str(error.value)


def test_every_recorded_string(recorded):
  wrong = [text for text, ids in recorded.items() if tokenizer.encode(text) != ids]
  assert not wrong


def test_plain_words_need_no_mending(recorded):
  """What is passed over for them changes none, and words tell texts apart as ids do."""
  mended = lambda text: " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split()).lower()
  odd = ["a\x1b[31m cat", "a\tcat", "cat &amp;amp; dog", "A  Cat", "``quoted''", "it's", "it 's"]
  texts = [*recorded, *odd]
  assert [text for text in texts if tokenizer._clean(text) != mended(text)] == []
  words = {text: tuple(tokenizer.split_words(text)) for text in texts}
  ids = {text: tuple(tokenizer.encode(text)) for text in texts}
  pairs = {(words[text], ids[text]) for text in texts}
  assert len(pairs) == len(set(words.values())) == len(set(ids.values()))


def test_the_recording_covers_the_vocabularies(recorded):
  files = [file for folder in VOCABULARIES for file in folder.glob("*.json")]
  assert len(files) == 19
  for file in files:
    names = json.loads(file.read_text())
    if isinstance(names, list):
      missing = [name for name in names if name not in recorded]
      assert not missing, f"run fixtures/make_tokens.py again: {file.name} has new {missing[:3]}"


def test_layout_of_a_row():
  row = tokenizer.tokenize(["a dog"], context_length=6)[0]
  assert row.tolist() == [49406, 320, 1929, 49407, 0, 0]
  assert tokenizer.tokenize(["a dog"], context_length=4)[0, -1] == 49407
  assert tokenizer.tokenize([]).shape == (0, 77)


@pytest.mark.parametrize("texts", ["a dog", ["a dog", None]])
def test_wrong_kind_of_input(texts):
  with pytest.raises(InputError):
    tokenizer.tokenize(texts)
