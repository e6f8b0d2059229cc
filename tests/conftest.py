"""Shared options and fixtures."""

import gc
import os
import pathlib
import sys

import jax
import pytest
from absl import flags

from rpn_jax.base import paths
from tests.tools import bucket_server

# Compilation is most of the time of the tests. Read when JAX first looks for devices.
QUICK = ["--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true"]
# What commands set (devices.configure_cpu): with the same flags they share compiled programs.
QUICK += ["--xla_cpu_enable_concurrency_optimized_scheduler=false"]
if jax.__version_info__ < (0, 11):  # three times as fast; later versions do not have the flag
  QUICK += ["--xla_cpu_use_fusion_emitters=false"]
  # Pieces of a program for other cores, which have programs of their own to compile: a fifth.
  QUICK += ["--xla_cpu_parallel_codegen_split_count=1"]
os.environ.setdefault("XLA_FLAGS", " ".join(QUICK))

# No test downloads weights by mistake. Read when huggingface_hub is imported.
os.environ["HF_HUB_OFFLINE"] = "1"

# Until the tests are collected, nothing that is made is garbage.
gc.disable()

# grain's worker processes read absl flags.
flags.FLAGS.mark_as_parsed()

HERE = pathlib.Path(__file__).parent


def pytest_addoption(parser):
  parser.addoption(
    "--golden-dir",
    default=str(HERE / "golden"),
    help="golden tensors to replay; another set of the same format runs unchanged",
  )
  parser.addoption(
    "--golden-catseg", default=str(HERE / "golden_catseg"), help="the same of CAT-Seg"
  )
  parser.addoption(
    "--golden-training-free",
    default=str(HERE / "golden_training_free"),
    help="the same of the training-free methods",
  )


def pytest_configure(config):
  # Many tests run the same programs: compile each once.
  jax.config.update("jax_compilation_cache_dir", str(config.cache.mkdir("xla")))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


# Half a minute or more each: two workers take a file at a time, and the last should be a short one.
LONGEST = (
  "tasks/test_train.py",
  "test_cat_seg_parity.py",
  "test_training_free_parity.py",
  "tasks/test_export_model.py",
  "models/test_tuners.py",
  "test_parity.py",
  "tasks/test_evaluate.py",
  "tasks/test_annotation_free.py",
  "models/test_rpn.py",
  "inference/test_layouts.py",
  "training/test_processes.py",
  "training/test_sharding.py",
  "tasks/test_demo.py",
  "inference/test_segmenter.py",
  "test_package.py",
  "configs/test_ablations.py",
)


def pytest_collection_modifyitems(items):
  order = {HERE / name: i for i, name in enumerate(LONGEST)}
  items.sort(key=lambda item: order.get(item.path, len(order)))


def pytest_collection_finish(session):
  """The garbage collector passes over what was imported, which is a tenth of the tests' time."""
  gc.enable()
  gc.freeze()
  gc.set_threshold(10_000, 10, 10)


@pytest.fixture(autouse=True, scope="session")
def _home(tmp_path_factory, pytestconfig):
  """Caches stay out of the home directory; commands that tests start share their programs."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
    patch.delenv("XDG_CACHE_HOME", raising=False)
    patch.setenv("JAX_COMPILATION_CACHE_DIR", str(pytestconfig.cache.mkdir("xla")))
    yield


@pytest.fixture(scope="session")
def _bucket_server():
  pytest.importorskip("gcsfs")
  with bucket_server.Server("bucket") as server, pytest.MonkeyPatch.context() as patch:
    for name, value in bucket_server.environment(server.port).items():
      patch.setenv(name, value)
    yield server


@pytest.fixture
def store(_bucket_server, monkeypatch):
  """What is behind `bucket`: its objects, and what happens to requests."""
  import gcsfs.retry

  # Seconds before a request is repeated.
  monkeypatch.setattr(gcsfs.retry, "min", lambda *_: 0.01, raising=False)
  store = _bucket_server.store
  yield store
  store.fault, store.writable, store.clock = lambda method, path: None, True, 0.0


@pytest.fixture
def bucket(store, request):
  """An empty folder in a bucket of a server on loopback."""
  return paths.expand(f"gs://bucket/{request.node.name.replace('/', '_')}")


def _golden(pytestconfig, option: str, known_by: str = "meta.json") -> pathlib.Path:
  path = pathlib.Path(pytestconfig.getoption(option))
  if not (path / known_by).exists():
    sys.exit(f"{option}={path}: expected a folder with {known_by} and the .npz files")
  return path


@pytest.fixture(scope="session")
def golden_dir(pytestconfig) -> pathlib.Path:
  return _golden(pytestconfig, "--golden-dir")


@pytest.fixture(scope="session")
def golden_catseg(pytestconfig) -> pathlib.Path:
  return _golden(pytestconfig, "--golden-catseg")


@pytest.fixture(scope="session")
def golden_training_free(pytestconfig) -> pathlib.Path:
  return _golden(pytestconfig, "--golden-training-free", "weights.npz")
