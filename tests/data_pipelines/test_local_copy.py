"""Records that are prepared in a bucket, or on a slow disk, and read from a copy."""

import json
import pathlib
import types

import ml_collections
import pytest

from data_pipelines import local_copy, prepare, records, registry, shapes
from data_pipelines.local_copy import localized
from rpn_jax.base import buckets, paths
from rpn_jax.base.errors import InputError
from tests.data_pipelines import raw_ade_coco

ADE = registry.get("ade150")
FOLDER = "ade150/1.0.0"


def data_config(data_dir, copy="", name="ade150"):
  fields = {"data_dir": str(data_dir), "local_copy": str(copy), "name": name, "variant": ""}
  return ml_collections.ConfigDict(fields).lock()


@pytest.fixture
def raw(tmp_path, monkeypatch):
  monkeypatch.setattr(prepare, "SHARD_EXAMPLES", 2)
  monkeypatch.setattr(prepare.preview, "draw", lambda *args: None)  # takes a second
  folder = tmp_path / "raw"
  folder.mkdir()
  raw_ade_coco.ade150(folder, 5, 2)
  return folder


@pytest.fixture
def prepared(raw, tmp_path):
  return prepare.prepare("ade150", raw, tmp_path / "data", allow_partial=True)


def fetches(monkeypatch) -> list[str]:
  """Names of the objects that are fetched from now on."""
  names, real = [], buckets.download

  def download(path, target):
    names.append(path.name)
    real(path, target)

  monkeypatch.setattr(buckets, "download", download)
  return names


def read(c) -> list[str]:
  source = records.source("ade150", c.data_dir, "train")
  return [source[i]["id"] for i in range(len(source))]


def test_a_local_folder_is_read_where_it_is(tmp_path):
  c = data_config(tmp_path)
  assert localized(c, ADE) is c


def test_prepared_in_a_bucket_and_read_from_a_copy(raw, bucket, tmp_path, monkeypatch, capsys):
  root = tmp_path / "here"
  prepare.prepare("ade150", raw, bucket, allow_partial=True, local_dir=str(root))
  assert (bucket / FOLDER / "dataset_info.json").exists() and not (root / "gs:").exists()
  fetched = fetches(monkeypatch)
  assert len(read(localized(data_config(bucket, root), ADE))) == 5 and not fetched
  # On another host all is copied, once; what is lost or changed later is copied again.
  other = data_config(bucket, tmp_path / "other")
  assert read(localized(other, ADE)) == read(data_config(root))
  assert "copying" in capsys.readouterr().out and len(fetched) > 5
  contents = [records.contents(tmp_path / host / FOLDER) for host in ("here", "other")]
  assert contents[0] == contents[1] and "sha256" in contents[0]["train"]
  fetched.clear()
  localized(other, ADE)
  assert not fetched
  shards = sorted((tmp_path / "other" / FOLDER).glob("*.array_record*"))
  shards[0].unlink()
  (bucket / FOLDER / "summary.json").write_text("{}")
  localized(other, ADE)
  assert sorted(fetched) == sorted([shards[0].name, "summary.json"])
  # A second preparation sends what is missing.
  (bucket / FOLDER / shards[1].name).unlink()
  prepare.prepare("ade150", raw, bucket, allow_partial=True, local_dir=str(root))
  assert (bucket / FOLDER / shards[1].name).exists()


def test_a_copy_that_was_interrupted_continues(prepared, bucket, tmp_path, store, monkeypatch):
  root = prepared.parents[1]
  local_copy.upload(prepared, root, FOLDER, bucket / FOLDER)
  c = data_config(bucket, tmp_path / "copy")
  monkeypatch.setattr(local_copy, "THREADS", 1)
  count = [0]

  def cut(method, path):
    count[0] += "alt=media" in path
    return 503 if count[0] > 3 else None

  store.fault = cut
  with pytest.raises(OSError, match="the storage cannot be reached"):
    localized(c, ADE)
  kept = json.loads((tmp_path / "copy/.copies/ade150-1.0.0.json").read_text())["files"]
  assert len(kept) == 3
  store.fault = lambda method, path: None
  fetched = fetches(monkeypatch)
  assert len(read(localized(c, ADE))) == 5 and not set(kept) & set(fetched)


def test_a_disk_that_others_share_is_copied_too(prepared, tmp_path):
  c = localized(data_config(tmp_path / "data", tmp_path / "fast"), ADE)
  assert c.data_dir == str(tmp_path / "fast") and len(read(c)) == 5
  with pytest.raises(InputError, match=r"expected a copy of .*elsewhere"):
    local_copy.copy(tmp_path / "elsewhere", tmp_path / "fast", FOLDER, ADE)


def test_what_is_not_there_or_does_not_fit(prepared, bucket, tmp_path, monkeypatch):
  c = data_config(bucket, tmp_path / "copy")
  with pytest.raises(InputError, match=r"expected ade150 prepared in gs://.*got none; run: python"):
    localized(c, ADE)
  (bucket / FOLDER / "a.array_record").write_bytes(b"1")
  with pytest.raises(InputError, match=r"without a dataset_info\.json, as of an upload that was"):
    localized(c, ADE)
  local_copy.upload(prepared, prepared.parents[1], FOLDER, bucket / FOLDER)
  monkeypatch.setattr(local_copy.shutil, "disk_usage", lambda _: types.SimpleNamespace(free=10))
  with pytest.raises(InputError, match=r"expected 0\.0 GB for a copy of gs://.*free some disk"):
    localized(c, ADE)
  with pytest.raises(InputError, match=r"config.data.local_copy: expected a local path, got gs://"):
    localized(data_config(bucket, "gs://bucket/x"), ADE)
  with pytest.raises(InputError, match="--manual_dir: expected a local path, got gs://"):
    prepare.prepare("ade150", "gs://bucket/raw", tmp_path / "new")
  with pytest.raises(InputError, match="--local_dir is for a --data_dir in a bucket"):
    prepare.prepare("ade150", tmp_path, tmp_path / "new", local_dir="x")


def test_scenes_are_drawn_where_they_are_read(bucket, monkeypatch):
  """They are the same on every host; if they were drawn into the bucket they are copied."""
  row = registry.get("shapes")
  c = localized(data_config(bucket, name="shapes"), row)
  assert not buckets.is_bucket(c.data_dir) and not bucket.exists()
  config = shapes.ShapesConfig(num_train=2, num_val=1)
  folder = shapes.prepare(c.data_dir, config)
  root = pathlib.Path(c.data_dir)
  below = folder.relative_to(root).as_posix()
  local_copy.upload(folder, root, below, bucket / below)
  fetched = fetches(monkeypatch)
  monkeypatch.setenv("XDG_CACHE_HOME", str(root.parent / "other"))
  paths.cache_dir.cache_clear()
  try:
    moved = localized(data_config(bucket, name="shapes"), row)
  finally:
    monkeypatch.undo()
    paths.cache_dir.cache_clear()
  assert "dataset_info.json" in fetched and moved.data_dir != c.data_dir
