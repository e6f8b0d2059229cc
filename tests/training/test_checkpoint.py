"""Checkpoints that disks damage or refuse, and those of earlier versions."""

import contextlib
import errno
import json
import os
import pathlib
import resource
import shutil
import tempfile

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from rpn_jax.base.errors import InputError
from rpn_jax.training import checkpoint
from rpn_jax.training.checkpoint import Checkpoints
from rpn_jax.training.step import TrainState

IDENTITY = {"clip": "0" * 16, "config": {"seed": 0, "optimizer": {"clip_norm": 0.0}}}


# Coroutines of a failed Orbax call may be collected after it, outside of `unreadable.quiet`.
orbax_fails = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def state_at(step: int, size: int = 40) -> TrainState:
  rng = np.random.default_rng(step)
  prompts = {"h": rng.normal(size=(size, 8)).astype(np.float32), "head": {"b": np.ones(4, "f")}}
  moments = jax.tree.map(lambda x: x * 2, prompts)
  return TrainState(np.int32(step), prompts, {"mu": moments, "count": np.int32(step)},
                    np.int32(3), np.int32(1))  # fmt: skip


LIKE = state_at(0)


def opened(workdir, **changes) -> contextlib.closing:
  return contextlib.closing(Checkpoints(workdir, {**IDENTITY, **changes}))


def reading(workdir):
  return contextlib.closing(Checkpoints(workdir, IDENTITY, read_only=True))


def same(got: TrainState, step: int):
  want = state_at(step)
  jax.tree.map(np.testing.assert_array_equal, got, want)
  assert jax.tree.structure(got) == jax.tree.structure(want)


@pytest.fixture
def workdir(tmp_path):
  """Checkpoints at 10, 20 and 30; the best is that of step 10."""
  with opened(tmp_path) as checkpoints:
    for step in (10, 20, 30):
      assert checkpoints.save(state_at(step), {"step": 10, "hiou": 0.5})
  return tmp_path


def folders(workdir) -> list[str]:
  return sorted(p.name for p in (workdir / "checkpoints").iterdir())


def test_the_newest_two_and_the_best_are_kept(workdir):
  assert folders(workdir) == ["10", "20", "30"]
  with opened(workdir) as checkpoints:
    state, best = checkpoints.resume(LIKE)
    same(state, 30)
    assert best == {"step": 10, "hiou": 0.5}
    assert checkpoints.save(state_at(40), best)
    assert folders(workdir) == ["10", "30", "40"]
    assert checkpoints.save(state_at(50), {"step": 40, "hiou": 0.6})
  assert folders(workdir) == ["40", "50"]


def test_prediction_reads_last_and_best(workdir):
  with reading(workdir) as checkpoints:
    found = checkpoints.read(LIKE.prompts)
    assert {k: step for k, (step, _) in found.items()} == {"last": 30, "best": 10}
    np.testing.assert_array_equal(found["best"][1]["h"], state_at(10).prompts["h"])
    assert checkpoints.read(LIKE.prompts, best_step=20)["best"][0] == 20
    # Of one that is gone the next best is what the newest checkpoint knows.
    assert checkpoints.read(LIKE.prompts, best_step=25)["best"][0] == 10
    assert "best" not in checkpoints.read(LIKE.prompts, best_step=30)


def test_a_new_run_has_nothing_to_resume(tmp_path):
  with opened(tmp_path) as checkpoints:
    assert checkpoints.resume(LIKE) is None
  with reading(tmp_path) as checkpoints, pytest.raises(InputError, match="train first"):
    checkpoints.read(LIKE.prompts)


# Damage


def truncate(data: bytes) -> bytes:
  return data[: len(data) // 2]


def empty(data: bytes) -> bytes:
  return b""


def flip(data: bytes) -> bytes:
  place = len(data) * 2 // 3
  return data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :]


def files(folder) -> list:
  return sorted(p for p in folder.rglob("*") if p.is_file() and p.stat().st_size)


