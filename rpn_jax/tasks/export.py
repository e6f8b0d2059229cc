"""`--mode=export`: the trained prompts of a run as one file."""

import pathlib
from collections.abc import Sequence

import jax

from rpn_jax.base.errors import InputError
from rpn_jax.weights.prompts_file import NAME, Prompts, save


def export(config, workdir, names: Sequence[str]) -> pathlib.Path:
  """`--mode=export`: the newest checkpoint's prompts as `prompts.safetensors` in the workdir."""
  from rpn_jax.inference.predictor import Experiment

  experiment = Experiment(config, workdir)
  if not experiment.trainable:
    raise InputError(f"method {config.method!r} has no prompts to export")
  step, prompts = experiment.restored_prompts()
  path = experiment.workdir / NAME
  content = Prompts(prompts, experiment.identity["clip"], config.to_dict(), tuple(names), step)
  save(path, content)
  count = sum(int(x.size) for x in jax.tree.leaves(prompts))
  print(f"{count:,} parameters of step {step} in {path} ({path.stat().st_size / 1e6:.1f} MB)")
  return path
