"""The way to a published row: its recipes, its plan, and the comparison at its end."""

import argparse
import json
import os
import subprocess
import sys

import jax
import pytest

from data_pipelines import downloads, records
from rpn_jax import reproduce
from rpn_jax.base import console
from rpn_jax.base.errors import InputError
from rpn_jax.config import protocols
from tests import ROOT, tiny
from tests.tools import hub_server, raw_archives


@pytest.fixture
def options(tmp_path):
  return argparse.Namespace(
    config="",
    data_dir=str(tmp_path / "data"),
    manual_dir="",
    without="",
    mirror="",
    remove_archives=False,
    allow_partial=False,
  )


@pytest.fixture
def steps(options, tmp_path):
  """Plans a recipe, from its name and changes."""

  def make(name, *changes):
    recipe = reproduce.RECIPES[name]
    options.config = recipe.config
    config = reproduce.read_config(recipe.config, changes)
    return reproduce.plan(recipe, config, tmp_path / "run", options, changes)

  return make


def write_run(folder, evaluations, steps=20_000):
  """The files of a finished run on VOC."""
  folder.mkdir()
  last = {"step": steps}
  config = {"data": {"name": "voc20"}, "steps": steps, "method": "rpn"}
  (folder / "metrics.json").write_text(json.dumps({"config": config, "last": last, "best": last}))
  if evaluations:
    sets = {
      name: {"last": {"step": steps, "per_class": {}, **value}}
      for name, value in evaluations.items()
    }
    (folder / "eval.json").write_text(json.dumps({"sets": sets}))


@pytest.mark.parametrize("name", reproduce.RECIPES)
def test_every_recipe_evaluates_what_was_published(name):
  recipe = reproduce.RECIPES[name]
  config = reproduce.read_config(recipe.config)
  sets = config.eval.sets or (config.data.name,)
  assert any(recipe.scores(data_set) for data_set in sets)
  assert config.clip == {"b16": "ViT-B/16", "l14": config.clip}[recipe.backbone]


def test_on_an_empty_machine_all_is_to_be_done(steps):
  weights, data, train, evaluate = steps("voc_zero_shot")
  assert (weights.what, weights.state) == ("CLIP ViT-B/16", "to fetch")
  assert "--download" in data.command and data.state.endswith("GB to fetch")
  assert train.state == "20,000 steps of 32 images, 640,000 in all"
  assert "--config=configs/voc.py:setting=zero_shot" in train.command
  assert evaluate.state == "voc20" and evaluate.command[-1] == "--mode=eval"


def test_what_is_here_is_not_counted_and_what_wants_an_account_is_named(steps, monkeypatch):
  (ade,) = (s for s in steps("open_vocab_b16") if s.what == "data ade847")
  assert "get ADE20K_2021_17_01.zip on http" in ade.wanted and " and put it into" in ade.wanted
  assert ade.state == "6.0 GB, of which you get 6.0 yourself"
  (cityscapes,) = (s for s in steps("gem_l14") if s.what == "data cityscapes")
  assert " and put them into" in cityscapes.wanted
  monkeypatch.setattr(downloads, "missing", lambda name, folder: [])
  assert steps("voc_zero_shot")[1].state == "raw files are here"


def test_each_set_is_prepared_once_and_evaluated_in_one_call(steps, monkeypatch):
  *_, train, evaluate = found = steps("open_vocab_b16")
  data = [step.what for step in found if step.what.startswith("data")]
  assert data == ["data coco_stuff", "data ade847", "data context459", "data ade150",
                  "data context", "data voc"]  # fmt: skip
  assert train.what == "train" and evaluate.command[-1] == "--mode=eval"
  monkeypatch.setattr(records, "folders_of", lambda cls, data_dir: [data_dir])
  assert {s.state for s in steps("open_vocab_b16") if s.what in data} == {"prepared"}


@pytest.mark.parametrize("name, refine", [("naclip_b16", "none"), ("naclip_pamr_b16", "pamr")])
def test_naclip_is_refined_where_its_row_is(name, refine):
  config = reproduce.read_config(reproduce.RECIPES[name].config)
  assert {c.eval.refine for c in protocols.each(config)} == {refine}


@pytest.mark.parametrize("name", [n for n, r in reproduce.RECIPES.items() if not r.trained])
def test_any_set_of_a_protocol_may_be_left_out(name, options, tmp_path):
  """The first one, too, whose values the config has; and its data are not wanted then."""
  recipe = reproduce.RECIPES[name]
  config = reproduce.read_config(recipe.config)
  first, *others = config.eval.sets
  for without, kept in ((first, others), (",".join(others), [first])):
    config = reproduce.read_config(recipe.config)
    reproduce._leave_out(without, config, recipe)
    flag = f"--config.eval.sets={tuple(config.eval.sets)!r}"
    read = reproduce.read_config(recipe.config, [flag])  # what the last step does
    assert [c.eval.sets for c in protocols.each(read)] == [(name,) for name in kept]
  config = reproduce.read_config(recipe.config, ["--config.eval.sets=('cityscapes',)"])
  data = [step.what for step in reproduce.plan(recipe, config, tmp_path, options)[1:-1]]
  assert data == ["data cityscapes"]


