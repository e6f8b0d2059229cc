"""Class names to embeddings: templates, synonyms, and what is kept on disk."""

import dataclasses
import logging
import pathlib

import jax
import numpy as np
import pytest

from data_pipelines import vocabularies
from rpn_jax.base.errors import InputError
from rpn_jax.base.words import check_names
from rpn_jax.models.clip import CLIP, CLIPConfig
from rpn_jax.text import embeddings, templates
from rpn_jax.text.embeddings import class_embeddings
from rpn_jax.text.templates import expand, template_sentences
from rpn_jax.text.tokenizer import tokenize

TINY = CLIPConfig(
  embed_dim=8, image_size=16, patch_size=8, vision_width=8, vision_layers=1, vision_heads=2,
  text_width=8, text_layers=1, text_heads=2,
)  # fmt: skip
SENTENCES = ("a photo of a {}", "the {} in the scene.", "{}")


@pytest.fixture(scope="module")
def params():
  init = jax.jit(CLIP(TINY).init)
  return init(jax.random.key(0), np.zeros((1, 16, 16, 3)), np.zeros((1, 77), np.int32))["params"]


@pytest.fixture(scope="module")
def unit(params):
  """text -> its unit embedding, by the plain tower on all 77 columns."""
  encode = jax.jit(lambda t: CLIP(TINY).apply({"params": params}, t, method="encode_text"))

  def embed(text):
    row = np.asarray(encode(tokenize([text])), np.float64)[0]
    return row / np.linalg.norm(row)

  return embed


def mean(rows):
  total = np.sum(rows, axis=0)
  return total / np.linalg.norm(total)


@pytest.fixture
def counted(monkeypatch):
  """How many texts each call of the tower got."""
  calls = []
  embed = embeddings._embed

  def counting(config, params, texts):
    calls.append(len(texts))
    return embed(config, params, texts)

  monkeypatch.setattr(embeddings, "_embed", counting)
  return calls


# Templates


def test_template_sets():
  counts = {name: len(template_sentences(name)) for name in templates.template_names()}
  assert counts == {
    "single": 1,
    "catseg_single": 1,
    "zegclip15": 15,
    "imagenet80": 80,
    "maskclip85": 85,
    "fcclip_vild14": 14,
    "san_vild": 14,
  }
  for name in counts:
    sentences = template_sentences(name)
    assert len(set(sentences)) == len(sentences)
    assert all(sentence.count("{}") == 1 for sentence in sentences)
  assert template_sentences("single") == ("a photo of a {}",)


def test_templates_may_be_sentences():
  assert template_sentences(["a {}", "the {}"]) == ("a {}", "the {}")
  assert template_sentences("a {} in the fog") == ("a {} in the fog",)


@pytest.mark.parametrize(
  ("templates", "message"),
  [
    ("zegclip", "config.templates='zegclip' is not known; did you mean 'zegclip15'"),
    ((), "at least one sentence"),
    (("a {}", "a photo"), "'a photo': expected one '{}'"),
    ("{} and {}", "expected one '{}'"),
  ],
)
def test_bad_templates(templates, message):
  with pytest.raises(InputError, match=message):
    template_sentences(templates)


def test_a_class_is_the_mean_over_templates(params, unit):
  got = class_embeddings(TINY, params, ["sea", "{brace}"], SENTENCES)
  want = [mean([unit(s.replace("{}", n)) for s in SENTENCES]) for n in ("sea", "{brace}")]
  assert got.dtype == np.float32
  np.testing.assert_allclose(got, want, atol=1e-5)
  by_name = class_embeddings(TINY, params, ["sea"], "single")
  np.testing.assert_allclose(by_name[0], unit("a photo of a sea"), atol=1e-5)


def test_batches_and_their_padding_change_nothing(params, monkeypatch):
  names = [f"thing {i}" for i in range(25)]
  whole = class_embeddings(TINY, params, names)
  monkeypatch.setattr(embeddings, "BATCH", 2)
  np.testing.assert_allclose(class_embeddings(TINY, params, names), whole, atol=1e-6)


# Synonyms

NAMES = ("sea, ocean", "sky", "ash-bin, trash can, bin")


def test_first_and_joined(params, unit):
  photo = "a photo of a {}".format
  first = class_embeddings(TINY, params, NAMES, synonyms="first")
  want = [unit(photo(n)) for n in ("sea", "sky", "ash-bin")]
  np.testing.assert_allclose(first, want, atol=1e-5)
  joined = class_embeddings(TINY, params, NAMES, synonyms="joined")
  np.testing.assert_allclose(joined, [unit(photo(n)) for n in NAMES], atol=1e-5)


def test_mean_weighs_synonyms_alike(params, unit):
  got = class_embeddings(TINY, params, NAMES, SENTENCES)
  want = []
  for name in NAMES:
    parts = [mean([unit(s.replace("{}", p)) for s in SENTENCES]) for p in name.split(", ")]
    want.append(mean(parts))
  np.testing.assert_allclose(got, want, atol=1e-5)


def test_max_is_the_best_row_of_a_class():
  names, scored_as = expand(NAMES, (0, 1, 1), "max")
  assert names == ("sea", "ocean", "sky", "ash-bin", "trash can", "bin")
  assert scored_as == (0, 0, 1, 1, 1, 1)
  scores = np.random.default_rng(0).normal(size=(200, 6))
  by_class = np.stack([scores[:, :2].max(1), scores[:, 2:].max(1)], 1).argmax(1)
  np.testing.assert_array_equal(np.array(scored_as)[scores.argmax(1)], by_class)
  for other in ("first", "mean", "joined"):
    assert expand(list(NAMES), [0, 1, 1], other) == (NAMES, (0, 1, 1))


