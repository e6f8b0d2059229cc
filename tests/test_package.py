"""What `pip install .` gives: the wheel's contents, and the command."""

import ast
import collections
import email
import gc
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import rpn_jax
from rpn_jax import cli
from rpn_jax.base import console
from tests import FIXTURES, ROOT, tiny

SCENE = ROOT / "rpn_jax/assets/scene.png"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
  """Built from a copy, since setuptools leaves folders behind."""
  copy = tmp_path_factory.mktemp("source") / "rpn"
  packages = ("rpn_jax", "data_pipelines", "configs", "tests", "benchmarks", "colab", "docs")
  for folder in packages:
    shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
  for file in ROOT.iterdir():
    if file.is_file():
      shutil.copy(file, copy)
  out = tmp_path_factory.mktemp("wheel")
  command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
  result = subprocess.run(
    [*command, "--wheel-dir", str(out), str(copy)], capture_output=True, text=True
  )
  assert result.returncode == 0, result.stderr
  (path,) = out.iterdir()
  return path


def test_wheel_has_what_runs_and_nothing_else(wheel):
  with zipfile.ZipFile(wheel) as archive:
    names = archive.namelist()
    info = next(n for n in names if n.endswith("METADATA"))
    metadata = email.message_from_bytes(archive.read(info))
    entry = archive.read(next(n for n in names if n.endswith("entry_points.txt"))).decode()
  tops = {n.split("/")[0] for n in names if ".dist-info" not in n}
  assert tops == {"rpn_jax"}
  source = {
    str(p.relative_to(ROOT))
    for p in (ROOT / "rpn_jax").rglob("*")
    if p.is_file() and "__pycache__" not in p.parts
  }
  assert source <= set(names), f"missing from the wheel: {sorted(source - set(names))}"
  assert not [n for n in names if "test" in n or n.endswith(".pyc")]
  assert metadata["Name"] == "rpn-jax" and metadata["Version"] == rpn_jax.__version__
  assert {"rpn_jax/py.typed", "rpn_jax/assets/shapes_clip.safetensors"} <= set(names)
  assert re.search(r"^rpn = rpn_jax\.cli:main$", entry, re.M)
  got = [Requirement(line) for line in metadata.get_all("Requires-Dist")]
  assert {str(r) for r in got if r.marker is None} == {str(r) for r in declared()}
  assert [r for r in got if r.marker is not None and "demo" in str(r.marker)]


def declared() -> list[Requirement]:
  """What the wheel asks for, in ranges."""
  project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
  return [Requirement(line) for line in project["dependencies"]]


def pins(file: str) -> list[Requirement]:
  lines = (line.split("#")[0].strip() for line in (ROOT / file).read_text().splitlines())
  return [Requirement(line) for line in lines if line and not line.startswith("-r")]


def test_every_pin_lies_within_its_range_and_every_range_ends():
  pinned = collections.defaultdict(list)
  for requirement in pins("requirements.txt"):
    (pin,) = requirement.specifier
    assert pin.operator == "==", f"requirements.txt: {requirement} is no pin"
    pinned[canonicalize_name(requirement.name)].append(pin.version)
  for requirement in declared():
    name = canonicalize_name(requirement.name)
    assert {s.operator for s in requirement.specifier} == {">=", "<"}, requirement
    assert pinned[name], f"{name} is declared, but requirements.txt has no pin of it"
    outside = [v for v in pinned[name] if v not in requirement.specifier]
    assert not outside, f"{name}: {outside} of requirements.txt is outside {requirement.specifier}"
    # The oldest version that may be installed is one that the tests ran with.
    (lower,) = (s.version for s in requirement.specifier if s.operator == ">=")
    assert Version(lower) == min(map(Version, pinned[name])), requirement


def test_what_reads_data_has_one_pin():
  extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
  assert set(map(Requirement, extras["data"])) <= set(pins("requirements.txt"))


def test_the_wheel_asks_for_what_the_package_imports():
  imported = set()
  for path in (ROOT / "rpn_jax").rglob("*.py"):
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.Import):
        imported |= {alias.name.split(".")[0] for alias in node.names}
      elif isinstance(node, ast.ImportFrom):
        imported.add(node.module.split(".")[0])
  imported -= {*sys.stdlib_module_names, "rpn_jax"}
  # Of the extras `demo`, `gs`, `geo` and `export`.
  imported -= {"gradio", "fsspec", "gcsfs", "rasterio", "onnx", "onnxruntime"}
  imported -= {"data_pipelines"}  # of a clone, for `reproduce`, which wants one
  distributions = importlib.metadata.packages_distributions()
  names = {canonicalize_name(requirement.name) for requirement in declared()}
  found = set()
  for module in imported:
    owners = {canonicalize_name(d) for d in distributions[module]}
    assert owners & names, f"rpn_jax imports {module}, which pyproject.toml does not declare"
    found |= owners & names
  assert found == names, f"declared, but not imported by rpn_jax: {sorted(names - found)}"


