"""Checkpoints that disks damage or refuse, and those of earlier versions."""

import contextlib
import json
import resource

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from rpn_jax.base.errors import InputError
from rpn_jax.training import checkpoint_format
from tests.training.states import IDENTITY, LIKE, folders, opened, reading, same, state_at

# Coroutines of a failed save may be collected after it, outside of `unreadable.quiet`.
orbax_fails = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


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


@pytest.mark.parametrize("damage", [truncate, empty, flip])
def test_whatever_file_of_the_newest_is_damaged(workdir, damage, capfd):
  """Either it does not matter, or the checkpoint before is taken: never a wrong number."""
  newest, taken = workdir / "checkpoints" / "30", []
  with opened(workdir) as checkpoints, reading(workdir) as reader:
    for file in files(newest):
      content = file.read_bytes()
      file.write_bytes(damage(content))
      (step, prompts) = reader.read(LIKE.prompts)["last"]
      np.testing.assert_array_equal(prompts["h"], state_at(step).prompts["h"])
      capfd.readouterr()
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


@pytest.mark.parametrize("change", ["an array more", "an array less"])
def test_another_tree_is_not_taken(workdir, change):
  """As after damage that hides an array from the database's list of keys."""
  like = {**LIKE.prompts}
  if change == "an array more":
    like["new"] = np.zeros(3)
  else:
    del like["head"]
  words = {"an array more": "array new of its prompts is miss", "an array less": "network: head.b"}
  with reading(workdir) as checkpoints, pytest.raises(InputError, match=words[change]):
    checkpoints.read(like)


def test_a_checkpoint_is_that_of_the_step_of_its_folder(workdir, capfd):
  (workdir / "checkpoints/30").rename(workdir / "checkpoints/300")
  with opened(workdir) as checkpoints:
    same(checkpoints.resume(LIKE)[0], 20)
  assert "it is that of step 30; its folder was renamed" in capfd.readouterr().out


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


def move_file(name, source, target):
  (target / name).parent.mkdir(parents=True, exist_ok=True)
  (source / name).rename(target / name)


def test_a_rename_that_copies_and_is_cut_off(workdir, capfd):
  """As where gcsfuse shows a bucket: a part of a checkpoint is recognized, wherever it ends."""
  folder = workdir / "checkpoints"
  taken, newest = [], folder / "30"
  with reading(workdir) as reader:
    for file in files(newest)[::-1]:
      step, prompts = reader.read(LIKE.prompts)["last"]
      np.testing.assert_array_equal(prompts["h"], state_at(step).prompts["h"])
      taken.append(step)
      move_file(file.relative_to(newest), newest, folder / "30.orbax-checkpoint-tmp")
  assert taken[0] == 30 and taken[-1] == 20 and set(taken) == {20, 30}
  for aside in (["30.damaged"], ["30.damaged", "30.damaged2"]):
    with opened(workdir) as checkpoints:
      same(checkpoints.resume(LIKE)[0], 20)
      assert folders(workdir) == ["10", "20", *aside]
    # Putting it aside is cut off, too.
    (newest / "meta").mkdir(parents=True)
  assert "renamed to 30.damaged2, using that of step 20" in capfd.readouterr().out


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


# Other networks and runs


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
  assert meta["version"] == checkpoint_format.FORMAT_VERSION and set(meta["checksums"]) == {
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
  monkeypatch.setattr(checkpoint_format, "FORMAT_VERSION", 1)
  with opened(workdir) as checkpoints, pytest.raises(InputError, match=r"of format 2.*up to 1"):
    checkpoints.resume(LIKE)
  assert folders(workdir) == ["10", "20", "30"]
