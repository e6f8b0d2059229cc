"""Paths in a bucket, against a server on loopback."""

import os
import sys
from types import SimpleNamespace

import pytest

from rpn_jax.base import buckets, console, leases, paths, picture_files, pictures
from rpn_jax.base.errors import InputError


def test_a_path_in_a_bucket_is_one_like_others(bucket):
  path = bucket / "a" / "é.json"
  assert str(path).startswith("gs://bucket/") and not path.exists() and not bucket.is_dir()
  paths.write_json(path, {"x": 1})
  assert path.read_text(encoding="utf-8") == '{\n "x": 1\n}\n'
  assert path.is_file() and not path.is_dir() and path.stat().st_size == len(path.read_bytes())
  assert (bucket / "a").is_dir() and not (bucket / "a").is_file()
  with paths.replacing(bucket / "b.txt") as temporary:
    temporary.write_text("b")
    assert not (bucket / "b.txt").exists()
  assert sorted(x.name for x in bucket.iterdir()) == ["a", "b.txt"]
  assert list(bucket.glob("*.txt")) == [bucket / "b.txt"]
  (bucket / "a").rename(bucket / "c")
  assert [str(x).removeprefix(f"{bucket}/") for x, _ in buckets.walk(bucket)] == [
    "b.txt",
    "c/é.json",
  ]
  (bucket / "b.txt").unlink()
  (bucket / "b.txt").unlink(missing_ok=True)
  assert not (bucket / "b.txt").exists()
  assert paths.expand(path) is not None and paths.expand(str(path)) == path
  assert "config.json" not in console.describe_workdir(str(bucket))


@pytest.mark.parametrize(
  "name", ["a b", "a#b", "a&b=c+d", "Straße", "a%20b%2Fc", "a?x=1", "a[1]*", "c:d", "a'b\"c", "猫"]
)
def test_names_that_are_special_elsewhere(bucket, store, name):
  folder = paths.expand(f"{bucket}/{name}/")  # with the slash that shells complete
  assert folder == bucket / name
  paths.write_text(folder / "one.txt", "1")
  with paths.replacing(folder / "sub" / f"{name}.txt") as temporary:
    temporary.write_text("2")
  assert [path for path, _ in buckets.walk(folder)] == [
    folder / "one.txt",
    folder / "sub" / f"{name}.txt",
  ]
  assert sorted(folder.iterdir()) == [folder / "one.txt", folder / "sub"]
  assert list(folder.glob("*.txt")) == [folder / "one.txt"]
  assert (folder / "sub").is_dir() and buckets.version(folder / "one.txt").size == 1
  with paths.locked(folder / ".lock", "the run"):
    assert f"{folder}/.lock".removeprefix("gs://bucket/") in store.buckets["bucket"]
  assert not (folder / ".lock").exists()
  (folder / "sub").rename(folder / name)
  assert (folder / name / f"{name}.txt").read_text() == "2"
  with pytest.raises(FileNotFoundError) as caught:
    (folder / "none").read_bytes()
  assert caught.value.filename == f"{folder}/none"


def test_a_write_that_fails_leaves_what_was_there(bucket):
  path = bucket / "a.txt"
  paths.write_text(path, "old")
  with pytest.raises(ValueError), paths.replacing(path) as temporary:
    temporary.write_text("new")
    raise ValueError
  assert path.read_text() == "old"


def test_large_objects_go_in_parts(bucket, monkeypatch, tmp_path):
  monkeypatch.setattr(buckets, "CHUNK_BYTES", 2**18)
  content = os.urandom(2**19 + 5)
  (tmp_path / "a").write_bytes(content)
  buckets.upload(tmp_path / "a", bucket / "a")
  buckets.download(bucket / "a", tmp_path / "b")
  assert (tmp_path / "b").read_bytes() == content == (bucket / "a").read_bytes()


