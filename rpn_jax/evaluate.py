"""Evaluation at label resolution, and the files that tell about it."""

import contextlib
import dataclasses
import importlib.metadata
import itertools
import json
import os
import pathlib
import platform
import time
import zipfile
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils

from rpn_jax import metrics, published, visualize
from rpn_jax.errors import InputError
from rpn_jax.experiment import Experiment
from rpn_jax.logging import progress, table, write_json
from rpn_jax.parallel import devices_text
from rpn_jax.sliding import SlidingWindow

# Examples shown in predictions.png.
PICTURES = 6
# Classes named in the terminal, at each end of the table in eval.md.
EXTREMES = 4
# Seconds between the files that an interrupted evaluation continues from.
SAVE_EVERY = 5.0

PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint", "grain", "tensorflow-datasets", "numpy")
COLUMNS = ("pAcc", "miou_gt", "miou_union", "miou_seen", "miou_unseen", "hiou")
SELECTED = "the evaluation classes"


@dataclasses.dataclass
class Evaluation:
  """One pass over a data set.

  Attributes:
    scores: of `metrics.scores`, with `per_class` {name: IoU} for the list of IoUs.
    names: of the C scored classes.
    untrained: class ids, of the unseen ones.
    confusion_CxC: pixels, rows truth, columns prediction.
    kept: the first examples, each with its `prediction`, for pictures.
  """

  scores: dict
  names: tuple[str, ...]
  untrained: tuple[int, ...]
  confusion_CxC: np.ndarray
  kept: list[dict]


class Partial:
  """What an evaluation has counted so far, on disk, for one that is interrupted to continue.

  Args:
    path: of the file.
    identity: JSON; a file with another one is of another evaluation and does not count.
  """

  def __init__(self, path: pathlib.Path, identity: dict):
    self.path = path
    self.identity = json.dumps(identity, sort_keys=True)
    self.saved = time.monotonic()

  def load(self, classes: int, count: int) -> tuple[int, np.ndarray] | None:
    """Number of examples and their confusion matrix; None where there is nothing to continue.

    Args:
      classes: side of the matrix.
      count: of all examples.
    """
    try:
      with zipfile.ZipFile(self.path) as archive:
        # Compressed arrays can unfold to any size.
        if sum(info.file_size for info in archive.infolist()) > 8 * classes**2 + (1 << 20):
          return None
      with np.load(self.path, allow_pickle=False) as file:
        done, confusion = int(file["done"]), file["confusion"]
        fits = confusion.shape == (classes, classes) and confusion.dtype == np.int64
        if str(file["identity"]) == self.identity and fits and 0 <= done <= count:
          return done, confusion
    except Exception:  # a damaged archive raises all kinds of errors, and each means: begin again
      pass
    return None

  def save(self, done: int, confusion_CxC: np.ndarray, *, now: bool = False) -> None:
    """Writes the file if the last time was SAVE_EVERY seconds ago, and if the disk allows it."""
    if not now and time.monotonic() - self.saved < SAVE_EVERY:
      return
    self.saved = time.monotonic()
    temporary = self.path.with_name(self.path.name + ".tmp")
    with contextlib.suppress(OSError):  # only an interruption would need it
      with open(temporary, "wb") as file:
        np.savez_compressed(file, identity=self.identity, done=done, confusion=confusion_CxC)
      os.replace(temporary, self.path)


def scored_names(names: Sequence[str], scored_as: Sequence[int]) -> tuple[str, ...]:
  """A name for every scored class: "background" for the one that several names stand for."""
  members = [
    [n for n, c in zip(names, scored_as, strict=True) if c == i] for i in range(max(scored_as) + 1)
  ]
  return tuple(m[0] if len(m) == 1 else "background" for m in members)


