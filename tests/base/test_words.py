"""Words as people write them."""

import json
import os
import unicodedata

import numpy as np
import pytest

from rpn_jax.base import vocabularies
from rpn_jax.base.errors import InputError
from rpn_jax.base.words import (
  check_names,
  parse_names,
  read_names,
  split_synonyms,
  without_articles,
)


def test_names_are_composed():
  decomposed = unicodedata.normalize("NFD", "café | bistrô, Übung")
  assert len(decomposed) == len("café | bistrô, Übung") + 3
  assert parse_names(decomposed) == ("café, bistrô", "Übung")


def test_names_that_look_alike_are_duplicates():
  with pytest.raises(InputError, match="duplicate class name 'é'"):
    check_names(["e\u0301", "\u00e9"])


def test_a_name_of_other_bytes_is_refused():
  """As a shell passes on what a Latin-1 script says."""
  with pytest.raises(InputError, match=r"class name 'caf\\udce9': expected text in UTF-8"):
    parse_names(os.fsdecode(b"sand, caf\xe9"))


def test_no_names_are_told_without_a_flag():
  """In Python there are no flags."""
  for none in ([], "", " , ", "\n"):
    with pytest.raises(InputError, match=r"no class names: expected at least one, as in \"red"):
      parse_names(none)


@pytest.mark.parametrize("separator", [*",;，；、﹐﹑﹔､،؛\n\r", "\r\n", "\u2028", " ,\n"])
def test_what_separates(separator):
  assert parse_names(f"猫{separator}traffic light {separator} 草{separator}") == (
    "猫", "traffic light", "草",
  )  # fmt: skip


def test_synonyms_by_a_bar_of_either_width():
  assert parse_names("cat | kitten，猫｜小猫") == ("cat, kitten", "猫, 小猫")


@pytest.mark.parametrize(
  ("typed", "names", "synonyms"),
  [
    ("crt (lcd, tv), cat", ("crt (lcd, tv)", "cat"), [["crt (lcd, tv)"], ["cat"]]),
    ("a [b, c] | d {e; f}", ("a [b, c], d {e; f}",), [["a [b, c]", "d {e; f}"]]),
    ("屏幕（液晶，电视），猫", ("屏幕（液晶，电视）", "猫"), [["屏幕（液晶，电视）"], ["猫"]]),
    ("a ((b, c), d), e", ("a ((b, c), d)", "e"), [["a ((b, c), d)"], ["e"]]),
    ('"salt, pepper", dog', ('"salt, pepper"', "dog"), [["salt, pepper"], ["dog"]]),
    ("“salt, pepper” | spice", ('"salt, pepper", spice',), [["salt, pepper", "spice"]]),
    ('"traffic light","a|b"', ("traffic light", '"a|b"'), [["traffic light"], ["a|b"]]),
    ("'salt;pepper', '70s car", ("salt;pepper", "'70s car"), [["salt;pepper"], ["'70s car"]]),
    ('5" disc, children\'s toy', ('5" disc', "children's toy"), [['5" disc'], ["children's toy"]]),
    ("a) cat, b) dog", ("a) cat", "b) dog"), [["a) cat"], ["b) dog"]]),
    ('"old" car, "x" | y', ('"old" car', "x, y"), [['"old" car'], ["x", "y"]]),
  ],
)  # fmt: skip
def test_brackets_and_quotes_keep_their_commas(typed, names, synonyms):
  assert parse_names(typed) == names
  assert [split_synonyms(name) for name in names] == synonyms
  assert parse_names(names) == names


@pytest.mark.parametrize(
  ("item", "name"),
  [
    ("sand | beach", "sand, beach"),
    ("sand|beach｜ shore ", "sand, beach, shore"),
    (["sand | beach", "shore"], "sand, beach, shore"),
    ("sea, ocean", "sea, ocean"),  # as in vocabularies
    ("sea, ocean | water", "sea, ocean, water"),
    ("crt screen (lcd | tv)", "crt screen (lcd | tv)"),
    ('"salt | pepper"', '"salt | pepper"'),
    ('spice, "salt | pepper" | herb', 'spice, "salt | pepper", herb'),
    ("“a|b” | c", '"a|b", c'),
    ('5" disc; round | cd', '5" disc; round, cd'),
  ],
)
def test_a_bar_joins_synonyms_in_a_list(item, name):
  assert parse_names([item, "grass"]) == (name, "grass")
  assert parse_names(parse_names([item, "grass"])) == (name, "grass")


@pytest.mark.parametrize("name", ["sand |", "|sand", "sand | | water", "sand ||water", "|", "a｜"])
def test_an_empty_synonym(name):
  for typed in (f"grass, {name}", ["grass", name], ("grass", [name, "sea"])):
    with pytest.raises(InputError, match=r"^class name 2, .* has an empty synonym: remove .* \|$"):
      parse_names(typed)
  with pytest.raises(InputError, match="has an empty synonym"):
    parse_names(["grass", ["sea", ""]])


