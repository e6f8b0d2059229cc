"""Damaged and hostile files: each is answered rightly or by one line, in bounded time and memory.

    FUZZ_CASES=1000 python -m pytest tests/fuzz

draws so many cases per test, by default few; a failing one is made small and printed. What counts
as an answer is whatever the reader returns: a flipped bit in a weight is another weight. Everything
else must be the project's own errors.
"""

import contextlib
import datetime
import importlib
import io
import json
import os
import pathlib
import pickle
import resource
import tempfile
import types
import warnings
import zipfile
import zlib

import numpy as np
import pytest
import safetensors.numpy
import scipy.io
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from configs import shapes as shapes_config
from data_pipelines import datasets, pipeline, raw_files, registry
from data_pipelines.sources import builder, coco_masks, context, files, folder, matlab, pascal
from rpn_jax.analysis.runs import read_run
from rpn_jax.base import pictures
from rpn_jax.base.errors import InputError
from rpn_jax.base.words import check_names
from rpn_jax.inference import evaluation
from rpn_jax.inference.predictor import Predictor
from rpn_jax.text import embeddings
from rpn_jax.text.tokenizer import tokenize
from rpn_jax.training.metric_log import read_history
from rpn_jax.training.run import Run
from rpn_jax.weights import architecture, clip_file, names, prompts_file, torch_archive
from tests import odd_pictures as odd
from tests import tiny
from tests.data_pipelines import raw_annotations
from tests.data_pipelines.raw_pascal import packed
from tests.weights.files import (
  HEADS,
  OPENCLIP_CONFIG,
  TINY,
  dictionary,
  hf_config,
  hf_names,
  number,
  tensor,
  text,
  write_shards,
  write_state,
)  # fmt: skip

CASES = int(os.environ.get("FUZZ_CASES", "25"))
# Beside what the process already has: what the largest allowed picture takes (docs/reliability.md).
MEMORY_BYTES = 3 << 30
LINE = 1500  # characters of a message

fuzzed = settings(
  max_examples=CASES,
  deadline=datetime.timedelta(seconds=20),
  suppress_health_check=list(HealthCheck),
  derandomize=CASES <= 50,  # the suite always draws the same
  database=None,
)


@pytest.fixture(autouse=True, scope="module")
def bounded_memory():
  before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  yield
  grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10
  assert grown < MEMORY_BYTES, f"{grown >> 20} MiB"


def answered(call, *args, own=InputError):
  """What the call gives, or None where it refuses in one line."""
  try:
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")
      return call(*args)
  except own as error:
    message = str(error)
    assert message and "\n" not in message and len(message) < LINE, message[:3000]
    return None


@contextlib.contextmanager
def file_of(content: bytes, name: str = "x"):
  with tempfile.TemporaryDirectory() as place:
    path = pathlib.Path(place) / name
    path.write_bytes(content)
    yield path


# Damage


@st.composite
def damaged(draw, contents: list[bytes]) -> bytes:
  """One of some good files, cut, flipped, overwritten, grown or with numbers that lie."""
  data = bytearray(draw(st.sampled_from(contents)))
  for _ in range(draw(st.integers(1, 4))):
    if not data:
      break
    place = draw(st.integers(0, len(data) - 1))
    kind = draw(st.sampled_from(("cut", "flip", "flip", "write", "insert", "number", "number")))
    if kind == "cut":
      del data[place : place + draw(st.sampled_from((1, 8, 64, len(data))))]
    elif kind == "flip":
      data[place] ^= 1 << draw(st.integers(0, 7))
    elif kind == "write":
      data[place : place + 16] = draw(st.binary(max_size=16))
    elif kind == "insert":
      data[place:place] = draw(st.binary(max_size=64))
    else:
      size = draw(st.sampled_from((2, 4, 8)))
      value = draw(st.sampled_from((0, 1, *(2**n + d for n in (15, 31, 32, 63) for d in (-1, 0)))))
      order = draw(st.sampled_from(("little", "big")))
      data[place : place + size] = (value % (1 << 8 * size)).to_bytes(size, order)
  return bytes(data)


def numbers_and_names():
  leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
  leaves |= st.sampled_from(("../x", "/etc/passwd", 10**30, "quick_gelu", -1, 4, 3))
  return st.recursive(
    leaves, lambda x: st.lists(x, max_size=4) | st.dictionaries(st.text(max_size=8), x, max_size=4)
  )


