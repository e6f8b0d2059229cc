"""The sweep: which runs it starts, with what, what it repeats and what it tells of failures."""

import csv
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import pytest

from configs import ablations, shapes
from rpn_jax import cli
from rpn_jax.analysis import jobs, kept, paired, plan, sweep
from rpn_jax.analysis.runs import FinishedRun, Row
from rpn_jax.base.errors import InputError
from rpn_jax.weights import arrays, clip_file
from tests import ROOT, tiny

CONFIG = """
TABLES = {
  "table1": {"plain": {}, "wide": {"model.width": 2}},
  "table10": {"lora": {"model.tuner": "lora"}, "rpn": {}, "free": {"method": "training_free"}},
}

from ml_collections import ConfigDict

def get_config(arg):
  table, _, row = arg.partition(",")[0].partition("_")
  config = ConfigDict({
    "task": "segment", "method": "rpn", "seed": 0, "steps": 5, "eval_every": 5, "clip": "tiny",
    "model": {"tuner": "rpn", "width": 1, "h": 0.1}, "optimizer": {"base_lr": 0.0},
    "data": {"name": "shapes", "held_out": 0.0}, "dense": {"method": "maskclip"},
  })
  config.update_from_flattened_dict(TABLES[table][row])
  return config

def rate_grid(config):
  variants = {"": 1} if config.model.tuner == "lora" else {"h 0.1": 0.1, "h 1": 1}
  return {v: {r: {"optimizer.base_lr": r, "model.h": h} for r in (1e-4, 1e-3, 1e-2)}
          for v, h in variants.items()}
"""
# Stands in for training: writes scores, or fails where the workdir's name holds "fail".
MAIN = """
import json, os, pathlib, runpy, shutil, signal, sys, time
flags = dict(f.lstrip("-").split("=", 1) for f in sys.argv[1:])
with open("calls.jsonl", "a") as log:
  log.write(json.dumps(flags) + "\\n")
workdir = pathlib.Path(flags["workdir"])
if "pretrain" in flags["config"]:
  shutil.copy("made.safetensors", workdir / "clip.safetensors")
  (workdir / "metrics.json").write_text("{}")
  sys.exit()
if (pathlib.Path("broken") / workdir.name).exists():
  sys.exit("error: the disk is full")
if pathlib.Path("slow").exists():
  def save(*_):
    (workdir / "saved").touch()
    sys.exit()
  signal.signal(signal.SIGTERM, save)
  os.kill(os.getppid(), signal.SIGTERM)
  time.sleep(60)
rate = float(flags.get("config.optimizer.base_lr", 0))
if rate == 1e-2 and "lora" in workdir.name:
  sys.exit("error: loss or gradients were NaN or infinite in 10 steps in a row, …")
if (pathlib.Path("diverging") / workdir.name).exists():
  sys.exit("error: loss or gradients were NaN or infinite in 10 steps in a row, …")
(workdir / "cores.json").write_text(json.dumps(sorted(os.sched_getaffinity(0))))
file, _, words = flags["config"].partition(":")
config = runpy.run_path(file)["get_config"](words)
for name, text in flags.items():
  if name.startswith("config."):
    kind = float if "base_lr" in name or "held" in name or name.endswith(".h") else int
    config.update_from_flattened_dict({name[7:]: kind(text)})
seed = config.seed
held_out = 0.1 + 100 * rate + 0.1 * float(flags.get("config.model.h", 0))
scores = {"step": config.steps, "pAcc": 0.9, "miou_gt": held_out, "miou_union": 0.5,
          "miou_seen": 0.5, "miou_unseen": 0.4,
          "hiou": 0.4 + 0.1 * seed - 0.05 * ("lora" in workdir.name)}
(workdir / "metrics.json").write_text(json.dumps({
  "last": scores, "best": scores, "trained_parameters": 1234, "config": config.to_dict(),
}))
if pathlib.Path("fingerprint").exists():
  clip = pathlib.Path("fingerprint").read_text()
  (workdir / "config.json").write_text(json.dumps({"clip": clip}))
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
  (tmp_path / "main.py").write_text(MAIN)
  (tmp_path / "tables.py").write_text(CONFIG)
  monkeypatch.chdir(tmp_path)
  return tmp_path


def call(*arguments):
  return cli.main(
    ["sweep", "--config=tables.py:dataset=shapes", "--root=out", "--seeds=2", *arguments]
  )


def calls():
  return [json.loads(line) for line in pathlib.Path("calls.jsonl").read_text().splitlines()]


def test_a_table_is_run_and_reported(here, capsys):
  assert call("table10", "--config.steps=7") == 0
  made = calls()
  assert [c["mode"] for c in made].count("eval") == 1 and len(made) == 5  # one free, no seeds
  assert made[0] == {
    "workdir": "out/tuner=lora_seed0", "mode": "train", "config.seed": "0", "config.steps": "7",
    "config": "tables.py:table10_lora,dataset=shapes",
  }  # fmt: skip
  shown = capsys.readouterr().out
  assert "40.0 ± 7.1" in shown and "45.0 ± 7.1" in shown and "1,234" in shown
  assert "hIoU less rpn's [95 %]" in shown and "-5.0 [-5.0, -5.0]" in shown  # seed by seed
  assert "64.5" in shown and "88.6" in shown  # the paper's
  table = (here / "out/report/table10/report.csv").read_text()
  rows = list(csv.DictReader(table.splitlines()))
  assert [row["label"] for row in rows] == ["lora", "rpn", "free"]
  assert rows[0]["trained"] == "1,234" and float(rows[0]["last_hiou_mean"]) == pytest.approx(0.4)
  assert (here / "out/report/table10/report.png").stat().st_size > 1000


def test_what_is_there_is_not_run_again(here):
  assert call("table10") == 0
  assert call("table10") == 0
  assert len(calls()) == 5
  # The plain row is the same run in every table.
  assert call("all") == 0
  assert len(calls()) == 7


def test_a_failed_run_is_shown_and_tried_again(here, capsys):
  (here / "broken").mkdir()
  (here / "broken/base_seed1").touch()
  assert call("table1", "--jobs=2") == 1
  shown = capsys.readouterr()
  assert "failed: out/base_seed1: exit status 1, see out/base_seed1/log.txt" in shown.err
  assert "the disk is full" in shown.err
  assert "missing: plain, seed 1" in shown.out and "40.0" in shown.out
  (here / "broken/base_seed1").unlink()
  assert call("table1") == 0
  assert len(calls()) == 5


def test_sigterm_saves_the_runs_under_way_and_starts_no_others(here, capsys):
  (here / "slow").touch()
  before = signal.getsignal(signal.SIGTERM)
  assert call("table1") == 130
  shown = capsys.readouterr().err
  assert "ending the runs under way" in shown and "the same command continues the sweep" in shown
  assert len(calls()) == 1 and len(list(here.glob("out/*/saved"))) == 1
  assert signal.getsignal(signal.SIGTERM) is before
  (here / "slow").unlink()
  assert call("table1") == 0
  assert len(calls()) == 5


def test_every_row_gets_the_rate_that_is_best_on_held_out_images(here, capsys):
  assert call("table10", "--tune-lr") == 0
  made = calls()
  trials = [c for c in made if c["workdir"].startswith("out/rates/")]
  assert len(trials) == 9 and {c["config.seed"] for c in trials} == {"0"}
  assert {c["config.data.held_out"] for c in trials} == {"0.2"}
  runs = [c for c in made if c not in trials and c["mode"] == "train"]
  # One rate of lora diverges, the best that is left is in the middle; the other has two variants.
  chosen = {(c["config"].split(",")[0], c["config.optimizer.base_lr"], c["config.model.h"])
            for c in runs}  # fmt: skip
  assert chosen == {
    ("tables.py:table10_lora", "0.001", "1"),
    ("tables.py:table10_rpn", "0.01", "1"),
  }
  assert len(runs) == 4 and not any("config.data.held_out" in c for c in runs)
  shown = capsys.readouterr().out
  assert "diverged" in shown and "table10_rpn: the best rate, 0.01, is the highest" in shown
  assert "table10_lora: the best" not in shown and "-5.0 [-5.0, -5.0]" in shown
  content = json.loads((here / "out/report/rates/rates.json").read_text())
  assert content["table10_rpn"]["chosen"] == "0.01, h 1"
  assert content["table10_lora"]["trials"][2]["miou_gt"] == 0.0
  assert (here / "out/report/rates/rates.png").stat().st_size > 1000
  assert call("table10", "--tune-lr") == 0
  assert calls() == made  # nothing twice, not even what diverged


def test_a_row_keeps_the_rate_that_it_sets(here, capsys):
  fixed = CONFIG.replace('"rpn": {},', '"rpn": {}, "slow": {"optimizer.base_lr": 1e-4},')
  (here / "tables.py").write_text(fixed)
  assert call("table10", "--tune-lr") == 0
  made = [c for c in calls() if "table10_slow" in c["config"]]
  assert sorted(c["workdir"] for c in made) == [f"out/base_lr=0.0001_seed{s}" for s in (0, 1)]
  assert not any(c.keys() & {"config.optimizer.base_lr", "config.data.held_out"} for c in made)
  assert "missing" not in capsys.readouterr().out


def test_rows_are_compared_at_equal_rates(here, capsys):
  """Where there is such a run: lora's best rate is 0.001 at h 1, at which one row has RPN."""
  row = '"rpn": {}, "slow": {"optimizer.base_lr": 1e-3, "model.h": 1},'
  fixed = CONFIG.replace('"rpn": {},', row) + 'SAME_RATE = {"equal-rate RPN": "rpn"}'
  (here / "tables.py").write_text(fixed)
  main = MAIN.replace('"hiou": 0.4', '"hiou": 0.4 - 0.1 * (rate == 1e-2)')  # the best of RPN
  (here / "main.py").write_text(main)
  assert call("table10", "--tune-lr") == 0
  assert "missing" not in capsys.readouterr().out
  with (here / "out/report/table10/report.csv").open() as file:
    of_row = {line["label"]: line for line in csv.DictReader(file)}
  less = {
    row: [line[f"hIoU less {other}'s [95 %]"] for other in ("rpn", "equal-rate RPN")]
    for row, line in of_row.items()
  }
  assert less == {
    "lora": ["5.0 [5.0, 5.0]", "-5.0 [-5.0, -5.0]"],
    "rpn": ["-", "-"],
    "slow": ["10.0 [10.0, 10.0]", "-"],
    "free": ["-", "-"],
  }
  # What no row asks for counts if it is RPN at that rate, and nothing else.
  (here / "tables.py").write_text(fixed.replace(row, '"rpn": {},'))
  assert call("table10", "--tune-lr") == 0
  assert "-5.0 [-5.0, -5.0]" in capsys.readouterr().out
  path = here / "out/h=1,base_lr=0.001_seed0/metrics.json"
  path.write_text(path.read_text().replace('"width": 1', '"width": 2'))
  assert call("table10", "--tune-lr") == 2
  assert "config.model.width is 2 there, and its row asks for 1" in capsys.readouterr().err


