"""The command rpn convert_vit: a file that is read as CLIP weights, by either naming."""

import pytest
import safetensors.numpy

from rpn_jax.tasks import convert_vit
from rpn_jax.weights import clip_file, plain_vit
from tests import tiny
from tests.weights.checks import same
from tests.weights.test_plain_vit import hf_state, timm_state


@pytest.mark.parametrize("state", [timm_state, hf_state])
def test_command_line(state, tmp_path, monkeypatch, capsys):
  monkeypatch.setenv("HOME", str(tmp_path))
  tiny.save(tmp_path / "clip.safetensors")
  safetensors.numpy.save_file(state(), tmp_path / "vit.safetensors")
  assert (
    convert_vit.main(["~/vit.safetensors", "~/clip.safetensors", "~/out.safetensors", "--heads=1"])
    == 0
  )
  assert f"wrote {tmp_path}/out.safetensors" in capsys.readouterr().out
  config, params = clip_file.load(tmp_path / "out.safetensors")
  clip = clip_file.load(tmp_path / "clip.safetensors")
  want_config, want = plain_vit.join(timm_state(), "vit.safetensors", *clip, heads=1)
  assert config == want_config and config.vision == "vit"
  same(params, want)


def test_files_that_are_missing(tmp_path, capsys):
  tiny.save(tmp_path / "clip.safetensors")
  files = [str(tmp_path / name) for name in ("none", "clip.safetensors", "out")]
  assert convert_vit.main(files) == 2
  assert "does not exist" in capsys.readouterr().err
