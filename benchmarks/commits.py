"""Compares two checkouts: python -m benchmarks.commits --before=FOLDER --rounds=3

Runs the command `costs` of another checkout and of this one alternately, each in its own process,
and prints time and memory of a forward pass and of a training step: the median of each, and the
median over rounds of the ratio (this checkout / the other). The weights are a random ViT-B/16.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile

import numpy as np

from rpn_jax.base.console import progress, table

# File -> arguments of `python -m`; the second one is that of versions up to 0.2.0.
COMMANDS = {
  "rpn_jax/analysis/costs.py": ("rpn_jax", "costs"),
  "rpn_jax/inspect.py": ("rpn_jax.inspect",),
}
MEASUREMENTS = {
  "forward, s": lambda r: r["forward"]["seconds"],
  "forward, temporary MiB": lambda r: r["forward"]["temporary_bytes"] / 2**20,
  "forward, compilation s": lambda r: r["forward"]["seconds_to_compile"],
  "step, s": lambda r: r["train_step"]["seconds"],
  "step, temporary MiB": lambda r: r["train_step"]["temporary_bytes"] / 2**20,
  "step, compilation s": lambda r: r["train_step"]["seconds_to_compile"],
  "process, peak MiB": lambda r: r["peak_bytes"] / 2**20,
}


def measure(folder: pathlib.Path, arguments: list[str]) -> dict:
  """What `costs` reports in a checkout, and the peak memory of its process."""
  module = next(m for file, m in COMMANDS.items() if (folder / file).exists())
  with tempfile.TemporaryDirectory() as home:
    out = pathlib.Path(home) / "costs.json"
    # An empty cache: every process compiles its programs.
    environment = {**os.environ, "HOME": home, "XDG_CACHE_HOME": home}
    command = [sys.executable, "-m", *module, *arguments, f"--json={out}"]
    process = subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
      sys.exit(f"error: {' '.join(command)} in {folder} ended with status {status}")
    return {**json.loads(out.read_text()), "peak_bytes": usage.ru_maxrss * 1024}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--before", type=pathlib.Path, required=True, help="the other checkout")
  parser.add_argument("--config", default="configs/voc.py:preset=released")
  parser.add_argument("--classes", type=int, default=15)
  parser.add_argument("--batch", type=int, default=2)
  parser.add_argument("--rounds", type=int, default=3)
  parser.add_argument("--remat", default="none", choices=("none", "dots", "full"))
  args = parser.parse_args()
  arguments = [
    f"--config={args.config}", "--backbone=b16", f"--classes={args.classes}",
    f"--batch={args.batch}", f"--config.remat={args.remat}",
  ]  # fmt: skip
  checkouts = {"before": args.before, "now": pathlib.Path.cwd()}
  results: dict[str, list[dict]] = {name: [] for name in checkouts}
  with progress(args.rounds * len(checkouts), "measure", "process") as bar:
    for i in range(args.rounds):
      # In alternating order, in case the machine's speed drifts.
      for name in list(checkouts)[:: 1 if i % 2 else -1]:
        results[name].append(measure(checkouts[name], arguments))
        bar.update()
  rows = []
  for label, measurement in MEASUREMENTS.items():
    before, now = (np.array([measurement(r) for r in results[name]]) for name in checkouts)
    rows.append([label, np.median(before), np.median(now), f"{np.median(now / before):.2f}"])
  print(" ".join(arguments))
  print(table(rows, ["", *checkouts, "now / before"], markdown=True))


if __name__ == "__main__":
  main()