def damaged_json(good):
  """A good value with one part of it replaced by anything; or bytes that are hardly JSON."""

  @st.composite
  def changed(draw):
    value = json.loads(json.dumps(good))
    at = value
    while True:
      keys = list(at) if isinstance(at, dict) else list(range(len(at)))
      if not keys:
        return json.dumps(value).encode()
      key = draw(st.sampled_from(keys))
      if not isinstance(at[key], (dict, list)) or draw(st.booleans()):
        break
      at = at[key]
    if draw(st.booleans()):
      at[key] = draw(numbers_and_names())
    elif isinstance(at, dict):
      at[draw(st.text(max_size=8))] = at.pop(key)
    else:
      del at[key]
    return json.dumps(value).encode()

  deep = st.sampled_from((b"[" * 200_000, b'{"a":' * 100_000, b"", b"1e999", b'"' + b"9" * 99))
  return changed() | damaged([json.dumps(good).encode()]) | deep


# Weights


def tiny_state() -> dict:
  rng = np.random.default_rng(0)
  state = {}
  shapes = architecture.expected_shapes(TINY)
  for rule in names.clip_rules(names.OPENAI, 1, 2):
    shape, axes = shapes[rule.ours], names.LAYOUTS[rule.layout]
    state[rule.theirs] = rng.normal(
      size=[shape[i] for i in np.argsort(axes)] if axes else shape
    ).astype(np.float32)
  return state


STATE = tiny_state()


def weights_files() -> list[bytes]:
  with tempfile.TemporaryDirectory() as place:
    place = pathlib.Path(place)
    write_state(place / "a", STATE)
    write_state(place / "b", {k: v.astype(np.float16) for k, v in STATE.items()})
    (place / "c").write_bytes(safetensors.numpy.save(STATE))
    (place / "d").write_bytes(safetensors.numpy.save(hf_names(STATE, 1, 2)))
    clip_file.save(place / "e", *clip_file.load(place / "a", HEADS))
    prompts = {"h": np.ones((4, 8), np.float32), "head": {"bias": np.ones(4, np.float32)}}
    prompts_file.save(place / "f", prompts_file.Prompts(prompts, "0" * 16, {}, ("a",), 1))
    return [(place / name).read_bytes() for name in "abcdef"]


WEIGHTS = weights_files()


@fuzzed
@given(damaged(WEIGHTS))
def test_damaged_weights(content):
  with file_of(content, "w.safetensors") as path:
    loaded = answered(clip_file.load, path, HEADS)
    if loaded is not None:
      assert architecture.expected_shapes(loaded[0])
    answered(prompts_file.load, path)


@fuzzed
@given(st.data())
def test_weights_with_other_names_shapes_and_types(data):
  state = dict(STATE)
  for _ in range(data.draw(st.integers(1, 3))):
    name = data.draw(st.sampled_from(sorted(state)))
    kind = data.draw(st.sampled_from(("drop", "rename", "shape", "type", "value")))
    value = state.pop(name)
    if kind == "rename":
      state[data.draw(st.text(max_size=30) | st.just(name.replace("0", "99999")))] = value
    elif kind == "shape":
      state[name] = np.zeros(data.draw(st.lists(st.integers(0, 5), max_size=5)), value.dtype)
    elif kind == "type":
      state[name] = np.zeros_like(value, data.draw(st.sampled_from(("f2", "f8", "i4", "i8"))))
    elif kind == "value":
      state[name] = np.full_like(value, data.draw(st.sampled_from((np.nan, np.inf, -np.inf))))
    if not state:
      return
  with file_of(safetensors.numpy.save(state), "w.safetensors") as path:
    answered(clip_file.load, path, HEADS)