def without_progress(stderr: str) -> str:
  """Without the lines that tell how far a command is, which come where the machine is busy."""
  return re.sub(r"^segment on cpu: \d+/\d+ images?\n", "", stderr, flags=re.M)


# What a first image needs none of, and what takes long to load.
UNNEEDED = (
  "optax", "orbax", "tensorstore", "matplotlib", "ftfy", "jax.experimental.pallas", "scipy",
  "huggingface_hub", "httpx2", "pycocotools", "tensorboardX",
)  # fmt: skip
# `python -m rpn_jax`, which then writes a last line of JSON: those of UNNEEDED that it loaded, and
# the programs that it compiled or read from JAX's cache.
WATCHED = f"""
import json, runpy, sys, jax
programs = []
def note(event, duration, fun_name="", **_):
  if event == "/jax/core/compile/backend_compile_duration":
    programs.append(fun_name)
jax.monitoring.register_event_duration_secs_listener(note)
try:
  runpy.run_module("rpn_jax", run_name="__main__", alter_sys=True)
finally:
  print(json.dumps([[name for name in {UNNEEDED} if name in sys.modules], programs]))
"""


def test_the_wheel_segments_away_from_the_source(wheel, tmp_path):
  with zipfile.ZipFile(wheel) as archive:
    archive.extractall(tmp_path / "site")
  environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
  command = [sys.executable, "-c", WATCHED, "segment", str(SCENE), "plain yellow, sand, water"]
  result = subprocess.run(
    command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
  )
  assert result.returncode == 0, result.stderr
  assert result.stdout.startswith("RPN, step 3000 of shapes;")
  assert without_progress(result.stderr) == ""
  files = {p.name for p in (tmp_path / "predictions").iterdir()}
  assert files == {"scene_overlay.png", "scene_labels.png", "scene.json"}
  loaded, programs = json.loads(result.stdout.splitlines()[-1])
  assert loaded == []
  # The network, the merging of its windows, the text tower where no embeddings are kept, and the
  # cast of the weights where bfloat16 is the fast type.
  of_words = [name for name in programs if name != "jit(_cast)"]
  assert 2 <= len(of_words) <= 3 and programs.count("jit(_cast)") <= 1, programs


def test_version_is_in_one_place_and_that_of_the_changelog(capsys):
  """A development version while the newest heading there is unreleased."""
  version = rpn_jax.__version__
  heading = re.search(r"^## (\S+)( \(unreleased\))?$", (ROOT / "CHANGELOG.md").read_text(), re.M)
  assert Version(version).base_version == heading[1]
  assert Version(version).is_devrelease == bool(heading[2])
  assert version not in (ROOT / "pyproject.toml").read_text()
  with pytest.raises(SystemExit) as ended:
    cli.main(["--version"])
  assert ended.value.code == 0 and capsys.readouterr().out == f"rpn-jax {version}\n"


EXTRAS = ("gradio", "gcsfs", "pillow-heif", "rasterio", "onnx", "onnxruntime", "flatbuffers")


@pytest.mark.parametrize("name", EXTRAS)
def test_the_pin_of_an_extra_is_one(name):
  """In pyproject.toml, requirements-dev.txt, the pages, and the errors that name the package."""
  pin = re.search(rf"\b{name}==[\d.]+", (ROOT / "pyproject.toml").read_text())[0]
  assert pin in (ROOT / "requirements-dev.txt").read_text().splitlines()
  code = [path.read_text() for path in (ROOT / "rpn_jax").rglob("*.py")]
  pages = [path.read_text() for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))]
  for texts in (code, pages):
    found = re.findall(rf"\b{name}==[\d.]*\d", "\n".join(texts))
    assert found and set(found) == {pin}


