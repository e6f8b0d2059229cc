"""--config: a file, or a run, whose settings are taken."""

import json

import pytest
from absl import flags

from configs import shapes
from rpn_jax.base.errors import InputError
from rpn_jax.config.flags import define_config, parse
from tests import ROOT


@pytest.fixture
def run(tmp_path, monkeypatch):
  """The workdir of a run by an earlier version, which did not know `eval.refine`."""
  monkeypatch.chdir(ROOT)
  workdir = tmp_path / "run"
  workdir.mkdir()
  config = shapes.get_config("runlocal").to_dict()
  config["seed"] = 5
  del config["eval"]["refine"]
  (workdir / "config.json").write_text(json.dumps({"clip": "0" * 16, "config": config}))
  return workdir


def parsed(*arguments):
  values, argv = flags.FlagValues(), ["main.py", *map(str, arguments)]
  define_config(values, argv)
  flags.DEFINE_string("workdir", None, "", values)
  assert parse(values, argv) == ["main.py"]
  return values.config, values.workdir


@pytest.mark.parametrize("name", ["--workdir=", "--config="])
def test_a_run_has_its_settings_and_flags_change_what_they_name(run, name):
  config, workdir = parsed(
    f"{name}{run}", "--config.eval.refine=pamr", "--config.data.eval_images=3"
  )
  assert workdir == str(run) and config.is_locked
  expected = shapes.get_config("runlocal").unlock()
  expected.seed, expected.eval.refine, expected.data.eval_images = 5, "pamr", 3
  assert config.to_dict() == expected.to_dict()  # tuples too


def test_the_settings_of_a_run_for_another_one(run):
  config, workdir = parsed("--config", run, "--workdir", "elsewhere", "--config.steps=3")
  assert (config.seed, config.steps, config.optimizer.steps, workdir) == (5, 3, 3, "elsewhere")


def test_a_file_goes_before_the_settings_in_the_workdir(run):
  assert parsed("--config=configs/shapes.py:runlocal", f"--workdir={run}")[0].seed == 0


@pytest.mark.parametrize(
  "arguments, message",
  [
    (["--workdir=nowhere"], r"expected --config=FILE, .* and nowhere has no config\.json"),
    (["--config=configs/shapes.py"], "expected --workdir=FOLDER"),
    (
      ["--workdir=run", "--config.optimizer.groups.rest=5"],
      r"optimizer\.groups is one value .* as --config\.optimizer\.groups=\"\(\('h', 'h",
    ),
    (
      ["--workdir=run", "--config.data.antialias=3"],
      r"unknown config field: 'data\.antialias'\. See config\.data\.recipe: whose resizing",
    ),
    (["--workdir=run", "--config.data.zzz=3"], "unknown config field: 'zzz'"),
    (["--config=configs", "--workdir=x"], "configs: expected the workdir of a run"),
  ],
)
def test_what_is_missing_is_told(run, arguments, message):
  arguments = [a.replace("--workdir=run", f"--workdir={run}") for a in arguments]
  with pytest.raises(InputError, match=message):
    parsed(*arguments)
