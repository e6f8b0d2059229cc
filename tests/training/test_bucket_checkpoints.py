"""Checkpoints, curves and the lock of a run whose workdir is in a bucket."""

import json

import pytest

from rpn_jax.base import buckets
from rpn_jax.base.errors import InputError
from rpn_jax.training import run
from rpn_jax.training.bucket_checkpoints import MARK, BucketCheckpoints
from rpn_jax.training.metric_log import METRICS, MetricWriter, read_history
from tests.training import states
from tests.training.states import IDENTITY, LIKE, same, state_at
from tests.training.test_run import claimed_in


def opened(workdir) -> BucketCheckpoints:
  return BucketCheckpoints(workdir, IDENTITY)


def names(workdir) -> list[str]:
  return sorted(path.name for path in (workdir / "checkpoints").iterdir())


@pytest.fixture
def saved(bucket):
  """Checkpoints of two steps."""
  checkpoints = opened(bucket)
  for step in (10, 20):
    assert checkpoints.save(state_at(step), {"step": 10})
  return bucket


def test_the_newest_and_the_best_are_kept_and_read(saved):
  checkpoints = opened(saved)
  assert checkpoints.save(state_at(30), {"step": 10}) and checkpoints.save(
    state_at(40), {"step": 10}
  )
  assert names(saved) == ["10", "30", "40"]
  state, best = opened(saved).resume(LIKE)
  same(state, 40)
  assert best == {"step": 10}
  found = opened(saved).read(LIKE.prompts)
  assert found["last"][0] == 40 and found["best"][0] == 10


def test_the_mark_is_written_last(saved, store):
  store.requests.clear()
  assert opened(saved).save(state_at(30), None)
  sent = [path for method, path in store.requests if "/upload/" in path]
  assert len(sent) > 10 and f"/30/{MARK}" in sent[-1] and "meta" in sent[-2]
  assert not any(f"/30/{MARK}" in path for path in sent[:-1])


def test_one_without_its_mark_is_used_if_it_is_intact(saved):
  (saved / "checkpoints/20" / MARK).unlink()
  same(opened(saved).resume(LIKE)[0], 20)
  assert (saved / "checkpoints/20" / MARK).exists()


def test_a_run_copied_without_marks_goes_on_and_loses_nothing(bucket, tmp_path):
  """`gcloud storage cp -r` of a run of an Orbax that marks nothing on a disk."""
  with states.opened(tmp_path) as checkpoints:
    for step in (10, 20, 30):
      assert checkpoints.save(state_at(step), {"step": 10})
  for file in (tmp_path / "checkpoints").rglob("*"):
    if file.is_file() and file.name != MARK:
      (bucket / file.relative_to(tmp_path).as_posix()).write_bytes(file.read_bytes())
  copied = {path: path.read_bytes() for path, _ in buckets.walk(bucket)}
  checkpoints = opened(bucket)
  assert {k: step for k, (step, _) in checkpoints.read(LIKE.prompts).items()} == {
    "last": 30,
    "best": 10,
  }
  state, best = checkpoints.resume(LIKE)
  same(state, 30)
  for step in (40, 50, 60):
    assert checkpoints.save(state_at(step), best)
  # Of those without a mark nothing is removed; 30 got one, and is an old one now.
  assert names(bucket) == ["10", "20", "50", "60"]
  kept = {path: content for path, content in copied.items() if "/30/" not in str(path)}
  assert len(kept) > 20 and all(path.read_bytes() == content for path, content in kept.items())


def test_a_save_that_was_cut_off_is_put_aside_and_never_deleted(saved, store, capsys):
  objects = store.buckets["bucket"]
  for name in [name for name in objects if "/20/meta/" in name or name.endswith(f"/20/{MARK}")]:
    if name.startswith(f"{str(saved).removeprefix('gs://bucket/')}/"):
      del objects[name]
  left = {name.rpartition("/20/")[2] for name in objects if f"{saved.name}/checkpoints/20/" in name}
  # Who only reads says nothing of it: it may be under way.
  assert opened(saved).read(LIKE.prompts)["last"][0] == 10 and not capsys.readouterr().out
  checkpoints = opened(saved)
  same(checkpoints.resume(LIKE)[0], 10)
  assert "renamed to 20.incomplete, using that of step 10" in capsys.readouterr().out
  assert checkpoints.save(state_at(20), None)
  assert names(saved) == ["10", "20", "20.incomplete"]
  kept = {n.rpartition("/20.incomplete/")[2] for n in objects if "/20.incomplete/" in n}
  assert kept == left


def test_what_stands_in_the_way_of_a_save_is_put_aside(saved, capsys):
  (saved / "checkpoints/30/prompts/d/1").write_bytes(b"1")
  assert opened(saved).save(state_at(30), None)
  assert "has no commit mark: renamed to 30.incomplete" in capsys.readouterr().out
  assert (saved / "checkpoints/30.incomplete/prompts/d/1").read_bytes() == b"1"


