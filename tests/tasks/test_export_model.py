"""Models as files: onnxruntime and `jax.export` beside the predictor; scripts of docs/deploy.md."""

import dataclasses
import functools
import http.server
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import threading

import jax
import numpy as np
import onnxruntime
import pytest
from PIL import Image

from configs import cat_seg, shapes
from rpn_jax import Segmenter, cli
from rpn_jax.base.errors import InputError
from rpn_jax.base.words import parse_names
from rpn_jax.inference import onnx_model
from rpn_jax.inference.predictor import Predictor
from rpn_jax.inference.standalone import standalone
from rpn_jax.tasks import export, export_model
from rpn_jax.tasks.demo import SCENE, SCENE_WORDS
from tests import ROOT, tiny
from tests.tasks.test_demo import CHROMIUM

PAGE = (ROOT / "docs/deploy.md").read_text()
WORDS = ("plain yellow", "sand", "water")
# A folder with the files of onnxruntime-web, from npm: docs/deploy.md.
WEB = os.environ.get("ONNXRUNTIME_WEB", "")


def script(marker: str, language: str) -> str:
  return re.search(rf"<!-- {marker} -->\n\n```{language}\n(.*?)^```", PAGE, re.M | re.S)[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """The shipped model for the scene's words, as the command writes it."""
  folder = tmp_path_factory.mktemp("exported")
  out = str(folder / "shapes.onnx")
  assert cli.main(["export", "shapes", f"--words={SCENE_WORDS}", "--to=onnx", f"--out={out}"]) == 0
  return folder


def expected(segmenter: Segmenter, names, image_NxHxWx3: np.ndarray) -> np.ndarray:
  """The logits of the predictor, which normalizes outside and has this platform's kernels."""
  p = segmenter.predictor.protocol
  text, _ = segmenter.predictor.text_rows(names)
  window = segmenter.predictor.sliding_window(text)
  mean, std = (np.float32(values) for values in (p.mean, p.std))
  logits = np.asarray(window.logits_fn((image_NxHxWx3 / np.float32(255) - mean) / std))
  return logits * getattr(segmenter.predictor.network, "logit_scale", 1.0)


def images(count: int, side: int) -> np.ndarray:
  scene = Image.open(SCENE).convert("RGB").resize((side, side))
  return np.stack([np.roll(np.asarray(scene), 9 * i, 0) for i in range(count)])


def test_names_are_stored_as_they_were_meant():
  names = parse_names('"salt, pepper", crt screen (lcd, tv), sea | ocean')
  meta = standalone(Segmenter.load(dtype="float32"), names).metadata
  assert meta["names"] == ["salt, pepper", "crt screen (lcd, tv)", "sea | ocean"]


def test_a_file_has_the_models_name(tmp_path, monkeypatch):
  for folder in ("runs/a.1", "runs/a.2"):
    (tmp_path / folder).mkdir(parents=True)
  (tmp_path / "clip.v2.safetensors").touch()
  monkeypatch.chdir(tmp_path / "runs")
  for model, name in (
    ("shapes", "shapes"), ("ViT-B/16", "ViT-B-16"), ("hf://owner/name.1", "owner--name.1"),
    ("a.1", "a.1"), ("a.2/", "a.2"), (".", "runs"), ("../clip.v2.safetensors", "clip.v2"),
  ):  # fmt: skip
    assert export_model._file_name(model) == name


def run(content: bytes, **arrays: np.ndarray) -> np.ndarray:
  session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
  return session.run(["logits"], arrays)[0]


def test_onnxruntime_gives_the_predictors_logits_for_any_number_of_images(folder):
  content, image = (folder / "shapes.onnx").read_bytes(), images(2, 64)
  wanted = expected(Segmenter.load(dtype="float32"), SCENE_WORDS.split(", "), image)
  for count in (1, 2):
    np.testing.assert_allclose(run(content, image=image[:count]), wanted[:count], atol=1e-4)


def test_what_a_program_must_know_is_in_the_file_and_beside_it(folder):
  meta = json.loads((folder / "shapes.json").read_text())
  assert meta["names"] == SCENE_WORDS.split(", ")
  assert (meta["short_side"], meta["crop"], meta["stride"], meta["patch"]) == (96, 64, 48, 8)
  assert (meta["activation"], meta["average"]) == ("sigmoid", "scores")
  session = onnxruntime.InferenceSession(folder / "shapes.onnx")
  texts = session.get_modelmeta().custom_metadata_map
  assert json.loads(texts["mean"]) == meta["mean"] and texts["activation"] == "sigmoid"
  (image,), (logits,) = session.get_inputs(), session.get_outputs()
  assert image.shape == ["b", 64, 64, 3] and image.type == "tensor(uint8)"
  assert logits.shape == ["b", 8, 8, 8] and logits.name == "logits"


def test_the_pages_script_segments_without_jax(folder):
  """As it stands in the page, in a process where JAX and this package cannot be imported."""
  (folder / "segment.py").write_text(script("segment.py", "python"))
  banned = "import sys; sys.modules.update(jax=None, rpn_jax=None, cv2=None)"
  (folder / "sitecustomize.py").write_text(banned)
  environment = {**os.environ, "PYTHONPATH": str(folder)}
  command = [sys.executable, "segment.py", "shapes.onnx", str(SCENE), "mask.png"]
  done = subprocess.run(
    command, cwd=folder, env=environment, capture_output=True, text=True, check=True
  )
  labels = np.asarray(Image.open(folder / "mask.png"))
  wanted = Segmenter.load(dtype="float32")(SCENE, SCENE_WORDS)
  assert (labels == wanted.labels).mean() > 0.98
  shares = dict(line.rsplit(": ", 1) for line in done.stdout.splitlines())
  for name, share in wanted.shares().items():
    assert float(shares[name].strip("%")) == pytest.approx(100 * share, abs=1)


@pytest.mark.skipif(not (WEB and CHROMIUM), reason="no Chromium, or ONNXRUNTIME_WEB is not set")
def test_the_pages_browser_segments(folder, tmp_path):
  from playwright.sync_api import sync_playwright

  for source in (*folder.glob("shapes.*"), *pathlib.Path(WEB).glob("ort*wasm*")):
    shutil.copy(source, tmp_path)
  (tmp_path / "index.html").write_text(script("browser", "html"))
  quiet = type("Quiet", (http.server.SimpleHTTPRequestHandler,), {"log_message": lambda *_: None})
  with http.server.ThreadingHTTPServer(
    ("127.0.0.1", 0), functools.partial(quiet, directory=tmp_path)
  ) as server:
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with sync_playwright() as playwright:
      browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
      page = browser.new_page()
      page.goto(f"http://127.0.0.1:{server.server_port}/", wait_until="networkidle")
      page.set_input_files("input", str(SCENE))
      page.wait_for_function("document.querySelector('pre').textContent", timeout=60_000)
      lines = page.text_content("pre").splitlines()
      browser.close()
    server.shutdown()
  shares = {name: float(share.strip("%")) for name, share in (s.rsplit(": ", 1) for s in lines)}
  logits = run((folder / "shapes.onnx").read_bytes(), image=images(1, 64))[0]
  counts = np.bincount(logits.argmax(-1).ravel(), minlength=8) / 64 * 100
  for share, count in zip(shares.values(), counts):
    assert share == pytest.approx(count, abs=5)  # browsers resize by rules of their own


def small(folder, tuner, clip=tiny.TINY) -> Segmenter:
  """A tiny network with random prompts."""
  tiny.save(folder / "clip.safetensors", clip=clip)
  config = shapes.get_config("runlocal").unlock()
  config.model.tuner, config.clip = tuner, str(folder / "clip.safetensors")
  predictor = Predictor.from_config(config.lock())
  rng = np.random.default_rng(0)
  draw = lambda x: np.float32(0.3 * rng.normal(size=x.shape))
  prompts = jax.tree.map(draw, predictor.prompt_shapes(clip.image_size))
  return Segmenter(predictor.with_prompts(prompts), tuner)


def test_a_file_for_every_platform_has_the_attention_of_each(tmp_path):
  wide = dataclasses.replace(tiny.TINY, vision_width=128)  # as wide as a TPU's lanes
  segmenter = small(tmp_path, "lpm", wide)
  model = standalone(segmenter, WORDS, size=(32, 32), several_platforms=True)
  content, call = export_model.to_stablehlo(model)
  read = jax.export.deserialize(bytearray(content))
  assert read.platforms == ("cpu", "cuda", "tpu")
  # A kernel for TPUs in each of the two blocks.
  assert read.mlir_module().count("@tpu_custom_call") == 2
  image = images(1, 32)
  np.testing.assert_allclose(call([image]), expected(segmenter, WORDS, image), atol=1e-4)


@pytest.mark.slow
def test_a_file_for_any_size_and_number():
  segmenter = Segmenter.load(dtype="float32")
  model = standalone(segmenter, WORDS, size="any", batch="any", several_platforms=True)
  _, call = export_model.to_stablehlo(model)
  image = np.concatenate([images(2, 64), images(2, 64)], 2)
  np.testing.assert_allclose(call([image]), expected(segmenter, WORDS, image), atol=1e-4)


@pytest.mark.slow
def test_text_as_an_input_takes_any_number_of_classes():
  segmenter = Segmenter.load(dtype="float32")
  model = standalone(segmenter, (), batch="any", text_input=True)
  content, _ = export_model.to_onnx(model)
  image = images(2, 64)
  for names in (WORDS, (*WORDS, "grass")):
    text = np.asarray(segmenter.predictor.text_rows(names)[0])
    got = run(content, image=image, text=text)
    np.testing.assert_allclose(got, expected(segmenter, names, image), atol=1e-4)


# Those whose operations are of another kind; the first one has what most are made of.
@pytest.mark.parametrize(
  "method",
  ["sc_clip", *(pytest.param(m, marks=pytest.mark.slow) for m in ("sclip", "naclip", "pearl"))],
)
def test_training_free_methods(method):
  segmenter = Segmenter.load("shapes_clip", method=method, dtype="float32")
  content, _ = export_model.to_onnx(standalone(segmenter, WORDS, batch="any"))
  image = images(2, 64)
  got, wanted = run(content, image=image), expected(segmenter, WORDS, image)
  np.testing.assert_allclose(got, wanted, atol=1e-4 * np.abs(wanted).max())


def test_tuners_that_are_not_merged(tmp_path):
  segmenter = small(tmp_path, "adapter+text_ssf")
  content, _ = export_model.to_onnx(standalone(segmenter, WORDS, size=(32, 32)))
  image = images(1, 32)
  wanted = expected(segmenter, WORDS, image)
  np.testing.assert_allclose(run(content, image=image), wanted, atol=1e-4)


@pytest.mark.slow
def test_cat_seg():
  config = cat_seg.get_config("data=shapes,runlocal").unlock()
  config.cat_seg.guidance_layers, config.clip = (1, 2), "shapes_clip.safetensors"
  predictor = Predictor.from_config(config.lock())
  text, _ = predictor.text_rows(WORDS)
  predictor = predictor.with_prompts(predictor.init_prompts(text, jax.random.key(0), 64))
  segmenter = Segmenter(predictor, "cat_seg")
  content, _ = export_model.to_onnx(standalone(segmenter, WORDS))
  image = images(1, 64)
  got = run(content, image=image)
  assert got.shape == (1, 32, 32, 3)
  np.testing.assert_allclose(got, expected(segmenter, WORDS, image), atol=1e-4)
  model = standalone(segmenter, WORDS, batch="any")
  with pytest.raises(InputError, match="this one does not: give --size and --batch as numbers"):
    export_model.to_onnx(model)


@pytest.mark.slow
def test_half_precision_halves_the_file():
  segmenter = Segmenter.load(dtype="float32")
  whole, _ = export_model.to_onnx(standalone(segmenter, WORDS))
  half, _ = export_model.to_onnx(standalone(segmenter, WORDS, dtype="float16"))
  assert len(half) < 0.6 * len(whole)
  image = images(1, 64)
  np.testing.assert_allclose(run(half, image=image), expected(segmenter, WORDS, image), atol=0.05)


def test_an_operation_without_a_counterpart_is_named():
  program = jax.make_jaxpr(lambda x: jax.numpy.cumsum(x, 1))(np.zeros((2, 3), np.float32))
  with pytest.raises(InputError, match="got the operation 'cumsum': use --to=stablehlo"):
    onnx_model.model(program, ["image"], "logits", {})


def test_a_file_that_differs_is_not_kept(tmp_path, monkeypatch, capsys):
  segmenter = small(tmp_path, "lpm")
  monkeypatch.setattr(Segmenter, "load", lambda *_, **__: segmenter)
  wrong = lambda model: (b"", lambda arrays: np.zeros((1, 4, 4, 3)))
  monkeypatch.setattr(export_model, "to_onnx", wrong)
  arguments = ["--words=sand, sea, sky", "--to=onnx", "--size=32,32", f"--out={tmp_path}/m.onnx"]
  assert cli.main(["export", "shapes", *arguments]) == 2
  assert "expected JAX's logits from the stored program" in capsys.readouterr().err
  assert [path.name for path in tmp_path.iterdir()] == ["clip.safetensors"]


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ("--to=bmp", "--to='bmp' is not known; did you mean"),
    ("--to=onnx --dtype=int8", "--dtype='int8' is not known"),
    ("--to=onnx", 'expected --words="a dog, grass", or --text-input'),
    ("--to=onnx --words=a,b --size=60,64", "multiples of the patch size, 8; 64 for 60"),
    ("--to=onnx --words=a,b --size=512", "expected HEIGHT,WIDTH in pixels"),
    ("--to=onnx --words=a,b --size=any", "an ONNX file is of one size here"),
    ("--to=onnx --words=a,b --batch=0", "expected a number of images from 1 on, or any"),
    ("--to=onnx --words=a|b,c --synonyms=max", "a file has one row a class"),
    ("--to=onnx --words=a,a", "duplicate class name 'a'"),
    ("--to=onnx --words=cat,Cat", "'cat' and 'Cat' are the same words to CLIP"),
    ("--to=onnx --words=a,b --out=nowhere/m.onnx", "in a folder that exists"),
    ("--to=onnx --words=a,b --out=m.json", "expected another ending, since .json is that of a fil"),
    ("--to=onnx --words=a,b --text-input --out=m.NPY", "since .NPY is that of a file which is wri"),
    pytest.param(
      "--to=onnx --words=a,b --dtype=bfloat16", "use another --dtype", marks=pytest.mark.slow
    ),
    ("--to=onnx --words=a,b --method=res_clip", "use --to=stablehlo"),
    ("--to=safetensors --words=a,b", "writes the prompts of a run to its workdir, leave it out"),
    ("--to=safetensors", "expected the workdir of a run"),
  ],
)
def test_what_is_wrong_is_one_line_and_nothing_is_written(
  options, message, tmp_path, monkeypatch, capsys
):
  monkeypatch.chdir(tmp_path)
  model = "shapes_clip" if "res_clip" in options else "shapes"
  assert cli.main(["export", model, *options.split()]) == 2
  error = capsys.readouterr().err
  assert message in error and error.count("\n") == 1
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("other", ["package.json", "package.npy"])
def test_files_that_no_export_wrote_stay(other, tmp_path, monkeypatch, capsys):
  segmenter = small(tmp_path, "lpm")
  monkeypatch.setattr(Segmenter, "load", lambda *_, **__: segmenter)
  (tmp_path / other).write_text('{"name": "package"}')
  arguments = ["--words=sand, sea, sky", "--to=onnx", "--size=32,32", "--text-input"]
  arguments.append(f"--out={tmp_path}/package.onnx")
  assert cli.main(["export", "shapes", *arguments]) == 2
  assert f"would replace {tmp_path / other}, which is not of an exp" in capsys.readouterr().err
  assert (tmp_path / other).read_text() == '{"name": "package"}'
  (tmp_path / other).unlink()
  for _ in range(2):  # again
    assert cli.main(["export", "shapes", *arguments]) == 0
  assert sorted(path.name for path in tmp_path.glob("package.*")) == [
    "package.json", "package.npy", "package.onnx",
  ]  # fmt: skip


def test_a_missing_converter_is_named(monkeypatch, capsys):
  monkeypatch.setattr(export_model.importlib.util, "find_spec", lambda name: None)
  assert cli.main(["export", "shapes", "--words=sand", "--to=onnx"]) == 2
  error = capsys.readouterr().err
  assert error.endswith(": pip install onnx==1.23.2 onnxruntime==1.32.0\n")


def test_safetensors_is_what_the_mode_export_writes(tmp_path, monkeypatch):
  """The same function, with the config of the run and the data set it names."""
  called = []
  monkeypatch.setattr(export, "export", lambda *arguments: called.append(arguments))
  tiny.save(tmp_path / "clip.safetensors")
  config = cat_seg.get_config("data=shapes,runlocal").unlock()
  config.method, config.clip = "rpn", str(tmp_path / "clip.safetensors")
  (tmp_path / "config.json").write_text(json.dumps({"config": config.to_dict()}))
  data = object()
  arguments = [str(tmp_path), "--to=safetensors"]
  assert export_model.main(arguments, lambda config: (data, "MIT")) == 0
  ((config, workdir, *rest),) = called
  assert rest == [data, "MIT"] and workdir == tmp_path and config.data.mean