def test_max_needs_expanded_names(params, unit):
  with pytest.raises(InputError, match=r"'sea, ocean'.*train with 'first', 'mean' or 'joined'"):
    class_embeddings(TINY, params, NAMES, synonyms="max")
  rows, _ = expand(NAMES, (0, 1, 2), "max")
  got = class_embeddings(TINY, params, rows, synonyms="max")
  np.testing.assert_allclose(got[1], unit("a photo of a ocean"), atol=1e-5)


@pytest.mark.parametrize("name", vocabularies.vocabulary_names())
def test_only_ade847_has_synonyms(name):
  vocabulary = vocabularies.load(name)
  rows, scored_as = expand(vocabulary.names, vocabulary.scored_as, "max")
  assert len(rows) == (1281 if name == "ade847" else len(vocabulary.names))
  assert set(scored_as) == set(range(vocabulary.num_classes))
  assert not [row for row in rows if "," in row or row != row.strip()]


def test_unknown_synonyms(params):
  with pytest.raises(InputError, match=r"config\.synonyms='avg' is not known; did you mean '"):
    expand(NAMES, (0, 1, 2), "avg")
  with pytest.raises(InputError, match="did you mean 'joined'"):
    class_embeddings(TINY, params, NAMES, synonyms="join")


# Names


def test_equal_phrases_are_embedded_once(params, counted):
  got = class_embeddings(TINY, params, ["bag, grip", "bag", "screen, grip", "bag"])
  assert counted == [3]
  np.testing.assert_array_equal(got[1], got[3])


@pytest.mark.parametrize("names", [[], [""], ["sea", " "], ["sea, , ocean"]])
def test_empty_names_are_refused(params, names):
  with pytest.raises(InputError, match="not empty"):
    class_embeddings(TINY, params, names)


def test_check_names():
  assert check_names([" a", "b "]) == ("a", "b")
  with pytest.raises(InputError, match="'a' is given twice"):
    check_names(["a", "b", " a"])


# The disk


def files(folder):
  return sorted(pathlib.Path(folder).rglob("*"))


def test_embeddings_are_found_again(params, tmp_path, counted):
  embed = lambda: class_embeddings(TINY, params, NAMES, fingerprint="f", cache_dir=tmp_path / "c")
  first = embed()
  np.testing.assert_array_equal(embed(), first)
  assert counted == [6] and len(files(tmp_path / "c")) == 1


def test_whatever_matters_makes_another_key(params, tmp_path, counted):
  options = {"fingerprint": "f", "cache_dir": tmp_path}
  class_embeddings(TINY, params, NAMES, **options)
  class_embeddings(TINY, params, ("sea, ocean", "sky", "bin"), **options)
  class_embeddings(TINY, params, ("sky", *NAMES), **options)
  class_embeddings(TINY, params, NAMES, "catseg_single", **options)
  class_embeddings(TINY, params, NAMES, synonyms="joined", **options)
  class_embeddings(TINY, params, NAMES, **{**options, "fingerprint": "g"})
  heads = dataclasses.replace(TINY, text_heads=4)
  class_embeddings(heads, params, NAMES, **options)
  assert len(counted) == len(files(tmp_path)) == 7


def damage(path, kind):
  whole = path.read_bytes()
  if kind == "shape":
    np.save(path, np.eye(8, dtype=np.float32)[:2])
  elif kind == "zeros":
    np.save(path, np.zeros((3, 8), np.float32))
  elif kind == "nan":
    np.save(path, np.full((3, 8), np.nan, np.float32))
  elif kind == "double":
    np.save(path, np.eye(8)[:3])
  elif kind == "pickle":
    np.save(path, np.array([{}, {}, {}], object), allow_pickle=True)
  elif kind == "header":
    path.write_bytes(whole.replace(b"(3, 8)", b"(3, 8("))
  elif kind == "huge":
    path.write_bytes(whole.replace(b"(3, 8), }" + b" " * 12, b"(3, 8000000000000), }"))
  elif kind == "folder":
    path.unlink()
    path.mkdir()
  else:
    path.write_bytes({"empty": b"", "cut": whole[:-7], "text": b"not an array"}[kind])
  assert path.is_dir() or path.read_bytes() != whole


@pytest.mark.parametrize(
  "kind",
  ["shape", "zeros", "nan", "double", "pickle", "header", "huge", "empty", "cut", "text", "folder"],
)
def test_damaged_files_are_never_trusted(params, tmp_path, counted, kind):
  options = {"fingerprint": "f", "cache_dir": tmp_path}
  want = class_embeddings(TINY, params, NAMES, **options)
  (path,) = files(tmp_path)
  damage(path, kind)
  np.testing.assert_array_equal(class_embeddings(TINY, params, NAMES, **options), want)
  assert len(counted) == 2 and files(tmp_path) == [path]
  if kind != "folder":  # mended
    np.testing.assert_array_equal(np.load(path), want)


def test_nothing_is_kept_without_a_fingerprint(params, tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path))
  class_embeddings(TINY, params, NAMES)
  class_embeddings(TINY, params, NAMES, cache_dir=tmp_path / "c")
  assert not files(tmp_path)
  class_embeddings(TINY, params, NAMES, fingerprint="f")
  assert [p.parent for p in files(tmp_path) if p.is_file()] == [tmp_path / ".cache/rpn_jax/text"]


def test_a_folder_that_cannot_be_written_costs_one_warning(params, tmp_path, caplog):
  (tmp_path / "file").write_text("in the way")
  with caplog.at_level(logging.WARNING):
    for name in ("sea", "sky"):
      got = class_embeddings(TINY, params, [name], fingerprint="f", cache_dir=tmp_path / "file/c")
      assert got.shape == (1, 8)
  (record,) = caplog.records
  assert f"not kept in {tmp_path}/file/c" in record.getMessage()
