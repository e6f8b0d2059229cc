"""The command line: what a person sees when something is wrong."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from data_pipelines import datasets
from rpn_jax.base import console
from rpn_jax.config.stored import read_config
from rpn_jax.tasks import evaluate
from tests import ROOT, tiny

FILE, WORKDIR = "--config=configs/shapes.py:runlocal", "--workdir={tmp}/w"
GOOD = [FILE, WORKDIR]
# Config files with a fault -> what is said.
FAULTS = {
  "def get_config(:": "SyntaxError: invalid syntax (fault.py, line 1)",
  "import nowhere": "fault.py, line 1: ModuleNotFoundError: No module named 'nowhere'",
  "def get_config():\n  return int('x')": "fault.py, line 2: ValueError: invalid literal",
  "def get_config():\n  return {}['crop']": "fault.py, line 2: KeyError: 'crop'",
  "x = 1": "has no attribute 'get_config'",
}


# Runs main.py in a fork of its own for each line of arguments, so that its imports are made once.
FORKS = """
import json, os, runpy, sys
import absl.app, rpn_jax.annotations.options, rpn_jax.base.console, rpn_jax.config.flags
for line in sys.stdin:
  arguments, *outputs = json.loads(line)
  if not (child := os.fork()):
    for number, path in enumerate(outputs, 1):
      os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.argv = ["main.py", *arguments]
    try:
      runpy.run_path("main.py", run_name="__main__")
    except SystemExit as ended:
      sys.stdout.flush()
      os._exit(ended.code or 0)
    os._exit(100)
  print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def forks():
  pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
  with subprocess.Popen([sys.executable, "-c", FORKS], cwd=ROOT, text=True, **pipes) as process:
    yield process
    process.stdin.close()


@pytest.fixture
def fork(forks, tmp_path):
  """(arguments of main.py) -> what a process with them did."""

  def fork(*arguments):
    arguments = [a.format(tmp=tmp_path) for a in arguments]
    files = [tmp_path / "stdout", tmp_path / "stderr"]
    print(json.dumps([arguments, *map(str, files)]), file=forks.stdin, flush=True)
    code = int(forks.stdout.readline())
    return subprocess.CompletedProcess(arguments, code, *(file.read_text() for file in files))

  return fork


def run(tmp_path, *arguments, **more):
  command = [sys.executable, "main.py", *(a.format(tmp=tmp_path) for a in arguments)]
  pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
  return subprocess.run(command, cwd=ROOT, text=True, timeout=300, **{**pipes, **more})


def check_one_line(result, message: str) -> None:
  assert result.returncode == 2, result.stderr
  lines = [line for line in result.stderr.splitlines() if line.strip()]
  assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0], result.stderr


@pytest.mark.parametrize(
  "arguments, message",
  [
    ([*GOOD, "--wokdir=x"], "'wokdir'. Did you mean: workdir"),
    ([*GOOD, "--config.stepz=5"], 'field: \'stepz\'. Did you mean "steps" instead of "stepz"?'),
    (["--config", "configs/shapes.py", "--config.stepz=3", WORKDIR], 'Did you mean "steps"'),
    ([*GOOD, "--config.stepz", "3"], 'Did you mean "steps"'),
    ([*GOOD, "--noconfig.data.photometrik"], 'Did you mean "photometric"'),
    ([*GOOD, "--config.data.zzz=5"], "unknown config field: 'zzz' See docs/configs.md"),
    ([*GOOD, "--config.dta.crop=5"], 'field: \'dta\'. Did you mean "data" instead of "dta"?'),
    ([*GOOD, "--config.steps.x=5"], "config.steps is one value without fields"),
    ([*GOOD, "--config.steps=abc"], "flag --config.steps=abc: invalid literal"),
    ([*GOOD, "--config.steps"], "Missing value for flag --config.steps"),
    ([*GOOD, "--config.data=3"], "--config.data=3"),
    ([*GOOD, "--config.steps=0"], "config.steps: expected at least 1, such as 20000, got 0"),
    ([*GOOD, "--config.data.scale=abc"], "config.data.scale: expected tuple[int, int]"),
    ([*GOOD, "--config.loss.name=softmx"], "did you mean 'softmax'"),
    ([FILE + ",papre", WORKDIR], "'papre' is not known; did you mean 'paper'?"),
    (["--config=configs/ablations.py:table5_rnp", WORKDIR], "did you mean 'table5_rpn'"),
    (["--config=configs/shape.py", WORKDIR], "configs/shape.py"),
    (["--config", "configs/shape.py", "--config.steps=3", WORKDIR], "configs/shape.py"),
    (["--config=configs", WORKDIR], "configs: expected the workdir of a run"),
    (["--config.steps=3", FILE, WORKDIR], "before a value for --config was specified"),
    ([WORKDIR, "--config"], "Missing value for flag --config"),
    ([WORKDIR], "expected --config=FILE, such as configs/shapes.py"),
    ([FILE], "expected --workdir=FOLDER"),
    ([*GOOD, "--mode=trian"], "train|eval|predict"),
    ([*GOOD, "--mode=predict"], "--image"),
    ([*GOOD, "--image=a.png"], "--image is for --mode=predict and classify, got --mode=train"),
    ([*GOOD, "--mode=eval", "--coco=polygons"], "--coco is for --mode=predict, got --mode=eval"),
    ([*GOOD, "--mode=eval", "--restart"], "--restart is for --mode=train, got --mode=eval"),
    ([*GOOD, "--config.prompts=x"], "config.prompts=x is for evaluation and prediction"),
    ([*GOOD, "--config.optimizer.steps=2"], "config.optimizer.steps follows config.steps"),
    ([*GOOD, "--config.eval.scales=()"], "config.eval.scales: expected one value or more"),
    ([*GOOD, "--config.data.ratio=(2.0,0.5)"], "(2.0, 0.5): expected the smaller factor first"),
    ([*GOOD, "--config.optimizer.groups=(('a','.*',-1.0),)"], "at least 0, got -1.0 for 'a'"),
    (
      [*GOOD, "--config.model.tuner=oft", "--config.model.oft_block=7"],
      "oft_block=7: expected a divisor of the tower's width, 128, such as 8",
    ),
    ([*GOOD, "typo"], "unexpected argument 'typo'"),
    ([*GOOD, "--config.clip=/none/clip.pt"], "/none/clip.pt"),
    ([FILE, "--workdir=~no_such_user/w"], "~no_such_user/w: expected a path"),
  ],
)
def test_one_line_and_an_exit_code(fork, tmp_path, arguments, message):
  check_one_line(fork(*arguments), message)
  assert not (tmp_path / "w").exists()


