"""Metrics survive a killed run; progress and tables read well in a log."""

import io
import json
import sys
import types

import numpy as np
import pytest

from rpn_jax.base import console
from rpn_jax.base.console import progress, table
from rpn_jax.base.errors import InputError
from rpn_jax.training.metric_log import MetricWriter, read_history
from tests.training.test_checkpoint import small_files


def lines_of(workdir):
  return (workdir / "metrics.jsonl").read_text().splitlines()


def events_of(workdir) -> list:
  """(tag, step) of all events, from all files."""
  from tensorboardX.proto.event_pb2 import Event

  found = []
  for file in sorted((workdir / "events").iterdir()):
    data = file.read_bytes()
    while data:  # length, its checksum, event, its checksum
      length = int.from_bytes(data[:8], "little")
      event = Event.FromString(data[12 : 12 + length])
      found += [(value.tag, event.step) for value in event.summary.value]
      data = data[16 + length :]
  return found


def test_metrics_are_written_and_read_back(tmp_path):
  with MetricWriter(tmp_path / "run") as writer:
    writer.write(1, {"loss": np.float32(0.5), "hiou": None, "array": np.array([2])})
    writer.write(2, {"loss": float("nan"), "top": float("inf")})
    writer.write(1, {"accuracy": 1})
    history = writer.history()  # while the run goes on
  assert history.keys() == {"loss", "array", "top", "accuracy"}
  assert history["loss"][0] == (1, 0.5)
  assert np.isnan(history["loss"][1][1])
  assert history["top"] == [(2, float("inf"))]
  for line in lines_of(tmp_path / "run"):
    entry = json.loads(line, parse_constant=pytest.fail)  # standard JSON has no NaN
    assert entry["time"] > 1.6e9
  writer.close()  # again


def test_a_later_value_of_a_step_wins(tmp_path):
  with MetricWriter(tmp_path) as writer:
    for value in (1.0, 2.0):
      writer.write(5, {"loss": value, f"only{value:.0f}": value})
    writer.write(3, {"loss": 9.0})
  assert read_history(tmp_path / "metrics.jsonl") == {
    "loss": [(3, 9.0), (5, 2.0)],
    "only1": [(5, 1.0)],
    "only2": [(5, 2.0)],
  }


def test_resume_drops_what_will_be_written_again(tmp_path):
  with MetricWriter(tmp_path) as writer:
    for step in (10, 20, 30):
      writer.write(step, {"loss": step})
  before = lines_of(tmp_path)
  with MetricWriter(tmp_path) as writer:
    assert [s for s, _ in writer.history()["loss"]] == [10, 20, 30]
  with MetricWriter(tmp_path, resume_step=20) as writer:
    assert writer.history() == {"loss": [(10, 10.0), (20, 20.0)]}
    writer.write(30, {"loss": 0.25})
    assert writer.history()["loss"][-1] == (30, 0.25)
  assert lines_of(tmp_path)[:2] == before[:2]
  with MetricWriter(tmp_path, resume_step=0) as writer:
    assert writer.history() == {}


