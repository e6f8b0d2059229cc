"""Which room may import which: the arrows that keep the parts apart."""

import ast

import pytest

from tests import ROOT

# folder or file -> top-level packages it must not import
FORBIDDEN = {
  "rpn_jax": {"data_pipelines", "configs", "main", "grain", "tensorflow_datasets"},
  "data_pipelines": {"rpn_jax", "configs", "main", "jax", "flax", "optax"},
  "configs": {"rpn_jax", "data_pipelines", "jax", "numpy"},
}
NOWHERE = {"torch", "tensorflow"}
# The mathematics needs nothing but arrays.
PURE = {"jax", "flax", "einops", "numpy", "rpn_jax"}
PURE_FILES = ["rpn_jax/models", "rpn_jax/losses.py", "rpn_jax/metrics.py"]


def imports(path):
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and not node.level:
      yield node.module


def files(where):
  path = ROOT / where
  return [path] if path.suffix == ".py" else sorted(path.rglob("*.py"))


@pytest.mark.parametrize("folder", FORBIDDEN)
def test_import_direction(folder):
  for path in files(folder):
    used = {name.split(".")[0] for name in imports(path)}
    assert not used & (FORBIDDEN[folder] | NOWHERE), f"{path} imports {used}"


def test_models_losses_and_metrics_are_pure():
  import sys

  for path in [p for where in PURE_FILES for p in files(where)]:
    used = {name.split(".")[0] for name in imports(path)} - set(sys.stdlib_module_names)
    assert used <= PURE, f"{path} imports {used - PURE}"


def test_the_core_is_read_in_an_afternoon():
  core = ["clip", "prompts", "rpm", "rpn"]
  lines = sum(len((ROOT / f"rpn_jax/models/{n}.py").read_text().splitlines()) for n in core)
  assert lines <= 890
