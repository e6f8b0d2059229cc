"""Folders that only look like those of a disk, and names that are as long as a disk takes them."""

import errno
import os
import pathlib

import pytest

from rpn_jax.base import paths
from rpn_jax.base.errors import InputError

MOUNTS = """\
/dev/sda1 / ext4 rw,relatime 0 0
my-bucket {root}/my\\040bucket fuse.gcsfuse rw,nosuid,nodev,user_id=0,group_id=0 0 0
tmpfs {root}/my\\040bucket/scratch tmpfs rw 0 0
"""


def test_a_bucket_that_gcsfuse_shows_is_known_by_its_mount(tmp_path, monkeypatch):
  (tmp_path / "mounts").write_text(MOUNTS.format(root=tmp_path))
  monkeypatch.setattr(paths, "_MOUNTS", tmp_path / "mounts")
  (tmp_path / "link").symlink_to(tmp_path / "my bucket")
  for name in ("my bucket", "my bucket/runs/new", "link/runs"):
    assert paths.is_gcsfuse(tmp_path / name)
  for name in ("run", "my bucket 2", "my bucket/scratch/run"):
    assert not paths.is_gcsfuse(tmp_path / name)
  monkeypatch.setattr(paths, "_MOUNTS", tmp_path / "none")
  assert not paths.is_gcsfuse(tmp_path / "my bucket")


def test_a_name_that_begins_with_a_tilde(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv("HOME", str(tmp_path / "home"))
  assert paths.expand("~") == tmp_path / "home"
  assert paths.expand("~/a.png") == tmp_path / "home/a.png"
  for typed in ("./~a.png", "./~", "./~/a.png"):
    found = paths.expand(typed)
    assert found == paths.expand(found) == tmp_path / typed
  with pytest.raises(InputError, match="write the whole path"):
    paths.expand("~no-such-user.png")
  (tmp_path / "~no-such-user.png").touch()
  found = paths.expand("~no-such-user.png")
  assert found == paths.expand(found) == tmp_path / "~no-such-user.png"


def test_an_empty_path_is_not_the_current_folder(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  for call in (paths.expand, paths.exact, lambda path: paths.expand_local(path, "--root")):
    with pytest.raises(InputError, match="expected a path, got an empty one"):
      call("")
  assert paths.expand(".") == paths.expand(pathlib.Path("")) == pathlib.Path(".")


def test_where_folders_cannot_be_renamed(tmp_path, monkeypatch):
  paths.check_renames(tmp_path)
  paths.check_renames(tmp_path / "none")  # whoever writes there will say so
  real = os.rename

  def rename(old, new):  # gcsfuse's answer where it was not told to copy
    if os.path.isdir(old):
      raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), str(old), None, str(new))
    real(old, new)

  monkeypatch.setattr(os, "rename", rename)
  with pytest.raises(InputError, match=r"expected a disk, .* got Too many open files, .* gs://BUC"):
    paths.check_renames(tmp_path)
  assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("length", [1, 70, 80, 85])  # three bytes each, of 255 at most
def test_a_file_of_any_name_that_the_disk_takes(tmp_path, length):
  path = tmp_path / ("雨" * length)
  with paths.replacing(path) as temporary:
    temporary.write_text("new")
    assert [each.name[0] for each in tmp_path.iterdir()] == ["."] and temporary.suffix == ".tmp"
    assert (f".{path.name}." in temporary.name) == (length <= 70)
  assert [*tmp_path.iterdir()] == [path]
