"""Runs trained as one program: the same as alone, on disk, too; one that diverges; refusals."""

import json

import numpy as np
import pytest
from flax import traverse_util

from data_pipelines import datasets
from rpn_jax import Segmenter, cli
from rpn_jax.analysis import jobs
from rpn_jax.analysis.kept import Results
from rpn_jax.base.errors import InputError
from rpn_jax.config.stored import read_config
from rpn_jax.inference.predictor import open_run
from rpn_jax.tasks import train, train_together
from rpn_jax.training.metric_log import read_history
from tests.tasks.test_train import home, make_config, small_config, undrawn, with_nan

__all__ = ["home", "undrawn"]
SEEDS_AND_RATES = ((0, 2e-5), (1, 2e-4), (0, 4e-5))
STEPS = {"steps": 4, "eval_every": 2, "log_every": 1}


def own(seed, rate):
  return {"seed": seed, "optimizer.base_lr": rate}


@pytest.fixture(scope="module")
def together(home):
  """Three runs of four steps, evaluated at two and four."""
  configs = [make_config(home, **STEPS, **own(*each)) for each in SEEDS_AND_RATES]
  workdirs = [home / f"together/{i}" for i in range(len(configs))]
  return workdirs, train_together.train_together(configs, workdirs, datasets.load)


def flat(prompts):
  return traverse_util.flatten_dict(prompts, sep="/")


def prompts_of(workdir):
  predictor, run = open_run(read_config(workdir).lock(), workdir)
  return predictor.read_prompts(run)


def test_a_run_among_others_is_what_it_is_alone(home, together):
  workdirs, scores = together
  config = make_config(home, **STEPS, **own(*SEEDS_AND_RATES[1]))
  alone = train.train(config, home / "alone", datasets.load(config))
  assert scores[str(workdirs[1])]["step"] == 4
  for name in ("pAcc", "miou_gt", "hiou"):
    assert scores[str(workdirs[1])][name] == pytest.approx(alone["last"][name], abs=2e-3)
  one, other = (
    read_history(home / "alone/metrics.jsonl"),
    read_history(workdirs[1] / "metrics.jsonl"),
  )
  assert one.keys() == other.keys()
  for name in ("train/loss", "train/grad_norm", "rest/learning_rate"):
    np.testing.assert_allclose(other[name], one[name], rtol=1e-4)
  (step, got), (_, want) = prompts_of(workdirs[1])["last"], prompts_of(home / "alone")["last"]
  assert step == 4
  for path, value in flat(want).items():
    np.testing.assert_allclose(flat(got)[path], value, atol=2e-5, err_msg=path)


def test_runs_differ_by_what_is_their_own(together):
  workdirs, _ = together
  losses = [read_history(workdir / "metrics.jsonl")["train/loss"] for workdir in workdirs]
  assert losses[0][0] == losses[2][0] and losses[0][-1] != losses[2][-1]  # another rate
  assert losses[0][0] != losses[1][0]  # another seed: other images
  rates = [json.loads((w / "metrics.json").read_text())["config"]["optimizer"]["base_lr"]
           for w in workdirs]  # fmt: skip
  assert rates == [rate for _, rate in SEEDS_AND_RATES]


def test_a_run_can_be_used_and_is_not_repeated(home, together):
  workdirs, _ = together
  found = Segmenter.load(workdirs[0])(np.zeros((32, 32, 3), np.uint8), ["sand"])
  assert found.labels.shape == (32, 32)
  config = make_config(home, **STEPS, **own(*SEEDS_AND_RATES[0]))
  with pytest.raises(InputError, match="has a run"):
    train_together.train_together([config], workdirs[:1], datasets.load)
  # main.py finds nothing left to train.
  before = read_history(workdirs[0] / "metrics.jsonl")["train/loss"]
  assert train.train(config, workdirs[0], datasets.load(config))["last"]["step"] == 4
  assert read_history(workdirs[0] / "metrics.jsonl")["train/loss"] == before


