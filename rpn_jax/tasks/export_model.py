"""A model as a file for programs that do not have this package: ONNX, StableHLO; or its prompts.

    python -m rpn_jax export shapes --words="plain yellow, sand, water" --to=onnx

The last form, safetensors, is what main.py --mode=export writes of a run, for this package.
"""

import argparse
import importlib.util
import json
import os
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from rpn_jax import devices
from rpn_jax.base.errors import InputError
from rpn_jax.base.paths import expand, replacing, write_json
from rpn_jax.base.words import check_known, parse_names
from rpn_jax.config import check, complete
from rpn_jax.config.stored import read_config
from rpn_jax.inference import onnx_model
from rpn_jax.inference.segmenter import Segmenter
from rpn_jax.inference.standalone import DTYPES, OPEN, Standalone, as_texts, standalone
from rpn_jax.tasks import export
from rpn_jax.weights import checkpoints
from rpn_jax.weights.clip_file import with_normalization

# Form -> packages it needs besides those of this one.
FORMS: dict[str, tuple[str, ...]] = {
  "stablehlo": ("flatbuffers==25.12.19",),
  "onnx": ("onnx==1.23.2", "onnxruntime==1.32.0"),
  "safetensors": (),
}
PLATFORMS = ("cpu", "cuda", "tpu")
# Of the largest logit: what a float32 program may differ by from JAX.
TOLERANCE = 1e-4


def main(arguments: list[str], load_data: Callable | None = None) -> int:
  """The command `rpn export`; `load_data`, (config) -> (data, license), is that of a clone."""
  parser = argparse.ArgumentParser(prog="rpn export", description=__doc__.splitlines()[0])
  add = parser.add_argument
  add("model", help="what --model of `rpn segment` takes; for safetensors the workdir of a run")
  add("--to", required=True, metavar="FORM", help="onnx, stablehlo or safetensors")
  add("--words", help='class names, as of `rpn segment`: "a dog, grass"')
  add("--text-input", action="store_true", help="text embeddings are an input, beside the image")
  add("--out", help="file to write (the model's name, with the form as its ending)")
  add("--size", help="HEIGHT,WIDTH of the images in pixels, or any (the model's windows)")
  add("--batch", help="number of images, or any (onnx: any; stablehlo: 1)")
  add("--dtype", default="float32", help="float32, bfloat16 or float16 (%(default)s)")
  add("--method", help="as of `rpn segment`")
  add("--clip", help="CLIP weights of a trained model, if they are not found where it says")
  add("--checkpoint", default="last", choices=("last", "best"), help="of a run")
  add("--templates", help="sentences around a name, e.g. single or imagenet80")
  add("--synonyms", help="how synonyms are joined: first, mean or joined")
  args = parser.parse_args(arguments)
  check_known("--to=", args.to, FORMS)
  check_known("--dtype=", args.dtype, DTYPES)
  with devices.runtime():
    if args.to == "safetensors":
      _export_prompts(args, load_data)
    else:
      _export_program(args)
  return 0


def _export_prompts(args: argparse.Namespace, load_data: Callable | None) -> None:
  """What main.py --mode=export does."""
  given = {"words", "text_input", "out", "size", "batch", "method", "templates", "synonyms", "clip"}
  if unused := sorted(name for name in given if getattr(args, name)):
    raise InputError(
      f"--{unused[0].replace('_', '-')} is for programs: --to=safetensors writes the prompts of a "
      "run to its workdir, leave it out"
    )
  workdir = expand(args.model)
  config = read_config(workdir)
  check(config)
  complete(config)
  config = with_normalization(config)
  assert load_data is not None
  export.export(config.lock(), workdir, *load_data(config))


def _export_program(args: argparse.Namespace) -> None:
  missing = [p for p in FORMS[args.to] if importlib.util.find_spec(p.partition("==")[0]) is None]
  if missing:
    raise InputError(
      f"--to={args.to} needs packages that are not installed: pip install {' '.join(missing)}"
    )
  names = parse_names(args.words) if args.words else ()
  if not names and not args.text_input:
    raise InputError('expected --words="a dog, grass", or --text-input to give their text later')
  size = _parse_size(args.size)
  batch = _parse_batch(args.batch or (OPEN if args.to == "onnx" else "1"))
  if args.to == "onnx" and size == OPEN:
    raise InputError("--size=any: an ONNX file is of one size here, expected HEIGHT,WIDTH")
  path = expand(args.out or f"{_file_name(args.model)}.{args.to}")
  written = _written(path, text_input=bool(names) and args.text_input)
  segmenter = Segmenter.load(
    args.model, method=args.method, templates=args.templates, synonyms=args.synonyms,
    checkpoint=args.checkpoint, clip=args.clip,
  )  # fmt: skip
  model = standalone(
    segmenter, names, size=size, batch=batch, dtype=args.dtype, text_input=args.text_input,
    several_platforms=args.to == "stablehlo",
  )  # fmt: skip
  content, run = {"onnx": to_onnx, "stablehlo": to_stablehlo}[args.to](model)
  difference = _compare(model, run, args.dtype)
  write_json(written[1], model.metadata)
  with replacing(path) as new:
    new.write_bytes(content)
  if model.text is not None and len(written) > 2:
    with replacing(written[2]) as new, new.open("wb") as file:
      np.save(file, model.text)
  print(f"{segmenter.method}: {', '.join(map(str, written))}, {len(content) / 1e6:.1f} MB")
  print(difference)


