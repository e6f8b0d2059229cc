"""Order, resuming, sharding and refusals of the input pipeline."""

import errno
import io
import os
import pathlib
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from data_pipelines import pipeline, recipes, transforms, workers
from rpn_jax.base.errors import InputError
from tests import ROOT


def make_source(count=10, height=12, width=16):
  """Images of one color, which is their index, under a label that is also their index."""
  return [
    {
      "image": np.full((height, width, 3), i, np.uint8),
      "label": np.full((height, width), i, np.uint8),
      "id": f"pic_{i}",
    }
    for i in range(count)
  ]


def identity(count, **options):
  return transforms.LabelMap.from_ids({i: i for i in range(count)}, **options)


def small(example, rng):
  """Keeps image and label recognisable and lets the random numbers show."""
  image = example["image"][:2, :2].astype(np.float32)
  image[0, 0] = rng.random()
  return {"image": image, "label": example["label"][:2, :2].astype(np.int32)}


def take(count, source=None, batch_size=4, seed=5, **kwargs):
  source = make_source() if source is None else source
  iterator = pipeline.train_batches(source, small, batch_size=batch_size, seed=seed, **kwargs)
  batches = [next(iterator) for _ in range(count)]
  iterator.close()
  return batches


def assert_same(batches, others):
  for batch, other in zip(batches, others, strict=True):
    assert batch.keys() == other.keys() == {"image", "label"}
    for key in batch:
      np.testing.assert_array_equal(batch[key], other[key])


def test_every_epoch_holds_every_example_once_in_a_new_order():
  # 10 examples in batches of 4: five batches are two epochs, the third batch lies in both.
  labels = np.concatenate([b["label"][:, 0, 0] for b in take(5)])
  assert sorted(labels[:10]) == sorted(labels[10:]) == list(range(10))
  assert list(labels[:10]) != list(labels[10:])


def test_the_examples_of_a_batch_can_be_named():
  for step, batch in enumerate(take(6)):
    named = pipeline.train_indices(10, batch_size=4, seed=5, step=step)
    assert named == batch["label"][:, 0, 0].tolist()


def test_shapes_and_augmentation():
  batches = take(5)
  assert batches[0]["image"].shape == (4, 2, 2, 3) and batches[0]["image"].dtype == np.float32
  assert batches[0]["label"].shape == (4, 2, 2) and batches[0]["label"].dtype == np.int32
  for batch in batches:
    np.testing.assert_array_equal(batch["image"][:, 1, 1, 0], batch["label"][:, 1, 1])
  drawn = np.concatenate([b["image"][:, 0, 0, 0] for b in batches])
  assert len(set(drawn)) == 20  # another draw for every position, also across epochs


def test_seed_decides():
  assert_same(take(2), take(2))
  assert not np.array_equal(take(1)[0]["image"], take(1, seed=6)[0]["image"])


@pytest.mark.parametrize("num_threads", [4, 0])
def test_resumes_by_step_alone(num_threads):
  resumed = take(2, start_step=3, num_threads=num_threads)
  assert_same(resumed, take(5)[3:])


@pytest.mark.parametrize("count", [2, 4])
def test_processes_together_hold_the_same_global_batches(count):
  parts = [take(4, shard=(index, count)) for index in range(count)]
  joined = [{k: np.concatenate([b[k] for b in bs]) for k in bs[0]} for bs in zip(*parts)]
  assert_same(joined, take(4))


def test_worker_processes_change_nothing(capfd):
  assert_same(take(3, start_step=1, workers=2), take(4)[1:])
  assert not capfd.readouterr().out


def test_without_shared_memory_batches_come_through_pipes(capfd, monkeypatch):
  one = sum(value.nbytes for value in take(1)[0].values())
  # Two in the queue, two behind it, one on the way to each, for each process; and one in use.
  monkeypatch.setattr(workers, "free_bytes", lambda: 13 * one - 1)
  batches = take(2, workers=2)
  assert_same(batches, take(2))
  assert all(type(value) is np.ndarray for value in batches[0].values())
  assert "of 2 reader processes can take 0 MB: passing them through pipes" in capfd.readouterr().out


