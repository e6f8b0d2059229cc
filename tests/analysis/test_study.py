"""The study: tables and figures from kept scores."""

import json
import shutil

import jax
import numpy as np
import pytest

from configs import ablations, shapes_clip, study
from data_pipelines.shapes import world
from rpn_jax import cli
from rpn_jax.analysis import kept, paired, sweep
from rpn_jax.analysis import study as study_module
from rpn_jax.analysis.plan import key
from rpn_jax.analysis.study import open_plan, read_towers
from rpn_jax.base.errors import InputError
from rpn_jax.models.prompts import count
from rpn_jax.models.rpn import RPN
from rpn_jax.models.trained import prompt_shapes
from rpn_jax.weights import clip_file
from tests import ROOT

CONFIG = """
TOWERS = ("base", "deep")
METHODS = {"rpn": {}, "lpm": {"model.tuner": "lpm"}, "free": {"method": "training_free"}}
TABLES = {
  "base": METHODS,
  "deep": {row: {**changes, "clip": "deep.safetensors"} for row, changes in METHODS.items()},
  "few": {row: {**METHODS[row], "data.train_images": 100} for row in ("rpn", "lpm")},
}
REFERENCES = {"LPM alone": "lpm"}
GAINS = {"RPN less LPM": ("rpn", "lpm")}
AXES = {"training scenes": {100: "few", 1600: "base"}}

from ml_collections import ConfigDict

def get_config(arg):
  table, _, row = arg.partition("_")
  config = ConfigDict({
    "task": "segment", "method": "rpn", "seed": 0, "steps": 5, "clip": "base",
    "model": {"tuner": "rpn"}, "optimizer": {"base_lr": 0.0},
    "data": {"name": "shapes", "train_images": 1600},
  })
  config.update_from_flattened_dict(TABLES[table][row])
  return config

def rate_grid(config):
  return {"": {r: {"optimizer.base_lr": r} for r in (1e-4, 1e-3)}}
"""
# hIoU of table, row and seed.
SCORES = {
  ("base", "rpn"): (0.47, 0.48, 0.49),
  ("base", "lpm"): (0.46, 0.46, 0.46),
  ("deep", "rpn"): (0.40, 0.44, 0.42),
  ("deep", "lpm"): (0.35, 0.35, 0.35),
  ("few", "rpn"): (0.30,),
  ("few", "lpm"): (0.32,),
}

# Of a row's trials, where it is not 0.5.
HELD_OUT = {"base_rpn": 0.52, "deep_rpn": 0.54, "few_rpn": 0.9}


@pytest.fixture
def folder(tmp_path, monkeypatch):
  """A study's file of kept runs, made as the sweep makes it, and records of its towers."""
  monkeypatch.chdir(tmp_path)
  (tmp_path / "study.py").write_text(CONFIG)
  settings = {"file": "study.py", "config": "", "flags": [], "tuning": ["--config.steps=5"]}
  results = kept.Results(tmp_path / "out", tmp_path / "docs/runs.json", settings)
  content = sweep.read_tables("study.py")
  plan = sweep.Plan("study.py", "", content, tmp_path / "out", [], results, True)
  trials = plan.trials(list(content["TABLES"]))
  workdirs = []

  def add(workdir, config, hiou, held_out=0.5):
    workdir.mkdir(parents=True)
    last = {"step": 5, "pAcc": 0.9, "miou_gt": held_out, "miou_union": 0.5, "miou_seen": 2 * hiou,
            "miou_unseen": 0.4, "hiou": hiou}  # fmt: skip
    content = {"last": last, "best": last, "config": config, "trained_parameters": 7}
    (workdir / "metrics.json").write_text(json.dumps(content))
    workdirs.append(workdir)

  def config(name, seed, **changes):
    found = content["get_config"](name)
    found.update_from_flattened_dict({"seed": seed, **changes})
    return found.to_dict()

  for name, of_row in trials.items():
    for trial in of_row:
      add(trial.workdir, config(name, 0, **trial.fields), 0.3, HELD_OUT.get(name, 0.5))
  plan.choose(trials)
  for (table, row), values in {**SCORES, ("base", "free"): (0.06,)}.items():
    changes = content["TABLES"][table][row]
    chosen = plan.chosen.get(key(changes), {})
    for seed, value in enumerate(values):
      add(plan.workdir(changes, seed), config(f"{table}_{row}", seed, **chosen), value)
  results.keep(workdirs)
  towers = {"base": {"top1": 0.935, "probe_miou": 0.6, "far_changed": 0.1}}
  (tmp_path / "docs/towers.json").write_text(json.dumps(towers))
  return tmp_path / "docs"