def _file_name(model: str) -> str:
  """A model's name as that of a file: a folder's own, a file's without its ending, ViT-B-16."""
  path = expand(model)
  if not path.exists() and (public := checkpoints.find(model)):
    return public.slug
  name = pathlib.PurePath(os.path.abspath(path))  # of "." it is that of the folder
  return name.stem if path.is_file() else name.name


def _written(path: pathlib.Path, *, text_input: bool) -> list[pathlib.Path]:
  """The files of a program: itself, metadata, and of words that are an input their text.

  Raises:
    InputError: a path that cannot be written, or one of a file that no export wrote.
  """
  if path.is_dir() or not path.parent.is_dir():
    raise InputError(f"--out={path}: expected a file to write, in a folder that exists")
  if path.suffix.lower() in (".json", ".npy"):
    raise InputError(
      f"--out={path}: expected another ending, since {path.suffix} is that of a file which is "
      "written beside the program; name it .onnx or .stablehlo"
    )
  beside = [path.with_suffix(suffix) for suffix in (".json", ".npy")[: 1 + text_input]]
  ours = _is_metadata(beside[0])
  for other in beside:
    if other.exists() and not ours:
      raise InputError(
        f"--out={path}: would replace {other}, which is not of an exported program; rename one"
      )
  return [path, *beside]


def _is_metadata(path: pathlib.Path) -> bool:
  try:
    content = json.loads(path.read_text(encoding="utf-8"))
  except (OSError, ValueError):
    return False
  return isinstance(content, dict) and {"model", "names", "patch", "activation"} <= {*content}


def _parse_size(text: str | None) -> tuple[int, int] | str | None:
  if text is None or text == OPEN:
    return text
  height, comma, width = text.partition(",")
  if not (height.strip().isdecimal() and comma and width.strip().isdecimal()):
    raise InputError(f"--size={text}: expected HEIGHT,WIDTH in pixels, such as 512,512, or any")
  return int(height), int(width)


def _parse_batch(text: str) -> int | str:
  if text == OPEN:
    return text
  if not text.isdecimal() or not int(text):
    raise InputError(f"--batch={text}: expected a number of images from 1 on, or any")
  return int(text)


def to_onnx(model: Standalone) -> tuple[bytes, Callable]:
  """The ONNX file of a model, and what runs it, by onnxruntime: (arrays) -> logits."""
  import onnxruntime

  program = _traced(lambda: jax.make_jaxpr(model.function)(*model.inputs.values()))
  proto = onnx_model.model(program, list(model.inputs), "logits", as_texts(model.metadata))
  content = proto.SerializeToString()

  def run(arrays: list[np.ndarray]) -> np.ndarray:
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return session.run(None, dict(zip(model.inputs, arrays)))[0]

  return content, run


def to_stablehlo(model: Standalone) -> tuple[bytes, Callable]:
  """The file of `jax.export` of a model, for PLATFORMS, and what runs it."""
  exporter = jax.export.export(jax.jit(model.function), platforms=PLATFORMS)
  content = bytes(_traced(lambda: exporter(*model.inputs.values())).serialize())
  return content, lambda arrays: np.asarray(
    jax.export.deserialize(bytearray(content)).call(*arrays)
  )


def _traced(trace: Callable) -> Any:
  """What `trace` gives.

  Raises:
    InputError: the network asks for a size that was left open.
  """
  try:
    return trace()
  except InputError:
    raise
  except ValueError as error:  # what a network says about its input
    raise InputError(f"{error}: use another --size") from error
  except (TypeError, jax.errors.JAXTypeError, jax.errors.InconclusiveDimensionOperation) as error:
    raise InputError(
      "expected a network that takes any size or number, this one does not: give --size and "
      f"--batch as numbers, and --words without --text-input ({type(error).__name__})"
    ) from error


def _compare(model: Standalone, run: Callable, dtype: str) -> str:
  """What a stored program and JAX differ by, as a sentence.

  Raises:
    InputError: by more than rounding.
  """
  arrays = model.example()
  expected = np.asarray(jax.jit(model.function)(*arrays))
  try:
    found = run(arrays)
  except Exception as error:  # of onnxruntime, whose classes have no common one
    raise InputError(
      f"expected a program that runs here, got {str(error).splitlines()[0]}: use another --dtype"
    ) from error
  difference, largest = float(np.abs(found - expected).max()), float(np.abs(expected).max())
  if not difference <= (TOLERANCE * max(1, largest) if dtype == "float32" else largest):
    raise InputError(
      f"expected JAX's logits from the stored program, they differ by {difference:.2g} (logits "
      f"reach {largest:.2g}): nothing was written, please report this"
    )
  return (
    f"Logits differ from JAX's by {difference:.1e} at most, on noise; they reach {largest:.1f}."
  )
