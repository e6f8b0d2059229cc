"""When do relationship prompts pay? Towers, classes, scenes and budgets on the shapes data set.

    make study            every run of it, resumable; docs/study.md has what was found
    python main.py --config=configs/study.py:base_rpn --workdir=…       a single run

The argument is TABLE_ROW; `runlocal` is passed on.

Hardware: two CPU cores; docs/study.md has the hours and scores (hIoU of 3,000 steps around the
shipped tower, five seeds: RPN 46.6 %, only the head 46.3 %). The rate of every row that does not
set one is chosen by `sweep --tune-lr` from one grid.
"""

from ml_collections import config_dict

from configs import ablations, common, shapes, shapes_clip


def at(rate: float, changes: dict, h: str = "h 0.1") -> dict:
  """A row at one rate of the grid, whichever is its best; the recipe's h has a tenth of it."""
  config = ablations.changed(shapes, {"row": changes}, "row")
  grid = ablations.rate_grid(config)
  return {**changes, **grid[h if h in grid else ""][rate]}


# What is compared around every tower. Without relationship prompts the paper's preset has no
# tokens left, the released one its 10 deep tokens. Own rates differ by chance, too, and scores go
# with them: hence rows at one rate.
METHODS = {
  "lpm": {"model.tuner": "lpm"},
  "rpn": {},
  "vpt": {"model.tuner": "vpt"},
  "lora": {"model.tuner": "lora"},
  "released": {"preset": "released"},
  "released_without": {"preset": "released", "model.tuner": "vpt"},
  "rpn_without": {"model.rpm_layers": "none"},
  "training_free": {"method": "training_free"},
  "lpm_0.02": at(0.02, {"model.tuner": "lpm"}),
  "rpn_0.02": at(0.02, {}),
  "rpn_without_0.02": at(0.02, {"model.rpm_layers": "none"}),
}
TOWERS = tuple(shapes_clip.TOWERS)
ROOT = "runs/study/towers"
# Weights of a tower -> the config that makes them; those of the base tower are shipped.
WEIGHTS = {
  f"{ROOT}/{tower}/clip.safetensors": f"configs/shapes_clip.py:tower={tower}"
  for tower in TOWERS
  if tower != "base"
}


def around(tower: str) -> dict:
  """What a run around a tower changes: its weights, and crops and windows of its image size."""
  if tower == "base":
    return {}
  changes = {"clip": f"{ROOT}/{tower}/clip.safetensors"}
  side = shapes_clip.get_config(f"tower={tower}").clip.image_size
  if side != common.TINY_CROP:
    changes |= {"data.crop": side, "eval.crop": side}
  return changes


COLORS = ("red", "orange", "yellow", "green", "blue", "purple")
PATTERNS = ("plain", "striped", "dotted", "checked")


def unseen(patterns: int) -> tuple[str, ...]:
  """That many patterns of each color: every word is also part of a seen class, up to three.

  One pattern is the split of the data set.
  """
  return tuple(
    f"{PATTERNS[(i + 1 + j) % len(PATTERNS)]} {color}"
    for i, color in enumerate(COLORS)
    for j in range(patterns)
  )


# What a budget of trained parameters buys of each method; LPM alone has no width.
WIDTHS = {
  "75k": {
    "rpn": {},
    "vpt": {"model.tuner": "vpt", "model.deep_tokens": 59},
    "lora": {"model.tuner": "lora", "model.lora_rank": 20},
    "adapter": {"model.tuner": "adapter", "model.adapter_width": 20},
    "lpm": METHODS["lpm"],
  },
  "200k": {
    "rpn": {"model.m2oe_reduced": 84},
    "vpt": {"model.tuner": "vpt", "model.deep_tokens": 222},
    "lora": {"model.tuner": "lora", "model.lora_rank": 61},
    "adapter": {"model.tuner": "adapter", "model.adapter_width": 60},
    "lpm": METHODS["lpm"],
  },
}
_PAIR = {name: METHODS[name] for name in ("lpm", "rpn")}
_PAIRS = {**_PAIR, **{name: METHODS[name] for name in ("lpm_0.02", "rpn_0.02")}}
# How far rates alone take a row: many of the paper's ablations have another best rate than RPN.
_NO_M2OE = ablations.TABLES["table4"]["rpm_lpm"]
RATES = {
  "rpm_lpm": _NO_M2OE,
  "rpm_lpm_0.02": at(0.02, _NO_M2OE),
  "rpn_0.006_h": at(0.006, {}, "h 1"),
  "rpn_0.02_h": at(0.02, {}, "h 1"),
  "rpn_0.06": at(0.06, {}),
  "rpn_0.06_h": at(0.06, {}, "h 1"),
}
# Of the paper, around the base tower at this study's length and rates; the row of all parts is rpn.
PAPER = (4, 5, 6, 7, 10, 11, 13, 14)

# table -> row -> {field: value}
TABLES = {
  **{
    tower: {row: {**changes, **around(tower)} for row, changes in METHODS.items()}
    for tower in TOWERS
  },
  **{
    f"{6 * (4 - patterns)}_classes": {
      row: {**changes, "data.unseen": unseen(patterns)} for row, changes in _PAIRS.items()
    }
    for patterns in (2, 3)
  },
  **{
    f"{scenes}_scenes": {
      row: {**changes, "data.train_images": scenes} for row, changes in _PAIR.items()
    }
    for scenes in (100, 400)
  },
  **WIDTHS,
  "base_rates": {**_PAIR, **RATES},
  **{
    f"table{n}": {**_PAIR, **{row: c for row, c in ablations.TABLES[f"table{n}"].items() if c}}
    for n in PAPER
  },
}
# Rows of the same table that the others are compared with, seed by seed.
REFERENCES = {"RPN": "rpn", "LPM alone": "lpm"}
# The same, but trained at the rate of the row that is compared.
SAME_RATE = {"equal-rate RPN": "rpn"}
# Series of the figures -> a row, and the row of the same table that it is to be ahead of.
GAINS = {
  "RPN less LPM alone": ("rpn", "lpm"),
  "RPN less LPM alone, both at 0.02": ("rpn_0.02", "lpm_0.02"),
  "RPN less itself without relationship prompts": ("rpn", "rpn_without"),
  "RPN less itself without them, both at 0.02": ("rpn_0.02", "rpn_without_0.02"),
  "RPN (released) less LPM alone": ("released", "lpm"),
  "RPN (released) less itself without relationship prompts": ("released", "released_without"),
}
# Title of an axis -> number -> table.
AXES = {
  "seen object classes": {6: "6_classes", 12: "12_classes", 18: "base"},
  "training scenes": {100: "100_scenes", 400: "400_scenes", 1600: "base"},
}
rate_grid = ablations.rate_grid
ROWS = {f"{table}_{row}": TABLES[table][row] for table in TABLES for row in TABLES[table]}


def get_config(arg: str = "") -> config_dict.ConfigDict:
  return ablations.changed(shapes, ROWS, arg)