def test_rates_chosen_on_other_images_need_another_folder(here, capsys):
  assert call("table1", "--tune-lr") == 0
  made = calls()
  assert call("table1", "--tune-lr", "--held-out=0.5") == 2
  assert "held_out=0.5" in capsys.readouterr().err and calls() == made
  assert call("table1", "--tune-lr", "--held-out=0.2") == 0


def test_without_all_its_trials_a_row_gets_no_rate(here, capsys):
  (here / "broken").mkdir()
  (here / "broken/h=0.1,base_lr=0.001_seed0").touch()
  assert call("table10", "--tune-lr") == 1
  shown = capsys.readouterr()
  assert "table10_rpn: no rate chosen, no score yet at 0.001, h 0.1" in shown.out
  assert "missing: rpn, seed 0: no rate was chosen for it" in shown.out
  assert "the disk is full" in shown.err
  (here / "broken/h=0.1,base_lr=0.001_seed0").unlink()
  assert call("table10", "--tune-lr") == 0
  assert "missing" not in capsys.readouterr().out


def test_the_grid_is_the_same_for_all():
  grids = {}
  for row in (
    "table10_rpn",
    "table10_lora",
    "networks_cat_seg",
    "table4_lpm",
    "table13_layers_odd",
  ):
    config = ablations.get_config(row)
    grids[row] = ablations.rate_grid(config)
    for variant, rates in grids[row].items():
      assert tuple(rates) == ablations.RATES
      for rate, fields in rates.items():
        changed = config.copy_and_resolve_references().unlock()
        with changed.ignore_type():
          changed.update_from_flattened_dict(fields)
        optimizer, largest = changed.optimizer, max(f for *_, f in changed.optimizer.groups)
        assert optimizer.base_lr * largest == pytest.approx(rate)
        if variant:
          (h,) = (factor for name, _, factor in optimizer.groups if name == "h")
          assert h * optimizer.base_lr == pytest.approx(rate * float(variant.split()[1]))
  assert [list(grid) for grid in grids.values()] == [
    ["h 0.1", "h 1"], [""], [""], [""], ["h 0.1", "h 1"]
  ]  # fmt: skip