@pytest.mark.parametrize("code, message", FAULTS.items())
def test_a_fault_in_a_config_file(fork, tmp_path, code, message):
  (tmp_path / "fault.py").write_text(code)
  check_one_line(fork("--config={tmp}/fault.py", WORKDIR), message)


@pytest.mark.parametrize("flag", ["--help", "--helpfull"])
def test_help_ends_well(fork, flag):
  result = fork(flag)
  assert (result.returncode, result.stderr) == (0, "") and "--workdir" in result.stdout


SMALL = (
  *tiny.FLAGS, "--config.clip={tmp}/clip.safetensors", "--config.data.data_dir={tmp}/data",
  "--config.data.train_images=8", "--config.data.eval_images=2",
)  # fmt: skip

FREE = ("--config=configs/training_free.py:runlocal", *SMALL)


def test_a_tilde_is_the_home_folder(tmp_path):
  """In every path; the shell leaves it alone behind an equals sign. And what --verbose adds."""
  home = tmp_path / "home"
  home.mkdir()
  tiny.save(home / "clip.safetensors")
  (home / "x.png").write_bytes((ROOT / "rpn_jax/assets/scene.png").read_bytes())
  # Programs that other tests have compiled are found where the real one has them.
  (home / ".cache").symlink_to(pathlib.Path.home() / ".cache")
  env = {**os.environ, "HOME": str(home)}
  before = set(ROOT.iterdir())
  flags = (*(flag.replace("{tmp}", "~") for flag in FREE), "--workdir=~/w", "--verbose")
  words = ("--mode=predict", "--image=~/x.png", "--classes=red circle, sand")
  result = run(tmp_path, *flags, *words, env=env)
  assert result.returncode == 0 and "Compiling" in result.stderr, result.stderr
  assert (home / "w/predictions/x.json").exists()
  assert set(ROOT.iterdir()) == before


@pytest.mark.slow
def test_a_reader_that_is_gone(tmp_path):
  tiny.save(tmp_path / "clip.safetensors")
  read, write = os.pipe()
  os.close(read)
  gone = run(tmp_path, *FREE, WORKDIR, "--mode=eval", stdout=write)
  os.close(write)
  assert (gone.returncode, gone.stderr) == (141, "")


@pytest.mark.slow
def test_quiet_prints_nothing_and_every_file_is_described(tmp_path):
  tiny.save(tmp_path / "clip.safetensors")
  small = (*GOOD, *SMALL, "--config.steps=2", "--config.model.tuner=lpm")
  quiet = run(tmp_path, *small, "--quiet")
  assert (quiet.returncode, quiet.stdout, quiet.stderr) == (0, "", "")
  config, workdir = read_config(tmp_path / "w"), tmp_path / "w"
  evaluate.evaluate_run(config, workdir, datasets.load_evaluations(config))
  # The last lines of a command say where everything is.
  first, *lines = console.describe_workdir(workdir).splitlines()
  named = {line.split()[0] for line in lines}
  assert first == f"In {workdir}:" and {"curves.png", "eval.md", "checkpoints"} <= named
  assert named == {path.name for path in workdir.iterdir() if path.name != ".lock"}


def test_verbose_shows_where_an_error_is_from(tmp_path):
  wrong = run(tmp_path, *GOOD, "--config.steps=0", "--verbose")
  assert "Traceback" in wrong.stderr and "config.steps: expected at least 1" in wrong.stderr


def test_main_is_short():
  assert len((ROOT / "main.py").read_text().splitlines()) <= 96
