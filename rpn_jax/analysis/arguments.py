"""Arguments of the commands that take a config, as main.py does."""

import argparse

import ml_collections
from absl import flags
from ml_collections import config_flags

from rpn_jax.base.errors import InputError
from rpn_jax.base.flags import parse as parse_flags
from rpn_jax.config import check, expand_paths


def parse(
  parser: argparse.ArgumentParser, arguments: list[str]
) -> tuple[argparse.Namespace, ml_collections.ConfigDict]:
  """The arguments of a command with --config=FILE[:WORDS] and --config.field=value among them.

  Args:
    parser: with the command's other arguments.
    arguments: what stands behind the command.

  Returns:
    The other arguments, and the locked config.

  Raises:
    InputError: a config file that cannot be read, an unknown field, a wrong value.
  """
  parser.add_argument(
    "--config", required=True, metavar="FILE[:WORDS]",
    help="experiment, such as configs/voc.py; --config.FIELD=VALUE changes a field",
  )  # fmt: skip
  args, rest = parser.parse_known_args(arguments)
  argv = [parser.prog, f"--config={args.config}", *rest]
  values = flags.FlagValues()  # of its own: others may have defined flags of these names
  config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
  _, *unexpected = parse_flags(values, argv)
  if unexpected:
    raise InputError(f"unexpected argument {unexpected[0]!r}: see {parser.prog} --help")
  check(values.config)
  expand_paths(values.config)
  return args, values.config
