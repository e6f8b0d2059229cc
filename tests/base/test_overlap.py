"""Threads beside the caller: order, bounds, errors."""

import threading
import time

import pytest

from rpn_jax.base import overlap


def test_results_come_in_order_and_calls_overlap():
  together = threading.Barrier(2, timeout=5)

  def work(i):
    if i < 2:
      together.wait()  # two are under way at once, or this raises
    time.sleep(0.01 * (i % 3 == 0))
    return i

  assert list(overlap.mapped(work, range(20))) == list(range(20))


@pytest.mark.parametrize(("size", "most"), [(1, 4), (overlap.MAX_BYTES // 3, 3), (2**40, 1)])
def test_few_items_are_under_way(monkeypatch, size, most):
  monkeypatch.setattr(overlap.os, "cpu_count", lambda: 2)
  taken = 0

  def items():
    nonlocal taken
    for i in range(12):
      taken += 1
      yield i

  for done, _ in enumerate(overlap.mapped(str, items(), lambda item: size)):
    assert taken <= done + most + 1  # and the one that waits for room
  assert taken == 12


def test_an_error_comes_in_its_turn_and_what_has_begun_is_finished(monkeypatch):
  monkeypatch.setattr(overlap.os, "cpu_count", lambda: 2)
  begun, finished = [], []

  def work(i):
    begun.append(i)
    time.sleep(0.02)
    if i == 1:
      raise OSError("disk full")
    finished.append(i)
    return i

  got = []
  with pytest.raises(OSError, match="disk full"):
    for i in overlap.mapped(work, range(100)):
      got.append(i)
  assert got == [0]
  assert sorted(finished) == sorted(set(begun) - {1})  # none was left in the middle
  assert len(begun) <= 7


def test_a_caller_that_stops_ends_the_threads():
  before = threading.active_count()
  results = overlap.mapped(str, range(1000))
  assert next(results) == "0"
  results.close()
  assert threading.active_count() == before