@orbax_fails
@pytest.mark.parametrize("damage", [truncate, empty, flip])
def test_whatever_file_of_the_newest_is_damaged(workdir, damage, capfd):
  """Either it does not matter, or the checkpoint before is taken: never a wrong number."""
  newest, taken = workdir / "checkpoints" / "30", []
  for file in files(newest):
    content = file.read_bytes()
    file.write_bytes(damage(content))
    with reading(workdir) as checkpoints:
      (step, prompts) = checkpoints.read(LIKE.prompts)["last"]
      np.testing.assert_array_equal(prompts["h"], state_at(step).prompts["h"])
    capfd.readouterr()
    with opened(workdir) as checkpoints:
      state, _ = checkpoints.resume(LIKE)
    same(state, int(state.step))
    taken.append(int(state.step))
    out, err = capfd.readouterr()
    if taken[-1] == 20:
      assert out.startswith("the checkpoint of step 30 is damaged (") and out.count("\n") == 1
      assert "renamed to 30.damaged, using that of step 20" in out
      (workdir / "checkpoints" / "30.damaged").rename(newest)
    assert not err
    file.write_bytes(content)
  # Of the three items each has files that matter; the folder has some others.
  assert taken.count(20) >= 5, list(zip(files(newest), taken))


@orbax_fails
def test_a_damaged_checkpoint_is_put_aside_and_written_anew(workdir):
  for file in files(workdir / "checkpoints" / "30"):
    file.write_bytes(b"")
  with opened(workdir) as checkpoints:
    state, best = checkpoints.resume(LIKE)
    same(state, 20)
    assert folders(workdir) == ["10", "20", "30.damaged"]
    assert checkpoints.save(state_at(30), best)
  for file in files(workdir / "checkpoints" / "30"):
    file.write_bytes(b"")
  with opened(workdir) as checkpoints:
    same(checkpoints.resume(LIKE)[0], 20)
    assert folders(workdir) == ["10", "20", "30.damaged", "30.damaged2"]
    assert checkpoints.save(state_at(30), best)
    same(checkpoints.resume(LIKE)[0], 30)


@orbax_fails
def test_nothing_intact_is_no_new_run_and_is_left_as_it_is(workdir):
  for step in (10, 20, 30):
    for file in files(workdir / "checkpoints" / str(step)):
      file.write_bytes(b"")
  with reading(workdir) as checkpoints, pytest.raises(InputError, match=r"10, 20, 30\] are dam"):
    checkpoints.read(LIKE.prompts)
  for _ in range(2):
    with opened(workdir) as checkpoints, pytest.raises(InputError, match=r"left as.*--restart"):
      checkpoints.resume(LIKE)
    assert folders(workdir) == ["10", "20", "30"]


def test_no_new_run_beside_what_was_set_aside(workdir):
  for name in ("10", "20", "30"):
    (workdir / "checkpoints" / name).rename(workdir / "checkpoints" / f"{name}.damaged")
  with opened(workdir) as checkpoints, pytest.raises(InputError, match=r"aside: 10.damaged, 20.d"):
    checkpoints.resume(LIKE)
  (workdir / "checkpoints/20.damaged").rename(workdir / "checkpoints/20")
  with opened(workdir) as checkpoints:
    same(checkpoints.resume(LIKE)[0], 20)


# What cannot be read


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


@orbax_fails
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
  ],
)
def test_what_the_system_refuses_orbax_is_no_damage(workdir, error, words, monkeypatch):
  def restore(*_, **__):
    try:
      raise error
    except Exception as cause:
      raise ValueError("Error reading array") from cause

  with opened(workdir) as checkpoints:
    monkeypatch.setattr(checkpoints.manager, "restore", restore)
    refused(checkpoints, words)


def test_types_that_jax_chooses_otherwise_are_no_damage(workdir):
  """As under JAX_ENABLE_X64: the checksum is that of what was stored."""
  doubled = jax.tree.map(lambda x: np.asarray(x, "f8") if x.dtype == "f" else x, LIKE)
  words = "30/prompts has other types .*float32 -> float64.* left as it is: unset JAX_ENABLE_X64"
  with opened(workdir) as checkpoints:
    with pytest.raises(InputError, match=words):
      checkpoints.resume(doubled)
    with pytest.raises(InputError, match=words):
      checkpoints.read(doubled.prompts)
    assert folders(workdir) == ["10", "20", "30"]
    same(checkpoints.resume(LIKE)[0], 30)


def test_another_shape_is_not_taken(workdir):
  with (
    reading(workdir) as checkpoints,
    pytest.raises(InputError, match=r"\['h'\]: \(40, 8\) -> \(41, 8\)"),
  ):
    checkpoints.read(state_at(0, size=41).prompts)


