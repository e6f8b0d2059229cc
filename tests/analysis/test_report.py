"""Runs side by side: seeds averaged, rows named after what differs, nothing dropped silently."""

import copy
import csv
import dataclasses
import json
import math
import pathlib
import re
import shutil
import statistics

import pytest
from matplotlib.figure import Figure
from PIL import Image

from rpn_jax import cli
from rpn_jax.analysis import kept, report
from rpn_jax.analysis.runs import group_runs, read_run
from rpn_jax.base.errors import InputError
from rpn_jax.base.paths import write_json
from tests import ROOT

CONFIG = {
  "seed": 0,
  "steps": 100,
  "method": "rpn",
  "log_every": 10,
  "model": {"tuner": "rpn", "head": "paper", "deep_tokens": 0, "relationship_prompts": True},
  "data": {"name": "shapes", "data_dir": "data", "scale": [384, 96]},
}


def scores(step, hiou, seen=0.5, unseen=0.4):
  mean = {"pAcc": 0.9, "miou_gt": 0.45, "miou_union": 0.44}
  return {"step": step, **mean, "miou_seen": seen, "miou_unseen": unseen, "hiou": hiou}


@pytest.fixture
def make(tmp_path):
  """Writes a workdir: make("a", 0.4, seed=1, **{"model.head": "released"})."""

  def make_run(name, hiou=0.4, *, history=(), **changes):
    config = copy.deepcopy(CONFIG)
    for path, value in changes.items():
      section, _, leaf = path.rpartition(".")
      (config[section] if section else config)[leaf] = value
    directory = tmp_path / name
    directory.mkdir()
    best = scores(50, None if hiou is None else hiou + 0.1)
    last = scores(config["steps"], hiou)
    if hiou is None:
      last["miou_seen"] = last["miou_unseen"] = best["miou_seen"] = best["miou_unseen"] = None
    write_json(directory / "metrics.json", {"last": last, "best": best, "config": config})
    lines = [json.dumps({"step": s, "eval/hiou": v, "eval/miou_gt": v}) for s, v in history]
    (directory / "metrics.jsonl").write_text("\n".join(lines))
    return directory

  return make_run


def rows_of(*directories, labels=()):
  return group_runs([read_run(d) for d in directories], labels)


# Rows


def test_a_run_that_goes_on_is_not_counted(make):
  directory = make("on", steps=100)
  path = directory / "metrics.json"
  path.write_text(path.read_text().replace('"step": 100', '"step": 50'))
  with pytest.raises(InputError, match="on: not finished, step 50 of 100"):
    read_run(directory)


def test_seeds_become_one_row(make):
  values = (0.42, 0.45, 0.40)
  runs = [make(f"rpn_seed{i}", v, seed=i) for i, v in enumerate(values)]
  (row,), left_out = rows_of(*runs)
  assert row.label == "rpn" and not left_out
  assert row.values("last", "hiou") == list(values)
  mean, deviation = statistics.mean(values), statistics.stdev(values)
  cell = f"{100 * mean:.1f} ± {100 * deviation:.1f}"
  assert report.mean_and_deviation(values) == cell
  best = f"{100 * mean + 10:.1f} ± {100 * deviation:.1f}"
  line = report.score_table([row]).splitlines()[2]
  assert line.split()[:5] == ["1", "rpn", "shapes", "rpn", "3"]
  assert cell in line and line.endswith(best)
  content = report.summary([row], [])["rows"][0]
  assert content["last"]["hiou"] == pytest.approx({"mean": mean, "deviation": deviation})
  assert [run["seed"] for run in content["runs"]] == [0, 1, 2]


def test_one_seed_has_no_deviation(make):
  (row,), _ = rows_of(make("a"))
  assert report.mean_and_deviation(row.values("last", "hiou")) == "40.0"
  assert report.summary([row], [])["rows"][0]["last"]["hiou"]["deviation"] is None


def test_rows_are_named_after_what_differs(make):
  (two, one), _ = rows_of(make("a", **{"model.deep_tokens": 40}), make("b"))
  assert (two.label, one.label) == ("a (model.deep_tokens=40)", "b (model.deep_tokens=0)")


