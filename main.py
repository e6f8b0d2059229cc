"""Trains, evaluates or predicts: python main.py --config=configs/shapes.py --workdir=runs/shapes"""

import difflib
import pathlib
import re
import sys

from absl import app, flags
from ml_collections import config_flags

FLAGS = flags.FLAGS
config_flags.DEFINE_config_file("config", None, "Experiment, e.g. configs/shapes.py:preset=paper")
flags.DEFINE_string("workdir", None, "Directory of the run: checkpoints, metrics, pictures")
flags.DEFINE_enum("mode", "train", ("train", "eval", "predict", "classify", "export"), "What to do")
flags.DEFINE_string("image", None, "predict, classify: an image file or a folder")
flags.DEFINE_list("distributed", [], "HOST:PORT,PROCESSES,PROCESS; pods and Slurm need none")
flags.DEFINE_string("classes", None, 'predict, classify: class names, e.g. "red circle, sand"')
flags.DEFINE_bool("quiet", False, "Print nothing but errors")
flags.DEFINE_bool("verbose", False, "Print what the libraries log and compile, and tracebacks")
flags.mark_flags_as_required(["config", "workdir"])


def fail(message: str) -> None:
  print(f"error: {message}", file=sys.stderr)
  sys.exit(2)


def parse_flags(argv):
  """Flags, with one line for what is wrong instead of a traceback or the whole usage text."""
  try:
    rest = FLAGS(argv)
    _ = FLAGS.config.task  # a config file that could not be read complains when it is looked at
    return rest
  except AttributeError as error:
    name = re.findall(r"\w+", str(error))[0].removesuffix("\\nDid")
    path = next(a for a in argv if a.startswith("--config=")).removeprefix("--config=")
    fields = re.findall(r"(\w+) = ", pathlib.Path(path.split(":")[0]).read_text())
    near = difflib.get_close_matches(name, fields, 1, 0.0)[0]
    fail(f"unknown config field {name!r}; did you mean {near!r}?")
  except (flags.Error, OSError, ValueError, TypeError) as error:
    line = [line.strip() for line in str(error).splitlines() if line.strip()][-1]
    fail(re.sub(r"^(ValueError: |\[Errno \d+\] )", "", line))


def run() -> None:
  """Joins data and model. Imports are here so that --help and mistyped flags answer at once."""
  from data_pipelines import datasets
  from rpn_jax import devices
  from rpn_jax.tasks import classify, evaluate, export, predict, pretrain, train

  config, workdir = FLAGS.config, pathlib.Path(FLAGS.workdir)
  with devices.runtime(FLAGS.distributed, config.get("matmul_precision", "default")):
    if config.task == "pretrain":
      pretrain.pretrain(config, workdir, **datasets.captions(config))
    elif FLAGS.mode == "train":
      train.train(config, workdir, datasets.load(config, devices.process()))
    elif FLAGS.mode == "eval":
      evaluate.run(config, workdir, datasets.load_evaluations(config))
    elif FLAGS.mode == "export":
      export.export(config, workdir, datasets.load(config).names)
    else:
      action = {"predict": predict.predict, "classify": classify.classify}[FLAGS.mode]
      action(config, workdir, FLAGS.image, FLAGS.classes)


def main(argv) -> None:
  from rpn_jax.base import console
  from rpn_jax.base.errors import InputError

  if len(argv) > 1:
    fail(f"unexpected argument {argv[1]!r}: every setting is a --flag=value")
  console.set_verbosity(FLAGS.quiet, FLAGS.verbose)
  try:
    run()
    print(console.describe_workdir(FLAGS.workdir))
  except KeyboardInterrupt:
    print("interrupted: the same command goes on with what is done", file=sys.stderr)
    sys.exit(130)
  except (InputError, OSError) as error:  # OSError: a disk or a path, no bug
    if FLAGS.verbose:
      raise
    fail(str(error))


if __name__ == "__main__":
  app.run(main, flags_parser=parse_flags)
