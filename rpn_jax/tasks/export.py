"""The trained prompts of a run as one file: main.py --mode=export."""

import pathlib
from collections.abc import Sequence

import jax

from rpn_jax.base.errors import InputError
from rpn_jax.inference.predictor import open_run
from rpn_jax.weights import prompts_file

FILE_NAME = "prompts.safetensors"


def export(config, workdir, names: Sequence[str]) -> pathlib.Path:
  """Writes the prompts of the newest checkpoint to `prompts.safetensors` in the workdir.

  Args:
    config: config of the run.
    workdir: directory of the run.
    names: names of the training classes.

  Returns:
    The path of the file.

  Raises:
    InputError: the method has no prompts, there is no checkpoint, it was trained on other classes,
      or the file cannot be written.
  """
  predictor, run = open_run(config, workdir)
  if not predictor.network.trainable:
    raise InputError(f"method {config.method!r} has no prompts to export")
  run.check_classes({"names": [*names]})
  step, prompts = predictor.read_prompts(run)["last"]
  path = run.workdir / FILE_NAME
  content = prompts_file.Prompts(prompts, run.fingerprint, run.config.to_dict(), tuple(names), step)
  prompts_file.save(path, content)
  count = sum(x.size for x in jax.tree.leaves(prompts))
  print(f"{count:,} parameters of step {step} in {path} ({path.stat().st_size / 1e6:.1f} MB)")
  return path