@pytest.mark.parametrize(
  "values, text",
  [
    ([], "-"),
    ([0.016], "1.6"),
    # Student's t with 2 and 4 degrees of freedom: 4.3027 and 2.7764, over the square root of n.
    ([0.01, 0.02, 0.03], "2.0 [-0.5, 4.5]"),
    ([0.0, 0.01, 0.02, 0.03, 0.04], "2.0 [0.0, 4.0]"),
    ([-0.0001, -0.0001], "0.0 [0.0, 0.0]"),
  ],
)
def test_an_interval_is_students(values, text):
  assert paired.mean_and_interval(values) == text
  assert paired.mean_and_interval(values, len(values)) == text
  if values:
    more = len(values) + 2
    assert paired.mean_and_interval(values, more) == f"{text}, {len(values)} of {more} seeds"


def test_an_interrupted_run_counts_by_its_steps(tmp_path):
  config = shapes.get_config("runlocal").to_dict()
  (tmp_path / "config.json").write_text(json.dumps({"clip": "", "config": config}))
  assert jobs.share_done(tmp_path) == 0
  for name in ("4", "6", "2.damaged", ".7.tmp"):
    (tmp_path / "checkpoints" / name).mkdir(parents=True)
  assert jobs.share_done(tmp_path) == 6 / 8


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="cores are pinned on Linux only")
def test_runs_at_a_time_share_the_cores(here):
  cores = sorted(os.sched_getaffinity(0))
  assert call("table10", "--jobs=2") == 0
  pinned = [json.loads(path.read_text()) for path in here.glob("out/*/cores.json")]
  assert len(pinned) == 5 and all(p in (cores[::2], cores[1::2] or cores) for p in pinned)
  assert sorted(os.sched_getaffinity(0)) == cores


