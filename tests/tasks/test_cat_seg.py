"""CAT-Seg by its recipe, from raw files to the table of six benchmarks."""

import dataclasses

import numpy as np
import pytest

from configs import cat_seg
from data_pipelines import datasets, prepare
from rpn_jax import Segmenter
from rpn_jax.config import check
from rpn_jax.inference import published
from rpn_jax.tasks import evaluate, export, train
from rpn_jax.training.metric_log import read_history
from rpn_jax.weights.clip_file import with_normalization
from tests import tiny
from tests.data_pipelines import raw_ade_coco, raw_pascal
from tests.models.test_network import CAT_SEG
from tests.weights.checks import flatten, same


def small(home, arg="runlocal", **changes):
  """The recipe with windows of 32 pixels and a small network around a tiny CLIP."""
  config = cat_seg.get_config(arg).unlock()
  cat_seg.recipe(config, window=32)
  config.cat_seg.update(dataclasses.asdict(CAT_SEG))
  config.clip, config.data.data_dir = str(home / "clip.safetensors"), str(home / "data")
  config.update_from_flattened_dict(changes)
  check(config.lock())
  return with_normalization(config)


@pytest.mark.slow
def test_from_raw_files_to_six_benchmarks(tmp_path, monkeypatch, capsys):
  for paint in (
    *(raw_ade_coco.coco_stuff, raw_ade_coco.ade847, raw_ade_coco.ade150),
    *(raw_pascal.context459, raw_pascal.context, raw_pascal.voc),
  ):
    raw = tmp_path / paint.__name__
    raw.mkdir()
    paint(raw)
    prepare.prepare(paint.__name__, raw, tmp_path / "data", allow_partial=True)
  tiny.save(tmp_path / "clip.safetensors")
  # Published rows are those of a backbone.
  monkeypatch.setitem(published.TITLES, (tiny.TINY.vision_width, tiny.TINY.patch_size), "ViT-B/16")
  config, workdir = small(tmp_path), tmp_path / "run"
  assert config.data.setting == "supervised" and config.templates == "A photo of a {} in the scene"
  train.train(config, workdir, datasets.load(config))
  losses = [value for _, value in read_history(workdir / "metrics.jsonl")["train/loss"]]
  assert len(losses) == 4 and np.isfinite(losses).all()
  folder = export.export(config, workdir, datasets.load(config))
  loaded = Segmenter.load(folder, clip=config.clip)
  same(loaded.predictor.prompts, tiny.restored(config, workdir)["last"][1])
  assert any("clip" in name or "visual" in name for name in flatten(loaded.predictor.prompts))
  scores = evaluate.evaluate_run(config, workdir, datasets.load_evaluations(config))
  assert list(scores) == list(config.eval.sets) and len(scores) == 6
  rows = [line.split("  ") for line in capsys.readouterr().out.splitlines() if "CAT-Seg" in line]
  ours = {row[0] for row in rows if any("last, step 4" in cell for cell in row)}
  theirs = {row[0]: row for row in rows if any("published" in cell for cell in row)}
  assert ours == set(theirs) == set(scores)
  for name, value in zip(scores, ("12.0", "19.0", "31.8", "57.5", "94.6", "77.3")):
    assert value in theirs[name]
