"""python -m rpn_jax: the command `rpn`, without installing the package."""

import sys

from rpn_jax.cli import main

sys.exit(main())
