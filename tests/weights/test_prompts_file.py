"""Files of prompts: what is saved is loaded; another kind, damage and other networks refused."""

import json

import numpy as np
import pytest
import safetensors.numpy

from rpn_jax.weights import prompts_file
from tests.weights.checks import one_line, same

TREE = {
  "h": np.arange(8, dtype=np.float32).reshape(4, 2),
  "head": {"bias": np.ones(3, np.float32), "scale": np.float32(2)},
}
CONFIG = {
  "method": "rpn", "model": {"tuner": "rpn", "h_grid": [2, 2]}, "templates": "single", "steps": 8,
  "loss": {"name": "sigmoid"},
}  # fmt: skip
CONTENT = prompts_file.Prompts(TREE, "0" * 16, CONFIG, ("sea, océan", "sky"), 8)


def test_what_is_saved_is_loaded(tmp_path):
  path = tmp_path / "x.safetensors"
  prompts_file.save(path, CONTENT)
  again = prompts_file.load(path)
  same(again.prompts, TREE)
  assert again.prompts["head"]["scale"].shape == ()
  assert again[1:] == CONTENT[1:]
  assert list(tmp_path.iterdir()) == [path]


def test_files_that_are_not_prompts(tmp_path):
  path = tmp_path / "x.safetensors"
  header = {"clip": "", "config": "{}", "names": "[]", "step": "0"}
  good = {"format": prompts_file.FORMAT, "version": "1", **header}
  one_line("does not exist", prompts_file.load, path)
  for changes, match in (
    ({"format": "rpn_jax.clip"}, "of another kind"),
    ({"version": "2"}, "version 1 of prompts, got '2'"),
    ({"config": "[]"}, "config and names"),
    ({"names": "[3]"}, "config and names"),
    ({"step": "some"}, "config and names"),
  ):
    path.write_bytes(safetensors.numpy.save({"h": TREE["h"]}, {**good, **changes}))
    assert str(path) in one_line(match, prompts_file.load, path)
  for arrays, match in (
    ({"h": np.full(2, np.nan, np.float32)}, r"2 of the 2 values of 'h' are NaN or infinite"),
    ({"h": TREE["h"], "h/x": TREE["h"], "h-x": TREE["h"]}, "its names clash"),
    ({"a/b": TREE["h"], "a": TREE["h"].astype(np.float16)}, "its names clash"),
    ({"/".join("a" * 2000): TREE["h"]}, "at most 64 parts"),
    ({"h": np.zeros(2, np.int64)}, "'h' is int64"),
  ):
    path.write_bytes(safetensors.numpy.save(arrays, good))
    assert str(path) in one_line(match, prompts_file.load, path)


def test_a_failed_save_leaves_the_old_file(tmp_path):
  path = tmp_path / "x.safetensors"
  path.write_text("old")
  broken = CONTENT._replace(prompts={"h": np.full(2, np.inf)})
  one_line("finite numbers in h, got infinity", prompts_file.save, path, broken)
  one_line("cannot write", prompts_file.save, tmp_path / "no/x.safetensors", CONTENT)
  assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
  ("changes", "match"),
  [
    ({"clip": "1" * 16}, f"around the CLIP weights {'1' * 16}, config.clip has {'0' * 16}"),
    ({"config": {**CONFIG, "templates": "zegclip15"}}, "templates: zegclip15 -> single"),
    ({"config": {**CONFIG, "loss": {"name": "softmax"}}}, "loss.name: softmax -> sigmoid"),
    ({"config": {**CONFIG, "model": {"tuner": "vpt"}}}, r"model\.tuner: vpt -> rpn"),
    ({"prompts": {**TREE, "h": np.zeros((4, 3))}}, r"h: \(4, 3\) -> \(4, 2\)"),
    ({"prompts": {"h": TREE["h"]}}, "head/bias: None -> "),
  ],
)
def test_networks_that_do_not_fit(changes, match):
  config = {**CONFIG, "model": {"tuner": "rpn", "h_grid": (2, 2)}}
  content, like = CONTENT._replace(**changes), lambda: TREE
  assert "x.st" in one_line(match, prompts_file.check, content, "x.st", config, "0" * 16, like)


@pytest.mark.parametrize(
  "changes",
  [
    {},
    {"clip": ""},
    {"config": {}},
    {"config": {**CONFIG, "steps": 9}},
    {"config": json.loads(json.dumps({"model": {"h_grid": [2, 2]}}))},
  ],
)
def test_what_a_file_does_not_know_is_not_compared(changes):
  config = {**CONFIG, "model": {"tuner": "rpn", "h_grid": (2, 2)}}
  prompts_file.check(CONTENT._replace(**changes), "x.st", config, "0" * 16, lambda: TREE)


def test_a_network_is_asked_for_its_arrays_once(monkeypatch):
  config = {**CONFIG, "model": {"tuner": "rpn", "h_grid": (2, 2)}}
  asked = []

  def like():
    asked.append(1)
    return TREE

  content = CONTENT._replace(prompts={**TREE, "h": np.full((4, 2), 7.0)})
  for _ in range(2):
    prompts_file.check(content, "x.st", config, "0" * 16, like)
  assert len(asked) == 1
  # Of other arrays, other CLIP weights or other settings nothing is noted.
  other = content._replace(prompts={**content.prompts, "h": np.full((4, 3), 7.0)})
  one_line(r"h: \(4, 3\) -> \(4, 2\)", prompts_file.check, other, "x", config, "0" * 16, like)
  content = content._replace(clip="", config={})
  prompts_file.check(content, "x.st", config, "1" * 16, like)
  prompts_file.check(content, "x.st", {**config, "model": {"tuner": "vpt"}}, "0" * 16, like)
  assert len(asked) == 4
  monkeypatch.setattr(prompts_file, "cache_dir", lambda: None)
  prompts_file.check(content, "x.st", config, "1" * 16, like)
  assert len(asked) == 5
