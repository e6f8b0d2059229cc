"""The error the data pipelines raise when data, not code, is at fault."""


class DataError(ValueError):
  """A bad file, layout or label.

  The message is one line that says what was expected, what was got, in which
  file, and what to do. `main.py` prints it without a traceback.
  """

  def __init__(self, message: str = ""):
    # A path or a name may hold line breaks and a terminal's control characters.
    super().__init__("".join(c if c.isprintable() else repr(c)[1:-1] for c in message))
