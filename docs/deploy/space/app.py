"""The page of `rpn demo` as a hosted Space; MODELS names what is on offer, with commas between."""

import os
import pathlib
import tempfile

from rpn_jax import devices
from rpn_jax.tasks import demo

if __name__ == "__main__":
  names = os.environ.get("MODELS", "shapes,shapes_clip").split(",")
  with devices.runtime(), tempfile.TemporaryDirectory(prefix="rpn_demo_") as root:
    demo.launch(demo.Models(names), pathlib.Path(root), host="0.0.0.0", port=7860)