def test_runs_of_several_sets_and_methods_are_told_apart(make, tmp_path, capsys):
  """By their workdirs, data sets and networks: what differs between sets does not name them."""
  folder = {"data.name": "folder", "data.variant": "mine"}
  runs = [
    make("crowded", None, steps=300, **{"data.name": "crowds"}),
    make("mine", None, steps=400, **folder),
    make("sclip", None, method="training_free", dense={"method": "sclip"}, **folder),
    make("lora", 0.4, steps=1000, **{"model.tuner": "lora"}),
  ]
  rows, _ = rows_of(*runs)
  assert [row.label for row in rows] == ["crowded", "mine", "sclip", "lora"]
  lines = report.score_table(rows).splitlines()[2:6]
  cells = [re.split(r"\s{2,}", line.strip()) for line in lines]
  assert [cell[2:4] for cell in cells] == [
    ["crowds", "rpn"], ["folder mine", "rpn"], ["folder mine", "sclip"], ["shapes", "lora"],
  ]  # fmt: skip
  # The means of every run are there, and those of a split where there is one.
  assert [cell[5:8] for cell in cells] == [["90.0", "45.0", "44.0"]] * 4
  assert cells[0][8:11] == ["-"] * 3 and cells[3][8:11] == ["50.0", "40.0", "40.0"]
  assert cli.main(["report", *map(str, runs), f"--out={tmp_path / 'out'}"]) == 0
  figures = [f"report_{name}.png" for name in ("crowds", "folder_mine", "shapes")]
  assert all((tmp_path / "out" / name).exists() for name in figures)
  assert ", ".join(figures) in capsys.readouterr().out
  assert not (tmp_path / "out/report.png").exists()


def test_common_values_and_fields_that_tell_nothing_more_go_unnamed(make):
  released = {"model.head": "released", "data.scale": [1, 2]}
  rows, _ = rows_of(
    make("paper"),
    make("released", **released),
    make("no_rpm", **{"model.relationship_prompts": False}),
    make("released_no_rpm", **released, **{"model.relationship_prompts": False}),
    make("vpt", **{"model.relationship_prompts": False, "model.deep_tokens": 40}),
    make("long", steps=1000, **{"model.relationship_prompts": False}),
    make("free", method="training_free", **{"model.relationship_prompts": False}),
  )
  assert [row.label for row in rows] == [
    "paper (model.relationship_prompts=True)",
    "released (model.head=released, model.relationship_prompts=True)",
    "no_rpm",
    "released_no_rpm (model.head=released)",
    "vpt (model.deep_tokens=40)",
    "long (steps=1000)",
    "free",
  ]


def test_long_values_are_cut_and_names_stay_different(make):
  scale = [[1.25] * 30 + [i] for i in range(3)]
  rows, _ = rows_of(*(make(f"run{i}", **{"data.scale": scale[i]}) for i in range(3)))
  labels = [row.label for row in rows]
  assert len(set(labels)) == 3 and max(map(len, labels)) < 70
  assert labels[2].startswith("run2 (data.scale=") and labels[2].endswith("…)")
  assert report.summary(rows, [])["rows"][2]["config"] == {"data.scale": repr(tuple(scale[2]))}


def test_a_field_that_one_config_lacks(make):
  """An earlier version computed what the default of a later field does; nobody knows of others."""
  rows, _ = rows_of(
    make("run0"), make("run1", seed=1, synonyms="mean"), make("max", synonyms="max"),
    make("own", synonyms="max", of_mine=3),
  )  # fmt: skip
  assert [len(row.runs) for row in rows] == [2, 1, 1]
  assert [row.label for row in rows[1:]] == ["max", "own (of_mine=3)"]


def test_rows_of_the_committed_comparison_have_all_their_seeds(capsys, tmp_path):
  file = ROOT / "docs/study/equal_seconds.json"
  assert cli.main(["report", str(file), f"--out={tmp_path}"]) == 0
  assert "52.9 ± 2.3" in capsys.readouterr().out  # of full fine-tuning, in docs/results.md


