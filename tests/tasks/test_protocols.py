"""Published protocols of training-free methods, from raw files to one table of eight data sets."""

import pytest

from configs import training_free
from data_pipelines import datasets, prepare
from rpn_jax.base.errors import InputError
from rpn_jax.config import protocols
from rpn_jax.inference import published
from rpn_jax.tasks import evaluate
from rpn_jax.weights import clip_file
from tests import tiny
from tests.data_pipelines import raw_ade_coco, raw_pascal

RAW = (
  *(raw_pascal.voc, raw_pascal.context, raw_ade_coco.coco_stuff, raw_ade_coco.ade150),
  raw_ade_coco.cityscapes,
)


def prepared(folder, words):
  """The config for data below a folder, with its normalization."""
  for paint in RAW:
    raw = folder / paint.__name__
    raw.mkdir()
    paint(raw)
    prepare.prepare(paint.__name__, raw, folder / "data", allow_partial=True)
  tiny.save(folder / "clip.safetensors")
  c = training_free.get_config(words).unlock()
  c.clip, c.data.data_dir = str(folder / "clip.safetensors"), str(folder / "data")
  c.templates = "single"
  return clip_file.with_normalization(c.lock())


def run(config, workdir):
  evaluations = [d for c in protocols.each(config) for d in datasets.load_evaluations(c)]
  return evaluate.evaluate_run(config, workdir, evaluations)


@pytest.mark.slow
def test_all_eight_sets_by_one_command(tmp_path, monkeypatch, capsys):
  # Published rows are those of a backbone.
  monkeypatch.setitem(published.TITLES, (tiny.TINY.vision_width, tiny.TINY.patch_size), "ViT-B/16")
  # The tiny tower would have thousands of patches of such images; all else is the protocol's.
  rows = {name: dict(row) for name, row in protocols.PROTOCOLS["naclip"].items()}
  for row in rows.values():
    sizes = ("data.short_side", "eval.crop", "eval.stride")
    row.update({size: row[size] // 7 for size in sizes})
  monkeypatch.setitem(protocols.PROTOCOLS, "naclip", rows)
  config = prepared(tmp_path, "method=naclip,set=all")
  scores = run(config, tmp_path / "run")
  assert tuple(scores) == protocols.SETS
  lines = [line.split("  ") for line in capsys.readouterr().out.splitlines()]
  ours = {line[0] for line in lines if any("naclip, last" in cell for cell in line)}
  theirs = {line[0] for line in lines if any("NACLIP ViT-B/16, published" in c for c in line)}
  assert ours == theirs == set(protocols.SETS)
  # Classes have their own names, however many are prompted for them.
  assert "background" in scores["voc21"]["last"]["per_class"]
  assert "person" in scores["coco_object"]["last"]["per_class"]
  assert len(scores["coco_object"]["last"]["per_class"]) == 81


def test_a_protocol_is_refused_before_anything_is_computed(tmp_path):
  config = training_free.get_config("method=sclip,set=all").unlock()
  config.eval.threshold = 0.7
  with pytest.raises(InputError, match=r"eval\.threshold=0\.7 has no effect .* leave it out"):
    run(config.lock(), tmp_path)