def test_a_torn_last_line_is_dropped(tmp_path):
  with MetricWriter(tmp_path) as writer:
    writer.write(1, {"loss": 1.0})
    writer.write(2, {"loss": 2.0})
  path = tmp_path / "metrics.jsonl"
  whole = path.read_bytes()
  for length in range(len(whole) // 2 + 2, len(whole)):
    path.write_bytes(whole[:length])
    with MetricWriter(tmp_path) as writer:
      writer.write(3, {"loss": 3.0})
      steps = [s for s, _ in writer.history()["loss"]]
    # Only the newline is missing at the full length less one.
    assert steps == ([1, 2, 3] if length == len(whole) - 1 else [1, 3])
    for line in lines_of(tmp_path):
      json.loads(line)


def test_a_spoilt_line_is_named(tmp_path):
  (tmp_path / "metrics.jsonl").write_text('{"step": 1, "a": 2}\noops\n{"step": 2, "a": 2}\n')
  with pytest.raises(InputError, match=r"metrics\.jsonl line 2: expected a JSON object .* 'oops'"):
    MetricWriter(tmp_path)


def test_what_is_no_number_is_refused(tmp_path):
  with MetricWriter(tmp_path) as writer:
    with pytest.raises(ValueError, match=r"metric a: expected one number, got shape \(2,\)"):
      writer.write(1, {"a": np.zeros(2)})
    with pytest.raises(ValueError, match="'time'"):
      writer.write(1, {"time": 1.0})
  assert lines_of(tmp_path) == []


def test_events_hold_scalars(tmp_path):
  with MetricWriter(tmp_path) as writer:
    writer.write(7, {"train/loss": 1.0})
  assert events_of(tmp_path) == [("train/loss", 7)]


def test_a_full_disk_keeps_metrics_waiting(tmp_path, capsys):
  with MetricWriter(tmp_path) as writer:
    writer.write(1, {"loss": 1.0})
    room = (tmp_path / "metrics.jsonl").stat().st_size + 20  # and half a line
    with small_files(room):
      for step in (2, 3):
        writer.write(step, {"loss": float(step)})
    assert read_history(tmp_path / "metrics.jsonl")["loss"] == [(1, 1.0)]
    writer.write(4, {"loss": 4.0})
    writer.write(5, {"loss": 5.0})
  assert [v for _, v in read_history(tmp_path / "metrics.jsonl")["loss"]] == [1, 2, 3, 4, 5]
  # What follows half an event would not be read: it is in a file of its own.
  for torn in sorted((tmp_path / "events").iterdir())[:-1]:
    torn.unlink()
  assert events_of(tmp_path) == [("loss", 4), ("loss", 5)]
  assert capsys.readouterr().out.count("metrics not written") == 1


@pytest.fixture
def clock(monkeypatch):
  """A clock that stands until the test sets `now`."""
  clock = types.SimpleNamespace(now=0.0)
  clock.monotonic = lambda: clock.now
  monkeypatch.setattr(console, "time", clock)
  return clock


def test_progress_is_silent_when_short(clock, capsys):
  assert list(progress(range(100), "train", "step")) == list(range(100))
  assert capsys.readouterr() == ("", "")


def test_progress_writes_a_line_every_ten_seconds(clock, capsys):
  steps = progress(range(100), "train", "step")
  for _ in steps:
    steps.set_postfix(loss="0.123", top1=0.5)
    clock.now += 1
  lines = capsys.readouterr().err.splitlines()
  assert len(lines) == 10
  assert lines[1] == "train: 20/100 step, 1 step/s, 1:20 left, loss=0.123, top1=0.5"


def test_progress_forgets_compilation_and_a_pause(clock, capsys):
  steps = progress(100, "train", "step")
  for seconds in (600, *[1] * 10, 1000, *[1] * 10):
    clock.now += seconds
    steps.update()
  assert capsys.readouterr().err.splitlines() == [
    "train: 1/100 step",
    "train: 11/100 step, 1 step/s, 1:29 left",
    "train: 12/100 step, 1 step/s, 1:28 left",
    "train: 22/100 step, 1 step/s, 1:18 left",
  ]


def test_progress_of_a_total_and_of_a_generator(clock, capsys):
  with progress(3, "download", "MB") as bar:
    clock.now = 20
    bar.update(2)
  with pytest.raises(TypeError, match="update"):
    list(bar)
  generator = progress((i for i in range(2)), "read", "file")
  clock.now = 40
  assert list(generator) == [0, 1]
  lines = capsys.readouterr().err.splitlines()
  assert lines == ["download: 2/3 MB, 0.1 MB/s, 0:10 left", "read: 1 file"]


def test_progress_that_continues_an_earlier_run(clock, capsys, monkeypatch):
  bar = progress(100, "prepare", "image", initial=80)
  clock.now += 20
  bar.update(10)
  assert capsys.readouterr().err == "prepare: 90/100 image, 0.5 image/s, 0:20 left\n"
  stream = io.StringIO()
  stream.isatty = lambda: True
  monkeypatch.setattr(sys, "stderr", stream)
  with progress(100, "prepare", "image", initial=80):
    pass
  assert "80/100" in stream.getvalue()


def test_progress_counts_the_steps_of_a_whole_run(clock, capsys):
  """Of one that resumes at step 100 of 400, not those that remain."""
  steps = progress(range(100, 400), "train", "step", 100)
  for _ in steps:
    clock.now += 1
    if clock.now == 11:
      break
  assert capsys.readouterr().err == "train: 110/400 step, 1 step/s, 4:50 left\n"


def test_progress_leaves_the_time_of_an_earlier_run_out(clock, capsys, monkeypatch):
  """A run that was nine tenths done is no fast one: ten more like its tenth would be one."""
  for terminal in (False, True):
    stream = io.StringIO()
    stream.isatty = lambda terminal=terminal: terminal
    monkeypatch.setattr(sys, "stderr", stream)
    bar = progress(5, "sweep", "run", 1)
    if terminal:
      bar._bar._time = clock.monotonic
      bar._bar.start_t = bar._bar.last_print_t = clock.now
    clock.now += 30
    bar.update(earlier=0.9)
    clock.now += 300
    bar.update()
    shown = stream.getvalue()
    assert ("0.00333 run/s, 10:00 left" if not terminal else "300.00s/ run]") in shown
    bar.close()


def test_progress_draws_a_bar_on_a_terminal(monkeypatch):
  stream = io.StringIO()
  stream.isatty = lambda: True
  monkeypatch.setattr(sys, "stderr", stream)
  steps = progress(range(3), "train", "step")
  for _ in steps:
    steps.set_postfix(loss="0.123")
  assert "train: 100%" in stream.getvalue()
  assert "3/3" in stream.getvalue()
  assert "loss=0.123" in stream.getvalue()


def test_table_aligns():
  rows = [["RPN", 88.6, 3_353_856], ["full fine-tune", None, 7]]
  assert table(rows, ["method", "hIoU", "trained"]).split("\n") == [
    "method          hIoU  trained",
    "--------------  ----  -------",
    "RPN             88.6  3353856",
    "full fine-tune     -        7",
  ]
  assert table([["86.8 ± 1.4"], ["9.1 ± 0.3"]], ["x"]).split("\n")[-1] == " 9.1 ± 0.3"


def test_table_in_markdown():
  assert table([["a|b", 1], ["c", 22]], ["x", "n"], markdown=True).split("\n") == [
    "| x    |   n |",
    "| ---- | --: |",
    "| a\\|b |   1 |",
    "| c    |  22 |",
  ]


def test_table_counts_wide_letters_and_refuses_ragged_rows():
  lines = table([["天空", "x"], ["sky", "y"]], ["name", "k"]).split("\n")
  assert lines[2:] == ["天空  x", "sky   y"]
  assert table([], ["a", "b"]) == "a  b\n-  -"
  with pytest.raises(ValueError, match="row 1: expected 2 cells"):
    table([[1, 2], [3]], ["a", "b"])
