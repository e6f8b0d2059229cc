"""Evaluation at label resolution, and the files it writes: main.py --mode=eval."""

import contextlib
import importlib.metadata
import pathlib
import platform
import textwrap
from collections.abc import Sequence

import jax
import numpy as np

from rpn_jax import devices
from rpn_jax.base.console import percent, table
from rpn_jax.base.paths import write_json, write_text
from rpn_jax.config import FREE, protocols
from rpn_jax.drawing.images import prediction_grid
from rpn_jax.drawing.plots import plot_confusion
from rpn_jax.inference import published
from rpn_jax.inference.evaluation import Evaluation, PartialEvaluation, evaluate
from rpn_jax.inference.predictor import Predictor, open_run
from rpn_jax.training.identity import identity as identity_of
from rpn_jax.training.run import Run, classes_of

# Fields of evaluation that the scores of a data set do not depend on.
UNSCORED = frozenset(("sets", "palette", "window_batch", "eval_images"))
# Examples in predictions.png.
FIGURE_EXAMPLES = 6
# Number of best and of worst classes printed in the terminal; eval.md has all classes.
EXTREME_CLASSES = 4

PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint", "grain", "tensorflow-datasets", "numpy")
# Column -> what it means, printed below every table that has it.
COLUMN_NOTES = {
  "pAcc": "pixels that are right",
  "miou_gt": "mean IoU of the classes in the ground truth",
  "miou_union": "mean IoU of those in it or predicted",
  "miou_seen": "that of the seen classes",
  "miou_unseen": "that of the unseen classes",
  "hiou": "harmonic mean of seen and unseen",
}
COLUMNS = tuple(COLUMN_NOTES)
# Settings in which no class is left out of training.
UNSPLIT_SETTINGS = ("supervised", "annotation_free")
SELECTION_CLASSES = "the evaluation classes"


def write_metrics(path: pathlib.Path, last: dict, best: dict | None, config, trained: int) -> None:
  """Writes `metrics.json`: last and best scores, number of trained parameters, config, versions."""
  content = {**last_and_best(last, best), "trained_parameters": trained, **provenance(config)}
  write_json(path, content)


def last_and_best(last: dict, best: dict | None, selected_on: str = SELECTION_CLASSES) -> dict:
  return {"last": last, "best": {**(best or last), "selected_on": selected_on}}


def provenance(config) -> dict:
  """The config and the package versions behind a result."""
  versions = {"python": platform.python_version()}
  for name in PACKAGES:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # some are optional
      versions[name] = importlib.metadata.version(name)
  return {"config": config.to_dict(), "versions": versions}


def draw_examples(path: pathlib.Path, evaluation: Evaluation, config) -> None:
  """Draws the examples that were kept: image, ground truth, prediction."""
  mean, std = np.float32(config.data.mean), np.float32(config.data.std)
  kept = evaluation.kept
  prediction_grid(
    path,
    [np.clip((e["image"] * std + mean) * 255, 0, 255).astype(np.uint8) for e in kept],
    [e["label"] for e in kept],
    [e["prediction"] for e in kept],
    evaluation.names,
    unseen=evaluation.untrained,
    palette=config.eval.palette,
  )


def draw_figures(workdir: pathlib.Path, evaluation: Evaluation, config, suffix: str = "") -> None:
  """Draws `predictions.png`, see `draw_examples`, and `confusion.png`."""
  draw_examples(workdir / f"predictions{suffix}.png", evaluation, config)
  plot_confusion(
    workdir / f"confusion{suffix}.png",
    evaluation.confusion_CxC,
    evaluation.names,
    unseen=evaluation.untrained,
  )


def score_table(rows: dict[str, dict]) -> str:
  """Plain-text table of metrics in percent, one row per entry, without metrics that none has."""
  kept, heads = without_empty([[name, *cells(m)] for name, m in rows.items()], ["%", *COLUMNS])
  return f"{table(kept, heads)}\n{columns_note(heads)}"


def columns_note(heads: list[str]) -> str:
  """What those of the columns mean that are metrics, in lines as wide as a terminal."""
  meanings = "; ".join(f"{head}: {COLUMN_NOTES[head]}" for head in heads if head in COLUMN_NOTES)
  return textwrap.fill(f"{meanings}.", 100)


def without_empty(rows: list[list[str]], heads: list[str]) -> tuple[list[list[str]], list[str]]:
  """Rows and heads without the columns in which every row has "-"."""
  kept = [i for i in range(len(heads)) if any(row[i] != "-" for row in rows)]
  return [[row[i] for i in kept] for row in rows], [heads[i] for i in kept]