MARKER = pathlib.Path(tempfile.gettempdir()) / f"executed_{os.getpid()}"
FRAGMENTS = [
  b"cposix\nsystem\n", b"cbuiltins\neval\n", b"cos\nsystem\n", b"csubprocess\nPopen\n",
  b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch\nFloatStorage\n", b"c__torch__\nA\n",
  b"ccollections\nOrderedDict\n", b"cnumpy\ndtype\n", b"c_codecs\nencode\n",
  b"cnumpy.core.multiarray\n_reconstruct\n", text(f"touch {MARKER}"), text("storage"), text("0"),
  number(2**62), number(-1), number(3), b"R", b"b", b"Q", b"\x81", b"(", b")", b"t", b"\x85",
  b"\x86", b"]", b"}", b"s", b"u", b"a", b"e", b"0", b"1", b"2", b"N", b"\x88", b"q\x00", b"h\x00",
  b"q\x01", b"h\x01", b"h\x00h\x00\x86q\x00", pickle.LONG4 + b"\xff\xff\xff\x7f", b"\x8c\x05posix",
  b"\x93", b"\x94", b"\x95", b"i", b"o", b"I1\n", b"V\\ud800\n", b"\x8a\xff",
  tensor("0", np.ones(3, np.float32)), dictionary({"w": tensor("0", np.ones(3, np.float32))}),
]  # fmt: skip


@fuzzed
@given(st.lists(st.sampled_from(FRAGMENTS), max_size=25))
@example([b"]"] * 300_000)
@example([b")q\x00", *[b"h\x00h\x00\x86q\x00"] * 200, b"}h\x00h\x00s"])  # a key of 2^200 parts
@example(  # modules with 2^60 ways through them
  [b"c__torch__\nA\n)\x81q\x00",
   *[b"c__torch__\nA\n)\x81}(" + text("a") + b"h\x00" + text("b") + b"h\x00ubq\x00"] * 60]
)  # fmt: skip
@example([b"cposix\nsystem\n", text(f"touch {MARKER}"), b"\x85", b"R"])
def test_hostile_pickles(fragments):
  file = io.BytesIO()
  with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
    archive.writestr("m/data.pkl", b"\x80\x02" + b"".join(fragments) + b".")
    archive.writestr(zipfile.ZipInfo("m/data/0"), np.ones(3, np.float32).tobytes())
    archive.writestr("../../outside", "x")
  with file_of(file.getvalue(), "x.pt") as path:
    answered(torch_archive.read, path)
  assert not MARKER.exists()


BESIDE = {
  "config.json": hf_config(),
  "open_clip_config.json": {
    "model_cfg": OPENCLIP_CONFIG, "preprocess_cfg": {"mean": [0.5] * 3, "resize_mode": "squash"},
  },
  "preprocessor_config.json": {
    "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": {"shortest_edge": 4}, "crop_size": 4,
  },
  "tokenizer.json": {"model": {"type": "BPE", "vocab": {"a": 0, "b": 1}}, "normalizer": None},
  "tokenizer_config.json": {"tokenizer_class": "CLIPTokenizer"},
}  # fmt: skip


@fuzzed
@given(
  st.sampled_from(sorted(BESIDE)).flatmap(
    lambda name: st.tuples(st.just(name), damaged_json(BESIDE[name]))
  )
)
def test_files_beside_weights(damaged_file):
  name, content = damaged_file
  with tempfile.TemporaryDirectory() as place:
    place = pathlib.Path(place)
    hf = name != "open_clip_config.json"
    if hf:
      (place / "config.json").write_text(json.dumps(BESIDE["config.json"]))
    (place / name).write_bytes(content)
    state = hf_names(STATE, 1, 2) if hf else STATE
    (place / "model.safetensors").write_bytes(safetensors.numpy.save(state))
    answered(clip_file.load, place)


@fuzzed
@given(damaged_json({"weight_map": dict.fromkeys(STATE, "model-00001-of-00001.safetensors")}))
def test_indices_of_shards(content):
  with tempfile.TemporaryDirectory() as place:
    index = write_shards(pathlib.Path(place), STATE, 1)
    index.write_bytes(content)
    answered(clip_file.load, index, HEADS)


# Pictures and masks