def test_fields_without_influence_make_no_row(make):
  other = make("b", seed=1, log_every=5, **{"data.data_dir": "elsewhere"})
  (row,), left_out = rows_of(make("a"), other)
  assert len(row.runs) == 2 and not left_out


def test_a_repeated_seed_is_counted_once(make):
  (row,), (reason,) = rows_of(make("a", 0.4), make("copy", 0.6))
  assert row.values("last", "hiou") == [0.4]
  assert "copy: config and seed of" in reason


def test_labels_of_ones_own(make):
  runs = [make("a"), make("a1", seed=1), make("b", steps=7)]
  rows, _ = rows_of(*runs, labels=["RPN", "short"])
  assert [(row.label, len(row.runs)) for row in rows] == [("RPN", 2), ("short", 1)]
  for labels in (["RPN"], ["RPN", "RPN"]):
    with pytest.raises(InputError, match=r"expected 2 different names.*2: .*b"):
      rows_of(*runs, labels=labels)


def test_means_where_no_class_is_unseen(make):
  rows, _ = rows_of(make("a", None), make("b", None, steps=1))
  assert report.columns(rows) == ("miou_gt", "miou_union")
  mixed, _ = rows_of(make("c", 0.5), make("d", None, steps=1))
  assert report.columns(mixed) == ("miou_gt", "miou_union", "miou_seen", "miou_unseen", "hiou")
  assert report.score_table(mixed).splitlines()[3].split()[-1] == "-"


def test_curves_average_over_common_steps(make):
  one = make("a", history=[(10, 0.1), (20, 0.2), (30, 0.5)])
  two = make("b", seed=1, history=[(10, 0.3), (30, 0.9), (40, 1.0)])
  (row,), _ = rows_of(one, two)
  steps, mean, deviation = row.curve("hiou")
  assert steps.tolist() == [10, 30] and mean == pytest.approx([0.2, 0.7])
  assert deviation == pytest.approx([statistics.stdev([0.1, 0.3]), statistics.stdev([0.5, 0.9])])
  (free,), _ = rows_of(make("free"))
  assert free.curve("hiou") is None


def test_later_evaluations_have_a_table_of_their_own(make):
  runs = [make("a"), make("b", seed=1), make("c", steps=7)]
  assert report.evaluation_table(rows_of(*runs)[0]) == ""
  runs.append(make("free", method="training_free"))
  for directory, union in zip(runs[:2], (0.2, 0.3)):
    content = json.loads((directory / "metrics.json").read_text())
    content["last"]["miou_union"] = union
    write_json(directory / "eval.json", content)
  rows, _ = rows_of(*runs)
  lines = report.evaluation_table(rows).splitlines()
  assert "shapes gt" in lines[0] and "shapes union" in lines[0]
  assert "45.0 ± 0.0" in lines[2] and "25.0 ± 7.1" in lines[2]
  # No row for what was not evaluated; without training, that is all there is.
  assert lines[3].split() == ["3", "free", "45.0", "44.0"] and not lines[4]
  content["last"]["step"] = 50
  write_json(runs[1] / "eval.json", content)
  with pytest.raises(InputError, match=r"eval\.json: of step 50, and the run ended at 100"):
    read_run(runs[1])


def test_evaluations_are_those_of_the_run_and_of_one_protocol(make):
  runs = [make("a"), make("b", seed=1)]
  for directory in runs:
    content = json.loads((directory / "metrics.json").read_text())
    write_json(directory / "eval.json", content)
  assert [len(row.runs) for row in rows_of(*runs)[0]] == [2]
  content["config"]["eval"] = {**content["config"].get("eval", {}), "flip": True}
  write_json(runs[1] / "eval.json", content)
  rows, _ = rows_of(*runs)
  assert [len(row.runs) for row in rows] == [1, 1] and "flip=True" in rows[1].label
  content["config"]["prompts"] = "others/prompts.safetensors"
  write_json(runs[1] / "eval.json", content)
  with pytest.raises(InputError, match=r"eval\.json: of the prompts others/prompts\.safetensors"):
    read_run(runs[1])


