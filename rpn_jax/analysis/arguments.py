"""Arguments of the commands that take a config, as main.py does."""

import argparse

import ml_collections
from absl import flags

from rpn_jax.base.errors import InputError
from rpn_jax.config import Run, check, complete, declared_class
from rpn_jax.config.flags import check_given, define_config, with_run
from rpn_jax.config.flags import parse as parse_flags


def parse(
  parser: argparse.ArgumentParser, arguments: list[str], *, workdir: bool = False
) -> tuple[argparse.Namespace, ml_collections.ConfigDict]:
  """The arguments of a command with --config=FILE[:WORDS] and --config.field=value among them.

  Args:
    parser: with the command's other arguments.
    arguments: what stands behind the command.
    workdir: the command also takes --workdir, the workdir of a trained run. Then one of the two is
      enough, as for main.py.

  Returns:
    The other arguments, and the locked config.

  Raises:
    InputError: a config file that cannot be read or is not of a segmentation run, an unknown field,
      a wrong value.
  """
  parser.add_argument(
    "--config", required=not workdir, metavar="FILE[:WORDS]",
    help="experiment, such as configs/voc.py, or a run, whose settings are taken; "
    "--config.FIELD=VALUE changes a field",
  )  # fmt: skip
  if workdir:
    parser.add_argument("--workdir", help="of a trained run, whose settings are the config")
    arguments = with_run(arguments)
  args, rest = parser.parse_known_args(arguments)
  if workdir:
    check_given(args.config, args.workdir)
  argv = [parser.prog, f"--config={args.config}", *rest]
  values = flags.FlagValues()  # of its own: others may have defined flags of these names
  define_config(values, argv)
  _, *unexpected = parse_flags(values, argv)
  if unexpected:
    raise InputError(f"unexpected argument {unexpected[0]!r}: see {parser.prog} --help")
  check(values.config)
  if declared_class(values.config) is not Run:
    raise InputError(f"--config={args.config}: expected the config of a segmentation run")
  complete(values.config)
  return args, values.config