def test_what_was_kept_is_not_run_again_where_the_workdirs_are_not(here, capsys):
  arguments = ("table10", "--tune-lr", "--tune-steps=3", "--keep=study/runs.json")
  assert call(*arguments) == 0
  made, first = calls(), capsys.readouterr().out
  trials = [c for c in made if "/rates/" in c["workdir"]]
  assert {c["config.steps"] for c in trials} == {"3"} and len(trials) == 9
  assert not any("config.steps" in c for c in made if c not in trials)
  text = (here / "study/runs.json").read_text()
  assert len(kept.read(here / "study/runs.json")) == 9 - 1 + 5 and '"diverged": ["rates/' in text
  shutil.rmtree(here / "out")
  assert call(*arguments) == 0
  assert calls() == made and (here / "study/runs.json").read_text() == text
  assert capsys.readouterr().out == first
  # It is the file of these settings, and of a sweep.
  assert call("table10", "--tune-lr", "--tune-steps=4", "--keep=study/runs.json") == 2
  assert "--keep=study/runs.json: has runs of" in capsys.readouterr().err
  (run, *_) = kept.read(here / "study/runs.json")
  with pytest.raises(InputError, match="a sweep keeps its runs there"):
    kept.keep(here / "study/runs.json", [run])


def test_where_nothing_can_be_kept_nothing_is_run(here, capsys):
  (here / "file").touch()
  assert call("table1", "--keep=file/runs.json") == 2
  assert "--keep=file/runs.json: cannot be written" in capsys.readouterr().err
  assert not (here / "calls.jsonl").exists()