def test_an_evaluation_of_another_set_has_its_name(make):
  run = make("a", eval={"sets": []})
  content = json.loads((run / "metrics.json").read_text())
  content["config"]["eval"]["sets"] = ["context59"]
  write_json(run / "eval.json", content)
  assert set(read_run(run).evaluations) == {"context59"}


@pytest.mark.parametrize("own", ["x", "another"])
def test_a_method_without_training_evaluated_on_several_sets(make, own):
  """It has no metrics.json; its last score is that of its own set, or of the first."""
  run = make("free", method="training_free", **{"data.name": own})
  config = json.loads((run / "metrics.json").read_text())["config"]
  (run / "metrics.json").unlink()
  found = {n: scores(0, None) | {"miou_gt": v} for n, v in (("y", 0.2), ("x", 0.1))}
  sets = {name: {"last": x, "best": x} for name, x in found.items()}
  write_json(run / "eval.json", {"sets": sets, "config": config})
  read = read_run(run)
  assert {n: x["miou_gt"] for n, x in read.evaluations.items()} == {"x": 0.1, "y": 0.2}
  assert read.last["miou_gt"] == {"x": 0.1, "another": 0.2}[own]
  config["method"] = "rpn"
  write_json(run / "eval.json", {"sets": sets, "config": config})
  with pytest.raises(InputError, match="free: not finished"):
    read_run(run)


def test_sets_of_one_evaluation_have_a_column_each(make):
  run = make("a")
  content = json.loads((run / "metrics.json").read_text())
  sets = {n: {"last": scores(100, None) | {"miou_gt": v}} for n, v in (("x", 0.1), ("y", 0.2))}
  write_json(run / "eval.json", {"sets": sets, "config": content["config"]})
  lines = report.evaluation_table(rows_of(run)[0]).splitlines()
  assert [h in lines[0] for h in ("x gt", "y union")] == [True, True]
  assert lines[2].split()[-4:] == ["10.0", "44.0", "20.0", "44.0"]


# What cannot be read


def break_run(directory, kind):
  path = directory / "metrics.json"
  content = json.loads(path.read_text())
  if kind == "cut":
    path.write_text(path.read_text()[:-30])
  elif kind == "list":
    path.write_text("[]")
  elif kind == "nan":
    content["last"]["hiou"] = float("nan")
    path.write_text(json.dumps(content))
  elif kind == "words":
    content["best"]["hiou"] = "high"
    path.write_text(json.dumps(content))
  elif kind == "no data":
    del content["config"]["data"]
    path.write_text(json.dumps(content))
  elif kind == "pretraining":
    path.write_text(json.dumps({"top1": 0.9, "config": {}}))
  elif kind == "history":
    (directory / "metrics.jsonl").write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
  elif kind == "unfinished":
    path.unlink()
    write_json(directory / "config.json", {"config": CONFIG})
    (directory / "metrics.jsonl").write_text('{"step": 30, "a": 1}\n{"step": 60, "a"')
  elif kind == "empty":
    path.unlink()
    (directory / "metrics.jsonl").unlink()


@pytest.mark.parametrize(
  ("kind", "reason"),
  [
    ("cut", "damaged or of another task"),
    ("list", "damaged or of another task"),
    ("nan", "damaged or of another task"),
    ("words", "damaged or of another task"),
    ("no data", "damaged or of another task"),
    ("pretraining", "damaged or of another task"),
    ("history", "metrics.jsonl line 2"),
    ("unfinished", "not finished, step 30 of 100"),
    ("empty", "no metrics.json"),
  ],
)
def test_what_cannot_be_read_is_listed(make, tmp_path, capsys, kind, reason):
  good, bad = make("good"), make("bad", steps=7)
  break_run(bad, kind)
  out = tmp_path / "out"
  assert cli.main(["report", str(good), str(bad), f"--out={out}"]) == 0
  assert f"left out: {bad}" in capsys.readouterr().out
  (listed,) = json.loads((out / "report.json").read_text())["left_out"]
  assert str(bad) in listed and reason in listed
  assert listed in (out / "report.md").read_text()
  assert cli.main(["report", str(bad), f"--out={out}"]) == 2
  assert reason in capsys.readouterr().err


