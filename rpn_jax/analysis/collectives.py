"""What a compiled program sends between chips."""

import math
import re

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
BYTES = {"f32": 4, "s32": 4, "u32": 4, "bf16": 2, "f16": 2, "pred": 1, "s8": 1, "u8": 1}


def collectives(program: str) -> dict[str, dict[str, int]]:
  """Kind of operation between chips -> how many a compiled program has, and bytes of results."""
  kinds = "|".join(COLLECTIVES)
  found: dict[str, dict[str, int]] = {}
  for types, kind in re.findall(rf"= (\([^=]*?\)|\S+) ({kinds})(?:-start)?\(", program):
    sizes = [
      BYTES.get(kept, 4) * math.prod(map(int, filter(None, shape.split(","))))
      for kept, shape in re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", types)
    ]
    entry = found.setdefault(kind, {"count": 0, "bytes": 0})
    entry["count"] += 1
    entry["bytes"] += sum(sizes)
  return found
