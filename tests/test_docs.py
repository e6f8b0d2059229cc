"""What README.md and docs/ say can be done is done here in a smaller form; links lead somewhere."""

import ast
import contextlib
import functools
import inspect
import io
import json
import os
import pathlib
import re
import runpy
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest
import yaml
from PIL import Image

import main
from data_pipelines import datasets, prepare, shapes
from rpn_jax import Segmenter, cli, config
from rpn_jax.base import fields
from rpn_jax.inference.predictor import Predictor
from rpn_jax.inference.segmentation import Segmentation, save_results
from rpn_jax.weights.clip_file import with_normalization
from tests import ROOT, tiny

PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES += [ROOT / "CONTRIBUTING.md", ROOT / "colab/README.md", ROOT / "rpn_jax/assets/README.md"]
README = (ROOT / "README.md").read_text()
API = (ROOT / "docs/api.md").read_text()
DATA = (ROOT / "docs/data.md").read_text()
MASKS = (ROOT / "docs/masks.md").read_text()
# The command of `make demo`.
DEMO = ".venv/bin/python main.py --config=configs/shapes.py --workdir=runs/shapes"
TORCHSCRIPT = ROOT / "tests/fixtures/torchscript_clip.pt"


def blocks(text: str, language: str) -> list[str]:
  return re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)


def commands(text: str) -> list[str]:
  """Shell commands of a text, with lines joined and comments left out."""
  lines = "\n".join(blocks(text, "sh")).replace("\\\n", " ").splitlines()
  return [shlex.join(shlex.split(line, comments=True)) for line in lines if line.strip()]


# Links


def anchors(path: pathlib.Path) -> set[str]:
  heads = re.findall(r"^#+ (.*)$", path.read_text(), re.M)
  return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
  text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(), flags=re.S)
  for target in re.findall(r"\]\(([^)\s]+)\)", text):
    if re.match(r"https?://", target):
      continue
    file, _, anchor = target.partition("#")
    path = (page.parent / file).resolve() if file else page
    assert path.exists(), f"{page.name} links to {target}, which is not there"
    inside = page.parent != ROOT / "docs" or path.is_relative_to(ROOT / "docs")
    assert inside, f"{page.name} links to {target}: the site of `make docs` holds docs/ alone"
    if anchor:
      assert anchor in anchors(path), f"{page.name} links to {target}, which is no heading"


def test_every_page_is_in_the_index():
  index = (ROOT / "docs/index.md").read_text()
  for page in (ROOT / "docs").glob("*.md"):
    assert page.name == "index.md" or f"]({page.name})" in index, f"docs/index.md lacks {page.name}"


# Troubleshooting


def messages() -> str:
  """Every text in the code, with … for what is filled in."""
  found = []
  files = [*ROOT.glob("rpn_jax/**/*.py"), *ROOT.glob("data_pipelines/**/*.py")]
  for path in [*files, ROOT / "main.py", ROOT / "configs/common.py"]:
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.JoinedStr):
        parts = [p.value if isinstance(p, ast.Constant) else "…" for p in node.values]
        found.append("".join(map(str, parts)))
      elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        found.append(node.value.replace("%s", "…"))
  return "\n".join(found)


def test_each_error_that_is_explained_exists():
  page = (ROOT / "docs/troubleshooting.md").read_text()
  rows = re.findall(r"^\| `(.+?)` \| (.+) \|$", page, re.M)
  assert len(rows) > 30
  code = messages()
  for message, cure in rows:
    assert message in code, f"no error says {message!r}"
    assert len(cure) > 20


# Sources


def test_what_is_cited_is_one():
  """The paper in CITATION.cff and in the BibTeX of docs/sources.md; recordings that are there."""
  page = (ROOT / "docs/sources.md").read_text()
  cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())["preferred-citation"]
  (bibtex,) = blocks(page, "bibtex")
  entry = dict(re.findall(r"(\w+) += \{(.*?)\},?$", bibtex, re.M))
  assert entry["title"] == cited["title"] and entry["journal"] == cited["journal"]
  people = [f"{who['family-names']}, {who['given-names']}" for who in cited["authors"]]
  assert entry["author"] == " and ".join(people)
  numbers = {"volume": cited["volume"], "pages": f"{cited['start']}--{cited['end']}"}
  assert {name: str(value) for name, value in numbers.items()}.items() <= entry.items()
  assert cited["url"] in page and cited["url"] in README
  for file in re.findall(r"`(?:tests/golden_training_free/)?(\w+\.npz)`", page):
    assert (ROOT / "tests/golden_training_free" / file).exists(), file
  for folder in re.findall(r"`((?:tests|rpn_jax|data_pipelines)/[\w./]+)`", page):
    assert (ROOT / folder).exists(), folder


