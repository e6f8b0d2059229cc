"""The command line: what a person sees when something is wrong."""

import subprocess
import sys

import pytest

from tests import ROOT, tiny

GOOD = ["--config=configs/shapes.py:runlocal", "--workdir={tmp}/w"]


def run(tmp_path, *arguments):
  command = [sys.executable, "main.py", *(a.format(tmp=tmp_path) for a in arguments)]
  return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(
  "arguments, message",
  [
    ([*GOOD, "--wokdir=x"], "'wokdir'. Did you mean: workdir"),
    ([*GOOD, "--config.stepz=5"], "unknown config field 'stepz'; did you mean 'steps'?"),
    ([*GOOD, "--config.data.zzz=5"], "unknown config field 'zzz'; did you mean"),
    (["--config=configs/shapes.py:papre", GOOD[1]], "'papre' is not known; did you mean 'paper'?"),
    (["--config=configs/shape.py", GOOD[1]], "configs/shape.py"),
    ([*GOOD, "--mode=trian"], "train|eval|predict"),
    ([*GOOD, "--mode=predict"], "--image"),
    ([*GOOD, "typo"], "unexpected argument 'typo'"),
    ([*GOOD, "--config.clip=/none/clip.pt"], "/none/clip.pt"),
    ([*GOOD, "--config.data.name=voc2013"], "did you mean"),
  ],
)
def test_one_line_and_an_exit_code(tmp_path, arguments, message):
  result = run(tmp_path, *arguments)
  assert result.returncode == 2
  lines = [line for line in result.stderr.splitlines() if line.strip()]
  assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0], result.stderr
  assert not (tmp_path / "w").exists()


SMALL = (*tiny.FLAGS, "--config.clip={tmp}/clip.safetensors", "--config.data.data_dir={tmp}/data")


def test_quiet_prints_nothing_and_verbose_what_libraries_say(tmp_path):
  tiny.save(tmp_path / "clip.safetensors")
  quiet = run(tmp_path, *GOOD, *SMALL, "--config.steps=2", "--quiet")
  assert (quiet.returncode, quiet.stdout, quiet.stderr) == (0, "", "")
  verbose = run(tmp_path, *GOOD, *SMALL, "--config.steps=2", "--verbose", "--mode=eval")
  assert verbose.returncode == 0 and "Compiling" in verbose.stderr
  # The last lines say where everything is.
  closing = verbose.stdout.partition(f"In {tmp_path}/w:\n")[2].splitlines()
  named = [line.split()[0] for line in closing]
  assert {"predictions.png", "curves.png", "eval.md", "metrics.json", "checkpoints"} <= set(named)
  kept = {p.name for p in (tmp_path / "w").iterdir() if p.name != ".lock"}
  assert set(named) <= kept and kept - set(named) == set()
  unreadable = run(tmp_path, *GOOD, "--config.clip=/none/clip.pt", "--verbose")
  assert "Traceback" in unreadable.stderr and "/none/clip.pt" in unreadable.stderr


def test_main_is_short():
  assert len((ROOT / "main.py").read_text().splitlines()) <= 90