def test_hooks_and_workflow_run_the_commands_of_make_and_the_readme():
  lint = subprocess.run(
    ["make", "-n", "lint"], cwd=ROOT, capture_output=True, text=True, check=True
  ).stdout
  checks = [
    line.removesuffix(" .")
    for line in lint.splitlines()
    if re.match(r"\.venv/bin/(ruff|mypy)", line)
  ]
  config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
  hooks = {hook["id"]: hook["entry"] for repo in config["repos"] for hook in repo["hooks"]}
  assert checks == [".venv/bin/ruff check", ".venv/bin/ruff format --check", ".venv/bin/mypy"]
  assert [entry.split()[:2] for entry in hooks.values()] == [
    check.split()[:2] for check in checks
  ]  # the hook formats instead of complaining
  workflow = yaml.safe_load((ROOT / ".github/workflows/test.yml").read_text())
  matrix = workflow["jobs"]["commands"]["strategy"]["matrix"]
  assert matrix == {"command": ["make test", "make demo"], "python": ["3.11", "3.12", "3.13"]}
  assert all(command in (ROOT / "README.md").read_text() for command in matrix["command"])
  slow = workflow["jobs"]["slow"]
  assert slow["steps"][-1] == {"run": "make test-slow"} and "schedule" in slow["if"]
  assert (ROOT / ".ci/run").read_text().count("\nmake test\n") == 1


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["segment", "none.jpg", "cat"], "error: none.jpg: expected an image or a folder"),
    (["segment", str(SCENE), "cat,,dog"], "error: class name 2 of 3 is empty"),
    (["segment", str(SCENE), "cat", "--model", "none"], "error: model='none': expected"),
    (["segment", str(SCENE), "cat", "--other", "2"], "threshold in [0, 1], got 2"),
    (["segment", str(SCENE), "cat", "--method", "x"], "error: method='x' is not known"),
    (["prepare", "voc2013"], "error: "),
    (["attenton"], "error: command 'attenton' is not known; did you mean 'attention'? Known: "),
    (["convert", "none.pt", "out.safetensors"], "none.pt does not exist"),
  ],
)
def test_errors_are_one_line(arguments, message, capsys, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert cli.main(arguments) == 2
  lines = capsys.readouterr().err.strip().splitlines()
  assert len(lines) == 1 and message in lines[0], lines
  assert not list(tmp_path.glob("*.safetensors"))


def test_one_damaged_picture_does_not_stop_a_folder(tmp_path, capsys):
  (tmp_path / "in").mkdir()
  for name in ("a.png", "c.png"):
    shutil.copy(SCENE, tmp_path / "in" / name)
  for name in ("b.jpg", "d.jpg"):
    (tmp_path / "in" / name).write_text("not a picture")
  tiny.save(tmp_path / "clip.safetensors")
  command = ["segment", str(tmp_path / "in"), "sand, water", "--out", str(tmp_path / "out")]
  assert cli.main([*command, f"--model={tmp_path}/clip.safetensors"]) == 2
  listed = tmp_path / "out/skipped.txt"
  error = capsys.readouterr().err
  assert f"error: 2 of 4 images were skipped, such as {tmp_path}/in/b.jpg: " in error
  assert f"; {listed} lists all" in error
  _, *lines = listed.read_text().splitlines()
  assert [line.split(": ")[0] for line in lines] == [f"{tmp_path}/in/{n}.jpg" for n in "bd"]
  assert {p.name for p in (tmp_path / "out").iterdir()} == {
    "skipped.txt",
    *(f"{stem}{end}" for stem in "ac" for end in ("_overlay.png", "_labels.png", ".json")),
  }
  content = json.loads((tmp_path / "out/c.json").read_text())
  assert content["image"] == str(tmp_path / "in/c.png")


def test_help_is_no_error(capsys):
  for arguments in (["--help"], *([command, "--help"] for command in cli.COMMANDS)):
    with pytest.raises(SystemExit) as ended:
      cli.main(arguments)
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith("usage: ")
  code = "import sys, rpn_jax.cli; print('jax' in sys.modules)"
  out = subprocess.check_output([sys.executable, "-c", code], text=True, cwd=ROOT)
  assert out.strip() == "False"


def test_home_is_understood(tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path))
  shutil.copy(SCENE, tmp_path)
  shutil.copy(ROOT / "rpn_jax/assets/shapes_clip.safetensors", tmp_path / "clip.safetensors")
  files = ["~/scene.png", "sand, water", "--model=~/clip.safetensors", "--out=~/out"]
  assert cli.main(["segment", *files]) == 0
  assert (tmp_path / "out/scene.json").exists()


@pytest.mark.parametrize("command", cli.IN_CLONE)
def test_what_needs_a_clone_says_so(command, tmp_path):
  (tmp_path / "rpn_jax").symlink_to(ROOT / "rpn_jax")
  result = subprocess.run(
    [sys.executable, "-m", "rpn_jax", command, "x"], cwd=tmp_path, capture_output=True, text=True
  )
  assert result.returncode == 2 and not result.stdout
  assert "need a clone of the project" in result.stderr
  assert f"-m rpn_jax {command} x" in result.stderr


@pytest.mark.slow
def test_a_run_segments_without_warnings(tmp_path):
  """What libraries have to say about reading a checkpoint means nothing to who segments."""
  run = FIXTURES / "run_0_2_0/workdir"  # its weights are named relative to the clone
  command = [sys.executable, "-m", "rpn_jax", "segment", str(SCENE), "sand, water"]
  command += [f"--model={run}", f"--out={tmp_path}/out"]
  result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
  assert (result.returncode, without_progress(result.stderr)) == (0, "")
  assert result.stdout.startswith("RPN, step ")


@pytest.mark.slow
def test_quiet_prints_nothing(tmp_path, capfd, monkeypatch):
  """Of main.py, in a process of its own: test_main.py."""
  monkeypatch.setattr(console, "_silent", False)
  monkeypatch.setattr(sys, "stdout", sys.stdout)
  gc.collect()  # what earlier tests left open is complained about now
  capfd.readouterr()
  command = ["segment", str(SCENE), "sand, water", "--quiet", "--out", str(tmp_path)]
  assert cli.main(command) == 0
  sys.stdout.close()  # nowhere, where it goes from now on
  assert tuple(capfd.readouterr()) == ("", "")
  assert len(list(tmp_path.iterdir())) == 3