def test_a_folder_of_runs_and_none_at_all(make, tmp_path, capsys):
  make("a")
  make("b")
  assert cli.main(["report", str(tmp_path), str(tmp_path / "gone")]) == 2
  message = capsys.readouterr().err
  assert f"2 folders in it have one: give {tmp_path}/*" in message
  assert "gone: no such folder" in message


# Files


def test_the_files(make, tmp_path, capsys):
  curve = [(10, 0.1), (100, 0.4)]
  runs = [make(f"s{i}", 0.4 + i / 10, seed=i, history=curve) for i in (0, 1)]
  runs.append(make("free", 0.1, method="training_free"))
  out = tmp_path / "out"
  arguments = [*map(str, runs), f"{runs[0]}/", "--out", str(out), "--labels", "a | b", "free"]
  assert cli.main(["report", *arguments]) == 0
  printed = capsys.readouterr().out
  assert "45.0 ± 7.1" in printed and "best* hIoU" in printed and "left out" not in printed
  assert "best*: selected on the evaluation classes" in printed

  assert {p.name for p in out.iterdir()} == {f"report.{x}" for x in ("md", "csv", "json", "png")}
  text = (out / "report.md").read_text()
  assert "a \\| b" in text and "selected on the evaluation classes" in text
  with open(out / "report.csv", newline="") as file:
    first, second = csv.DictReader(file)
  assert (first["label"], first["seeds"], first["method"]) == ("a | b", "2", "rpn")
  assert float(first["last_hiou_mean"]) == pytest.approx(0.45)
  assert float(first["best_hiou_deviation"]) == pytest.approx(statistics.stdev([0.5, 0.6]))
  assert second["last_hiou_deviation"] == ""
  content = json.loads((out / "report.json").read_text())
  assert content["rows"][1]["config"] == {"method": "training_free"}
  with Image.open(out / "report.png") as picture:
    assert min(picture.size) > 300


