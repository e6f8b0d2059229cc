"""The forward pass of `torch_rpn` in OpenVINO, for comparing speed; not part of the library.

    python -m benchmarks.torch_rpn FOLDER openvino
    python -m benchmarks.openvino_rpn FOLDER float32    (or bfloat16)

The first converts, in a process of its own, so that the peak memory of the second is OpenVINO's.
"""

import json
import pathlib
import resource
import sys
import time

import numpy as np
import openvino

from benchmarks import peak

HINTS = {"float32": "f32", "bfloat16": "bf16"}


def measure(folder: pathlib.Path, dtype: str) -> dict:
  case = json.loads((folder / "case.json").read_text())
  data = np.load(folder / "data.npz")
  image, text = np.ascontiguousarray(data["image"].transpose(0, 3, 1, 2)), data["text"]
  core = openvino.Core()
  settings = {
    "INFERENCE_PRECISION_HINT": HINTS[dtype],
    "INFERENCE_NUM_THREADS": case["threads"],
    "PERFORMANCE_HINT": "LATENCY",
  }
  began = time.perf_counter()
  compiled = core.compile_model(core.read_model(folder / "model.xml"), "CPU", settings)
  request = compiled.create_infer_request()
  # Arrays are shared, not copied.
  call = lambda: request.infer([image, text], share_inputs=True, share_outputs=True)[0]
  first = np.array(call(), np.float32)
  seconds_to_compile = time.perf_counter() - began
  np.save(folder / "other.npy", first.transpose(0, 2, 3, 1))
  times = []
  while len(times) < 2 or sum(times) < case["seconds"]:
    began = time.perf_counter()
    call()
    times.append(time.perf_counter() - began)
  peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
  return {
    "seconds": sorted(times)[len(times) // 2],
    "seconds_to_compile": seconds_to_compile,
    "peak_bytes": peak_bytes,
    "peak_gflops": product(core, settings),
    "device": core.get_property("CPU", "FULL_DEVICE_NAME"),
    "version": openvino.__version__,
  }


def product(core: openvino.Core, settings: dict) -> float:
  """The peak of a product with a matrix that OpenVINO may store as it likes, as weights are."""
  ops, shape = openvino.opset13, [peak.SIDE, peak.SIDE]
  weights = np.random.default_rng(0).normal(size=shape).astype(np.float32)
  given = ops.parameter(shape, np.float32)
  model = openvino.Model([ops.matmul(given, ops.constant(weights), False, False)], [given])
  request = core.compile_model(model, "CPU", settings).create_infer_request()
  return peak.gflops(lambda: request.infer([weights], share_inputs=True, share_outputs=True))


if __name__ == "__main__":
  print(json.dumps(measure(pathlib.Path(sys.argv[1]), sys.argv[2])))
