"""A row of a published table, from an empty machine: python -m rpn_jax reproduce voc_zero_shot

Fetches CLIP, fetches and prepares the data sets, trains, evaluates, and prints the scores beside
the published ones. Every step is a command that could be typed; what is done already is not done
again, so that the same line continues after an interruption. Flags --config.… are passed on to the
run; the comparison then names them.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence

from absl import flags
from ml_collections import config_dict

from data_pipelines import downloads, records, registry, vocabularies
from rpn_jax import config as declared
from rpn_jax.analysis import runs
from rpn_jax.base import console
from rpn_jax.base.errors import InputError
from rpn_jax.base.paths import expand, write_json, write_text
from rpn_jax.base.words import check_known
from rpn_jax.config.flags import define_config, parse
from rpn_jax.config.stored import scored_set
from rpn_jax.inference import metrics, published
from rpn_jax.models.clip import CLIPConfig
from rpn_jax.weights import checkpoints, hub

# A score counts as reproduced within this many percent points of the published one: a few seeds of
# the small world differ by as much (docs/results.md).
TOLERANCE = 1.0
# Training-free method -> the name of its published row with ViT-B/16, and with ViT-L/14.
FREE = {
  "vanilla": ("CLIP, ClearCLIP's protocol", "CLIP, ClearCLIP's protocol"),
  "maskclip": ("MaskCLIP, later reruns", "MaskCLIP, later reruns"),
  "maskclip_released": ("MaskCLIP", None),
  "sclip": ("SCLIP, its repository", "SCLIP"),
  "clearclip": ("ClearCLIP", "ClearCLIP"),
  "gem": ("GEM", "GEM"),
  "naclip": ("NACLIP without PAMR", "NACLIP without PAMR"),
  "naclip_pamr": ("NACLIP", None),
  "res_clip": ("ResCLIP", "ResCLIP"),
  "sc_clip": ("SC-CLIP, from memory", "SC-CLIP, from memory"),
}
# Words of configs/training_free.py where they are others than a method's name, whose protocol may
# refine.
FREE_WORDS = {"naclip": "naclip,protocol=naclip_plain", "naclip_pamr": "naclip"}


@dataclasses.dataclass(frozen=True)
class Recipe:
  """A published row and the config that is to reach it.

  Attributes:
    config: FILE:words, as for --config.
    setting: of `published.rows`.
    row: the method's name there.
    backbone: of `config.BACKBONES`.
    trained: whether anything is.
  """

  config: str
  setting: str
  row: str
  backbone: str = "b16"
  trained: bool = True

  def scores(self, data_set: str) -> Mapping[str, float]:
    """Metric -> published percent on a data set; {} where none was published."""
    backbone = declared.BACKBONES[self.backbone]
    rows = published.rows(self.setting, data_set, CLIPConfig(**backbone.architecture))
    return rows.get(f"{self.row} {backbone.title}, published", {})


def _recipes() -> Iterator[tuple[str, Recipe]]:
  for data in ("voc", "coco_stuff", "context"):
    for setting in ("zero_shot", "transductive", "supervised"):
      yield f"{data}_{setting}", Recipe(f"configs/{data}.py:setting={setting}", setting, "RPN")
  for i, backbone in enumerate(("b16", "l14")):
    for family, row in (("open_vocab", "RPN"), ("cat_seg", "CAT-Seg")):
      words = f"configs/{family}.py:backbone={backbone}"
      yield f"{family}_{backbone}", Recipe(words, "open_vocabulary", row, backbone)
    for method, rows in FREE.items():
      chosen = FREE_WORDS.get(method, method)
      words = f"configs/training_free.py:method={chosen},set=all,backbone={backbone}"
      if published_row := rows[i]:
        recipe = Recipe(words, "training_free", published_row, backbone, trained=False)
        yield f"{method}_{backbone}", recipe


RECIPES = dict(_recipes())


@dataclasses.dataclass(frozen=True)
class Step:
  """A command of the way, and what is there of its result.

  Attributes:
    what: it makes.
    state: what is there of that, or is to be done.
    command: none where all is there.
    files: that are to be fetched.
    wanted: what only a person can do first.
  """

  what: str
  state: str
  command: tuple[str, ...] = ()
  files: tuple[downloads.File, ...] = ()
  wanted: str = ""


def plan(
  recipe: Recipe,
  config: config_dict.ConfigDict,
  workdir: pathlib.Path,
  options: argparse.Namespace,
  passed_on: Sequence[str] = (),
) -> list[Step]:
  """What is to be done, in order."""
  steps = [
    *_weights(str(config.clip)),
    *(_data(name, options) for name in _raw_sets(recipe, config)),
  ]
  main = (sys.executable, "main.py", f"--workdir={workdir}")
  new: tuple[str, ...] = (
    *main, f"--config={options.config}", f"--config.data.data_dir={options.data_dir}"
  )  # fmt: skip
  scored = _scored(workdir)
  missing = [name for name in _evaluated(config) if name not in scored]
  sets = [f"--config.eval.sets={tuple(config.eval.sets)!r}"] if options.without else []
  if recipe.trained:
    images = config.steps * config.data.batch_size
    state = f"{config.steps:,} steps of {config.data.batch_size} images, {images:,} in all"
    trained = _is_trained(workdir)
    steps.append(Step("train", "there") if trained else Step("train", state, (*new, *passed_on)))
    new, passed_on = main, ()
  state = ", ".join(missing) or "there"
  command = (*new, *passed_on, *sets, "--mode=eval") if missing else ()
  return [*steps, Step("evaluate", state, command)]


def _weights(clip: str) -> Iterator[Step]:
  if checkpoint := checkpoints.find(clip):
    there = hub.cached(checkpoint).exists()
    command = (sys.executable, "-m", "rpn_jax", "weights", "get", clip)
    yield Step(f"CLIP {clip}", hub.state(checkpoint) or "to fetch", () if there else command)


def _data(name: str, options: argparse.Namespace) -> Step:
  """Preparing a set from raw files, which a program may fetch or not."""
  what = f"data {name}"
  if records.folders_of(registry.builder_class(name), options.data_dir):
    return Step(what, "prepared")
  command = [sys.executable, "-m", "data_pipelines.prepare", name, "--download"]
  given = {option: getattr(options, option) for option in ("data_dir", "manual_dir", "mirror")}
  command += [f"--{option}={value}" for option, value in given.items() if value]
  command += [f"--{o}" for o in ("remove_archives", "allow_partial") if getattr(options, o)]
  raw = options.manual_dir or f"{options.data_dir}/downloads"
  missing = downloads.missing(name, raw)
  size = sum(file.size for file in missing) / 1e9
  state, wanted = f"{size:.1f} GB to fetch" if missing else "raw files are here", ""
  archives = expand(raw) / downloads.ARCHIVES
  barred = [f for f in missing if not (f.urls or options.mirror or (archives / f.name).exists())]
  if barred:
    names = " and ".join(file.name for file in barred)
    own = sum(file.size for file in barred) / 1e9
    state = f"{size:.1f} GB, of which you get {own:.1f} yourself"
    them = "it" if len(barred) == 1 else "them"
    wanted = (
      f"{name} needs an account: get {names} on {barred[0].page} and put {them} into {archives}"
    )
  return Step(what, state, tuple(command), tuple(missing), wanted)


def _evaluated(config: config_dict.ConfigDict) -> tuple[str, ...]:
  """The data sets that `--mode=eval` scores."""
  return tuple(config.eval.sets) or (config.data.name,)


def _raw_sets(recipe: Recipe, config: config_dict.ConfigDict) -> list[str]:
  """Names for `prepare` of what the run reads, each once; drawn sets are not prepared."""
  trained_on = (config.data.name,) if recipe.trained else ()
  names = dict.fromkeys((*trained_on, *_evaluated(config)))
  found = [registry.get(name) for name in names]
  return list(dict.fromkeys(d.prepared for d in found if d.builder is not None))


def _is_trained(workdir: pathlib.Path) -> bool:
  try:
    runs.read_run(workdir)
  except InputError:
    return False
  return True


def _scored(workdir: pathlib.Path) -> dict[str, Mapping]:
  """Data set -> scores of the last checkpoint, as `--mode=eval` wrote them."""
  trained, evaluated = (_read(workdir / name) for name in ("metrics.json", "eval.json"))
  file = "eval.json"
  if not evaluated:  # without training, those of a single set are in the other file
    evaluated, file = trained, "metrics.json"
  sets = evaluated.get("sets") or {_name(evaluated, file): evaluated}
  found = {name: result["last"] for name, result in sets.items() if "last" in result}
  step = trained.get("last", {}).get("step")  # a run may have gone on since
  return {
    name: last
    for name, last in found.items()
    if "per_class" in last and step in (None, last["step"])
  }


def _read(path: pathlib.Path) -> dict:
  try:
    return json.loads(path.read_text(encoding="utf-8"))
  except (OSError, ValueError):
    return {}


def _name(content: Mapping, file: str) -> str:
  try:
    return scored_set(content["config"], file)
  except (KeyError, TypeError, AttributeError):
    return ""


def _with_groups(name: str, scores: Mapping) -> dict:
  """Scores with the means over seen and unseen classes, also where all were trained on.

  Papers print both for supervised training, too; here such a run has no unseen classes.
  """
  vocabulary, found = vocabularies.load(name), dict(scores)
  unseen = {vocabulary.names[i] for i in vocabulary.unseen}
  if found.get("hiou") is None and unseen:
    known = {c: iou for c, iou in scores["per_class"].items() if iou is not None}
    groups = [[iou for c, iou in known.items() if (c in unseen) == of] for of in (False, True)]
    if all(groups):
      s, u = (sum(group) / len(group) for group in groups)
      found |= {"miou_seen": s, "miou_unseen": u, "hiou": metrics.harmonic_mean(s, u)}
  return found


def compare(recipe: Recipe, scores: Mapping[str, Mapping]) -> list[dict]:
  """A row for every published score: data set, metric, published, ours, difference (percent).

  A bare "miou" is compared with that of both averages that is nearer, which is named: papers do not
  say which they took.
  """
  rows = []
  for name, result in scores.items():
    own = _with_groups(name, result)
    for metric, value in recipe.scores(name).items():
      row = {"set": name, "metric": metric, "published": value, "ours": None, "difference": None}
      averages = ("miou_gt", "miou_union") if metric == "miou" else (metric,)
      found = [(100 * own[m] - value, m) for m in averages if own.get(m) is not None]
      if found:
        difference, average = min(found, key=lambda pair: abs(pair[0]))
        row |= {"metric": average, "ours": value + difference, "difference": difference}
      rows.append(row)
  return rows


def verdict(recipe: Recipe, rows: Sequence[Mapping], changed: Sequence[str]) -> str:
  """The sentence below the table."""
  near = sum(r["difference"] is not None and abs(r["difference"]) <= TOLERANCE for r in rows)
  text = f"{near} of {len(rows)} scores are within {TOLERANCE:.1f} of {recipe.row}'s published ones"
  if changed:
    text += f"; this run has settings of its own: {' '.join(changed)}"
  return text


def report(name: str, rows: Sequence[Mapping], sentence: str, workdir: pathlib.Path) -> None:
  """Prints the comparison and writes it to reproduced.md and .json."""
  cells = []
  for row in rows:
    text = {k: "-" if row[k] is None else f"{row[k]:.1f}" for k in ("published", "ours")}
    difference = "-" if row["difference"] is None else f"{row['difference']:+.1f}"
    cells.append([row["set"], row["metric"], *text.values(), difference])
  headers = ("data set", "score", "published", "ours", "difference")
  print(f"\n{console.table(cells, headers)}\n{sentence}")
  markdown = console.table(cells, headers, markdown=True)
  write_text(workdir / "reproduced.md", f"# {name}\n\n{markdown}\n\n{sentence}.\n")
  write_json(workdir / "reproduced.json", {"recipe": name, "rows": rows, "verdict": sentence})
  print(f"Written: {workdir / 'reproduced.md'}, .json")


def run(steps: Sequence[Step]) -> None:
  """
  Raises:
    InputError: a step failed.
  """
  for number, step in enumerate(steps, 1):
    print(f"\n[{number}/{len(steps)}] {step.what}: {step.state}", flush=True)
    if not step.command:
      continue
    print(f"$ {_typed(step.command)}", flush=True)
    with subprocess.Popen(step.command) as process:
      try:
        status = process.wait()
      except KeyboardInterrupt:
        process.wait()  # it has got the signal, too, and saves
        raise
    if status == 130:
      raise KeyboardInterrupt
    if status:
      raise InputError(
        f"step {number} of {len(steps)}, {step.what}, ended with status {status}, for the reason "
        "above; once that is mended, the same command continues there"
      )


def _typed(command: Sequence[str]) -> str:
  """The command as one line of a shell; tuples of names keep their quotes readable."""
  quote = lambda part: f'"{part}"' if "'" in part else shlex.quote(part)
  return " ".join("python" if part == sys.executable else quote(part) for part in command)


def read_config(words: str, changes: Sequence[str] = ()) -> config_dict.ConfigDict:
  """The config of FILE:words with --config.FIELD=VALUE flags.

  Raises:
    InputError: an unknown field, or a value that is none of it.
  """
  values, argv = flags.FlagValues(), ["reproduce", f"--config={words}", *changes]
  define_config(values, argv)
  parse(values, argv)
  declared.check(values.config)
  return values.config


def _published_text(recipe: Recipe, config: config_dict.ConfigDict) -> str:
  """The published hIoU, or mIoU, of the evaluated data sets; those that have none are left out."""
  scores = {name: recipe.scores(name) for name in _evaluated(config)}
  main = {name: row.get("hiou", row.get("miou")) for name, row in scores.items()}
  return ", ".join(f"{name} {value:g}" for name, value in main.items() if value is not None)


def _listing() -> str:
  rows = []
  for name, recipe in RECIPES.items():
    rows.append([name, recipe.row, _published_text(recipe, read_config(recipe.config))])
  return console.table(rows, ("recipe", "method", "published hIoU, or mIoU, %"))


def _plan_text(steps: Sequence[Step]) -> str:
  lines = []
  for number, step in enumerate(steps, 1):
    lines.append(f"{number}. {step.what}: {step.state}")
    if step.wanted:
      lines.append(f"   {step.wanted}")
    if step.command:
      lines.append(f"   {_typed(step.command)}")
  files = {file.name: file for step in steps for file in step.files}.values()
  fetched, unpacked = (sum(getattr(f, size) for f in files) / 1e9 for size in ("size", "unpacked"))
  if files:
    lines.append(
      f"\nTo get: about {fetched:.1f} GB of data; disk: that, {unpacked:.1f} GB unpacked, and as "
      "much again for the prepared records"
    )
  return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
  parser = argparse.ArgumentParser(prog="rpn reproduce", description=__doc__)
  parser.formatter_class = argparse.RawDescriptionHelpFormatter
  add = parser.add_argument
  add("recipe", nargs="?", help="a row of --list")
  add("--list", action="store_true", help="all recipes, with the published scores")
  add("--dry-run", action="store_true", help="print the plan and stop")
  add("--preset", choices=("paper", "released"), help="of RPN; by default as its config says")
  add("--without", default="", help="evaluated sets to leave out, such as ade847,context459")
  add("--data_dir", default="data", help="of prepared sets (%(default)s)")
  add("--manual_dir", help="of raw files, fetched or your own (downloads in data_dir)")
  add("--remove_archives", action="store_true", help="delete what was fetched once it is unpacked")
  add("--allow_partial", action="store_true", help="prepare fewer images than were published")
  add("--mirror", help="address of a folder that has the raw files by their names")
  add("--root", default="runs/reproduce", help="of the runs (%(default)s)")
  options, passed_on = parser.parse_known_args(arguments)
  if options.list:
    print(_listing())
    return 0
  if not options.recipe:
    parser.error("expected a recipe; --list shows them")
  wrong = [flag for flag in passed_on if not flag.startswith("--config.")]
  if wrong:
    raise InputError(f"unknown argument {wrong[0]!r}; only --config.… flags are passed on")
  if not os.path.exists("main.py"):
    raise InputError("no main.py here: run this in the folder of a clone of the project")
  check_known("recipe ", options.recipe, RECIPES)
  recipe = RECIPES[options.recipe]
  options.config = recipe.config
  if options.preset:
    if recipe.row != "RPN":
      raise InputError(f"--preset is of RPN; {options.recipe} is {recipe.row}'s row")
    options.config += f",preset={options.preset}"
  config = read_config(options.config, passed_on)
  _leave_out(options.without, config, recipe)
  workdir = expand(options.root) / "-".join(filter(None, (options.recipe, options.preset)))
  steps = plan(recipe, config, workdir, options, passed_on)
  if options.dry_run:
    print(_plan_text(steps))
    print(f"\nThen the scores beside those of {recipe.row}, in {workdir / 'reproduced.md'}")
    print(f"Published hIoU, or mIoU, in %: {_published_text(recipe, config)}")
    return 0
  if wanted := [step.wanted for step in steps if step.wanted]:
    hint = "; --without=SET leaves an evaluated set out" if len(_evaluated(config)) > 1 else ""
    raise InputError(f"before anything is fetched: {'; '.join(wanted)}{hint}")
  run(steps)
  changed = [*passed_on, *(["--allow_partial"] if options.allow_partial else ())]
  rows = compare(recipe, _scored(workdir))
  report(options.recipe, rows, verdict(recipe, rows, changed), workdir)
  return 0


def _leave_out(without: str, config: config_dict.ConfigDict, recipe: Recipe) -> None:
  """Takes sets out of those that `config` evaluates.

  Raises:
    InputError: one is not evaluated, or all would be left out.
  """
  names = [name for name in without.split(",") if name]
  for name in names:
    check_known("--without: evaluated set ", name, _evaluated(config))
  kept = tuple(name for name in _evaluated(config) if name not in names)
  if not kept:
    raise InputError(f"--without={without}: leaves nothing of {recipe.row}'s row to compare with")
  if names:
    with config.unlocked():
      config.eval.sets = kept


if __name__ == "__main__":
  console.use_utf8()
  sys.exit(console.run_command(main))
