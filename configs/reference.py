"""Writes docs/configs.md from the comments of the config fields: python -m configs.reference

The comment of a field stands behind its assignment, or in the lines above it.
"""

import ast
import functools
import importlib
import pathlib

FOLDER = pathlib.Path(__file__).parent
PAGE = FOLDER.parent / "docs" / "configs.md"
# Functions of common.py that fill a part of the config.
PARTS = {"segmentation": "", "model": "model.", "optimizer": "optimizer."}
FAMILIES = ("voc", "coco_stuff", "context", "open_vocab", "folder", "shapes", "training_free")
# The columns of values: a published recipe and the embedded world.
SHOWN = {"voc.py": "voc", "shapes.py": "shapes"}

HEAD = """# Config fields

Every field of a segmentation run, made by `python -m configs.reference` from the comments in
`configs/`. Any of them can be changed: `--config.optimizer.base_lr=1e-4`. A mistyped one is
answered with the nearest.
"""
FILES = """
## Experiment families

| file | what it is |
| --- | --- |
"""


def comments(path: pathlib.Path, prefixes) -> dict[str, str]:
  """Field -> comment, of the assignments `c.field = …` in the functions of `prefixes`."""
  text = path.read_text(encoding="utf-8")
  lines, found = text.splitlines(), {}
  for function in ast.parse(text).body:
    if not isinstance(function, ast.FunctionDef) or function.name not in prefixes:
      continue
    for node in ast.walk(function):
      if isinstance(node, ast.Assign):
        targets = node.targets[0].elts if isinstance(node.targets[0], ast.Tuple) else node.targets
        for target in targets:
          dotted = ast.unparse(target)
          if dotted.startswith("c.") and (comment := _comment(lines, node)):
            found.setdefault(prefixes[function.name] + dotted.removeprefix("c."), comment)
  return found


def _comment(lines: list[str], node: ast.Assign) -> str:
  _, _, behind = lines[node.end_lineno - 1][node.end_col_offset :].partition("# ")
  if behind:
    return behind.strip()
  above = []
  for line in reversed(lines[: node.lineno - 1]):
    if not line.strip().startswith("# "):
      break
    above.append(line.strip().removeprefix("# "))
  return " ".join(reversed(above))


def flat(config, prefix: str = "") -> dict[str, object]:
  """{"data.crop": 512, …}"""
  fields = {}
  for name, value in config.items():
    path = prefix + name
    fields |= flat(value, path + ".") if hasattr(value, "items") else {path: value}
  return fields


@functools.cache
def family(name: str):
  return importlib.import_module(f"configs.{name}").get_config()


def all_comments() -> dict[str, str]:
  """Field -> comment: common.py first, then what single families add."""
  found = comments(FOLDER / "common.py", PARTS)
  for name in FAMILIES:
    for field, comment in comments(FOLDER / f"{name}.py", {"get_config": ""}).items():
      found.setdefault(field, comment)
  return found


def _cell(value) -> str:
  if value is None:
    return ""
  if isinstance(value, float):
    value = f"{value:.6g}"
  return f"`{value}`" if str(value) else '`""`'


def markdown() -> str:
  """The page."""
  found = all_comments()
  values = {column: flat(family(name)) for column, name in SHOWN.items()}
  fields = list(dict.fromkeys(field for name in FAMILIES for field in flat(family(name))))
  heads = ["field", *SHOWN, "meaning"]
  sections: dict[str, list[str]] = {}
  for field in fields:
    section = field.rpartition(".")[0]
    cells = [f"`{field}`", *(_cell(v.get(field)) for v in values.values())]
    meaning = found.get(field, "").replace("|", "\\|")
    sections.setdefault(section, []).append(f"| {' | '.join([*cells, meaning])} |")
  page = [HEAD]
  for section, rows in sections.items():
    title = f"`config.{section}`" if section else "The run"
    rule = "| " + " | ".join("---" for _ in heads) + " |"
    page.append(f"\n## {title}\n\n| {' | '.join(heads)} |\n{rule}\n" + "\n".join(rows) + "\n")
  page.append(FILES)
  for name in (*FAMILIES, "shapes_clip"):
    module = importlib.import_module(f"configs.{name}")
    first = " ".join(module.__doc__.strip().split("\n\n")[0].split())
    page.append(f"| `configs/{name}.py` | {first} |\n")
  return "".join(page)


if __name__ == "__main__":
  PAGE.write_text(markdown(), encoding="utf-8")