def split_notes(config, data) -> list[str]:
  """What must be known of scores of "unseen" classes that were trained on."""
  setting = config.data.setting
  if data.name != config.data.name or not data.unseen or setting not in UNSPLIT_SETTINGS:
    return []
  return [
    f"In the setting {setting} every class was trained on: seen and unseen are the groups of the "
    "zero-shot setting."
  ]


def cells(scores: dict) -> list[str]:
  return [percent(scores[c]) for c in COLUMNS]


def published_cells(values: dict[str, float]) -> list[str]:
  """Cells of published percentages; a "miou" over unspecified classes goes into both columns."""
  known = {"miou_gt": values.get("miou"), "miou_union": values.get("miou"), **values}
  return ["-" if known.get(c) is None else f"{known[c]:.1f}" for c in COLUMNS]


def evaluate_run(config, workdir, evaluations: Sequence) -> dict[str, dict[str, dict]]:
  """`--mode=eval`: scores of the newest and best checkpoint of a run, or of a training-free method.

  Writes `eval.json`, `eval.md`, and for each data set `predictions.png` and `confusion.png`, with
  the name of the set in the file name if there are several. For a single set and a training-free
  method, `metrics.json` replaces `eval.json`, since no training writes it. If interrupted, the
  evaluation resumes when repeated.

  Args:
    config: config of the run.
    workdir: directory of the run.
    evaluations: data sets as in `inference.evaluation.evaluate`, with `eval_examples()`.

  Returns:
    Scores {set: {"last": …, "best": …}}, without "best" if it is the last one.
  """
  predictor, run = open_run(config, workdir)
  devices.wait_for_all("their copies of weights and data")
  run.claim()
  check_classes(run, evaluations)
  single = len(evaluations) == 1
  results: dict[str, dict[str, dict]] = {}
  partials = []
  restored = predictor.read_prompts(run)
  # One for all sets, or by config.eval.protocol one for each.
  configs = protocols.each(config)
  predictors = [predictor.for_config(c) if c.eval.protocol else predictor for c in configs]
  predictors *= len(evaluations) // len(predictors)
  for data, predictor in zip(evaluations, predictors, strict=True):
    results[data.name] = {}
    for which, (step, prompts) in restored.items():
      examples = data.eval_examples()
      partial = make_partial(run, data, which, step, len(examples))
      partials.append(partial.path)
      if not single or which == "best":
        print(f"{data.name}, {which} checkpoint", flush=True)
      evaluation = evaluate(
        predictor.with_prompts(prompts).for_data(data),
        examples,
        data,
        keep=FIGURE_EXAMPLES if which == "last" else 0,
        partial=partial,
      )
      results[data.name][which] = {"step": step, **evaluation.scores}
      if which == "last" and not jax.process_index():
        draw_figures(run.workdir, evaluation, run.config, "" if single else f"_{data.name}")
  if not jax.process_index():
    report(predictor, run, evaluations, results)
  devices.wait_for_all("the report")  # who left would have JAX end the others half a minute later
  for path in partials:  # only now, so that after an interruption no set is evaluated twice
    path.unlink(missing_ok=True)
  return results


def check_classes(run: Run, evaluations: Sequence) -> None:
  """Compares the training set's class names, where it is evaluated, with those trained on.

  Raises:
    InputError: they differ.
  """
  config = run.config
  if not config.eval.sets:
    run.check_classes(classes_of(evaluations[0]))
  elif config.eval.naming == "dataset":  # else they are worded anew
    for data in evaluations:  # of which all classes are prompted
      if data.name == config.data.name:
        known = classes_of(data)
        run.check_classes({key: known[key] for key in ("names", "contents")})


def make_partial(run: Run, data, which: str, step: int, count: int) -> PartialEvaluation:
  """The file to resume an evaluation from, valid for this config and these processes only."""
  process = [jax.process_index(), jax.process_count()]
  identity = {
    **identity_of(run.config, run.fingerprint, FREE | UNSCORED),
    "step": step,
    "names": data.names,
    "contents": classes_of(data)["contents"],
    "penalized": data.penalized,
    "count": count,
    "process": process,
  }
  rank = f".{process[0]}" if process[1] > 1 else ""
  return PartialEvaluation(run.workdir / f"eval_{data.name}_{which}{rank}.partial.npz", identity)