def test_runs_are_kept_one_by_one_beside_those_of_others(here):
  (here / "broken").mkdir()
  (here / "broken/width=2_seed1").touch()
  assert call("table1", "--keep=kept.json") == 1  # another row and seed have ended
  assert sorted(run.directory.name for run in kept.read("kept.json")) == [
    "base_seed0", "base_seed1", "width=2_seed0"
  ]  # fmt: skip
  settings = kept.read_content(here / "kept.json").sweep
  mine, other = (kept.Results(here / "out", here / "kept.json", settings) for _ in range(2))
  shutil.copytree(here / "out/base_seed0", here / "out/base_seed7")
  other.keep([here / "out/base_seed7"])
  shutil.copytree(here / "out/base_seed0", here / "out/base_seed8")
  mine.keep([here / "out/base_seed8", here / "out/width=2_seed1"])
  names = {run.directory.name for run in kept.read("kept.json")}
  assert {"base_seed7", "base_seed8"} < names and "width=2_seed1" not in names


def test_weights_are_made_where_a_run_needs_them_and_are_those_of_its_runs(here, capsys):
  text = (
    (here / "tables.py").read_text()
    + """
TABLES["deep"] = {"rpn": {"clip": "towers/deep/clip.safetensors"}}
WEIGHTS = {"towers/deep/clip.safetensors": "pretrain.py:deep", "towers/x/clip.safetensors": "x"}
REFERENCES = {"RPN": "rpn"}
"""
  )
  (here / "tables.py").write_text(text)
  tiny.save(here / "made.safetensors")
  found = arrays.fingerprint(clip_file.load(here / "made.safetensors")[1])
  (here / "fingerprint").write_text(found)
  assert call("table1", "--keep=kept.json") == 0
  assert len(calls()) == 4  # none of them needs weights
  assert call("all", "--keep=kept.json") == 0
  made = calls()
  assert made[4] == {"workdir": "towers/deep", "config": "pretrain.py:deep"}
  assert [c["config"] for c in made].count("tables.py:deep_rpn,dataset=shapes") == 2
  for folder in ("out", "towers"):  # elsewhere: nothing is left to do
    shutil.rmtree(here / folder)
  assert call("all", "--keep=kept.json") == 0 and calls() == made
  # Another seed needs the weights again, and they are others.
  tiny.save(here / "made.safetensors", seed=1)
  assert call("all", "--keep=kept.json", "--seeds=3") == 2
  shown = capsys.readouterr().err
  assert f"and a finished run, clip=towers_deep_clip.safetensors_seed0, is around {found}" in shown
  assert calls()[len(made) :] == [made[4]]


@pytest.mark.parametrize(
  "arguments, message",
  [
    (("table3",), "no table 'table3' in tables.py; it has table1, table10"),
    (("table1", "--steps=3"), "unknown argument '--steps=3'"),
    (("table1", "--jobs=0"), "expected 1 or more"),
    (
      ("table1", "--tune-lr", "--config.optimizer.base_lr=1"),
      "--tune-lr chooses what --config.opt",
    ),
    (("table1", "--config=missing.py"), "missing.py: no such file"),
    (("table1", "--config.seed=5"), "--config.seed=5: is for all runs, and --seeds sets"),
    (("all", "--config.model.tuner=vpt"), "and a row of the table sets that field"),
    (("table1", "--tune-lr", "--held-out=0"), "--held-out=0: expected a share above 0"),
    (("table1", "--held-out=0.3"), "--held-out is for --tune-lr"),
    (("table1", "--tune-steps=3"), "--tune-steps is for --tune-lr"),
    (("table1", "--tune-lr", "--tune-steps=0"), "--tune-steps=0: expected 1 or more"),
    (("table1", "--keep=runs.txt"), "--keep=runs.txt: expected a file called *.json"),
  ],
)
def test_wrong_arguments(here, capsys, arguments, message):
  table, *others = arguments
  assert cli.main(["sweep", table, "--config=tables.py", *others]) == 2
  assert message in capsys.readouterr().err
  assert not (here / "calls.jsonl").exists()


