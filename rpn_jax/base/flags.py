"""Flags of commands that take --config; errors are reported in one line."""

import sys
import traceback
from collections.abc import Sequence

from absl import flags

from rpn_jax.base.errors import InputError


def parse(values: flags.FlagValues, argv: Sequence[str]) -> list[str]:
  """Parses `--config=file.py:words`, `--config.FIELD`, and all other defined flags.

  Args:
    values: the defined flags; `config` by `config_flags.DEFINE_config_file`.
    argv: the program's name and its arguments.

  Returns:
    The program's name and the arguments that are not flags.

  Raises:
    InputError: an invalid flag or field, or a config file that is unreadable or raises an error.
  """
  try:
    rest = values(argv)
    _ = values.config.task  # an unreadable config file raises here
  except Exception as error:  # a config file is code and may raise anything
    raise InputError(_explain(error)) from error
  return rest


def parse_or_exit(argv: Sequence[str]) -> list[str]:
  """`parse` for `absl.app.run`: exits with one line and status 2 on errors, with 0 on --help."""
  try:
    return parse(flags.FLAGS, argv)
  except SystemExit:  # absl exits with status 1 on --help
    sys.exit(0)
  except InputError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)


def _explain(error: BaseException) -> str:
  chain = [error]
  while chain[-1].__context__ is not None:
    chain.append(chain[-1].__context__)
  origin = chain[-1]
  if isinstance(origin, InputError):  # ml_collections re-raises it with a traceback as its message
    return str(origin)
  frames = [frame for e in chain for frame in traceback.extract_tb(e.__traceback__)]
  inside = [frame for frame in frames if frame.name in ("<module>", "get_config")]
  if inside:  # an error in the config file
    where = f"{inside[-1].filename}, line {inside[-1].lineno}"
    return f"{where}: {type(origin).__name__}: {origin}"
  if isinstance(error, AttributeError) and isinstance(error.args[0], KeyError):
    error = error.args[0]
  if isinstance(error, KeyError):  # from ml_collections, with a suggestion in a second line
    return f"unknown config field: {'. '.join(error.args[0].splitlines())} See docs/configs.md"
  if isinstance(error, (flags.Error, OSError)):
    return str(error).strip().splitlines()[-1].strip()
  return f"{type(error).__name__}: {error}"