def test_what_is_done_is_not_done_again(steps, tmp_path):
  write_run(tmp_path / "run", {"ade150": {"miou_gt": 0.3}, "voc20": {"hiou": 0.886}})
  assert steps("voc_zero_shot")[-2:] == [
    reproduce.Step("train", "there"), reproduce.Step("evaluate", "there")
  ]  # fmt: skip
  *_, train, evaluate = steps("open_vocab_b16")
  assert not train.command and evaluate.command
  assert "ade847" in evaluate.state and "ade150" not in evaluate.state
  content = {"last": {"step": 20_000, "per_class": {}}, "config": {"data": {"name": "voc20"},
             "eval": {"sets": ["ade150"]}}}  # fmt: skip
  (tmp_path / "run/eval.json").write_text(json.dumps(content))  # of one set alone
  assert set(reproduce._scored(tmp_path / "run")) == {"ade150"}
  path = tmp_path / "run/metrics.json"
  path.write_text(path.read_text().replace("20000", "30000"))
  assert "ade150" in steps("open_vocab_b16")[-1].state  # scores of an earlier step
  (tmp_path / "run/eval.json").unlink()
  path.write_text(json.dumps(content))  # of the set trained on
  assert set(reproduce._scored(tmp_path / "run")) == {"voc20"}


def test_a_plan_ends_with_what_was_published(monkeypatch, capsys):
  monkeypatch.chdir(ROOT)
  assert not reproduce.main(["open_vocab_b16", "--dry-run", "--without=ade847,voc21"])
  assert capsys.readouterr().out.endswith(
    "context459 17.3, ade150 31.5, context59 57.1, voc20 95.2\n"
  )


def test_scores_beside_the_published_ones(tmp_path, capsys):
  recipe = reproduce.RECIPES["open_vocab_b16"]
  scores = {
    "voc20": {"miou_gt": 0.90, "miou_union": 0.9489, "per_class": {}},
    "ade150": {"miou_gt": 0.3051, "miou_union": None},
    "voc21": {"miou_gt": 0.5},
  }
  rows = reproduce.compare(recipe, scores)
  assert [(r["set"], r["metric"]) for r in rows] == [("voc20", "miou_union"), ("ade150", "miou_gt")]
  assert [round(r["difference"], 2) for r in rows] == [-0.31, -0.99]
  sentence = reproduce.verdict(recipe, rows, ["--config.steps=9"])
  assert sentence.startswith("2 of 2 scores are within 1.0 of RPN's published ones")
  assert sentence.endswith("this run has settings of its own: --config.steps=9")
  far = reproduce.compare(recipe, {"ade150": {"miou_gt": 0.304}})
  assert reproduce.verdict(recipe, far, []).startswith("0 of 1 scores")
  reproduce.report("open_vocab_b16", rows, sentence, tmp_path)
  assert "| voc20" in (tmp_path / "reproduced.md").read_text()
  assert "-0.3" in capsys.readouterr().out


def test_supervised_training_is_compared_by_groups_of_classes():
  per_class = {"cat": 0.9, "dog": 0.7, "sofa": 0.5, "train": None, "sheep": 0.3}
  scores = {"voc20": {"pAcc": 0.97, "hiou": None, "per_class": per_class}}
  rows = reproduce.compare(reproduce.RECIPES["voc_supervised"], scores)
  got = {row["metric"]: round(row["ours"], 1) for row in rows}
  s, u = (90 + 70) / 2, (50 + 30) / 2  # sofa and sheep are of the unseen five
  assert got == {
    "pAcc": 97.0,
    "miou_seen": s,
    "miou_unseen": u,
    "hiou": round(2 * s * u / (s + u), 1),
  }


def test_a_step_that_fails_ends_the_way_with_its_number():
  fails = reproduce.Step("data voc", "", (sys.executable, "-c", "import sys; sys.exit(2)"))
  done = reproduce.Step("CLIP", "there")
  with pytest.raises(InputError, match="step 2 of 3, data voc, ended with status 2"):
    reproduce.run([done, fails, done])
  interrupted = reproduce.Step("train", "", (sys.executable, "-c", "import sys; sys.exit(130)"))
  with pytest.raises(KeyboardInterrupt):
    reproduce.run([interrupted])