def test_other_settings_need_another_folder(here, capsys):
  assert call("table1") == 0
  assert call("table1", "--config.steps=9") == 2
  assert "give another --root" in capsys.readouterr().err


def edit(path, change):
  content = json.loads(path.read_text())
  change(content)
  path.write_text(json.dumps(content))


def test_a_run_of_another_config_is_not_taken_for_a_rows(here, capsys):
  arguments = ("table10", "--tune-lr", "--tune-steps=3", "--keep=kept.json")
  assert call(*arguments) == 0
  made, text = calls(), (here / "kept.json").read_text()
  # A recipe that was changed since: neither folders nor names tell.
  (here / "tables.py").write_text(CONFIG.replace('"name": "shapes"', '"name": "voc"'))
  for _ in range(2):
    assert call(*arguments) == 2
    shown = capsys.readouterr().err
    assert "config.data.name is 'shapes' there, and its row asks for 'voc'" in shown
    shutil.rmtree(here / "out", ignore_errors=True)
  (here / "tables.py").write_text(CONFIG)
  assert call(*arguments) == 0 and calls() == made
  # Nor one of other steps, wherever it comes from.
  edit(here / "kept.json", lambda content: content["runs"][-1]["config"].update(steps=4))
  assert call(*arguments) == 2
  assert "config.steps is 4 there, and its row asks for 3" in capsys.readouterr().err
  (here / "kept.json").write_text(text)
  edit(here / "kept.json", lambda content: content["runs"][-1].update(clip="a", seed=1))
  edit(here / "kept.json", lambda content: content["runs"][-2].update(clip="b"))
  assert call(*arguments) == 2
  shown = capsys.readouterr().err
  assert "is around weights with fingerprint b" in shown and "around a, both called tiny" in shown
  assert calls() == made


def test_kept_runs_of_one_name_are_equal(here, capsys):
  assert call("table1", "--keep=kept.json") == 0
  made, text = calls(), (here / "kept.json").read_text()
  edit(here / "kept.json", lambda content: content["runs"].append(content["runs"][0]))
  assert call("table1", "--keep=kept.json") == 0  # twice the same line of a merge

  def other(content):
    content["runs"].append(json.loads(json.dumps(content["runs"][0])))
    content["runs"][-1]["last"]["hiou"] = 0.01

  edit(here / "kept.json", other)
  assert call("table1", "--keep=kept.json") == 2
  assert "base_seed0: has a kept hIoU of 0.4 and 0.01 in another line" in capsys.readouterr().err
  # Nor does a workdir take the place of another machine's run.
  (here / "kept.json").write_text(text)
  edit(here / "kept.json", lambda content: content["runs"][0]["last"].update(hiou=0.2))
  assert call("table1", "--keep=kept.json") == 2
  assert "base_seed0: has a kept hIoU of 0.2 and 0.4 in out/base_seed0" in capsys.readouterr().err
  assert calls() == made


def test_a_diverged_seed_is_an_answer_that_is_told(here, capsys):
  (here / "diverging").mkdir()
  (here / "diverging/width=2_seed1").touch()
  assert call("table1", "--keep=kept.json") == 0
  shown = capsys.readouterr().out
  assert "missing: wide, seed 1: out/width=2_seed1: diverged, its loss was no number" in shown
  assert "diverged seeds" in shown and "5.0, 1 of 2 seeds" not in shown
  assert len(calls()) == 4
  shutil.rmtree(here / "out")
  assert call("table1", "--keep=kept.json") == 0 and len(calls()) == 4
  assert "diverged seeds" in capsys.readouterr().out


def test_what_cannot_be_kept_ends_the_sweep_at_once(here, capsys):
  (here / "main.py").write_text(MAIN + 'pathlib.Path("kept.json").write_text("damaged")')
  assert call("all", "--keep=kept.json") == 2
  assert "got another or a damaged file" in capsys.readouterr().err
  assert len(calls()) <= 2  # the next one may have begun