@pytest.mark.parametrize(
  ("path", "words"),
  [
    ("gs:/bucket/run", "expected a local path or gs://BUCKET/NAME"),
    ("GS://bucket/run", "expected a local path or gs://BUCKET/NAME"),
    ("s3://bucket/run", "expected a local path or gs://BUCKET/NAME"),
    ("https://example.org/run", "expected a local path or gs://BUCKET/NAME"),
    ("gs://", "with the name of a bucket"),
    ("gs:///run", "with the name of a bucket"),
  ],
)
def test_other_addresses_are_refused(path, words):
  with pytest.raises(InputError, match=words):
    paths.expand(path)


def test_the_hub_is_not_refused():
  for path in ("hf://openai/clip-vit-base-patch16", "https://huggingface.co/openai/clip"):
    assert "openai" in str(paths.expand(path))


def test_without_gcsfs(monkeypatch):
  monkeypatch.setitem(sys.modules, "gcsfs", None)
  monkeypatch.setattr(buckets, "_check_bucket", lambda _: None)
  monkeypatch.setattr(buckets, "_classes", buckets._classes.__wrapped__)
  with pytest.raises(InputError, match=r"expected the package gcsfs .* pip install gcsfs"):
    paths.expand("gs://bucket/run")


def test_where_only_a_disk_will_do():
  with pytest.raises(InputError, match="--root: expected a local path, got gs://bucket/x"):
    paths.expand_local("gs://bucket/x", "--root")


