"""Class names to embeddings: templates, synonyms, and what is kept on disk."""

import dataclasses
import logging
import os
import pathlib
import threading

import jax
import numpy as np
import pytest

from data_pipelines import vocabularies
from rpn_jax.base import paths
from rpn_jax.base.errors import InputError
from rpn_jax.base.words import check_names, without_articles
from rpn_jax.models.clip import CLIP, CLIPConfig
from rpn_jax.text import embeddings, templates
from rpn_jax.text.embeddings import TextEncoder, class_embeddings
from rpn_jax.text.templates import check_distinct, expand, template_sentences
from rpn_jax.text.tokenizer import tokenize
from tests.data_pipelines.test_vocabularies import PUBLISHED

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
def cache(tmp_path, monkeypatch):
  """The package's cache folder, empty."""
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  paths.cache_dir.cache_clear()
  yield paths.cache_dir()
  paths.cache_dir.cache_clear()


@pytest.fixture
def counted(monkeypatch):
  """How many texts each call of the tower got."""
  calls = []
  embed = embeddings._embed

  def counting(config, params, texts, device):
    calls.append(len(texts))
    return embed(config, params, texts, device)

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
    ("zegclip", "templates='zegclip' is not known; did you mean 'zegclip15'"),
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
  monkeypatch.setattr(embeddings, "BATCH_SENTENCES", (2,))
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


@pytest.mark.parametrize("name", PUBLISHED)
def test_only_ade847_has_synonyms(name):
  vocabulary = vocabularies.load(name)
  rows, scored_as = expand(vocabulary.names, vocabulary.scored_as, "max")
  assert len(rows) == (1281 if name == "ade847" else len(vocabulary.names))
  assert set(scored_as) == set(range(vocabulary.num_classes))
  assert not [row for row in rows if "," in row or row != row.strip()]


def test_unknown_synonyms(params):
  with pytest.raises(InputError, match=r"synonyms='avg' is not known; did you mean '"):
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
  with pytest.raises(InputError, match="duplicate class name 'a'"):
    check_names(["a", "b", " a"])


# The encoder of a network


@pytest.mark.parametrize("synonyms", ["first", "mean", "joined"])
@pytest.mark.parametrize("templates", ["single", SENTENCES])
def test_an_encoder_embeds_as_the_function_does(params, cache, counted, templates, synonyms):
  encoder = TextEncoder(TINY, params, templates, synonyms, "f")
  want = class_embeddings(TINY, params, NAMES, templates, synonyms=synonyms)
  for _ in range(2):
    np.testing.assert_array_equal(encoder.embed(NAMES), want)
  assert len(counted) == 2 and len(files(cache / "text")) == 1


@pytest.mark.parametrize(
  ("synonyms", "rows"), [("first", [1, 1, 1]), ("joined", [1, 1, 1]), ("mean", [2, 1, 3])]
)
@pytest.mark.parametrize("templates", ["single", SENTENCES])
def test_tokens_encode_to_the_embeddings(params, templates, synonyms, rows):
  encoder = TextEncoder(TINY, params, templates, synonyms)
  tokens = encoder.tokens(NAMES)
  sentences = len(template_sentences(templates))
  assert tokens.shape == (3, sentences * max(rows), 16) and tokens.dtype == np.int32
  filled = (tokens > 0).any(-1)
  assert filled.sum(1).tolist() == [sentences * count for count in rows]
  encode = lambda t: CLIP(TINY).apply({"params": params}, t, method="encode_text")
  embedded = np.asarray(jax.jit(encode)(tokens.reshape(-1, tokens.shape[-1])), np.float64)
  embedded /= np.linalg.norm(embedded, axis=-1, keepdims=True)
  embedded = embedded.reshape(3, max(rows), sentences, -1)
  got = [mean([mean(part) for part in name[:count]]) for name, count in zip(embedded, rows)]
  np.testing.assert_allclose(got, encoder.embed(NAMES), atol=1e-5)


def test_tokens_of_names_that_compete(params):
  encoder = TextEncoder(TINY, params, SENTENCES, "max")
  with pytest.raises(InputError, match="train with 'first', 'mean' or 'joined'"):
    encoder.tokens(NAMES)
  rows, _ = expand(NAMES, (0, 1, 2), "max")
  want = TextEncoder(TINY, params, SENTENCES, "first").tokens(rows)
  np.testing.assert_array_equal(encoder.tokens(rows), want)


@pytest.mark.parametrize("names", [[], ["sea", " "]])
def test_tokens_of_empty_names(params, names):
  with pytest.raises(InputError, match="not empty"):
    TextEncoder(TINY, params).tokens(names)


def test_embeddings_are_made_on_the_device_that_is_asked_for(params, monkeypatch):
  asked = []
  put = jax.device_put
  monkeypatch.setattr(jax, "device_put", lambda x, device: put(x, asked.append(device) or device))
  device = jax.local_devices()[-1]
  want = class_embeddings(TINY, params, NAMES)
  np.testing.assert_allclose(class_embeddings(TINY, params, NAMES, device=device), want, atol=1e-6)
  assert asked == [jax.local_devices()[0], device]


def test_weights_that_give_nan_are_refused(params):
  broken = jax.tree.map(lambda x: x, params)
  broken["text"]["ln_final"]["scale"] = np.full_like(params["text"]["ln_final"]["scale"], np.inf)
  with pytest.raises(InputError, match=r"finite embedding of 'a photo of a sea.*damaged"):
    class_embeddings(TINY, broken, NAMES)


# The disk


def files(folder):
  return sorted(pathlib.Path(folder).rglob("*"))