def test_tables_and_figures_are_made_from_kept_scores(folder, capsys):
  made = folder.parent / "runs/study/towers/deep"
  made.mkdir(parents=True)
  record = {"fingerprint": "abc", "probe_miou": 0.4, "far_changed": 0.25, "scenes": 3}
  (made / "locality.json").write_text(json.dumps({**record, "attention_distance_share": 0.8}))
  (made / "metrics.json").write_text(json.dumps({"top1": 0.9, "fingerprint": "abc", "config": {}}))
  assert cli.main(["study", str(folder / "runs.json")]) == 0
  shown = capsys.readouterr().out
  text = (folder / "study.md").read_text()
  assert text in shown and "data.png" in shown
  # Differences seed by seed: 1, 2, 3 and 5, 9, 7 points, Student's t of two degrees of freedom.
  line = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("| ")}
  assert "2.0 [-0.5, 4.5]" in line["base"] and "93.5" in line["base"] and "6.0" in line["base"]
  assert "7.0 [2.0, 12.0]" in line["deep"] and "40.0" in line["deep"] and "25.0" in line["deep"]
  # Over both towers: the line through (60 %, 2) and (40 %, 7); two points tell no interval.
  of_gain = [line for line in text.splitlines() if line.startswith("| RPN less LPM ")]
  trend, seen, unseen, at_rates = ([c.strip() for c in line.split("|")[2:-1]] for line in of_gain)
  assert trend == ["2", "4.5 [-27.3, 36.3]", "-2.5", "-", "3.3"]
  assert seen == ["seen", "4.0 [-1.0, 9.0]", "14.0 [4.1, 23.9]", "9.0 [-54.5, 72.5]"]
  assert unseen == ["unseen", *["0.0 [0.0, 0.0]"] * 3]
  assert at_rates == ["", *["3.0 [-9.7, 15.7]"] * 2]  # two points, and four around the other tower
  assert text.endswith(
    "## Missing runs, by their seeds\n\n- deep: free 0\n- few: rpn 1, 2; lpm 1, 2\n"
  )
  assert "the best rate, 0.0001, is the lowest" in text
  for name in ("locality.png", "data.png"):
    assert (folder / name).stat().st_size > 10_000
  towers = json.loads((folder / "towers.json").read_text())
  assert towers["deep"] == {"top1": 0.9, "fingerprint": "abc", "probe_miou": 0.4,
                            "attention_distance_share": 0.8, "far_changed": 0.25}  # fmt: skip
  # They are kept where the tower is not, and another one does not take its place.
  assert read_towers(folder, {}) == towers
  (made / "locality.json").write_text(json.dumps({**record, "fingerprint": "def"}))
  with pytest.raises(InputError, match=r"is of a tower with fingerprint def, .* has abc"):
    read_towers(folder, {"deep": made})


def test_the_slope_of_a_line():
  # Residuals 0.5, -1, 0.5 around y = 2 x: 1.5 in squares, one degree of freedom, x spread by 2.
  slope, half = paired.slope([0, 1, 2], [0 + 0.5, 2 - 1, 4 + 0.5])
  assert slope == pytest.approx(2) and half == pytest.approx(12.706 * (1.5 / 2) ** 0.5, rel=1e-4)
  assert paired.with_interval(*paired.slope([1, 2], [3, 5])) == "2.0"
  assert paired.with_interval(*paired.slope([1, 1], [3, 5])) == "-"


def edit(folder, change):
  content = json.loads((folder / "runs.json").read_text())
  change(content, {run["directory"]: run for run in content["runs"]})
  (folder / "runs.json").write_text(json.dumps(content))
  return ["study", str(folder / "runs.json")]


LPM = "tuner=lpm,base_lr=0.0001_seed{}"


def test_what_is_missing_is_told_with_its_reason(folder, capsys):
  def change(content, runs):
    content["runs"] = [
      run for name, run in runs.items()
      if name not in (LPM.format(2), "rates/train_images=100,base_lr=0.001_seed0")
    ]  # fmt: skip
    content["diverged"] = [LPM.format(2)]

  assert cli.main(edit(folder, change)) == 0
  shown = capsys.readouterr().out
  assert "- base: lpm 2 (diverged)" in shown and "- few: rpn (no rate yet); lpm 1, 2" in shown
  assert "## Kept runs of no row\n\n- train_images=100,base_lr=0.0001_seed0\n" in shown
  # One and two points of seeds 0 and 1.
  assert "1.5 [-4.9, 7.9], 2 of 3 seeds" in shown and "diverged seeds" in shown


def test_workdirs_beside_the_file_are_left_alone(folder, capsys):
  assert cli.main(["study", str(folder / "runs.json")]) == 0
  first = capsys.readouterr().out
  for root in (folder, folder / "runs"):
    shutil.copytree(folder.parent / "out", root, dirs_exist_ok=True)
    path = root / LPM.format(0) / "metrics.json"
    path.write_text(path.read_text().replace('"hiou": 0.46', '"hiou": 0.01'))
  assert cli.main(["study", str(folder / "runs.json")]) == 0
  assert capsys.readouterr().out == first


def test_gains_are_around_the_tower_that_was_measured(folder, capsys):
  def change(content, runs):
    for name, run in runs.items():
      run["clip"] = "abc" if "deep" in name else "def"

  (folder / "towers.json").write_text(json.dumps({"deep": {"fingerprint": "123"}}))
  assert cli.main(edit(folder, change)) == 2
  shown = capsys.readouterr().err
  assert "is around a tower with fingerprint abc" in shown and "measured deep with 123" in shown


