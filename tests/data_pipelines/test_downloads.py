"""Raw files by name: fetched from a server on loopback, unpacked, prepared; and all that fails."""

import dataclasses
import gzip
import json
import os
import signal
import threading
import time
import types

import numpy as np
import pytest

from data_pipelines import addresses, downloads, prepare, records, registry
from rpn_jax.base import transfer
from tests.tools import raw_archives
from tests.tools.hub_server import Fault, serve
from tests.weights.checks import one_line

VOC, SBD = (file.name for file in addresses.TABLE["voc"])
MERGED = addresses.TABLE["context"][1].name
MATS, LIST = (file.name for file in addresses.TABLE["context459"][1:])


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
  """Set -> its archives and what was painted."""
  return {name: raw_archives.make(name, tmp_path_factory.mktemp(name)) for name in addresses.TABLE}


@pytest.fixture(scope="module")
def served():
  with serve({}) as server:
    yield server


@pytest.fixture
def server(served, packed, monkeypatch):
  """All archives on a plain file server, and a table that names them; no waits."""
  served.faults.clear()
  served.log.clear()
  served.files.clear()
  for name, (contents, _) in packed.items():
    url = lambda file, name=name: served.url(f"{name}/{file}")
    monkeypatch.setitem(addresses.TABLE, name, raw_archives.rows(name, contents, url))
    served.files.update({f"{name}/{file}": content for file, content in contents.items()})
  monkeypatch.setattr(transfer, "WAITS", (0.0, 0.0, 0.0))
  monkeypatch.setattr(prepare.preview, "draw", lambda *_: None)
  return served


def use_urls(monkeypatch, *urls: str) -> None:
  """Replaces the addresses of ADE20K's only file."""
  (file,) = addresses.TABLE["ade150"]
  monkeypatch.setitem(addresses.TABLE, "ade150", (dataclasses.replace(file, urls=urls),))


def below(folder) -> set[str]:
  """Files of a folder but the lock."""
  return {
    path.relative_to(folder).as_posix()
    for path in folder.rglob("*")
    if path.is_file() and path.name != ".lock"
  }


def gets(server) -> list[str]:
  return [line for line in server.log if line.startswith("GET file")]


@pytest.mark.parametrize("name", addresses.TABLE)
def test_from_the_address_to_records(name, server, packed, tmp_path):
  contents, painted = packed[name]
  mirror = server.url(name) if name in ("ade847", "cityscapes") else ""
  prepare.prepare(name, None, tmp_path, download=True, mirror=mirror, allow_partial=True)
  config = registry.builder_class(name).BUILDER_CONFIGS
  for split, labels in painted.items():
    source = records.source(name, tmp_path, split, config[0].name if config else None)
    assert [source[i]["id"] for i in range(len(source))] == sorted(labels)
    if name != "ade847":  # reduced on the way
      for example in source:
        np.testing.assert_array_equal(example["label"], labels[example["id"]])
  # Nothing is left half-written, what is not read is not unpacked, and nothing is fetched twice.
  raw = tmp_path / "downloads"
  assert not [x for x in below(raw) if "tmp" in x or "part" in x or "beside" in x or "img/" in x]
  assert len(gets(server)) == len(contents) and downloads.missing(name, raw) == []
  downloads.fetch(name, raw)
  assert len(gets(server)) == len(contents)


def test_the_table():
  """Every published set has rows, and each is complete."""
  prepared = {name for name in registry.prepared_sets() if name in addresses.TABLE}
  published = {
    name
    for name, rows in registry.prepared_sets().items()
    if rows[0].builder and not registry.builder_class(name).own_classes
  }
  assert prepared == set(addresses.TABLE) == published
  for name, files in addresses.TABLE.items():
    folders = registry.builder_class(name).layout
    for file in files:
      assert file.size > 0 and file.unpacked > 0 and file.page.startswith("http")
      assert len(file.checksum) in (0, 32, 64) and not file.checksum.strip("0123456789abcdef")
      for pattern in file.holds:
        assert pattern.split("/")[0] in folders and pattern.startswith(file.into)


def test_a_plan(tmp_path):
  """Of the real table, without a network."""
  files = downloads.missing("voc", tmp_path)
  assert files == list(downloads.files("voc")) and downloads.files("shapes") == ()
  assert sum(file.size for file in files) == 3_419_178_673
  assert all(url.startswith("http") for file in files for url in file.urls)