# What pages name


def code_of(page: pathlib.Path) -> list[str]:
  """The lines of a page's blocks, joined where they continue, and what stands in backticks."""
  text = page.read_text()
  fenced = "".join(re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S))
  inline = re.findall(r"`([^`]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))
  lines = [*fenced.replace("\\\n", " ").splitlines(), *inline]
  return [re.sub(r"\s+#.*", "", line.replace("\n", " ")) for line in lines]


NOW = [page for page in PAGES if page.name != "CHANGELOG.md"]  # that names what was
# A file, a function, and the section of the network that docs/extending.md adds.
OTHER_NAMES = ("json", "check", "text_tuned")
FLAG = re.compile(r"(?<!\S)--(?:no)?([a-z_]+)(?![\w.])")


@pytest.mark.parametrize("page", NOW, ids=lambda page: str(page.relative_to(ROOT)))
def test_fields_and_configs_that_pages_name_exist(page):
  known = fields.declared(config.Run)
  sections = {name[: dot.start()] for name in known for dot in re.finditer(r"\.", name)}
  for code in code_of(page):
    for name in re.findall(r"(?:^|--|\s)config\.([a-z][\w.]*\w)(?=[=\s]|$)", code):
      assert name in {*known, *sections, *OTHER_NAMES}, f"{page.name}: config.{name}"
    for file, words in re.findall(r"(configs/(?!test_)\w+\.py)(?::([\w.=|/,+-]+))?", code):
      assert (ROOT / file).exists(), f"{page.name}: {code}"
      # METHOD stands for a word, a sweep adds the name of a row.
      if not re.search("[A-Z]{3}", words) and not re.search("ablations|study", file):
        runpy.run_path(str(ROOT / file))["get_config"](words)


@pytest.mark.parametrize("page", NOW, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_are_spelled_in_one_way(page):
  """`rpn COMMAND` and `python …`, in the environment that the README names once."""
  for code in code_of(page):
    assert not re.search(r"python -m rpn_jax \w|^\.venv/bin/", code), f"{page.name}: {code}"


@pytest.fixture(scope="module")
def flags_of():
  """Command -> its flags, from --help."""
  calls = {f"rpn {name}": functools.partial(cli.main, [name, "--help"]) for name in cli.COMMANDS}
  known = {"main.py": set(main.FLAGS)}
  for name, call in calls.items():
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
      call()
    known[name] = set(FLAG.findall(re.sub(r"[\[\]]", " ", said.getvalue())))
    assert "help" in known[name]
  return known


@pytest.mark.parametrize("page", NOW, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_that_pages_name_have_these_flags(page, flags_of):
  for code in code_of(page):
    if "main.py " in code:
      command = "main.py"
    elif found := re.search(r"(?:\brpn |-m rpn_jax |-m data_pipelines\.(?=prepare))(\w+)", code):
      command = f"rpn {found[1]}"
    else:
      continue
    for flag in FLAG.findall(code):
      assert flag in flags_of.get(command, ()), f"{page.name}: {code}"


def test_no_text_asks_a_package_index_for_this_package():
  """It is on none: it is installed from a clone, and what it may need is named by itself."""
  texts = {page.name: page.read_text() for page in PAGES} | {"an error": messages()}
  for name, text in texts.items():
    assert not re.search(r"install[^\n`]*\brpn[-_]jax\b|\brpn[-_]jax\[", text), name


# README


def test_commands_that_need_a_clone_are_named(capsys):
  """In the README and in the help, no more and no fewer."""
  (sentence,) = re.findall(r"`data_pipelines/`\),(.*?)need the clone", README, re.DOTALL)
  named = set(re.findall(r"`(\w+)`", sentence))
  with pytest.raises(SystemExit):
    cli.main(["--help"])
  told = " ".join(capsys.readouterr().out.split())
  helped = {name for name, (_, text) in cli.COMMANDS.items() if f"{text}; in a clone" in told}
  assert named == helped == set(cli.IN_CLONE)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
  """A folder to run commands in: the project, a tiny CLIP, pictures with masks."""
  root = tmp_path_factory.mktemp("readme")
  for name in ("rpn_jax", "data_pipelines", "configs", "main.py"):
    os.symlink(ROOT / name, root / name)
  tiny.save(root / "clip.safetensors")
  shutil.copy(TORCHSCRIPT, root / "ViT-B-16.pt")
  (root / "weights").mkdir()
  rng = np.random.default_rng(0)
  for kind in ("images", "labels"):
    (root / "PICTURES" / kind).mkdir(parents=True)
  (root / "PICTURES/names.txt").write_text("\n".join(shapes.CLASSES))
  for i in range(12):
    image, label = shapes.draw_scene(rng, 40, 48, (1, 2))
    Image.fromarray(image).save(root / f"PICTURES/images/{i}.png")
    Image.fromarray(label).save(root / f"PICTURES/labels/{i}.png")
  return root


def run(place, command: str) -> None:
  """Runs a command in the folder; those of `rpn` in this process, where all is loaded."""
  program, *words = shlex.split(command)
  if program == "rpn":
    with contextlib.chdir(place):
      assert cli.main(words) == 0, command
    return
  assert program in ("python", ".venv/bin/python"), command
  words = [sys.executable, *words]
  result = subprocess.run(words, cwd=place, capture_output=True, text=True, timeout=600)
  assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"


def tiny_flags(*more: str) -> str:
  flags = shlex.join([*tiny.FLAGS, "--config.clip=clip.safetensors", *more])
  return " " + flags


def smaller(command: str) -> str | None:
  """The same command on less; None where something else proves it."""
  if command.startswith("make "):
    return None
  if command.startswith(("git clone", "python3 -m venv", "pip install", ". ")):
    return None
  if "--model=ViT-B/16" in command:  # tests/weights/test_hub.py fetches one
    return command.replace("ViT-B/16", "clip.safetensors").replace(
      "photo.jpg", "PICTURES/images/0.png"
    )
  if command.startswith("rpn demo"):
    return None  # tests/tasks/test_demo.py opens the page
  if command.startswith("rpn sweep"):
    return None  # hours; tests/analysis/test_sweep.py
  if "main.py" in command and "training_free" in command:
    return command.replace("method=sclip", "method=sclip,runlocal") + tiny_flags()
  if "main.py" in command and "folder.py" in command:
    # As written, with the shipped CLIP: whatever does not fit it would fail or be told.
    return command + " --config.steps=2"
  if "shapes.py" in command:
    command = command.replace("PHOTO_OR_FOLDER", "PICTURES/images")
    return command.replace("shapes.py", "shapes.py:runlocal") + tiny_flags("--config.steps=2")
  return command.replace("PHOTO_OR_FOLDER", "PICTURES/images")


def trains(command: str) -> bool:
  """Whether it trains or needs a run: minutes in all."""
  return any(word in command for word in ("main.py", "runs/"))


def test_quick_commands_of_the_readme_run(place):
  """Those that segment, prepare and convert."""
  quick = [c for c in map(smaller, commands(README)) if c and not trains(c)]
  for command in quick:
    run(place, command)
  assert len(quick) == 4
  for file in (
    "predictions/scene.json", "data/folder/mine", "weights/ViT-B-16.safetensors"
  ):  # fmt: skip
    assert (place / file).exists(), file


def test_configs_that_the_readme_names():
  """Of the commands that train or evaluate: the file, its words, the fields that are changed."""
  checked = 0
  for command in commands(README):
    words = shlex.split(command)
    if "main.py" in words:
      flags = dict(word[2:].split("=", 1) for word in words if word.startswith("--"))
      if "config" not in flags:  # the run has its settings
        assert "runs/" in flags["workdir"] and "runs/shapes" in README
        continue
      file, _, arg = flags.pop("config").partition(":")
      settings = runpy.run_path(str(ROOT / file))["get_config"](arg)
      fields = {name[7:]: value for name, value in flags.items() if name.startswith("config.")}
      settings.update_from_flattened_dict(fields)  # refuses a field that is not there
      assert {name for name in flags if name[7:] not in fields} <= {"mode", "workdir"}
      config.check(settings)
      checked += 1
  assert checked == 3


def of_a_folder() -> list[str]:
  """The README's commands for data of one's own."""
  return [c for c in commands(README) if "folder" in c or "runs/mine" in c]


def test_both_pages_have_the_same_commands_for_a_folder():
  (block,) = (b for b in blocks(DATA, "") if "configs/folder.py" in b)
  assert block.splitlines() == of_a_folder()[:2]


def prepared(place, *changes: tuple[str, str], more: str = "") -> int:
  """Status of the pages' first command for a folder."""
  command = of_a_folder()[0] + more
  for old, new in changes:
    assert old in command
    command = command.replace(old, new)
  with contextlib.chdir(place):
    return prepare.main(shlex.split(command)[3:])


def rename_a_class(folder: pathlib.Path, old: str = "sand", new: str = "beach") -> None:
  text = (folder / "names.txt").read_text()
  assert old in text
  (folder / "names.txt").write_text(text.replace(old, new))


def test_a_folder_is_edited_as_the_page_says(place, capsys):
  """docs/data.md: changes are told, --rebuild reads them, also unseen.txt and splits."""
  folder = place / "EDITED"
  shutil.copytree(place / "PICTURES", folder)
  mine = (("PICTURES", "EDITED"), ("=mine", "=edited"))

  def rebuilt(told: str) -> datasets.SegmentationData:
    assert prepared(place, *mine) == 2 and told in capsys.readouterr().err
    assert prepared(place, *mine, more=" --rebuild") == 0
    settings = runpy.run_path(str(ROOT / file))["get_config"](words).unlock()
    settings.data.variant, settings.data.data_dir = "edited", str(place / "data")
    return datasets.load(with_normalization(settings))

  (file, words) = re.search(r"`(configs/folder.py):(\S*setting=zero_shot)`", DATA).groups()
  assert prepared(place, *mine) == 0
  (folder / "unseen.txt").write_text("sand\n")
  data = rebuilt("unseen are sand, were none")
  assert [data.names[i] for i in data.unseen] == ["sand"] and len(data.trained) == 26
  rename_a_class(folder)
  (folder / "unseen.txt").write_text("water\n")
  data = rebuilt("line 26 of names.txt is 'beach', was 'sand'")
  assert data.names[25:] == ("beach", "water") and data.unseen == (26,)
  for kind in ("images", "labels"):
    (folder / kind / "train").mkdir()
    (folder / kind / "val").mkdir()
    for file_of in (folder / kind).glob("*.png"):
      file_of.rename(folder / kind / ("val" if file_of.stem < "2" else "train") / file_of.name)
  data = rebuilt("files added, such as images/train/")
  assert len(data.eval_examples()) == 4  # 0, 1, 10 and 11


@pytest.mark.slow
def test_training_on_a_folder_as_the_pages_say(place, capfd):
  """As written, with the CLIP that is shipped: prepare, train, use it; then the names change."""
  walked = [smaller(command) for command in of_a_folder()]
  assert len(walked) == 3
  for command in walked:
    words = shlex.split(command)
    if "data_pipelines.prepare" in words:
      with contextlib.chdir(place):
        assert prepare.main(words[3:]) == 0
    else:
      run(place, command)
  said = capfd.readouterr().out
  assert "knows drawn shapes and no photographs" in said
  metrics = json.loads((place / "runs/mine/metrics.json").read_text())
  assert metrics["config"]["data"]["crop"] == 64
  assert metrics["last"]["hiou"] is metrics["last"]["miou_seen"] is None
  (evaluation,) = (c for c in commands(README) if "--mode=eval --workdir" in c)
  of_the_run = evaluation.replace("runs/shapes", "runs/mine")
  for mode in ("eval", "export", "predict --image=PICTURES/images/0.png"):
    run(place, of_the_run.replace("--mode=eval", f"--mode={mode}"))
  record = json.loads((place / "runs/mine/predictions/0.json").read_text())
  assert record["names"] == list(shapes.CLASSES)
  rename_a_class(place / "PICTURES")
  assert prepared(place, more=" --rebuild") == 0
  with pytest.raises(AssertionError, match=r"other class names .* names\.26: sand -> beach"):
    run(place, of_the_run)
  rename_a_class(place / "PICTURES", "beach", "sand")
  assert prepared(place, more=" --rebuild") == 0


def test_masks_of_two_values_as_the_page_says(place):
  """docs/data.md: refused as they are, with the command that it shows."""
  (command,) = (b.strip() for b in blocks(DATA, "") if "--values=0,255" in b)
  masks = place / "BINARY"
  shutil.copytree(place / "PICTURES", masks)
  (masks / "names.txt").write_text("background\nroad\n")
  for path in (masks / "labels").iterdir():
    with Image.open(path) as label:
      Image.fromarray(np.where(np.array(label) > 24, 255, 0).astype(np.uint8)).save(path)
  words = shlex.split(command.replace("PICTURES", "BINARY").replace("=mine", "=binary"))[3:]
  with contextlib.chdir(place):
    assert prepare.main([word for word in words if "--values" not in word]) == 2
    assert prepare.main(words) == 0


def test_commands_about_masks_run(place, monkeypatch):
  """docs/masks.md, in its order and in one folder, but with a single image."""
  listed = commands(MASKS)
  assert len(listed) == 5
  monkeypatch.setattr(Segmenter, "load", functools.cache(Segmenter.load))
  for command in listed:
    run(place, command.replace("PHOTO_OR_FOLDER", "PICTURES/images/0.png"))
  monkeypatch.chdir(place)
  known = {}
  for code in blocks(MASKS, "python"):
    exec(compile(code, "docs/masks.md", "exec"), known)
  assert known["scores"].shape[2] == len(known["names"]) == 2 and len(known["masks"])
  for file in (
    "predictions/scene_overlay.png", "predictions/scene/yolo/data.yaml",
    "predictions/labelme/0.json", "voc_masks/voc/class_names.txt",
  ):  # fmt: skip
    assert (place / file).exists(), file


@pytest.mark.slow
def test_commands_of_the_readme_run(place):
  """In their order, in one folder, as a person would."""
  listed = commands(README)
  run(place, smaller(DEMO))  # `make demo` comes first and leaves the run of later commands
  ran = 0
  for command in listed:
    if small := smaller(command):
      run(place, small)
      ran += 1
  assert ran >= 8
  for file in (
    "predictions/scene.json", "predictions/5_overlay.png", "runs/mine/metrics.json",
    "runs/sclip/metrics.json", "weights/ViT-B-16.safetensors",
  ):  # fmt: skip
    assert (place / file).exists(), file


def test_what_make_runs_exists():
  listed = [c for c in commands(README) if c.startswith("make ")]
  assert listed[:2] == ["make demo", "make test"]
  for command in listed:
    lines = subprocess.run(
      ["make", "-n", "-B", *command.split()[1:]],
      cwd=ROOT, check=True, capture_output=True, text=True,
    ).stdout.splitlines()  # fmt: skip
    assert command != "make demo" or DEMO in lines


def test_install_lines_name_the_pinned_versions():
  requirements = (ROOT / "requirements.txt").read_text() + (ROOT / "pyproject.toml").read_text()
  lines = [c for c in commands(README) if "pip install" in c and "==" in c]
  assert len(lines) == 3
  for line in lines:
    name, version = re.search(r"install '?(\w+)(?:\[\w+\])?==([\d.]+)", line).groups()
    assert f"{name}=={version}" in requirements
  assert "jax==0.12.0.1" in requirements and README.count("0.12.0.1 with Python 3.12") == 2


def test_python_of_the_readme_runs(place, monkeypatch):
  monkeypatch.chdir(place)
  (code,) = blocks(README, "python")
  exec(compile(code, "README.md", "exec"), {})
  assert (place / "predictions/scene_overlay.png").exists()


def of_signature(signature: inspect.Signature) -> list[tuple]:
  """(name, kind, default) of its parameters, without that of the object or the class."""
  parameters = [(p.name, p.kind, p.default) for p in signature.parameters.values()]
  return [p for p in parameters if p[0] not in ("self", "cls")]


def test_python_of_the_api_runs(place, monkeypatch):
  """docs/api.md: its example, and each signature as the code has it."""
  monkeypatch.chdir(place)
  (code,) = blocks(API, "python")
  known: dict = {}
  exec(compile(code, "docs/api.md", "exec"), known)
  written = {str(path.relative_to("predictions")) for path in known["paths"]}
  assert written >= {"unsure_overlay.png", "unsure.json", "all/scene_labels.png"}
  assert any(name.startswith("all/coco/") for name in written)
  lines = [line for block in blocks(API, "text") for line in block.splitlines()]
  for line in lines:
    name, told = line[: line.index("(")], line[line.index("(") :]
    owners = {"Segmenter": Segmenter, "Segmentation": Segmentation, "Predictor": Predictor}
    found = save_results
    if "." in name:
      owner, name = name.split(".")
      found = getattr(owners[owner], name)
    scope: dict = {}
    exec(f"def told{told}: ...", scope)
    got = of_signature(inspect.signature(found))
    assert of_signature(inspect.signature(scope["told"])) == got, f"docs/api.md: {line}"
  assert len(lines) == 10


def test_a_first_reader_finds_the_way():
  """Three sentences, then a picture that is there."""
  first = README.split("\n\n")[1]
  assert len(re.findall(r"\.(?:\s|$)", first.replace("\n", " "))) == 3
  picture = re.search(r"!\[.*\]\((.*)\)", README)[1]
  with Image.open(ROOT / picture) as opened:
    assert min(opened.size) > 300
