"""SIGTERM and Ctrl-C within and outside of what must not be interrupted."""

import http.server
import os
import signal
import threading
import time

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


def test_a_preemption_that_google_announces(tmp_path, monkeypatch):
  """Before the system sends SIGTERM; nothing is asked on other machines."""
  asked, answers = [], ["FALSE", "FALSE", "TRUE"]

  class Metadata(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
      asked.append((self.path, self.headers["Metadata-Flavor"]))
      self.send_response(200)
      self.end_headers()
      self.wfile.write(answers.pop(0).encode())

    def log_message(self, *_):
      pass

  with http.server.HTTPServer(("127.0.0.1", 0), Metadata) as server:
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("GCE_METADATA_HOST", f"127.0.0.1:{server.server_address[1]}")
    with preemption.PreemptionGuard():
      assert not asked
    (tmp_path / "product_name").write_text("Google Compute Engine\n")
    monkeypatch.setattr(preemption, "PRODUCT", tmp_path / "product_name")
    with (
      pytest.raises(SystemExit) as ended,
      preemption.PreemptionGuard() as guard,
      guard.deferred(),
    ):
      until = time.monotonic() + 30
      while not guard.reached(1) and time.monotonic() < until:
        time.sleep(0.01)
      assert guard.name == "SIGTERM"
    server.shutdown()
  assert ended.value.code == 0
  assert [path.partition("?")[2] for path, _ in asked] == [
    "", *["wait_for_change=true&timeout_sec=60"] * 2
  ]  # fmt: skip
  assert {flavor for _, flavor in asked} == {"Google"}