# Transfers that break


def test_a_cut_transfer_continues(server, packed, tmp_path):
  """Within a command, and in the next one, with not a byte twice; the other file goes its way."""
  server.faults[f"file/voc/{VOC}"] = Fault(cut=5000, times=1)
  server.faults[f"file/voc/{SBD}"] = Fault(cut=0)
  one_line(rf"{SBD} could not be fetched: .*the connection broke", downloads.fetch, "voc", tmp_path)
  archives = tmp_path / "archives"
  assert "GET file bytes=5000- -" in server.log and SBD not in below(archives)
  server.faults[f"file/voc/{SBD}"] = Fault(cut=300, times=1, then=Fault(cut=0))
  one_line("the same command continues", downloads.fetch, "voc", tmp_path)
  del server.faults[f"file/voc/{SBD}"]
  server.log.clear()
  downloads.fetch("voc", tmp_path)
  assert len(gets(server)) == 1 and "bytes=" in server.log[0]
  for name in (VOC, SBD):
    assert (archives / name).read_bytes() == packed["voc"][0][name]


@pytest.mark.parametrize("after", ["0", ""])
def test_a_busy_server_is_asked_again(server, after, tmp_path):
  headers = {"Retry-After": after} if after else {}
  server.faults["file"] = Fault(status=429 if after else 503, headers=headers, times=3)
  downloads.fetch("ade150", tmp_path)
  assert len(gets(server)) == 4


def test_a_server_that_asks_for_an_hour(server, tmp_path):
  server.faults["file"] = Fault(status=429, headers={"Retry-After": "3600"})
  one_line("HTTP 429, too many requests: try again in 3600 s", downloads.fetch, "ade150", tmp_path)
  assert len(gets(server)) == 1


def test_a_slow_server(server, tmp_path, monkeypatch):
  server.faults["file"] = Fault(slow=0.3, times=1)
  monkeypatch.setattr(downloads, "TIMEOUT", 0.1)
  downloads.fetch("ade150", tmp_path)
  assert len(gets(server)) > 1


def test_damage_on_the_way(server, tmp_path):
  content = server.files["ade150/ADEChallengeData2016.zip"]
  server.faults["file"] = Fault(body=content[:-9] + b"?" + content[-8:], times=1)
  damaged = (
    "expected the checksum .*, got .*: the file was damaged on its way; run the same command"
  )
  one_line(damaged, downloads.fetch, "ade150", tmp_path)
  assert below(tmp_path) == set()
  downloads.fetch("ade150", tmp_path)


def interrupted_after(server, tmp_path, name: str, count: int) -> None:
  """Leaves the first bytes of a file of context459."""
  server.faults[f"file/context459/{name}"] = Fault(cut=count, times=1, then=Fault(cut=0))
  one_line("could not be fetched", downloads.fetch, "context459", tmp_path)
  del server.faults[f"file/context459/{name}"]
  server.log.clear()


@pytest.mark.parametrize("if_range", [True, False])
def test_a_file_that_changed_between_two_parts(server, tmp_path, capsys, monkeypatch, if_range):
  """Without a published checksum: the rest of another version is not appended."""
  monkeypatch.setattr(server, "if_range", if_range)
  interrupted_after(server, tmp_path, LIST, 10)
  server.files[f"context459/{LIST}"] = b"2008_000003\n" * 40
  downloads.fetch("context459", tmp_path)
  assert "GET file bytes=10- -" in server.log
  assert f"{LIST} has changed on the server: it is fetched anew" in capsys.readouterr().out
  there = tmp_path / "VOCdevkit/VOC2010" / LIST
  assert there.read_bytes() == server.files[f"context459/{LIST}"]


def test_the_same_version_continues(server, packed, tmp_path):
  interrupted_after(server, tmp_path, MATS, 100)
  downloads.fetch("context459", tmp_path)
  assert "GET file bytes=100- -" in server.log
  assert (tmp_path / "archives" / MATS).read_bytes() == packed["context459"][0][MATS]


def test_a_server_that_tells_no_version(server, tmp_path):
  server.faults[f"file/context459/{MATS}"] = Fault(
    cut=100, headers={"ETag": ""}, times=1, then=Fault(cut=0, headers={"ETag": ""})
  )
  one_line("could not be fetched", downloads.fetch, "context459", tmp_path)
  del server.faults[f"file/context459/{MATS}"]
  server.log.clear()
  downloads.fetch("context459", tmp_path)
  assert not [line for line in server.log if "bytes=" in line]  # nothing says that it is the same


