"""python -m rpn_jax: the command `rpn`, without installing the package."""

import sys

from rpn_jax.base import interrupts

if __name__ == "__main__":
  interrupts.end_at_once()  # while the rest is imported

from rpn_jax.cli import main

sys.exit(main())