def test_embeddings_are_found_again(params, cache, counted):
  embed = lambda: class_embeddings(TINY, params, NAMES, fingerprint="f")
  first = embed()
  np.testing.assert_array_equal(embed(), first)
  assert counted == [6] and len(files(cache / "text")) == 1


def test_whatever_matters_makes_another_key(params, cache, counted):
  options = {"fingerprint": "f"}
  class_embeddings(TINY, params, NAMES, **options)
  class_embeddings(TINY, params, ("sea, ocean", "sky", "bin"), **options)
  class_embeddings(TINY, params, ("sky", *NAMES), **options)
  class_embeddings(TINY, params, NAMES, "catseg_single", **options)
  class_embeddings(TINY, params, NAMES, synonyms="joined", **options)
  class_embeddings(TINY, params, NAMES, **{**options, "fingerprint": "g"})
  heads = dataclasses.replace(TINY, text_heads=4)
  class_embeddings(heads, params, NAMES, **options)
  assert len(counted) == len(files(cache / "text")) == 7


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
def test_damaged_files_are_never_trusted(params, cache, counted, kind):
  options = {"fingerprint": "f"}
  want = class_embeddings(TINY, params, NAMES, **options)
  (path,) = files(cache / "text")
  damage(path, kind)
  np.testing.assert_array_equal(class_embeddings(TINY, params, NAMES, **options), want)
  assert len(counted) == 2 and files(cache / "text") == [path]
  if kind != "folder":  # mended
    np.testing.assert_array_equal(np.load(path), want)


def test_threads_keep_the_same_embeddings_at_once(params, cache, monkeypatch, recwarn):
  """Each writes a file of its own before it is renamed; none of them finds it gone."""
  failed, replace = [], os.replace
  barrier = threading.Barrier(6, timeout=20)

  def together(source, target):
    barrier.wait()  # all temporary files are complete
    try:
      replace(source, target)
    except OSError as error:
      failed.append(error)

  monkeypatch.setattr(os, "replace", together)
  array = np.eye(3, 8, dtype=np.float32)
  threads = [
    threading.Thread(target=embeddings._write, args=(cache / "text/x.npy", array)) for _ in range(6)
  ]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert not failed and files(cache / "text") == [cache / "text/x.npy"]
  np.testing.assert_array_equal(np.load(cache / "text/x.npy"), array)


def test_nothing_is_kept_without_a_fingerprint(params, cache):
  class_embeddings(TINY, params, NAMES)
  assert not files(cache)
  class_embeddings(TINY, params, NAMES, fingerprint="f")
  assert [p.parent for p in files(cache) if p.is_file()] == [cache / "text"]


def test_a_folder_that_cannot_be_written_costs_one_warning(
  params, cache, tmp_path, monkeypatch, caplog
):
  (tmp_path / "file").write_text("in the way")
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file/c"))
  paths.cache_dir.cache_clear()
  with caplog.at_level(logging.WARNING):
    for name in ("sea", "sky"):
      got = class_embeddings(TINY, params, [name], fingerprint="f")
      assert got.shape == (1, 8)
  (record,) = caplog.records
  assert f"{tmp_path}/file/c" in record.getMessage()


def test_a_disk_without_room_costs_nothing_else(params, cache, counted):
  (cache / "text").write_text("in the way")
  for _ in range(2):
    assert class_embeddings(TINY, params, ["sea"], fingerprint="f").shape == (1, 8)
  assert len(counted) == 2


@pytest.mark.parametrize(
  "pair",
  [
    ("Cat", "cat"), ("a cat", "cat"), ("The Cat", "an  cat"), ("traffic  light", "traffic light"),
    ("ｃａｔ", "cat"), ("cats &amp; dogs", "cats & dogs"), ("t-shirt", "t - shirt"),
    ("cat, kitten", "kitten, Cat"), ("“cat”s", '"cat"s'),
  ],
)  # fmt: skip
def test_names_that_clip_cannot_tell_apart(pair):
  def phrase(name):
    return tokenize([f"a photo of a {without_articles(name)}."])

  if ", " not in pair[0]:  # by the ids that CLIP is given
    np.testing.assert_array_equal(phrase(pair[0]), phrase(pair[1]))
  with pytest.raises(InputError, match="are the same words to CLIP, which ignores capitals") as e:
    check_distinct(["grass", *pair], "mean")
  assert all(repr(name) in str(e.value) for name in pair) and "\n" not in str(e.value)


def test_names_that_clip_can_tell_apart():
  check_distinct(
    ["cat", "cats", "cat, kitten", "kitten", "tomcat", "c a t", "crt (lcd, tv)"], "mean"
  )
  for name in PUBLISHED:
    for mode in ("mean", "max", "joined"):
      if (name, mode) != ("ade847", "max"):
        check_distinct(vocabularies.load(name).names, mode)
  check_distinct(["sea, ocean", "ocean, water"], "first")
  with pytest.raises(InputError, match="'sea, ocean' and 'Ocean, a sea' are the same"):
    check_distinct(["sea, ocean", "Ocean, a sea"], "max")
  with pytest.raises(InputError, match="same words"):
    check_distinct(["sea, ocean", "sea, water"], "first")


@pytest.mark.parametrize(
  ("names", "shared"),
  [
    (["sand, water", "water"], "water"),
    (["water", "grass", "sand, a  Water"], "water"),
    (["sea, ocean", "ocean, water"], "ocean"),
    (vocabularies.load("ade847").names, "screen"),
  ],
)
def test_with_max_a_synonym_belongs_to_one_class(names, shared):
  check_distinct(names, "mean")
  said = f"share '{shared}', whose pixels would all be of the first with synonyms='max'"
  with pytest.raises(InputError, match=said):
    check_distinct(names, "max")


def test_with_max_a_class_may_repeat_a_synonym():
  check_distinct(["sea, a sea", "sand"], "max")
