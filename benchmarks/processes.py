"""Measurements in processes of their own, for their peak memory."""

import json
import resource
import subprocess
import sys

import jax


def run(command: list[str]) -> dict | None:
  """What the last line of a command's output says as JSON; None if it failed, which is printed."""
  done = subprocess.run(command, capture_output=True, text=True)
  if done.returncode:
    print(f"{' '.join(command)} failed:\n{done.stderr[-1500:]}", file=sys.stderr)
    return None
  return json.loads(done.stdout.strip().splitlines()[-1])


def best(results: list[dict | None]) -> dict | None:
  """The fastest one."""
  results = [r for r in results if r]
  return min(results, key=lambda r: r["seconds"]) if results else None


def peak_bytes() -> int:
  """Peak memory of the device, or of this process where the device is the CPU."""
  own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
    1 if sys.platform == "darwin" else 1024
  )
  return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", own)
