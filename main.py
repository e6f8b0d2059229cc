"""Trains, evaluates or predicts: python main.py --config=configs/shapes.py --workdir=runs/shapes"""

from rpn_jax.base import interrupts

if __name__ == "__main__":
  interrupts.end_at_once()  # while the rest is imported

from absl import app, flags

from rpn_jax.annotations import options
from rpn_jax.base import console, paths
from rpn_jax.base.errors import InputError
from rpn_jax.config import check, complete
from rpn_jax.config.flags import check_modes, define_config, parse_or_exit

define_config(FLAGS := flags.FLAGS)
MODES = ("train", "eval", "predict", "classify", "export", "compile")
flags.DEFINE_string("workdir", None, "Of the run: files, and its settings without --config")
flags.DEFINE_enum("mode", "train", MODES, "What to do")
flags.DEFINE_string("image", None, "predict, classify: an image file or a folder")
flags.DEFINE_list("distributed", [], "HOST:PORT,PROCESSES,PROCESS; none; pods, Slurm are found")
flags.DEFINE_string("classes", None, 'predict (default: of the run), classify: "red circle, sand"')
flags.DEFINE_list("save", list(options.DEFAULT_FORMS), f"predict: of {', '.join(options.FORMS)}")
for name, (default, text) in options.FLAGS.items():
  define = {str: flags.DEFINE_string, int: flags.DEFINE_integer, float: flags.DEFINE_float}
  define[type(default)](name, default, f"predict: {text}")
flags.DEFINE_string("topology", None, "compile: TPUs such as v5e:16x16; none need be there")
flags.DEFINE_bool("find_batch", False, "compile: also the largest batch a chip, for each remat")
flags.DEFINE_string("json", None, "compile: a file that gets the numbers, too")
flags.DEFINE_bool("restart", False, "train: move what is in the workdir aside, begin at step 0")
flags.DEFINE_bool("quiet", False, "Print nothing but errors")
flags.DEFINE_bool("verbose", False, "Print what the libraries log and compile, and tracebacks")


def run(config, workdir) -> None:
  """Joins data and model. Imports are here so that --help and mistyped flags answer at once."""
  from data_pipelines import datasets, registry
  from rpn_jax import devices
  from rpn_jax.config import protocols
  from rpn_jax.tasks import classify, evaluate, export, predict, pretrain, train
  from rpn_jax.weights.clip_file import with_normalization

  # For one machine, also where there are several.
  alone = FLAGS.mode not in ("train", "eval") or config.task == "pretrain"
  with devices.runtime(FLAGS.distributed, config.get("matmul_precision", "default"), alone):
    if config.task == "pretrain":
      pretrain.pretrain(config, workdir, **datasets.captions(config), restart=FLAGS.restart)
    elif FLAGS.mode in ("predict", "classify"):
      given = (config, workdir, FLAGS.image and str(paths.expand(FLAGS.image)), FLAGS.classes)
      if FLAGS.mode == "classify":
        classify.classify(*given)
      else:
        annotations = {name: FLAGS[name].value for name in options.FLAGS}
        predict.predict(*given, FLAGS.save, annotations)
    else:
      config = with_normalization(config)
      if FLAGS.mode == "train":
        data = datasets.load(config, devices.process())
        train.train(config, workdir, data, restart=FLAGS.restart)
      elif FLAGS.mode == "eval":
        evaluations = [d for c in protocols.each(config) for d in datasets.load_evaluations(c)]
        evaluate.evaluate_run(config, workdir, evaluations)
      else:
        license = registry.license_of(config.data.name)
        export.export(config, workdir, datasets.load(config, names_only=True), license)


def command(arguments) -> None:
  """What the flags ask for, once they are checked."""
  if arguments:
    raise InputError(f"unexpected argument {arguments[0]!r}: every setting is a --flag=value")
  check(FLAGS.config)
  check_modes(FLAGS, options.FLAGS)
  complete(FLAGS.config)
  if FLAGS.mode == "compile":
    from data_pipelines import datasets
    from rpn_jax.analysis.compile import compile_run

    return compile_run(FLAGS.config, datasets.load, FLAGS.topology, FLAGS.find_batch, FLAGS.json)
  run(FLAGS.config, paths.expand(FLAGS.workdir))
  print(console.describe_workdir(FLAGS.workdir))


def main(argv) -> int:
  console.set_verbosity(FLAGS.quiet, FLAGS.verbose)
  return console.run_command(
    lambda: command(argv[1:]),
    interrupted="interrupted: the same command continues from what is done",
    verbose=FLAGS.verbose,
  )


if __name__ == "__main__":
  console.use_utf8()
  app.run(main, flags_parser=parse_or_exit)