def image_files() -> list[bytes]:
  rng = np.random.default_rng(0)
  image = Image.fromarray(rng.integers(0, 256, (13, 17, 3), np.uint8))
  exif = image.getexif()
  exif[0x0112] = 6
  files = []
  for kind, mode, options in (
    ("JPEG", "RGB", {"exif": exif}), ("JPEG", "CMYK", {}), ("PNG", "RGBA", {}), ("PNG", "P", {}),
    ("WEBP", "RGB", {}), ("GIF", "P", {}), ("BMP", "RGB", {}), ("TIFF", "RGB", {}),
    ("PPM", "RGB", {}),
  ):  # fmt: skip
    file = io.BytesIO()
    image.convert(mode).save(file, kind, **options)
    files.append(file.getvalue())
  deep = rng.integers(0, 65536, (5, 7, 3)).astype(np.uint16)
  files += [
    odd.png16(deep), odd.tiff(deep, deep), odd.tiff(deep.astype(np.float32)),
    odd.tiff(np.dstack([deep, deep[..., 0]]), extra=1),
    odd.stored(image, "PNG", icc_profile=odd.rgb_profile(odd.ADOBE, 2.2)),
    odd.stored(image.convert("CMYK"), "TIFF", icc_profile=odd.cmyk_profile()),
    odd.stored(image, "GIF", save_all=True, append_images=[image.rotate(90)]),
    odd.stored(image, "AVIF"), odd.stored(image, "JPEG2000"),
  ]  # fmt: skip
  return files


