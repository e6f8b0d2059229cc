"""Which room may import which: one table, checked here and printed in docs/architecture.md."""

import ast
import functools
import graphlib
import pathlib
import sys
from collections.abc import Iterator

import pytest

from tests import ROOT

PAGE = ROOT / "docs/architecture.md"
MARKERS = ("<!-- rooms: from tests/test_layout.py -->\n", "<!-- end of rooms -->\n")
MAX_LINES = 450

EVERYTHING = "everything"
# Room -> what it may import of ours besides itself: rooms, or single modules of a room. A room is a
# folder or a module of rpn_jax, or a folder beside it.
ROOMS = {
  "base": [],
  "config": ["base"],
  "devices": ["base"],
  "chips": ["devices", "base"],
  "models": [],
  "text": ["models", "devices", "config", "base"],
  "weights": ["models", "devices", "config", "base"],
  "training": ["models", "weights", "devices", "config", "base"],
  "drawing": ["base"],
  "annotations": ["drawing", "base"],
  "inference": [
    "training.checkpoint", "training.identity", "training.run", "text", "weights", "models",
    "annotations", "drawing", "devices", "config", "base",
  ],
  "tasks": [
    "inference", "training", "annotations", "drawing", "weights", "text", "devices", "config",
    "base",
  ],
  "analysis": [
    "inference", "training", "drawing", "weights", "text", "models", "chips", "devices", "config",
    "base",
  ],
  "data_pipelines": ["base"],
  "configs": ["config"],
  "cli": EVERYTHING,
  "reproduce": EVERYTHING,
  "main": EVERYTHING,
  "benchmarks": EVERYTHING,
}  # fmt: skip
# The public names of `import rpn_jax` and `python -m rpn_jax`.
ROOMS |= {"__init__": EVERYTHING, "__main__": ["base", "cli"]}

# Room -> packages of others that it must not import.
HEAVY = {"jax", "flax", "optax", "orbax"}
FOREIGN = {
  "base": HEAVY,
  "config": HEAVY,
  "annotations": HEAVY,
  "configs": HEAVY | {"numpy"},
  "data_pipelines": HEAVY,
}
# The data's packages stay out of rpn_jax; other frameworks are nowhere but in the benchmarks.
DATA_PACKAGES = {"grain", "tensorflow_datasets", "array_record"}
OTHER_FRAMEWORKS = {"torch", "tensorflow"}
# What computes needs nothing but arrays.
ARRAYS = {"jax", "flax", "einops", "numpy"}
PURE = ("models", "training.losses", "inference.metrics")

# What speaks to buckets takes a second to import, so it is when a path is in one.
STORAGE = {"gcsfs", "fsspec", "etils", "google_crc32c"}
# Modules that make local paths of strings, which are never in a bucket: of raw files, which
# `prepare` takes from a disk only, and of the package itself or the system. Elsewhere a person's
# "gs://bucket/run" would become a local folder "gs:".
LOCAL = (
  "rpn_jax.base.paths", "rpn_jax.base.leases", "rpn_jax.base.picture_files",
  "rpn_jax.base.vocabularies", "rpn_jax.weights.hub",
  "rpn_jax.tasks.demo", "rpn_jax.training.bucket_checkpoints", "data_pipelines.sources.builder",
)  # fmt: skip

# Modules whose imports may wait inside a function, for an answer to --help at once.
LATE = ("rpn_jax", "rpn_jax.cli", "main")
TOPS = ("rpn_jax", "data_pipelines", "configs", "benchmarks")


def find_modules() -> dict[str, pathlib.Path]:
  """Dotted name -> file of every module of ours but the tests."""
  paths = [p for top in TOPS for p in sorted((ROOT / top).rglob("*.py"))] + [ROOT / "main.py"]
  found = {}
  for path in paths:
    parts = path.relative_to(ROOT).with_suffix("").parts
    found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
  return found


