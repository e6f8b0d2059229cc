"""What a network costs, as the command prints and writes it."""

import json
import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parent.parent
# Compilation is most of the time here, and speed is nothing.
FAST = {**os.environ, "XLA_FLAGS": "--xla_backend_optimization_level=0"}


def run(*arguments):
  command = [sys.executable, "-m", "rpn_jax.inspect", *arguments]
  return subprocess.run(command, cwd=ROOT, env=FAST, capture_output=True, text=True)


def test_the_shipped_network(tmp_path):
  path = tmp_path / "cost.json"
  done = run("--config=configs/shapes.py", "--classes=5", "--batch=2", f"--json={path}")
  assert done.returncode == 0, done.stderr
  result = json.loads(path.read_text())
  parts = result["parameters"]
  assert parts["trained"] == sum(n for k, n in parts.items() if k.startswith("prompts/")) == 75615
  assert "75,615" in done.stdout and "prompts/m2oe" in done.stdout
  forward, step = result["forward"], result["train_step"]
  # Patches, blocks and projections alone: 2 operations for every weight and token.
  weights_in_blocks = 12 * 128**2 * 6
  assert forward["flops_per_image"] > 2 * 64 * weights_in_blocks
  assert 1.5 < step["flops"] / forward["flops"] < 4
  for cost in (forward, step):
    assert cost["images_per_second"] > 0 and cost["temporary_bytes"] > 0
  assert (result["classes"], result["batch"], result["side"]) == (5, 2, 64)


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