def evaluate(
  segmenter: SlidingWindow, examples, data, *, keep: int = 0, partial: Partial | None = None
) -> Evaluation:
  """Scores of one pass over `examples`, shared out among the processes.

  Args:
    segmenter: images -> ids of the names in `data`.
    examples: sequence (with slices) of {image: (h, w, 3) float32, label: (H, W) int, id: str}.
    data: `names` that are prompted, the `scored_as` class of each (None: its own), ids of `seen`,
      `unseen` and `trained` names, and `ignore`, the label of pixels without a class.
    keep: how many examples to return with their `prediction`, for pictures.
    partial: where to continue from and what to write on the way.

  Raises:
    InputError: a label that is no scored class.
  """
  scored_as = np.arange(len(data.names)) if data.scored_as is None else np.asarray(data.scored_as)
  names = scored_names(data.names, scored_as)
  examples = examples[jax.process_index() :: jax.process_count()] if several() else examples
  done, confusion = 0, np.zeros((len(names), len(names)), np.int64)
  if partial and (loaded := partial.load(len(names), len(examples))):
    done, confusion = loaded
    print(f"{data.name}: continuing at image {done} of {len(examples)}", flush=True)

  kept = []
  if done:  # what was counted before is segmented again only to be shown
    before = segmented(segmenter, examples[: min(keep, done)])
    kept = [{**example, "prediction": scored_as[rows]} for example, rows in before]
    examples = examples[done:]
  shown = progress(examples, f"evaluate on {devices_text()}", "image")
  for example, rows in segmented(segmenter, shown):
    prediction = scored_as[rows]
    if len(kept) < keep:
      kept.append({**example, "prediction": prediction})
    try:
      confusion += metrics.confusion_matrix(example["label"], prediction, len(names), data.ignore)
    except ValueError as error:
      raise InputError(f"{data.name}, example {example['id']}: {error}") from error
    done += 1
    if partial:
      partial.save(done, confusion)
  if partial:
    partial.save(done, confusion, now=True)

  confusion = over_processes(confusion)
  seen, unseen = (sorted({int(scored_as[i]) for i in ids}) for ids in (data.seen, data.unseen))
  scores = metrics.scores(confusion, seen, unseen)
  scores["per_class"] = dict(zip(names, scores.pop("iou")))
  untrained = tuple(i for i in unseen if i not in scored_as[list(data.trained)])
  return Evaluation(scores, names, untrained, confusion, kept)


def segmented(segmenter: SlidingWindow, examples):
  """(example, prediction) of each, where the segmenter may take several at a time."""
  examples, again = itertools.tee(examples)
  return zip(examples, segmenter.stream((e["image"], e["label"].shape) for e in again))


def several() -> bool:
  return jax.process_count() > 1


def over_processes(confusion_CxC: np.ndarray) -> np.ndarray:
  """The sum of all processes' matrices."""
  if not several():
    return confusion_CxC
  # As halves of 64-bit numbers: JAX would make int32 of them, and pixels are billions.
  halves = multihost_utils.process_allgather(confusion_CxC.view(np.uint32))
  return np.ascontiguousarray(halves).view(np.int64).sum(0)


def write_metrics(path: pathlib.Path, last: dict, best: dict | None, config, trained: int) -> None:
  """`metrics.json`: the last and the best evaluation, how many parameters were trained, the config
  and the versions."""
  content = {**last_and_best(last, best), "trained_parameters": trained, **origin(config)}
  write_json(path, content)


def last_and_best(last: dict, best: dict | None, selected_on: str = SELECTED) -> dict:
  return {"last": last, "best": {**(best or last), "selected_on": selected_on}}


def origin(config) -> dict:
  """The config and the versions that a result is of."""
  versions = {name: importlib.metadata.version(name) for name in PACKAGES}
  versions["python"] = platform.python_version()
  return {"config": config.to_dict(), "versions": versions}


def pictures(workdir: pathlib.Path, evaluation: Evaluation, config, suffix: str = "") -> None:
  """`predictions.png`, image beside truth and prediction, and `confusion.png`."""
  mean, std = np.float32(config.data.mean), np.float32(config.data.std)
  kept = evaluation.kept
  visualize.prediction_grid(
    workdir / f"predictions{suffix}.png",
    [np.uint8(np.clip((e["image"] * std + mean) * 255, 0, 255)) for e in kept],
    [e["label"] for e in kept],
    [e["prediction"] for e in kept],
    evaluation.names,
    unseen=evaluation.untrained,
    palette=config.eval.palette,
  )
  visualize.confusion(
    workdir / f"confusion{suffix}.png",
    evaluation.confusion_CxC,
    evaluation.names,
    unseen=evaluation.untrained,
  )


def score_table(rows: dict[str, dict]) -> str:
  """Plain-text table of metrics in percent, one row per entry."""
  return table([[name, *cells(m)] for name, m in rows.items()], ["%", *COLUMNS])


def cells(scores: dict) -> list[str]:
  return ["-" if scores[c] is None else f"{100 * scores[c]:.1f}" for c in COLUMNS]


def published_cells(values: dict[str, float]) -> list[str]:
  """In percent already; a mean over classes it does not say which stands under both."""
  known = {"miou_gt": values.get("miou"), "miou_union": values.get("miou"), **values}
  return ["-" if known.get(c) is None else f"{known[c]:.1f}" for c in COLUMNS]