def test_caches_are_local(monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", "gs://bucket/cache")
  with pytest.raises(InputError, match="XDG_CACHE_HOME: expected a local path, got gs://bucket"):
    paths.cache_path()


def test_a_bucket_that_is_not_there_or_closed(store):
  with pytest.raises(InputError, match=r"gs://other: expected a bucket, there is no such bucket"):
    paths.expand("gs://other/run")
  store.buckets["closed"] = {}
  store.fault = lambda method, path: 401 if "closed" in path else None
  with pytest.raises(InputError, match=r"gs://closed: .*access is denied: run gcloud auth"):
    paths.expand("gs://closed/run")


def test_requests_that_fail_are_repeated_and_then_told(bucket, store):
  path = bucket / "a.txt"
  left = [503, 429, 0]
  store.fault = lambda method, path: left.pop() if left else None
  path.write_text("a")
  assert not left and path.read_text() == "a"
  for status in (503, 0):
    store.fault = lambda method, path, status=status: status
    # Above all, what cannot be reached is not taken for missing: a run would begin anew.
    for ask in (
      path.exists,
      path.is_file,
      path.is_dir,
      path.read_bytes,
      lambda: [*bucket.iterdir()],
    ):
      with pytest.raises(OSError, match="the storage cannot be reached") as caught:
        ask()
      assert "\n" not in str(caught.value) and caught.value.filename.startswith("gs://bucket")


def test_what_may_not_be_written_or_is_not_there(bucket, store):
  store.writable = False
  with pytest.raises(PermissionError, match=r"access is denied: .*a\.txt"):
    (bucket / "a.txt").write_text("a")
  with pytest.raises(FileNotFoundError, match=r"no such object: 'gs://bucket/.*a\.txt'"):
    (bucket / "a.txt").read_bytes()


def test_a_copy_on_disk_follows_the_object(bucket, capsys):
  path = bucket / "w.bin"
  path.write_bytes(b"one")
  (bucket / "config.json").write_text("{}")
  first = paths.on_disk(path)
  assert first.read_bytes() == b"one" and (first.parent / "config.json").exists()
  assert paths.on_disk(path) == first
  assert capsys.readouterr().out.count("copying") == 1
  path.write_bytes(b"two")
  assert paths.on_disk(path).read_bytes() == b"two"


def test_images_are_read_from_a_bucket(bucket):
  from PIL import Image

  with paths.replacing(bucket / "a.png") as temporary:
    Image.new("RGB", (3, 2)).save(temporary, "PNG")
  (file,) = picture_files.find(str(bucket)).files
  assert pictures.read(file).shape == pictures.read(str(file)).shape == (2, 3, 3)


def test_a_growing_object_sends_now_and_then(bucket, store):
  path = bucket / "log"
  log = buckets.GrowingObject(path, b"a", seconds=1000)
  log.write(b"b")
  assert path.read_bytes() == b"a"
  store.writable = False
  with pytest.raises(OSError, match="access is denied"):
    log.flush()
  store.writable = True
  log.write(b"c")
  log.close()
  assert path.read_bytes() == b"abc"


def test_a_network_that_is_cut_takes_a_tenth_of_the_time(bucket, monkeypatch):
  log, now = buckets.GrowingObject(bucket / "log", b"", seconds=5), [0.0]
  monkeypatch.setattr(buckets, "time", SimpleNamespace(monotonic=lambda: now[0]))

  def refuse(*_):
    now[0] += 30
    raise OSError

  monkeypatch.setattr(buckets, "write", refuse)
  log._pace = buckets.Pace(5)
  for _ in range(1000):
    now[0] += 1
    log.write(b"a")
  assert 1000 < now[0] < 1200


# Locks.


@pytest.fixture
def quick(monkeypatch):
  monkeypatch.setattr(leases, "POLL_SECONDS", 0.01)
  monkeypatch.setattr(leases, "RENEW_SECONDS", 0.02)


def hold(path, mark: str) -> None:
  path.write_text(f"process 7 on host\n0123 {mark}\n")


def test_a_lock_is_held_renewed_and_given_back(bucket, quick, capsys):
  lock = bucket / ".lock"
  with paths.locked(lock, "the run"):
    first = buckets.version(lock).generation
    while buckets.version(lock).generation == first:
      pass
    assert lock.read_text().startswith(f"process {os.getpid()} on ")
    # A second one on this machine is refused at once.
    with (
      pytest.raises(InputError, match=rf"the run is in use by process {os.getpid()} on \S+: wait"),
      paths.locked(lock, "the run"),
    ):
      pass
  assert not lock.exists() and not capsys.readouterr().out


def test_a_lock_of_a_process_that_is_gone_from_this_machine(bucket, quick, capsys):
  hold(bucket / ".lock", leases._mark().rpartition("/")[0] + "/1")  # of another start time
  with paths.locked(bucket / ".lock", "the run"):
    assert "the run was left by process 7 on host, which is gone" in capsys.readouterr().out


def test_a_lock_of_another_machine(bucket, quick, monkeypatch, capsys):
  lock = bucket / ".lock"
  hold(lock, "elsewhere/pid/7/1")
  monkeypatch.setattr(leases, "LEASE_SECONDS", 0.2)
  with paths.locked(lock, "the run"):
    said = capsys.readouterr().out
    assert "in use by process 7 on host: waiting, 0.2 s at most if it is gone" in said
    assert "taking over" in said
  # It lives: the lease is renewed while we wait.
  monkeypatch.setattr(leases, "LEASE_SECONDS", 60)
  hold(lock, "elsewhere/pid/7/1")
  monkeypatch.setattr(leases.time, "sleep", lambda _: hold(lock, "elsewhere/pid/7/1"))
  with (
    pytest.raises(InputError, match="the run is in use by process 7 on host: wait for it to end"),
    paths.locked(lock, "the run"),
  ):
    pass


@pytest.mark.parametrize("hours", [-1, 1])
def test_a_clock_that_is_wrong_takes_no_lock_away(bucket, store, quick, monkeypatch, hours):
  """This machine's or the server's: the age of a lock is between two times of the server."""
  store.clock = 3600 * hours
  hold(bucket / ".lock", "elsewhere/pid/7/1")
  monkeypatch.setattr(leases.time, "sleep", lambda _: hold(bucket / ".lock", "elsewhere/pid/7/1"))
  with (
    pytest.raises(InputError, match="the run is in use by process 7 on host: wait for it to end"),
    paths.locked(bucket / ".lock", "the run"),
  ):
    pass
  monkeypatch.setattr(leases, "LEASE_SECONDS", -2)  # the header has whole seconds
  with paths.locked(bucket / ".lock", "the run"):
    pass


def test_a_lock_that_was_lost_is_left_to_who_has_it(bucket, quick):
  lock = bucket / ".lock"
  with paths.locked(lock, "the run"):
    hold(lock, "elsewhere/pid/7/1")
  assert lock.read_text().startswith("process 7 on host")
