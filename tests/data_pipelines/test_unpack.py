"""Archives of strangers: nothing leaves the folder, no link, no bomb; interruptions continue."""

import gzip
import io
import os
import random
import stat
import tarfile
import zipfile

import pytest

from data_pipelines import downloads, unpack
from rpn_jax.base import transfer
from rpn_jax.base.errors import InputError
from tests.tools.raw_archives import tar, zipped
from tests.weights.checks import one_line

HOLDS = ("set/a/*.jpg", "set/b.txt")
FILES = {
  "set/a/1.jpg": b"one",
  "set/a/2.jpg": b"two",
  "set/b.txt": b"b",
  "set/c/3.jpg": b"not read",
}


def take(tmp_path, content: bytes, holds=HOLDS, **options) -> None:
  archive = tmp_path / "archive"
  archive.write_bytes(content)
  folder = tmp_path / "there/raw"
  folder.mkdir(parents=True, exist_ok=True)
  unpack.unpack(archive, folder, holds, hints=downloads._HINTS, **options)


def taken(tmp_path) -> dict[str, bytes]:
  """Everything that came to be beside the archive."""
  return {
    os.path.relpath(path, tmp_path / "there/raw"): path.read_bytes()
    for path in tmp_path.rglob("*")
    if path.is_file() and path.name != "archive"
  }


def link(name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> tarfile.TarInfo:
  info = tarfile.TarInfo(name)
  info.type, info.linkname = kind, target
  return info


@pytest.mark.parametrize(
  "content",
  [tar(FILES), tar(FILES, True), zipped(FILES), tar({f"./{n}": FILES[n] for n in FILES})],
  ids=["tar", "tgz", "zip", "dot"],
)
def test_what_is_read_is_taken(tmp_path, content):
  take(tmp_path, content)
  assert taken(tmp_path) == {name: FILES[name] for name in list(FILES)[:3]}


def test_names_below_a_folder(tmp_path):
  take(tmp_path, zipped({"a/1.jpg": b"x", "a/": b""}), HOLDS[:1], into="set/")
  assert taken(tmp_path) == {"set/a/1.jpg": b"x"}


@pytest.mark.parametrize(
  "name", ["../x.jpg", "/tmp/x.jpg", "set/a/../../../x.jpg", "set\\..\\x.jpg", "C:/x.jpg"]
)
@pytest.mark.parametrize("pack", [tar, zipped])
def test_paths_that_lead_elsewhere(tmp_path, name, pack):
  one_line("expected names below a folder, got .*; refused", take, tmp_path, pack({name: b"x"}))
  assert taken(tmp_path) == {}


@pytest.mark.parametrize(
  "info",
  [
    link("set/a/1.jpg", "/etc/passwd"),
    link("set/a/1.jpg", "../../../secret", tarfile.LNKTYPE),
    link("set/b.txt", "", tarfile.CHRTYPE),
    link("set/b.txt", "", tarfile.FIFOTYPE),
  ],
)
def test_links_and_devices(tmp_path, info):
  one_line("expected a file as .*, got a link or device", take, tmp_path, tar({info.name: info}))
  assert taken(tmp_path) == {}


def test_a_link_to_write_through(tmp_path):
  """A folder that is a link, and then a file in it: the file comes to a folder of that name."""
  (tmp_path / "outside").mkdir()
  members = {"set/a": link("set/a", str(tmp_path / "outside")), **FILES}
  take(tmp_path, tar(members))
  assert not any((tmp_path / "outside").iterdir())
  assert not (tmp_path / "there/raw/set/a").is_symlink()


def test_a_link_in_a_zip(tmp_path):
  out = io.BytesIO()
  with zipfile.ZipFile(out, "w") as archive:
    info = zipfile.ZipInfo("set/b.txt")
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    archive.writestr(info, "/etc/passwd")
  one_line("got a link or device", take, tmp_path, out.getvalue())


@pytest.mark.parametrize("name", ["set/a/1.jpg", "other"])
@pytest.mark.parametrize("pack", [lambda members: tar(members, True), zipped])
def test_bombs(tmp_path, name, pack):
  """Ten million zeros in ten thousand bytes; also where they would only be skipped."""
  bomb = pack({name: bytes(10_000_000), "set/b.txt": b"b"})
  assert len(bomb) < 20_000
  if name == "other" and pack is zipped:  # which has a table of contents: nothing is unpacked
    one_line("expected files set/a", take, tmp_path, bomb)
  else:
    one_line("expected at most 4 MB in it, got more", take, tmp_path, bomb)
  assert sum(map(len, taken(tmp_path).values())) <= 1
  take(tmp_path, bomb, HOLDS[1:] if name == "other" else HOLDS, declared=3_000_000)


def test_a_header_that_would_fill_the_memory(tmp_path):
  info = tarfile.TarInfo("pax")
  info.type, info.size = tarfile.XHDTYPE, 1 << 32
  bomb = gzip.compress(info.tobuf(tarfile.USTAR_FORMAT, "utf-8", "strict") + bytes(1 << 20))
  one_line("got more", take, tmp_path, bomb)


def test_another_layout(tmp_path):
  one_line(
    r"expected files set/b.txt in it, got none; .* without --download", take, tmp_path,
    tar({"set/a/1.jpg": b"1", "b.txt": b""}),
  )  # fmt: skip


def test_interrupted_unpacking_continues(tmp_path, monkeypatch):
  """Nothing is half-written under its name, and what is whole is not written again."""
  replace = os.replace

  def interrupted(source, target):
    if str(target).endswith("2.jpg"):
      raise KeyboardInterrupt
    replace(source, target)

  monkeypatch.setattr(os, "replace", interrupted)
  with pytest.raises(KeyboardInterrupt):
    take(tmp_path, tar(FILES))
  assert taken(tmp_path) == {"set/a/1.jpg": b"one"}
  monkeypatch.setattr(os, "replace", replace)
  first = tmp_path / "there/raw/set/a/1.jpg"
  stamp = first.stat().st_mtime_ns
  # Of a process that was killed; and a file that was cut.
  first.with_name(unpack._TEMPORARY).write_bytes(b"tw")
  first.with_name("2.jpg").write_bytes(b"t")
  take(tmp_path, tar(FILES))
  assert first.stat().st_mtime_ns == stamp
  assert taken(tmp_path) == {name: FILES[name] for name in list(FILES)[:3]}


def test_a_full_disk(tmp_path, monkeypatch):
  def full(*_):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(transfer, "open", full, raising=False)
  one_line(
    "cannot write .*No space left.*another disk; the same command continues", take, tmp_path,
    tar(FILES),
  )  # fmt: skip


@pytest.mark.parametrize("pack", [tar, lambda members: tar(members, True), zipped])
def test_damaged_archives(tmp_path, pack):
  """Cut or with other bytes: taken, or one line; never a part under a final name."""
  whole = pack(FILES | {"set/a/4.jpg": random.Random(0).randbytes(3000)})
  for seed in range(60):
    draw = random.Random(seed)
    content = bytearray(whole[: draw.randrange(len(whole)) if seed % 3 == 0 else None])
    for _ in range(draw.randrange(1, 4) if seed % 3 else 0):
      content[draw.randrange(len(content))] = draw.randrange(256)
    place = tmp_path / str(seed)
    place.mkdir()
    try:
      take(place, bytes(content))
    except InputError as error:
      assert "\n" not in str(error)
    assert not [name for name in taken(place) if name.startswith("..") or "tmp" in name]