def test_one_seed_has_no_interval(folder, monkeypatch):
  drawn, draw = [], study_module._points

  def points(ax, x, y, half, i, label, **line):
    drawn.append((x, y, half))
    draw(ax, x, y, half, i, label, **line)

  monkeypatch.setattr(study_module, "_points", points)
  assert cli.main(["study", str(folder / "runs.json")]) == 0
  _, _, (few, base) = drawn[-1]
  assert np.isnan(few) and base == pytest.approx(2.484, abs=0.01)


def test_the_study_wants_its_config_file(folder, capsys, monkeypatch):
  monkeypatch.chdir(folder)
  assert cli.main(["study", "runs.json"]) == 2
  assert "runs.json: is of study.py, which is not here: run this in" in capsys.readouterr().err


def test_nothing_is_drawn_where_nothing_has_ended(folder):
  content = json.loads((folder / "runs.json").read_text())
  content["runs"] = [run for run in content["runs"] if run["directory"].startswith("rates/")]
  (folder / "runs.json").write_text(json.dumps(content))
  assert cli.main(["study", str(folder / "runs.json"), f"--out={folder}/new"]) == 0
  assert [path.name for path in (folder / "new").iterdir()] == ["study.md"]


def test_what_is_no_study(folder, capsys):
  run = kept.read(folder / "runs.json")[0]
  plain = kept.keep(folder / "plain.json", [run])
  assert cli.main(["study", str(plain)]) == 2
  assert "expected a file of `sweep --keep`" in capsys.readouterr().err
  (folder / "odd.json").write_text(
    plain.read_text().replace('"config"', '"sweep": {}, "config"', 1)
  )
  assert cli.main(["study", str(folder / "odd.json")]) == 2
  assert "got another or a damaged file" in capsys.readouterr().err
  (folder / "towers.json").write_text("[]")
  assert cli.main(["study", str(folder / "runs.json")]) == 2
  assert "towers.json: expected JSON with the records of towers" in capsys.readouterr().err


def test_the_studys_config():
  objects = set(world.OBJECTS)
  own = {world.CLASSES[i] for i in world.UNSEEN}
  assert set(study.unseen(1)) == own
  for patterns in (2, 3):
    names = set(study.unseen(patterns))
    seen = objects - names
    assert own < names < objects and len(seen) == 6 * (4 - patterns)
    assert {w for name in seen for w in name.split()} == {w for n in objects for w in n.split()}
    config = study.get_config(f"{len(seen)}_classes_lpm")
    assert set(config.data.unseen) == names and config.model.tuner == "lpm"
  assert study.get_config("base_released").model.head == "released"
  assert study.get_config("deep_lora").clip == "runs/study/towers/deep/clip.safetensors"
  crowded = study.get_config("crowded_rpn,runlocal")
  assert crowded.data.crop == crowded.eval.crop == 96 and crowded.steps == 8
  assert set(study.WEIGHTS) == {
    f"runs/study/towers/{tower}/clip.safetensors" for tower in shapes_clip.TOWERS if tower != "base"
  }
  tables = {place for places in study.AXES.values() for place in places.values()}
  assert tables <= set(study.TABLES) and set(study.TOWERS) <= set(study.TABLES)
  for ahead, behind in study.GAINS.values():
    assert {ahead, behind} <= set(study.METHODS)
  assert study.rate_grid is ablations.rate_grid


def test_the_studys_file_is_that_of_its_config(monkeypatch):
  """What is committed can be read, and its tables made, by the config as it is."""
  monkeypatch.chdir(ROOT)
  path = ROOT / "docs/study/runs.json"
  plan = open_plan(path)
  assert plan.path == "configs/study.py" and plan.results.runs()
  known = {workdir.name for workdir in plan.runs(list(plan.content["TABLES"]), 5)}
  trials = plan.trials(list(plan.content["TABLES"]))
  known |= {trial.workdir.name for of_row in trials.values() for trial in of_row}
  assert max(map(len, known)) < 220  # a file system has names of 255 bytes
  assert {name.rpartition("/")[2] for name in plan.results.runs()} <= known


@pytest.mark.parametrize("budget, parameters", [("75k", 75_000), ("200k", 200_000)])
def test_a_budget_is_kept_by_every_method(budget, parameters):
  clip, tower = clip_file.load(ROOT / "rpn_jax/assets/shapes_clip.safetensors")
  text = jax.ShapeDtypeStruct((3, clip.embed_dim), np.float32)
  for row in set(study.WIDTHS[budget]) - {"lpm"}:
    config = study.get_config(f"{budget}_{row}")
    network = RPN.create(clip, config.model)
    shapes = prompt_shapes(network, tower, text, config.data.crop)
    assert count(shapes) == pytest.approx(parameters, rel=0.02), row
