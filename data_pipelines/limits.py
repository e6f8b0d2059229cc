"""Sizes beyond which a label or text file is refused before it is read whole."""

from rpn_jax.base.pixels import MAX_PIXELS

MAX_TEXT_BYTES = 16 << 20
# What a MATLAB label file unfolds to.
MAX_MATRIX_BYTES = 2 * MAX_PIXELS
