"""Seconds until the first picture: `rpn segment` of the shipped scene, a process for each call.

    python -m benchmarks.first_picture --rounds=3

Each round begins with an empty cache folder: its first call compiles everything, the others find
programs and text embeddings of the first one.
"""

import argparse
import os
import pathlib
import subprocess
import sys
import tempfile
import time

import numpy as np

from rpn_jax.base.console import progress, table
from rpn_jax.tasks.demo import SCENE, SCENE_WORDS

CALLS = ("nothing kept", "warm", "warm")


def call(folder: pathlib.Path, dtype: str) -> float:
  """Wall seconds of one call that keeps programs in `folder` and writes its pictures there."""
  command = [sys.executable, "-m", "rpn_jax", "segment", str(SCENE), SCENE_WORDS]
  with tempfile.TemporaryDirectory() as out:
    began = time.perf_counter()
    subprocess.run(
      [*command, f"--dtype={dtype}", f"--out={out}"],
      check=True,
      capture_output=True,
      env={**os.environ, "XDG_CACHE_HOME": str(folder)},
    )
    return time.perf_counter() - began


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--rounds", type=int, default=3)
  parser.add_argument("--dtype", default="auto", help="as in `rpn segment`")
  args = parser.parse_args()
  seconds: dict[str, list[float]] = {name: [] for name in CALLS}
  for _ in progress(range(args.rounds), "bench", "round"):
    with tempfile.TemporaryDirectory() as folder:
      for name in CALLS:
        seconds[name].append(call(pathlib.Path(folder), args.dtype))
  rows = [
    [name, f"{np.median(times):.2f}", f"{min(times):.2f}", f"{max(times):.2f}"]
    for name, times in seconds.items()
  ]
  print(table(rows, ["first picture", "median s", "fastest s", "slowest s"], markdown=True))


if __name__ == "__main__":
  main()