def test_another_run_is_refused_with_both_values(workdir):
  config = {"seed": 7, "optimizer": {"clip_norm": 1.0}}
  with (
    opened(workdir, clip="1" * 16, config=config) as checkpoints,
    pytest.raises(
      InputError,
      match=r"clip: 0+ -> 1+; config.optimizer.clip_norm: 0.0 -> 1.0; config.seed: 0 -> 7",
    ),
  ):
    checkpoints.resume(LIKE)
  assert folders(workdir) == ["10", "20", "30"]


# Disks


@contextlib.contextmanager
def small_files(limit: int | None):
  """No file may grow beyond a limit: as on a full disk, without one. None: no limit."""
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (soft if limit is None else limit, hard))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@orbax_fails
def test_a_save_that_fails_harms_nothing(workdir, capfd):
  with opened(workdir) as checkpoints:
    checkpoints.resume(LIKE)
    with small_files(200):
      assert not checkpoints.save(state_at(40), {"step": 30})
    out, _ = capfd.readouterr()
    assert out.count("\n") == 1 and "step 40: no checkpoint written" in out
    assert "(File too large); the last good one is of step 30" in out
    assert folders(workdir) == ["10", "20", "30"]
    assert checkpoints.save(state_at(41), {"step": 30})
  assert folders(workdir) == ["30", "41"]
  with opened(workdir) as checkpoints:
    same(checkpoints.resume(LIKE)[0], 41)


def test_a_checkpoint_deleted_while_the_folder_is_read(workdir, monkeypatch):
  """The run that goes on deletes one between its being listed and its being looked at."""
  with reading(workdir) as checkpoints:
    reload, calls = checkpoints.manager.reload, []

    def deleted_meanwhile():
      calls.append(1)
      if len(calls) == 1:
        shutil.rmtree(workdir / "checkpoints/20")
        raise FileNotFoundError("checkpoints/20")
      reload()

    monkeypatch.setattr(checkpoints.manager, "reload", deleted_meanwhile)
    assert checkpoints.steps() == [30, 10]


@orbax_fails
def test_a_folder_that_is_gone_is_told_of(workdir, capfd):
  with opened(workdir) as checkpoints:
    (workdir / "checkpoints").rename(workdir / "elsewhere")
    (workdir / "checkpoints").write_text("a file")
    assert not checkpoints.save(state_at(40), None)
    assert "step 40: no checkpoint written" in capfd.readouterr().out


# Versions


def save_as_1(workdir, step: int, identity: dict) -> None:
  """What version 1 wrote, in its own words."""
  manager = ocp.CheckpointManager(
    (workdir / "checkpoints").absolute(), item_names=("prompts", "opt_state", "meta")
  )
  state = state_at(step)
  meta = {"step": step, "identity": identity, "best": {"step": step, "hiou": 0.5}}
  args = ocp.args.Composite(
    prompts=ocp.args.StandardSave(state.prompts),
    opt_state=ocp.args.StandardSave(state.opt_state),
    meta=ocp.args.JsonSave(meta),
  )
  manager.save(step, args=args, metrics={"hiou": 0.5})
  manager.close()


def test_checkpoints_of_version_1_go_on(tmp_path):
  save_as_1(tmp_path, 10, {**IDENTITY, "config": {"seed": 0}})
  with opened(tmp_path) as checkpoints:
    state, best = checkpoints.resume(LIKE)
    jax.tree.map(np.testing.assert_array_equal, state.prompts, state_at(10).prompts)
    assert (int(state.step), int(state.skipped), best["hiou"]) == (10, 0, 0.5)
    assert checkpoints.save(state_at(20), best)
  meta = json.loads(next((tmp_path / "checkpoints/20/meta").iterdir()).read_text())
  assert meta["version"] == checkpoint.FORMAT_VERSION and set(meta["checksums"]) == {
    "prompts", "opt_state",
  }  # fmt: skip
  # It was trained without the fields it does not have.
  config = {"seed": 0, "optimizer": {"clip_norm": 1.0}}
  with (
    opened(tmp_path, config=config) as checkpoints,
    pytest.raises(InputError, match=r"optimizer.clip_norm: 0.0 -> 1.0"),
  ):
    checkpoints.resume(LIKE)


def test_checkpoints_of_a_later_version_are_refused(workdir, monkeypatch):
  monkeypatch.setattr(checkpoint, "FORMAT_VERSION", 1)
  with opened(workdir) as checkpoints, pytest.raises(InputError, match=r"of format 2.*up to 1"):
    checkpoints.resume(LIKE)
  assert folders(workdir) == ["10", "20", "30"]