def run(config, workdir, evaluations: Sequence) -> dict[str, dict[str, dict]]:
  """`--mode=eval`: scores of a run's newest and best checkpoint, or of a training-free method.

  Writes `eval.json`, `eval.md`, and per data set `predictions.png` and `confusion.png`, with the
  set's name in theirs if there are several. For a training-free method, which has no training to
  write it, the file of a single set is `metrics.json`. Interrupted and repeated, it continues.

  Args:
    config: of the run.
    workdir: of the run.
    evaluations: the data sets; see `evaluate`, and `eval_examples()` for the examples.

  Returns:
    Scores {set: {"last": …, "best": …}}, without "best" where that is the last.
  """
  experiment = Experiment(config, workdir)
  experiment.claim_workdir()
  workdir = experiment.workdir
  one = len(evaluations) == 1
  results, partials = {}, []
  restored = experiment.restored()
  for data in evaluations:
    results[data.name] = {}
    for which, (step, prompts) in restored.items():
      examples = data.eval_examples()
      partial = partial_of(experiment, data, which, step, len(examples))
      partials.append(partial.path)
      if not one or which == "best":
        print(f"{data.name}, {which} checkpoint", flush=True)
      evaluation = evaluate(
        experiment.evaluator(prompts, data),
        examples,
        data,
        keep=PICTURES if which == "last" else 0,
        partial=partial,
      )
      results[data.name][which] = {"step": step, **evaluation.scores}
      if which == "last" and not jax.process_index():
        pictures(workdir, evaluation, config, "" if one else f"_{data.name}")
  if not jax.process_index():
    report(experiment, evaluations, results)
  for path in partials:  # only now: the sets before an interrupted one are not evaluated again
    path.unlink(missing_ok=True)
  return results


def partial_of(experiment: Experiment, data, which: str, step: int, count: int) -> Partial:
  """The file for one set and checkpoint, which holds for this config and these processes only."""
  process = [jax.process_index(), jax.process_count()]
  fields = ("crop", "stride", "seen_penalty", "scales", "flip")
  identity = {
    **experiment.identity,
    "eval": {field: experiment.config.eval[field] for field in fields},
    "step": step,
    "short_side": experiment.config.data.short_side,
    "names": data.names,
    "penalized": data.penalized,
    "count": count,
    "process": process,
  }
  rank = f".{process[0]}" if several() else ""
  return Partial(experiment.workdir / f"eval_{data.name}_{which}{rank}.partial.npz", identity)


def report(experiment: Experiment, evaluations, results: dict) -> None:
  """`eval.json` (or `metrics.json`), `eval.md` and the closing lines."""
  config, workdir, one = experiment.config, experiment.workdir, len(results) == 1
  content = {}
  for name, result in results.items():
    of = f" of {config.data.name}" if name != config.data.name else ""
    content[name] = last_and_best(result["last"], result.get("best"), SELECTED + of)
  content = next(iter(content.values())) if one else {"sets": content}
  path = workdir / ("eval.json" if experiment.trainable or not one else "metrics.json")
  write_json(path, {**content, **origin(config)})

  rows, notes = summary(experiment, results)
  heads = ["set", "%", *COLUMNS]
  sections = [class_table(data, results[data.name]) for data in evaluations]
  sections = ["# Evaluation", table(rows, heads, markdown=True), *notes, *sections]
  (workdir / "eval.md").write_text("\n\n".join(sections) + "\n")

  lines = [extremes(name, result["last"]["per_class"]) for name, result in results.items()]
  print("\n" + "\n\n".join([table(rows, heads), *notes, *lines]))
  end = "" if one else "_*"
  print(
    f"\nLook at {workdir}/predictions{end}.png and {workdir}/confusion{end}.png. "
    f"Every class is in {workdir}/eval.md, every number in {path}."
  )


def summary(experiment: Experiment, results: dict) -> tuple[list[list[str]], list[str]]:
  """Rows of set, method and scores with the published ones among them, and notes to them."""
  config = experiment.config
  setting = "open_vocabulary" if config.eval.sets else config.data.setting
  own = config.model.tuner
  if not experiment.trainable:
    setting, own = "training_free", config.dense.method
  rows, notes = [], []
  for name, result in results.items():
    for which, scores in result.items():
      mark = "*" if which == "best" else ""
      rows.append([name, f"{own}, {which}{mark}, step {scores['step']}", *cells(scores)])
    for method, values in published.rows(setting, name, experiment.clip_config).items():
      rows.append([name, method, *published_cells(values)])
  if any("best" in result for result in results.values()):
    notes.append(f"* selected on {SELECTED} of {config.data.name}: report the last.")
  if any(row[1].endswith("published") for row in rows):
    notes.append(
      'Published scores are of their own protocol. A published "mIoU" stands under both means, '
      "since it does not say which it is."
    )
  return rows, notes


def class_table(data, result: dict) -> str:
  """A Markdown section with the IoU of every class, best first."""
  unseen = {data.names[i] for i in data.unseen}
  columns = [scores["per_class"] for scores in result.values()]
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
  if len(order) <= 2 * EXTREMES:
    return f"{name}, IoU %: {listed(order[::-1])}"
  best, worst = order[: -EXTREMES - 1 : -1], order[:EXTREMES]
  return f"{name}, IoU %, best: {listed(best)}. Worst: {listed(worst)}"


def percent(value: float | None) -> str:
  return "-" if value is None else f"{100 * value:.1f}"