READ = """
import os, sys, time
from absl import flags
from data_pipelines import pipeline
from tests.data_pipelines.test_pipeline import make_source, small
if __name__ == "__main__":
  flags.FLAGS.mark_as_parsed()
  before = set(os.listdir("/dev/shm"))
  batches = pipeline.train_batches(make_source(), small, batch_size=4, seed=0, workers=1)
  next(batches)
  threads = os.listdir("/proc/self/task")
  print(*(open(f"/proc/self/task/{t}/children").read() for t in threads), flush=True)
  print(*set(os.listdir("/dev/shm")) - before, flush=True)
  time.sleep(60)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc and /dev/shm")
def test_readers_end_with_a_run_that_is_killed(tmp_path):
  """And leave no shared memory; the tracker of multiprocessing removes it."""
  (tmp_path / "read.py").write_text(READ)
  environment = {**os.environ, "PYTHONPATH": str(ROOT)}
  command = [sys.executable, tmp_path / "read.py"]
  with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True) as reader:
    children = reader.stdout.readline().split()
    names = reader.stdout.readline().split()
    assert len(children) == 2 and any(name.startswith("psm_") for name in names)
    reader.kill()
  left = lambda: (
    [c for c in children if (pathlib.Path("/proc") / c).exists()]
    + [name for name in names if (pathlib.Path("/dev/shm") / name).exists()]
  )
  until = time.monotonic() + 20
  while left() and time.monotonic() < until:
    time.sleep(0.05)
  assert not left()


@pytest.mark.parametrize(
  ("error", "message"),
  [
    (
      RuntimeError("Worker process was terminated unexpectedly with exit code -7."),
      "SIGBUS.*shm-s",
    ),
    (RuntimeError("Worker process was terminated unexpectedly with exit code -9."), "SIGKILL.*few"),
    (RuntimeError("Worker process was terminated unexpectedly with exit code 3."), "status 3"),
    (OSError(errno.ENOSPC, "No space left on device", "/psm_1"), "/dev/shm is full.*--shm-size"),
  ],
)
def test_the_end_of_a_reader_says_what_to_do(error, message):
  def batches():
    raise error
    yield

  with pytest.raises(InputError, match=message):
    next(workers._Batches(batches()))


def test_with_the_real_transform():
  transform = recipes.train_transform(identity(10), crop=8, scale=(32, 8))
  iterator = pipeline.train_batches(make_source(), transform, batch_size=2, seed=0)
  batch = next(iterator)
  assert batch["image"].shape == (2, 8, 8, 3) and batch["label"].dtype == np.int32


@pytest.mark.parametrize("count", [1, 3, 4])
def test_evaluation_covers_every_example_once(count):
  transform = recipes.eval_transform(24)
  examples = pipeline.eval_examples(make_source(), transform)
  shards = [examples[index::count] for index in range(count)]
  got = {}
  for shard in shards:
    examples = list(shard)
    assert len(examples) == len(shard)
    got.update({e["id"]: e for e in examples})
  assert sum(map(len, shards)) == 10
  assert sorted(got) == sorted(f"pic_{i}" for i in range(10))
  assert got["pic_3"]["image"].shape == (24, 32, 3) and got["pic_3"]["image"].dtype == np.float32
  assert got["pic_3"]["label"].shape == (12, 16) and got["pic_3"]["label"].dtype == np.int32
  assert shards[0][0]["id"] == "pic_0"
  with pytest.raises(IndexError, match=r"got 10"):
    shards[0][10]


def test_more_processes_than_examples():
  shard = pipeline.eval_examples(make_source(1), recipes.eval_transform(8))[1::2]
  assert len(shard) == 0 and list(shard) == []


def encoded(array, mode, file_format):
  file = io.BytesIO()
  Image.fromarray(array, mode).save(file, file_format)
  return file.getvalue()


def test_gray_and_cmyk_become_rgb():
  label = np.zeros((4, 6), np.uint8)
  gray = np.full((4, 6), 90, np.uint8)
  cmyk = np.zeros((4, 6, 4), np.uint8)
  cmyk[..., 0] = 255  # full cyan: no red
  images = {
    "gray": (gray, (90, 90, 90)),
    "gray, one channel": (gray[..., None], (90, 90, 90)),
    "cmyk": (cmyk, (0, 255, 255)),
    "gray file": (encoded(gray, "L", "PNG"), (90, 90, 90)),
    "rgb file": (encoded(np.full((4, 6, 3), 7, np.uint8), "RGB", "PNG"), (7, 7, 7)),
  }
  for name, (image, color) in images.items():
    got = pipeline.check_example({"image": image, "label": label, "id": b"x"})
    assert got["image"].shape == (4, 6, 3) and got["image"].dtype == np.uint8, name
    assert tuple(got["image"][0, 0]) == color, name
    assert got["id"] == "x"


def test_sixteen_bits_are_not_white():
  file = io.BytesIO()
  Image.fromarray(np.full((2, 2), 0x8040, np.uint16)).save(file, "PNG")
  got = pipeline.check_example({"image": file.getvalue(), "id": "x"})
  assert (got["image"] == 0x80).all()


def test_label_files_keep_their_values():
  image = np.zeros((2, 2, 3), np.uint8)
  label = np.array([[0, 1], [20, 255]], np.uint8)
  palette = Image.fromarray(label, "L").convert("P")
  palette.putdata(label.ravel().tolist())
  file = io.BytesIO()
  palette.save(file, "PNG")
  got = pipeline.check_example({"image": image, "label": file.getvalue(), "id": "x"})
  np.testing.assert_array_equal(got["label"], label)
  got = pipeline.check_example({"image": image, "label": label[..., None], "id": "x"})
  np.testing.assert_array_equal(got["label"], label)


IMAGE, LABEL = np.zeros((4, 6, 3), np.uint8), np.zeros((4, 6), np.uint8)


@pytest.mark.parametrize(
  ("image", "label", "message"),
  [
    (IMAGE, LABEL.T, "one size, got label 6x4 and image 4x6"),
    (IMAGE, IMAGE, r"a label of integers \[H,W\], got uint8 \[4, 6, 3\]"),
    (IMAGE, LABEL.astype(np.float32), "got float32"),
    (IMAGE.astype(np.float32), LABEL, r"an image uint8 \[H,W,3\].* got float32"),
    (IMAGE[..., :2], LABEL, r"got uint8 \[4, 6, 2\]"),
    (IMAGE[:0], LABEL[:0], "empty image"),
    (b"\x89PNG no image", LABEL, "a readable image, got no known image format"),
    (encoded(IMAGE, "RGB", "PNG")[:40], LABEL, "a readable image, got no known image format"),
    (IMAGE, b"", "a readable label file, got 0 bytes"),
    (IMAGE, encoded(LABEL, "L", "JPEG"), "a label file without loss .* got JPEG"),
  ],
)
def test_a_bad_example_is_named(image, label, message):
  source = make_source(3)
  source[1] = {"image": image, "label": label, "id": "bad_one"}
  with pytest.raises(InputError, match=rf"example bad_one: .*{message}") as error:
    take(1, source, batch_size=3)
  assert "\n" not in str(error.value)
  with pytest.raises(InputError, match="bad_one"):
    list(pipeline.eval_examples(source, recipes.eval_transform(8)))


def test_a_label_outside_the_classes_is_named():
  transform = recipes.eval_transform(8, identity(3))
  with pytest.raises(InputError, match=r"example pic_3: .* got 3 on 192 pixels"):
    list(pipeline.eval_examples(make_source(), transform))


class Broken(list):
  def __getitem__(self, index):
    raise OSError("cannot read\nrecord")


def test_a_record_that_cannot_be_read_is_named_by_number():
  with pytest.raises(InputError, match=r"example number 0: .* OSError: cannot read record"):
    list(pipeline.eval_examples(Broken([1]), recipes.eval_transform(8)))


def test_missing_parts_are_named():
  with pytest.raises(InputError, match=r"number 0: expected keys image, label, id, got \['id'\]"):
    list(pipeline.eval_examples([{"id": "a"}], recipes.eval_transform(8)))
  with pytest.raises(InputError, match="example a: expected a label to train on"):
    take(1, [{"id": "a", "image": IMAGE}], batch_size=1)


def test_sources_and_shards_that_do_not_fit():
  with pytest.raises(InputError, match="one batch of 11 examples, got a source of 10"):
    take(1, batch_size=11)
  with pytest.raises(InputError, match="divisible by the 3 processes, got 4"):
    take(1, shard=(0, 3))
  with pytest.raises(InputError, match="empty source"):
    pipeline.eval_examples([], small)
  with pytest.raises(InputError, match="0 <= index < count"):
    take(1, shard=(2, 2))
