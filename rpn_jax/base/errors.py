"""The error this package raises when its input, not its code, is at fault."""


class InputError(ValueError):
  """Bad input from a person: a file, a word, a config value.

  The message is one line that says what was expected, what was got, where, and what to do.
  `main.py` prints it without a traceback and exits with code 2.
  """

  def __init__(self, message: str = ""):
    # A path or a name may hold line breaks and a terminal's control characters.
    super().__init__("".join(c if c.isprintable() else repr(c)[1:-1] for c in message))