@pytest.mark.parametrize(
  "rows, message",
  [
    ({"t": {"a": {"data.crop": 32}, "b": {"eval.crop": 32}}}, "workdir out/crop=32_seed0 stands"),
    ({"t": {"a": {"clip": "a/b"}, "b": {"clip": "a_b"}}}, "workdir out/clip=a_b_seed0 stands"),
    ({"t": {"x_y": {}}, "t_x": {"y": {"steps": 3}}}, "row t_x_y stands for two rows, {} and"),
  ],
)
def test_different_rows_have_different_names(here, capsys, rows, message):
  (here / "tables.py").write_text(f"TABLES = {rows}")
  assert call("all") == 2
  assert message in capsys.readouterr().err
  assert not (here / "calls.jsonl").exists()


def test_a_flag_does_not_undo_what_a_row_is(here, capsys, monkeypatch):
  """A row that is a preset changes fields that its own changes do not name."""
  text = CONFIG.replace('"wide": {"model.width": 2}', '"wide": {"steps": 5, "preset": "wide"}')
  text = text.replace(
    "  config.update_from_flattened_dict(TABLES[table][row])",
    """  changes = dict(TABLES[table][row])
  config.model.width = 2 if changes.pop("preset", "") else 1
  config.update_from_flattened_dict(changes)""",
  )
  (here / "tables.py").write_text(text)
  assert call("table1", "--config.model.width=3") == 2
  assert "--config.model.width=3: is for all runs, and a row" in capsys.readouterr().err
  assert call("table10", "--config.model.width=3") == 0  # which has no such row


@pytest.mark.slow
def test_the_real_thing(tmp_path):
  weights = tmp_path / "tiny.safetensors"
  tiny.save(weights)
  command = [
    sys.executable, "-m", "rpn_jax", "sweep", "table7", "--seeds=1", f"--root={tmp_path}/out",
    "--config=configs/ablations.py:dataset=shapes,runlocal", f"--config.clip={weights}",
    f"--config.data.data_dir={tmp_path}", *tiny.FLAGS,
  ]  # fmt: skip
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
  assert done.returncode == 0, done.stderr
  assert "tfpm_b" in done.stdout


@pytest.mark.parametrize("word", ["plain red", "赤い丸"])
def test_long_changes_have_short_names_that_differ(word):
  names = [
    plan.directory(pathlib.Path("out"), {"data.unseen": (word,) * 40, "x": x}, 0).name
    for x in (1, 2)
  ]
  assert names[0] != names[1] and max(len(name.encode()) for name in names) < 220
  assert all(name.startswith("unseen=") and name.endswith("_seed0") for name in names)


@pytest.mark.parametrize(
  ("curves", "says"),
  [
    ([[(1, 0.3), (2, 0.402)], [(1, 0.3), (2, 0.4)]], "+10.1, not converged"),
    ([[(2, 0.4), (3, 0.409)], [(1, 0.1), (2, 0.4), (3, 0.4)]], "+0.4"),  # 0.45 rounds to even
    ([[(2, 0.4), (3, 0.38)]], "-2.0, not converged"),
    ([[(2, 0.4), (3, 0.3999)]], "+0.0"),
    ([[(3, 0.4)]], "-"),
    ([[]], "-"),
  ],
)
def test_whether_a_row_has_converged(curves, says):
  runs = [
    FinishedRun(
      pathlib.Path(str(i)), {"data": {"name": "shapes"}}, {}, {}, {"eval/hiou": curve}, {}
    )
    for i, curve in enumerate(curves)
  ]
  assert sweep.late_change(Row("a", tuple(runs))) == says


def test_runs_with_a_teacher_are_trained_alone(tmp_path):
  content = plan.read_tables(str(ROOT / "configs/ablations.py"))
  results = kept.Results(tmp_path, None, {})
  of_all = plan.Plan("configs/ablations.py", "dataset=shapes", content, tmp_path, [], results)
  found = of_all.alone(["table4", "annotation_free"], {}, 2)
  taught = [
    changes
    for changes in content["TABLES"]["annotation_free"].values()
    if changes.get("data.setting") == "annotation_free"
  ]
  assert found == {of_all.workdir(changes, seed) for changes in taught for seed in (0, 1)}
  assert len(found) == 2 * len(taught) > 0