@pytest.mark.parametrize(
  "arguments, message",
  [
    ("voc_zero_sho", "recipe 'voc_zero_sho' is not known; did you mean 'voc_zero_shot'"),
    ("voc_zero_shot --config.stepz=3", 'Did you mean "steps" instead of "stepz"'),
    ("voc_zero_shot --jobs=3", "unknown argument '--jobs=3'"),
    ("voc_zero_shot --without=ade847", "--without: evaluated set 'ade847' is not known"),
    ("voc_zero_shot --without=voc20", "leaves nothing of RPN's row to compare with"),
    ("naclip_b16 --data_dir=/nowhere", "before anything is fetched: cityscapes needs an account"),
    ("naclip_b16 --preset=paper", "--preset is of RPN; naclip_b16 is NACLIP without PAMR's row"),
  ],
)
def test_bad_arguments_are_one_line(arguments, message, capsys):
  assert console.run_command(lambda: reproduce.main(arguments.split())) == 2
  assert message in capsys.readouterr().err


@pytest.mark.slow
def test_from_an_empty_machine_to_a_model_that_is_passed_on(tmp_path):
  """Everything by its own command, from a hub and a host of archives on the loopback interface."""
  archives, _ = raw_archives.make("voc", tmp_path / "upstream")
  tiny.save(tmp_path / "clip.safetensors")
  clip = {"model.safetensors": (tmp_path / "clip.safetensors").read_bytes(), "config.json": b"{}"}
  with hub_server.serve({"you/clip": clip}, archives) as hub:
    hub.users.update({"hf_me": "me", "hf_you": "you"})
    # The addresses and checksums of these archives, in every process.
    table = raw_archives.rows("voc", archives, hub.url)
    (tmp_path / "site").mkdir()
    (tmp_path / "site/sitecustomize.py").write_text(
      "from data_pipelines import addresses\nfrom data_pipelines.addresses import File\n"
      f"addresses.TABLE['voc'] = {table!r}\n"
    )
    environment = os.environ | {
      "PYTHONPATH": f"{tmp_path / 'site'}:{ROOT}", "XDG_CACHE_HOME": str(tmp_path / "cache"),
      "HF_HOME": str(tmp_path / "hf"), "HF_ENDPOINT": hub.endpoint, "HF_TOKEN": "hf_me",
      "HF_HUB_OFFLINE": "0", "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
    }  # fmt: skip

    def command(*words, status=0, **variables):
      done = subprocess.run(
        [sys.executable, *words],
        cwd=ROOT,
        env=environment | variables,
        capture_output=True,
        text=True,
      )
      assert done.returncode == status, done.stdout + done.stderr
      return done.stdout + done.stderr

    way = [
      "-m", "rpn_jax", "reproduce", "voc_zero_shot", f"--data_dir={tmp_path / 'data'}",
      f"--root={tmp_path / 'runs'}", "--allow_partial", *tiny.FLAGS, "--config.clip=hf://you/clip",
      "--config.steps=4", "--config.eval_every=4", "--config.data.batch_size=2",
    ]  # fmt: skip
    said = command(*way, "--dry-run")
    assert "CLIP hf://you/clip: to fetch" in said and "To get: about" in said and not hub.log
    # Cut in the middle, then slow; and a file that is damaged on its way.
    voc, sbd = (f"file/{name}" for name in ("VOCtrainval_11-May-2012.tar", "benchmark.tgz"))
    hub.faults[voc] = hub_server.Fault(cut=999, times=1, then=hub_server.Fault(slow=0.5, times=1))
    hub.faults[sbd] = hub_server.Fault(body=bytes(len(archives["benchmark.tgz"])), times=1)
    said = command(*way, status=2)
    assert "step 2 of 4, data voc, ended with status 2, for the reason above" in said
    assert "checksum" in said
    said = command(*way)
    assert "scores are within 1.0 of RPN's published ones; this run has settings of its own" in said
    assert any("bytes=999-" in line for line in hub.log)  # the rest of what was cut
    run = tmp_path / "runs/voc_zero_shot"
    rows = json.loads((run / "reproduced.json").read_text())["rows"]
    assert [row["published"] for row in rows] == [95.8, 93.1, 84.6, 88.6]
    assert all(0 <= row["ours"] <= 100 for row in rows)
    hub.log.clear()
    said = command(*way)  # all is there
    assert "$ " not in said and not hub.log  # no command

    command("main.py", "--mode=export", f"--workdir={run}")
    command("-m", "rpn_jax", "share", str(run / "export"), "hf://me/voc")
    photo = str(next((tmp_path / "upstream").rglob("*.jpg")))
    fresh = {"XDG_CACHE_HOME": str(tmp_path / "another"), "HF_TOKEN": ""}
    for number, offline in enumerate("01"):
      command(
        "-m", "rpn_jax", "segment", photo, "a cat, grass", "--model=hf://me/voc",
        f"--out={tmp_path / str(number)}", HF_HUB_OFFLINE=offline, **fresh,
      )  # fmt: skip
    labels = [next((tmp_path / n).glob("*_labels.png")).read_bytes() for n in "01"]
    assert labels[0] == labels[1]