def test_a_whole_part_is_taken(server, packed, tmp_path):
  """A process that was killed after the last byte of a file of unknown size."""
  interrupted_after(server, tmp_path, MATS, 100)
  content = packed["context459"][0][MATS]
  transfer.part_of(tmp_path / "archives" / MATS, "").write_bytes(content)
  downloads.fetch("context459", tmp_path)
  assert f"GET file bytes={len(content)}- -" in server.log
  assert (tmp_path / "archives" / MATS).read_bytes() == content


def test_a_file_of_another_size(server, packed, tmp_path):
  """Of a published checksum: what had come is dropped, and the new file is refused."""
  file = addresses.TABLE["voc"][1]
  server.faults[f"file/voc/{SBD}"] = Fault(cut=100, times=1, then=Fault(cut=0))
  one_line("could not be fetched", downloads.fetch, "voc", tmp_path)
  server.faults.clear()
  server.files[f"voc/{SBD}"] += b"more"
  told = one_line(f"expected {file.bytes:,} bytes, got", downloads.fetch, "voc", tmp_path)
  assert "same command" in told
  server.files[f"voc/{SBD}"] = packed["voc"][0][SBD]
  downloads.fetch("voc", tmp_path)


def test_files_that_a_server_compresses(server, packed, tmp_path):
  """Apache calls a .tar.gz an encoding; what is compressed on the way is decoded."""
  server.faults[f"file/context459/{MATS}"] = Fault(headers={"Content-Encoding": "x-gzip"})
  downloads.fetch("context459", tmp_path)
  assert (tmp_path / "archives" / MATS).read_bytes() == packed["context459"][0][MATS]
  body = gzip.compress(packed["context"][0][MERGED])
  server.faults[f"file/context/{MERGED}"] = Fault(
    body=body, headers={"Content-Encoding": "gzip"}, cut=100, times=1,
    then=Fault(body=body, headers={"Content-Encoding": "gzip"}),
  )  # fmt: skip
  downloads.fetch("context", tmp_path)
  there = tmp_path / "VOCdevkit/VOC2010" / MERGED
  assert there.read_bytes() == packed["context"][0][MERGED]


def test_no_network(tmp_path, monkeypatch):
  use_urls(monkeypatch, "http://127.0.0.1:9/x.zip")
  told = one_line("no connection .*--mirror=URL. By hand: ", downloads.fetch, "ade150", tmp_path)
  assert told.endswith(f"put it into {tmp_path / 'archives'} and run the same command again")


def test_the_second_address(server, monkeypatch, tmp_path):
  use_urls(monkeypatch, "http://127.0.0.1:9/x.zip", *addresses.TABLE["ade150"][0].urls)
  downloads.fetch("ade150", tmp_path)
  assert downloads.missing("ade150", tmp_path) == []


def test_a_login_page(server, tmp_path):
  server.faults["file"] = Fault(body=b"<html>", headers={"Content-Type": "text/html"})
  one_line("a page of HTML came instead of the file", downloads.fetch, "ade150", tmp_path)


def test_ctrl_c(server, tmp_path, monkeypatch, capsys):
  """While a server is silent: at once, and the same command goes on."""
  silent = server.faults[f"file/voc/{SBD}"] = Fault(slow=3.0, times=1)
  monkeypatch.setattr(prepare, "SHARD_EXAMPLES", 2)
  command = ["voc", "--download", f"--data_dir={tmp_path}", "--allow_partial"]

  def interrupt() -> None:
    while silent.times:  # until it was asked
      time.sleep(0.01)
    time.sleep(0.1)
    os.kill(os.getpid(), signal.SIGINT)

  # Processes in the background, where the tests may run, ignore SIGINT.
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  try:
    threading.Thread(target=interrupt).start()
    started = time.monotonic()
    assert prepare.main(command) == 130
  finally:
    signal.signal(signal.SIGINT, before)
  assert time.monotonic() - started < 2.9
  assert "the same command continues" in capsys.readouterr().err
  assert below(tmp_path / "downloads") <= {
    f"archives/{VOC}", "archives/record.json",
    *(f"archives/{transfer.part_of(tmp_path / f.name, f.checksum).name}"
      for f in addresses.TABLE["voc"]),
  }  # fmt: skip
  assert prepare.main(command) == 0