def test_a_first_save_that_was_cut_off_is_no_run(bucket, capsys):
  (bucket / "checkpoints/10/prompts/d/1").write_bytes(b"1")
  assert opened(bucket).resume(LIKE) is None
  assert "was cut off: renamed to 10.incomplete, beginning anew" in capsys.readouterr().out
  assert opened(bucket).resume(LIKE) is None


def test_damage_is_put_aside_where_an_older_one_is_intact(saved, store, capsys):
  for path, _ in buckets.walk(saved / "checkpoints/20/prompts"):
    content = path.read_bytes()
    if path.parent.name == "d":
      path.write_bytes(content[:-8] + bytes(8))
  same(opened(saved).resume(LIKE)[0], 10)
  assert "renamed to 20.damaged" in capsys.readouterr().out
  (saved / "checkpoints/10/meta/metadata").write_text("{}")
  with pytest.raises(InputError, match=r"no intact checkpoint in gs://bucket/.* left as they are"):
    opened(saved).resume(LIKE)


def test_a_bucket_that_cannot_be_reached_changes_nothing(saved, store):
  before = dict(store.buckets["bucket"])
  store.fault = lambda method, path: 503 if "alt=media" in path else None
  with pytest.raises(
    InputError, match=r"step 20 .* cannot be read \(the storage cannot be reached"
  ):
    opened(saved).resume(LIKE)
  store.fault = lambda method, path: 503
  with pytest.raises(OSError, match="the storage cannot be reached"):
    opened(saved).resume(LIKE)
  assert store.buckets["bucket"] == before


def test_a_network_that_is_cut_during_a_save(saved, store, capsys):
  checkpoints = opened(saved)
  sent = []

  def cut(method, path):
    sent.append(path)
    return 0 if "upload" in path and len(sent) > 6 else None

  store.fault = cut
  assert not checkpoints.save(state_at(30), None)
  said = capsys.readouterr().out
  assert "step 30: no checkpoint written to gs://bucket/" in said and said.count("\n") == 1
  assert "the storage cannot be reached" in said and "last good one is of step 20" in said
  store.fault = lambda method, path: None
  # The same process knows what it had begun.
  assert checkpoints.save(state_at(30), None)
  assert names(saved) == ["20", "30"]
  same(opened(saved).resume(LIKE)[0], 30)
  sent.clear()
  store.fault = cut
  assert not checkpoints.save(state_at(40), None)
  store.fault = lambda method, path: None
  assert names(saved) == ["20", "30", "40"]
  assert checkpoints.save(state_at(50), None)
  assert names(saved) == ["30", "50"]


def test_curves_survive_a_resume_and_a_cut(bucket, store, capsys, tmp_path):
  for workdir in (bucket, tmp_path):
    with MetricWriter(workdir, resume_step=0) as writer:
      for step in (1, 2, 3):
        writer.write(step, {"loss": step})
    with MetricWriter(workdir, resume_step=2) as writer:
      writer.write(3, {"loss": 30.0})
  assert read_history(bucket / METRICS) == read_history(tmp_path / METRICS)
  assert read_history(bucket / METRICS) == {"loss": [(1, 1.0), (2, 2.0), (3, 30.0)]}
  assert list((bucket / "events").iterdir())
  writer = MetricWriter(bucket)
  store.writable = False
  writer.write(4, {"loss": 4.0})
  writer.flush()
  assert "metrics not written" in capsys.readouterr().out
  store.writable = True
  writer.close()
  assert read_history(bucket / METRICS)["loss"][-1] == (4, 4.0)


def test_a_workdir_belongs_to_one_run(bucket, store):
  with claimed_in(bucket) as own:
    own.check_workdir(6)
    with pytest.raises(InputError, match="is in use by process"), run.held_workdir(bucket):
      pass
    store.fault = lambda method, path: 503
    own.check_workdir(6)  # nothing is known: the save will tell
    store.fault = lambda method, path: None
    (bucket / run.LOCK).write_text("process 7 on host\n0123 x\n")
    with pytest.raises(InputError, match=r"removed, renamed or emptied .*\.lock"):
      own.check_workdir(6)
  (bucket / run.LOCK).unlink()
  with claimed_in(bucket) as own:
    own.restart()
    replaced = next(path for path in bucket.iterdir() if path.name.startswith("replaced-"))
    assert json.loads((replaced / "config.json").read_text())["clip"] == "0" * 16


def test_a_workdir_that_cannot_be_written(bucket, store):
  store.writable = False
  with (
    pytest.raises(InputError, match=r"expected a writable workdir, but gs://.*access is denied"),
    run.held_workdir(bucket),
  ):
    pass
