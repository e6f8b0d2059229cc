"""The shipped class lists, splits, id tables and templates against the published figures."""

import collections
import hashlib

import numpy as np
import pytest

from data_pipelines import DATA_SETS, vocabularies
from data_pipelines.transforms import LabelMap
from rpn_jax.base.errors import InputError
from rpn_jax.text.templates import expand

# name: (prompted names, scored classes, unseen ids)
PUBLISHED = {
  "voc20": (20, 20, (15, 16, 17, 18, 19)),
  "voc20b": (59, 21, ()),
  "voc21": (21, 21, ()),
  "context59": (59, 59, ()),
  "context60": (60, 60, (1, 7, 8, 15, 20, 25, 32, 34, 49, 55)),
  "context459": (459, 459, ()),
  "coco_stuff171": (
    171,
    171,
    (19, 23, 28, 29, 36, 51, 76, 88, 94, 112, 133, 136, 137, 157, 160),
  ),
  "ade150": (150, 150, ()),
  "ade847": (847, 847, ()),
  "coco_object": (81, 81, ()),
  "cityscapes": (19, 19, ()),
}


def test_the_table_above_is_complete():
  rows = [row for row in DATA_SETS.values() if isinstance(row.classes, vocabularies.ClassFiles)]
  assert {row.name for row in rows} == set(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_counts_and_splits(name):
  names, classes, unseen = PUBLISHED[name]
  vocabulary = vocabularies.load(name)
  assert vocabulary.name == name
  assert len(vocabulary.names) == len(set(vocabulary.names)) == names
  assert all(n and n == n.strip() for n in vocabulary.names)
  assert vocabulary.num_classes == classes
  assert vocabulary.unseen == unseen
  assert sorted(vocabulary.seen + unseen) == list(range(names))
  assert vocabulary.ignore == (255 if classes < 255 else 65535)


@pytest.mark.parametrize(
  ("name", "split"),
  [("voc20", "voc_split"), ("context60", "context_split"), ("coco_stuff171", "coco_split")],
)
def test_unseen_names_agree_with_unseen_ids(name, split):
  vocabulary = vocabularies.load(name)
  recorded = vocabularies._read(split)
  assert [vocabulary.names[i] for i in vocabulary.unseen] == recorded["unseen_names"]
  assert recorded["num_classes"] == len(vocabulary.names)


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_class_has_a_raw_id(name):
  vocabulary = vocabularies.load(name)
  reached = set(vocabulary.ids.values()) - {vocabulary.ignore}
  assert reached == set(range(vocabulary.num_classes))
  assert all(0 <= raw < 65536 for raw in vocabulary.ids)


@pytest.mark.parametrize(
  ("name", "raw", "ids"),
  [
    ("voc20", (0, 1, 20, 255), (255, 0, 19, 255)),
    ("voc20b", (0, 1, 20, 255), (20, 0, 19, 255)),
    ("voc21", (0, 1, 20, 255), (0, 1, 20, 255)),
    ("context59", (0, 1, 2, 9, 459), (255, 255, 0, 1, 255)),
    ("context60", (0, 1, 2, 9, 255), (0, 255, 1, 2, 255)),
    ("context459", (1, 459, 65535), (0, 458, 65535)),
    ("coco_stuff171", (0, 10, 11, 12, 181, 255), (0, 10, 255, 11, 170, 255)),
    ("ade150", (0, 1, 150), (255, 0, 149)),
    ("ade847", (0, 2978, 312, 1), (65535, 0, 1, 65535)),
    # A thing is its class + 1, a gap none, and stuff the background.
    ("coco_object", (0, 10, 11, 12, 89, 90, 91, 181, 255), (1, 11, 255, 12, 80, 255, 0, 0, 255)),
    ("cityscapes", (0, 6, 7, 8, 9, 33, 255), (255, 255, 0, 1, 255, 18, 255)),
  ],
)
def test_raw_ids_become_labels(name, raw, ids):
  vocabulary = vocabularies.load(name)
  table = LabelMap.from_ids(vocabulary.ids, ignore=vocabulary.ignore, unlisted=vocabulary.unlisted)
  got = table.encode(np.array([raw], np.uint16))
  np.testing.assert_array_equal(got, [ids])


@pytest.mark.parametrize(
  ("name", "raw"), [("voc20", 21), ("voc21", 21), ("context459", 460), ("ade150", 151)]
)
def test_raw_ids_behind_the_last_class_are_refused(name, raw):
  vocabulary = vocabularies.load(name)
  table = LabelMap.from_ids(vocabulary.ids, ignore=vocabulary.ignore, unlisted=vocabulary.unlisted)
  with pytest.raises(InputError, match=f"example e: .* got {raw} on 1 pixels"):
    table.encode(np.array([[raw]], np.uint16), "e")


def test_coco_table_agrees_with_its_look_up_table():
  recorded = vocabularies._read("coco_stuff_raw_to_train")
  ids = vocabularies.load("coco_stuff171").ids
  assert [ids.get(raw, 255) for raw in range(256)] == recorded["lut256"]
  assert not set(recorded["raw_values_without_train_id"]) & set(ids)


def test_context_lists_agree():
  small = vocabularies.load("context59")
  large = vocabularies.load("context459")
  assert vocabularies.load("context60").names == ("background", *small.names)
  for raw, new in small.ids.items():
    if new != 255:
      assert large.names[raw - 1] == small.names[new]


def test_background_names_of_voc20b():
  vocabulary = vocabularies.load("voc20b")
  assert vocabulary.names[:20] == vocabularies.load("voc20").names
  assert vocabulary.scored_as == (*range(20), *[20] * 39)
  # The rest are Context's names; its "table" is VOC's "diningtable", hence 39 and not 40.
  context = set(vocabularies.load("context59").names) - {"table"}
  assert set(vocabulary.names[20:]) == context - set(vocabulary.names[:20])


def test_other_namings():
  for name in ("voc20", "context59", "context459", "coco_stuff171", "ade150"):
    theirs = vocabularies.load(name, "maskclip")
    assert len(set(theirs.names)) == len(theirs.names) == PUBLISHED[name][0]
  assert "potted plant" in vocabularies.load("voc20", "maskclip").names
  spaced = vocabularies.load("context459", "spaced").names
  plain = vocabularies.load("context459").names
  assert [n.replace(" ", "") for n in spaced] == [n.replace(" ", "") for n in plain]


def test_catseg_takes_the_table_of_context_for_that_of_voc():
  ours, theirs = (vocabularies.load("context59", n).names for n in ("dataset", "catseg"))
  assert [(a, b) for a, b in zip(ours, theirs, strict=True) if a != b] == [("table", "diningtable")]
  background = vocabularies.load("voc20b").names
  assert set(theirs) == set(background) and len(background) == 59
  # Names of A-847 with synonyms, and those that are first for two classes.
  names = vocabularies.load("ade847").names
  first = collections.Counter(name.split(", ")[0] for name in names)
  assert sum(", " in name for name in names) == 217
  assert sum(count > 1 for count in first.values()) == 9


# What the repositories prompt, from their own lists: (set, namings, names in all, start of the
# SHA-256 of the names, with a line for each class and SEPARATOR between its names).
PROMPTED = (
  ("ade150", ("sclip", "clearclip", "proxyclip"), 150, "e53ded02c488"),
  ("cityscapes", ("sclip", "clearclip", "proxyclip"), 19, "6f6782fc1bf9"),
  ("cityscapes", ("itaclip",), 26, "75773bc7fa5c"),
  ("coco_object", ("clearclip",), 81, "1f17b53017e4"),
  ("coco_object", ("itaclip",), 119, "6948c61f59ef"),
  ("coco_object", ("proxyclip",), 97, "d4a6ca50ef3d"),
  ("coco_object", ("sclip",), 113, "3475d03d61f8"),
  ("coco_stuff171", ("sclip", "clearclip", "proxyclip"), 171, "fb98709b9ab1"),
  ("coco_stuff171", ("itaclip",), 183, "c7a8610f3315"),
  ("context59", ("sclip", "clearclip", "proxyclip"), 59, "cd808465f06a"),
  ("context60", ("sclip", "clearclip", "proxyclip"), 60, "e29ff1a0eaea"),
  ("context60", ("itaclip",), 75, "c569454aa3d7"),
  ("voc20", ("clearclip", "proxyclip"), 20, "6b9a85ffb907"),
  ("voc20", ("sclip",), 30, "c68f65a2b342"),
  ("voc21", ("clearclip",), 21, "265d9ede93be"),
  ("voc21", ("itaclip",), 80, "4ac9b6259995"),
  ("voc21", ("proxyclip",), 46, "5018ccdc754e"),
  ("voc21", ("sclip",), 56, "80e643a9a143"),
)


@pytest.mark.parametrize(("name", "namings", "count", "digest"), PROMPTED)
def test_names_that_repositories_prompt(name, namings, count, digest):
  for naming in namings:
    names = vocabularies.load(name, naming).names
    assert hashlib.sha256("\n".join(names).encode()).hexdigest().startswith(digest)
    rows, _ = expand(names, range(len(names)), "max")
    assert len(rows) == count  # no name has the separator in it
    assert not [row for row in rows if "," in row or row != row.strip() or not row]


def test_every_wording_is_of_a_class_and_used():
  recorded = vocabularies._read("wordings")
  used = set()
  for naming, sets in recorded["sets"].items():
    for name, wordings in sets.items():
      own = vocabularies.load(name).names
      used.update(wordings)
      for wording in set(wordings) - {"joined"}:
        assert set(recorded["wordings"][wording]) <= set(own), (naming, name, wording)
  assert used == {"joined", *recorded["wordings"]} and set(recorded["used_by"]) == {
    *recorded["sets"]
  }


def test_several_names_of_a_class():
  names = dict(zip(vocabularies.load("voc21").names, vocabularies.load("voc21", "sclip").names))
  assert names["background"].split(", ")[::25] == ["sky", "fence"]
  assert names["boat"] == "ship" and names["diningtable"] == "table" and names["cat"] == "cat"
  assert names["person"].endswith("person in skirt, person in jacket")
  assert names["tvmonitor"] == "television monitor, tv monitor, monitor, television, screen"
  assert vocabularies.load("voc20", "sclip").names == tuple(names.values())[1:]
  assert vocabularies.load("voc21", "clearclip").names[:5] == (
    "background", "aeroplane", "bicycle", "bird", "ship",
  )  # fmt: skip
  assert vocabularies.load("ade150", "sclip").names[136] == "trafficlight"
  assert vocabularies.load("coco_object", "sclip").names[10] == "traffic light"


def test_namings_of_a_set():
  shared = ("sclip", "clearclip", "proxyclip")
  assert vocabularies.namings("context59") == ("dataset", "maskclip", "catseg", *shared)
  assert vocabularies.namings("cityscapes") == ("dataset", *shared, "itaclip")
  assert vocabularies.namings("context459") == ("dataset", "maskclip", "spaced")
  assert vocabularies.namings("shapes") == ("dataset",)


def test_unknown_names_suggest_the_nearest():
  with pytest.raises(InputError, match="'ade15' is not known; did you mean 'ade150'"):
    vocabularies.load("ade15")
  with pytest.raises(InputError, match=r"naming of ade847 'maskclip'.*did you mean 'dataset'"):
    vocabularies.load("ade847", "maskclip")


def test_a_missing_file_is_named(monkeypatch, tmp_path):
  monkeypatch.setattr(vocabularies, "_FOLDER", tmp_path)
  with pytest.raises(InputError, match=r"gone\.json, got FileNotFoundError"):
    vocabularies._read("gone")
