"""Flags of commands that take --config; errors are reported in one line."""

import re
import sys
import traceback
from collections.abc import Iterable, Sequence

from absl import flags
from ml_collections import config_dict, config_flags

from rpn_jax.base import fields
from rpn_jax.base.errors import InputError
from rpn_jax.base.paths import expand
from rpn_jax.config import Run
from rpn_jax.config.stored import CONFIG, read_config

# The modes of main.py that a flag is for, of those that are not for all.
OF_MODES = {
  "image": ("predict", "classify"),
  "classes": ("predict", "classify"),
  "save": ("predict",),
  "topology": ("compile",),
  "find_batch": ("compile",),
  "json": ("compile",),
  "restart": ("train",),
}
# Modes of main.py that read and write no run.
WITHOUT_WORKDIR = ("compile",)

flags.disclaim_key_flags()  # --config is listed by --help of the program that defines it


class _Parser(flags.ArgumentParser):
  """Reads the settings in the workdir of a run, and leaves files to the parser of config files."""

  def __init__(self, files: flags.ArgumentParser):
    self._files = files

  def parse(self, argument: str) -> config_dict.ConfigDict:
    folder = expand(argument)
    return read_config(folder).lock() if folder.is_dir() else self._files.parse(argument)


def define_config(values: flags.FlagValues, argv: Sequence[str] | None = None) -> None:
  """Defines `--config=FILE:WORDS`, or `--config=RUN`, and `--config.FIELD`.

  Args:
    values: where the flag is defined.
    argv: what will be parsed; None: the command line of the process.
  """
  text = "Experiment, e.g. configs/shapes.py:preset=paper, or a run whose settings are taken"
  config_flags.DEFINE_config_file("config", None, text, values, sys_argv=argv)
  values["config"].parser = _Parser(values["config"].parser)


def parse(values: flags.FlagValues, argv: Sequence[str]) -> list[str]:
  """Parses `--config=file.py:words`, `--config.FIELD`, and all other defined flags.

  Args:
    values: the defined flags; `config` by `define_config`, and for `with_run` also `workdir`.
    argv: the program's name and its arguments.

  Returns:
    The program's name and the arguments that are not flags.

  Raises:
    InputError: no config or workdir, an invalid flag or field, or a config file that is unreadable
      or raises an error.
  """
  try:
    program, *arguments = argv
    rest = values([program, *(with_run(arguments) if "workdir" in values else arguments)])
    mode = values["mode"].value if "mode" in values else ""
    if "workdir" in values and mode not in WITHOUT_WORKDIR:
      check_given(values["config"].value, values.workdir)
    _ = values.config.task  # an unreadable config file raises here
    if "optimizer.steps" in config_flags.get_override_values(values["config"]):
      raise InputError("config.optimizer.steps follows config.steps: set that one")
  except Exception as error:  # a config file is code and may raise anything
    raise InputError(_explain(error, argv)) from error
  return rest


def check_modes(values: flags.FlagValues, of_predict: Iterable[str]) -> None:
  """Checks that no flag is given which the mode would pass over.

  Args:
    values: the flags of main.py.
    of_predict: more flags that are for --mode=predict.

  Raises:
    InputError: there is one, or a config of pre-training with another mode than its own.
  """
  for name, modes in {**OF_MODES, **dict.fromkeys(of_predict, ("predict",))}.items():
    if values[name].present and values.mode not in modes:
      raise InputError(
        f"--{name} is for --mode={' and '.join(modes)}, got --mode={values.mode}: leave out one of "
        "both"
      )
  config = values.config
  if values.mode != "train" and config.get("task") == "pretrain":
    raise InputError(
      f"the config of a pre-training is for --mode=train, got --mode={values.mode}: leave out one "
      "of both"
    )
  if values.mode == "train" and config.get("prompts"):
    raise InputError(
      f"config.prompts={config.prompts} is for evaluation and prediction, and training begins with "
      "prompts of its own: leave it out"
    )


def with_run(arguments: Sequence[str]) -> list[str]:
  """The arguments with both --config and --workdir, where one of them is a run.

  The run in a workdir has its settings, and one that is given as the config is its own workdir.
  """
  config, workdir = (_value(arguments, name) for name in ("config", "workdir"))
  if config is None and workdir and (expand(workdir) / CONFIG).is_file():
    return [f"--config={workdir}", *arguments]
  if workdir is None and config and (expand(config) / CONFIG).is_file():
    return [f"--workdir={config}", *arguments]
  return list(arguments)


def check_given(config: object, workdir: str | None) -> None:
  """Checks that both flags have a value, after `with_run`.

  Raises:
    InputError: one has none.
  """
  if not workdir:
    raise InputError("expected --workdir=FOLDER, a new one or that of a run")
  if not config:
    raise InputError(
      f"expected --config=FILE, such as configs/shapes.py: only where --workdir is that of a run "
      f"can it be left out, and {workdir} has no {CONFIG}"
    )


def _about_fields(arguments: Sequence[str]) -> str:
  """What is wrong with a --config.FIELD that is not declared, if the declarations tell; else ""."""
  known = fields.declared(Run)
  single = {name: field for name, field in known.items() if not fields.is_section(field)}
  given = (re.match(r"--?(?:no)?config\.([^=]+)", argument) for argument in arguments)
  for path in [match[1] for match in given if match and match[1] not in known]:
    if name := next((name for name in single if path.startswith(f"{name}.")), ""):
      return (
        f"--config.{path}: config.{name} is one value without fields, to be given as a whole, "
        f'such as --config.{name}="{single[name].default}"'
      )
    section, _, word = path.rpartition(".")
    for name, field in single.items():  # as "antialias", which config.data.recipe is about
      about = fields.spec(field).comment
      if name.rpartition(".")[0] == section and re.search(rf"\b{re.escape(word)}\b", about):
        return f"unknown config field: {path!r}. See config.{name}: {about}"
  return ""


def _value(arguments: Sequence[str], name: str) -> str | None:
  """The value of a flag among arguments, as --name=value or --name value; None without one."""
  for i, argument in enumerate(arguments):
    flag, equals, value = argument.partition("=")
    if flag.startswith("-") and flag.lstrip("-") == name:
      return value if equals else "".join(arguments[i + 1 : i + 2])
  return None


def parse_or_exit(argv: Sequence[str]) -> list[str]:
  """`parse` for `absl.app.run`: exits with one line and status 2 on errors, with 0 on --help."""
  try:
    return parse(flags.FLAGS, argv)
  except SystemExit:  # absl exits with status 1 on --help
    sys.exit(0)
  except InputError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)


def _explain(error: BaseException, arguments: Sequence[str]) -> str:
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
  suggested = "Did you mean" in str(error) or isinstance(error, (flags.Error, OSError))
  if not suggested and (about := _about_fields(arguments)):
    return about
  if isinstance(error, KeyError):  # from ml_collections, with a suggestion in a second line
    return f"unknown config field: {'. '.join(error.args[0].splitlines())} See docs/configs.md"
  if isinstance(error, (flags.Error, OSError)):
    return str(error).strip().splitlines()[-1].strip()
  return f"{type(error).__name__}: {error}"