def bomb(width: int, height: int) -> bytes:
  """A PNG that says it is larger than it is."""
  file = io.BytesIO()
  Image.new("L", (1, 1)).save(file, "PNG")
  data = bytearray(file.getvalue())
  data[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
  data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
  return bytes(data)


@fuzzed
@given(damaged(image_files()))
@example(bomb(20_000, 20_000))
@example(bomb(2**31 - 1, 2**31 - 1))
@example(bomb(1, 65_000))
def test_pictures(content):
  with file_of(content, "x.png") as path:
    image = answered(pictures.read, path)
    if image is not None:
      assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3
  answered(pipeline.check_example, {"image": content, "label": content, "id": "x"})


def masks() -> list[bytes]:
  rng = np.random.default_rng(0)
  files = []
  for array in (rng.integers(0, 4, (9, 7), np.uint8), rng.integers(0, 4, (9, 7)).astype("u2")):
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    files.append(file.getvalue())
  return files


@pytest.fixture(scope="module")
def folder_builder(tmp_path_factory):
  made = raw_files.make_builder(folder.Folder, tmp_path_factory.mktemp("data"), "x", {})
  with file_of(b"a\nb\nc\nd\n", "names.txt") as path:
    made.classes, _ = folder.read_classes(path.parent, "")
  return made


@fuzzed
@given(image=damaged(image_files()) | st.just(image_files()[0]), mask=damaged(masks()))
@example(image=image_files()[0], mask=bomb(20_000, 20_000))
def test_masks(folder_builder, image, mask):
  with file_of(image, "x.png") as one, file_of(mask, "x.png") as two:
    record = answered(folder_builder.read, builder.RawExample("x", one, two))
    if record is not None:
      assert set(np.unique(record["label"])) <= {0, 1, 2, 3, 255}


def lossy_masks() -> list[bytes]:
  """A mask as a program saves it that thinks it is a photograph, and its palette in a GIF."""
  mask = Image.fromarray(np.random.default_rng(0).integers(0, 4, (9, 7), np.uint8))
  made = []
  for kind, options in (
    ("JPEG", {}), ("JPEG2000", {}), ("WEBP", {}), ("WEBP", {"lossless": True}), ("AVIF", {}),
    ("TIFF", {"compression": "jpeg"}), ("TIFF", {"compression": "tiff_lzw"}), ("GIF", {}),
    ("PPM", {}),
  ):  # fmt: skip
    file = io.BytesIO()
    mask.save(file, kind, **options)
    made.append(file.getvalue())
  return made


@fuzzed
@given(damaged(lossy_masks()) | st.sampled_from(lossy_masks()))
def test_masks_saved_with_loss(content):
  """Whatever is read as a label was stored without loss."""
  with file_of(content, "x.png") as path:
    # Outside of a builder, Pillow's own complaints come through.
    label = answered(files.read_index_image, path, own=Exception)
    if label is not None:
      with Image.open(path) as file:
        assert file.format in ("GIF", "TIFF", "BMP", "PNG")
        assert file.info.get("compression") not in ("jpeg", "tiff_jpeg", "webp")
        assert label.shape == (file.height, file.width) and label.dtype in (np.uint8, np.uint16)


# Annotations and names


def run_lengths(text: str) -> list[int]:
  """COCO's compressed run lengths, as its C code reads them one by one (rleFrString)."""
  lengths, at = [], 0
  while at < len(text):
    value, shift, more = 0, 0, True
    while more:
      code = ord(text[at]) - 48
      value |= (code & 31) << shift
      at, shift, more = at + 1, shift + 5, code & 32
    value -= (code & 16) << 1 << (shift - 5)
    lengths.append(value + (lengths[-2] if len(lengths) > 2 else 0))
  return lengths


RLE = [
  packed(lengths).encode()
  for lengths in ([30], [3, 20, 7], [0, 5, 6, 4, 15], [9, 1, 0, 1, 9, 1, 8, 1])
]


@fuzzed
@given(damaged(RLE) | st.sampled_from(RLE) | st.lists(st.integers(48, 111), max_size=8).map(bytes))
@example(b"")
@example(b"n0")
@example(packed([30]).encode())
@example(packed([40, -10]).encode())
def test_run_lengths(content):
  text = content.decode("latin-1")
  mask = answered(coco_masks.read_mask, {"size": [6, 5], "counts": text}, (6, 5), own=ValueError)
  if mask is not None:
    lengths = run_lengths(text)
    assert min(lengths) >= 0 and sum(lengths) == 30
    values = [i % 2 == 1 for i, length in enumerate(lengths) for _ in range(length)]
    assert mask.T.ravel().tolist() == values


ANNOTATIONS = {
  "images": [
    {"image_id": 1, "file_name": "a.jpg", "phase": "train", "height": 6, "width": 5},
    {"image_id": 2, "file_name": "b.jpg", "phase": "val", "height": 4, "width": 4},
  ],
  "annos_segmentation": [
    {"image_id": 1, "category_id": 9,
     "segmentation": {"size": [6, 5], "counts": [3, 20, 7]}},
    {"image_id": 2, "category_id": 9, "segmentation": [[0, 0, 3, 0, 3, 3, 0, 3]]},
    {"image_id": 2, "category_id": 18,
     "segmentation": {"size": [4, 4], "counts": "03:3"}},
  ],
}  # fmt: skip


@fuzzed
@given(damaged_json(ANNOTATIONS))
def test_annotations(content):
  with file_of(content, "trainval_merged.json") as path:
    made = types.SimpleNamespace(counts=context.Context.counts, obtain="fetch it")
    splits = answered(context.Context._from_annotations, made, path, path.parent)
    for raw in [raw for raws in (splits or {}).values() for raw in raws]:
      assert raw.image.parent == path.parent
      answered(raw.read_label)


COCO = raw_annotations.coco(
  {1: "a.jpg", 2: "b.jpg"},
  [
    raw_annotations.of_image(1, 1, [raw_annotations.corners(2, 2, 9, 9)], bbox=[2, 2, 7, 7]),
    raw_annotations.of_image(2, 7, {"size": [20, 30], "counts": [100, 20, 480]}),
    raw_annotations.of_image(2, 7, [], bbox=[2, 2, 7, 7]),
  ],
)
LABELME = {
  "version": "5.5.0", "imagePath": "a.jpg", "imageHeight": 20, "imageWidth": 30,
  "imageData": raw_annotations.png_text(np.zeros((20, 30, 3), np.uint8)),
  "shapes": [
    raw_annotations.shape("cat", "polygon", raw_annotations.points(2, 2, 9, 9)),
    raw_annotations.shape("dog", "circle", [[5, 5], [9, 9]]),
    raw_annotations.shape("dog", "linestrip", [[5, 5], [9, 9], [9, 2]]),
    raw_annotations.shape(
      "cat", "mask", [[3, 3], [5, 5]], mask=raw_annotations.png_text(np.ones((3, 3), np.uint8))
    ),
  ],
}  # fmt: skip
YOLO_TEXT = b"0 0.1 0.1 0.5 0.1 0.5 0.5 0.1 0.5\n1 0.5 0.5 0.9 0.5 0.9 0.9\n"
YAML = b"path: .\ntrain: images\nval: [images]\nnc: 2\nnames: {0: cat, 1: dog}\n"
# Form -> file -> what it may hold.
OWN_DATA = {
  "coco_json": {"x.json": damaged_json(COCO)},
  "labelme": {"a.json": damaged_json(LABELME)},
  "yolo_seg": {"labels/a.txt": damaged([YOLO_TEXT]), "data.yaml": damaged([YAML])},
  "voc_folder": {"labelmap.txt": damaged([b"# x\nbackground:0,0,0::\ncat:128,0,0::\n"])},
}


@pytest.fixture(scope="module")
def annotated(tmp_path_factory):
  """Form -> folder of two images with good annotations."""
  root = tmp_path_factory.mktemp("annotated")
  for name in ("coco_json", "labelme", "yolo_seg/images", "voc_folder/JPEGImages"):
    for image in ("a.jpg", "b.jpg"):
      raw_annotations.picture(root / name / image)
  raw_annotations.write_json(root / "labelme/b.json", LABELME)
  raw_annotations.text(root / "yolo_seg/labels/b.txt", "0 0 0 1 0 1 1")
  for name in "ab":
    colors = {1: (128, 0, 0), 255: (224, 224, 192)}
    raw_annotations.rgb_png(root / f"voc_folder/SegmentationClass/{name}.png", colors)
  (root / "yolo_seg/data.yaml").write_bytes(YAML)
  return root


@fuzzed
@given(st.data())
def test_annotations_of_ones_own(annotated, data):
  form = data.draw(st.sampled_from(sorted(OWN_DATA)))
  file = data.draw(st.sampled_from(sorted(OWN_DATA[form])))
  path = annotated / form / file
  good = path.read_bytes() if path.exists() else b""
  path.write_bytes(data.draw(OWN_DATA[form][file]))
  try:
    made = raw_files.make_builder(registry.builder_class(form), annotated, "x", {})
    for raws in (answered(made.examples, annotated / form) or {}).values():
      for raw in raws:
        record = answered(made.read, raw)
        if record is not None:
          classes = {*range(len(made.classes.names)), made.classes.ignore}
          assert set(np.unique(record["label"]).tolist()) <= classes
  finally:
    path.write_bytes(good)


def matrices() -> list[bytes]:
  label = np.arange(20, dtype=np.uint8).reshape(4, 5)
  files = []
  for compressed in (False, True):
    file = io.BytesIO()
    scipy.io.savemat(file, {"GTcls": {"Segmentation": label}}, do_compression=compressed)
    files.append(file.getvalue())
  return files


@fuzzed
@given(damaged(matrices()), st.binary(max_size=200) | st.text(max_size=50).map(str.encode))
def test_matrices_and_lists(content, names):
  with file_of(content, "x.mat") as path:
    answered(pascal.read_matrix, path, "GTcls.Segmentation", "fetch it")
  with file_of(names, "train.txt") as path:
    found = answered(pascal.read_names, path, "names", "fetch it")
    assert all((path.parent / f"{name}.jpg").parent == path.parent for name in found or ())


def test_a_matrix_that_decompresses_to_gigabytes(tmp_path, monkeypatch):
  monkeypatch.setattr(matlab, "MAX_MATRIX_BYTES", 1 << 20)
  path = tmp_path / "x.mat"
  scipy.io.savemat(path, {"LabelMap": np.zeros((2000, 2000), np.uint16)}, do_compression=True)
  with pytest.raises(InputError, match="when decompressed"):
    pascal.read_matrix(path, "LabelMap", "fetch it")


@fuzzed
@given(st.binary(max_size=300) | st.text(max_size=100).map(str.encode), st.text(max_size=300))
def test_names(lines, words):
  with file_of(lines, "names.txt") as path:
    answered(folder.read_classes, path.parent, "")
  names = answered(check_names, words.split(","))
  if names:
    tokens = answered(tokenize, [f"a photo of a {name}" for name in names])
    assert tokens is None or tokens.shape == (len(names), 77)


# Configs


FILES = ("shapes", "voc", "coco_stuff", "context", "open_vocab", "folder", "training_free")


@fuzzed
@given(
  st.sampled_from(FILES),
  st.text(max_size=20) | st.lists(
    st.sampled_from(("preset=paper", "released", "runlocal", "=", "setting=", "b16", "preset"))
  ).map(",".join),
)  # fmt: skip
def test_words_behind_a_config(name, words):
  # What a config file raises, main.py prints as one line.
  answered(importlib.import_module(f"configs.{name}").get_config, words, own=ValueError)


FIELDS = (
  "steps", "log_every", "eval_every", "save_every", "max_skipped", "parallel", "remat", "templates",
  "synonyms", "clip", "data.batch_size", "data.crop", "data.short_side", "data.name",
  "data.setting", "data.eval_images", "data.threads", "eval.crop", "eval.stride",
  "eval.window_batch", "optimizer.clip_norm",
)  # fmt: skip


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
  path = tmp_path_factory.mktemp("clip") / "clip.safetensors"
  tiny.save(path)
  return path


@fuzzed
@given(st.data())
def test_values_in_a_config(clip, data):
  config = shapes_config.get_config("runlocal")
  config.unlock()
  config.clip = str(clip)
  config.data.crop = config.eval.crop = 32
  for field in data.draw(st.lists(st.sampled_from(FIELDS), min_size=1, max_size=3)):
    section, _, name = field.rpartition(".")
    kind = type((config[section] if section else config)[name])
    values = {
      int: st.integers(-10, 10) | st.sampled_from((-(2**63), 2**63, 33, 64)),
      float: st.floats(),
      str: st.text(max_size=8),
    }[kind]
    (config[section] if section else config)[name] = data.draw(values)
  predictor = answered(Predictor.from_config, config)
  if predictor is not None:
    answered(predictor.encoder.embed, ["a", "b"])
    answered(datasets.load, clip_file.with_normalization(config, predictor.clip))


# What runs leave


METRICS = {
  "last": {"step": 8, "hiou": 0.5, "pAcc": 0.5, "miou_gt": 0.4, "miou_union": 0.4,
           "miou_seen": 0.5, "miou_unseen": 0.5, "per_class": {"a": 0.1}},
  "best": {"step": 4, "hiou": 0.5, "pAcc": 0.5, "miou_gt": 0.4, "miou_union": 0.4,
           "miou_seen": 0.5, "miou_unseen": 0.5},
  "config": {"steps": 8, "data": {"name": "shapes"}},
}  # fmt: skip
LINES = b'{"step": 1, "time": 2.0, "a": 3.0}\n{"step": 2, "time": 2.0, "a": "nan"}\n'


@fuzzed
@given(damaged_json(METRICS), damaged([LINES]) | damaged_json({"step": 1, "a": 2.0}))
def test_metrics(metrics, lines):
  with file_of(metrics, "metrics.json") as path:
    answered(read_run, path.parent)
    (path.parent / "eval.json").write_bytes(metrics)
    (path.parent / "metrics.jsonl").write_bytes(lines)
    answered(read_history, path.parent / "metrics.jsonl")
    path.write_text(json.dumps(METRICS))
    answered(read_run, path.parent)
    (path.parent / "config.json").write_bytes(metrics)
    (path.parent / "best.json").write_bytes(metrics)
    run = types.SimpleNamespace(workdir=path.parent, identity={"clip": "0", "config": {}})
    answered(Run.claim, run)
    Run._best_step(run)


def caches() -> list[bytes]:
  with tempfile.TemporaryDirectory() as place:
    partial = evaluation.PartialEvaluation(pathlib.Path(place) / "x.npz", {"step": 8})
    partial.save(3, np.eye(4, dtype=np.int64), now=True)
    embeddings._write(pathlib.Path(place) / "x.npy", np.eye(4, dtype=np.float32))
    return [(pathlib.Path(place) / name).read_bytes() for name in ("x.npz", "x.npy")]


def npz_bomb() -> bytes:
  file = io.BytesIO()
  np.savez_compressed(file, identity='{"step": 8}', done=1, confusion=np.zeros(1 << 26, np.int64))
  return file.getvalue()


@fuzzed
@given(damaged(caches()))
@example(npz_bomb() if CASES > 50 else b"")
@example(b"\x93NUMPY\x01\x00v\x00{'descr': '<f4', 'fortran_order': False, 'shape': (4, 99999999)}")
@example(pickle.dumps(MARKER))
def test_caches(content):
  """A cache that is damaged is made anew: nothing is said, nothing wrong is taken."""
  with file_of(content, "x.npz") as path:
    loaded = evaluation.PartialEvaluation(path, {"step": 8}).load(4, 10)
    assert loaded is None or (loaded[1].shape == (4, 4) and 0 <= loaded[0] <= 10)
    kept = embeddings._read(path, (4, 4))
    assert kept is None or kept.shape == (4, 4)
