"""Data sets, transforms and input pipelines; never imports rpn_jax."""
