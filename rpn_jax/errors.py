"""The error this package raises when its input, not its code, is at fault."""


class InputError(ValueError):
  """Bad input from a person: a file, a word, a config value.

  The message is one line that says what was expected, what was got, where, and what to do.
  `main.py` prints it without a traceback and exits with code 2.
  """
