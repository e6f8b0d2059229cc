"""Trains, evaluates or predicts: python main.py --config=configs/shapes.py --workdir=runs/shapes"""

import pathlib
import sys

from absl import app, flags, logging
from ml_collections import config_flags

FLAGS = flags.FLAGS
MODES = ("train", "eval", "predict")

config_flags.DEFINE_config_file("config", None, "Experiment, e.g. configs/shapes.py:preset=paper")
flags.DEFINE_string("workdir", None, "Directory of the run: checkpoints, metrics, pictures")
flags.DEFINE_enum("mode", "train", MODES, "What to do")
flags.DEFINE_string("image", None, "predict: an image file or a folder of images")
flags.DEFINE_string("classes", None, 'predict: class names, e.g. "red circle, sand"')
flags.mark_flags_as_required(["config", "workdir"])


def run() -> None:
  """Joins the data pipelines and the model; everything else is in their packages."""
  # Imported here: --help and mistyped flags should answer at once.
  from data_pipelines import datasets
  from rpn_jax import evaluate, predict, pretrain, train

  config, workdir = FLAGS.config, pathlib.Path(FLAGS.workdir)
  if config.task == "pretrain":
    pretrain.pretrain(config, workdir, **datasets.captions(config))
  elif FLAGS.mode == "train":
    train.train(config, workdir, datasets.load(config))
  elif FLAGS.mode == "eval":
    evaluate.run(config, workdir, datasets.load(config))
  else:
    predict.predict(config, workdir, FLAGS.image, FLAGS.classes, datasets.image_loader(config))


def main(argv) -> None:
  from data_pipelines.errors import DataError
  from rpn_jax.errors import InputError

  if len(argv) > 1:
    raise app.UsageError(f"unexpected argument {argv[1]!r}: every setting is a --flag")
  if FLAGS.mode == "predict" and not (FLAGS.image and FLAGS.classes):
    raise app.UsageError('--mode=predict needs --image=FILE_OR_FOLDER and --classes="a, b"')
  logging.set_verbosity(logging.WARNING)
  try:
    run()
  except (InputError, DataError) as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
  app.run(main)
