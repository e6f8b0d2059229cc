"""Writes docs/configs.md from the declared fields: python -m configs.reference"""

import importlib
import pathlib

from rpn_jax import config

PAGE = pathlib.Path(__file__).parent.parent / "docs" / "configs.md"
FAMILIES = (
  "voc", "coco_stuff", "context", "open_vocab", "cat_seg", "folder", "shapes", "training_free",
  "ablations", "study", "shapes_clip",
)  # fmt: skip

HEAD = """# Config fields

Every field of a run, written by `python -m configs.reference` from `rpn_jax/config/`. Any of them
can be changed: `--config.optimizer.base_lr=1e-4`. Values are checked before anything is done. The
last column shows what `configs/shapes.py` changes. A tuple is given as a whole, in quotes: the
learning rate of the default group `rest`, all but h, is 5 instead of 10 times `base_lr` by

```sh
python main.py --config=configs/shapes.py --workdir=runs/slower \\
  --config.optimizer.groups="(('h', r'h(_bias)?', 1.0), ('rest', r'(?!h(_bias)?$).*', 5.0))"
```
"""
FILES = """
## Experiment families

| file | what it is |
| --- | --- |
"""


def flat(c, prefix: str = "") -> dict[str, object]:
  """{"data.crop": 512, …}"""
  found = {}
  for name, value in c.items():
    path = prefix + name
    found |= flat(value, path + ".") if hasattr(value, "items") else {path: value}
  return found


def _code(value) -> str:
  if value is config.ABSENT:
    return ""
  if isinstance(value, float):
    value = f"{value:.6g}"
  return f"`{value}`" if str(value) else '`""`'


def _rows(of: type, prefix: str, example: dict) -> str:
  """The table of a declared class, and after it those of its sections."""
  heads = ["field", "default", "allowed", "meaning", *(["shapes.py"] if example else [])]
  lines = [f"| {' | '.join(heads)} |", f"| {' | '.join('---' for _ in heads)} |"]
  tables = []
  for name, f in config.fields.declared(of).items():
    if "." in name:  # of a section, which has its own table
      continue
    path, spec = prefix + name, config.spec(f)
    if config.fields.is_section(f):
      tables.append(f"\n## `config.{path}`\n\n{spec.comment}\n\n")
      tables.append(_rows(type(f.default), f"{path}.", example))
      continue
    cells = [f"`{path}`", _code(f.default)]
    cells += [", ".join([*map(_code, spec.words), *spec.bounds]), spec.comment.replace("|", "\\|")]
    if example:
      cells.append(_code(example[path]) if example.get(path, f.default) != f.default else "")
    lines.append(f"| {' | '.join(cells)} |")
  return "\n".join(lines) + "\n" + "".join(tables)


def markdown() -> str:
  """The page."""
  modules = {name: importlib.import_module(f"configs.{name}") for name in FAMILIES}
  shapes = flat(modules["shapes"].get_config())
  page = [HEAD, f"\n## The run\n\n{config.Run.__doc__}\n\n", _rows(config.Run, "", shapes)]
  page += [f"\n## Pre-training\n\n{config.Pretrain.__doc__}\n\n", _rows(config.Pretrain, "", {})]
  page.append(FILES)
  for name, module in modules.items():
    first = " ".join(module.__doc__.strip().split("\n\n")[0].split())
    page.append(f"| `configs/{name}.py` | {first} |\n")
  return "".join(page)


if __name__ == "__main__":
  PAGE.write_text(markdown(), encoding="utf-8")
