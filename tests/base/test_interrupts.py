"""Ctrl-C where Python would drop it, or crash."""

import gc
import os
import signal
import subprocess
import sys
import time

import pytest

from rpn_jax.base import interrupts
from tests import ROOT


@pytest.fixture(autouse=True)
def python_s_own_handler():
  """Processes in the background, where the tests may run, ignore SIGINT."""
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  yield
  signal.signal(signal.SIGINT, before)


def test_what_a_callback_of_the_collector_drops_is_raised_again(capsys):
  def interrupt(phase, info):
    gc.callbacks.remove(interrupt)
    os.kill(os.getpid(), signal.SIGINT)

  gc.collect()  # event loops that other tests left open, which would be told of below
  capsys.readouterr()
  alarm, hook = signal.getsignal(signal.SIGALRM), sys.unraisablehook
  with pytest.raises(KeyboardInterrupt), interrupts.handled():
    gc.callbacks.append(interrupt)
    gc.collect()
    time.sleep(5)
  assert capsys.readouterr() == ("", "")
  assert (signal.getsignal(signal.SIGALRM), sys.unraisablehook) == (alarm, hook)


def test_other_dropped_errors_are_shown(capsys):
  class Broken:
    def __del__(self):
      raise ZeroDivisionError

  with interrupts.handled():
    Broken()
  assert "ZeroDivisionError" in capsys.readouterr().err


def test_blocks_are_nested_and_leave_other_handlers_alone():
  with interrupts.handled():
    with interrupts.handled():
      assert signal.getsignal(signal.SIGINT) is interrupts.interrupt
    assert signal.getsignal(signal.SIGINT) is interrupts.interrupt
  assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  interrupts.end_at_once()
  with interrupts.handled():
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


@pytest.mark.parametrize("when", ["beginning", "importing"])
def test_a_command_that_begins_ends_at_once_and_in_silence(tmp_path, when):
  (tmp_path / "slow.py").write_text("import os; os.kill(os.getpid(), 2); print('never')")
  code = """
import signal
from rpn_jax.base import interrupts
signal.signal(signal.SIGINT, signal.default_int_handler)
interrupts.end_at_once()
"""
  code += "import slow" if when == "beginning" else "with interrupts.handled(): import slow"
  env = {**os.environ, "PYTHONPATH": f"{ROOT}:{tmp_path}"}
  done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True)
  assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, b"", b"")
