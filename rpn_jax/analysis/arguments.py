"""Arguments of the commands that take a config, as main.py does."""

import argparse

import ml_collections
from absl import flags
from ml_collections import config_flags

from rpn_jax.base.errors import InputError


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
    InputError: a config file that cannot be read, an unknown field, a value of the wrong type.
  """
  parser.add_argument(
    "--config", required=True, metavar="FILE[:WORDS]",
    help="experiment, such as configs/voc.py; --config.FIELD=VALUE changes a field",
  )  # fmt: skip
  args, rest = parser.parse_known_args(arguments)
  argv = [parser.prog, f"--config={args.config}", *rest]
  values = flags.FlagValues()  # of its own: others may have defined flags of these names
  config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
  try:
    _, *unexpected = values(argv)
    config = values.config
    _ = config.task  # a config file that could not be read complains when it is looked at
  except AttributeError as error:
    (reason,) = error.args[0].args  # of ml_collections, its suggestion in a second line
    raise InputError(f"unknown config field: {'. '.join(reason.splitlines())}") from None
  except (flags.Error, OSError, ValueError, TypeError) as error:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    raise InputError(lines[-1].removeprefix("ValueError: ")) from None
  if unexpected:
    raise InputError(f"unexpected argument {unexpected[0]!r}: see {parser.prog} --help")
  return args, config