@pytest.mark.parametrize(
  ("typed", "said"),
  [
    ("cat (big, dog", "the bracket in '(big, dog' is not closed"),
    ("cat (big\nsmall)", "the bracket in '(big' is not closed"),
    ('cat, "salt, pepper', "the quote in '\"salt, pepper' is not closed"),
    ("cat,,dog", "class name 2 of 3 is empty: remove the stray comma"),
    ("cat，、dog", "class name 2 of 3 is empty: remove the stray comma"),
    ("list:ade15", "list:'ade15' is not known; did you mean 'ade150'? Known: voc20"),
  ],
)
def test_what_is_not_understood(typed, said):
  with pytest.raises(InputError) as error:
    parse_names(typed)
  assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
  ("names", "said"),
  [
    (
      None,
      'expected class names as text, as in "cat | kitten, grass", or as a list of texts, got N',
    ),
    (3, "got int"),
    (np.array("sand"), "got ndarray"),
    (b"sand", "got bytes"),
    ({"sand": ["beach"]}, "got dict"),
    (["sand", 3], "class name 2: expected text, or a list of synonyms, got 3"),
    ([b"sand"], "class name 1: expected text, or a list of synonyms, got b'sand'"),
    ([["sea", None]], "class name 1: expected text, or a list of synonyms, got None"),
    ([{"sea": 1}], "class name 1: expected text, or a list of synonyms, got {'sea': 1}"),
    (np.array([1, 2]), "class name 1: expected text"),
  ],
)
def test_what_is_no_text(names, said):
  with pytest.raises(InputError) as error:
    parse_names(names)
  assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("kind", [list, tuple, np.array, iter, lambda names: (x for x in names)])
def test_any_list_of_texts(kind):
  assert parse_names(kind(["sand", "water | sea"])) == ("sand", "water, sea")


def test_without_articles_within_brackets():
  assert without_articles("a screen (the lcd, a tv), an eye") == "screen (the lcd, a tv), eye"


def test_names_of_data_sets():
  assert parse_names("list:voc20")[:3] == ("aeroplane", "bicycle", "bird")
  assert parse_names(["list:voc20", ["pond", "pool"]])[-2:] == ("tvmonitor", "pond, pool")
  assert parse_names("list:cityscapes, pond")[-2:] == ("bicycle", "pond")
  assert parse_names("voc20, ade150") == ("voc20", "ade150")  # a class of that name
  for name in vocabularies.NAMES:
    assert len(read_names(name)) == len(parse_names(f"list:{name}")) > 18


@pytest.mark.parametrize(
  "content",
  [
    b"cat | kitten\ngrass\n",
    "# animals\r\ncat|kitten\r\n\r\n  # plants\r\ngrass".encode("utf-8-sig"),
    "cat | kitten, grass".encode("utf-16"),
    b"\xfe\xff" + "cat|kitten；grass；".encode("utf-16-be"),
  ],
)
def test_a_file_of_names(content, tmp_path, capsys):
  (tmp_path / "names.txt").write_bytes(content)
  assert read_names(str(tmp_path / "names.txt")) == ("cat, kitten", "grass")
  assert capsys.readouterr().out == ""


def test_commas_in_the_lines_of_a_file_are_told(tmp_path, capsys):
  path = tmp_path / "names.txt"
  path.write_text("sea, ocean\ngrass\n")
  assert read_names(str(path)) == ("sea", "ocean", "grass")
  assert capsys.readouterr().out.startswith(f"{path}: 3 classes on 2 lines; in a line, commas")


def test_what_stands_behind_a_name_is_part_of_it(tmp_path, capsys):
  (tmp_path / "n.txt").write_text("# mine\nsand\nC# code\nwater # the sea\n")
  assert read_names(str(tmp_path / "n.txt")) == ("sand", "C# code", "water # the sea")
  out = capsys.readouterr().out
  assert f"{tmp_path}/n.txt: 'water # the sea' is one class name; only a #" in out
  assert out.count("\n") == 1


@pytest.mark.parametrize(
  ("content", "said"),
  [
    ("Straße".encode("cp1252"), "as text in UTF-8, got another encoding"),
    ("cat".encode("utf-16-le"), "as text in UTF-8, got another encoding"),
    (b"# nothing\n", "no class names"),
    (b"cat\ncat\n", "duplicate class name 'cat'"),
    (None, "a text file of class names, or one of voc20, .*; no such file"),
  ],
)
def test_a_file_that_holds_no_names(content, said, tmp_path):
  path = tmp_path / "names.txt"
  if content is not None:
    path.write_bytes(content)
  with pytest.raises(InputError, match=rf"names\.txt: .*{said}"):
    read_names(str(path))


def test_the_name_of_a_list_is_no_file(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "ade150").write_text("cat")
  assert len(read_names("ade150")) == 150 and read_names("./ade150") == ("cat",)


def test_the_lists_are_in_one_place():
  from tests import ROOT

  files = {path.stem: path for path in (ROOT / "rpn_jax/assets/vocabularies").iterdir()}
  assert set(files) == set(vocabularies.NAMES)
  others = {path.name for path in (ROOT / "data_pipelines/vocabularies").iterdir()}
  assert not others & {path.name for path in files.values()}
  assert json.loads(files["voc20"].read_text()) == list(vocabularies.read("voc20"))