@pytest.mark.parametrize("count", [1, 20])
def test_names_and_numbers_do_not_collide(make, tmp_path, monkeypatch, count):
  """Every text of the picture lies inside it and on no other."""
  figures = []
  save = Figure.savefig
  monkeypatch.setattr(Figure, "savefig", lambda f, *a, **k: (figures.append(f), save(f, *a, **k)))
  runs = []
  for i in range(count):
    curve = [(10, i / 30), (20, i / 40)]
    hiou = None if count == 1 else 0.03 * i
    runs += [
      make(f"r{i}s{s}", hiou if hiou is None else hiou + s / 9, seed=s, steps=i, history=curve)
      for s in (0, 1)
    ]
  labels = [f"a method with quite a long name, its variant and setting, {i}" for i in range(count)]
  rows, _ = rows_of(*runs, labels=labels)
  report.plot(tmp_path / "plot.png", rows)
  (figure,) = figures
  assert figure.get_suptitle() == "shapes"  # the data set
  bars, numbers = figure.axes[0], []
  assert len(figure.axes) == (4 if count == 1 else 6)
  for ax in figure.axes[: len(figure.axes) // 2]:
    assert len(ax.patches) == count
    numbers += ax.texts
  texts = [*(t for t in bars.get_yticklabels() if t.get_text()), *numbers]
  assert [t.get_text().split("[")[1] for t in texts[:count]] == [f"{i + 1}]" for i in range(count)]
  boxes = [t.get_window_extent() for t in texts]
  for i, box in enumerate(boxes):
    assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1
    assert not [j for j in range(i) if box.overlaps(boxes[j])]


# Kept runs


def test_tables_are_made_from_a_file_of_scores(make, tmp_path, monkeypatch, capsys):
  """The same files, but for where the runs are, when the runs are gone."""
  values = {"rpn": (0.4, 0.42, 0.44), "lora": (0.3, 0.35, 0.31)}
  runs = [
    str(make(f"{tuner}_seed{i}", value, seed=i, history=[(50, 0.2), (100, value)],
             **{"model.tuner": tuner}))
    for tuner, of_seeds in values.items() for i, value in enumerate(of_seeds)
  ]  # fmt: skip
  file = tmp_path / "kept/study.json"
  assert cli.main(["report", *runs, f"--out={tmp_path}/first", f"--keep={file}"]) == 0
  assert "6 runs" in capsys.readouterr().out
  for run in runs:
    shutil.rmtree(run)
  assert cli.main(["report", str(file), f"--out={tmp_path}/second"]) == 0
  for name in ("report.md", "report.csv"):
    assert (tmp_path / "first" / name).read_text() == (tmp_path / "second" / name).read_text()
  first, second = ((tmp_path / n / "report.png").read_bytes() for n in ("first", "second"))
  assert first == second
  # What all runs share is in it once, and a run on each line.
  text = file.read_text()
  assert text.count("deep_tokens") == 1 and text.count("\n") == 8 and text.count('"lora"') == 3


@pytest.mark.parametrize(
  "change",
  [
    lambda content: content.update(runs=[]),
    lambda content: content["config"].pop("data.name"),
    lambda content: content["runs"][0].update(last=None),
    lambda content: content["runs"][0]["best"].update(hiou="high"),
    lambda content: content["runs"][0]["last"].update(hiou=math.nan),
    lambda content: content["runs"][0].update(evaluations=3),
    lambda content: content["runs"][0]["history"].update({"eval/hiou": [[[], 0.1]]}),
  ],
)
def test_damaged_scores_in_a_file(make, tmp_path, change):
  path = kept.keep(tmp_path / "study.json", [read_run(make("rpn", 0.4))])
  content = json.loads(path.read_text())
  change(content)
  path.write_text(json.dumps(content))
  with pytest.raises(InputError, match="got another or a damaged file"):
    kept.read(path)


def test_scores_are_kept_in_place_of_no_other_file(make, tmp_path):
  directory = make("rpn", 0.4)
  run, other = read_run(directory), pathlib.Path(directory) / "metrics.json"
  with pytest.raises(InputError, match="another file is there"):
    kept.keep(other, [run])
  assert read_run(directory) == run
  assert kept.keep(kept.keep(tmp_path / "study.json", [run]), [run]).exists()  # of its own kind
  alike = dataclasses.replace(run, directory=tmp_path / "other/rpn", last=scores(100, 0.9))
  for _ in range(2):  # also where two runs of different folders have one name
    assert len(kept.read(kept.keep(tmp_path / "both.json", [run, alike]))) == 2


def test_how_a_run_was_evaluated_is_kept(make, tmp_path):
  """Else its scores would be averaged with those of another protocol."""
  runs = [make("s0"), make("s1", seed=1)]
  content = json.loads((runs[1] / "metrics.json").read_text())
  content["config"]["eval"] = {"flip": True, "sets": ["x"]}
  write_json(runs[1] / "eval.json", content)
  read = [read_run(run) for run in runs]
  again = kept.read(kept.keep(tmp_path / "study.json", read))
  for found in (read, again, [read[0], again[1]]):
    rows, _ = group_runs(found)
    assert [len(row.runs) for row in rows] == [1, 1] and "flip=True" in rows[1].label
  assert again[1].evaluated_with == read[1].evaluated_with


@pytest.mark.parametrize("text", ["", "[]", '{"format": "other"}', '{"format": "rpn_jax runs 1"}'])
def test_a_damaged_file_of_scores(tmp_path, text, capsys):
  path = tmp_path / "study.json"
  path.write_text(text)
  assert cli.main(["report", str(path), f"--out={tmp_path}/out"]) == 2
  assert "got another or a damaged file" in capsys.readouterr().err
  assert cli.main(["report", str(path), "--keep=scores.txt"]) == 2
  assert "expected a file called *.json" in capsys.readouterr().err
