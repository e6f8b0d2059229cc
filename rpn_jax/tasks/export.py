"""The trained prompts of a run as one file: main.py --mode=export."""

import pathlib
from collections.abc import Sequence

import jax

from rpn_jax.base.errors import InputError
from rpn_jax.inference.predictor import Experiment
from rpn_jax.weights import prompts_file

FILE_NAME = "prompts.safetensors"


def export(config, workdir, names: Sequence[str]) -> pathlib.Path:
  """Writes the prompts of the newest checkpoint to `prompts.safetensors` in the workdir.

  Args:
    config: of the run.
    workdir: of the run.
    names: of the classes it was trained on.

  Returns:
    The file written.

  Raises:
    InputError: a method without prompts, no checkpoint, or a file that cannot be written.
  """
  experiment = Experiment(config, workdir)
  if not experiment.trainable:
    raise InputError(f"method {config.method!r} has no prompts to export")
  step, prompts = experiment.restored_prompts()
  path = experiment.workdir / FILE_NAME
  fingerprint = experiment.identity["clip"]
  content = prompts_file.Prompts(prompts, fingerprint, config.to_dict(), tuple(names), step)
  prompts_file.save(path, content)
  count = sum(int(x.size) for x in jax.tree.leaves(prompts))
  print(f"{count:,} parameters of step {step} in {path} ({path.stat().st_size / 1e6:.1f} MB)")
  return path
