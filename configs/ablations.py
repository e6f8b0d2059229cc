"""The paper's ablations as named changes of one recipe, a row of a table each.

    python main.py --config=configs/ablations.py:table5_itp_no_image,dataset=shapes --workdir=…
    python -m rpn_jax sweep table5 --config=configs/ablations.py:dataset=shapes --seeds=3

The first argument is TABLE_ROW; the others:

    dataset=shapes|voc|coco_stuff|context   the recipe that is changed (its config file)
    setting=… preset=… backbone=… runlocal  are passed on to it

Hardware: two CPU cores for shapes; docs/results.md has its scores (hIoU of 3,000 steps, each row at
a rate of its own: RPN 46.6 %, only the head 46.3 %). The other data sets were not run.

Every row is the `paper` preset except for what it names. The paper says which rows there are, not
everything about them: docs/method.md lists how they were read. Table 12 needs weights that
`python -m rpn_jax convert_vit` converts, so it is not for shapes.
"""

import types
from collections.abc import Mapping

from ml_collections import config_dict

from configs import cat_seg, coco_stuff, context, shapes, voc
from rpn_jax import config

DATASETS = {"shapes": shapes, "voc": voc, "coco_stuff": coco_stuff, "context": context}
# The same data in the words of configs/cat_seg.py, whose own setting is another.
CAT_SEG = {
  "shapes": "shapes", "voc": "voc20", "coco_stuff": "coco_stuff171", "context": "context60",
}  # fmt: skip

HALF = (0.5, 0.5, 0.5)

# table -> row -> {field: value}. Rows without a change are one run, whatever table they are in.
TABLES = {
  # The parts: RPM, M2oE (which lives inside RPM) and LPM; without LPM the head is TFPM.
  "table4": {
    "none": {"method": "training_free", "dense.method": "vanilla"},
    "lpm": {"model.tuner": "lpm"},
    "rpm": {"model.m2oe": "none", "model.head": "tfpm_c"},
    "rpm_m2oe": {"model.head": "tfpm_c"},
    "rpm_lpm": {"model.m2oe": "none"},
    "rpm_m2oe_lpm": {},
  },
  # Inside RPM: ITP, APG and M2oE.
  "table5": {
    "itp_no_image": {"model.itp": "no_image"},
    "itp_no_pixel": {"model.itp": "no_pixel"},
    "apg_linear": {"model.apg": "linear"},
    "multi_scale": {"model.m2oe": "sum"},
    "r6": {"model.m2oe_reduced": 6},
    "r12": {"model.m2oe_reduced": 12},
    "rpn": {},  # ITP of both, APG as a parameter, M2oE with r = 3
  },
  # Heads and losses.
  "table6": {
    f"lpm_{letter}_{loss}": {
      **({} if letter == "c" else {"model.head": f"lpm_{letter}"}),
      **({} if loss == "sigmoid" else {"loss.name": loss}),
    }
    for letter in "abc"
    for loss in ("softmax", "sigmoid")
  },
  # Heads without parameters.
  "table7": {f"tfpm_{letter}": {"model.head": f"tfpm_{letter}"} for letter in "abc"},
  # Baselines with the same head.
  "table10": {
    **{
      tuner: {"model.tuner": tuner}
      for tuner in ("full", "lpm", "bitfit", "adapter", "vpt", "lst", "ssf", "lora")
    },
    "rpn": {},
  },
  # Together with deep prompt tokens.
  "table11": {
    "vpt": {"model.tuner": "vpt"},
    "rpn": {},
    "rpn_vpt": {"model.tuner": "rpn+vpt"},
  },
  # Encoders other than CLIP, with the normalization they were trained with.
  "table12": {
    "vit": {"clip": "weights/vit_b16.safetensors", "data.mean": HALF, "data.std": HALF},
    "mae": {
      "clip": "weights/mae_b16.safetensors",
      "data.mean": config.pixels.IMAGENET_MEAN,
      "data.std": config.pixels.IMAGENET_STD,
    },
    "clip": {},
  },
  # Layers whose output makes relationship prompts: 1, 11 of 12, odd, even, all.
  "table13": {
    **{f"layers_{word}": {"model.rpm_layers": word} for word in ("first", "last", "odd", "even")},
    "layers_all": {},
  },
  # How relationship prompts meet the tokens.
  "table14": {
    "add": {"model.combine": "add"},
    "mul": {"model.combine": "mul"},
    "cat": {},
  },
  # Not of the paper: more that adapts the vision tower, and what adapts the text tower, too.
  "towers": {
    **{
      tuner.replace("+", "_"): {"model.tuner": tuner}
      for tuner in (
        "dora",
        "oft",
        "oft+text_oft",
        "coop",
        "maple",
        "text_lora",
        "text_bitfit",
        "lora+text_lora",
        "rpn+coop",
        "rpn+text_lora",
        "lpm",
      )
    },
    "rpn": {},
  },
  # Not of the paper: another network, by the recipe of its own code.
  "networks": {
    "cat_seg": {"family": "cat_seg"},
    **{tuner: {"model.tuner": tuner} for tuner in ("full", "lpm", "vpt")},
    "rpn": {},
  },
  # Not of the paper: both presets and what is left without relationship prompts.
  "parts": {
    "rpn_paper": {},
    "rpn_released": {"preset": "released"},
    "paper_without_prompts": {"model.rpm_layers": "none"},
    "released_without_prompts": {"preset": "released", "model.tuner": "vpt"},
    "vpt_40": {"model.tuner": "vpt"},
    "lpm": {"model.tuner": "lpm"},
    "training_free": {"method": "training_free"},
  },
  # Not of the paper: labels of a training-free method in place of ground truth, by what is trained
  # on them, and with the network as its own teacher after a tenth of 1,000 steps, as in MaskCLIP+.
  "annotation_free": {
    "teacher": {"method": "training_free", "dense.method": "sclip"},
    **{
      tuner: {"data.setting": "annotation_free", "model.tuner": tuner}
      for tuner in ("vpt", "lpm", "full")
    },
    "rpn": {"data.setting": "annotation_free"},
    "refreshed": {"data.setting": "annotation_free", "self_training.refresh": 100},
    "maskclip_teacher": {"method": "training_free"},
    "maskclip_rpn": {"data.setting": "annotation_free", "self_training.teacher": "maskclip"},
  },
}
# What the rows of every table are compared with, seed by seed.
REFERENCES: dict[str, dict] = {"RPN": {}, "LPM alone": {"model.tuner": "lpm"}}
# Rates that `sweep --tune-lr` tries for every row: of the parameters that learn fastest.
RATES = (2e-4, 6e-4, 2e-3, 6e-3, 2e-2, 6e-2)
# The rate of h in shares of that of the rest; the official code has a tenth.
H_SHARES = (0.1, 1.0)
# TABLE_ROW -> {field: value}
ROWS = {f"{table}_{row}": TABLES[table][row] for table in TABLES for row in TABLES[table]}


