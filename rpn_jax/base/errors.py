"""The error that is raised for invalid input, as opposed to bugs."""


class InputError(ValueError):
  """Invalid user input: a file, a word, a config value.

  The message is one line: what was expected, what was found, where, and what to do. Commands print
  it without a traceback and exit with status 2.
  """

  def __init__(self, message: str = ""):
    # Paths and names may contain line breaks and terminal control characters.
    super().__init__("".join(c if c.isprintable() else repr(c)[1:-1] for c in message))
