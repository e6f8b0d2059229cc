"""What a network costs, as the command prints and writes it."""

import json
import pathlib
import subprocess
import sys

from tests import tiny

ROOT = pathlib.Path(__file__).parent.parent


def run(*arguments):
  command = [sys.executable, "-m", "rpn_jax.inspect", *arguments]
  return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_a_small_network(tmp_path):
  path, weights = tmp_path / "cost.json", tmp_path / "clip.safetensors"
  tiny.save(weights)
  flags = (*tiny.FLAGS, f"--config.clip={weights}")
  done = run("--config=configs/shapes.py", *flags, "--classes=5", "--batch=2", f"--json={path}")
  assert done.returncode == 0, done.stderr
  result = json.loads(path.read_text())
  parts = result["parameters"]
  assert parts["trained"] == sum(n for k, n in parts.items() if k.startswith("prompts/")) == 1059
  assert "1,059" in done.stdout and "prompts/m2oe" in done.stdout
  forward, step = result["forward"], result["train_step"]
  # Patches, blocks and projections alone: 2 operations for every weight and token.
  weights_in_blocks = 12 * tiny.TINY.vision_width**2 * tiny.TINY.vision_layers
  assert forward["flops_per_image"] > 2 * 16 * weights_in_blocks
  assert 1.5 < step["flops"] / forward["flops"] < 4
  for cost in (forward, step):
    assert cost["images_per_second"] > 0 and cost["temporary_bytes"] > 0
  assert (result["classes"], result["batch"], result["side"]) == (5, 2, 32)


def test_wrong_words_are_named():
  for arguments, message in (
    (["attention"], "attention needs --workdir, --image and"),
    (["attenton"], "unexpected 'attenton': expected attention or distance"),
    (["--classes=a"], "expected how many classes are prompted, got 'a'"),
  ):
    done = run(*arguments, "--config=configs/shapes.py")
    assert done.returncode == 2 and message in done.stderr, done.stderr


def test_missing_weights_are_named():
  done = run("--config=configs/voc.py")
  lines = done.stderr.strip().splitlines()
  assert done.returncode == 2 and len(lines) == 1
  assert "ViT-B-16.safetensors: no such file; give --backbone=b16" in lines[0]
