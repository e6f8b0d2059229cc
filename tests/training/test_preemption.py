"""SIGTERM within and outside of what must not be interrupted."""

import os
import signal

import pytest

from rpn_jax.training import preemption


def term():
  os.kill(os.getpid(), signal.SIGTERM)


def test_outside_of_steps_the_process_ends(capsys):
  before = signal.getsignal(signal.SIGTERM)
  with pytest.raises(SystemExit) as end, preemption.PreemptionGuard():
    term()
  assert end.value.code == 0 and "the same command resumes the run" in capsys.readouterr().out
  assert signal.getsignal(signal.SIGTERM) == before


def test_within_steps_the_loop_is_told():
  reached = []
  with pytest.raises(SystemExit), preemption.PreemptionGuard() as notice, notice.deferred():
    for step in range(5):
      if step == 2:
        term()
        term()  # schedulers repeat themselves
      reached.append(notice.reached(step))
  assert reached == [False, False, True, True, True]  # and ends with the loop at the latest


def test_an_evaluation_is_interrupted():
  done = []
  with pytest.raises(SystemExit), preemption.PreemptionGuard() as notice, notice.deferred():
    done.append("step")
    with notice.deferred(False):
      term()
      done.append("evaluation")
  assert done == ["step"]


def test_one_that_came_in_a_step_ends_the_evaluation_behind_it():
  done = []
  with pytest.raises(SystemExit), preemption.PreemptionGuard() as notice, notice.deferred():
    term()
    done.append("step")
    with notice.deferred(False):
      done.append("evaluation")
  assert done == ["step"]