def rate_grid(c: config_dict.ConfigDict) -> dict[str, dict[float, dict]]:
  """The rates that a row is tried at, as fields of its config; see `rpn_jax.analysis.rates`.

  They are the same for all, whatever factors the groups of a recipe have. Where there is an h, its
  share of them is tried, too.
  """
  largest = max(factor for *_, factor in c.optimizer.groups)
  plain = {rate: {"optimizer.base_lr": rate / largest} for rate in RATES}
  tuners = c.model.tuner.split("+")
  if c.method != "rpn" or "rpn" not in tuners or c.model.rpm_layers == "none":
    return {"": plain}
  groups = {name: (name, pattern, factor) for name, pattern, factor in c.optimizer.groups}
  found = {}
  for share in H_SHARES:
    changed = {**groups, "h": (*groups["h"][:2], share * largest)}
    own = {} if changed == groups else {"optimizer.groups": tuple(changed.values())}
    found[f"h {share:g}"] = {rate: {**fields, **own} for rate, fields in plain.items()}
  return found


def get_config(arg: str = "") -> config_dict.ConfigDict:
  name, *others = [word.strip() for word in arg.split(",")]
  dataset = [word.removeprefix("dataset=") for word in others if word.startswith("dataset=")]
  dataset = dataset[-1] if dataset else "shapes"
  words = [word for word in others if not word.startswith("dataset=")]
  config.check_known("config argument dataset=", dataset, DATASETS)
  recipe = DATASETS[dataset]
  if ROWS.get(name, {}).get("family") == "cat_seg":
    recipe, words = cat_seg, ["zero_shot", *words, f"data={CAT_SEG[dataset]}"]
  return changed(recipe, ROWS, ",".join([name, *words]))


def changed(recipe: types.ModuleType, rows: Mapping[str, Mapping], arg: str):
  """The config of a row, "TABLE_ROW,words": those of a recipe's file, with the row's changes."""
  name, *words = [word.strip() for word in arg.split(",")]
  config.check_known("first config argument, TABLE_ROW: ", name, rows)
  changes = {field: value for field, value in rows[name].items() if field != "family"}
  if "preset" in changes:
    words.append(f"preset={changes.pop('preset')}")
  c = recipe.get_config(",".join(words)).unlock()
  c.update_from_flattened_dict(changes)
  return c.lock()
