"""Shared options and fixtures."""

import os
import pathlib
import sys

# Compilation is most of the time of the tests. Read when JAX first looks for devices.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import jax
import pytest
from absl import flags

# grain's worker processes read absl flags.
flags.FLAGS.mark_as_parsed()

HERE = pathlib.Path(__file__).parent


def pytest_addoption(parser):
  parser.addoption(
    "--golden-dir",
    default=str(HERE / "golden"),
    help="golden tensors to replay; another set of the same format runs unchanged",
  )


def pytest_configure(config):
  # Many tests run the same programs: compile each once.
  jax.config.update("jax_compilation_cache_dir", str(config.cache.mkdir("xla")))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


def pytest_collection_modifyitems(items):
  # The longest files first: two workers take a file each, and the last should be a short one.
  longest = ("test_processes", "test_kills", "test_train", "test_parallel", "test_models",
             "test_parity")  # fmt: skip
  items.sort(key=lambda item: item.path.stem not in longest)


@pytest.fixture(autouse=True, scope="session")
def _home(tmp_path_factory):
  """Caches of the tests stay out of the home directory."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
    yield


@pytest.fixture(scope="session")
def golden_dir(pytestconfig) -> pathlib.Path:
  path = pathlib.Path(pytestconfig.getoption("--golden-dir"))
  if not (path / "meta.json").exists():
    sys.exit(f"--golden-dir={path}: expected a folder with meta.json and the .npz files")
  return path
