"""SIGTERM and Ctrl-C within and outside of what must not be interrupted."""

import os
import signal

import pytest

from rpn_jax.base import interrupts
from rpn_jax.training import preemption


@pytest.fixture(autouse=True)
def python_s_own_handler():
  """Processes in the background, where the tests may run, ignore SIGINT."""
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  yield
  signal.signal(signal.SIGINT, before)


def interrupt():
  os.kill(os.getpid(), signal.SIGINT)


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


def test_the_first_interrupt_waits_for_the_step_the_second_for_nothing(capfd):
  reached = []
  with pytest.raises(KeyboardInterrupt), preemption.PreemptionGuard() as guard, guard.deferred():
    interrupt()
    reached.append(guard.reached(1))
    assert guard.name == "Ctrl-C" and "press it again" in capfd.readouterr().err
    interrupt()  # Python's handler was in place: it is again, as in a notebook
    reached.append("never")
  assert reached == [True]
  assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("guarded", [False, True])
def test_the_second_interrupt_of_a_command_is_the_system_s(guarded):
  """That ends the process with status 130, also within a compilation or while Python ends."""
  before = signal.signal(signal.SIGINT, interrupts.interrupt)
  try:
    with pytest.raises(KeyboardInterrupt):
      if guarded:
        with preemption.PreemptionGuard() as guard, guard.deferred():
          interrupt()
          assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL and guard.reached(1)
      else:
        interrupt()
    assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL
  finally:
    signal.signal(signal.SIGINT, before)


def test_an_ignored_interrupt_stays_ignored():
  before = signal.signal(signal.SIGINT, signal.SIG_IGN)
  try:
    with preemption.PreemptionGuard() as guard, guard.deferred():
      interrupt()
      assert not guard.reached(1)
  finally:
    signal.signal(signal.SIGINT, before)
