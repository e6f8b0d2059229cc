"""Exported models beside the predictor: sizes, differences, times as ratios of one run.

    python -m benchmarks.exported --model=shapes --words="plain yellow, sand, water"
    python -m benchmarks.exported --random --words="a dog, grass" --rounds=5

`--random` is a CLIP ViT-B/16 with random weights, read by SCLIP. OpenVINO is measured if it is
installed (pip install openvino).
"""

import argparse
import importlib.util
import pathlib
import tempfile
import time

import jax
import numpy as np
import onnxruntime

from rpn_jax import Segmenter, devices
from rpn_jax.base import console
from rpn_jax.base.words import parse_names, without_articles
from rpn_jax.inference.standalone import standalone
from rpn_jax.models.clip import CLIP, CLIPConfig
from rpn_jax.tasks import export_model
from rpn_jax.weights import clip_file

THREADS = 2


def random_clip(path: pathlib.Path) -> pathlib.Path:
  clip = CLIPConfig()
  image, tokens = np.zeros((1, 224, 224, 3)), np.zeros((1, 77), np.int32)
  params = jax.jit(CLIP(clip).init)(jax.random.key(0), image, tokens)["params"]
  clip_file.save(path, clip, jax.device_get(params))
  return path


def programs(segmenter: Segmenter, names: tuple[str, ...]) -> dict:
  """Name -> (size of the file in bytes, image -> logits)."""
  text, _ = segmenter.predictor.text_rows([without_articles(name) for name in names])
  network = segmenter.predictor.sliding_window(text).logits_fn
  p = segmenter.predictor.protocol
  mean, std = (np.asarray(values, np.float32) for values in (p.mean, p.std))
  scale = getattr(segmenter.predictor.network, "logit_scale", 1.0)
  own = lambda image: scale * np.asarray(network((image / np.float32(255) - mean) / std))
  found = {"rpn_jax": (0, own)}

  content, _ = export_model.to_stablehlo(standalone(segmenter, names, several_platforms=True))
  call = jax.jit(jax.export.deserialize(bytearray(content)).call)
  found["StableHLO"] = (len(content), lambda image: np.asarray(call(image)))

  for dtype in ("float32", "float16"):
    content, _ = export_model.to_onnx(standalone(segmenter, names, dtype=dtype))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = THREADS
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    run = lambda image, session=session: session.run(None, {"image": image})[0]
    found[f"onnxruntime, {dtype}"] = (len(content), run)
    if dtype == "float32" and importlib.util.find_spec("openvino"):
      import openvino

      settings = {"INFERENCE_NUM_THREADS": THREADS}
      compiled = openvino.Core().compile_model(openvino.Core().read_model(content), "CPU", settings)
      found["OpenVINO"] = (
        len(content),
        lambda image, run=compiled: run({"image": image})["logits"],
      )
  return found


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--model", default="shapes")
  parser.add_argument("--random", action="store_true")
  parser.add_argument("--words", required=True)
  parser.add_argument("--rounds", type=int, default=50)
  args = parser.parse_args()
  names = parse_names(args.words)
  with devices.runtime(), tempfile.TemporaryDirectory() as folder:
    if args.random:
      path = random_clip(pathlib.Path(folder, "random.safetensors"))
      segmenter = Segmenter.load(path, method="sclip", templates="single")
    else:
      segmenter = Segmenter.load(args.model)
    found = programs(segmenter, names)
    side = segmenter.predictor.protocol.crop
    image = np.random.default_rng(0).integers(0, 256, (1, side, side, 3)).astype(np.uint8)
    first = {name: run(image) for name, (_, run) in found.items()}
    seconds = {name: [] for name in found}
    for _ in range(args.rounds):  # in turns, so that other work on the machine meets all alike
      for name, (_, run) in found.items():
        start = time.perf_counter()
        run(image)
        seconds[name].append(time.perf_counter() - start)
  base = np.median(seconds["rpn_jax"])
  rows = []
  for name, (size, _) in found.items():
    difference = np.abs(first[name] - first["rpn_jax"]).max()
    median = np.median(seconds[name])
    rows.append([name, f"{size / 1e6:.1f}", f"{difference:.1e}", f"{median * 1000:.1f}",
                 f"{median / base:.2f}"])  # fmt: skip
  header = ["", "MB", "max difference", "ms", "ratio"]
  print(
    f"{segmenter.method}, a window of {side} x {side}, logits to {abs(first['rpn_jax']).max():.1f}"
  )
  print(console.table(rows, header))


if __name__ == "__main__":
  main()