MODULES = find_modules()


@functools.cache
def trees() -> dict[str, ast.AST]:
  """Name of a module -> its syntax tree."""
  return {name: ast.parse(path.read_text()) for name, path in MODULES.items()}


@functools.cache
def imported() -> dict[str, list[tuple[str, bool]]]:
  """Name of a module -> what it imports."""
  return {name: list(imports(tree)) for name, tree in trees().items()}


def room_of(module: str) -> str:
  """The row of the table: rpn_jax.models.rpn -> models, data_pipelines.shapes -> data_pipelines."""
  top, *rest = module.split(".")
  return (rest[0] if rest else "__init__") if top == "rpn_jax" else top


def imports(tree: ast.AST) -> Iterator[tuple[str, bool]]:
  """Modules that are imported, and whether inside a function.

  For `from a.b import c` it is a.b.c where that is a module, else a.b.
  """

  def walk(node: ast.AST, late: bool) -> Iterator[tuple[str, bool]]:
    if isinstance(node, ast.Import):
      yield from ((alias.name, late) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      assert not node.level, f"line {node.lineno}: relative import"
      for alias in node.names:
        full = f"{node.module}.{alias.name}"
        yield (full if full in MODULES else node.module), late
    late = late or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
    for child in ast.iter_child_nodes(node):
      yield from walk(child, late)

  yield from walk(tree, False)


def allowed(user: str, used: str) -> bool:
  """Whether the table lets one module of ours import another."""
  rooms = ROOMS[room_of(user)]
  if rooms is EVERYTHING or room_of(user) == room_of(used):
    return True
  inside = used.removeprefix("rpn_jax.")
  return any(inside == room or inside.startswith(f"{room}.") for room in rooms)


def render_table() -> str:
  """The table as docs/architecture.md prints it."""
  lines = ["| room | may import |", "| --- | --- |"]
  for room, others in ROOMS.items():
    text = others if others is EVERYTHING else ", ".join(others) or "nothing of ours"
    lines.append(f"| `{room}` | {text} |")
  return "\n".join(lines) + "\n"


def test_every_module_is_in_a_room():
  assert {room_of(name) for name in MODULES} == set(ROOMS), "a room without a row, or a row without"
  for room, others in ROOMS.items():
    for other in [] if others is EVERYTHING else others:
      known = other in ROOMS or f"rpn_jax.{other}" in MODULES
      assert known, f"the row of {room} names {other}, which is not there"


def test_the_table_has_no_circle():
  graph = {
    room: {other.split(".")[0] for other in others}
    for room, others in ROOMS.items()
    if others is not EVERYTHING
  }
  graphlib.TopologicalSorter(graph).prepare()  # raises CycleError


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_what_its_row_says(room):
  outside = [
    f"{name} imports {used}"
    for name, found in imported().items()
    for used, _ in found
    if room_of(name) == room and used in MODULES and not allowed(name, used)
  ]
  assert not outside, "\n".join(outside)


def test_the_table_would_notice():
  assert allowed("rpn_jax.inference.segmenter", "rpn_jax.training.checkpoint")
  assert not allowed("rpn_jax.inference.segmenter", "rpn_jax.training.step")
  assert not allowed("rpn_jax.models.rpn", "rpn_jax.base.errors")
  assert not allowed("data_pipelines.shapes", "rpn_jax.models.clip")
  assert not allowed("rpn_jax.tasks.train", "data_pipelines.datasets")
  tree = ast.parse("import a.b\ndef f():\n  from rpn_jax.base import errors\n  import numpy.linalg")
  assert list(imports(tree)) == [
    ("a.b", False),
    ("rpn_jax.base.errors", True),
    ("numpy.linalg", True),
  ]


def test_imports_of_ours_are_at_the_top():
  late = [
    f"{name} imports {used} inside a function"
    for name, found in imported().items()
    for used, late in found
    if late and used in MODULES and name not in LATE
  ]
  assert not late, "\n".join(late)


def test_no_modules_import_each_other_in_a_circle():
  # The names under TYPE_CHECKING in rpn_jax/__init__.py are for type checkers only.
  graph = {
    name: {used for used, _ in found if used in MODULES} - {name}
    for name, found in imported().items()
    if name != "rpn_jax"
  }
  graphlib.TopologicalSorter(graph).prepare()  # raises CycleError and names the modules


@pytest.mark.parametrize("room", ROOMS)
def test_packages_of_others_are_where_they_belong(room):
  for name in (name for name in MODULES if room_of(name) == room):
    banned = set() if room == "benchmarks" else FOREIGN.get(room, set()) | OTHER_FRAMEWORKS
    if name.startswith("rpn_jax"):
      banned = banned | DATA_PACKAGES
    used = {module.split(".")[0] for module, _ in imported()[name]}
    assert not used & banned, f"{name} imports {sorted(used & banned)}"
    if any(f"{name}.".startswith(f"rpn_jax.{pure}.") for pure in PURE):
      used -= {*sys.stdlib_module_names, *ARRAYS, "rpn_jax"}
      assert not used, f"{name} imports {sorted(used)}, but needs nothing but arrays"


def test_packages_for_buckets_are_imported_when_they_are_needed():
  early = [
    f"{name} imports {used}"
    for name, found in imported().items()
    for used, late in found
    if used.split(".")[0] in STORAGE and not late
  ]
  assert not early, "\n".join(early)


def test_paths_that_people_type_go_through_expand():
  made = [
    f"{name}, line {node.lineno}"
    for name, tree in trees().items()
    if name not in LOCAL and room_of(name) not in ("benchmarks", "configs")
    for node in ast.walk(tree)
    if isinstance(node, ast.Call)
    and ast.unparse(node.func) == "pathlib.Path"
    and ast.unparse(node.args[0]) != "__file__"
  ]
  assert not made, "pathlib.Path(...) of what may be in a bucket: use paths.expand: " + "; ".join(
    made
  )


def test_no_module_shadows_the_standard_library():
  shadows = {n for n in MODULES if n.split(".")[-1] in sys.stdlib_module_names}
  assert not shadows


def test_files_are_short():
  lines = {
    str(path.relative_to(ROOT)): len(path.read_text().splitlines())
    for name, path in MODULES.items()
    if not name.startswith("benchmarks")
  }
  long = {path: count for path, count in lines.items() if count > MAX_LINES}
  assert not long, f"more than {MAX_LINES} lines: {long}"


def test_tests_mirror_the_rooms():
  rooms = {room for room in ROOMS if (ROOT / "rpn_jax" / room).is_dir()}
  rooms |= {"data_pipelines", "configs"}
  tested = {path.parent.name for path in (ROOT / "tests").glob("*/test_*.py")}
  assert rooms <= tested, f"rooms without tests: {sorted(rooms - tested)}"
  # Fuzzing and compiling for TPUs span the rooms.
  assert tested - rooms <= {"fuzz", "tpu"}, (
    f"tests without a room: {sorted(tested - rooms - {'fuzz', 'tpu'})}"
  )


def test_the_core_is_read_in_an_afternoon():
  core = ["clip", "prompts", "rpm", "rpn"]
  lines = sum(len((ROOT / f"rpn_jax/models/{n}.py").read_text().splitlines()) for n in core)
  assert lines <= 950  # signatures with types are 60 of them


def test_the_page_prints_the_table():
  text = PAGE.read_text()
  start, end = MARKERS
  assert text.count(start) == text.count(end) == 1, "docs/architecture.md lacks the markers"
  printed = text.partition(start)[2].partition(end)[0]
  assert printed == f"\n{render_table()}\n", (
    f"docs/architecture.md: put this between the markers:\n\n{render_table()}"
  )
