"""Checkpoints that cannot be read at the moment, in one process and in several."""

import concurrent.futures
import contextlib
import errno
import os
import pathlib
import re
import resource
import shutil
import tempfile
import threading

import jax
import numpy as np
import pytest

from rpn_jax.base.errors import InputError
from rpn_jax.training import checkpoint, together
from rpn_jax.training.checkpoint import Checkpoints
from tests.training.states import LIKE, folders, opened, same


@contextlib.contextmanager
def nobody_reads(file):
  """A file of another owner: root reads such files, too, so the process is somebody else."""
  file.chmod(0)
  root = os.geteuid() == 0
  if root:
    os.seteuid(65534)
  try:
    yield
  finally:
    if root:
      os.seteuid(0)
    file.chmod(0o644)


@pytest.fixture
def public(workdir):
  """A copy of the workdir in a folder that everybody may enter, which those of pytest are not."""
  with tempfile.TemporaryDirectory() as folder:
    shutil.copytree(workdir, folder, dirs_exist_ok=True)
    os.chmod(folder, 0o755)
    yield pathlib.Path(folder)


def refused(checkpoints, words: str):
  with pytest.raises(InputError, match=rf"step 30 in .* cannot be read \({words}.*left as it is"):
    checkpoints.resume(LIKE)
  with pytest.raises(InputError, match=rf"cannot be read \({words}"):
    checkpoints.read(LIKE.prompts)
  assert folders(checkpoints.directory.parent) == ["10", "20", "30"]


@pytest.mark.parametrize("place", ["meta/metadata", "opt_state/manifest.ocdbt", "prompts/d"])
def test_a_checkpoint_of_another_owner_is_not_damaged(public, place):
  with opened(public) as checkpoints:
    with nobody_reads(checkpoints.directory / "30" / place):
      refused(checkpoints, f"Permission denied: .*/30/{place}")
    same(checkpoints.resume(LIKE)[0], 30)


def test_a_folder_that_cannot_be_listed_is_no_empty_one(public):
  with (
    opened(public) as checkpoints,
    nobody_reads(checkpoints.directory),
    pytest.raises(PermissionError),
  ):
    checkpoints.resume(LIKE)


@pytest.mark.parametrize("spare", [1, 4, 8, 12, 16])
def test_a_full_descriptor_table_is_no_damage(workdir, spare):
  """It fails where the last one is taken: listing, reading, in Orbax; or nowhere."""
  soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
  taken = []
  with opened(workdir) as checkpoints:
    resource.setrlimit(
      resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 20, hard)
    )
    try:
      with contextlib.suppress(OSError):
        while True:
          taken.append(os.open(os.devnull, os.O_RDONLY))
      for _ in range(min(spare, len(taken))):
        os.close(taken.pop())
      same(checkpoints.resume(LIKE)[0], 30)
    except (InputError, OSError) as error:
      assert "Too many open files" in str(error)
    finally:
      for descriptor in taken:
        os.close(descriptor)
      resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert folders(workdir) == ["10", "20", "30"]
    same(checkpoints.resume(LIKE)[0], 30)


@pytest.mark.parametrize(
  ("error", "words"),
  [
    (MemoryError(), "Cannot allocate memory"),
    (ValueError('UNKNOWN: Error reading local file "d/1": Input/output error [EIO]'), "Input/out"),
    (ExceptionGroup("tasks", [OSError(errno.ESTALE, "Stale file handle")]), "Stale file handle"),
    (RuntimeError("can't start new thread"), "Cannot allocate memory"),
    (ValueError('RESOURCE_EXHAUSTED: Failed to open: "d/1": Too many open files'), "Too many open"),
  ],
)
def test_what_the_system_refuses_tensorstore_is_no_damage(workdir, error, words, monkeypatch):
  def read_tree(*_):
    try:
      raise error
    except Exception as cause:
      raise ValueError("Error reading array") from cause

  monkeypatch.setattr(checkpoint, "read_tree", read_tree)
  with opened(workdir) as checkpoints:
    refused(checkpoints, words)


class Processes:
  """Two threads in place of two processes: what `checkpoint` asks of JAX, by barriers."""

  def __init__(self, monkeypatch):
    self.place, self.barrier, self.given = threading.local(), threading.Barrier(2), [None, None]
    for module in (checkpoint, together):
      monkeypatch.setattr(module, "multihost_utils", self)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", self.index)

  def index(self) -> int:
    return getattr(self.place, "index", 0)

  def process_allgather(self, value):
    self.given[self.index()] = value
    self.barrier.wait(timeout=20)
    everyone = np.stack(self.given)
    self.barrier.wait(timeout=20)
    return everyone

  def broadcast_one_to_all(self, value):
    return self.process_allgather(value)[0]

  def sync_global_devices(self, name):
    self.barrier.wait(timeout=20)

  def resume(self, *checkpoints) -> list:
    """What `resume` gives or raises in each."""

    def run(index: int):
      self.place.index = index
      try:
        return checkpoints[index].resume(LIKE)
      except Exception as error:
        return error

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
      return list(pool.map(run, range(2)))


@pytest.mark.parametrize(
  ("fails", "error", "kind", "words"),
  [
    ("read_files", PermissionError(errno.EACCES, "Permission denied", "30/d/1"), InputError,
     r"process 1: .* step 30 .* cannot be read \(Permission denied: 30/d/1\); .* left as it is"),
    ("read_tree", ValueError("Input/output error [EIO]"), InputError,
     r"process 1: .* step 30 .* cannot be read \(Input/output error\)"),
    ("steps", PermissionError(errno.EACCES, "Permission denied", "checkpoints"), OSError,
     r"process 1: .*Permission denied: 'checkpoints'"),
  ],
)  # fmt: skip
def test_what_one_process_cannot_read_stops_all(workdir, fails, error, kind, words, monkeypatch):
  """With the same words, and at once: none is left waiting for the other."""
  with opened(workdir) as first, opened(workdir) as second:
    processes = Processes(monkeypatch)
    place = Checkpoints if fails == "steps" else checkpoint
    real = getattr(place, fails)

    def failing(*args):
      if processes.index() == 1:
        raise error
      return real(*args)

    monkeypatch.setattr(place, fails, failing)
    both = processes.resume(first, second)
    assert [type(each) for each in both] == [kind, kind]
    assert str(both[0]) == str(both[1]) and re.search(words, str(both[0]))
    assert folders(workdir) == ["10", "20", "30"]
    monkeypatch.setattr(place, fails, real)
    for state, _ in processes.resume(first, second):
      same(state, 30)


def test_processes_agree_on_steps_and_damage(workdir, monkeypatch, capfd):
  """The second sees an earlier state of the folder, and damage that the first does not."""
  with opened(workdir) as first, opened(workdir) as second:
    processes = Processes(monkeypatch)
    monkeypatch.setattr(second, "steps", lambda: [20, 10])
    for state, _ in processes.resume(first, second):
      same(state, 30)
    real = checkpoint.read_tree

    def read_tree(folder, like):
      if processes.index() == 1 and folder.parent.name == "30":
        raise ValueError("DATA_LOSS")
      return real(folder, like)

    monkeypatch.setattr(checkpoint, "read_tree", read_tree)
    for state, _ in processes.resume(first, second):
      same(state, 20)
  assert folders(workdir) == ["10", "20", "30.damaged"]
  assert "step 30 is damaged (process 1: ValueError: DATA_LOSS)" in capfd.readouterr().out
