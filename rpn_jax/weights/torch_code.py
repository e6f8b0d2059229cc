"""What the code in a TorchScript archive tells of the model; it is searched, never run."""

import re
import zipfile
import zlib
from typing import NamedTuple

# That of a CLIP is less than a megabyte.
_MAX_CODE_BYTES = 4 << 20


class Code(NamedTuple):
  """What the code of a TorchScript archive tells of the model.

  Attributes:
    activation: "quick_gelu", which is x * sigmoid(1.702 x), or "gelu", the exact one; None where
      the code has neither or both, or where there is no code.
    tanh: whether GELU is approximated.
    epsilons: of layer norms.
  """

  activation: str | None = None
  tanh: bool = False
  epsilons: frozenset[float] = frozenset()


def read(path) -> Code:
  """What a text search in the code finds, in an archive that may be damaged."""
  try:
    with zipfile.ZipFile(path) as archive:
      files = [x for x in archive.infolist() if re.search(r"/code/.*\.py$", x.filename)]
      if sum(info.file_size for info in files) > _MAX_CODE_BYTES:
        return Code()
      text = b"\n".join(map(archive.read, files))
  except (zipfile.BadZipFile, OSError, NotImplementedError, zlib.error):
    return Code()
  calls = set(re.findall(rb"torch\.(gelu|sigmoid)\(", text))
  names = {b"gelu": "gelu", b"sigmoid": "quick_gelu"}
  # Behind the shape, the scale and the bias of a layer norm.
  numbers = map(float, re.findall(rb"\], [\w.]+, [\w.]+, (\d\.?\d*e-\d+)\b", text))
  return Code(
    names[calls.pop()] if len(calls) == 1 else None,
    re.search(rb"torch\.gelu\([^)]*tanh", text) is not None,
    frozenset(float(f"{number:.6g}") for number in numbers),
  )