# The disk


def test_a_disk_without_room(server, tmp_path, monkeypatch):
  """Archives and what is unpacked; less if archives go on the way, or have come."""
  sizes = [(file.size, file.unpacked) for file in addresses.TABLE["voc"]]
  free = types.SimpleNamespace(free=0)
  monkeypatch.setattr(transfer.shutil, "disk_usage", lambda _: free)
  monkeypatch.setattr(transfer, "MB", 1)

  def needs(count: int, **options) -> None:
    free.free = count - 1
    one_line(
      f"expected {count:,} MB of free disk space in .*, got .* another disk", downloads.fetch,
      "voc", tmp_path, **options,
    )  # fmt: skip
    assert gets(server) == []

  needs(sum(size + unpacked for size, unpacked in sizes))
  needs(
    max(sizes[0][0] + sizes[1][0] + sizes[0][1], sizes[1][0] + sizes[0][1] + sizes[1][1]),
    remove_archives=True,
  )
  (tmp_path / "archives" / VOC).write_bytes(server.files[f"voc/{VOC}"])
  needs(sum(size + unpacked for size, unpacked in sizes) - sizes[0][0])
  free.free = 10**9
  downloads.fetch("voc", tmp_path)


def test_archives_are_removed_and_first_checksums_kept(server, packed, tmp_path, capsys):
  downloads.fetch("context459", tmp_path, remove_archives=True)
  assert f"{MATS}: no checksum is published; noted in" in capsys.readouterr().out
  assert below(tmp_path / "archives") == {"record.json"}
  record = json.loads((tmp_path / "archives/record.json").read_text())
  assert record[MATS]["unpacked"] is True and record[MATS]["url"] == server.url(
    f"context459/{MATS}"
  )
  downloads.fetch("context459", tmp_path)
  assert len(gets(server)) == 3
  downloads.fetch("context", tmp_path)
  downloads.fetch("context", tmp_path, remove_archives=True)  # also later
  assert below(tmp_path / "archives") == {"record.json"}
  # Another file under the same address, later.
  for path in (tmp_path / "VOCdevkit/VOC2010/trainval").iterdir():
    path.unlink()
  server.files[f"context459/{MATS}"] = server.files[f"context459/{MATS}"] + b"\0"
  told = one_line("expected the checksum of the first", downloads.fetch, "context459", tmp_path)
  assert record[MATS]["sha256"] in told and "or the publisher has replaced it" in told
  (tmp_path / "archives/record.json").unlink()
  downloads.fetch("context459", tmp_path)


def test_files_that_people_get(server, packed, tmp_path):
  """What needs an account is asked for, and taken from where it is put; so is any archive."""
  archives = tmp_path / "archives"
  told = one_line(
    "cityscapes needs an account: register on", downloads.fetch, "cityscapes", tmp_path
  )
  assert str(archives) in told and gets(server) == []
  for name, content in packed["cityscapes"][0].items():
    (archives / name).write_bytes(content)
  downloads.fetch("cityscapes", tmp_path)
  zip_file = archives / "ADEChallengeData2016.zip"
  zip_file.write_bytes(b"another file")
  one_line(
    "expected the checksum .*, got another: .* delete it", downloads.fetch, "ade150", tmp_path
  )
  zip_file.write_bytes(packed["ade150"][0][zip_file.name])
  downloads.fetch("ade150", tmp_path)
  assert gets(server) == []


def test_raw_files_that_are_there(server, tmp_path, capsys):
  """Unpacked by hand: nothing is fetched."""
  raw_archives.make("ade150", tmp_path)
  downloads.fetch("ade150", tmp_path)
  assert gets(server) == [] and "nothing to fetch" in capsys.readouterr().out


def test_refusals(tmp_path, capsys):
  def refused(*words: str) -> str:
    assert prepare.main([*words, f"--data_dir={tmp_path}"]) == 2
    return capsys.readouterr().err

  assert "--download fetches voc, " in refused("folder", "--download", f"--manual_dir={tmp_path}")
  assert "not 'shapes'" in refused("shapes", "--download")
  assert "expected the address of a folder" in refused("voc", "--download", "--mirror=x")
  assert "belong to --download" in refused("voc", "--mirror=http://x")
  assert "--download fetches them, and" in refused("voc")