def test_one_diverges_and_the_others_go_on(home, tmp_path, capsys):
  # The curves have the last step alone, at which all is well again.
  steps = {**STEPS, "max_skipped": 2, "eval_every": 4, "log_every": 4}
  configs = [small_config(home, **steps, **own(seed, 2e-4)) for seed in (1, 0)]
  workdirs = [tmp_path / "wild", tmp_path / "tame"]

  def load(config):
    data = datasets.load(config)
    return with_nan(data, {2, 3} if config.seed else {1})

  assert list(train_together.train_together(configs, workdirs, load)) == [str(workdirs[1])]
  assert "in 2 steps in a row, up to step 3" in (workdirs[0] / "log.txt").read_text()
  shown = capsys.readouterr().out
  assert f"{workdirs[1]}: loss or gradients were NaN or infinite in 1 of 4 steps" in shown
  assert "in 2 steps in a row" in shown
  results = Results(tmp_path, None, {})
  assert [results.diverged(w) for w in workdirs] == [True, False]
  assert [results.is_done(w) for w in workdirs] == [False, True]


@pytest.mark.parametrize(
  ("changes", "says"),
  [
    ({"steps": 6}, "differ by config.seed"),
    ({"model.h_shared": True}, "differ by config.seed"),
    ({"optimizer.groups": (("all", ".*", 1.0),)}, "differ by config.seed"),
  ],
)
def test_what_differs_by_more_is_refused(home, tmp_path, changes, says):
  configs = [small_config(home), small_config(home, **changes)]
  with pytest.raises(InputError, match=says):
    train_together.train_together(configs, [tmp_path / "a", tmp_path / "b"], datasets.load)
  assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
  ("changes", "says"),
  [
    ({"data.setting": "annotation_free"}, "its teacher"),
    ({"method": "training_free"}, "nothing to train"),
  ],
)
def test_what_cannot_be_trained_so_is_refused(home, tmp_path, changes, says):
  with pytest.raises(InputError, match=says):
    train_together.train_together([small_config(home, **changes)], [tmp_path / "a"], datasets.load)


def command(workdir, *flags, mode="train", row="t_a"):
  return ["python", "main.py", f"--workdir={workdir}", f"--mode={mode}", f"--config=c.py:{row}",
          *flags]  # fmt: skip


def test_runs_of_a_row_are_grouped(tmp_path):
  names = ["s0", "s1", "begun", "free", "other", "taught", "s2"]
  paths = {name: tmp_path / name for name in names}
  (paths["begun"] / "checkpoints").mkdir(parents=True)
  numbered = enumerate(paths.values())
  commands = {w: command(w, f"--config.seed={i}", "--config.steps=3") for i, w in numbered}
  commands[paths["free"]] = command(paths["free"], mode="eval")
  commands[paths["other"]] = command(paths["other"], "--config.steps=3", row="t_b")
  commands[paths["s2"]] = command(
    paths["s2"], "--config.seed=9", "--config.steps=3", "--config.optimizer.base_lr=1"
  )
  assert all(len(job.workdirs) == 1 for job in jobs.grouped(commands, 1))
  found = jobs.grouped(commands, 8, {paths["taught"]})
  by_names = {tuple(path.name for path in job.workdirs): job for job in found}
  assert set(by_names) == {("s0", "s1", "s2"), ("begun",), ("free",), ("other",), ("taught",)}
  several = by_names["s0", "s1", "s2"]
  assert several.command[:4] == ("python", "-m", "rpn_jax", "train_together")
  assert several.command.count("+") == 2 and "--mode=train" not in several.command
  assert several.log == paths["s0"] / "train_together.txt"
  assert by_names["begun",].command == tuple(commands[paths["begun"]])
  assert by_names["begun",].log == paths["begun"] / "log.txt"
  five = {tmp_path / f"m{i}": command(f"m{i}", f"--config.seed={i}") for i in range(5)}
  assert sorted(len(job.workdirs) for job in jobs.grouped(five, 4)) == [2, 3]


def test_arguments_of_several_runs(home, tmp_path, monkeypatch):
  given = []
  monkeypatch.setattr(
    train_together, "train_together", lambda *of_all: given.extend(zip(*of_all[:2], strict=True))
  )
  one = ["--config=configs/shapes.py:runlocal", f"--workdir={tmp_path / 'a'}", "--config.seed=3"]
  two = ["--config=configs/shapes.py:runlocal", f"--workdir={tmp_path / 'b'}"]
  assert cli.main(["train_together", *one, "+", *two]) == 0
  assert [config.seed for config, _ in given] == [3, 0]
  assert [workdir for _, workdir in given] == [str(tmp_path / name) for name in "ab"]
  assert cli.main(["train_together", *one, "x", "+", *two]) != 0
  assert cli.main(["train_together", *one, "+"]) != 0
