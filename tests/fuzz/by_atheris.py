"""Coverage-guided fuzzing by hand, of one reader: it goes on until it finds something.

    pip install atheris
    python -m tests.fuzz.by_atheris pickles -max_total_time=600

Readers: pickles, safetensors, matlab, pictures. What follows is for libFuzzer.
"""

import io
import sys
import tempfile
import zipfile
import zlib

import atheris

with atheris.instrument_imports(include=["rpn_jax", "data_pipelines", "pickle"]):
  from data_pipelines import pipeline
  from data_pipelines.sources import matlab
  from rpn_jax.base.errors import InputError
  from rpn_jax.weights import clip_file, torch_archive


def by_file(read):
  def target(content: bytes) -> None:
    with tempfile.NamedTemporaryFile() as file:
      file.write(content)
      file.flush()
      read(file.name)

  return target


def pickles(content: bytes) -> None:
  file = io.BytesIO()
  with zipfile.ZipFile(file, "w") as archive:
    archive.writestr("m/data.pkl", content)
    archive.writestr("m/data/0", b"\0" * 64)
  by_file(torch_archive.read)(file.getvalue())


def read_matlab(content: bytes) -> None:
  matlab.read(b" " * 126 + b"IM" + content, "GTcls.Segmentation")


def pictures(content: bytes) -> None:
  pipeline.check_example({"image": content, "id": "x"})


READERS = {
  "pickles": (pickles, InputError),
  "safetensors": (by_file(clip_file.load), InputError),
  "matlab": (read_matlab, (ValueError, zlib.error)),
  "pictures": (pictures, InputError),
}


def main() -> None:
  read, own = READERS[sys.argv.pop(1)]

  def target(content: bytes) -> None:
    try:
      read(content)
    except own as error:
      assert "\n" not in str(error)

  atheris.Setup(sys.argv, target)
  atheris.Fuzz()


if __name__ == "__main__":
  main()