def report(predictor: Predictor, run: Run, evaluations, results: dict) -> None:
  """Writes `eval.json` (or `metrics.json`) and `eval.md`, and prints a summary."""
  config, workdir, single = run.config, run.workdir, len(results) == 1
  content = {}
  for name, result in results.items():
    of = f" of {config.data.name}" if name != config.data.name else ""
    content[name] = last_and_best(result["last"], result.get("best"), SELECTION_CLASSES + of)
  content = next(iter(content.values())) if single else {"sets": content}
  path = workdir / ("eval.json" if predictor.network.trainable or not single else "metrics.json")
  write_json(path, {**content, **provenance(config)})

  rows, notes = summary(predictor, config, results)
  if predictor.network.trainable:
    notes += [note for data in evaluations for note in split_notes(config, data)]
  rows, heads = without_empty(rows, ["set", "%", *COLUMNS])
  sections = [class_table(data, results[data.name]) for data in evaluations]
  sections = ["# Evaluation", table(rows, heads, markdown=True), *notes, *sections]
  write_text(workdir / "eval.md", "\n\n".join(sections) + "\n")

  lines = [extremes(name, result["last"]["per_class"]) for name, result in results.items()]
  print("\n" + "\n\n".join([f"{table(rows, heads)}\n{columns_note(heads)}", *notes, *lines]))
  suffix = "" if single else "_*"
  print(
    f"\nLook at {workdir}/predictions{suffix}.png and {workdir}/confusion{suffix}.png. "
    f"Every class is in {workdir}/eval.md, every number in {path}."
  )


def summary(predictor: Predictor, config, results: dict) -> tuple[list[list[str]], list[str]]:
  """Table rows (set, method, scores), including published scores, and notes on them."""
  setting = "open_vocabulary" if config.eval.sets else config.data.setting
  own = predictor.network.title
  if not predictor.network.trainable:
    setting = "training_free"
  protocol = config.eval.protocol
  by = f", protocol of {protocol}" if protocol else ""
  held_out = 0 if config.eval.sets else config.data.held_out
  own_split = () if config.eval.sets else config.data.unseen
  rows, notes = [], []
  for name, result in results.items():
    for which, scores in result.items():
      mark = "*" if which == "best" else ""
      rows.append([name, f"{own}, {which}{mark}, step {scores['step']}{by}", *cells(scores)])
    comparable = not held_out and not own_split
    others = published.rows(setting, name, predictor.clip) if comparable else {}
    for method, values in others.items():
      rows.append([name, method, *published_cells(values)])
  if held_out:
    notes.append(
      f"held_out={held_out:g}: scored on that share of the training images of {config.data.name}, "
      "which were not trained on, and on trained classes alone; not on its evaluation set."
    )
  if own_split:
    notes.append(
      f"Another split than that of {config.data.name}, by config.data.unseen: "
      f"{', '.join(own_split)} are unseen; published scores are of the set's own split."
    )
  if any("best" in result for result in results.values()):
    notes.append(f"* selected on {SELECTION_CLASSES} of {config.data.name}: report the last.")
  if any(row[1].endswith("published") for row in rows):
    notes.append(
      'Published scores follow their own protocols. A published "mIoU" is listed under both means, '
      "since the papers do not say which one it is."
    )
  return rows, notes


def class_table(data, result: dict) -> str:
  """A Markdown section with the IoU of every class, highest first."""
  columns = [scores["per_class"] for scores in result.values()]
  scored, names = data.scored_as, list(columns[0])
  unseen = {names[i if scored is None else scored[i]] for i in data.unseen}
  order = sorted(columns[0], key=lambda name: 1 if (v := columns[0][name]) is None else -v)
  rows = [
    [name, "unseen" if name in unseen else "", *(percent(column[name]) for column in columns)]
    for name in order
  ]
  heads = ["class", "", *(f"IoU %, {which}" for which in result)]
  return f"## {data.name}\n\n{table(rows, heads, markdown=True)}"


def extremes(name: str, per_class: dict[str, float | None]) -> str:
  """A line with the best and the worst classes."""
  order = sorted((v, k) for k, v in per_class.items() if v is not None)
  listed = lambda pairs: "; ".join(f"{k} {percent(v)}" for v, k in pairs)
  if len(order) <= 2 * EXTREME_CLASSES:
    return f"{name}, IoU %: {listed(order[::-1])}"
  best, worst = order[: -EXTREME_CLASSES - 1 : -1], order[:EXTREME_CLASSES]
  return f"{name}, IoU %, best: {listed(best)}. Worst: {listed(worst)}"
