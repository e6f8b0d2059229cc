"""Flags of a command that takes --config; what is wrong with them is said in one line."""

import sys
import traceback
from collections.abc import Sequence

from absl import flags

from rpn_jax.base.errors import InputError


def parse(values: flags.FlagValues, argv: Sequence[str]) -> list[str]:
  """Parses `--config=file.py:words` and its fields, and whatever other flags are defined.

  Args:
    values: where the flags are defined, `config` by `config_flags.DEFINE_config_file`.
    argv: the program's name and its arguments.

  Returns:
    The program's name and the arguments that are no flags.

  Raises:
    InputError: a wrong flag or field, or a config file that cannot be read or has a fault.
  """
  try:
    rest = values(argv)
    _ = values.config.task  # a file that could not be read complains when it is looked at
  except Exception as error:  # a config file is a program: it may raise anything
    raise InputError(_explain(error)) from error
  return rest


def parse_or_exit(argv: Sequence[str]) -> list[str]:
  """`parse` for `absl.app.run`: one line and status 2 for what is wrong, status 0 after --help."""
  try:
    return parse(flags.FLAGS, argv)
  except SystemExit:  # absl ends --help with status 1
    sys.exit(0)
  except InputError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)


def _explain(error: BaseException) -> str:
  chain = [error]
  while chain[-1].__context__ is not None:
    chain.append(chain[-1].__context__)
  origin = chain[-1]
  if isinstance(origin, InputError):  # ml_collections hands it on with a traceback as its text
    return str(origin)
  frames = [frame for e in chain for frame in traceback.extract_tb(e.__traceback__)]
  inside = [frame for frame in frames if frame.name in ("<module>", "get_config")]
  if inside:  # a fault in the config file
    place = f"{inside[-1].filename}, line {inside[-1].lineno}"
    return f"{place}: {type(origin).__name__}: {origin}"
  if isinstance(error, AttributeError) and isinstance(error.args[0], KeyError):
    error = error.args[0]
  if isinstance(error, KeyError):  # of ml_collections, its suggestion in a second line
    return f"unknown config field: {'. '.join(error.args[0].splitlines())} See docs/configs.md"
  if isinstance(error, (flags.Error, OSError)):
    return str(error).strip().splitlines()[-1].strip()
  return f"{type(error).__name__}: {error}"
