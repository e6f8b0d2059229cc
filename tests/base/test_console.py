"""How commands end."""

import os
import signal
import subprocess
import sys

import pytest

from rpn_jax.base import console
from rpn_jax.base.errors import InputError
from tests import ROOT


def raising(error):
  def action():
    raise error

  return action


@pytest.mark.parametrize(
  ("error", "status", "message"),
  [
    (InputError("expected a, got b"), 2, "error: expected a, got b\n"),
    (FileNotFoundError(2, "No such file", "x.png"), 2, "error: [Errno 2] No such file: 'x.png'\n"),
    (KeyboardInterrupt(), 130, "stopped; rerun to continue\n"),
  ],
)
def test_one_line_for_what_went_wrong(error, status, message, capsys):
  ended = console.run_command(raising(error), interrupted="stopped; rerun to continue")
  assert (ended, capsys.readouterr().err) == (status, message)


def test_bugs_and_verbose_keep_their_traceback():
  with pytest.raises(ZeroDivisionError):
    console.run_command(lambda: 1 / 0)
  with pytest.raises(InputError):
    console.run_command(raising(InputError("x")), verbose=True)


def test_status_of_the_action():
  assert console.run_command(lambda: None) == 0
  assert console.run_command(lambda: 1) == 1


def test_a_reader_that_is_gone_ends_a_command_in_silence():
  code = (
    "import sys; from rpn_jax.base import console;"
    "sys.exit(console.run_command(lambda: [print('x' * 99) for _ in range(9999)] and None))"
  )
  with subprocess.Popen(
    [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
  ) as process:
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 141


def run_python(code: str, *arguments: bytes, **environment: str) -> subprocess.CompletedProcess:
  environment = {"PATH": os.environ["PATH"], **environment}
  imports = "import sys\nfrom rpn_jax.base import console\n"
  command = [sys.executable, "-c", imports + code]
  return subprocess.run([*command, *arguments], cwd=ROOT, env=environment, capture_output=True)


def test_names_beyond_ascii_survive_a_locale_of_ascii():
  ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
  name = "Straße, 猫".encode()
  code = "console.use_utf8(); print(sys.argv[1]); print(open(0).encoding)"
  done = run_python(code, name, **ascii_only)
  assert done.stdout.splitlines() == [name, b"utf-8"], done.stderr


def test_a_letter_that_the_terminal_lacks_is_shown_by_its_code():
  done = run_python("console.run_command(lambda: print('ß 猫'))", PYTHONIOENCODING="latin-1")
  assert done.stdout == b"\xdf \\u732b\n", done.stderr


def test_a_second_ctrl_c_ends_the_cleanup():
  code = """
import os, signal, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # where the tests run in the background
def action():
  try:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(9)
  finally:
    print("cleaning", flush=True)
    os.kill(os.getpid(), signal.SIGINT)
    print("never", flush=True)
console.run_command(action)
"""
  done = run_python(code)
  assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, b"cleaning\n", b"")
